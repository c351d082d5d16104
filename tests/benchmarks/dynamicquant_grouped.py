"""Images per second of DynamicQuant's inference, each image at its own bits, against computing all bits for all images.

Images of 224 pixels, batch 16, choices spread evenly over 3, 4 and 5 bits:

- three branches: the network as it is trained, as published: every layer quantizes its weights and computes all bits;
- grouped: `src/inference.py`;
- float32: the same ResNet-18 without quantization.

The multiply-adds of all convolutions are counted as well: where those take most of the time, their ratio is about what
there is to gain.

    python tests/benchmarks/dynamicquant_grouped.py
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "DynamicQuant")]

import utils  # noqa: F401  (before mindspore)

# isort: split
import mindspore as ms
import numpy as np
from mindspore import Tensor
from src.inference import Back, Front, Predictor
from src.resnet import Architecture

BATCH = 16


class Spread(Predictor):
    """A predictor whose choices are given: image i gets candidate i modulo their number."""

    def _decide(self, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return (rows % len(self.bits))[:, None].astype(np.int8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="how often each is timed, in turn (default: 10)")
    rounds = parser.parse_args().rounds
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(0)
    architecture = Architecture()
    network = architecture.network().set_train(False)
    candidates = len(architecture.bits)
    grouped = Spread(architecture, BATCH).load(network)
    plain = Predictor(Architecture("none"), BATCH)  # other weights, which take as long
    rng = np.random.default_rng(0)
    images = [rng.standard_normal((BATCH, 3, 224, 224)).astype(np.float32) for _ in range(candidates)]
    rows = np.arange(BATCH * candidates).reshape(candidates, BATCH)
    front, back = Front(network), Back(network)

    def three_branches() -> np.ndarray:
        logits = []
        for batch, places in zip(images, rows):
            features, _ = front(Tensor(batch))
            choices = np.eye(candidates, dtype=np.float32)[places % candidates][:, None]
            logits.append(back(features, Tensor(choices)).asnumpy())
        return np.concatenate(logits)

    def queued(predictor: Predictor) -> np.ndarray:
        logits = np.empty((rows.size, architecture.num_classes), np.float32)
        for batch, places in zip(images, rows):
            for done, _, found in predictor.add(batch, places):
                logits[done] = found
        for done, _, found in predictor.flush():
            logits[done] = found
        return logits

    ways = {"three branches": three_branches, "grouped": lambda: queued(grouped), "float32": lambda: queued(plain)}
    logits = {name: way() for name, way in ways.items()}  # compiles
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    rates = {name: rows.size / min(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:>14}: {rate:6.2f} images/s")
    difference = np.abs(logits["grouped"] - logits["three branches"]).max()
    print(f"grouped against three branches: ratio {rates['grouped'] / rates['three branches']:.2f}, ", end="")
    print(f"logits differ by at most {difference:.1e}")
    print(f"grouped against float32: ratio {rates['grouped'] / rates['float32']:.2f}")
    fixed, chosen = architecture.gmacs()
    fixed += network.conv1.weight.size * (architecture.image_size // 2) ** 2 / 1e9
    once, all_bits = fixed + chosen[0], fixed + candidates * chosen[0]
    print(f"multiply-adds of an image: {all_bits:.2f} G against {once:.2f} G, ratio {all_bits / once:.2f}")

    print("\nmilliseconds for a batch of 16, best of the rounds:")
    parts = {
        "front, quantized": (grouped.front, (Tensor(images[0]),)),
        "front, float32": (plain.front, (Tensor(images[0]),)),
        "back, 4 bits": (grouped.backs[1], (Tensor(grouped.queues[1]),)),
        "back, three branches": (back, (Tensor(grouped.queues[1]), Tensor(grouped.choices))),
        "back, float32": (plain.backs[0], (Tensor(grouped.queues[1]),)),
    }
    best = dict.fromkeys(parts, float("inf"))
    for _ in range(rounds):
        for name, (cell, inputs) in parts.items():
            start = time.perf_counter()
            out = cell(*inputs)
            (out[0] if isinstance(out, tuple) else out).asnumpy()
            best[name] = min(best[name], time.perf_counter() - start)
    for name, time_of in best.items():
        print(f"{name:>22}: {1e3 * time_of:6.0f}")


if __name__ == "__main__":
    main()
