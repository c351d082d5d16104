"""Accuracy that streams, throughput, progress, and the result files."""

import contextlib
import csv
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.cli import UserError, whole_file


class TopKAccuracy:
    """Top-k accuracy over any number of batches: `correct` hits for each k, int64 (len(ks),), in `total` images so far.

    A label counts as among the first k if it is so in `np.argsort(-logits, kind="stable")`: of equal logits the class
    with the smaller number comes first. With fewer than k classes every label counts.
    """

    def __init__(self, ks: Sequence[int] = (1, 5)):
        if not ks or min(ks) < 1:
            raise ValueError(f"every k must be at least 1, not {list(ks)}")
        self.ks = np.array(ks)
        self.correct = np.zeros(len(ks), np.int64)
        self.total = 0

    def update(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Count a batch: logits float (N, K), labels int (N,) in [0, K), else ValueError; UserError for NaN or ±inf."""
        logits, labels = np.asarray(logits), np.asarray(labels)
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(f"logits must be (N, K) and labels (N,), not {logits.shape} and {labels.shape}")
        if not len(labels):
            return
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise ValueError(f"labels must lie in [0, {logits.shape[1]})")
        if not np.isfinite(logits).all():
            reason = "its weights are broken (a diverged training, or a wrong file), or float16 is too narrow for them"
            raise UserError(f"the network returns NaN or infinity for some images; {reason}")
        own = logits[np.arange(len(labels)), labels][:, None]
        earlier = np.arange(logits.shape[1]) < labels[:, None]
        rank = ((logits > own) | ((logits == own) & earlier)).sum(1)
        self.correct += (rank[:, None] < self.ks).sum(0)
        self.total += len(labels)

    def shown(self) -> str:
        """Accuracy for the first k in percent, for a progress display."""
        return f"{self.correct[0] / self.total:.2%}" if self.total else "-"


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log softmax(logits) at the label, float64 (N,), for logits (N, K) and labels int (N,)."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]


class Throughput:
    """Images per second of wall time since it was made or last reset."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Start again at zero images, now."""
        self.images = 0
        self.start = time.perf_counter()

    def update(self, images: int) -> None:
        """Count `images` more."""
        self.images += images

    def rate(self) -> float:
        """Images per second so far."""
        return self.images / max(time.perf_counter() - self.start, 1e-9)


class Progress(contextlib.AbstractContextManager):
    """A tqdm bar with images/s and running metrics on a terminal; elsewhere a plain line now and then.

    A context manager. `done` of the `total` images are done at the start; `show=False` displays nothing.
    """

    LINE_SECONDS = 20

    def __init__(self, description: str, total: int, done: int = 0, show: bool = True):
        self.description, self.total, self.done, self.show = description, total, done, show
        bar = {"desc": description, "unit": "img", "leave": False, "file": sys.stdout}
        bar["ncols"] = shutil.get_terminal_size().columns  # 80 where the terminal says 0; tqdm would show nothing
        self.bar = tqdm(total=total, initial=done, disable=not (show and sys.stdout.isatty()), **bar)
        self.meter = Throughput()
        self.line_at = time.monotonic() + self.LINE_SECONDS

    def update(self, images: int, **metrics: str) -> None:
        """`images` more are done; `metrics` are shown as they are."""
        self.done += images
        self.meter.update(images)
        self.bar.set_postfix(metrics, refresh=False)
        self.bar.update(images)
        if self.show and self.bar.disable and time.monotonic() >= self.line_at:
            parts = [f"{self.done}/{self.total} images", f"{self.meter.rate():.1f} images/s"]
            parts += [f"{key} {value}" for key, value in metrics.items()]
            print(f"{self.description}: {', '.join(parts)}", flush=True)
            self.line_at = time.monotonic() + self.LINE_SECONDS
            self.meter.reset()  # so that a line tells the speed since the one before

    def __exit__(self, *exception) -> None:
        self.bar.close()


def write_results(path: str | Path, results: Mapping) -> None:
    """Write `results` as indented JSON to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")


def write_rows(path: str | Path, rows: Sequence[Mapping]) -> None:
    """Write `rows` as CSV with a header to `path`, whole or not at all.

    There is a column for every key, empty where a row lacks it or has None. File names that are no UTF-8 keep their
    bytes.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole_file(path) as temporary, temporary.open("w", newline="", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
