"""Training of DRNet (arXiv 2106.02898, sections 3.2 to 3.4): the step, its learning rates and the optimizer.

A step works in groups: each candidate resolution gets the images that go through the classifier there, so that each BN
sees its own samples alone. In pre-training every group is the whole batch, in fine-tuning what the predictor chose. The
gradients of the groups are summed where they arise, reduced over the devices once, and given to the optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import ParameterTuple, Tensor, ops

from src.dataset import GUMBEL
from src.drnet import DRNet
from src.gumbelmodule import GumbelSoftmax, gumbel_noise
from utils.cli import UserError
from utils.device import ONE_DEVICE, Devices
from utils.training import Update, check_finite, gradient_sums


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


@dataclass
class StepResult:
    """What one step did, over all devices.

    loss: mean over the global batch, budget term included. correct: top-1 hits, int64 (R,); chosen: images that went
    through the classifier at each candidate, int64 (R,). interrupt: some device asks to stop.
    """

    loss: float
    correct: np.ndarray
    chosen: np.ndarray
    interrupt: bool = False


class TrainOneStep:
    """Runs training steps.

    Args:
        drnet: the networks.
        optimizers: of the classifier and, in fine-tuning, of the predictor, as `make_optimizer` makes them.
        batch_size: images per device and step.
        devices: those that train.
        temperature: of the Gumbel-Softmax; None pre-trains: every image at every resolution, without the predictor.
        budget: (alpha, eta) of the loss's FLOPs term (section 3.4), alpha in GMACs; None for none.
    """

    def __init__(
        self,
        drnet: DRNet,
        optimizers: Sequence[nn.Optimizer],
        batch_size: int,
        devices: Devices = ONE_DEVICE,
        temperature: float | None = None,
        budget: tuple[float, float] | None = None,
    ):
        self.devices = devices
        self.budget = budget
        self.candidates = len(drnet.architecture.resolutions)
        self.gmacs = np.array(drnet.gmacs()[1])
        self.scale = Tensor(1 / (batch_size * devices.count), ms.float32)
        # The network halves the side five times: with one image of one pixel left, a BN has no variance to learn from.
        self.smallest_group = [2 if resolution <= 32 else 1 for resolution in drnet.architecture.resolutions]
        drnet.set_train(True)
        sums = [gradient_sums(optimizer.parameters) for optimizer in optimizers]
        self.updates = [Update(*pair, devices.count, mean=False) for pair in zip(optimizers, sums)]
        self.groups = [
            GroupGradient(GroupLoss(classify), optimizers[0].parameters, sums[0]) for classify in drnet.classify
        ]
        size = drnet.architecture.image_size
        images = Tensor(shape=[None, 3, size, size], dtype=ms.float32)
        choice = Tensor(shape=[None], dtype=ms.float32)
        for group in self.groups:
            group.set_train(True)
            group.set_inputs(images, Tensor(shape=[None], dtype=ms.int32), choice, self.scale)
        self.choose = None
        if temperature is not None:
            self._choose_with(drnet, temperature, optimizers[1].parameters, sums[1], images)

    def _choose_with(
        self, drnet: DRNet, temperature: float, weights: ParameterTuple, sums: ParameterTuple, images: Tensor
    ) -> None:
        """Let the predictor, whose `weights` have the gradient `sums`, choose."""
        matrix = Tensor(shape=[None, self.candidates], dtype=ms.float32)
        self.choose = Choose(drnet.predict, temperature)
        self.choose_gradient = ChooseGradient(self.choose, weights, sums)
        self.choose.set_inputs(images, matrix)
        self.choose_gradient.set_inputs(images, matrix, matrix)
        for cell in (self.choose, self.choose_gradient):
            cell.set_train(True)
        statistics = [parameter for parameter in drnet.predictor.get_parameters() if "moving_" in parameter.name]
        kept = ParameterTuple(statistics).clone("kept", init="same")
        self.keep = Copy(ParameterTuple(statistics), kept)
        self.restore = Copy(kept, ParameterTuple(statistics))

    def __call__(
        self, images: np.ndarray, labels: np.ndarray, noise: np.ndarray | None = None, interrupt: bool = False
    ) -> StepResult:
        """One step on this device's part of the batch: images (N, 3, S, S), labels (N,), Gumbel noise (N, R) or None.

        Raises:
            UserError: the loss is not finite; the weights are those before the step.
        """
        choice = self._choice(images, noise)
        *chosen, interrupts = self.devices.sum([*choice.sum(0), interrupt])
        excess, cost_gradient = self._budget(np.array(chosen))

        loss, correct = 0.0, np.zeros(self.candidates)
        choice_gradient = np.tile(cost_gradient, (len(labels), 1)).astype(np.float32)
        for candidate, group in enumerate(self.groups):
            rows = np.flatnonzero(choice[:, candidate])
            if len(rows) < self.smallest_group[candidate]:
                continue
            group_loss, logits, gradient = group(
                Tensor(images[rows]), Tensor(labels[rows]), Tensor(choice[rows, candidate]), self.scale
            )
            loss += float(group_loss.asnumpy())
            correct[candidate] = (logits.asnumpy().argmax(1) == labels[rows]).sum()
            choice_gradient[rows, candidate] += gradient.asnumpy()
        loss, *correct = self.devices.sum([loss, *correct])
        loss = float(loss) + excess
        check_finite(loss)
        if self.choose is not None:
            self.choose_gradient(Tensor(images), Tensor(noise), Tensor(choice_gradient))
        for update in self.updates:
            update()
        return StepResult(loss, np.array(correct, int), np.array(chosen, int), interrupts > 0)

    def _choice(self, images: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        """At which candidates each image goes through the classifier, float32 (N, R) of 0 and 1."""
        if self.choose is None:
            return np.ones((len(images), self.candidates), np.float32)
        # The predictor runs twice, here and for its gradient, but its moving statistics advance once.
        self.keep()
        choice = self.choose(Tensor(images), Tensor(noise)).asnumpy()
        self.restore()
        return np.eye(self.candidates, dtype=np.float32)[choice.argmax(1)]

    def _budget(self, chosen: np.ndarray) -> tuple[float, np.ndarray]:
        """The budget term for the numbers of images chosen, (R,), and its gradient for one image's choice, (R,)."""
        if self.budget is None:
            return 0.0, np.zeros(self.candidates)
        alpha, eta = self.budget
        spread = self.gmacs.max() - self.gmacs.min()
        excess = (chosen @ self.gmacs / chosen.sum() - alpha) / spread
        if excess <= 0:
            return 0.0, np.zeros(self.candidates)
        return float(eta * excess), eta * self.gmacs / spread / chosen.sum()


