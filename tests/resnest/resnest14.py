"""A fifth network, with one block in each stage, which compiles quickly, and the commands that know it.

    COMMAND=train python resnest14.py --backbone resnest14 FLAGS_OF_TRAIN

runs train.py, eval.py or export.py with it. BN=frozen: its BNs do not learn. They otherwise learn from the images of
their own device, as MindSpore has no synchronised BN on CPU; frozen, the workers together compute what one computes.
"""

import importlib
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS, STEM_WIDTH = (1, 1, 1, 1), 32
RESIZE, INPUT_SIZE = 256, 224


def resnest14(num_classes: int = 1000, fused: bool = False, dropout: float = 0.0):
    import mindspore.nn as nn
    from src.resnest import ResNeSt

    network = ResNeSt(BLOCKS, STEM_WIDTH, num_classes, fused, dropout)
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.BatchNorm2d) and os.environ.get("BN") == "frozen":
            cell.use_batch_statistics = False
    return network


def added() -> list[tuple[MutableMapping, object]]:
    """The tables of `src.checkpoints` that list the networks, each with what stands there for this one."""
    from src import checkpoints

    return [
        (checkpoints.BACKBONES, checkpoints.Backbone(resnest14, INPUT_SIZE, RESIZE)),
        (checkpoints.BLOCKS, BLOCKS),
        (checkpoints.DEPTHS, 5 * sum(BLOCKS) + 8),
    ]


@pytest.fixture(scope="module")
def small_network():
    """While a module's tests run, this one is one of the networks."""
    with pytest.MonkeyPatch.context() as patch:
        for table, entry in added():
            patch.setitem(table, "resnest14", entry)
        yield


def main() -> int | None:
    for table, entry in added():
        table["resnest14"] = entry
    command = importlib.import_module(os.environ["COMMAND"])
    command.__file__ = __file__  # which the processes of several devices start
    return command.main()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "ResNeSt"), str(ROOT)]
    from utils.cli import run

    run(main)
