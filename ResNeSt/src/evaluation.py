"""Loss and accuracy over all images of a folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import mindspore.nn as nn
import numpy as np
from mindspore import Tensor, ops

from src.dataset import evaluation_rows
from utils.cli import Interrupt, UserError
from utils.images import Loader
from utils.metrics import Progress, Throughput, TopKAccuracy


@dataclass
class Evaluation:
    """Result of one pass.

    loss: sum of the cross entropies; correct: top-1 and top-5 hits, int64 (2,); images: how many were classified.
    predicted: int32 (number of rows,), class of each row, -1 where it was not read or is another device's.
    images_per_s: wall time without compiling. corrupt: number of images that could not be read.
    """

    loss: float
    correct: np.ndarray
    images: int
    predicted: np.ndarray = field(repr=False)
    images_per_s: float = 0.0
    corrupt: int = 0

    def mean_loss(self) -> float:
        """Mean cross entropy."""
        return self.loss / max(self.images, 1)

    def top(self, column: int = 0) -> float:
        """Accuracy as a fraction; column 0 is top-1, 1 is top-5."""
        return float(self.correct[column]) / max(self.images, 1)


class SumOverDevices(nn.Cell):
    """Sum over the devices of a float32 vector; the vector itself on one device."""

    def __init__(self, devices: int):
        super().__init__(auto_prefix=False)
        self.reduce = ops.AllReduce() if devices > 1 else None

    def construct(self, x: Tensor) -> Tensor:
        return x if self.reduce is None else self.reduce(x)

    def of(self, numbers: Sequence[float]) -> np.ndarray:
        """Each of `numbers` summed over all devices, float32."""
        return self(Tensor(np.array(numbers, np.float32))).asnumpy()


def evaluate(
    network: nn.Cell,
    loader: Loader,
    batch_size: int,
    rank: int,
    devices: int,
    interrupt: Interrupt,
    on_corrupt: Callable[[int], None] = lambda row: None,
) -> Evaluation:
    """Classify all images, each on one of the devices; every device returns the result of all.

    Args:
        network: images float32 (N, 3, S, S) to logits (N, K); it is put in inference mode.
        batch_size: what every batch is filled up to, so that the graph sees one size.
        interrupt: holds Ctrl-C while the graph compiles, where MindSpore would lose it.
        on_corrupt: called with the row of each image of this device that cannot be read.

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
            result.corrupt += len(batch.corrupt)
            for row in batch.corrupt:
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
                logits = network(images).asnumpy()[: len(batch.rows)]
                if not np.isfinite(logits).all():
                    raise UserError(
                        "the network returns NaN or infinity for some images; its weights are broken (a diverged "
                        "training, or a wrong file)"
                    )
                metric.update(logits, batch.labels)
                result.loss += float(cross_entropy(logits, batch.labels).sum())
                result.predicted[batch.rows] = logits.argmax(1)
                meter.update(len(batch.rows))
            done = metric.values()[1]
            progress.update(len(batch.rows) + len(batch.corrupt), top1=f"{100 * done:.2f}%" if metric.total else "-")
    result.images = metric.total
    result.images_per_s = meter.rate() if meter else 0.0
    return over_devices(result, devices) if devices > 1 else result


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log softmax(logits) at the label, float64 (N,), for logits (N, K) and labels int (N,)."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]


def over_devices(result: Evaluation, devices: int) -> Evaluation:
    """All devices' results put together."""
    total = SumOverDevices(devices)
    loss, top1, top5, images, rate, corrupt = total.of(
        [result.loss, *result.correct, result.images, result.images_per_s, result.corrupt]
    ).tolist()
    return replace(
        result,
        loss=loss,
        correct=np.array([top1, top5], np.int64),
        images=int(images),
        # -1 where another device reads the image, so that only one adds anything.
        predicted=total.of(result.predicted + 1).astype(np.int32) - 1,
        images_per_s=rate,
        corrupt=int(corrupt),
    )
