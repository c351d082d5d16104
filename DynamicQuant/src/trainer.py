"""What training is made of: the step, its learning rates and optimizer, the state to resume, the best checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, ops

from src.checkpoints import Description, save
from src.dataset import CONTROLLER, GUMBEL
from src.evaluation import Evaluation, SumOverDevices, evaluate
from src.gumbelsoftmax import GumbelSoftmax, gumbel_noise
from src.inference import Front, Predictor
from src.resnet import Architecture, ResNet
from utils.checkpoint import load_strictly, read_checkpoint, save_checkpoint
from utils.cli import Interrupt, UserError
from utils.images import CorruptImages, Loader

STATE = "state"  # the text in a training state beside the parameters
# An epoch whose mean bits exceed the budget by more than this is best only if no other epoch keeps to it.
TOLERANCE = 0.05
CONTROLLER_LAYERS = ("fc1.", "fc2.")
TINY = 1e-6  # in place of 0 in a quotient
SPREAD = 2.0  # of the scores of a new controller; their noise has a deviation of 1.3


def learning_rates(
    lr: float, lr_steps: Sequence[int], lr_gamma: float, warmup_epochs: float, epochs: int, steps: int
) -> np.ndarray:
    """The learning rate of every step, float32 (epochs * steps,), `steps` being those of one epoch.

    A linear warm-up from 0 to `lr`; after each of the epochs `lr_steps` it is multiplied by `lr_gamma`.
    """
    step = np.arange(epochs * steps, dtype=np.float64)
    warmup = round(warmup_epochs * steps)
    drops = np.searchsorted(np.array(lr_steps) * steps, step, side="right")
    rates = lr * lr_gamma**drops
    return np.where(step < warmup, rates * (step + 1) / max(warmup, 1), rates).astype(np.float32)


def make_optimizer(network: ResNet, lr: float, momentum: float, weight_decay: float) -> nn.Optimizer:
    """Gradient descent with momentum for all parameters.

    The controller's are a group of their own, because `TrainOneStep` sets the learning rate of each group.
    """
    groups = [[], []]
    for parameter in network.trainable_params():
        groups[parameter.name.startswith(CONTROLLER_LAYERS)].append(parameter)
    return nn.SGD(
        [{"params": params, "lr": lr} for params in groups if params], lr, momentum, weight_decay=weight_decay
    )


def even_controller(network: ResNet) -> None:
    """Make all scores 0, so that every bit-width is sampled equally often."""
    for parameter in (network.fc2.weight, network.fc2.bias):
        parameter.set_data(ops.zeros_like(parameter))


class DynamicLoss(nn.Cell):
    """The cross entropy of a batch at the bits that the controller chooses, plus the penalty of their mean.

    loss = CE + penalty * max(0, mean bits - budget) (paper, equation 8). With several devices the mean is over all.

    Args:
        network: the network in the form that is trained. bits: its candidates; () for the float network.

    Inputs: images float32 (N, 3, S, S); labels int32 (N,); noise float32 (N, D, R) from `gumbel_noise`, or None.
    Outputs: the loss, and the mean bits of this device's images, float32 ().
    """

    def __init__(
        self,
        network: ResNet,
        bits: tuple[int, ...],
        budget: float = 0.0,
        penalty: float = 0.0,
        temperature: float = 1.0,
        devices: int = 1,
    ):
        super().__init__(auto_prefix=False)
        self.network = network
        self.gumbel = GumbelSoftmax(temperature)
        self.bits = Tensor(bits or (0,), ms.float32)
        self.budget = budget
        self.penalty = penalty
        self.devices = devices
        self.reduce = ops.AllReduce() if devices > 1 else None

    def construct(self, images: Tensor, labels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features, scores = self.network.front(images)
        if scores is None:
            return ops.cross_entropy(self.network.back(features, None), labels), self.bits.mean()
        choices = self.gumbel(scores, noise)
        loss = ops.cross_entropy(self.network.back(features, choices), labels)
        own = (choices * self.bits).sum(-1).mean()
        mean = own
        if self.devices > 1:
            # The value is that of all devices, the gradient that of the own part; the reduction averages them.
            mean = own + ops.stop_gradient(self.reduce(ops.stop_gradient(own)) / self.devices - own)
        return loss + self.penalty * ops.relu(mean - self.budget), own


class Gradient(nn.Cell):
    """Writes the gradients of the loss of one batch to `gradients`.

    Inputs: as `DynamicLoss`. Outputs: the loss, the mean bits and the gradients' sum of squares, float32 ().
    """

    def __init__(self, loss: DynamicLoss, weights: ParameterTuple, gradients: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.gradients = gradients
        self.gradient = ops.value_and_grad(loss, None, weights, has_aux=True)
        self.map = ops.HyperMap()

    def construct(self, images: Tensor, labels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        (loss, bits), gradients = self.gradient(images, labels, noise)
        squares = ops.addn(self.map(_sum_of_squares, gradients))
        return ops.depend(loss, self.map(ops.assign, self.gradients, gradients)), bits, squares


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
    """What one step did, over all devices: mean loss, mean of the chosen bits, whether some device asks to stop."""

    loss: float
    bits: float
    interrupt: bool


class TrainOneStep:
    """Runs training steps.

    Args:
        loss: with the network that is trained.
        optimizer: with the parameter `learning_rate`.
        devices: number of devices.
        controller_lr_ratio: the controller's learning rate as a part of the others'.
    """

    def __init__(self, loss: DynamicLoss, optimizer: nn.Optimizer, devices: int = 1, controller_lr_ratio: float = 1.0):
        self.network = loss.network
        self.optimizer = optimizer
        self.controller_lr_ratio = controller_lr_ratio
        # The optimizer lists a rate for every weight; those of a group are one parameter.
        self.rates = list({rate.name: rate for rate in optimizer.learning_rate}.values())
        self.devices = devices
        weights = optimizer.parameters
        gradients = ParameterTuple(
            [Parameter(np.zeros(w.shape, np.float32), name=f"gradient.{w.name}", requires_grad=False) for w in weights]
        )
        self.gradient = Gradient(loss, weights, gradients)
        self.update = Update(optimizer, gradients, devices)
        self.over_devices = SumOverDevices(devices)
        self.mean_statistics = MeanStatistics(loss.network, devices) if devices > 1 else None

    def __call__(
        self, images: np.ndarray, labels: np.ndarray, noise: np.ndarray | None, lr: float, interrupt: bool = False
    ) -> StepResult:
        """One step at learning rate `lr` on this device's images float32 (N, 3, S, S), labels int32, noise (N, D, R).

        Raises:
            UserError: the loss or a gradient is not finite; the weights are those before the step.
        """
        words = [] if noise is None else [Tensor(noise)]
        out = self.gradient(Tensor(images), Tensor(labels), *words)
        loss, bits, squares = (float(x.asnumpy()) for x in out)
        loss, bits, squares, interrupts = self.over_devices.of([loss, bits, squares, interrupt]).tolist()
        if not np.isfinite([loss, squares]).all():
            raise UserError(
                f"the loss is {loss / self.devices} and its gradients are {'' if np.isfinite(squares) else 'not '}"
                "finite; training has diverged, start again with a lower --lr or more --warmup_epochs"
            )
        for rate, ratio in zip(self.rates, (1.0, self.controller_lr_ratio)):
            rate.set_data(Tensor(lr * ratio, ms.float32))
        self.update()
        return StepResult(loss / self.devices, bits / self.devices, interrupts > 0)

    def start_controller(self, images: np.ndarray, seed: int) -> None:
        """Give the controller scores that differ between images: over these, each has mean 0 and deviation SPREAD.

        With a usual initialisation, what all images have in common is so much larger that it decides alike for all of
        them. So the first layer leaves out the direction of the mean input, and the second is drawn from `seed` and
        scaled. The controller's momentum begins anew.

        Args:
            images: float32 (N, 3, S, S), the same on every device.
        """
        network = self.network.set_train(False)
        features, _ = Front(network)(Tensor(images))
        inputs = network.avg_pool(features).flatten(start_dim=1).asnumpy()
        network.set_train(True)
        mean = inputs.mean(0)
        first = network.fc1.weight.asnumpy()
        first = first - np.outer(first @ mean, mean) / max(mean @ mean, TINY)
        second = np.random.default_rng([seed, CONTROLLER]).standard_normal(network.fc2.weight.shape)
        scores = (inputs @ first.T + network.fc1.bias.asnumpy()) @ second.T
        scale = SPREAD / np.maximum(scores.std(0), TINY)
        for parameter, value in (
            (network.fc1.weight, first),
            (network.fc2.weight, second * scale[:, None]),
            (network.fc2.bias, -scores.mean(0) * scale),
        ):
            # Devices may have rounded differently, and only gradients are averaged from here on.
            value = self.over_devices.of(value.ravel()) / self.devices
            parameter.set_data(Tensor(value.reshape(parameter.shape)))
        for velocity in self.optimizer.accum:
            if velocity.name.removeprefix("accum.").startswith(CONTROLLER_LAYERS):
                velocity.set_data(ops.zeros_like(velocity))

    def synchronise(self) -> None:
        """Give every device the mean of all devices' BN statistics, so that all of them evaluate the same network."""
        if self.mean_statistics is not None:
            self.mean_statistics()


