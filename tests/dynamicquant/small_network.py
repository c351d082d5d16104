"""Runs train.py, eval.py or export.py with a network like that of tiny.py, which compiles quickly.

python small_network.py SCRIPT FORM FLAGS_OF_THE_SCRIPT

FORM is one of:

- plain;
- eager: nothing is compiled;
- frozen: BNs do not learn from their images. MindSpore has no synchronised BN on CPU, so they learn from their own
  device's images only; frozen, several devices together compute what one computes.
"""

import argparse
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "DynamicQuant"), str(ROOT / "tests"), str(ROOT)]

from utils.cli import run
from utils.device import Devices, join_devices
from utils.launcher import distribute

# isort: split
import mindspore as ms
import mindspore.nn as nn
import src.resnet as resnet
from dynamicquant import tiny


class Frozen(nn.BatchNorm2d):
    def __init__(self, channels: int):
        super().__init__(channels, use_batch_statistics=False)


def join_eagerly(args: argparse.Namespace) -> Devices:
    devices = join_devices(args)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    return devices


def main() -> int | None:
    name, form, *flags = sys.argv[1:]
    vars(resnet).update(tiny.SIZES, WIDTHS=tiny.WIDER)
    script = importlib.import_module(name)
    if name == "train":
        # train.py would start itself on the other devices.
        status = distribute(script.load_config("train", "", flags), __file__)
        if status is not None:
            return status
    if form == "eager":
        script.join_devices = join_eagerly
    elif form == "frozen":
        resnet.nn.BatchNorm2d = Frozen
    sys.argv[1:] = flags
    return script.main()


if __name__ == "__main__":
    run(main)
