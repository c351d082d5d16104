"""A fifth network, with one block in each stage, which compiles quickly, and the commands that know it.

    COMMAND=train python resnest14.py --backbone resnest14 FLAGS_OF_TRAIN

runs train.py, eval.py or export.py with it. With these variables, for tests of the training around it:

TINY=1: in place of the blocks there is one convolution.
BN=frozen: BNs do not learn. They otherwise learn from the images of their own device, as MindSpore has no synchronised
    BN on CPU; frozen, the workers together compute what one computes.
INTERRUPTED=2: train.py gets a Ctrl-C before step 2, from 0, of its first epoch is computed.
"""

import importlib
import os
import signal
import sys
from collections.abc import MutableMapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "ResNeSt"), str(ROOT)]

import utils  # noqa: F401  (before mindspore)

# isort: split
import mindspore.nn as nn
import pytest
from mindspore import ops
from src import checkpoints
from src.resnest import ResNeSt

from utils.cli import run

BLOCKS, STEM_WIDTH = (1, 1, 1, 1), 32
RESIZE, INPUT_SIZE = 256, 224


class Tiny(ResNeSt):
    """Patches of 8 x 8 pixels to features, their mean to classes; float32 (N, 3, H, W) to (N, K)."""

    def __init__(self, num_classes: int, dropout: float):
        nn.Cell.__init__(self)
        self.blocks, self.num_classes, self.dropout = BLOCKS, num_classes, dropout
        self.conv1 = nn.Conv2d(3, 2048, 8, 8, pad_mode="valid")
        self.bn1 = nn.BatchNorm2d(2048)
        self.fc = nn.Dense(2048, num_classes)

    def construct(self, images, keep=None):
        x = ops.relu(self.bn1(self.conv1(images))).mean((2, 3))
        if keep is not None:
            x = x * keep
        return self.fc(x)


def resnest14(num_classes: int = 1000, fused: bool = False, dropout: float = 0.0) -> ResNeSt:
    if "TINY" in os.environ:
        network = Tiny(num_classes, dropout)
    else:
        network = ResNeSt(BLOCKS, STEM_WIDTH, num_classes, fused, dropout)
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.BatchNorm2d) and os.environ.get("BN") == "frozen":
            cell.use_batch_statistics = False
    return network


# The tables that list the networks, each with what stands there for this one.
ADDED: list[tuple[MutableMapping, object]] = [
    (checkpoints.BACKBONES, checkpoints.Backbone(resnest14, INPUT_SIZE, RESIZE)),
    (checkpoints.BLOCKS, BLOCKS),
    (checkpoints.DEPTHS, 5 * sum(BLOCKS) + 8),
]


@pytest.fixture(scope="module")
def small_network():
    """While a module's tests run, this one is one of the networks."""
    with pytest.MonkeyPatch.context() as patch:
        for table, entry in ADDED:
            patch.setitem(table, "resnest14", entry)
        yield


def main() -> int | None:
    for table, entry in ADDED:
        table["resnest14"] = entry
    command = importlib.import_module(os.environ["COMMAND"])
    command.__file__ = __file__  # which the processes of several devices start
    if "INTERRUPTED" in os.environ:
        mask = command.dropout_mask

        def interrupting(network, batch_size, seed, epoch, step, *devices):
            if (epoch, step) == (0, int(os.environ["INTERRUPTED"])):
                os.kill(os.getpid(), signal.SIGINT)
            return mask(network, batch_size, seed, epoch, step, *devices)

        command.dropout_mask = interrupting
    return command.main()


if __name__ == "__main__":
    run(main)