def check_budget(alpha: float, gmacs: np.ndarray) -> None:
    """Whether some choice of resolutions meets the budget `alpha` and another one does not (section 3.4).

    Args:
        gmacs: of the classifier at each candidate resolution, float (R,): from C_min, all images at the smallest, to
            C_max, all at the largest.

    Raises:
        UserError: none meets it, or every one does.
    """
    least, most = min(gmacs), max(gmacs)
    if not least <= alpha <= most:
        fault = f"--alpha {alpha:g} is no budget: the classifier costs {least:.4g} to {most:.4g} GMACs an image"
        raise UserError(f"{fault}; choose one between them, or none to train without")


def step_noise(
    batch_size: int, candidates: int, seed: int, epoch: int, step: int, devices: Devices = ONE_DEVICE
) -> np.ndarray:
    """This device's Gumbel noise of one step, float32 (N, R); the draws are of the whole step."""
    return gumbel_noise((devices.count, batch_size, candidates), seed, epoch, GUMBEL, step)[devices.rank]


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
    """SGD with momentum ("sgd") or AdamW ("adamw") over all trainable parameters of `network`, BNs decaying too.

    Args:
        rates: learning rate of every step, float32.
    """
    weights = network.trainable_params()
    # As a group, because MindSpore leaves gamma and beta out of the decay of parameters that come one by one.
    group = [{"params": weights}]
    if name == "sgd":
        optimizer = nn.Momentum(group, rates.tolist(), momentum, weight_decay)
    else:
        optimizer = nn.AdamWeightDecay(group, rates.tolist(), weight_decay=weight_decay)
    # The step counter and the like, so that the state file can hold two optimizers.
    known = {id(weight) for weight in weights}
    owner = weights[0].name.split(".")[0]
    for parameter in optimizer.get_parameters():
        if id(parameter) not in known and f"{owner}." not in parameter.name:
            parameter.name = f"{owner}.optimizer.{parameter.name}"
    return optimizer
