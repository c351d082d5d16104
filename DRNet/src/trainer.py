"""Training of DRNet (arXiv 2106.02898, sections 3.2 to 3.4): the step, the optimizer, and exact resume.

A step works in groups: each candidate resolution gets the images that go through the classifier there, so that each BN
sees its own samples alone. In pre-training every group is the whole batch, in fine-tuning what the predictor chose. The
gradients of the groups are summed where they arise, reduced over the devices once, and given to the optimizer.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, ops

from src.drnet import DRNet, kind_of
from src.gumbelmodule import GumbelSoftmax
from utils.checkpoint import load_strictly, read_checkpoint, save_checkpoint
from utils.cli import UserError

STATE = "state"


class GroupLoss(nn.Cell):
    """Cross entropy of one group, summed and divided by the global batch.

    The logits are multiplied by the straight-through choice (1 in the forward pass), through which the gradient reaches
    the predictor.

    Inputs: images float32 (n, 3, S, S), labels int32 (n,), choice float32 (n,), scale float32 (): 1 / global batch.
    Outputs: the loss, float32 (), and the logits, float32 (n, K).
    """

    def __init__(self, classify: nn.Cell):
        super().__init__(auto_prefix=False)
        self.classify = classify

    def construct(self, images: Tensor, labels: Tensor, choice: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classify(images) * choice.expand_dims(1)
        return ops.cross_entropy(logits, labels, reduction="sum") * scale, logits


class GroupGradient(nn.Cell):
    """`GroupLoss` and its gradients: those of the weights are added to `sums`, that of the choice is returned.

    Outputs: loss float32 (), logits float32 (n, K), gradient of the choice float32 (n,).
    """

    def __init__(self, loss: GroupLoss, weights: ParameterTuple, sums: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.sums = sums
        self.gradient = ops.value_and_grad(loss, grad_position=2, weights=weights, has_aux=True)
        self.map = ops.HyperMap()

    def construct(self, images: Tensor, labels: Tensor, choice: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (loss, logits), (choice_gradient, weight_gradients) = self.gradient(images, labels, choice, scale)
        loss = ops.depend(loss, self.map(ops.assign_add, self.sums, weight_gradients))
        return loss, logits, choice_gradient


class Choose(nn.Cell):
    """The straight-through choice: images float32 (N, 3, S, S) and Gumbel noise (N, R) to one-hot rows (N, R)."""

    def __init__(self, predict: nn.Cell, temperature: float):
        super().__init__(auto_prefix=False)
        self.predict = predict
        self.gumbel = GumbelSoftmax(temperature)

    def construct(self, images: Tensor, noise: Tensor) -> Tensor:
        return self.gumbel(self.predict(images), noise)


class ChooseGradient(nn.Cell):
    """Adds to `sums` the gradient of the predictor's weights, given that of the choice, float32 (N, R).

    Inputs: images, noise as `Choose`; the choice's gradient. Outputs: float32 (), of no use but to wait for.
    """

    def __init__(self, choose: Choose, weights: ParameterTuple, sums: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.sums = sums
        self.choose = choose
        self.gradient = ops.value_and_grad(self.product, grad_position=None, weights=weights)
        self.map = ops.HyperMap()

    def product(self, images: Tensor, noise: Tensor, choice_gradient: Tensor) -> Tensor:
        return (self.choose(images, noise) * choice_gradient).sum()

    def construct(self, images: Tensor, noise: Tensor, choice_gradient: Tensor) -> Tensor:
        value, weight_gradients = self.gradient(images, noise, choice_gradient)
        return ops.depend(value, self.map(ops.assign_add, self.sums, weight_gradients))


class Copy(nn.Cell):
    """Copies the parameters `source` into the parameters `target`."""

    def __init__(self, source: ParameterTuple, target: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.source = source
        self.target = target
        self.map = ops.HyperMap()

    def construct(self) -> bool:
        return ops.depend(True, self.map(ops.assign, self.target, self.source))


class Update(nn.Cell):
    """One step of `optimizer` with the gradients in `sums`, summed over the devices first; then clears `sums`."""

    def __init__(self, optimizer: nn.Optimizer, sums: ParameterTuple, devices: int):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.sums = sums
        self.devices = devices
        self.reduce = nn.DistributedGradReducer(sums, mean=False, degree=devices) if devices > 1 else None
        self.map = ops.HyperMap()

    def construct(self) -> bool:
        gradients = self.sums
        if self.devices > 1:
            gradients = self.reduce(gradients)
        done = self.optimizer(gradients)
        zeros = self.map(ops.zeros_like, self.sums)
        return ops.depend(True, self.map(ops.assign, ops.depend(self.sums, done), zeros))


class SumOverDevices(nn.Cell):
    """Sum over the devices of a float32 vector; the vector itself on one device."""

    def __init__(self, devices: int):
        super().__init__(auto_prefix=False)
        self.reduce = ops.AllReduce() if devices > 1 else None

    def construct(self, x: Tensor) -> Tensor:
        return x if self.reduce is None else self.reduce(x)


@dataclass
class StepResult:
    """What one step did, over all devices.

    loss: mean over the global batch, budget term included. correct: top-1 hits, int64 (R,); chosen: images that went
    through the classifier at each candidate, int64 (R,); images: readable images in the global batch. interrupt: some
    device asks to stop.
    """

    loss: float
    correct: np.ndarray
    chosen: np.ndarray
    images: int
    interrupt: bool = False


class Trainer:
    """Runs training steps.

    Args:
        drnet: the networks.
        optimizers: of the classifier and, in fine-tuning, of the predictor, as `make_optimizer` makes them.
        batch_size: images per device and step.
        devices: number of devices.
        temperature: of the Gumbel-Softmax; None pre-trains: every image at every resolution, without the predictor.
        budget: (alpha, eta) of the loss's FLOPs term (section 3.4), alpha in GMACs; None for none.
    """

    def __init__(
        self,
        drnet: DRNet,
        optimizers: Sequence[nn.Optimizer],
        batch_size: int,
        devices: int = 1,
        temperature: float | None = None,
        budget: tuple[float, float] | None = None,
    ):
        self.drnet = drnet
        self.batch_size = batch_size
        self.devices = devices
        self.budget = budget
        self.candidates = len(drnet.architecture.resolutions)
        self.gmacs = np.array(drnet.gmacs()[1])
        # The network halves the side five times: with one image of one pixel left, a BN has no variance to learn from.
        self.smallest_group = [2 if resolution <= 32 else 1 for resolution in drnet.architecture.resolutions]
        drnet.set_train(True)
        size = drnet.architecture.image_size
        images = Tensor(shape=[None, 3, size, size], dtype=ms.float32)
        number = Tensor(shape=[None], dtype=ms.float32)
        sums = [_zeros_like(optimizer.parameters) for optimizer in optimizers]
        self.updates = [Update(optimizer, own, devices) for optimizer, own in zip(optimizers, sums)]
        self.groups = []
        for classify in drnet.classify:
            group = GroupGradient(GroupLoss(classify), optimizers[0].parameters, sums[0])
            group.set_train(True)
            group.set_inputs(images, Tensor(shape=[None], dtype=ms.int32), number, Tensor(1.0, ms.float32))
            self.groups.append(group)
        self.choose = None
        if temperature is not None:
            matrix = Tensor(shape=[None, self.candidates], dtype=ms.float32)
            self.choose = Choose(drnet.predict, temperature)
            self.choose_gradient = ChooseGradient(self.choose, optimizers[1].parameters, sums[1])
            self.choose.set_inputs(images, matrix)
            self.choose_gradient.set_inputs(images, matrix, matrix)
            for cell in (self.choose, self.choose_gradient):
                cell.set_train(True)
            statistics = ParameterTuple(
                [parameter for parameter in drnet.predictor.get_parameters() if "moving_" in parameter.name]
            )
            kept = statistics.clone("kept", init="same")
            self.keep, self.restore = Copy(statistics, kept), Copy(kept, statistics)
        self.over_devices = SumOverDevices(devices)
        self.average = _Average(drnet, devices) if devices > 1 else None

    def step(
        self, images: np.ndarray, labels: np.ndarray, noise: np.ndarray | None = None, interrupt: bool = False
    ) -> StepResult:
        """One step on this device's part of the batch: images (n, 3, S, S), labels (n,), Gumbel noise (n, R).

        Raises:
            UserError: the loss is not finite; the weights are those before the step.
        """
        # One image leaves the predictor's BNs, where their input is one pixel, without a variance; so skip it.
        count = len(labels) if len(labels) > 1 else 0
        images, labels = images[:count], labels[:count]
        scale = Tensor(1 / (self.batch_size * self.devices), ms.float32)
        if self.choose is None:
            choice = np.ones((count, self.candidates), np.float32)
        else:
            # The predictor runs twice, here and for its gradient, but its moving statistics advance once.
            self.keep()
            choice = np.zeros((0, self.candidates), np.float32)
            if count:
                scores = self.choose(Tensor(images), Tensor(noise[:count])).asnumpy()
                choice = np.eye(self.candidates, dtype=np.float32)[scores.argmax(1)]
            self.restore()
        chosen = choice.sum(0)
        chosen, interrupts = np.split(self.sum_over_devices([*chosen, interrupt]), [self.candidates])
        total = chosen.sum() if self.choose is not None else chosen[0]
        excess, cost_gradient = self._budget(chosen)

        loss, correct = 0.0, np.zeros(self.candidates)
        choice_gradient = np.tile(cost_gradient, (count, 1)).astype(np.float32)
        for candidate, group in enumerate(self.groups):
            rows = np.flatnonzero(choice[:, candidate])
            if len(rows) < self.smallest_group[candidate]:
                continue
            group_loss, logits, gradient = group(
                Tensor(images[rows]), Tensor(labels[rows]), Tensor(choice[rows, candidate]), scale
            )
            loss += float(group_loss.asnumpy())
            correct[candidate] = (logits.asnumpy().argmax(1) == labels[rows]).sum()
            choice_gradient[rows, candidate] += gradient.asnumpy()
        loss, *correct = self.sum_over_devices([loss, *correct])
        loss += excess
        if not np.isfinite(loss):
            raise UserError(
                f"the loss is {loss}; training has diverged, start again with a lower --lr or a longer warm-up"
            )
        if self.choose is not None and count:
            self.choose_gradient(Tensor(images), Tensor(noise[:count]), Tensor(choice_gradient))
        for update in self.updates:
            update()
        return StepResult(loss, np.array(correct, int), chosen.astype(int), int(total), bool(interrupts[0]))

    def sum_over_devices(self, numbers: Sequence[float]) -> np.ndarray:
        """Each of `numbers` summed over all devices, float32."""
        return self.over_devices(Tensor(np.array(numbers, np.float32))).asnumpy()

    def _budget(self, chosen: np.ndarray) -> tuple[float, np.ndarray]:
        """The budget term for the numbers of images chosen, (R,), and its gradient for one image's choice, (R,)."""
        if self.budget is None or not chosen.sum():
            return 0.0, np.zeros(self.candidates)
        alpha, eta = self.budget
        spread = self.gmacs.max() - self.gmacs.min()
        excess = (chosen @ self.gmacs / chosen.sum() - alpha) / spread
        if excess <= 0:
            return 0.0, np.zeros(self.candidates)
        return float(eta * excess), eta * self.gmacs / spread / chosen.sum()

    def synchronise(self) -> None:
        """Give every device the mean of all devices' BN statistics, so that all of them evaluate the same network."""
        if self.average is not None:
            self.average()


