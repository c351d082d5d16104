"""Run by test_commands.py: train.py with one block in each stage, by one process or by several through msrun.

python small_network.py NUMBER_OF_WORKERS BN FLAGS_OF_TRAIN

The small network compiles quickly. BN is "own" or "frozen": BNs learn from their own device's images only, and
MindSpore has no synchronised BN on CPU; frozen, the workers together compute what one computes.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "ResNeSt"), str(ROOT)]

from utils.cli import run
from utils.images import open_split
from utils.launcher import is_worker, launch

# isort: split
import mindspore.nn as nn
import train
from src.config import load_config
from src.dataset import evaluation_loader, training_loader
from src.resnest import ResNeSt


def small(num_classes: int, dropout: float) -> ResNeSt:
    return ResNeSt((1, 1, 1, 1), 32, num_classes, dropout=dropout)


def frozen(num_classes: int, dropout: float) -> ResNeSt:
    network = small(num_classes, dropout)
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.BatchNorm2d):
            cell.use_batch_statistics = False
    return network


def main() -> int:
    workers, flags = int(sys.argv[1]), [*sys.argv[3:], "--device_num", sys.argv[1]]
    args = load_config("train", "", flags)
    output = Path(args.output_dir)
    if workers > 1 and not is_worker():
        return launch(Path(__file__), sys.argv[1:], workers, output / "logs")
    constructor = {"own": small, "frozen": frozen}[sys.argv[2]]
    train.BACKBONES[args.backbone] = train.BACKBONES[args.backbone]._replace(constructor=constructor)
    folders = [open_split(args.data_path, split, args.num_classes) for split in ("train", "val")]
    with training_loader(folders[0], args, workers) as first, evaluation_loader(folders[1], args, workers) as second:
        return train.train(args, output, first, second)


if __name__ == "__main__":
    run(main)
