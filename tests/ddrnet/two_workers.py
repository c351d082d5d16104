"""Run by test_commands.py: a training with frozen BNs, by one process or by several through msrun.

python two_workers.py NUMBER_OF_WORKERS FLAGS_OF_TRAIN

BNs learn from their own device's images only, and MindSpore has no synchronised BN on CPU; frozen, the workers
together compute what one computes.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "DDRNet"), str(ROOT)]

from utils.cli import run
from utils.images import open_split
from utils.launcher import is_worker, launch

# isort: split
import mindspore.nn as nn
import train
from src.configs.settings import load_config
from src.data.imagenet import evaluation_loader, training_loader
from src.models.ddrnet import DDRNet23


def frozen(args, rate: float) -> DDRNet23:
    network = DDRNet23(args.num_classes, args.image_size, rate)
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.BatchNorm2d):
            cell.use_batch_statistics = False
    return network


def main() -> int:
    workers, flags = int(sys.argv[1]), [*sys.argv[2:], "--device_num", sys.argv[1]]
    args = load_config("train", "", flags)
    output = Path(args.output_dir)
    if workers > 1 and not is_worker():
        return launch(Path(__file__), sys.argv[1:], workers, output / "logs")
    train.get_network = frozen
    folders = [open_split(args.data_url, split, args.num_classes) for split in ("train", "val")]
    with training_loader(folders[0], args, workers) as first, evaluation_loader(folders[1], args, workers) as second:
        return train.train(args, output, first, second)


if __name__ == "__main__":
    run(main)
