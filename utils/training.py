"""What every training has around its steps: start, resume, epochs, interruption, the best checkpoint, the results.

A model's `train.py` has the loop itself: over `Training.epochs` and, within `Training.steps`, the steps of one, which
it counts with `add`; then `row`, after an evaluation `keep_best`, and `tell`; at the end `finish`.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mindspore.nn as nn
import numpy as np
from mindspore import Parameter, ParameterTuple, ops

from utils.checkpoint import copy_best, load_strictly, read_record, save_checkpoint
from utils.cli import Interrupt, UserError, check_writable
from utils.config import take_settings
from utils.device import Devices
from utils.images import CorruptImages, ImageFolder, Loader, check_classes, open_root
from utils.launcher import distribute, is_worker
from utils.metrics import Progress, Throughput, write_results, write_rows

STATE = "resume.ckpt"
POSITION = {"epoch": int, "step": int, "totals": dict, "rows": list, "best": dict | None, "kept": dict}
NEW_HEAD = "add --finetune to start with a new classifier"


def begin(args: argparse.Namespace, script: str) -> int | None:
    """Look at what can be wrong before any work is done, and start the processes of the other devices.

    Returns None if this process is to train, else the exit status to leave with. UserError if there is no training
    state to go on from, or `output_dir` cannot be written.
    """
    if args.resume is not None and not is_worker():
        read_state(args.resume)
    check_writable(args.output_dir)
    return distribute(args, script)


def open_images(
    args: argparse.Namespace,
    path: str | Path | None,
    told: Mapping,
    finetune: bool,
    free: Sequence[str] = (),
    data_path: str | Path | None = None,
    batches: int = 1,
) -> tuple[ImageFolder, ImageFolder]:
    """The training and the validation images; `args` get what the checkpoint to start from says of the network.

    UserError if images or settings contradict that checkpoint or each other, or do not fill a step.

    Args:
        path, told: that checkpoint and what it tells; nothing where there is none.
        finetune: whether its classes do not count. free: what else does not, besides sizes of images.
        data_path: where the images are, if not in the setting of that name. batches: of a step.
    """
    left_out = {"image_size", "resize_size", *free, *(("num_classes",) if finetune else ())}
    kept = {key: value for key, value in told.items() if key not in left_out}
    others = finetune or args.resume is not None
    take_settings(args, path, kept, "leave it out" + ("" if others else f", or, for other classes, {NEW_HEAD}"))
    remedy = "set --num_classes {}" if finetune or not told else f"{NEW_HEAD} for --num_classes {{}}"
    train, val = open_root(data_path or args.data_path, args.num_classes, remedy)
    if not finetune:
        check_classes(path, told.get("classes"), train, NEW_HEAD)
    images = args.batch_size * args.device_num * args.server_num * batches
    if len(train) < images:
        raise UserError(f"{len(train)} training images do not fill one step of {images}; set --batch_size lower")
    return train, val


def gradient_sums(weights: Sequence[Parameter]) -> ParameterTuple:
    """A zero for every value of `weights`, float32, to add the gradients of a step to."""
    return ParameterTuple(
        [Parameter(np.zeros(w.shape, np.float32), name=f"gradient.{w.name}", requires_grad=False) for w in weights]
    )


class Update(nn.Cell):
    """One step of `optimizer` with the `mean`, or sum, over the devices of the gradients in `sums`; clears `sums`."""

    def __init__(self, optimizer: nn.Optimizer, sums: ParameterTuple, devices: int, mean: bool):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.sums = sums
        self.reduce = nn.DistributedGradReducer(sums, mean=mean, degree=devices) if devices > 1 else None
        self.map = ops.HyperMap()

    def construct(self) -> bool:
        done = self.optimizer(self.sums if self.reduce is None else self.reduce(self.sums))
        zeros = self.map(ops.zeros_like, self.sums)
        return ops.depend(True, self.map(ops.assign, ops.depend(self.sums, done), zeros))


class MeanStatistics(nn.Cell):
    """Replaces the BN statistics of `networks` by their means over the devices."""

    def __init__(self, networks: Sequence[nn.Cell], devices: int):
        super().__init__(auto_prefix=False)
        parameters = [parameter for network in networks for parameter in network.get_parameters()]
        self.statistics = ParameterTuple([parameter for parameter in parameters if "moving_" in parameter.name])
        self.reduce = nn.DistributedGradReducer(self.statistics, mean=True, degree=devices)
        self.map = ops.HyperMap()

    def construct(self) -> bool:
        return ops.depend(True, self.map(ops.assign, self.statistics, self.reduce(self.statistics)))


def check_finite(loss: float, squares: float = 0.0, remedy: str = "a lower --lr or more --warmup_epochs") -> None:
    """UserError if the loss, or the gradients' sum of squares, is not finite; asked before they reach the weights."""
    if not np.isfinite([loss, squares]).all():
        gradients = "" if np.isfinite(squares) else "; its gradients are not finite"
        raise UserError(f"the loss is {loss}{gradients}; training has diverged, start again with {remedy}")


