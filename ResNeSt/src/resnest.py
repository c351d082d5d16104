"""ResNeSt (arXiv 2004.08955): split-attention block and network, in a trainable and in a fused form.

Parameter names are those of the authors' PyTorch networks, with MindSpore's words for those of a BN. `fused=True` has
every BN folded into the convolution before it, which then has a bias: the same function, for inference and export.
`fuse` and `unfuse` turn the parameters of one form into those of the other. Convolutions and poolings pad on all sides.
"""

from collections.abc import Mapping

import mindspore.nn as nn
import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import HeNormal

RADIX = 2
EPSILON = 1e-5  # of every BN
# The BN behind a layer, by the end of the layer's name. `conv2.fc2` and `fc` have none.
BN_BEHIND = {
    "conv1.0": "conv1.1",
    "conv1.3": "conv1.4",
    "conv1.6": "bn1",
    "conv1": "bn1",
    "conv2.conv": "conv2.bn0",
    "conv2.fc1": "conv2.bn1",
    "conv3": "bn3",
    "downsample.1": "downsample.2",
}
BN_PARAMETERS = ("gamma", "beta", "moving_mean", "moving_variance")


def conv(
    in_channels: int, out_channels: int, kernel_size: int, fused: bool, stride: int = 1, group: int = 1
) -> nn.Conv2d:
    """Convolution padded by `kernel_size // 2` on every side, with a bias only in the fused form."""
    return nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        pad_mode="pad",
        padding=kernel_size // 2,
        group=group,
        has_bias=fused,
        weight_init=HeNormal(mode="fan_out", nonlinearity="relu"),
        bias_init="zeros",
    )


def bn(channels: int, fused: bool) -> nn.Cell:
    """BN; nothing in the fused form."""
    return nn.Identity() if fused else nn.BatchNorm2d(channels, eps=EPSILON)


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


