"""DDRNet-23 with a classification head (arXiv 2101.06085, section 3.2 and figure 4).

Two branches from 1/8 of the image's resolution on: the high-resolution one stays there, the other goes down to 1/32.
They exchange features twice and are added at the end. Parameter names are those of the published checkpoint. All
convolutions pad "same", MindSpore's default, as the published network does: at stride 2, on even sides, only below and
to the right. Where a side is odd, half of it is rounded up, in both branches alike, so images may have any size.
"""

import mindspore.nn as nn
import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import HeNormal
from mindspore.ops.auto_generate import ResizeBilinearV2

# Depth of each block in the order of `DDRNet23.blocks`: blocks of the two branches that work side by side share one.
DEPTHS = (0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 8)


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Convolution without bias, padded "same"."""
    weight_init = HeNormal(mode="fan_out", nonlinearity="relu")
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, weight_init=weight_init)


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> list[nn.Cell]:
    """Convolution and BN."""
    return [conv(in_channels, out_channels, kernel_size, stride), nn.BatchNorm2d(out_channels)]


class Residual(nn.Cell):
    """What both kinds of block share: shortcut plus residual, and a ReLU unless `no_relu`.

    Inputs: x float32 (N, C, H, W); keep float32 (N,), which multiplies the residual of each image (stochastic depth,
    arXiv 1603.09382: 0 where it is dropped, 1 / (1 - rate) where it stays), or None.
    Output: float32 (N, C', H / stride, W / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, no_relu: bool):
        super().__init__()
        self.no_relu = no_relu
        self.relu = nn.ReLU()
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.SequentialCell(conv_bn(in_channels, out_channels, 1, stride))

    def add(self, x: Tensor, residual: Tensor, keep: Tensor | None) -> Tensor:
        """Shortcut of x plus the residual."""
        if keep is not None:
            residual = residual * keep.astype(residual.dtype).reshape((-1, 1, 1, 1))
        if self.downsample is not None:
            x = self.downsample(x)
        x = x + residual
        return x if self.no_relu else self.relu(x)


class BasicBlock(Residual):
    """Two 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, no_relu: bool = False):
        super().__init__(in_channels, out_channels, stride, no_relu)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def construct(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        residual = self.relu(self.bn1(self.conv1(x)))
        return self.add(x, self.bn2(self.conv2(residual)), keep)


class Bottleneck(Residual):
    """1x1, 3x3 and 1x1 convolution, the last one to twice the channels."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__(in_channels, 2 * channels, 1, no_relu=False)
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, 2 * channels, 1)
        self.bn3 = nn.BatchNorm2d(2 * channels)

    def construct(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        return self.add(x, self.bn3(self.conv3(residual)), keep)


class Upsample(nn.Cell):
    """Bilinear resize of (N, C, H, W) to the height and width of another tensor.

    It is the operator of the published network, with pixel centres at integers; `ops.interpolate` gives other values.
    """

    def __init__(self):
        super().__init__()
        self.resize = ResizeBilinearV2(align_corners=False, half_pixel_centers=False)

    def construct(self, x: Tensor, like: Tensor) -> Tensor:
        return self.resize(x, like.shape[2:])


class DDRNet23(nn.Cell):
    """DDRNet-23: 28.2 million parameters with 1,000 classes.

    Args:
        num_classes: K.
        drop_path_rate: stochastic depth: how often the residual of the deepest block is dropped in training.

    Inputs:
        images: float32 (N, 3, H, W).
        keep: float32 (N, 14) from `sample_keep`, or None to keep every residual.

    Output:
        logits float32 (N, K).

    Raises:
        ValueError: a rate outside [0, 1).
    """

    def __init__(self, num_classes: int = 1000, drop_path_rate: float = 0.1):
        super().__init__()
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), not {drop_path_rate}")
        # The rate grows linearly with the depth, from 0 (arXiv 1603.09382, section 3).
        self.drop_path_rates = drop_path_rate * np.array(DEPTHS) / max(DEPTHS)
        channels, high = 64, 128
        relu = nn.ReLU
        self.conv1 = nn.SequentialCell(
            [*conv_bn(3, channels, 3, 2), relu(), *conv_bn(channels, channels, 3, 2), relu()]
        )
        self.layer1 = stage(channels, channels)
        self.layer2 = stage(channels, 2 * channels, 2)
        self.layer3 = stage(2 * channels, 4 * channels, 2)
        self.layer4 = stage(4 * channels, 8 * channels, 2)
        self.compression3 = nn.SequentialCell(conv_bn(4 * channels, high, 1))
        self.compression4 = nn.SequentialCell(conv_bn(8 * channels, high, 1))
        self.down3 = nn.SequentialCell(conv_bn(high, 4 * channels, 3, 2))
        self.down4 = nn.SequentialCell(
            [*conv_bn(high, 4 * channels, 3, 2), relu(), *conv_bn(4 * channels, 8 * channels, 3, 2)]
        )
        self.layer3_ = stage(2 * channels, high)
        self.layer4_ = stage(high, high)
        self.layer5_ = nn.CellList([Bottleneck(high, high)])
        self.down5 = nn.SequentialCell(
            [*conv_bn(2 * high, 8 * channels, 3, 2), relu(), *conv_bn(8 * channels, 16 * channels, 3, 2)]
        )
        self.layer5 = nn.CellList([Bottleneck(8 * channels, 8 * channels)])
        self.last_layer = nn.SequentialCell([*conv_bn(16 * channels, 2048, 1), relu()])
        self.linear = nn.Dense(2048, num_classes)
        self.relu = relu()
        self.upsample = Upsample()

    def sample_keep(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """What each of 14 residuals of `count` images is multiplied by: float32 (count, 14), 0 or 1 / (1 - rate)."""
        kept = rng.random((count, len(DEPTHS))) >= self.drop_path_rates
        return (kept / (1 - self.drop_path_rates)).astype(np.float32)

    def construct(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        k = (None,) * 14 if keep is None else ops.unbind(keep, 1)
        x = self.conv1(images)  # 1/4
        x = self.layer1[1](self.layer1[0](x, k[0]), k[1])
        x = self.relu(x)
        x = self.layer2[1](self.layer2[0](x, k[2]), k[3])  # 1/8
        x = self.relu(x)
        low = self.layer3[1](self.layer3[0](x, k[4]), k[5])  # 1/16
        high = self.layer3_[1](self.layer3_[0](x, k[6]), k[7])  # 1/8
        low, high = (
            low + self.down3(self.relu(high)),
            high + self.upsample(self.compression3(self.relu(low)), high),
        )
        low, high = self.relu(low), self.relu(high)
        low = self.layer4[1](self.layer4[0](low, k[8]), k[9])  # 1/32
        high = self.layer4_[1](self.layer4_[0](high, k[10]), k[11])
        low, high = (
            low + self.down4(self.relu(high)),
            high + self.upsample(self.compression4(self.relu(low)), high),
        )
        high = self.layer5_[0](self.relu(high), k[12])
        low = self.layer5[0](self.relu(low), k[13])
        x = low + self.down5(high)
        x = self.last_layer(self.relu(x))
        return self.linear(x.mean((2, 3)))


def stage(in_channels: int, out_channels: int, stride: int = 1) -> nn.CellList:
    """Two basic blocks, the first one with the stride, the last one without a ReLU at its end."""
    return nn.CellList([BasicBlock(in_channels, out_channels, stride), BasicBlock(out_channels, out_channels, 1, True)])
