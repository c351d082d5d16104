"""Classifier of DRNet (arXiv 2106.02898, section 3.3): ResNet-50 whose BNs exist once per candidate resolution."""

import mindspore.nn as nn
from mindspore import Tensor

from src.layers import MaxPool, conv

SHORTCUT_BN = ("published", "per_resolution")


class ResolutionAwareBN(nn.Cell):
    """RA-BN (section 3.3): one BN per candidate resolution, each with its own statistics, scale and shift.

    Called with x (N, C, H, W) and the index of the set to use; returns (N, C, H, W).
    """

    def __init__(self, channels: int, num_resolutions: int, gamma_init: str = "ones"):
        super().__init__()
        for index in range(num_resolutions):
            self.insert_child_to_cell(f"bn_{index}", nn.BatchNorm2d(channels, gamma_init=gamma_init))
        self.sets = [getattr(self, f"bn_{index}") for index in range(num_resolutions)]

    def construct(self, x: Tensor, index: int) -> Tensor:
        return self.sets[index](x)


class Bottleneck(nn.Cell):
    """ResNet bottleneck with RA-BN: (N, in_channels, H, W) to (N, 4 * channels, H/stride, W/stride).

    `shortcut_bn` says which BN set normalises the projection shortcut: "per_resolution" the resolution's own (the
    paper), "published" set 0 at every resolution (the published checkpoints were trained and evaluated so).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, num_resolutions: int, shortcut_bn: str):
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = ResolutionAwareBN(channels, num_resolutions)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = ResolutionAwareBN(channels, num_resolutions)
        self.conv3 = conv(channels, out_channels, 1)
        # A block that starts as the identity trains from nothing in far fewer epochs.
        self.bn3 = ResolutionAwareBN(out_channels, num_resolutions, gamma_init="zeros")
        self.relu = nn.ReLU()
        self.down_sample = stride != 1 or in_channels != out_channels
        self.shared_shortcut_bn = shortcut_bn == "published"
        if self.down_sample:
            self.down_sample_layer = nn.CellList(
                [conv(in_channels, out_channels, 1, stride), ResolutionAwareBN(out_channels, num_resolutions)]
            )

    def construct(self, x: Tensor, index: int) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x), index))
        out = self.relu(self.bn2(self.conv2(out), index))
        out = self.bn3(self.conv3(out), index)
        if self.down_sample:
            shortcut_set = 0 if self.shared_shortcut_bn else index
            identity = self.down_sample_layer[1](self.down_sample_layer[0](x), shortcut_set)
        return self.relu(out + identity)


class ResNet(nn.Cell):
    """ResNet with resolution-aware BN.

    Args:
        layers: number of bottlenecks in each of the four stages.
        num_classes: number of classes K.
        num_resolutions: number of candidate resolutions R, that is of BN sets.
        shortcut_bn: "published" or "per_resolution", see `Bottleneck`.

    Inputs:
        x: float32 (N, 3, H, W), the normalised images of one resolution.
        index: int in [0, R), the BN set of that resolution; 0 is the largest resolution.

    Outputs:
        float32 (N, K), logits.
    """

    def __init__(
        self, layers: tuple, num_classes: int = 1000, num_resolutions: int = 3, shortcut_bn: str = "published"
    ):
        super().__init__()
        if shortcut_bn not in SHORTCUT_BN:
            raise ValueError(f"shortcut_bn must be one of {', '.join(SHORTCUT_BN)}, not {shortcut_bn!r}")
        self.conv1 = conv(3, 64, 7, 2)
        self.bn1 = ResolutionAwareBN(64, num_resolutions)
        self.relu = nn.ReLU()
        self.maxpool = MaxPool()
        stages = []
        in_channels = 64
        for stage, blocks in enumerate(layers):
            channels = 64 * 2**stage
            stages.append(nn.CellList())
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages[-1].append(Bottleneck(in_channels, channels, stride, num_resolutions, shortcut_bn))
                in_channels = 4 * channels
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.end_point = nn.Dense(in_channels, num_classes)

    def construct(self, x: Tensor, index: int) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x), index)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x, index)
        return self.end_point(x.mean((2, 3)))


def resnet50(num_classes: int = 1000, num_resolutions: int = 3, shortcut_bn: str = "published") -> ResNet:
    """The published classifier: ResNet-50 with RA-BN."""
    return ResNet((3, 4, 6, 3), num_classes, num_resolutions, shortcut_bn)