def step_noise(
    architecture: Architecture, batch_size: int, seed: int, epoch: int, step: int, rank: int = 0, devices: int = 1
) -> np.ndarray | None:
    """This device's Gumbel noise of one step, float32 (N, D, R); the draws are of the whole step."""
    if not architecture.decisions:
        return None
    shape = (devices, batch_size, architecture.decisions, len(architecture.bits))
    return gumbel_noise(shape, seed, epoch, GUMBEL, step)[rank]


class EvaluateAndKeepBest:
    """Evaluates the network over all devices and keeps the checkpoint of the highest top-1 within the bit budget.

    Args:
        network: what is trained. description: what it is. loader: the validation images. path: the best checkpoint.
        budget: mean bits to keep to, or None. best: what `best` was in the run that is resumed, or None.
    """

    def __init__(
        self,
        network: ResNet,
        description: Description,
        loader: Loader,
        batch_size: int,
        path: Path,
        budget: float | None,
        best: dict | None,
        rank: int,
        devices: int,
        strict: bool,
        interrupt: Interrupt,
    ):
        self.network = network
        self.description = description
        self.loader = loader
        self.path = path
        self.budget = budget
        self.best = best
        self.rank = rank
        self.devices = devices
        self.interrupt = interrupt
        self.on_corrupt = CorruptImages(loader.folder, strict)
        self.predictor = Predictor(description.architecture, batch_size)

    def __call__(self, epoch: int) -> Evaluation:
        """Evaluate after `epoch`, counted from 1; `self.best["epoch"]` is then `epoch` if it is the best one."""
        predictor = self.predictor.load(self.network)
        result = evaluate(predictor, self.loader, self.rank, self.devices, self.interrupt, self.on_corrupt)
        if not result.images:
            raise UserError("none of the validation images can be read")
        bits = result.mean_bits(predictor.bits) if predictor.bits else None
        within = self.budget is None or bits <= self.budget + TOLERANCE
        if self.best is None or (within, result.top()) >= (self.best["within_budget"], self.best["top1"]):
            self.best = {"epoch": epoch, "top1": result.top(), "top5": result.top(1), "loss": result.mean_loss()}
            self.best |= {"mean_bits": bits, "within_budget": within}
            if self.rank == 0:
                save(self.network, self.path, self.description)
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
