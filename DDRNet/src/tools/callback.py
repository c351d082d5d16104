"""What a training does besides its steps: evaluation that keeps the best checkpoint, records, the plot."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from src.models.ddrnet import DDRNet23
from src.tools.evaluation import Evaluation, evaluate
from src.tools.get_misc import save_network
from src.trainers.train_one_step import TrainOneStep
from utils.cli import UserError, whole_file
from utils.images import CorruptImages, Loader
from utils.metrics import write_rows


class EvaluateAndKeepBest:
    """Evaluates the network over all devices and keeps the checkpoint of the highest top-1 so far.

    Args:
        network: what is trained. step: for sums over the devices. loader: the validation images.
        path: the best checkpoint.
        best: {"epoch", "top1"} of the run that is resumed, or None.
    """

    def __init__(
        self,
        network: DDRNet23,
        step: TrainOneStep,
        loader: Loader,
        batch_size: int,
        path: Path,
        best: dict | None,
        rank: int,
        devices: int,
        strict: bool,
    ):
        self.network = network
        self.step = step
        self.loader = loader
        self.batch_size = batch_size
        self.path = path
        self.best = best
        self.rank = rank
        self.devices = devices
        self.on_corrupt = CorruptImages(loader.folder, strict)

    def __call__(self, epoch: int) -> Evaluation:
        """Evaluate after `epoch`, counted from 1; `self.best["epoch"]` is then `epoch` if it is the best one."""
        result = over_devices(
            evaluate(self.network, self.loader, self.batch_size, self.rank, self.devices, on_corrupt=self.on_corrupt),
            self.step.sum_over_devices,
        )
        self.network.set_train(True)
        if not result.images:
            raise UserError("none of the validation images can be read")
        if self.best is None or result.top() >= self.best["top1"]:
            self.best = {"epoch": epoch, "top1": result.top(), "top5": result.top(1), "loss": result.mean_loss()}
            if self.rank == 0:
                save_network(self.network, self.path, self.loader.folder.classes)
        return result


def over_devices(result: Evaluation, sum_over_devices: Callable[[Sequence[float]], np.ndarray]) -> Evaluation:
    """`result` with the sums of all devices; the predictions stay this device's."""
    loss, top1, top5, images = sum_over_devices([result.loss, *result.correct, result.images]).tolist()
    return replace(result, loss=loss, correct=np.array([top1, top5], np.int64), images=int(images))


class StepRecord:
    """`steps.csv`: one line for each step of the training, so that the loss curve is complete over interruptions.

    Args:
        path: the file.
        before: `steps.csv` of the run that is resumed, of which the first `count` lines are taken over.
    """

    COLUMNS = ("epoch", "step", "lr", "loss", "grad_norm", "loss_scale", "overflow")

    def __init__(self, path: Path, before: Path | None = None, count: int = 0):
        self.path = path
        self.rows: list[list] = []
        if before is not None and before.is_file():
            with before.open(newline="") as file:
                self.rows = [row for row in csv.reader(file)][1 : count + 1]
        self.write()

    def add(
        self, epoch: int, step: int, lr: float, loss: float, norm: float, loss_scale: float, overflow: bool
    ) -> None:
        """Note a step; epoch and step are counted from 1."""
        self.rows.append([epoch, step, float(lr), loss, norm, loss_scale, int(overflow)])

    def write(self) -> None:
        """Write all rows, whole or not at all."""
        write_rows(self.path, [dict(zip(self.COLUMNS, row)) for row in self.rows] or [dict.fromkeys(self.COLUMNS)])

    def losses(self) -> np.ndarray:
        """Loss of every step."""
        return np.array([float(row[3]) for row in self.rows])

    def rates(self) -> np.ndarray:
        """Learning rate of every step."""
        return np.array([float(row[2]) for row in self.rows])


def plot(path: Path, record: StepRecord, rows: Sequence[dict], steps: int) -> None:
    """Draw loss, accuracy and learning rate over the epochs as a PNG.

    Args:
        rows: those of `metrics.csv`. steps: steps of an epoch.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses, epochs = record.losses(), np.arange(1, len(record.rows) + 1) / steps
    window = max(1, min(steps, len(losses)) // 10)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    tested = [row for row in rows if row.get("top1") is not None]
    figure, (loss, accuracy, rate) = plt.subplots(3, 1, figsize=(8, 9), sharex=True, layout="constrained")
    loss.plot(epochs, losses, color="#c6d4e8", linewidth=0.8, label="training, each step")
    loss.plot(epochs[window - 1 :], smooth, color="#2b5c9e", label=f"training, mean of {window} steps")
    loss.plot([r["epoch"] for r in tested], [r["val_loss"] for r in tested], "o-", color="#c8553d", label="validation")
    loss.set_ylabel("cross entropy")
    loss.legend()
    for key, label, colour in (("top1", "top-1", "#c8553d"), ("top5", "top-5", "#e0a458")):
        accuracy.plot([r["epoch"] for r in tested], [100 * r[key] for r in tested], "o-", color=colour, label=label)
    accuracy.set_ylabel("validation accuracy, %")
    accuracy.legend(loc="lower right")
    rate.plot(epochs, record.rates(), color="#2b5c9e")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