class SplitAttention(nn.Cell):
    """Split-attention convolution (section 3.1, figure 2) with cardinality 1 and radix 2.

    A 3x3 convolution in two groups gives two splits. Their sum, averaged over all positions, decides through two 1x1
    convolutions how the splits are weighted against each other in each channel. Of the softmax over two, the first
    weight is the sigmoid of the difference and the second is what it lacks of 1: the weighted sum needs one product.

    Input and output: float32 (N, C, H, W), C = `channels`.
    """

    def __init__(self, channels: int, fused: bool):
        super().__init__()
        self.channels = channels
        inner_channels = max(RADIX * channels // 4, 32)
        self.conv = conv(channels, RADIX * channels, 3, fused, group=RADIX)
        self.bn0 = bn(RADIX * channels, fused)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = conv(channels, inner_channels, 1, True)  # biased in both forms, as the authors' is
        self.bn1 = bn(inner_channels, fused)
        self.fc2 = conv(inner_channels, RADIX * channels, 1, True)

    def construct(self, x: Tensor) -> Tensor:
        u = self.relu(self.bn0(self.conv(x)))  # (N, 2C, H, W)
        u1, u2 = ops.split(u, self.channels, 1)  # (N, C, H, W) each
        s = self.pool(u1 + u2)  # (N, C, 1, 1)
        z = self.fc2(self.relu(self.bn1(self.fc1(s))))  # (N, 2C, 1, 1)
        z1, z2 = ops.split(z, self.channels, 1)
        a1 = ops.sigmoid(z1 - z2)
        return u2 + a1 * (u1 - u2)  # a1 u1 + (1 - a1) u2


class Bottleneck(nn.Cell):
    """1x1 convolution, split attention, 1x1 convolution to four times the channels, and a shortcut (figure 1).

    With a stride, average pooling lowers the resolution, in the shortcut and behind the split attention (section 4.1).

    Input: float32 (N, C', H, W). Output: float32 (N, 4C, H / stride, W / stride), C = `channels`.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, fused: bool):
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = conv(in_channels, channels, 1, fused)
        self.bn1 = bn(channels, fused)
        self.conv2 = SplitAttention(channels, fused)
        self.pool = nn.Identity()
        if stride > 1:
            # The zeros around the image count in the average, in the authors' network as well.
            self.pool = nn.AvgPool2d(3, stride, pad_mode="pad", padding=1)
        self.conv3 = conv(channels, out_channels, 1, fused)
        self.bn3 = bn(out_channels, fused)
        self.relu = nn.ReLU()
        self.downsample = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            pool = nn.AvgPool2d(stride, stride) if stride > 1 else nn.Identity()
            self.downsample = nn.SequentialCell(
                [pool, conv(in_channels, out_channels, 1, fused), bn(out_channels, fused)]
            )

    def construct(self, x: Tensor) -> Tensor:
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.pool(self.conv2(residual))
        residual = self.bn3(self.conv3(residual))
        return self.relu(residual + self.downsample(x))


class ResNeSt(nn.Cell):
    """ResNeSt with the deep stem of ResNet-D (section 4.1).

    Args:
        blocks: how many blocks each of the four stages has.
        stem_width: channels of the stem's first two convolutions, half of those of the third.
        num_classes: K.
        fused: the form without BN.
        dropout: how often `sample_keep` drops a feature before the classifier.

    Inputs:
        images: float32 (N, 3, H, W), H and W multiples of 32.
        keep: float32 (N, 2048) from `sample_keep`, or None to keep every feature.

    Output:
        logits float32 (N, K).

    Raises:
        ValueError: images of another size, or a rate outside [0, 1).
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        stem_width: int,
        num_classes: int = 1000,
        fused: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {dropout}")
        self.blocks, self.num_classes, self.fused, self.dropout = blocks, num_classes, fused, dropout
        channels = 2 * stem_width
        self.conv1 = nn.SequentialCell(
            [
                conv(3, stem_width, 3, fused, 2),
                bn(stem_width, fused),
                nn.ReLU(),
                conv(stem_width, stem_width, 3, fused),
                bn(stem_width, fused),
                nn.ReLU(),
                conv(stem_width, channels, 3, fused),
            ]
        )
        self.bn1 = bn(channels, fused)
        self.relu = nn.ReLU()
        self.maxpool = MaxPool()
        self.layer1 = stage(channels, 64, blocks[0], 1, fused)
        self.layer2 = stage(256, 128, blocks[1], 2, fused)
        self.layer3 = stage(512, 256, blocks[2], 2, fused)
        self.layer4 = stage(1024, 512, blocks[3], 2, fused)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Dense(2048, num_classes)

    def sample_keep(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """What each feature of `count` images is multiplied by: float32 (count, 2048), 0 or 1 / (1 - dropout)."""
        kept = rng.random((count, 2048)) >= self.dropout
        return (kept / (1 - self.dropout)).astype(np.float32)

    def construct(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        _, _, height, width = images.shape
        if height % 32 != 0 or width % 32 != 0:
            raise ValueError("height and width of the images must be multiples of 32")
        x = self.relu(self.bn1(self.conv1(images)))  # 1/2
        x = self.maxpool(x)  # 1/4
        x = self.layer1(x)
        x = self.layer2(x)  # 1/8
        x = self.layer3(x)  # 1/16
        x = self.layer4(x)  # 1/32
        x = self.avgpool(x).reshape((-1, 2048))
        if keep is not None:
            x = x * keep.astype(x.dtype)
        return self.fc(x)


def stage(in_channels: int, channels: int, blocks: int, stride: int, fused: bool) -> nn.SequentialCell:
    """`blocks` blocks one after the other, the first one with the stride."""
    first = Bottleneck(in_channels, channels, stride, fused)
    return nn.SequentialCell([first, *(Bottleneck(4 * channels, channels, 1, fused) for _ in range(blocks - 1))])


def bn_behind(layer: str) -> str | None:
    """Name of the BN that follows the convolution `layer`; None if none does."""
    for end, name in BN_BEHIND.items():
        if layer == end or layer.endswith(f".{end}"):
            return layer.removesuffix(end) + name
    return None


def fuse(parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of the fused form: every BN folded into the convolution before it, in float64.

    Args:
        parameters: all of the form with BNs.

    Returns:
        float32 arrays under `<layer>.weight` and `<layer>.bias`.
    """
    fused = {}
    for name, value in parameters.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight":
            continue
        weight = value.astype(np.float64)
        bias = parameters.get(f"{layer}.bias", np.zeros(len(weight))).astype(np.float64)
        behind = bn_behind(layer)
        if behind:
            gamma, beta, mean, variance = (parameters[f"{behind}.{word}"].astype(np.float64) for word in BN_PARAMETERS)
            scale = gamma / np.sqrt(variance + EPSILON)
            weight = weight * scale.reshape((-1, *[1] * (weight.ndim - 1)))
            bias = (bias - mean) * scale + beta
        fused[f"{layer}.weight"] = weight.astype(np.float32)
        fused[f"{layer}.bias"] = bias.astype(np.float32)
    return fused


def unfuse(parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters with BNs that compute the same, in inference, as those of the fused form.

    The BNs add the bias and do nothing else: mean 0, variance 1, and the gamma that undoes the epsilon.
    """
    unfused = {}
    for name, value in parameters.items():
        layer, _, leaf = name.rpartition(".")
        behind = bn_behind(layer)
        if leaf == "weight" or not behind:
            unfused[name] = value
            continue
        if layer.endswith(".fc1"):
            unfused[name] = np.zeros_like(value)
        ones = np.ones_like(value)
        values = (np.sqrt(1 + EPSILON) * ones, value, 0 * ones, ones)
        unfused |= {f"{behind}.{word}": new.astype(np.float32) for word, new in zip(BN_PARAMETERS, values)}
    return unfused
