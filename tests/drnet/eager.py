"""`python eager.py FLAGS` is `python train.py FLAGS` in PyNative mode, where nothing of the training compiles."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "DRNet"))

import train

from utils.cli import run

# isort: split
import mindspore as ms
from src import evaluation

join_devices = train.join_devices


def eagerly(args):
    devices = join_devices(args)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    return devices


train.join_devices = eagerly
evaluation._compile = lambda drnet, route, batch_size: None
train.__file__ = __file__  # what further devices run

if __name__ == "__main__":
    run(train.main)