def read_state(path: str | Path) -> dict:
    """The "settings" and the "position" that `save_state` stored in `path`; UserError if that is no training state."""
    state = read_record(path)
    settings, position = state.get("settings"), state.get("position")
    if not (isinstance(settings, dict) and isinstance(position, dict)) or not all(
        name in position and isinstance(position[name], kind) for name, kind in POSITION.items()
    ):
        raise UserError(f"{path} is no training state; --resume takes the {STATE} of an interrupted training")
    return state


def told_by_state(path: str | Path, names: Sequence[str]) -> dict:
    """Those settings of the training state `path` that say what the network is, and so need not be given again."""
    settings = read_state(path)["settings"]
    return {name: settings[name] for name in names if name in settings}


def save_state(path: Path, cells: Sequence[nn.Cell], settings: Mapping, position: Mapping) -> None:
    """Write everything that `load_state` needs to go on: the cells' parameters, `settings` and `position`."""
    save_checkpoint(_parameters(cells), path, {"settings": settings, "position": position})


def load_state(path: str | Path, cells: Sequence[nn.Cell], settings: Mapping) -> dict:
    """Restore what `save_state` wrote; returns the position. UserError if that was a run with other settings."""
    state = read_state(path)
    before, now = state["settings"], json.loads(json.dumps(settings))
    differing = ", ".join(f"{key} {before.get(key)} (now {now[key]})" for key in now if before.get(key) != now[key])
    if differing:
        raise UserError(f"{path} is of a run with other settings: {differing}; resume with the same, or start anew")
    load_strictly(_parameters(cells), path, "this training's state", lambda names: "another one")
    return state["position"]


def _parameters(cells: Sequence[nn.Cell]) -> list[Parameter]:
    return list({p.name: p for cell in cells for p in cell.get_parameters()}.values())


