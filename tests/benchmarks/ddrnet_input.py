"""DDRNet's training augmentation against the same written with Pillow, in images/s of one core.

    python tests/benchmarks/ddrnet_input.py [--images 48] [--rounds 12]

Documented settings: 224 px, bicubic, rand-m9-mstd0.5-inc1, random erasing with noise at 0.25. One process, one thread,
the same files, the two ways by turns; the median round counts. The files are made of scikit-learn's two photographs in
the sizes that are usual in ImageNet, of each 12 files: 6 of 500 x 375, 2 of 375 x 500, 1 each of 500 x 333, 400 x 300,
1024 x 768 and 1600 x 1200; quality 95, which makes a file 108 kB in the mean, as ImageNet's are.
Then the milliseconds of each step, measured in a pass of its own. Files are in the page cache, so reading costs little.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "DDRNet"), str(ROOT / "tests"), str(ROOT)]

import cv2
import numpy as np
import sklearn.datasets
from ddrnet import pillow_pipeline
from PIL import Image
from src.data import transforms
from src.data.augment import crop
from src.data.augment.rand_augment import RandAugment
from src.data.augment.random_erasing import RandomErasing

SIZES = [(500, 375)] * 6 + [(375, 500)] * 2 + [(500, 333), (400, 300), (1024, 768), (1600, 1200)]
STEPS = ("decode", "resize", "augment", "normalise", "erase")


def make_files(folder: Path, count: int) -> list[Path]:
    """`count` JPEGs of the sizes `SIZES`, taken from the two photographs by turns, each a cut of its own."""
    sources = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        size = SIZES[number % len(SIZES)]
        with Image.open(sources[number % 2]) as photograph:
            edges = rng.integers((60, 40))
            box = (*edges, *(np.array(photograph.size) - (60, 40) + edges))
            image = photograph.resize(size, Image.Resampling.BICUBIC, box=tuple(map(int, box)))
        paths.append(folder / f"{number}.JPEG")
        image.save(paths[-1], quality=95)
    return paths


def milliseconds(way, paths: list[Path], steps: dict) -> dict[str, float]:
    """Milliseconds per image of each step and of all. `steps`: what the step is called, (its owner, its attribute)."""
    spent: Counter = Counter()

    def timed(step, function):
        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[step] += time.perf_counter() - start

        return run

    with ExitStack() as stack:
        for step, (owner, name) in steps.items():
            stack.enter_context(patch.object(owner, name, timed(step, getattr(owner, name))))
        start = time.perf_counter()
        for number, path in enumerate(paths * 5):
            way(path, np.random.default_rng(number))
        spent["all"] = time.perf_counter() - start
    return {step: 1000 * seconds / (5 * len(paths)) for step, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48, help="images per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of each way (default: %(default)s)")
    args = parser.parse_args()
    cv2.setNumThreads(0)
    ours = transforms.TrainTransform(224, "bicubic", 0.4, "rand-m9-mstd0.5-inc1", 0.25, "pixel", 1)
    ways = {"OpenCV": ours, "Pillow": lambda path, rng: pillow_pipeline.train_view(path, 224, rng)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(Path(folder), args.images)
        sizes = [path.stat().st_size / 1000 for path in paths]
        print(f"{len(paths)} files, {statistics.median(sizes):.0f} kB in the median, {statistics.mean(sizes):.0f} mean")
        for round_number in range(args.rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                for number, path in enumerate(paths):
                    way(path, np.random.default_rng([round_number, number]))
                if round_number:  # the first one warms up
                    rates[name].append(len(paths) / (time.perf_counter() - start))
        for name, rate in rates.items():
            low, middle, high = min(rate), statistics.median(rate), max(rate)
            print(f"{name}: {middle:.0f} images/s (rounds {low:.0f} to {high:.0f})")
        ratios = [ours / pillow for ours, pillow in zip(*rates.values())]
        print(f"ratio {statistics.median(ratios):.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})")

        table = {
            "OpenCV": {
                "decode": (crop, "decode"),
                "resize": (cv2, "resize"),
                "augment": (RandAugment, "__call__"),
                "normalise": (transforms, "normalise"),
                "erase": (RandomErasing, "__call__"),
            },
            "Pillow": {
                "decode": (pillow_pipeline, "decode"),
                "resize": (pillow_pipeline, "resize"),
                "augment": (pillow_pipeline, "rand_augment"),
                "normalise": (pillow_pipeline, "normalise"),
                "erase": (pillow_pipeline, "erase"),
            },
        }
        print("ms/image  " + "".join(f"{step:>10}" for step in (*STEPS, "rest", "all")))
        for name, way in ways.items():
            spent = milliseconds(way, paths, table[name])
            spent["rest"] = spent["all"] - sum(spent[step] for step in STEPS)
            print(f"{name:<10}" + "".join(f"{spent[step]:10.2f}" for step in (*STEPS, "rest", "all")))


if __name__ == "__main__":
    main()
