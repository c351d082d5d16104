"""Evaluation of a DRNet: every image is classified once, at the resolution chosen for it (section 3.1)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import mindspore.nn as nn
import numpy as np
from mindspore import Tensor

from src.drnet import DRNet
from src.gumbelmodule import gumbel_noise
from utils.cli import Interrupt, UserError
from utils.device import ONE_DEVICE, Devices
from utils.images import Batch, Loader, evaluation_rows
from utils.metrics import Progress, Throughput, TopKAccuracy


@dataclass(frozen=True)
class Route:
    """Decides at which candidates each image is classified.

    choose: batch to bool (N, R), the candidates of each image. candidates: those that it can choose. predicts: whether
    it runs the predictor.
    """

    choose: Callable[[Batch], np.ndarray]
    candidates: tuple[int, ...]
    predicts: bool


def run_padded(cell: nn.Cell, images: np.ndarray, batch_size: int) -> np.ndarray:
    """`cell` on images float32 (n, 3, S, S), filled up to `batch_size` so that its graph sees one batch size only."""
    padding = np.zeros((batch_size - len(images), *images.shape[1:]), np.float32)
    return cell(Tensor(np.concatenate([images, padding]))).asnumpy()[: len(images)]


def dynamic_route(drnet: DRNet, batch_size: int, seed: int | None = None) -> Route:
    """The predictor's choice, one candidate an image, in batches of up to `batch_size`.

    Without a seed the choice is the argmax of the scores; with one it is sampled, each image with its own Gumbel noise
    drawn from (seed, row), as the published evaluation samples.
    """
    candidates = len(drnet.architecture.resolutions)

    def choose(batch: Batch) -> np.ndarray:
        scores = run_padded(drnet.predict, batch.images, batch_size)
        if seed is not None:
            scores = scores + np.stack([gumbel_noise((candidates,), seed, int(row)) for row in batch.rows])
        return np.eye(candidates, dtype=bool)[scores.argmax(1)]

    return Route(choose, tuple(range(candidates)), True)


def fixed_route(drnet: DRNet, candidates: Iterable[int]) -> Route:
    """Every image at each of `candidates`."""
    candidates = tuple(candidates)
    row = np.isin(np.arange(len(drnet.architecture.resolutions)), candidates)
    return Route(lambda batch: np.tile(row, (len(batch.rows), 1)), candidates, False)


class Queues:
    """Collects images by the resolution chosen for them and classifies full batches.

    So every graph sees one batch size, and each queue holds at most one batch of images, however long the stream is.

    Args:
        drnet: networks in inference mode.
        batch_size: images to collect for a resolution before it runs.
    """

    def __init__(self, drnet: DRNet, batch_size: int):
        size = drnet.architecture.image_size
        candidates = len(drnet.architecture.resolutions)
        self.classify = drnet.classify
        self.images = [np.empty((batch_size, 3, size, size), np.float32) for _ in range(candidates)]
        self.rows: list[list[int]] = [[] for _ in range(candidates)]
        self.labels: list[list[int]] = [[] for _ in range(candidates)]

    def add(self, batch: Batch, mask: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Queue each image of `batch` at the candidates that `mask`, bool (N, R), says; yield what has been classified.

        Yields:
            (candidate, rows (n,), labels (n,), logits (n, K)) for every full batch.
        """
        for candidate in range(mask.shape[1]):
            for position in np.flatnonzero(mask[:, candidate]):
                self.images[candidate][len(self.rows[candidate])] = batch.images[position]
                self.rows[candidate].append(int(batch.rows[position]))
                self.labels[candidate].append(int(batch.labels[position]))
                if len(self.rows[candidate]) == len(self.images[candidate]):
                    yield self._run(candidate)

    def flush(self) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Classify what is left in the queues; yields as `add`."""
        for candidate, rows in enumerate(self.rows):
            if rows:
                yield self._run(candidate)

    def _run(self, candidate: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        rows, labels = np.array(self.rows[candidate]), np.array(self.labels[candidate])
        images = self.images[candidate]
        logits = run_padded(self.classify[candidate], images[: len(rows)], len(images))
        self.rows[candidate], self.labels[candidate] = [], []
        return candidate, rows, labels, logits


@dataclass
class Evaluation:
    """Result of one pass.

    An image counts once for each candidate it was classified at: once, unless the route says several.

    correct: int64 (R, 2), top-1 and top-5 hits of each candidate; images: int64 (R,), images classified there.
    predicted, chosen: int (number of rows,), class and candidate of each row, -1 where it was not read.
    images_per_s: wall time of everything but compiling. corrupt: number of images that could not be read.
    """

    correct: np.ndarray
    images: np.ndarray
    predicted: np.ndarray = field(repr=False)
    chosen: np.ndarray = field(repr=False)
    images_per_s: float = 0.0
    corrupt: int = 0

    def top(self, column: int = 0) -> float:
        """Accuracy as a fraction of all classified images; column 0 is top-1, 1 is top-5."""
        return float(self.correct[:, column].sum()) / max(int(self.images.sum()), 1)

    def top_of(self, candidate: int, column: int = 0) -> float | None:
        """Accuracy as a fraction of the images classified at `candidate`; None if there are none."""
        images = int(self.images[candidate])
        return float(self.correct[candidate, column]) / images if images else None

    def mean_gmacs(self, gmacs: Sequence[float]) -> float:
        """Mean of the classifier's GMACs per classified image, `gmacs` being C_j."""
        return float(np.dot(self.images, gmacs)) / max(int(self.images.sum()), 1)

    def figures(self, resolutions: Sequence[int]) -> dict:
        """Accuracies, and the images of each resolution, by the names that they have in `metrics.csv`."""
        figures = {"top1": self.top(), "top5": self.top(1)}
        figures |= {f"top1_{size}": self.top_of(j) for j, size in enumerate(resolutions)}
        return figures | {f"images_{size}": int(self.images[j]) for j, size in enumerate(resolutions)}

    def shares(self, resolutions: Sequence[int]) -> str:
        """Number and accuracy of the images of each resolution, in words."""
        tops = [self.top_of(j) for j in range(len(resolutions))]
        accuracies = ["" if top is None else f" x {top:.2%}" for top in tops]
        return ", ".join(f"{size}: {count}{top}" for size, count, top in zip(resolutions, self.images, accuracies))


