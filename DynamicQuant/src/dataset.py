"""Images for training and evaluation: which, in what order, prepared how.

Everything random is drawn from the seed and from what it is drawn for: an image's crop, flip and colours from (seed,
epoch, image). So it does not depend on the number of reading processes or on interruptions. Does not import MindSpore.
"""

import argparse
import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from utils.cli import UserError
from utils.images import (
    ImageFolder,
    Loader,
    Unreadable,
    epoch_rows,
    filled,
    middle,
    open_image,
    reading_processes,
    rgb,
)

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
# (3, 256): what each level of each channel becomes.
NORMALISED = ((np.arange(256)[:, None] / 255 - MEAN) / STD).T.astype(np.float32)

# What a stream of random numbers is for: third part of its seed. (0 is the order, in `epoch_rows`.)
AUGMENT, GUMBEL, CONTROLLER, DROPOUT = 1, 2, 3, 4


def normalise(image: Image.Image) -> np.ndarray:
    """RGB image to float32 (3, H, W): /255, less ImageNet's mean, by its deviation."""
    pixels = np.asarray(image)
    return np.stack([table[pixels[..., channel]] for channel, table in enumerate(NORMALISED)])


@dataclass(frozen=True)
class EvalTransform:
    """The published evaluation: shorter side to `resize_size`, and the centre square of `image_size` (both pixels).

    Bicubic with antialiasing (Pillow's); the longer side is truncated to whole pixels.
    """

    image_size: int
    resize_size: int

    def __call__(self, path: Path) -> np.ndarray:
        """The image file `path` as float32 (3, image_size, image_size).

        Raises:
            Unreadable: not a readable image.
        """
        with open_image(path) as file:
            image = middle(rgb(file))
        size = tuple(self.resize_size * side // min(image.size) for side in image.size)
        resized = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (round((side - self.image_size) / 2) for side in size)
        return normalise(resized.crop((left, top, left + self.image_size, top + self.image_size)))


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop (Szegedy et al., "Going deeper with convolutions", section 6), flip and colour jitter.

    Args:
        image_size: side of the result in pixels.
        crop_scale, crop_ratio: range of the crop's share of the image's area and of its width / height, the latter
            drawn log-uniformly.
        flip: probability of the flip.
        color_jitter: brightness, contrast and saturation are multiplied by factors from [1 - this, 1 + this], in random
            order.
    """

    image_size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    color_jitter: float

    def __call__(self, path: Path, rng: np.random.Generator) -> np.ndarray:
        """One view of the image file `path`, float32 (3, image_size, image_size); all that is random is from `rng`.

        Raises:
            Unreadable: not a readable image.
        """
        side = self.image_size
        with open_image(path) as image:
            width, height = image.size
            box = self.box(width, height, rng)
            # Where the crop is much larger than the result, a JPEG need not be decoded at full resolution.
            image.draft(None, (width * side // (box[2] - box[0]), height * side // (box[3] - box[1])))
            scale = np.array(image.size) / (width, height)
            box = tuple(np.clip(np.array(box) * [*scale, *scale], 0, [*image.size] * 2).tolist())
            view = rgb(image).resize((side, side), Image.Resampling.BILINEAR, box)
        if rng.random() < self.flip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.color_jitter:
            enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            for index in rng.permutation(len(enhancers)):
                view = enhancers[index](view).enhance(rng.uniform(1 - self.color_jitter, 1 + self.color_jitter))
        return normalise(view)

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """A crop (left, top, right, bottom) within (width, height); the largest centred one if ten draws do not fit."""
        low, high = np.log(self.crop_ratio)
        for _ in range(10):
            area = width * height * rng.uniform(*self.crop_scale)
            ratio = np.exp(rng.uniform(low, high))
            w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        w = max(1, min(width, round(height * self.crop_ratio[1])))
        h = max(1, min(height, round(width / self.crop_ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


def training_loader(folder: ImageFolder, args: argparse.Namespace) -> Loader:
    """Reads augmented images as the settings say."""
    transform = TrainTransform(
        args.image_size, tuple(args.crop_scale), tuple(args.crop_ratio), args.flip, args.color_jitter
    )
    seed = args.seed

    def view(path: Path, row: int, epoch: int) -> np.ndarray:
        return transform(path, np.random.default_rng([seed, epoch, AUGMENT, row]))

    shape = (3, args.image_size, args.image_size)
    return Loader(folder, view, shape, args.batch_size, reading_processes(args.num_workers, args.device_num))


def evaluation_loader(folder: ImageFolder, args: argparse.Namespace, devices: int = 1) -> Loader:
    """Reads images with the published preprocessing."""
    transform = EvalTransform(args.image_size, args.resize_size)
    shape = (3, args.image_size, args.image_size)
    workers = reading_processes(args.num_workers, devices)
    return Loader(folder, lambda path, row, epoch: transform(path), shape, args.batch_size, workers)


def training_batches(
    loader: Loader, args: argparse.Namespace, epoch: int, first_step: int = 0, rank: int = 0, devices: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray, list[int]]]:
    """This device's batches of an epoch from `first_step` on; an incomplete last step is left out.

    A batch is images float32 (N, 3, S, S), labels int32 (N,), and the rows whose files cannot be read. Other images of
    the batch take their places, so that every batch is full. Step k takes the same images for any number of devices.

    Raises:
        UserError: no image of a batch can be read.
    """
    rows = epoch_rows(len(loader.folder), args.batch_size, args.seed, epoch, first_step, rank, devices)
    for batch in loader.batches(rows, epoch):
        yield *filled(batch, args.batch_size, loader.folder), batch.corrupt


def controller_images(folder: ImageFolder, transform: EvalTransform, count: int = 128) -> np.ndarray:
    """Up to `count` images spread evenly over `folder`, float32 (n, 3, S, S): the same ones on every device.

    Raises:
        UserError: none of them can be read.
    """
    images = []
    for row in np.linspace(0, len(folder) - 1, min(count, len(folder))).astype(int):
        with contextlib.suppress(Unreadable), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # training says what there is to say of an image
            images.append(transform(folder.paths[row]))
    if not images:
        raise UserError(f"none of {count} training images can be read; is the data set damaged?")
    return np.stack(images)
