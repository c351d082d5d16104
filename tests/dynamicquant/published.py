"""The published network once more, in NumPy: what the project's layers are compared with, on any processor.

Activations are float64 and what is to be rounded is known to 1e-12, so every processor rounds it alike. Weights are
quantized once, in float32 as published, by operations whose results IEEE 754 fixes; only their tanh comes from float64.

A float32 network differs. Of the millions of values that it rounds some lie so close to a rounding edge that the order
in which a processor adds decides on which side they fall, and with random weights one that falls on its other side
changes the logits by percents. `choices` names the values that are to be rounded to the other side of their edge.
`published_choices.json` holds, for one of the golden images at each bit-width, those that a float32 run with the golden
logits took; how they were found does not matter for what they prove.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from golden.recipe import value

CHOICES = json.loads(Path(__file__).with_name("published_choices.json").read_text())
EDGE = 5e-4  # steps of the quantizer within which float32 may take either side: the errors of all layers before add up


def convolve(x: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
    """Cross-correlation of (N, C, H, W) with (C', C, k, k), padded by k // 2 on all sides."""
    side = weight.shape[2]
    x = np.pad(x, ((0, 0), (0, 0), *[(side // 2, side // 2)] * 2))
    windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), (2, 3))[:, :, ::stride, ::stride]
    count, _, height, width = windows.shape[:4]
    columns = windows.transpose(0, 1, 4, 5, 2, 3).reshape(count, -1, height * width)
    return (weight.reshape(len(weight), -1) @ columns).reshape(count, -1, height, width)


def weight_steps(weight: np.ndarray, bits: int) -> np.ndarray:
    """DoReFa, equations 7 and 9, before rounding: float32 in [0, 2^bits - 1]."""
    squashed = np.tanh(weight.astype(np.float64)).astype(np.float32)
    return (squashed / (2 * np.abs(squashed).max()) + np.float32(0.5)) * np.float32(2**bits - 1)


def activation_steps(x: np.ndarray, bits: int) -> np.ndarray:
    """DoReFa, equation 5, before rounding."""
    return np.clip(x, 0, 1) * (2**bits - 1)


def from_edge(steps: np.ndarray) -> np.ndarray:
    """How far from the nearest rounding edge, in steps."""
    return np.abs(steps % 1 - 0.5)


class Published:
    """The network in inference with the recipe's weights.

    Args:
        bits: what is chosen for `layer2` to `layer4`.
        choices: by layer, the places (C, H, W) of the only image whose values go to the other side of their edge; the
            shortcut of a block has the input of its conv1, and so its choices.
        first_bits, shortcut_bits, plain_weights, shortcut_bn, without: make near misses: other bits in `layer1` or in
            the shortcuts, weights without tanh, shortcuts without BN, a block left out.

    Attributes:
        edges: of all values rounded, the smallest distance from an edge, in steps.
        chosen: the distances of the values that `choices` names.
    """

    def __init__(
        self,
        bits: int,
        choices: dict | None = None,
        first_bits: int = 4,
        shortcut_bits: int | None = None,
        plain_weights: bool = False,
        shortcut_bn: bool = True,
        without: str = "",
    ):
        self.bits = bits
        self.choices = choices or {}
        self.first_bits = first_bits
        self.shortcut_bits = shortcut_bits or bits
        self.plain_weights = plain_weights
        self.shortcut_bn = shortcut_bn
        self.without = without
        self.edges = 1.0
        self.chosen: list[float] = []

    def bn(self, x: np.ndarray, name: str) -> np.ndarray:
        leaves = ("gamma", "beta", "moving_mean", "moving_variance")
        arrays = (value(f"{name}.{leaf}", (x.shape[1],)).astype(np.float64) for leaf in leaves)
        gamma, beta, mean, variance = (array.reshape(-1, 1, 1) for array in arrays)
        return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta

    def weight(self, name: str, shape: tuple, bits: int) -> np.ndarray:
        weight = value(f"{name}.weight", shape)
        if self.plain_weights:
            weight = np.arctanh(weight / (1.01 * np.abs(weight).max()))
        return 2 * np.round(weight_steps(weight, bits)).astype(np.float64) / (2**bits - 1) - 1

    def activation(self, x: np.ndarray, name: str, bits: int) -> np.ndarray:
        steps = activation_steps(x, bits)
        codes, distance = np.round(steps), from_edge(steps)
        self.edges = min(self.edges, distance.min())
        for place in self.choices.get(name.replace("downsample.0", "conv1"), ()):
            self.chosen.append(distance[0][tuple(place)])
            codes[0][tuple(place)] = 2 * np.floor(steps[0][tuple(place)]) + 1 - codes[0][tuple(place)]
        return codes / (2**bits - 1)

    def convolution(self, x: np.ndarray, name: str, channels: int, side: int, stride: int, bits: int) -> np.ndarray:
        weight = self.weight(name, (channels, x.shape[1], side, side), bits)
        return convolve(self.activation(x, name, bits), weight, stride)

    def block(self, x: np.ndarray, name: str, channels: int, stride: int) -> np.ndarray:
        bits = self.first_bits if name.startswith("layer1") else self.bits
        shortcut = x
        if stride > 1:
            shortcut = self.convolution(x, f"{name}.downsample.0", channels, 1, stride, self.shortcut_bits)
            if self.shortcut_bn:
                shortcut = self.bn(shortcut, f"{name}.downsample.1")
        x = np.maximum(self.bn(self.convolution(x, f"{name}.conv1", channels, 3, stride, bits), f"{name}.bn1"), 0)
        return np.maximum(
            self.bn(self.convolution(x, f"{name}.conv2", channels, 3, 1, bits), f"{name}.bn2") + shortcut, 0
        )

    def stem(self, images: np.ndarray) -> np.ndarray:
        weight = value("conv1.weight", (64, 3, 7, 7)).astype(np.float64)
        x = np.maximum(self.bn(convolve(images.astype(np.float64), weight, 2), "bn1"), 0)
        x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        return np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))[:, :, ::2, ::2].max((4, 5))

    def blocks(self) -> Iterator[tuple[str, int, int]]:
        """Name, channels and stride of each, in their order."""
        for stage, channels in enumerate((64, 128, 256, 512), 1):
            for block, stride in enumerate((2 if stage > 1 else 1, 1)):
                if f"layer{stage}.{block}" != self.without:
                    yield f"layer{stage}.{block}", channels, stride

    def features(self, images: np.ndarray) -> np.ndarray:
        """The output of `layer1`."""
        x = self.stem(images)
        for block in self.blocks():
            x = self.block(x, *block) if block[0].startswith("layer1") else x
        return x

    def scores(self, features: np.ndarray) -> np.ndarray:
        """The controller's, (N, 3)."""
        count, channels, side, _ = features.shape
        seen = features.reshape(count, channels, side // 7, 7, side // 7, 7).mean((3, 5)).reshape(count, -1)
        hidden = seen @ value("fc1.weight", (64, seen.shape[1])).T.astype(np.float64) + value("fc1.bias", (64,))
        return hidden @ value("fc2.weight", (3, 64)).T.astype(np.float64) + value("fc2.bias", (3,))

    def logits(self, features: np.ndarray) -> np.ndarray:
        """From the output of `layer1`."""
        for block in self.blocks():
            features = features if block[0].startswith("layer1") else self.block(features, *block)
        return self.classify(features)

    def classify(self, x: np.ndarray) -> np.ndarray:
        return x.mean((2, 3)) @ value("fc.weight", (1000, 512)).T.astype(np.float64) + value("fc.bias", (1000,))
