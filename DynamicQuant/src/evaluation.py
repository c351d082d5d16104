"""Loss, accuracy and cost over all images of a folder."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from src.inference import Predictor
from src.resnet import Architecture
from utils.cli import Interrupt, UserError
from utils.device import ONE_DEVICE, Devices
from utils.images import Loader, evaluation_rows
from utils.metrics import Progress, Throughput, TopKAccuracy, cross_entropy

# An epoch whose mean bits exceed the budget by more than this is best only if no other epoch keeps to it.
TOLERANCE = 0.05


@dataclass
class Evaluation:
    """Result of one pass.

    loss: sum of the cross entropies. correct: top-1 and top-5 hits, int64 (2,); images: how many were classified.
    chosen: how often decision d was for candidate r, int64 (D, R). correct_at: top-1 hits of the images whose first
    decision was for candidate r, int64 (R,). predicted: int32, class of each row, -1 where it was not read or is
    another device's; decided: int8, the first decision of each such row. images_per_s: wall time without compiling.
    corrupt: number of images that could not be read.
    """

    loss: float
    correct: np.ndarray
    images: int
    chosen: np.ndarray
    correct_at: np.ndarray
    predicted: np.ndarray = field(repr=False)
    decided: np.ndarray = field(repr=False)
    images_per_s: float = 0.0
    corrupt: int = 0

    def mean_loss(self) -> float:
        """Mean cross entropy."""
        return self.loss / max(self.images, 1)

    def top(self, column: int = 0) -> float:
        """Accuracy as a fraction; column 0 is top-1, 1 is top-5."""
        return float(self.correct[column]) / max(self.images, 1)

    def mean_bits(self, bits: Sequence[int]) -> float:
        """Mean of the chosen bits over images and decisions."""
        return float(self.chosen.sum(0) @ np.array(bits)) / max(int(self.chosen.sum()), 1)

    def bit_flops(self, architecture: Architecture, bits: Sequence[int]) -> float:
        """Mean of MACs x weight bits x activation bits of the quantized layers, in 10^9, for an image."""
        fixed, chosen = architecture.gmacs()
        costs = chosen[:, None] * np.square(bits)
        return fixed * architecture.target_bits**2 + float((self.chosen * costs).sum()) / max(self.images, 1)

    def figures(self, architecture: Architecture) -> dict:
        """Loss, accuracies, cost and choices by the names that they have in `metrics.csv`."""
        figures = {"val_loss": self.mean_loss(), "top1": self.top(), "top5": self.top(1)}
        if architecture.bits:
            figures["bit_gflops"] = self.bit_flops(architecture, architecture.bits)
        if architecture.decisions:
            figures["bits"] = self.mean_bits(architecture.bits)
            figures |= dict(zip((f"chosen_{bits}" for bits in architecture.bits), self.chosen.sum(0).tolist()))
        return figures

    def best_figures(self, architecture: Architecture, bit_budget: float | None) -> dict:
        """What `results.json` tells of the best epoch, and by what it is the best; None: there is no budget."""
        mean_bits = self.mean_bits(architecture.bits) if architecture.bits else None
        within = bit_budget is None or mean_bits <= bit_budget + TOLERANCE
        figures = {"top1": self.top(), "top5": self.top(1), "loss": self.mean_loss()}
        return {**figures, "within_budget": within, "mean_bits": mean_bits}


def evaluate(
    predictor: Predictor,
    loader: Loader,
    interrupt: Interrupt,
    devices: Devices = ONE_DEVICE,
    on_corrupt: Callable[[Sequence[int]], None] = lambda rows: None,
) -> Evaluation:
    """Classify all images, each on one of the devices; every device returns the result of all.

    Args:
        interrupt: holds Ctrl-C while the graphs compile, where MindSpore would lose it.
        on_corrupt: called with the rows of this device that cannot be read.

    Raises:
        UserError: logits that are not finite, or no image can be read.
    """
    rows, labels = evaluation_rows(loader.folder, devices.rank, devices.count), loader.folder.labels
    metric = TopKAccuracy((1, 5))
    candidates = max(len(predictor.bits), 1)
    result = Evaluation(
        0.0,
        metric.correct,
        0,
        np.zeros((predictor.choices.shape[1], candidates), np.int64),
        np.zeros(candidates, np.int64),
        np.full(len(labels), -1, np.int32),
        np.full(len(labels), -1, np.int8),
    )

    def count(classified: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        for done, decisions, logits in classified:
            metric.update(logits, labels[done])
            predicted = logits.argmax(1)
            result.loss += float(cross_entropy(logits, labels[done]).sum())
            result.predicted[done], result.decided[done] = predicted, decisions[:, 0]
            np.add.at(result.chosen, (np.arange(decisions.shape[1])[None], decisions), 1)
            np.add.at(result.correct_at, decisions[predicted == labels[done], 0], 1)

    meter = None
    with Progress("evaluating", len(rows), show=devices.rank == 0) as progress:
        for batch in loader.batches(rows):
            if meter is None:
                interrupt.hold_while(predictor.compile)
                meter = Throughput()
            on_corrupt(batch.corrupt)
            result.corrupt += len(batch.corrupt)
            if len(batch.rows):
                count(predictor.add(batch.images, batch.rows))
            meter.update(len(batch.rows))
            progress.update(len(batch.rows) + len(batch.corrupt), top1=metric.shown())
        count(predictor.flush())
    result.images = metric.total
    result.images_per_s = meter.rate() if meter else 0.0
    if devices.count > 1:
        result = over_devices(result, devices)
    if not result.images:
        raise UserError(f"none of the {len(labels)} images of {loader.folder.paths.root} can be read")
    return result


def over_devices(result: Evaluation, devices: Devices) -> Evaluation:
    """All devices' results put together."""
    numbers = [result.loss, result.images, result.images_per_s, result.corrupt, *result.correct, *result.correct_at]
    loss, images, rate, corrupt, top1, top5, *correct_at = devices.sum(numbers).tolist()
    return Evaluation(
        loss,
        np.array([top1, top5], np.int64),
        int(images),
        devices.sum(result.chosen).astype(np.int64),
        np.array(correct_at, np.int64),
        # -1 where another device reads the image, so that only one adds anything.
        devices.sum(result.predicted + 1).astype(np.int32) - 1,
        devices.sum(result.decided + 1).astype(np.int8) - 1,
        rate,
        int(corrupt),
    )
