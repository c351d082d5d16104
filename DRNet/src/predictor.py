"""Resolution predictor of DRNet (arXiv 2106.02898, section 3.2): a residual network of four stages of one block."""

import mindspore.nn as nn
from mindspore import Tensor

from src.layers import MaxPool, conv


class BasicBlock(nn.Cell):
    """Two 3x3 convolutions with BN and a shortcut: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.down_sample = stride != 1 or in_channels != out_channels
        if self.down_sample:
            self.down_sample_layer = nn.SequentialCell(
                conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
            )

    def construct(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.down_sample:
            identity = self.down_sample_layer(x)
        return self.relu(out + identity)


class Predictor(nn.Cell):
    """Scores every candidate resolution for every image.

    Args:
        num_resolutions: number of candidate resolutions R.

    Inputs:
        x: float32 (N, 3, P, P), the normalised image at the predictor's input size (P = 128 in the paper).

    Outputs:
        float32 (N, R), unnormalised scores; index 0 is the largest resolution.
    """

    def __init__(self, num_resolutions: int = 3):
        super().__init__()
        self.conv1 = conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = MaxPool()
        self.layer1 = nn.SequentialCell(BasicBlock(64, 64))
        self.layer2 = nn.SequentialCell(BasicBlock(64, 128, 2))
        self.layer3 = nn.SequentialCell(BasicBlock(128, 256, 2))
        self.layer4 = nn.SequentialCell(BasicBlock(256, 512, 2))
        self.end_point = nn.Dense(512, num_resolutions)

    def construct(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.end_point(x.mean((2, 3)))


def predictor(num_resolutions: int = 3) -> Predictor:
    """The published predictor, for `num_resolutions` candidate resolutions."""
    return Predictor(num_resolutions)
