"""One training step: loss scale, gradients summed over batches and devices, global-norm clipping, update.

The loss scale, the counts and the learning rate live on the host, where a resumed training finds them again.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import ParameterTuple, Tensor, ops

from src.data.imagenet import DROP_PATH
from src.models.ddrnet import DDRNet23
from utils.cli import UserError
from utils.device import ONE_DEVICE, Devices
from utils.training import check_finite, gradient_sums

# Steps without overflow after which a dynamic loss scale doubles (arXiv 1710.03740, section 3.2).
SCALE_WINDOW = 2000
MAX_LOSS_SCALE = 2.0**24
# Overflows in a row that no loss scale explains.
MAX_OVERFLOWS = 50


class Gradient(nn.Cell):
    """Adds the gradients of `loss_scale` times the loss of one batch to `sums`.

    Inputs: images float32 (N, 3, S, S), targets float32 (N, K), loss_scale float32 (), keep float32 (N, 14) or None.
    Output: the loss, float32 ().
    """

    def __init__(self, network: nn.Cell, criterion: nn.Cell, weights: ParameterTuple, sums: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.network = network
        self.criterion = criterion
        self.sums = sums
        self.gradient = ops.value_and_grad(self.scaled_loss, None, weights, has_aux=True)
        self.map = ops.HyperMap()

    def scaled_loss(self, images: Tensor, targets: Tensor, loss_scale: Tensor, keep: Tensor | None):
        loss = self.criterion(self.network(images, keep), targets)
        return loss * loss_scale, loss

    def construct(self, images: Tensor, targets: Tensor, loss_scale: Tensor, keep: Tensor | None = None) -> Tensor:
        (_, loss), gradients = self.gradient(images, targets, loss_scale, keep)
        return ops.depend(loss, self.map(ops.assign_add, self.sums, gradients))


class MeanGradient(nn.Cell):
    """Sums `sums` over the devices and divides them by `divisor`.

    Inputs: divisor, loss, interrupt: float32 (). Output: float32 (3,): global norm of the result, and the sums over the
    devices of loss and interrupt, so that the host waits for the device once in a step.
    """

    def __init__(self, sums: ParameterTuple, devices: int):
        super().__init__(auto_prefix=False)
        self.sums = sums
        self.devices = devices
        self.reduce = nn.DistributedGradReducer(sums, mean=False, degree=devices) if devices > 1 else None
        self.reduce_numbers = ops.AllReduce() if devices > 1 else None
        self.map = ops.HyperMap()

    def construct(self, divisor: Tensor, loss: Tensor, interrupt: Tensor) -> Tensor:
        gradients = self.sums
        numbers = ops.stack((loss, interrupt))
        if self.devices > 1:
            gradients = self.reduce(gradients)
            numbers = self.reduce_numbers(numbers)
        gradients = self.map(ops.partial(_divide, divisor), gradients)
        norm = ops.sqrt(ops.addn(self.map(_sum_of_squares, gradients)))
        numbers = ops.concat((norm.reshape((1,)), numbers))
        return ops.depend(numbers, self.map(ops.assign, self.sums, gradients))


def _divide(divisor: Tensor, gradient: Tensor) -> Tensor:
    return gradient / divisor


def _sum_of_squares(gradient: Tensor) -> Tensor:
    return ops.square(gradient).sum()


class Update(nn.Cell):
    """One step of `optimizer` with `factor`, float32 (), times the gradients in `sums`; clears them."""

    def __init__(self, optimizer: nn.Optimizer, sums: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.sums = sums
        self.map = ops.HyperMap()

    def construct(self, factor: Tensor) -> bool:
        done = self.optimizer(self.map(ops.partial(ops.mul, factor), self.sums))
        zeros = self.map(ops.zeros_like, self.sums)
        return ops.depend(True, self.map(ops.assign, ops.depend(self.sums, done), zeros))


class Clear(nn.Cell):
    """Sets `sums` to zero."""

    def __init__(self, sums: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.sums = sums
        self.map = ops.HyperMap()

    def construct(self) -> bool:
        return ops.depend(True, self.map(ops.assign, self.sums, self.map(ops.zeros_like, self.sums)))


@dataclass
class LossScale:
    """The loss scale, and how it went so far.

    value: what the loss is multiplied by. dynamic: halved (down to 1) at an overflow, doubled after SCALE_WINDOW steps
    without. good: steps since the last change; overflows, in_a_row: number of steps skipped, in all and lately.
    """

    value: float
    dynamic: bool
    good: int = 0
    overflows: int = 0
    in_a_row: int = 0

    def update(self, overflow: bool) -> None:
        """Count a step.

        Raises:
            UserError: MAX_OVERFLOWS overflows in a row.
        """
        if overflow:
            self.overflows += 1
            self.in_a_row += 1
            self.good = 0
            if self.dynamic:
                self.value = max(self.value / 2, 1.0)
            if self.in_a_row >= MAX_OVERFLOWS:
                raise UserError(
                    f"the gradients of {self.in_a_row} steps in a row are not finite, at a loss scale of "
                    f"{self.value:g}; training has diverged, start again with a lower --base_lr or --loss_scale"
                )
            return
        self.in_a_row = 0
        self.good += 1
        if self.dynamic and self.good >= SCALE_WINDOW:
            self.value, self.good = min(2 * self.value, MAX_LOSS_SCALE), 0


@dataclass(frozen=True)
class StepResult:
    """What one step did, over all devices.

    loss: mean over all batches; norm: global norm of the gradients before clipping; overflow: whether the step was
    skipped because they are not finite; loss_scale: that of this step; interrupt: some device asks to stop.
    """

    loss: float
    norm: float
    overflow: bool
    loss_scale: float
    interrupt: bool = False


class TrainOneStep:
    """Runs training steps.

    Args:
        network: (images, keep) to logits.
        criterion: (logits, targets) to the loss.
        optimizer: with the parameter `learning_rate`.
        loss_scale: state of the loss scale; it changes with the steps.
        clip: global norm to clip the gradients to, after their mean over the devices; None: no clipping.
        devices: those that train.
    """

    def __init__(
        self,
        network: nn.Cell,
        criterion: nn.Cell,
        optimizer: nn.Optimizer,
        loss_scale: LossScale,
        clip: float | None,
        devices: Devices = ONE_DEVICE,
    ):
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.clip = clip
        self.devices = devices
        sums = gradient_sums(optimizer.parameters)
        self.gradient = Gradient(network, criterion, optimizer.parameters, sums)
        self.mean_gradient = MeanGradient(sums, devices.count)
        self.update = Update(optimizer, sums)
        self.clear = Clear(sums)

    def __call__(
        self,
        batches: Sequence[tuple[Tensor | np.ndarray, Tensor | np.ndarray, np.ndarray | None]],
        lr: float,
        interrupt: bool = False,
    ) -> StepResult:
        """One step at learning rate `lr` on the mean gradient of `batches`, this device's part of the step.

        Each batch is images float32 (N, 3, S, S), targets float32 (N, K), and keep float32 (N, 14) or None, tensors or
        arrays.

        Raises:
            UserError: the loss is not finite; the weights are those before the step.
        """
        scale = self.loss_scale.value
        total = None
        for images, targets, keep in batches:
            words = [] if keep is None else [_tensor(keep)]
            loss = self.gradient(_tensor(images), _tensor(targets), Tensor(scale, ms.float32), *words)
            total = loss if total is None else total + loss
        count = len(batches) * self.devices.count
        divisor, asked = Tensor(scale * count, ms.float32), Tensor(float(interrupt), ms.float32)
        norm, total, interrupts = self.mean_gradient(divisor, total, asked).asnumpy().tolist()
        loss = total / count
        check_finite(loss, remedy="a lower --base_lr or a longer --warmup_length")
        overflow = not np.isfinite(norm)
        if overflow:
            self.clear()
        else:
            factor = 1.0 if self.clip is None else min(1.0, self.clip / max(norm, 1e-12))
            self.optimizer.learning_rate.set_data(Tensor(lr, ms.float32))
            self.update(Tensor(factor, ms.float32))
        self.loss_scale.update(overflow)
        return StepResult(loss, norm, overflow, scale, bool(interrupts))


def drop_path(
    network: DDRNet23, args: argparse.Namespace, epoch: int, step: int, devices: Devices = ONE_DEVICE
) -> list[np.ndarray | None]:
    """What the residuals are multiplied by, (N, 14) for each batch of a step; the draws are of the whole step."""
    if not args.drop_path_rate:
        return [None] * args.accumulation_step
    rng = np.random.default_rng([args.seed, epoch, DROP_PATH, step])
    keep = network.sample_keep(args.batch_size * args.accumulation_step * devices.count, rng)
    return list(keep.reshape(devices.count, args.accumulation_step, args.batch_size, -1)[devices.rank])


def _tensor(x: Tensor | np.ndarray) -> Tensor:
    return x if isinstance(x, Tensor) else Tensor(x)
