"""Run by test_trainer.py: two training steps on a fixed batch, by one process or split over several.

python two_workers.py RESULT.npz NUMBER_OF_WORKERS
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "DRNet"), str(ROOT / "tests"), str(ROOT)]

from utils.cli import run
from utils.device import join_devices
from utils.launcher import distribute

# isort: split
import numpy as np
from drnet.tiny import tiny_drnet
from src.gumbelmodule import gumbel_noise
from src.trainer import TrainOneStep, make_optimizer

BATCH = 12
CHOICE = np.array([0, 1, 2, 0, 1, 2] + [0] * 6)


def main() -> int | None:
    result, workers = Path(sys.argv[1]), int(sys.argv[2])
    args = argparse.Namespace(device_target="CPU", device_id=0, device_num=workers, output_dir=str(result.parent))
    vars(args).update(rank_table_file=None, server_num=1, server_rank=0, master_addr="127.0.0.1", master_port=8118)
    if (status := distribute(args, __file__)) is not None:
        return status
    devices = join_devices(args)
    drnet = tiny_drnet()
    networks = (drnet.classifier, drnet.predictor)
    start = drnet.classifier.end_point.bias.asnumpy().copy()
    optimizers = [make_optimizer("sgd", network, np.full(4, 0.05, np.float32), 0.9, 1e-4) for network in networks]
    train_step = TrainOneStep(drnet, optimizers, BATCH // workers, devices, 1.0, (0.001, 0.2))
    train_step.smallest_group = [1, 1, 1]
    drnet.set_train(False)
    rng = np.random.default_rng(3)
    images = rng.standard_normal((BATCH, 3, 32, 32)).astype(np.float32)
    labels = rng.integers(0, 7, BATCH).astype(np.int32)
    part = slice(devices.rank * BATCH // workers, (devices.rank + 1) * BATCH // workers)
    steps = []
    for step in range(2):
        noise = gumbel_noise((BATCH, 3), step) + 50 * np.eye(3, dtype=np.float32)[CHOICE]
        # The second process alone is asked to stop, in the second step.
        asked = step == 1 and devices.rank == workers - 1
        steps.append(train_step(images[part], labels[part], noise[part], asked))
    if devices.rank == 0:
        arrays = {p.name: p.asnumpy() for network in networks for p in network.get_parameters()}
        told = {name: [getattr(step, name) for step in steps] for name in ("loss", "chosen", "correct", "interrupt")}
        np.savez(result, start=start, **told, **arrays)
    return 0


if __name__ == "__main__":
    run(main)
