"""DDRNet-23 at 224 pixels: inference and training steps against what the machine's convolutions allow.

    python tests/benchmarks/ddrnet_step.py [--rounds 10]

Prints, for inference of 1 and of 8 images and for a training step of 8: milliseconds (the best of the rounds), the
floor, and the ratio. The floor is the time that the network's multiply-accumulates (three times as many in training)
would take at the speed of one dense 3x3 convolution, measured in the same run, in turn with what it is compared to.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "DDRNet"), str(ROOT)]

import utils  # noqa: F401  (before mindspore)

# isort: split
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from src.models.ddrnet import DDRNet23
from src.tools.criterion import SoftTargetCrossEntropy
from src.tools.optimizer import make_optimizer
from src.trainers.train_one_step import LossScale, TrainOneStep

SIZE, BATCH = 224, 8


def giga_macs(network: nn.Cell) -> float:
    """Multiply-accumulates of the convolutions and the dense layer for one image, in 1e9."""
    total = 0

    def count(cell, inputs, output) -> None:
        nonlocal total
        total += cell.weight.size * int(np.prod(output.shape[2:]))

    ms.set_context(mode=ms.PYNATIVE_MODE)
    layers = [cell for _, cell in network.cells_and_names() if isinstance(cell, nn.Conv2d | nn.Dense)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    network(Tensor(np.zeros((1, 3, SIZE, SIZE), np.float32)))
    for hook in hooks:
        hook.remove()
    ms.set_context(mode=ms.GRAPH_MODE)
    return total / 1e9


def milliseconds(run) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="measurements, the best counts (default: %(default)s)")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    ms.set_seed(0)
    macs = giga_macs(DDRNet23())

    dense = nn.Conv2d(64, 64, 3, pad_mode="pad", padding=1)
    dense_macs = BATCH * 64 * 64 * 9 * 56 * 56 / 1e9
    features = Tensor(rng.standard_normal((BATCH, 64, 56, 56)).astype(np.float32))
    images = rng.standard_normal((BATCH, 3, SIZE, SIZE)).astype(np.float32)
    network = DDRNet23()
    network.set_train(False)
    trained = DDRNet23()
    trained.set_train(True)
    optimizer = make_optimizer("momentum", trained.trainable_params(), 1e-3, 1e-4, 0.9, True, (0.9, 0.999), 0.9)
    step = TrainOneStep(trained, SoftTargetCrossEntropy(), optimizer, LossScale(1024.0, True), 5.0)
    targets = np.eye(1000, dtype=np.float32)[rng.integers(0, 1000, BATCH)]
    keep = trained.sample_keep(BATCH, rng)
    one, eight = Tensor(images[:1]), Tensor(images)
    runs = {
        "inference of 1": (lambda: network(one).asnumpy(), macs),
        "inference of 8": (lambda: network(eight).asnumpy(), BATCH * macs),
        "training step of 8": (lambda: step([(images, targets, keep)], 1e-3), 3 * BATCH * macs),
    }

    def convolution() -> float:
        return min(milliseconds(lambda: dense(features).asnumpy()) for _ in range(5))

    convolution()
    print(f"DDRNet-23: {macs:.2f} GMACs an image at {SIZE} pixels")
    for name, (run, work) in runs.items():
        run()  # compiles
        best, floor = np.inf, np.inf
        for _ in range(args.rounds):
            floor = min(floor, convolution() / dense_macs * work)
            best = min(best, milliseconds(run))
        print(f"{name:>18}: {best:7.0f} ms, floor {floor:6.0f} ms, ratio {best / floor:.2f}", flush=True)


if __name__ == "__main__":
    main()