def _zeros_like(weights: Sequence[Parameter]) -> ParameterTuple:
    return ParameterTuple(
        [Parameter(np.zeros(w.shape, np.float32), name=f"gradient.{w.name}", requires_grad=False) for w in weights]
    )


class _Average(nn.Cell):
    """Replaces the moving statistics of both networks by their means over the devices."""

    def __init__(self, drnet: DRNet, devices: int):
        super().__init__(auto_prefix=False)
        networks = (drnet.classifier, drnet.predictor)
        statistics = [p for network in networks for p in network.get_parameters() if "moving_" in p.name]
        self.statistics = ParameterTuple(statistics)
        self.reduce = nn.DistributedGradReducer(self.statistics, mean=True, degree=devices)
        self.map = ops.HyperMap()

    def construct(self) -> bool:
        return ops.depend(True, self.map(ops.assign, self.statistics, self.reduce(self.statistics)))


def learning_rates(
    lr: float, scheduler: str, epochs: int, steps: int, warmup_epochs: float, lr_step: int, lr_gamma: float
) -> np.ndarray:
    """The learning rate of every step, float32 (epochs * steps,), `steps` being those of one epoch.

    Linear warm-up to `lr`, then times `lr_gamma` every `lr_step` epochs ("step") or half a cosine to 0 ("cosine").
    """
    position = np.arange(epochs * steps)
    warmup = round(warmup_epochs * steps)
    if scheduler == "step":
        rates = lr * lr_gamma ** (position // (lr_step * steps))
    else:
        progress = np.clip((position - warmup) / max(epochs * steps - warmup, 1), 0, 1)
        rates = lr * (1 + np.cos(np.pi * progress)) / 2
    if warmup:
        rates = np.where(position < warmup, lr * (position + 1) / warmup, rates)
    return rates.astype(np.float32)


def make_optimizer(
    name: str, network: nn.Cell, rates: np.ndarray, momentum: float, weight_decay: float
) -> nn.Optimizer:
    """SGD with momentum ("sgd") or AdamW ("adamw") over all trainable parameters of `network`.

    Args:
        rates: learning rate of every step, float32.
    """
    weights = network.trainable_params()
    if name == "sgd":
        optimizer = nn.Momentum(weights, rates.tolist(), momentum, weight_decay)
    else:
        optimizer = nn.AdamWeightDecay(weights, rates.tolist(), weight_decay=weight_decay)
    # The step counter and the like, so that the state file can hold two optimizers.
    known = {id(weight) for weight in weights}
    owner = weights[0].name.split(".")[0]
    for parameter in optimizer.get_parameters():
        if id(parameter) not in known and f"{owner}." not in parameter.name:
            parameter.name = f"{owner}.optimizer.{parameter.name}"
    return optimizer


def read_state(path: str | Path) -> dict:
    """The "settings" and the "position" that `save_state` stored in the training state `path`.

    Raises:
        UserError: not a training state.
    """
    stored = read_checkpoint(path).get(STATE)
    if stored is None:
        raise UserError(f"{path} is no training state; --resume takes the resume.ckpt of an interrupted training")
    return json.loads(stored)


def save_state(path: Path, drnet: DRNet, optimizers: Sequence[nn.Optimizer], settings: dict, position: dict) -> None:
    """Write everything that `load_state` needs to go on from here: weights, optimizer, `settings` and `position`."""
    texts = {STATE: json.dumps({"settings": settings, "position": position})}
    save_checkpoint(_everything(drnet, optimizers), path, texts)


def load_state(path: str | Path, drnet: DRNet, optimizers: Sequence[nn.Optimizer], settings: dict) -> dict:
    """Restore what `save_state` wrote; returns the position.

    Raises:
        UserError: not a training state, or one of a run with other settings.
    """
    stored = read_state(path)
    differing = [key for key in settings if stored["settings"].get(key) != json.loads(json.dumps(settings[key]))]
    if differing:
        theirs = ", ".join(f"{key} {stored['settings'].get(key)} (now {settings[key]})" for key in differing)
        raise UserError(f"{path} is of a run with other settings: {theirs}; resume with the same, or start anew")
    load_strictly(_everything(drnet, optimizers), path, "this training's state", kind_of)
    return stored["position"]


def _everything(drnet: DRNet, optimizers: Sequence[nn.Optimizer]) -> list[Parameter]:
    cells = (drnet.classifier, drnet.predictor, *optimizers)
    return list({parameter.name: parameter for cell in cells for parameter in cell.get_parameters()}.values())
