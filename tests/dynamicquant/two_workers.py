"""Run by test_trainer.py: two training steps on a fixed batch, by one process or split over several.

python two_workers.py RESULT.npz NUMBER_OF_WORKERS

BNs learn from their own device's images only, and MindSpore has no synchronised BN on CPU; frozen, the workers
together compute what one computes. The first half of the images chooses 3 bits and the second 5.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "DynamicQuant"), str(ROOT / "tests"), str(ROOT)]

from utils.cli import run
from utils.device import join_devices
from utils.launcher import distribute
from utils.training import MeanStatistics

# isort: split
import mindspore.nn as nn
import numpy as np
import src.resnet as resnet
from dynamicquant import tiny
from mindspore import Tensor
from src.config import load_config
from src.trainer import DynamicLoss, TrainOneStep, dropout, make_optimizer

BATCH = 8
CHOICE = np.array([0] * 4 + [2] * 4)
BUDGET, PENALTY = 3.5, 0.5


def main() -> int:
    result = Path(sys.argv[1])
    flags = ["--stage", "quantize", "--device_num", sys.argv[2], "--output_dir", str(result.parent)]
    args = load_config("train", "", [*flags, "--device_target", "CPU"])
    if (status := distribute(args, __file__)) is not None:
        return status
    devices = join_devices(args)
    rank, count = devices.rank, devices.count
    vars(resnet).update(tiny.SIZES)
    architecture = tiny.architecture()
    network = tiny.network(architecture)
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.BatchNorm2d):
            cell.use_batch_statistics = False
    start = {p.name: p.asnumpy().copy() for p in network.get_parameters()}
    optimizer = make_optimizer(network, 0.1, 0.9, 1e-4)
    loss = DynamicLoss(network, architecture.bits, BUDGET, PENALTY, 1.0, count)
    step = TrainOneStep(loss, optimizer, devices)
    rng = np.random.default_rng(3)
    images = rng.standard_normal((BATCH, 3, 32, 32)).astype(np.float32)
    labels = rng.integers(0, tiny.CLASSES, BATCH).astype(np.int32)
    noise = 3 * np.eye(3, dtype=np.float32)[CHOICE][:, None]
    part = slice(rank * BATCH // count, (rank + 1) * BATCH // count)
    keep = dropout(network, 0.2, BATCH // count, 0, 0, 0, rank, count)
    steps = [step(images[part], labels[part], noise[part], keep, lr, rank == count - 1) for lr in (0.05, 0.02)]
    arrays = {p.name: p.asnumpy().copy() for p in network.get_parameters()}
    statistics = [network.bn1.moving_mean, network.bn1.moving_variance, network.bn1.gamma]
    for parameter in statistics:
        parameter.set_data(Tensor(np.full(64, rank + 1, np.float32)))
    if count > 1:
        MeanStatistics([network], count)()
    if rank == 0:
        told = {key: [getattr(one, key) for one in steps] for key in ("loss", "bits", "interrupt")}
        moved = max(float(np.abs(arrays[name] - start[name]).max()) for name in arrays if name.startswith("fc2"))
        means = [float(parameter.asnumpy()[1]) for parameter in statistics]
        np.savez(result, **{f"told {key}": array for key, array in told.items()}, moved=moved, means=means, **arrays)
    return 0


if __name__ == "__main__":
    run(main)
