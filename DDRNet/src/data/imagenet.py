"""ImageNet for training and evaluation: which images, in what order, prepared how.

Everything random is drawn from the seed and from what it is drawn for: an image's augmentation from (seed, epoch,
image), a batch's Mixup from (seed, epoch, step, batch, device). So it does not depend on the number of reading
processes or on interruptions. Does not import MindSpore.
"""

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from src.data.augment.mixup import Mixup, smooth_one_hot
from src.data.transforms import EvalTransform, TrainTransform
from utils.images import Batch, ImageFolder, Loader, epoch_rows, filled, reading_processes

# What a stream of random numbers is for: third part of its seed. (0 is the order, in `epoch_rows`.)
AUGMENT, MIX, DROP_PATH = 1, 2, 3

Step = list[tuple[Any, Any, list[int]]]


def training_loader(folder: ImageFolder, args: argparse.Namespace) -> Loader:
    """Reads augmented images as the settings say."""
    transform = TrainTransform(
        args.image_size,
        args.interpolation,
        args.color_jitter,
        args.auto_augment,
        args.re_prob,
        args.re_mode,
        args.re_count,
        args.crop_scale,
        args.crop_ratio,
        args.flip,
    )
    seed = args.seed

    def view(path: Path, row: int, epoch: int) -> np.ndarray:
        return transform(path, np.random.default_rng([seed, epoch, AUGMENT, row]))

    shape = (3, args.image_size, args.image_size)
    return Loader(folder, view, shape, args.batch_size, reading_processes(args.num_parallel_workers, args.device_num))


def evaluation_loader(folder: ImageFolder, args: argparse.Namespace, devices: int = 1) -> Loader:
    """Reads images with the published evaluation preprocessing."""
    transform = EvalTransform(args.image_size, args.crop_pct)
    shape = (3, args.image_size, args.image_size)
    workers = reading_processes(args.num_parallel_workers, devices)
    return Loader(folder, lambda path, row, epoch: transform(path), shape, args.batch_size, workers)


class TrainingBatches:
    """The batches of a training on one of several devices.

    Args:
        loader: from `training_loader`.
        args: the settings.
        rank, devices: this device's number, and how many there are.
        convert: what makes a tensor of an array; it is called ahead of time, off the main thread.

    Attributes:
        steps: steps of an epoch; an incomplete last one is left out.
    """

    def __init__(
        self,
        loader: Loader,
        args: argparse.Namespace,
        rank: int = 0,
        devices: int = 1,
        convert: Callable[[np.ndarray], Any] = np.asarray,
    ):
        self.convert = convert
        self.loader = loader
        self.args = args
        self.rank = rank
        self.devices = devices
        self.steps = len(loader.folder) // (args.batch_size * args.accumulation_step * devices)
        self.mixup = None
        if args.mix_up or args.cutmix:
            self.mixup = Mixup(
                args.mix_up,
                args.cutmix,
                args.mixup_prob,
                args.switch_prob,
                args.mixup_mode,
                args.label_smoothing,
                args.num_classes,
            )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Step]:
        """Every step of an epoch from `first_step` on: `accumulation_step` batches for each.

        A batch is images float32 (N, 3, S, S), targets float32 (N, K), and the rows whose files cannot be read. Other
        images of the batch take their places, so that every batch is full. Step k takes the same images for any
        number of devices. One step is prepared while the device works on the one before.

        Raises:
            UserError: no image of a batch can be read.
        """
        args = self.args
        size = args.batch_size * args.accumulation_step
        rows = epoch_rows(len(self.loader.folder), size, args.seed, epoch, first_step, self.rank, self.devices)
        batches = self.loader.batches(rows, epoch)
        with ThreadPoolExecutor(1) as ahead:
            try:
                following = None
                for step in range(first_step, self.steps):
                    before, following = following, ahead.submit(self._step, batches, epoch, step)
                    if before is not None:
                        yield before.result()
                if following is not None:
                    yield following.result()
            except GeneratorExit:
                raise
            except BaseException:
                self.loader.kill()  # else the lines below would wait for processes that may hang
                raise
            finally:
                ahead.submit(batches.close).result()

    def _step(self, batches: Iterator[Batch], epoch: int, step: int) -> Step:
        parts = [self._mixed(next(batches), epoch, step, number) for number in range(self.args.accumulation_step)]
        return [(self.convert(images), self.convert(targets), corrupt) for images, targets, corrupt in parts]

    def _mixed(self, batch: Batch, epoch: int, step: int, number: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        args = self.args
        images, labels = filled(batch, args.batch_size, self.loader.folder)
        if self.mixup is None or 0 < args.mixup_off_epoch <= epoch:
            return images, smooth_one_hot(labels, args.num_classes, args.label_smoothing), batch.corrupt
        rng = np.random.default_rng([args.seed, epoch, MIX, step, number, self.rank])
        return *self.mixup(images, labels, rng), batch.corrupt
