"""Run by the tests: train.py, eval.py or export.py with a small network in the place of DDRNet-23.

python small_network.py SCRIPT FLAGS

SCRIPT is the script, or its name, or "frozen": train.py with frozen BNs. They learn from their own device's images
only, and MindSpore has no synchronised BN on CPU; frozen, several devices together compute what one computes.
Afterwards each device sets the BN statistics to its rank + 1, takes their mean, and the first prints what they are.

Two environment variables: INTERRUPT, such as "step 7" or "evaluation 1", presses Ctrl-C when that one of the run
begins; NETWORK, set to anything, leaves DDRNet-23 itself.

The small network compiles in seconds. It has parameters of each kind that DDRNet-23 has, under names of its.
"""

import importlib
import itertools
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "DDRNet"), str(ROOT)]

from utils.cli import run
from utils.launcher import is_worker

# isort: split
import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore.communication import get_group_size, get_rank
from src.models.ddrnet import DEPTHS, BasicBlock, DDRNet23, conv_bn
from src.tools import get_misc
from src.trainers.train_one_step import TrainOneStep

from utils.training import MeanStatistics


class Small(DDRNet23):
    """A stride of 8, one block with its residual, the deepest of DDRNet-23's, and the head."""

    def __init__(self, num_classes: int, drop_path_rate: float):
        nn.Cell.__init__(self)
        self.drop_path_rates = drop_path_rate * np.array(DEPTHS) / max(DEPTHS)
        self.conv1 = nn.SequentialCell([*conv_bn(3, 8, 3, 4), nn.ReLU()])
        self.layer1 = nn.CellList([BasicBlock(8, 8)])
        self.compression3 = nn.SequentialCell([*conv_bn(8, 16, 3, 2), nn.ReLU()])
        self.linear = nn.Dense(16, num_classes)

    def construct(self, images, keep=None):
        x = self.layer1[0](self.conv1(images), None if keep is None else keep[:, -1])
        return self.linear(self.compression3(x).mean((2, 3)))


def frozen(num_classes: int, drop_path_rate: float) -> Small:
    network = Small(num_classes, drop_path_rate)
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.BatchNorm2d):
            cell.use_batch_statistics = False
    return network


def show_mean_statistics() -> None:
    """What the devices' mean is of statistics that are 1 on the first and 2 on the second."""
    network = nn.SequentialCell(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    bn = network[1]
    shown = (bn.moving_mean, bn.moving_variance, bn.gamma)
    for parameter in shown:
        parameter.set_data(ms.Tensor(np.full(2, get_rank() + 1), ms.float32))
    MeanStatistics([network], get_group_size())()
    if get_rank() == 0:
        print(f"mean, variance, gamma: {[float(parameter.asnumpy()[1]) for parameter in shown]}")


def interrupted(function: Callable, number: int) -> Callable:
    """`function`, with a Ctrl-C at the beginning of that call."""
    calls = itertools.count(1)

    def call(*words, **options):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*words, **options)

    return call


def main() -> int | None:
    name = Path(sys.argv[1]).stem
    script = importlib.import_module("train" if name == "frozen" else name)
    script.__file__ = __file__  # which the processes of the other devices run
    script.load_config = partial(script.load_config, argv=sys.argv[2:])
    if "NETWORK" not in os.environ:
        get_misc.DDRNet23 = frozen if name == "frozen" else Small
    what, _, number = os.environ.get("INTERRUPT", "").partition(" ")
    if what == "step":
        TrainOneStep.__call__ = interrupted(TrainOneStep.__call__, int(number))
    elif what == "evaluation":
        script.evaluate = interrupted(script.evaluate, int(number))
    status = script.main()
    if name == "frozen" and is_worker() and not status:
        show_mean_statistics()
    return status


if __name__ == "__main__":
    run(main)
