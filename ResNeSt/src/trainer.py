"""What training is made of: the step, its learning rates and optimizer, the state to resume, the best checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, ops

from src.checkpoints import Facts, save
from src.dataset import DROPOUT
from src.evaluation import Evaluation, SumOverDevices, evaluate
from src.resnest import ResNeSt
from utils.checkpoint import load_strictly, read_checkpoint, save_checkpoint
from utils.cli import Interrupt, UserError
from utils.images import CorruptImages, Loader

STATE = "state"  # the text in a training state beside the parameters


def learning_rates(lr: float, min_lr: float, warmup_epochs: float, epochs: int, steps: int) -> np.ndarray:
    """The learning rate of every step, float32 (epochs * steps,), `steps` being those of one epoch.

    A linear warm-up from 0 to `lr`, then half a cosine to `min_lr` (arXiv 1608.03983, equation 5, without restarts).
    """
    step = np.arange(epochs * steps, dtype=np.float64)
    warmup = round(warmup_epochs * steps)
    progress = np.clip((step - warmup) / max(epochs * steps - warmup, 1), 0, 1)
    rates = min_lr + (lr - min_lr) * (1 + np.cos(np.pi * progress)) / 2
    return np.where(step < warmup, lr * (step + 1) / max(warmup, 1), rates).astype(np.float32)


def make_optimizer(weights: Sequence[Parameter], lr: float, momentum: float, weight_decay: float) -> nn.Optimizer:
    """Gradient descent with Nesterov momentum, and weight decay on all but BN and biases.

    Its learning rate is the parameter `learning_rate`, which the training sets before every step.
    """
    decayed = {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": weight_decay}
    others = {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0}
    # nn.Momentum computes the same but for Nesterov's form, which it leaves out on CPU.
    return nn.SGD([group for group in (decayed, others) if group["params"]], lr, momentum, nesterov=momentum > 0)


def zero_last_gamma(network: ResNeSt) -> None:
    """Set the last BN gamma of every block to 0: each starts as its shortcut (arXiv 1812.01187, section 3.1)."""
    for parameter in network.get_parameters():
        if parameter.name.endswith(".bn3.gamma"):
            parameter.set_data(ops.zeros_like(parameter))


class SoftTargetCrossEntropy(nn.Cell):
    """Mean over the batch of -sum(targets * log softmax(logits)).

    Inputs: logits float32 (N, K); targets float32 (N, K), rows that sum to 1. Output: float32 ().
    """

    def construct(self, logits: Tensor, targets: Tensor) -> Tensor:
        return -(targets * ops.log_softmax(logits, -1)).sum(-1).mean()


class Gradient(nn.Cell):
    """Writes the gradients of the loss of one batch to `gradients`.

    Inputs: images float32 (N, 3, S, S), targets float32 (N, K), keep float32 (N, 2048) or None.
    Outputs: the loss and the gradients' sum of squares, float32 ().
    """

    def __init__(self, network: nn.Cell, criterion: nn.Cell, weights: ParameterTuple, gradients: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.network = network
        self.criterion = criterion
        self.gradients = gradients
        self.gradient = ops.value_and_grad(self.loss, None, weights)
        self.map = ops.HyperMap()

    def loss(self, images: Tensor, targets: Tensor, keep: Tensor | None) -> Tensor:
        return self.criterion(self.network(images, keep), targets)

    def construct(self, images: Tensor, targets: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loss, gradients = self.gradient(images, targets, keep)
        squares = ops.addn(self.map(_sum_of_squares, gradients))
        return ops.depend(loss, self.map(ops.assign, self.gradients, gradients)), squares


def _sum_of_squares(gradient: Tensor) -> Tensor:
    return ops.square(gradient).sum()


class Update(nn.Cell):
    """One step of `optimizer` with the mean of all devices' `gradients`."""

    def __init__(self, optimizer: nn.Optimizer, gradients: ParameterTuple, devices: int):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.gradients = gradients
        self.devices = devices
        self.reduce = nn.DistributedGradReducer(gradients, mean=True, degree=devices) if devices > 1 else None

    def construct(self) -> bool:
        gradients = self.gradients
        if self.devices > 1:
            gradients = self.reduce(gradients)
        return self.optimizer(gradients)


class MeanStatistics(nn.Cell):
    """Replaces the BN statistics of `network` by their means over the devices."""

    def __init__(self, network: nn.Cell, devices: int):
        super().__init__(auto_prefix=False)
        self.statistics = ParameterTuple([p for p in network.get_parameters() if "moving_" in p.name])
        self.reduce = nn.DistributedGradReducer(self.statistics, mean=True, degree=devices)
        self.map = ops.HyperMap()

    def construct(self) -> bool:
        return ops.depend(True, self.map(ops.assign, self.statistics, self.reduce(self.statistics)))


@dataclass(frozen=True)
class StepResult:
    """What one step did, over all devices: the mean loss, and whether some device asks to stop."""

    loss: float
    interrupt: bool