def evaluate(
    drnet: DRNet,
    loader: Loader,
    route: Route,
    batch_size: int,
    interrupt: Interrupt,
    devices: Devices = ONE_DEVICE,
    on_corrupt: Callable[[Sequence[int]], None] = lambda rows: None,
) -> Evaluation:
    """Classify all images as `route` says, each on one of the devices; every device returns the result of all.

    Args:
        batch_size: what every batch of a candidate is filled up to, so that its graph sees one size.
        interrupt: holds Ctrl-C while the graphs compile, where MindSpore would lose it.
        on_corrupt: called with the rows of this device that cannot be read.

    Raises:
        UserError: logits that are not finite, or no image can be read.
    """
    drnet.set_train(False)
    count = len(loader.folder)
    metrics = [TopKAccuracy((1, 5)) for _ in drnet.architecture.resolutions]
    result = Evaluation(None, None, np.full(count, -1, np.int32), np.full(count, -1, np.int8))
    queues = Queues(drnet, batch_size)

    def note(classified: Iterable[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> None:
        for candidate, done, labels, logits in classified:
            metrics[candidate].update(logits, labels)
            result.predicted[done], result.chosen[done] = logits.argmax(1), candidate

    rows = evaluation_rows(loader.folder, devices.rank, devices.count)
    meter = Throughput()
    with Progress("evaluating", len(rows), show=devices.rank == 0) as progress:
        for batch in loader.batches(rows):
            if not progress.done:
                interrupt.hold_while(lambda: _compile(drnet, route, batch_size))
                meter.reset()
            on_corrupt(batch.corrupt)
            result.corrupt += len(batch.corrupt)
            if len(batch.rows):
                note(queues.add(batch, route.choose(batch)))
            meter.update(len(batch.rows))
            progress.update(len(batch.rows) + len(batch.corrupt), top1=_running(metrics))
        note(queues.flush())
    result.images_per_s = meter.rate()
    result.correct = np.stack([metric.correct for metric in metrics])
    result.images = np.array([metric.total for metric in metrics])
    if devices.count > 1:
        result = over_devices(result, devices)
    if not result.images.any():
        raise UserError(f"none of the {count} images of {loader.folder.paths.root} can be read")
    return result


def _running(metrics: Sequence[TopKAccuracy]) -> str:
    total = sum(metric.total for metric in metrics)
    return f"{sum(metric.correct[0] for metric in metrics) / total:.2%}" if total else "-"


def _compile(drnet: DRNet, route: Route, batch_size: int) -> None:
    """Compile the graphs that `route` can reach, so that compiling them is not in the images/s."""
    size = drnet.architecture.image_size
    images = Tensor(np.zeros((batch_size, 3, size, size), np.float32))
    for cell in ([drnet.predict] if route.predicts else []) + [drnet.classify[j] for j in route.candidates]:
        cell.compile(images)


def over_devices(result: Evaluation, devices: Devices) -> Evaluation:
    """All devices' results put together."""
    rate, corrupt = devices.sum([result.images_per_s, result.corrupt]).tolist()
    return Evaluation(
        devices.sum(result.correct).astype(np.int64),
        devices.sum(result.images).astype(np.int64),
        # -1 where another device reads the image, so that only one adds anything.
        devices.sum(result.predicted + 1).astype(np.int32) - 1,
        devices.sum(result.chosen + 1).astype(np.int8) - 1,
        rate,
        int(corrupt),
    )
