"""ResNet-18 whose convolutions are quantized to a bit-width chosen for each image (CVPR 2022, Liu et al.).

`layer1` always runs at the target bit-width; from its output the bit controller decides for `layer2` to `layer4`. The
stem, the controller and the classifier stay in float. Parameter names are those of the published checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mindspore.nn as nn
import numpy as np
from mindspore import Tensor, ops

from src.quant import MAX_BITS, QUANTIZERS, Conv2d, FixedConv2d, QuantConv2d

WIDTHS = (64, 128, 256, 512)
BLOCKS = 2  # in each stage
POOL = 7  # the controller averages over windows of this side
HIDDEN = 64  # and has this many units between its two layers
FLOAT = "none"
GRANULARITIES = ("image", "layer")
DECISIONS = (len(WIDTHS) - 1) * BLOCKS * 2  # with one for each convolution
SMALLEST = 4 * POOL  # image whose `layer1` fills one window

# (input channels, channels, kernel size, stride, number) to the convolution. The number is its place among those of
# layer2 to layer4 that a layer's own decision is for, FIRST in `layer1` and SHORTCUT in a shortcut behind that.
MakeConv = Callable[[int, int, int, int, int], Conv2d]
FIRST, SHORTCUT = -2, -1


def candidate_bits(target_bits: int, num_bits: int) -> tuple[int, ...]:
    """The bit-widths to choose from: `num_bits` of them around `target_bits`.

    Raises:
        ValueError: an even number of them, or bit-widths outside of 1 to 8.
    """
    if num_bits < 1 or num_bits % 2 == 0:
        raise ValueError(f"num_bits must be odd, as many below as above the target, not {num_bits}")
    low, high = target_bits - num_bits // 2, target_bits + num_bits // 2
    if low < 1 or high > MAX_BITS:
        raise ValueError(f"{num_bits} bit-widths around {target_bits} are {low} to {high}, outside of 1 to {MAX_BITS}")
    return tuple(range(low, high + 1))


class MaxPool(nn.Cell):
    """Maximum over 3x3 windows at stride 2, padded by 1: float32 (N, C, H, W) to (N, C, H / 2, W / 2), H and W even.

    In training it is the operator with the fast gradient. In inference, repeating the first row and column pads just as
    well, because a window that holds them anyway does not change, and leads to an operator several times as fast.
    """

    def __init__(self):
        super().__init__()
        self.train_pool = ops.MaxPool3DWithArgmax(ksize=(1, 3, 3), strides=(1, 2, 2), pads=(0, 1, 1))
        self.pool = ops.MaxPool(kernel_size=3, strides=2, pad_mode="valid")

    def construct(self, x: Tensor) -> Tensor:
        if self.training:
            _, channels, height, width = x.shape
            out, _ = self.train_pool(x.expand_dims(2))
            # Without it the output has no known rank where the batch size is dynamic.
            return out.reshape((-1, channels, height // 2, width // 2))
        x = ops.concat((x[:, :, :1], x), 2)
        x = ops.concat((x[:, :, :, :1], x), 3)
        return self.pool(x)


class BasicBlock(nn.Cell):
    """Two 3x3 convolutions with a shortcut around them, which is a 1x1 convolution where the shape changes.

    Args:
        number: of the first convolution; the second has the next one, but in `layer1`.

    Inputs: x float32 (N, C, H, W); choices as `QuantConv2d`. Outputs: float32 (N, C', H / stride, W / stride).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, make_conv: MakeConv, number: int):
        super().__init__()
        self.conv1 = make_conv(in_channels, channels, 3, stride, number)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = make_conv(channels, channels, 3, 1, number if number == FIRST else number + 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride > 1:
            shortcut = make_conv(in_channels, channels, 1, stride, SHORTCUT)
            self.downsample = nn.SequentialCell(shortcut, nn.BatchNorm2d(channels))

    def construct(self, x: Tensor, choices: Tensor | None) -> Tensor:
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample[1](self.downsample[0](x, choices))
        x = ops.relu(self.bn1(self.conv1(x, choices)))
        x = self.bn2(self.conv2(x, choices))
        return ops.relu(x + shortcut)


class ResNet(nn.Cell):
    """ResNet-18, with a bit controller if there are decisions to take.

    Args:
        make_conv: makes the convolutions of the blocks.
        num_classes: number of classes.
        image_size: side S of the images; the controller's input depends on it.
        decisions: D, the bit-width decisions for each image; 0 for none.
        candidates: R, the bit-widths to choose from in each.

    Inputs: images float32 (N, 3, S, S); choices float32 (N, D, R), one-hot along the last axis, or None for none.
    Outputs: logits float32 (N, K). `front` and `back`, the two parts, also take `keep` from `sample_keep`, which is for
    dropout in training, or None for no dropout.
    """

    def __init__(self, make_conv: MakeConv, num_classes: int, image_size: int, decisions: int, candidates: int):
        super().__init__()
        self.decisions = decisions
        self.candidates = candidates
        self.controller_gradient = 1.0  # the part of the controller's gradient that goes on into `layer1`
        self.conv1 = Conv2d(3, WIDTHS[0], 7, 2)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.max_pool = MaxPool()
        self.layer1, self.layer2, self.layer3, self.layer4 = (self._stage(stage, make_conv) for stage in range(4))
        self.fc = nn.Dense(WIDTHS[-1], num_classes)
        if decisions:
            side = image_size // SMALLEST
            self.avg_pool = nn.AvgPool2d(POOL, POOL)
            self.fc1 = nn.Dense(WIDTHS[0] * side * side, HIDDEN)
            self.fc2 = nn.Dense(HIDDEN, decisions * candidates)

    def _stage(self, stage: int, make_conv: MakeConv) -> nn.CellList:
        channels, before = WIDTHS[stage], WIDTHS[max(stage - 1, 0)]
        numbers = [(stage - 1) * 2 * BLOCKS + 2 * block if stage else FIRST for block in range(BLOCKS)]
        blocks = [BasicBlock(before, channels, 2 if stage else 1, make_conv, numbers[0])]
        blocks += [BasicBlock(channels, channels, 1, make_conv, number) for number in numbers[1:]]
        return nn.CellList(blocks)

    def sample_keep(self, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
        """What the inputs of `fc` and those of `fc2` are multiplied by: float32 (count, units), 0 or 1 / (1 - rate)."""
        kept = rng.random((count, self.fc.in_channels + (HIDDEN if self.decisions else 0))) >= rate
        return (kept / (1 - rate)).astype(np.float32)

    def front(self, images: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Output of `layer1`, float32 (N, 64, S / 4, S / 4), and the controller's scores (N, D, R) or None."""
        x = self.max_pool(ops.relu(self.bn1(self.conv1(images))))
        for block in self.layer1:
            x = block(x, None)
        scores = None
        if self.decisions:
            seen = x
            if self.controller_gradient < 1:
                fixed = ops.stop_gradient(x)
                seen = fixed + self.controller_gradient * (x - fixed)
            hidden = self.fc1(self.avg_pool(seen).flatten(start_dim=1))
            if keep is not None:
                hidden = hidden * keep[:, self.fc.in_channels :]
            scores = self.fc2(hidden).reshape(-1, self.decisions, self.candidates)
        return x, scores

    def back(self, x: Tensor, choices: Tensor | None, keep: Tensor | None = None) -> Tensor:
        """Logits from the output of `layer1`."""
        for stage in (self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x, choices)
        x = x.mean((2, 3))
        if keep is not None:
            x = x * keep[:, : self.fc.in_channels]
        return self.fc(x)

    def construct(self, images: Tensor, choices: Tensor | None = None) -> Tensor:
        return self.back(self.front(images)[0], choices)


@dataclass(frozen=True)
class Architecture:
    """What makes one of these networks; goes with the checkpoint.

    quant: "dorefa", "pact", or "none" for the float network, in which the other three mean nothing.
    target_bits: bit-width of `layer1`, and the middle one of those to choose from.
    num_bits: number of bit-widths to choose from; 1 fixes all layers to the target and needs no controller.
    granularity: "image", one decision an image, as in the published network; "layer", one for each convolution of
        `layer2` to `layer4`, with shortcuts at the target bits, as in the authors' own.
    num_classes: K. image_size: S in pixels, a multiple of 4 from 28 up.

    Raises:
        ValueError: values that make no network.
    """

    quant: str = "dorefa"
    target_bits: int = 4
    num_bits: int = 3
    granularity: str = "image"
    num_classes: int = 1000
    image_size: int = 224

    def __post_init__(self):
        if self.quant not in (*QUANTIZERS, FLOAT) or self.granularity not in GRANULARITIES:
            raise ValueError(f"no network for quant {self.quant} and granularity {self.granularity}")
        if self.image_size < SMALLEST or self.image_size % 4:
            raise ValueError(f"images of {self.image_size} pixels; the side must be a multiple of 4 from {SMALLEST} up")
        if self.quant != FLOAT:
            candidate_bits(self.target_bits, self.num_bits)

    @property
    def bits(self) -> tuple[int, ...]:
        """The bit-widths to choose from; () for the float network."""
        return () if self.quant == FLOAT else candidate_bits(self.target_bits, self.num_bits)

    @property
    def decisions(self) -> int:
        """Number of decisions for each image."""
        if len(self.bits) < 2:
            return 0
        return DECISIONS if self.granularity == "layer" else 1

    def _chooses(self, number: int) -> bool:
        """Whether the convolution of this number runs at the bits that are chosen, rather than at the target."""
        return number >= 0 or (number == SHORTCUT and self.granularity == "image")

    def network(self) -> ResNet:
        """The network in the form that is trained."""

        def make_conv(in_channels: int, channels: int, kernel_size: int, stride: int, number: int) -> Conv2d:
            sizes = (in_channels, channels, kernel_size, stride)
            if self.quant == FLOAT:
                return Conv2d(*sizes)
            bits = self.bits if self._chooses(number) else (self.target_bits,)
            decision = number if self.granularity == "layer" else 0
            return QuantConv2d(*sizes, bits=bits, quant=self.quant, decision=decision)

        return self._make(make_conv)

    def fixed(self, bits: int, conv: type[FixedConv2d] = FixedConv2d) -> ResNet:
        """The network for inference with `bits` chosen everywhere; `load_fixed` fills it."""

        def make_conv(in_channels: int, channels: int, kernel_size: int, stride: int, number: int) -> FixedConv2d:
            its = bits if self._chooses(number) else self.target_bits
            return conv(in_channels, channels, kernel_size, stride, bits=its, quant=self.quant)

        return self._make(make_conv).set_train(False)

    def _make(self, make_conv: MakeConv) -> ResNet:
        return ResNet(make_conv, self.num_classes, self.image_size, self.decisions, len(self.bits))

    def gmacs(self) -> tuple[float, np.ndarray]:
        """10^9 multiply-adds of the quantized convolutions for one image.

        Returns:
            those at the target bits, and those that decision d is for, float64 (D,); one row without decisions.
        """
        fixed, chosen = 0.0, np.zeros(max(self.decisions, 1))
        side = self.image_size // 4
        for stage, channels in enumerate(WIDTHS):
            before = WIDTHS[max(stage - 1, 0)]
            side = (side + 1) // 2 if stage else side
            numbers = [(stage - 1) * 2 * BLOCKS + place if stage else FIRST for place in range(2 * BLOCKS)]
            layers = [(number, channels if place else before, 3) for place, number in enumerate(numbers)]
            for number, in_channels, kernel_size in layers + ([(SHORTCUT, before, 1)] if stage else []):
                cost = in_channels * channels * (kernel_size * side) ** 2 / 1e9
                if self._chooses(number):
                    chosen[max(number, 0) if self.decisions > 1 else 0] += cost
                else:
                    fixed += cost
        return fixed, chosen


def load_fixed(fixed: ResNet, network: ResNet) -> None:
    """Fill the network that `Architecture.fixed` made with the parameters of the one that was trained."""
    trained = {parameter.name: parameter for parameter in network.get_parameters()}
    loaded = set()
    for name, cell in fixed.cells_and_names():
        if isinstance(cell, FixedConv2d):
            cell.load(trained[f"{name}.weight"])
            loaded.add(f"{name}.weight")
    for parameter in fixed.get_parameters():
        if parameter.name in trained and parameter.name not in loaded:
            parameter.set_data(Tensor(trained[parameter.name].asnumpy()))


def resnet18(quant: str = "dorefa", target_bits: int = 4, num_bits: int = 3, num_classes: int = 1000) -> ResNet:
    """The published network, for images of 224 pixels; `Architecture` has the whole choice."""
    return Architecture(quant, target_bits, num_bits, num_classes=num_classes).network()