class Training:
    """The run around the steps of a training; UserError if the state to resume is not of this one.

    Args:
        loaders: of the training and of the validation images; `images` make a step of all devices.
        networks: what is trained; optimizers: what trains it. Their parameters are the state.
        best: names of the files in `output_dir` that `keep_best` has written.
        settings: what else, besides `args.fixed`, must not change when a run is resumed.
        kept: further values of the state, by name; a dict in it is the live one, and gets its values back in place.

    Attributes:
        epoch, step: the current epoch and the number of its steps that are done, both from 0.
        totals: what `add` has summed over the steps of the epoch. rows: of `metrics.csv`.
        best: the figures of the best epoch so far, or None. interrupt: Ctrl-C.
        corrupt, corrupt_val: to be called with the rows of images that cannot be read.
        beside: called when the state is saved, on the first device, to write what belongs beside it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        devices: Devices,
        loaders: tuple[Loader, Loader],
        images: int,
        networks: Sequence[nn.Cell],
        optimizers: Sequence[nn.Optimizer],
        best: Sequence[str],
        settings: Mapping = {},
        kept: Mapping = {},
    ):
        self.args, self.devices, self.images = args, devices, images
        self.cells = (*networks, *optimizers)
        self.output = Path(args.output_dir)
        self.best_files = [self.output / name for name in best]
        folders = [loader.folder for loader in loaders]
        self.steps_per_epoch = len(folders[0]) // images
        self.settings = {key: getattr(args, key) for key in args.fixed}
        self.settings |= {"devices": devices.count, "images": len(folders[0]), **settings}
        self.epoch, self.step, self.totals, self.rows, self.best = 0, 0, {}, [], None
        self.kept = dict(kept)
        self.beside: Callable[[], None] = lambda: None
        self.mean_statistics = MeanStatistics(networks, devices.count) if devices.count > 1 else None
        self.corrupt, self.corrupt_val = (CorruptImages(folder, args.strict) for folder in folders)
        devices.say(f"{devices}, {len(folders[0])} training and {len(folders[1])} validation images")
        if args.resume is not None:
            self._resume(Path(args.resume))
        self.interrupt = Interrupt()

    def _resume(self, path: Path) -> None:
        position = load_state(path, self.cells, self.settings)
        for name in ("epoch", "step", "totals", "rows", "best"):
            setattr(self, name, position[name])
        for name, value in position["kept"].items():
            if isinstance(value, dict):
                self.kept[name].update(value)
            else:
                self.kept[name] = value
        self.devices.say(f"going on after step {self.step} of epoch {self.epoch + 1}")
        if self.devices.rank == 0 and self.best is not None:
            for file in self.best_files:
                copy_best(path.with_name(file.name), file)

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, from 0; the first may have steps behind it."""
        for epoch in range(self.epoch, self.args.epochs):
            self.epoch = epoch
            yield epoch
            self.step, self.totals = 0, {}

    @contextlib.contextmanager
    def steps(self, batches: Iterator) -> Iterator[Iterator[tuple[int, Any]]]:
        """Yields an iterator over number and batch of the steps that are left of this epoch, whose `batches` are given.

        Within the block Ctrl-C waits for the end of the step, and progress is shown; at its end the state is saved.
        """
        self.meter, self.stop, self.shown = Throughput(), False, {}
        name, total = f"epoch {self.epoch + 1}/{self.args.epochs}", self.steps_per_epoch * self.images
        bar = Progress(name, total, self.step * self.images, show=self.devices.rank == 0)
        with bar, self.interrupt.held():
            yield self._steps(batches, bar)
        with self.interrupt.held():
            self._save()
        if self.devices.any(self.interrupt.asked):  # too late for the last step to see
            self._leave(f"epoch {self.epoch + 1}")

    def _steps(self, batches: Iterator, bar: Progress) -> Iterator[tuple[int, Any]]:
        first = self.step
        for step, batch in enumerate(batches, first):
            yield step, batch
            self.step = step + 1
            if step == first:
                self.meter.reset()  # the first step compiles
            else:
                self.meter.update(self.images)
            bar.update(self.images, loss=f"{self.mean('loss'):.4f}", **self.shown)
            if self.stop:
                self._save()
                self._leave(f"step {self.step} of epoch {self.epoch + 1}")

    def add(self, interrupt: bool, shown: Mapping[str, str] = {}, **numbers: float) -> None:
        """Add a step's `numbers` to `totals`; `interrupt`: a device asks to stop; `shown`: progress beside the loss."""
        for name, number in numbers.items():
            self.totals[name] = self.totals.get(name, 0) + number
        self.shown = shown
        self.stop = interrupt or (self.devices.count == 1 and self.interrupt.asked)

    def mean(self, name: str) -> float:
        """Mean over the steps of this epoch so far; `step` counts the one that runs only when it has ended."""
        return self.totals[name] / max(self.step, 1)

    def _save(self) -> None:
        if self.mean_statistics is not None:  # all devices evaluate, and go on with, the same network
            self.mean_statistics()
        if self.devices.rank == 0:
            position = {name: getattr(self, name) for name in POSITION}
            save_state(self.output / STATE, self.cells, self.settings, position)
            self.beside()
        self.interrupt.hint = f"go on with --resume {self.output / STATE}"

    def _leave(self, where: str) -> None:
        self.devices.say(f"\nstopped after {where}; {self.interrupt.hint}")
        raise SystemExit(130)

    def row(self, lr: float) -> tuple[dict, str]:
        """The beginning of the epoch's row in `metrics.csv`, and of its line."""
        row = {"epoch": self.epoch + 1, "lr": float(lr), "loss": self.mean("loss")}
        row["train_images_per_s"] = self.meter.rate() if self.meter.images else None
        return row, f"epoch {self.epoch + 1}/{self.args.epochs}: loss {row['loss']:.4f}"

    def evaluates(self) -> bool:
        """Whether this epoch ends with an evaluation."""
        return (self.epoch + 1) % self.args.eval_every == 0 or self.epoch + 1 == self.args.epochs

    def keep_best(self, figures: Mapping, save: Callable[[], None], by: Sequence[str] = ("top1",)) -> str:
        """Unless an epoch had better `figures`, by those in `by`, `save`, on one device; returns what the line says."""
        if self.best is not None and [figures[name] for name in by] < [self.best[name] for name in by]:
            return ""
        self.best = {"epoch": self.epoch + 1, **figures}
        if self.devices.rank == 0:
            save()
        return ", best so far"

    def tell(self, row: dict, line: str) -> None:
        """Print the epoch's line and add its row to `metrics.csv`."""
        self.rows = [*self.rows, row]
        self.devices.say(line, flush=True)
        if self.devices.rank == 0:
            write_rows(self.output / "metrics.csv", self.rows)

    def finish(self, **results) -> int:
        """Write `results.json`, tell the best epoch, and return the exit status."""
        if self.devices.rank == 0:
            write_results(self.output / "results.json", {"best": self.best, **results})
        images = np.arange(len(self.corrupt.folder))
        left_out = np.count_nonzero(self.devices.sum(np.isin(images, list(self.corrupt.rows))))  # each counts once
        if left_out:
            where = f" (their names: {self.output}/logs)" if self.devices.count > 1 else ""
            self.devices.say(f"{left_out} training images could not be read; others took their places{where}")
        files = " ".join(map(str, self.best_files))
        self.devices.say(f"best: epoch {self.best['epoch']}, top-1 {self.best['top1']:.2%}; {files}")
        return 0
