"""What training is made of: the step, its learning rates and optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, ops

from src.dataset import DROPOUT
from src.resnest import ResNeSt
from utils.device import ONE_DEVICE, Devices
from utils.training import Update, check_finite, gradient_sums


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
    """Adds the gradients of the loss of one batch to `sums`.

    Inputs: images float32 (N, 3, S, S), targets float32 (N, K), keep float32 (N, 2048) or None.
    Outputs: the loss and the gradients' sum of squares, float32 ().
    """

    def __init__(self, network: nn.Cell, criterion: nn.Cell, weights: ParameterTuple, sums: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.network = network
        self.criterion = criterion
        self.sums = sums
        self.gradient = ops.value_and_grad(self.loss, None, weights)
        self.map = ops.HyperMap()

    def loss(self, images: Tensor, targets: Tensor, keep: Tensor | None) -> Tensor:
        return self.criterion(self.network(images, keep), targets)

    def construct(self, images: Tensor, targets: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loss, gradients = self.gradient(images, targets, keep)
        squares = ops.addn(self.map(_sum_of_squares, gradients))
        return ops.depend(loss, self.map(ops.assign_add, self.sums, gradients)), squares


def _sum_of_squares(gradient: Tensor) -> Tensor:
    return ops.square(gradient).sum()


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
        devices: those that train.
    """

    def __init__(self, network: nn.Cell, criterion: nn.Cell, optimizer: nn.Optimizer, devices: Devices = ONE_DEVICE):
        self.optimizer = optimizer
        self.devices = devices
        sums = gradient_sums(optimizer.parameters)
        self.gradient = Gradient(network, criterion, optimizer.parameters, sums)
        self.update = Update(optimizer, sums, devices.count, mean=True)

    def __call__(
        self, images: np.ndarray, targets: np.ndarray, keep: np.ndarray | None, lr: float, interrupt: bool = False
    ) -> StepResult:
        """One step at learning rate `lr` on this device's part of the images.

        Images are float32 (N, 3, S, S), targets float32 (N, K), keep float32 (N, 2048) or None.

        Raises:
            UserError: the loss or a gradient is not finite; the weights are those before the step.
        """
        inputs = [Tensor(array) for array in (images, targets, keep) if array is not None]
        loss, squares = (float(x.asnumpy()) for x in self.gradient(*inputs))
        loss, squares, interrupts = self.devices.sum([loss, squares, interrupt]).tolist()
        loss /= self.devices.count
        check_finite(loss, squares)
        self.optimizer.learning_rate.set_data(Tensor(lr, ms.float32))
        self.update()
        return StepResult(loss, interrupts > 0)


def dropout_mask(
    network: ResNeSt, batch_size: int, seed: int, epoch: int, step: int, rank: int = 0, devices: int = 1
) -> np.ndarray | None:
    """What this device's features are multiplied by in one step, float32 (N, 2048); the draws are of the whole step."""
    if not network.dropout:
        return None
    rng = np.random.default_rng([seed, epoch, DROPOUT, step])
    return network.sample_keep(batch_size * devices, rng).reshape(devices, batch_size, -1)[rank]
