"""The two layers that predictor and classifier share."""

import mindspore.nn as nn
from mindspore import Tensor
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
        weight_init="he_normal",
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
