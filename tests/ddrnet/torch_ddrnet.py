"""DDRNet-23 in inference once more, in PyTorch and float64, for images of any size; weights from the recipe."""

import numpy as np
import torch
import torch.nn.functional as F
from golden.recipe import value


def conv(x: torch.Tensor, name: str, channels: int, side: int, stride: int = 1) -> torch.Tensor:
    """Padded "same" as TensorFlow defines it: ceil(size / stride) outputs, an odd pixel of padding behind."""
    weight = torch.tensor(value(f"{name}.weight", (channels, x.shape[1], side, side)).astype(np.float64))
    edges = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + side - size, 0)
        edges += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, edges), weight, stride=stride)


def bn(x: torch.Tensor, name: str) -> torch.Tensor:
    leaves = ("moving_mean", "moving_variance", "gamma", "beta")
    arrays = [value(f"{name}.{leaf}", (x.shape[1],)).astype(np.float64) for leaf in leaves]
    return F.batch_norm(x, *map(torch.tensor, arrays))


def conv_bn(x: torch.Tensor, name: str, channels: int, side: int, stride: int = 1, place: int = 0) -> torch.Tensor:
    """Two cells of a sequence, from `place` on."""
    return bn(conv(x, f"{name}.{place}", channels, side, stride), f"{name}.{place + 1}")


def add(x: torch.Tensor, residual: torch.Tensor, name: str, stride: int) -> torch.Tensor:
    if x.shape[1] != residual.shape[1] or stride > 1:
        x = conv_bn(x, f"{name}.downsample", residual.shape[1], 1, stride)
    return x + residual


def stage(x: torch.Tensor, name: str, channels: int, stride: int = 1) -> torch.Tensor:
    """Two basic blocks; a ReLU is between them and none behind."""
    for block in (0, 1):
        part, step = f"{name}.{block}", stride if block == 0 else 1
        inner = F.relu(bn(conv(x, f"{part}.conv1", channels, 3, step), f"{part}.bn1"))
        x = add(x, bn(conv(inner, f"{part}.conv2", channels, 3), f"{part}.bn2"), part, step)
        x = F.relu(x) if block == 0 else x
    return x


def bottleneck(x: torch.Tensor, name: str, channels: int) -> torch.Tensor:
    inner = F.relu(bn(conv(x, f"{name}.conv1", channels, 1), f"{name}.bn1"))
    inner = F.relu(bn(conv(inner, f"{name}.conv2", channels, 3), f"{name}.bn2"))
    return F.relu(add(x, bn(conv(inner, f"{name}.conv3", 2 * channels, 1), f"{name}.bn3"), name, 1))


def resize(x: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """Bilinear with pixel centres at integers: output i lies at i * size / new size, and nothing beyond the edge."""
    for axis, size in zip((2, 3), sizes):
        at = torch.arange(size, dtype=torch.float64) * (x.shape[axis] / size)
        low = at.floor().long()
        high = (low + 1).clamp(max=x.shape[axis] - 1)
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        x = x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share
    return x


def ddrnet23(images: np.ndarray, classes: int = 1000) -> np.ndarray:
    """Logits, float64, of images (N, 3, H, W)."""
    x = torch.tensor(images.astype(np.float64))
    x = F.relu(conv_bn(x, "conv1", 64, 3, 2))
    x = F.relu(conv_bn(x, "conv1", 64, 3, 2, 3))
    x = F.relu(stage(x, "layer1", 64))
    x = F.relu(stage(x, "layer2", 128, 2))
    low, high = stage(x, "layer3", 256, 2), stage(x, "layer3_", 128)
    down = conv_bn(F.relu(high), "down3", 256, 3, 2)
    up = resize(conv_bn(F.relu(low), "compression3", 128, 1), high.shape[2:])
    low, high = F.relu(low + down), F.relu(high + up)
    low, high = stage(low, "layer4", 512, 2), stage(high, "layer4_", 128)
    down = F.relu(conv_bn(F.relu(high), "down4", 256, 3, 2))
    up = resize(conv_bn(F.relu(low), "compression4", 128, 1), high.shape[2:])
    low, high = F.relu(low + conv_bn(down, "down4", 512, 3, 2, 3)), F.relu(high + up)
    high = F.relu(conv_bn(bottleneck(high, "layer5_.0", 128), "down5", 512, 3, 2))
    x = F.relu(bottleneck(low, "layer5.0", 512) + conv_bn(high, "down5", 1024, 3, 2, 3))
    x = F.relu(conv_bn(x, "last_layer", 2048, 1)).mean((2, 3))
    return x.numpy() @ value("linear.weight", (classes, 2048)).T.astype(np.float64) + value("linear.bias", (classes,))
