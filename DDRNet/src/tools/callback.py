"""What a training keeps of its steps: the record and the plot."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.trainers.train_one_step import StepResult
from utils.cli import UserError, read_file, whole_file
from utils.metrics import write_rows


class StepRecord:
    """`steps.csv`: one line for each step of the training, so that the loss curve is complete over interruptions.

    As a context manager it writes itself when a UserError ends the block.

    Args:
        path: the file; it is first written by `write`.
        resume: the training state that is resumed, or None; the `steps.csv` beside it tells the steps before.
        epoch, step: of that state, `step` being the steps of `epoch` that are done. steps: those of an epoch.

    Raises:
        UserError: that file does not hold those steps.
    """

    COLUMNS = ("epoch", "step", "lr", "loss", "grad_norm", "loss_scale", "overflow")

    def __init__(self, path: Path, resume: str | Path | None = None, epoch: int = 0, step: int = 0, steps: int = 0):
        self.path = path
        self.rows: list[tuple[float, ...]] = []
        if resume is None:
            return
        before, count = Path(resume).with_name("steps.csv"), epoch * steps + step
        try:
            lines = read_file(before, "keep it beside the training state").decode().splitlines()
            for number, place, *values, overflow in list(csv.reader(lines))[1 : count + 1]:
                self.rows.append((int(number), int(place), *map(float, values), int(overflow)))
            fits = len(self.rows) == count and (not count or self.rows[-1][:2] == (epoch + 1, step))
        except (UserError, ValueError, IndexError, csv.Error):
            fits = False
        if not fits:
            raise UserError(f"{before} does not hold the {count} steps before {resume}; keep the two files together")

    def add(self, epoch: int, step: int, lr: float, result: StepResult) -> None:
        """Note what a step did; epoch and step are counted from 1."""
        done = (result.loss, result.norm, result.loss_scale, int(result.overflow))
        self.rows.append((epoch, step, float(lr), *done))

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
