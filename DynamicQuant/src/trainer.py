"""What training is made of: the step, its learning rates and optimizer, the start of the controller."""

from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import ParameterTuple, Tensor, ops

from src.dataset import CONTROLLER, DROPOUT, GUMBEL
from src.gumbelsoftmax import GumbelSoftmax, gumbel_noise
from src.inference import Front
from src.resnet import Architecture, ResNet
from utils.device import ONE_DEVICE, Devices
from utils.training import Update, check_finite, gradient_sums

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

    Inputs: images float32 (N, 3, S, S); labels int32 (N,); noise float32 (N, D, R) from `gumbel_noise`, or None; keep
    float32 from `ResNet.sample_keep`, or None.
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

    def construct(
        self, images: Tensor, labels: Tensor, noise: Tensor | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        features, scores = self.network.front(images, keep)
        if scores is None:
            return ops.cross_entropy(self.network.back(features, None, keep), labels), self.bits.mean()
        choices = self.gumbel(scores, noise)
        loss = ops.cross_entropy(self.network.back(features, choices, keep), labels)
        own = (choices * self.bits).sum(-1).mean()
        mean = own
        if self.devices > 1:
            # The value is that of all devices, the gradient that of the own part; the reduction averages them.
            mean = own + ops.stop_gradient(self.reduce(ops.stop_gradient(own)) / self.devices - own)
        return loss + self.penalty * ops.relu(mean - self.budget), own


class Gradient(nn.Cell):
    """Adds the gradients of the loss of one batch to `sums`.

    Inputs: as `DynamicLoss`. Outputs: the loss, the mean bits and the gradients' sum of squares, float32 ().
    """

    def __init__(self, loss: DynamicLoss, weights: ParameterTuple, sums: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.sums = sums
        self.gradient = ops.value_and_grad(loss, None, weights, has_aux=True)
        self.map = ops.HyperMap()

    def construct(
        self, images: Tensor, labels: Tensor, noise: Tensor | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        (loss, bits), gradients = self.gradient(images, labels, noise, keep)
        squares = ops.addn(self.map(_sum_of_squares, gradients))
        return ops.depend(loss, self.map(ops.assign_add, self.sums, gradients)), bits, squares


def _sum_of_squares(gradient: Tensor) -> Tensor:
    return ops.square(gradient).sum()


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
        devices: those that train.
        controller_lr_ratio: the controller's learning rate as a part of the others'.
    """

    def __init__(
        self,
        loss: DynamicLoss,
        optimizer: nn.Optimizer,
        devices: Devices = ONE_DEVICE,
        controller_lr_ratio: float = 1.0,
    ):
        self.network = loss.network
        self.optimizer = optimizer
        self.controller_lr_ratio = controller_lr_ratio
        # The optimizer lists a rate for every weight; those of a group are one parameter.
        self.rates = list({rate.name: rate for rate in optimizer.learning_rate}.values())
        self.devices = devices
        sums = gradient_sums(optimizer.parameters)
        self.gradient = Gradient(loss, optimizer.parameters, sums)
        self.update = Update(optimizer, sums, devices.count, mean=True)

    def __call__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        noise: np.ndarray | None,
        keep: np.ndarray | None,
        lr: float,
        interrupt: bool = False,
    ) -> StepResult:
        """One step at learning rate `lr` on this device's images, labels, noise and keep (`DynamicLoss`).

        Raises:
            UserError: the loss or a gradient is not finite; the weights are those before the step.
        """
        inputs = [None if array is None else Tensor(array) for array in (images, labels, noise, keep)]
        numbers = [float(x.asnumpy()) for x in self.gradient(*inputs)]
        loss, bits, squares, interrupts = self.devices.sum([*numbers, interrupt]).tolist()
        loss, bits = loss / self.devices.count, bits / self.devices.count
        check_finite(loss, squares)
        for rate, ratio in zip(self.rates, (1.0, self.controller_lr_ratio)):
            rate.set_data(Tensor(lr * ratio, ms.float32))
        self.update()
        return StepResult(loss, bits, interrupts > 0)

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
            value = self.devices.sum(value) / self.devices.count
            parameter.set_data(Tensor(value.reshape(parameter.shape)))
        for velocity in self.optimizer.accum:
            if velocity.name.removeprefix("accum.").startswith(CONTROLLER_LAYERS):
                velocity.set_data(ops.zeros_like(velocity))


def step_noise(
    architecture: Architecture, batch_size: int, seed: int, epoch: int, step: int, rank: int = 0, devices: int = 1
) -> np.ndarray | None:
    """This device's Gumbel noise of one step, float32 (N, D, R); the draws are of the whole step."""
    if not architecture.decisions:
        return None
    shape = (devices, batch_size, architecture.decisions, len(architecture.bits))
    return gumbel_noise(shape, seed, epoch, GUMBEL, step)[rank]


def dropout(
    network: ResNet, rate: float, batch_size: int, seed: int, epoch: int, step: int, rank: int = 0, devices: int = 1
) -> np.ndarray | None:
    """This device's dropout of one step, float32 from `ResNet.sample_keep`; the draws are of the whole step."""
    if not rate:
        return None
    rng = np.random.default_rng([seed, epoch, DROPOUT, step])
    return network.sample_keep(devices * batch_size, rate, rng).reshape(devices, batch_size, -1)[rank]
