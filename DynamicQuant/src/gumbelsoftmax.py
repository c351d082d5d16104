"""Straight-through Gumbel-Softmax (arXiv 2106.02898, section 3.2; arXiv 1611.01144, equation 1)."""

import mindspore.nn as nn
import numpy as np
from mindspore import Tensor, ops


class GumbelSoftmax(nn.Cell):
    """Turns scores into a one-hot choice whose gradient is that of the softmax.

    With noise g the choice is one_hot(argmax(scores + g)) and its gradient that of softmax((scores + g) / temperature).

    Args:
        temperature: of the softmax, > 0; the smaller, the closer the gradient is to that of the hard choice.

    Inputs:
        scores: float32 (N, D, R).
        noise: float32 (N, D, R) from `gumbel_noise`. It comes from outside because a random operator inside the graph
            could not be resumed exactly.

    Outputs:
        float32 (N, D, R), one-hot along the last axis.
    """

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.temperature = temperature

    def construct(self, scores: Tensor, noise: Tensor) -> Tensor:
        scores = scores + noise
        soft = ops.softmax(scores / self.temperature, -1)
        hard = ops.one_hot(scores.argmax(-1), scores.shape[-1], Tensor(1.0, scores.dtype), Tensor(0.0, scores.dtype))
        return ops.stop_gradient(hard - soft) + soft


def gumbel_noise(shape: tuple[int, ...], *key: int) -> np.ndarray:
    """Standard Gumbel noise, float32 of `shape`, drawn from the integers `key` alone (seed, epoch, step)."""
    return np.random.default_rng(key).gumbel(size=shape).astype(np.float32)
