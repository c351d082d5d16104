"""Loss and accuracy over all images of a folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import mindspore.nn as nn
import numpy as np
from mindspore import Tensor

from utils.cli import Interrupt, UserError
from utils.device import ONE_DEVICE, Devices
from utils.images import Loader, evaluation_rows
from utils.metrics import Progress, Throughput, TopKAccuracy, cross_entropy


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


def evaluate(
    network: nn.Cell,
    loader: Loader,
    batch_size: int,
    interrupt: Interrupt,
    devices: Devices = ONE_DEVICE,
    on_corrupt: Callable[[Sequence[int]], None] = lambda rows: None,
) -> Evaluation:
    """Classify all images, each on one of the devices; every device returns the result of all.

    Args:
        network: images float32 (N, 3, S, S) to logits (N, K); it is put in inference mode.
        batch_size: what every batch is filled up to, so that the graph sees one size.
        interrupt: holds Ctrl-C while the graph compiles, where MindSpore would lose it.
        on_corrupt: called with the rows of this device that cannot be read.

    Raises:
        UserError: logits that are not finite, or no image can be read.
    """
    network.set_train(False)
    rows = evaluation_rows(loader.folder, devices.rank, devices.count)
    metric = TopKAccuracy((1, 5))
    result = Evaluation(0.0, metric.correct, 0, np.full(len(loader.folder), -1, np.int32))
    meter = None
    with Progress("evaluating", len(rows), show=devices.rank == 0) as progress:
        for batch in loader.batches(rows):
            on_corrupt(batch.corrupt)
            result.corrupt += len(batch.corrupt)
            if len(batch.rows):
                padding = np.zeros((batch_size - len(batch.rows), *batch.images.shape[1:]), np.float32)
                images = Tensor(np.concatenate([batch.images, padding]))
                if meter is None:
                    interrupt.hold_while(partial(network, images))  # compiles
                    meter = Throughput()
                logits = network(images).asnumpy()[: len(batch.rows)].astype(np.float32)
                metric.update(logits, batch.labels)
                result.loss += float(cross_entropy(logits, batch.labels).sum())
                result.predicted[batch.rows] = logits.argmax(1)
                meter.update(len(batch.rows))
            progress.update(len(batch.rows) + len(batch.corrupt), top1=metric.shown())
    result.images = metric.total
    result.images_per_s = meter.rate() if meter else 0.0
    if devices.count > 1:
        result = over_devices(result, devices)
    if not result.images:
        raise UserError(f"none of the {len(loader.folder)} images of {loader.folder.paths.root} can be read")
    return result


def over_devices(result: Evaluation, devices: Devices) -> Evaluation:
    """All devices' results put together."""
    loss, top1, top5, images, rate, corrupt = devices.sum(
        [result.loss, *result.correct, result.images, result.images_per_s, result.corrupt]
    ).tolist()
    return replace(
        result,
        loss=loss,
        correct=np.array([top1, top5], np.int64),
        images=int(images),
        # -1 where another device reads the image, so that only one adds anything.
        predicted=devices.sum(result.predicted + 1).astype(np.int32) - 1,
        images_per_s=rate,
        corrupt=int(corrupt),
    )
