"""Run by test_commands.py: a training with frozen BNs, by one process or by several through msrun.

python two_workers.py NUMBER_OF_WORKERS FLAGS_OF_TRAIN

After it, each worker sets the BN statistics to its rank + 1, synchronises, and rank 0 prints what they are then.

BNs learn from their own device's images only, and MindSpore has no synchronised BN on CPU; frozen, the workers
together compute what one computes.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "DDRNet"), str(ROOT)]

from utils.cli import run
from utils.images import open_split
from utils.launcher import is_scheduler, is_worker, launch

# isort: split
import mindspore as ms
import mindspore.nn as nn
import numpy as np
import train
from mindspore.communication import get_group_size, get_rank
from src.configs.settings import load_config
from src.data.imagenet import evaluation_loader, training_loader
from src.models.ddrnet import DDRNet23
from src.tools.optimizer import make_optimizer
from src.trainers.train_one_step import LossScale, TrainOneStep


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
    if is_scheduler():
        train.init()
        return 0
    if workers > 1 and not is_worker():
        return launch(Path(__file__), sys.argv[1:], workers, output / "logs")
    train.get_network = frozen
    folders = [open_split(args.data_url, split, args.num_classes) for split in ("train", "val")]
    with training_loader(folders[0], args, workers) as first, evaluation_loader(folders[1], args, workers) as second:
        status = train.train(args, output, first, second)
    if workers > 1:
        statistics()
    return status


def statistics() -> None:
    network = nn.SequentialCell(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    optimizer = make_optimizer("momentum", network.trainable_params(), 0.1, 0.0, 0.9, True, (0.9, 0.999), 0.9)
    step = TrainOneStep(network, nn.L1Loss(), optimizer, LossScale(1.0, True), None, get_group_size())
    bn = network[1]
    for parameter in (bn.moving_mean, bn.moving_variance, bn.gamma):
        parameter.set_data(ms.Tensor(np.full(2, get_rank() + 1), ms.float32))
    step.synchronise()
    if get_rank() == 0:
        values = [float(p.asnumpy()[1]) for p in (bn.moving_mean, bn.moving_variance, bn.gamma)]
        print(f"mean, variance, gamma: {values}")


if __name__ == "__main__":
    run(main)
