"""Run by test_trainer.py: two training steps on a fixed batch, by one process or split over several.

python two_workers.py RESULT.npz NUMBER_OF_WORKERS
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "DRNet"), str(ROOT / "tests"), str(ROOT)]

from utils.cli import run
from utils.launcher import is_worker, launch

# isort: split
import mindspore as ms
import numpy as np
from drnet.tiny import tiny_drnet
from mindspore.communication import get_group_size, get_rank, init
from src.gumbelmodule import gumbel_noise
from src.trainer import Trainer, make_optimizer

BATCH = 12
CHOICE = np.array([0, 1, 2, 0, 1, 2] + [0] * 6)


def main() -> int:
    result, workers = Path(sys.argv[1]), int(sys.argv[2])
    if workers > 1 and not is_worker():
        return launch(Path(__file__), sys.argv[1:], workers, result.parent / "logs")
    ms.set_device("CPU")
    ms.set_context(mode=ms.GRAPH_MODE)
    rank = 0
    if is_worker():
        init()
        rank, workers = get_rank(), get_group_size()
    drnet = tiny_drnet()
    start = drnet.classifier.end_point.bias.asnumpy().copy()
    rates = np.full(4, 0.05, np.float32)
    optimizers = [make_optimizer("sgd", net, rates, 0.9, 1e-4) for net in (drnet.classifier, drnet.predictor)]
    trainer = Trainer(drnet, optimizers, BATCH // workers, workers, 1.0, (0.001, 0.2))
    trainer.smallest_group = [1, 1, 1]
    drnet.set_train(False)
    rng = np.random.default_rng(3)
    images = rng.standard_normal((BATCH, 3, 32, 32)).astype(np.float32)
    labels = rng.integers(0, 7, BATCH).astype(np.int32)
    part = slice(rank * BATCH // workers, (rank + 1) * BATCH // workers)
    steps = []
    for step in range(2):
        noise = gumbel_noise((BATCH, 3), step) + 50 * np.eye(3, dtype=np.float32)[CHOICE]
        steps.append(trainer.step(images[part], labels[part], noise[part]))
    if rank == 0:
        arrays = {p.name: p.asnumpy() for net in (drnet.classifier, drnet.predictor) for p in net.get_parameters()}
        chosen = np.stack([step.chosen for step in steps])
        np.savez(result, loss=[step.loss for step in steps], chosen=chosen, start=start, **arrays)
    return 0


if __name__ == "__main__":
    run(main)
