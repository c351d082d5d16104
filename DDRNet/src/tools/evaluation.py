"""Loss and accuracy over all images of a folder."""

from collections.abc import Callable
from dataclasses import dataclass, field

import mindspore.nn as nn
import numpy as np
from mindspore import Tensor

from src.data.imagenet import evaluation_rows
from src.tools.criterion import cross_entropy
from utils.cli import Interrupt, UserError
from utils.images import Loader
from utils.metrics import Progress, Throughput, TopKAccuracy


@dataclass
class Evaluation:
    """Result of one pass.

    loss: sum of the cross entropies; correct: top-1 and top-5 hits, int64 (2,); images: how many were classified.
    predicted: int32 (number of rows,), class of each row, -1 where it was not read or is another device's.
    images_per_s: wall time without compiling. corrupt: rows that could not be read.
    """

    loss: float
    correct: np.ndarray
    images: int
    predicted: np.ndarray
    images_per_s: float = 0.0
    corrupt: list[int] = field(default_factory=list)

    def mean_loss(self) -> float:
        """Mean cross entropy."""
        return self.loss / max(self.images, 1)

    def top(self, column: int = 0) -> float:
        """Accuracy as a fraction; column 0 is top-1, 1 is top-5."""
        return float(self.correct[column]) / max(self.images, 1)


def evaluate(
    network: nn.Cell,
    loader: Loader,
    batch_size: int,
    rank: int,
    devices: int,
    interrupt: Interrupt,
    on_corrupt: Callable[[int], None] = lambda row: None,
) -> Evaluation:
    """Classify this device's part of the images.

    Args:
        network: images float32 (N, 3, S, S) to logits (N, K); it is put in inference mode.
        batch_size: what every batch is filled up to, so that the graph sees one size.
        interrupt: holds Ctrl-C while the graph compiles, where MindSpore would lose it.
        on_corrupt: called with the row of each image that cannot be read.

    Raises:
        UserError: logits that are not finite.
    """
    network.set_train(False)
    rows = evaluation_rows(loader.folder, rank, devices)
    metric = TopKAccuracy((1, 5))
    result = Evaluation(0.0, metric.correct, 0, np.full(len(loader.folder), -1, np.int32))
    meter = None
    with Progress("evaluating", len(rows), show=rank == 0) as progress:
        for batch in loader.batches(rows):
            for row in batch.corrupt:
                result.corrupt.append(row)
                on_corrupt(row)
            if len(batch.rows):
                padding = np.zeros((batch_size - len(batch.rows), *batch.images.shape[1:]), np.float32)
                images = Tensor(np.concatenate([batch.images, padding]))
                if meter is None:
                    with interrupt.held():
                        network(images)  # compiles
                    if interrupt.asked:
                        raise KeyboardInterrupt(*filter(None, [interrupt.hint]))
                    meter = Throughput()
                logits = network(images).asnumpy()[: len(batch.rows)].astype(np.float32)
                if not np.isfinite(logits).all():
                    raise UserError(
                        "the network returns NaN or infinity for some images; its weights are broken (a diverged "
                        "training, or a wrong file), or float16 is too narrow for them"
                    )
                metric.update(logits, batch.labels)
                result.loss += float(cross_entropy(logits, batch.labels).sum())
                result.predicted[batch.rows] = logits.argmax(1)
                meter.update(len(batch.rows))
            done = metric.values()[1]
            progress.update(len(batch.rows) + len(batch.corrupt), top1=f"{100 * done:.2f}%" if metric.total else "-")
    result.images = metric.total
    result.images_per_s = meter.rate() if meter else 0.0
    return result
