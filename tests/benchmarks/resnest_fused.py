"""ResNeSt-50 at 224 pixels: the fused form against the form with BNs and, where there is PyTorch, the authors' network.

    python tests/benchmarks/resnest_fused.py [--rounds 30] [--torch_python PYTHON]

Inference of 1 and of 8 images, all in turn on the same cores. Prints the milliseconds of each, the best and the median
of the rounds, and how many times as fast as the form with BNs it is by either. "no bias" is the fused form with its
biases left out: it computes something else, but shows the most that folding the BNs can gain. PyTorch runs in a process
of its own, of the interpreter given, which must have `torch` and the authors' `resnest` (`make convert-env`).
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = dict(os.environ)  # PyTorch's: `utils` limits the instructions of oneDNN, which MindSpore alone needs
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "ResNeSt"), str(ROOT / "tests"), str(ROOT)]

import utils  # noqa: F401  (before mindspore)

# isort: split
import mindspore as ms
import numpy as np
from golden.recipe import images, value
from mindspore import Tensor, nn
from src.checkpoints import fill
from src.resnest import fuse
from src.resnest50 import resnest50

SIZE, BATCHES = 224, (1, 8)
# Reads batch sizes and answers each with the milliseconds of one inference.
TORCH = """
import sys, time
import torch
from resnest.torch import resnest50
network = resnest50(pretrained=False).eval()
print("ready", flush=True)
with torch.inference_mode():
    for line in sys.stdin:
        images = torch.zeros(int(line), 3, 224, 224).normal_()
        start = time.perf_counter()
        network(images)
        print(1000 * (time.perf_counter() - start), flush=True)
"""


def authors_network(python: str) -> Callable[[int], float] | None:
    """Milliseconds of one inference of the authors' network by batch size; None if `python` cannot run it."""
    process = subprocess.Popen(
        [python, "-c", TORCH],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    if process.stdout.readline() != "ready\n":
        print(f"no PyTorch: {(process.stderr.read().strip().splitlines() or ['no answer'])[-1]}", flush=True)
        return None

    def run(batch: int) -> float:
        print(batch, file=process.stdin, flush=True)
        return float(process.stdout.readline())

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each (default: %(default)s)")
    parser.add_argument("--torch_python", default=sys.executable, help="interpreter with PyTorch (default: this one)")
    args = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    networks = {"with BNs": resnest50(), "fused": resnest50(fused=True), "no bias": resnest50(fused=True)}
    parameters = {p.name: value(p.name, p.shape) for p in networks["with BNs"].get_parameters()}
    fill(networks["with BNs"], parameters)
    fill(networks["fused"], fuse(parameters))
    fill(networks["no bias"], fuse(parameters))
    for _, layer in networks["no bias"].cells_and_names():
        if isinstance(layer, nn.Conv2d):
            layer.has_bias = False
    for network in networks.values():
        network.set_train(False)

    inputs = {batch: Tensor(images(batch, SIZE)) for batch in BATCHES}

    def ours(network) -> Callable[[int], float]:
        def run(batch: int) -> float:
            start = time.perf_counter()
            network(inputs[batch]).asnumpy()
            return 1000 * (time.perf_counter() - start)

        return run

    runs = {name: ours(network) for name, network in networks.items()}
    if torch := authors_network(args.torch_python):
        runs["PyTorch"] = torch
    for batch in BATCHES:
        for run in runs.values():
            run(batch)  # compiles
        times = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                times[name].append(run(batch))
        print(f"batch {batch}")
        best, median = min(times["with BNs"]), np.median(times["with BNs"])
        for name, its in times.items():
            print(
                f"  {name:>8}: {min(its):7.1f} ms (median {np.median(its):7.1f}), {best / min(its):.2f} times as fast "
                f"as with BNs (median {median / np.median(its):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
