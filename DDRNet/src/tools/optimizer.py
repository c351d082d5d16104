"""Optimizers, with weight decay on weights but not on BN and biases."""

from collections.abc import Sequence

import mindspore as ms
import mindspore.nn as nn
from mindspore import Parameter, Tensor, ops


def parameter_groups(weights: Sequence[Parameter], weight_decay: float) -> list[dict]:
    """Groups for a MindSpore optimizer: tensors with `weight_decay`, vectors (BN and biases) without."""
    decayed = {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": weight_decay}
    others = {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0}
    return [group for group in (decayed, others) if group["params"]]


class Lamb(nn.Optimizer):
    """LAMB (arXiv 1904.00962, algorithm 2), with Adam's bias correction. `nn.Lamb` has no kernel for CPU."""

    def __init__(self, groups: list[dict], lr: float, beta1: float, beta2: float, eps: float = 1e-6):
        super().__init__(lr, groups)
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps
        self.first = self._parameters.clone(prefix="lamb_m", init="zeros")
        self.second = self._parameters.clone(prefix="lamb_v", init="zeros")

    def construct(self, gradients: tuple[Tensor, ...]) -> bool:
        lr = self.get_lr()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        step = self.global_step.astype(ms.float32)
        correction1 = 1 - ops.pow(Tensor(self.beta1, ms.float32), step)
        correction2 = 1 - ops.pow(Tensor(self.beta2, ms.float32), step)
        done = True
        for weight, first, second, gradient, decay in zip(
            self._parameters, self.first, self.second, gradients, self.get_weight_decay()
        ):
            m = self.beta1 * first + (1 - self.beta1) * gradient
            v = self.beta2 * second + (1 - self.beta2) * ops.square(gradient)
            update = (m / correction1) / (ops.sqrt(v / correction2) + self.eps) + decay * weight
            weight_norm, update_norm = ops.sqrt(ops.square(weight).sum()), ops.sqrt(ops.square(update).sum())
            # A weight of zeros, such as a new bias, would never leave them: its ratio is 1.
            ratio = ops.where(ops.logical_and(weight_norm > 0, update_norm > 0), weight_norm / update_norm, 1.0)
            new = weight - lr * ratio * update
            done = ops.depend(done, (ops.assign(first, m), ops.assign(second, v), ops.assign(weight, new)))
        return done


def make_optimizer(
    name: str,
    weights: Sequence[Parameter],
    lr: float,
    weight_decay: float,
    momentum: float,
    use_nesterov: bool,
    beta: tuple[float, float],
    decay: float,
) -> nn.Optimizer:
    """The optimizer `name`: momentum, adamw, lamb or rmsprop.

    Its learning rate is the parameter `learning_rate`, which the training sets before every step.

    Args:
        momentum: of momentum and rmsprop. use_nesterov: for momentum. beta: of adamw and lamb. decay: of rmsprop.

    Raises:
        ValueError: another name.
    """
    groups = parameter_groups(weights, weight_decay)
    if name == "momentum":
        # nn.Momentum computes the same but for Nesterov's form, which it leaves out on CPU.
        return nn.SGD(groups, lr, momentum, nesterov=use_nesterov and momentum > 0)
    if name == "adamw":
        return nn.AdamWeightDecay(groups, lr, *beta)
    if name == "lamb":
        return Lamb(groups, lr, *beta)
    if name == "rmsprop":
        return nn.RMSProp(groups, lr, decay, momentum)
    raise ValueError(f"no optimizer {name}")
