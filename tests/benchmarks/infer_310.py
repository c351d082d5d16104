"""The Ascend 310 program on the CPU: decoding threads and a queue against decoding and inferring by turns.

    python tests/benchmarks/infer_310.py [--images 600] [--rounds 5]

The same binary, model and images, the two ways by turns; images/s end to end, writing included. The images are cuts of
500 x 375 pixels of scikit-learn's two photographs, JPEG of quality 95; the model is that of tests/fixtures, which is so
small that decoding is the larger part. Lite gets one thread (--model_threads 1), because its threads wait for the next
image in a loop, at the cost of those that decode it. The best round of each way counts.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "ascend310"), str(ROOT)]

import numpy as np
import sklearn.datasets
from lite import MODEL, program
from PIL import Image


def make_files(folder: Path, count: int) -> None:
    """`count` JPEGs, each another cut of one of the photographs."""
    photographs = [Image.open(path) for path in (Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg")]
    rng = np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        left, top = (int(rng.integers(side - cut + 1)) for side, cut in zip(photograph.size, (500, 375)))
        photograph.crop((left, top, left + 500, top + 375)).save(folder / f"{number}.JPEG", quality=95)


def run(main: Path, images: Path, output: Path, threads: int) -> dict[str, float]:
    """What the program measured."""
    words = [main, "--model_path", MODEL, "--dataset_path", images, "--device_target", "CPU", "--output_dir", output]
    words += ["--num_threads", str(threads), "--model_threads", "1"]
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)
    text = (output / "time_Result" / "test_perform_static.txt").read_text()
    return {name: float(value) for name, value in re.findall("(.+): (.+)", text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600, help="images per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each way (default: %(default)s)")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    binary = program()
    with tempfile.TemporaryDirectory() as name:
        images, output = Path(name) / "images", Path(name) / "output"
        images.mkdir()
        make_files(images, args.images)
        measured = {0: [], cores: []}
        for _ in range(args.rounds):
            for threads, rounds in measured.items():
                rounds.append(run(binary, images, output, threads))
    best = {threads: max(rounds, key=lambda one: one["images/s end to end"]) for threads, rounds in measured.items()}
    by_turns, queue = (best[threads]["images/s end to end"] for threads in (0, cores))
    inference = best[0]["inference of a batch, mean ms"] * by_turns / 1000
    print(f"by turns: {by_turns:.0f} images/s, {100 * inference:.0f} % of the time in the model")
    print(f"{cores} decoding threads: {queue:.0f} images/s")
    print(f"ratio {queue / by_turns:.2f}")


if __name__ == "__main__":
    main()
