"""Quantization to k bits: weights as in DoReFa (arXiv 1606.06160), activations so too or as in PACT (arXiv 1805.06085).

Rounding has the gradient of the identity (the straight-through estimator), so that the gradient of a quantizer is that
of its surrogate, the same function without rounding. The order of the arithmetic is that of the published network: a
value next to a rounding edge has to fall on the same side in training, in inference and in an exported file.
"""

import mindspore as ms
import mindspore.nn as nn
from mindspore import Parameter, Tensor, ops
from mindspore.common.initializer import HeNormal, initializer

MAX_BITS = 8
QUANTIZERS = ("dorefa", "pact")
ALPHA = 10.0  # where PACT's learnable maximum starts
LEAST_ALPHA = 0.01  # what a smaller one counts as


def levels(bits: int) -> int:
    """Steps between the smallest and the largest of the 2^bits values."""
    return 2**bits - 1


class RoundThrough(nn.Cell):
    """Rounds float32 of any shape to whole numbers, with the gradient of the identity."""

    def construct(self, x: Tensor) -> Tensor:
        return ops.round(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (dout,)


round_through = RoundThrough()


def weight_positions(weight: Tensor) -> Tensor:
    """Where each weight stands between the smallest and the largest value, in [0, 1] (DoReFa, equation 9).

    Where all weights are 0, they stand in the middle, as a 0 among others does, and have a finite gradient.
    """
    squashed = ops.tanh(weight)
    largest = ops.abs(squashed).max()
    largest = largest + (largest == 0).astype(largest.dtype)
    return squashed / (2 * largest) + 0.5


def quantize_weight(weight: Tensor, positions: Tensor, bits: int) -> Tensor:
    """Weights quantized to `bits`, in [-1, 1]; to one bit ±E|weight|, with the gradient of the identity.

    DoReFa, equations 9 and 7; `positions` is `weight_positions(weight)`, which several bit-widths share.
    """
    if bits > 1:
        return 2 * (round_through(positions * levels(bits)) / levels(bits)) - 1
    signs = 2 * (weight >= 0).astype(weight.dtype) - 1
    # The first difference is 0, so that the sum is the second term to the last bit.
    return (weight - ops.stop_gradient(weight)) + ops.stop_gradient(signs * ops.abs(weight).mean())


def weight_codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What `decode_weight` makes the quantized weights of.

    Returns:
        integers of `bits` in two's complement, int8 of the weight's shape, and for one bit E|weight|, else 1, float32
        (1,).
    """
    if bits == 1:
        return (weight >= 0).astype(ms.int8) - 1, ops.abs(weight).mean().reshape(1)
    codes = ops.round(weight_positions(weight) * levels(bits)) - 2 ** (bits - 1)
    return codes.astype(ms.int8), ops.ones(1, ms.float32)


def decode_weight(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The weights quantized to `bits`, float32, bit for bit those of `quantize_weight`."""
    positions = codes.astype(ms.float32) + 2 ** (bits - 1)
    return (2 * (positions / levels(bits)) - 1) * scale


class DoReFaActivation(nn.Cell):
    """Activations in [0, 1] (arXiv 1606.06160, section 2.4).

    Inputs: x float32 of any shape, clipped by `clip`; bits. Outputs: x rounded to `bits` (DoReFa, equation 5).
    """

    def clip(self, x: Tensor) -> Tensor:
        """x limited to the range of the quantized values, float32 of its shape."""
        return ops.minimum(ops.relu(x), 1.0)

    def construct(self, x: Tensor, bits: int) -> Tensor:
        return round_through(x * levels(bits)) / levels(bits)


class PACTActivation(DoReFaActivation):
    """Activations in [0, alpha] with a learnable alpha (arXiv 1805.06085, equations 1 and 2).

    The parameter may learn or decay its way below LEAST_ALPHA, where it counts as that and goes on learning.
    """

    def __init__(self):
        super().__init__()
        self.alpha = Parameter(Tensor([ALPHA], ms.float32))

    def maximum(self) -> Tensor:
        """alpha, float32 (1,), but at least LEAST_ALPHA, with the gradient of alpha in either case."""
        bounded = ops.stop_gradient(ops.maximum(self.alpha, LEAST_ALPHA))
        # The difference is 0, so that the sum is the first term to the last bit.
        return bounded + (self.alpha - ops.stop_gradient(self.alpha))

    def clip(self, x: Tensor) -> Tensor:
        """x limited to [0, alpha], with the gradient of equation 3."""
        alpha = self.maximum()
        return 0.5 * (ops.abs(x) - ops.abs(x - alpha) + alpha)

    def construct(self, x: Tensor, bits: int) -> Tensor:
        # alpha learns through the clipping alone (equation 3).
        alpha = ops.stop_gradient(self.maximum())
        scale = ops.full_like(alpha, levels(bits)) / alpha  # MindSpore takes number / tensor for number * (1 / tensor)
        return round_through(x * scale) / scale


def activation(quant: str) -> DoReFaActivation:
    """The quantizer of activations that goes by this name."""
    return {"dorefa": DoReFaActivation, "pact": PACTActivation}[quant]()


class Conv2d(nn.Cell):
    """A convolution without bias, in float.

    Inputs: x float32 (N, C, H, W); `choices` is there for the subclass that needs it. Outputs: float32 (N, C', H', W').
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int):
        super().__init__()
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight = Parameter(initializer(HeNormal(mode="fan_out", nonlinearity="relu"), shape))
        self.conv = ops.Conv2D(out_channels, kernel_size, pad_mode="pad", pad=kernel_size // 2, stride=stride)

    def construct(self, x: Tensor, choices: Tensor | None = None) -> Tensor:
        return self.conv(x, self.weight)


class QuantConv2d(Conv2d):
    """A convolution whose weights and input are quantized to the bit-width that is chosen for each image.

    Every bit-width is computed and multiplied with the choice, through which its gradient flows (paper, equation 6).

    Args:
        bits: the bit-widths; with one of them there is nothing to choose.
        quant: "dorefa" or "pact".
        decision: which of the decisions is this layer's.

    Inputs:
        x: float32 (N, C, H, W), not quantized.
        choices: float32 (N, decisions, len(bits)), one-hot along the last axis.
    """

    def __init__(self, *sizes: int, bits: tuple[int, ...], quant: str, decision: int = 0):
        super().__init__(*sizes)
        self.bits = bits
        self.decision = decision
        self.quan_a = activation(quant)

    def construct(self, x: Tensor, choices: Tensor | None = None) -> Tensor:
        clipped = self.quan_a.clip(x)
        positions = weight_positions(self.weight)
        if len(self.bits) == 1:
            bits = self.bits[0]
            return self.conv(self.quan_a(clipped, bits), quantize_weight(self.weight, positions, bits))
        total = 0
        for column, bits in enumerate(self.bits):
            result = self.conv(self.quan_a(clipped, bits), quantize_weight(self.weight, positions, bits))
            total = total + result * choices[:, self.decision, column].reshape(-1, 1, 1, 1)
        return total


class FixedConv2d(Conv2d):
    """`QuantConv2d` in inference at one bit-width; `load` quantizes its weight once."""

    def __init__(self, *sizes: int, bits: int, quant: str):
        super().__init__(*sizes)
        self.bits = bits
        self.quan_a = activation(quant)

    def load(self, weight: Tensor) -> None:
        """Take over the weight of a `QuantConv2d`."""
        self.weight.set_data(decode_weight(*weight_codes(weight, self.bits), self.bits))

    def construct(self, x: Tensor, choices: Tensor | None = None) -> Tensor:
        return self.conv(self.quan_a(self.quan_a.clip(x), self.bits), self.weight)


class StoredConv2d(FixedConv2d):
    """`FixedConv2d` for an exported file: its weight is kept as integers, one byte each."""

    def __init__(self, *sizes: int, bits: int, quant: str):
        super().__init__(*sizes, bits=bits, quant=quant)
        self.weight = Parameter(ops.zeros(self.weight.shape, ms.int8), requires_grad=False)
        self.scale = Parameter(ops.ones(1, ms.float32), requires_grad=False)

    def load(self, weight: Tensor) -> None:
        """Take over the weight of a `QuantConv2d` as integers."""
        codes, scale = weight_codes(weight, self.bits)
        self.weight.set_data(codes)
        self.scale.set_data(scale)

    def construct(self, x: Tensor, choices: Tensor | None = None) -> Tensor:
        weight = decode_weight(self.weight, self.scale, self.bits)
        return self.conv(self.quan_a(self.quan_a.clip(x), self.bits), weight)
