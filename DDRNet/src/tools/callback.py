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
from utils.cli import Interrupt, UserError, whole_file
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
        interrupt: Interrupt,
    ):
        self.network = network
        self.step = step
        self.loader = loader
        self.batch_size = batch_size
        self.path = path
        self.best = best
        self.rank = rank
        self.devices = devices
        self.interrupt = interrupt
        self.on_corrupt = CorruptImages(loader.folder, strict)

    def __call__(self, epoch: int) -> Evaluation:
        """Evaluate after `epoch`, counted from 1; `self.best["epoch"]` is then `epoch` if it is the best one."""
        result = evaluate(
            self.network, self.loader, self.batch_size, self.rank, self.devices, self.interrupt, self.on_corrupt
        )
        result = over_devices(result, self.step.sum_over_devices)
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

    As a context manager it writes itself when a UserError ends the block.

    Args:
        path: the file; it is first written by `write`.
        before: `steps.csv` of the run that is resumed; its first `count` lines are taken over.
        count: steps of that run. last: epoch and step of the last of them, counted from 1.

    Raises:
        UserError: `before` does not hold those lines.
    """

    COLUMNS = ("epoch", "step", "lr", "loss", "grad_norm", "loss_scale", "overflow")

    def __init__(self, path: Path, before: Path | None = None, count: int = 0, last: tuple[int, int] = (0, 0)):
        self.path = path
        self.rows: list[tuple[float, ...]] = []
        if before is None:
            return
        try:
            with before.open(newline="") as file:
                for epoch, step, *values, overflow in list(csv.reader(file))[1 : count + 1]:
                    self.rows.append((int(epoch), int(step), *map(float, values), int(overflow)))
            fits = len(self.rows) == count and (not count or self.rows[-1][:2] == last)
        except (OSError, ValueError, IndexError):
            fits = False
        if not fits:
            raise UserError(f"{before} does not hold the {count} steps before resume.ckpt; keep the two files together")

    def add(
        self, epoch: int, step: int, lr: float, loss: float, norm: float, loss_scale: float, overflow: bool
    ) -> None:
        """Note a step; epoch and step are counted from 1."""
        self.rows.append((epoch, step, float(lr), loss, norm, loss_scale, int(overflow)))

    def write(self) -> None:
        """Write all rows, whole or not at all."""
        write_rows(self.path, [dict(zip(self.COLUMNS, row)) for row in self.rows])

    def __enter__(self) -> "StepRecord":
        return self

    def __exit__(self, kind, *exception) -> None:
        if kind is not None and issubclass(kind, UserError):
            self.write()  # the steps up to the error, which may show what was wrong

    def column(self, name: str) -> np.ndarray:
        """The values of one column."""
        return np.array([row[self.COLUMNS.index(name)] for row in self.rows])


def plot(path: Path, record: StepRecord, rows: Sequence[dict], steps: int) -> None:
    """Draw loss, accuracy and learning rate over the epochs as a PNG.

    Args:
        rows: those of `metrics.csv`. steps: steps of an epoch.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses, epochs = record.column("loss"), record.column("epoch") - 1 + record.column("step") / steps
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
    rate.plot(epochs, record.column("lr"), color="#2b5c9e")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