class TrainOneStep:
    """Runs training steps.

    Args:
        network: (images, keep) to logits.
        criterion: (logits, targets) to the loss.
        optimizer: with the parameter `learning_rate`.
        devices: number of devices.
    """

    def __init__(self, network: nn.Cell, criterion: nn.Cell, optimizer: nn.Optimizer, devices: int = 1):
        self.optimizer = optimizer
        self.devices = devices
        weights = optimizer.parameters
        gradients = ParameterTuple(
            [Parameter(np.zeros(w.shape, np.float32), name=f"gradient.{w.name}", requires_grad=False) for w in weights]
        )
        self.gradient = Gradient(network, criterion, weights, gradients)
        self.update = Update(optimizer, gradients, devices)
        self.over_devices = SumOverDevices(devices)
        self.mean_statistics = MeanStatistics(network, devices) if devices > 1 else None

    def __call__(
        self, images: np.ndarray, targets: np.ndarray, keep: np.ndarray | None, lr: float, interrupt: bool = False
    ) -> StepResult:
        """One step at learning rate `lr` on this device's part of the images.

        Images are float32 (N, 3, S, S), targets float32 (N, K), keep float32 (N, 2048) or None.

        Raises:
            UserError: the loss or a gradient is not finite; the weights are those before the step.
        """
        words = [] if keep is None else [Tensor(keep)]
        loss, squares = (float(x.asnumpy()) for x in self.gradient(Tensor(images), Tensor(targets), *words))
        loss, squares, interrupts = self.over_devices.of([loss, squares, interrupt]).tolist()
        if not np.isfinite([loss, squares]).all():
            raise UserError(
                f"the loss is {loss / self.devices} and its gradients are {'' if np.isfinite(squares) else 'not '}"
                "finite; training has diverged, start again with a lower --lr or more --warmup_epochs"
            )
        self.optimizer.learning_rate.set_data(Tensor(lr, ms.float32))
        self.update()
        return StepResult(loss / self.devices, interrupts > 0)

    def synchronise(self) -> None:
        """Give every device the mean of all devices' BN statistics, so that all of them evaluate the same network."""
        if self.mean_statistics is not None:
            self.mean_statistics()


def dropout_mask(
    network: ResNeSt, batch_size: int, seed: int, epoch: int, step: int, rank: int = 0, devices: int = 1
) -> np.ndarray | None:
    """What this device's features are multiplied by in one step, float32 (N, 2048); the draws are of the whole step."""
    if not network.dropout:
        return None
    rng = np.random.default_rng([seed, epoch, DROPOUT, step])
    return network.sample_keep(batch_size * devices, rng).reshape(devices, batch_size, -1)[rank]


class EvaluateAndKeepBest:
    """Evaluates the network over all devices and keeps the checkpoint of the highest top-1 so far.

    Args:
        network: what is trained. loader: the validation images, of these `sizes`. path: the best checkpoint.
        best: what `best` was in the run that is resumed, or None.
    """

    def __init__(
        self,
        network: ResNeSt,
        loader: Loader,
        batch_size: int,
        path: Path,
        sizes: tuple[int, int],
        best: dict | None,
        rank: int,
        devices: int,
        strict: bool,
        interrupt: Interrupt,
    ):
        self.network = network
        self.loader = loader
        self.batch_size = batch_size
        self.path = path
        self.sizes = sizes
        self.best = best
        self.rank = rank
        self.devices = devices
        self.interrupt = interrupt
        self.on_corrupt = CorruptImages(loader.folder, strict)

    def __call__(self, epoch: int) -> Evaluation:
        """Evaluate after `epoch`, counted from 1; `self.best["epoch"]` is then `epoch` if it is the best one."""
        result = evaluate(
            self.network, self.loader, self.batch_size, self.rank, self.devices, self.interrupt, self.on_corrupt
        )
        self.network.set_train(True)
        if not result.images:
            raise UserError("none of the validation images can be read")
        if self.best is None or result.top() >= self.best["top1"]:
            self.best = {"epoch": epoch, "top1": result.top(), "top5": result.top(1), "loss": result.mean_loss()}
            if self.rank == 0:
                save(self.network, self.path, Facts(self.loader.folder.classes, self.sizes))
        return result


def read_state(path: str | Path) -> dict:
    """The "settings" and the "position" that `save_state` stored in the training state `path`.

    Raises:
        UserError: not a training state.
    """
    stored = read_checkpoint(path).get(STATE)
    if stored is None:
        raise UserError(f"{path} is no training state; --resume takes the resume.ckpt of an interrupted training")
    return json.loads(stored)


def save_state(path: Path, network: nn.Cell, optimizer: nn.Optimizer, settings: dict, position: dict) -> None:
    """Write everything that `load_state` needs to go on from here: weights, optimizer, `settings` and `position`."""
    texts = {STATE: json.dumps({"settings": settings, "position": position})}
    save_checkpoint(_everything(network, optimizer), path, texts)


def load_state(path: str | Path, network: nn.Cell, optimizer: nn.Optimizer, settings: dict) -> dict:
    """Restore what `save_state` wrote; returns the position.

    Raises:
        UserError: not a training state, or one of a run with other settings.
    """
    stored = read_state(path)
    differing = [key for key in settings if stored["settings"].get(key) != json.loads(json.dumps(settings[key]))]
    if differing:
        theirs = ", ".join(f"{key} {stored['settings'].get(key)} (now {settings[key]})" for key in differing)
        raise UserError(f"{path} is of a run with other settings: {theirs}; resume with the same, or start anew")
    load_strictly(_everything(network, optimizer), path, "this training's state", lambda names: "another one")
    return stored["position"]


def _everything(network: nn.Cell, optimizer: nn.Optimizer) -> list[Parameter]:
    return list({p.name: p for cell in (network, optimizer) for p in cell.get_parameters()}.values())
