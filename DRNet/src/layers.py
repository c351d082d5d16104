"""The two layers that predictor and classifier share."""

import mindspore.nn as nn
from mindspore import Tensor, ops
from mindspore.common.initializer import HeNormal
from mindspore.ops.auto_generate import ResizeBilinearV2


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Convolution without bias, padded by `kernel_size // 2` on every side."""
    return nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        pad_mode="pad",
        padding=kernel_size // 2,
        weight_init=HeNormal(mode="fan_out", nonlinearity="relu"),
    )


class Resize(nn.Cell):
    """Bilinear resize of float32 (N, C, H, W) to (N, C, size, size), corners not aligned, pixel centres at integers.

    This is the operator that the published networks resize with inside the graph; the half-pixel form that
    `ops.interpolate` computes gives other values, and the published accuracy holds only with this one.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = (size, size)
        self.resize = ResizeBilinearV2(align_corners=False, half_pixel_centers=False)

    def construct(self, x: Tensor) -> Tensor:
        return self.resize(x, self.size)


class MaxPool(nn.Cell):
    """Maximum over 3x3 windows at stride 2, padded by 1: float32 (N, C, H, W) to (N, C, ceil(H/2), ceil(W/2)).

    `nn.MaxPool2d` computes the same with the same operator, but in a graph that takes any batch size its output has no
    known rank, and such a graph cannot be loaded with BNs behind it; hence the reshape. (The two-dimensional operator
    would do, but its gradient takes a hundred times as long on CPU.)
    """

    def __init__(self):
        super().__init__()
        self.pool = ops.MaxPool3DWithArgmax(ksize=(1, 3, 3), strides=(1, 2, 2), pads=(0, 1, 1))

    def construct(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        out, _ = self.pool(x.expand_dims(2))
        return out.reshape((-1, channels, (height + 1) // 2, (width + 1) // 2))
