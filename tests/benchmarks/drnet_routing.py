"""Routed evaluation of DRNet against running every resolution for every image, as the published script does.

    python tests/benchmarks/drnet_routing.py [--images 96] [--batch_size 16]

Same weights, same images, same process, choices spread evenly over 224/168/112. Prints images/s of
- all and mask: predictor and all resolutions for every image, then a masked sum;
- groups: the images of each batch grouped by resolution, on graphs with a dynamic batch size;
- queues: what eval.py does, full batches per resolution collected across the stream, on fixed graphs;
the ratios to the first, and the growth of the peak memory over ten times the images.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "DRNet"), str(ROOT / "tests"), str(ROOT)]

import utils  # noqa: F401  (before mindspore)

# isort: split
import mindspore as ms
import numpy as np
from golden.recipe import images as recipe_images
from golden.recipe import value
from mindspore import Tensor
from src.drnet import Architecture, Classify, DRNet
from src.evaluation import Route, evaluate

from utils.cli import Interrupt
from utils.images import Batch, ImageFolder, Loader


def batches(pool: np.ndarray, count: int, size: int):
    """`count` images in batches of `size`, drawn from `pool` again and again."""
    for first in range(0, count, size):
        rows = np.arange(first, min(first + size, count))
        yield Batch(pool[rows % len(pool)], np.zeros(len(rows), np.int32), rows, [])


def reading(pool: np.ndarray, count: int, size: int, place: Path) -> Loader:
    """The same images from a reading process, as eval.py gets them; there are `count` empty files in `place` for it."""
    (place / "images").mkdir(parents=True)
    for row in range(count):
        (place / "images" / f"{row:06}.png").touch()
    return Loader(ImageFolder(place), lambda path, row, epoch: pool[row % len(pool)], pool.shape[1:], size, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96, help="images per pass (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="batch size of each way (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="passes of each way, the best counts (default: %(default)s)"
    )
    args = parser.parse_args()
    pool = recipe_images(args.batch_size, 224)
    with (
        tempfile.TemporaryDirectory() as place,
        reading(pool, args.images, args.batch_size, Path(place, "once")) as once,
        reading(pool, 10 * args.images, args.batch_size, Path(place, "ten")) as ten_times,
    ):
        compare(args, pool, once, ten_times)


def compare(args: argparse.Namespace, pool: np.ndarray, once: Loader, ten_times: Loader) -> None:
    """Run the three ways over the images of `once`, then the last of them over `ten_times` as many."""
    ms.set_context(mode=ms.GRAPH_MODE)
    architecture = Architecture((224, 168, 112), 128, 224, 1000, "published")
    drnet = DRNet(architecture)
    for network in (drnet.predictor, drnet.classifier):
        for parameter in network.get_parameters():
            parameter.set_data(Tensor(value(parameter.name.split(".", 1)[1], parameter.shape)))
    choice = np.arange(args.images) % 3  # the spread is forced, the predictor runs all the same
    predictions = {}

    def all_and_mask() -> np.ndarray:
        answers = []
        for batch in batches(pool, args.images, args.batch_size):
            drnet.predict(Tensor(batch.images)).asnumpy()
            mask = np.eye(3, dtype=np.float32)[choice[batch.rows]]
            logits = [classify(Tensor(batch.images)).asnumpy() for classify in drnet.classify]
            answers.append(sum(mask[:, j : j + 1] * logits[j] for j in range(3)).argmax(1))
        return np.concatenate(answers)

    dynamic = [Classify(drnet.classifier, architecture, j) for j in range(3)]
    for cell in dynamic:
        cell.set_inputs(Tensor(shape=[None, 3, 224, 224], dtype=ms.float32))
        cell.set_train(False)

    def groups() -> np.ndarray:
        answers = np.zeros(args.images, int)
        for batch in batches(pool, args.images, args.batch_size):
            drnet.predict(Tensor(batch.images)).asnumpy()
            for j, cell in enumerate(dynamic):
                rows = np.flatnonzero(choice[batch.rows] == j)
                if len(rows):
                    answers[batch.rows[rows]] = cell(Tensor(batch.images[rows])).asnumpy().argmax(1)
        return answers

    def choose(batch: Batch) -> np.ndarray:
        drnet.predict(Tensor(batch.images)).asnumpy()
        return np.eye(3, dtype=bool)[batch.rows % 3]

    def queues(loader: Loader = once) -> np.ndarray:
        return evaluate(drnet, loader, Route(choose, (0, 1, 2), True), args.batch_size, Interrupt()).predicted

    best = {}
    for name, way in (("all and mask", all_and_mask), ("groups", groups), ("queues", queues)):
        start = time.perf_counter()
        predictions[name] = way()
        print(f"{name}: first pass, compiling included, {time.perf_counter() - start:.1f} s", flush=True)
    for round_number in range(args.rounds):
        for name, way in (("all and mask", all_and_mask), ("groups", groups), ("queues", queues)):
            start = time.perf_counter()
            way()
            best[name] = max(best.get(name, 0), args.images / (time.perf_counter() - start))
        print(f"round {round_number + 1} of {args.rounds} done", flush=True)
    for name, rate in best.items():
        same = np.array_equal(predictions[name], predictions["all and mask"])
        print(f"{name:>12}: {rate:6.2f} images/s, ratio {rate / best['all and mask']:.2f}, same predictions: {same}")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queues(ten_times)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"peak memory {before / 1024:.0f} MiB, after ten times the images {grown:+.0f} MiB")


if __name__ == "__main__":
    main()
