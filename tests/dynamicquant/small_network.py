"""Run by test_commands.py: train.py with the network of tiny.py, by one process or by several through msrun.

python small_network.py NUMBER_OF_WORKERS BN FLAGS_OF_TRAIN

The small network compiles quickly. BN is "own" or "frozen": BNs learn from their own device's images only, and
MindSpore has no synchronised BN on CPU; frozen, the workers together compute what one computes.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "DynamicQuant"), str(ROOT / "tests"), str(ROOT)]

from utils.cli import run
from utils.launcher import is_scheduler, is_worker, launch

# isort: split
import mindspore.nn as nn
import src.resnet as resnet
import train
from dynamicquant import tiny


class Frozen(nn.BatchNorm2d):
    def __init__(self, channels: int):
        super().__init__(channels, use_batch_statistics=False)


def main() -> int:
    workers, bn, *flags = sys.argv[1:]
    if int(workers) > 1 and not is_worker() and not is_scheduler():
        output = Path(flags[flags.index("--output_dir") + 1])
        return launch(Path(__file__), sys.argv[1:], int(workers), output / "logs")
    vars(resnet).update(tiny.SIZES)
    if bn == "frozen":
        resnet.nn.BatchNorm2d = Frozen
    sys.argv[1:] = [*flags, "--device_num", workers]
    return train.main()


if __name__ == "__main__":
    run(main)
