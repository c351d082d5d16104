"""The published evaluation and the paper's training preprocessing.

Everything random is drawn from the seed and from what it is drawn for: an image's crop and flip from (seed, epoch,
image). So it does not depend on the number of reading processes or on interruptions. Does not import MindSpore.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.images import ImageFolder, Loader, epoch_rows, filled, middle, open_image, reading_processes, rgb

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

# What a stream of random numbers is for: third part of its seed. (0 is the order, in `epoch_rows`.)
AUGMENT, GUMBEL = 1, 2


def decode(path: Path) -> Image.Image:
    """The image as 8-bit RGB.

    Raises:
        Unreadable: not a readable image.
    """
    with open_image(path) as image:
        return rgb(image)


def to_tensor(image: Image.Image) -> np.ndarray:
    """RGB image of W x H pixels to float32 (3, H, W): /255, less ImageNet's mean, by its deviation."""
    return np.ascontiguousarray(((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1))


def preprocess(image: Image.Image, image_size: int, resize_size: int) -> np.ndarray:
    """The published evaluation preprocessing, to float32 (3, image_size, image_size).

    Shorter side to `resize_size` pixels (the longer one truncated, bilinear with antialiasing), centre crop, normalise.
    """
    image = middle(image)
    width, height = image.size
    scale = resize_size / min(width, height)
    if width <= height:
        size = (resize_size, int(resize_size * height / width))
    else:
        size = (int(resize_size * width / height), resize_size)
    if scale != 1:
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - image_size) / 2) for side in size)
    return to_tensor(image.crop((left, top, left + image_size, top + image_size)))


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop and horizontal flip.

    crop_scale, crop_ratio: range of the crop's share of the image's area and of its width / height, both drawn as in
    the Inception recipe (the ratio log-uniformly); flip: probability of the flip.
    """

    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """A crop (left, top, right, bottom) within (width, height); the largest centred one if ten draws do not fit."""
        low, high = np.log(self.crop_ratio)
        for _ in range(10):
            area = width * height * rng.uniform(*self.crop_scale)
            ratio = np.exp(rng.uniform(low, high))
            w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
                return int(left), int(top), int(left + w), int(top + h)
        w = min(width, round(height * self.crop_ratio[1]))
        h = min(height, round(width / self.crop_ratio[0]))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def __call__(self, image: Image.Image, image_size: int, rng: np.random.Generator) -> np.ndarray:
        """One augmented view of `image`, float32 (3, image_size, image_size)."""
        box = self.box(*image.size, rng)
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(image)


def training_loader(folder: ImageFolder, args: argparse.Namespace) -> Loader:
    """Reads augmented images as the settings say."""
    augment = Augmentation(tuple(args.crop_scale), tuple(args.crop_ratio), args.flip)
    size, seed = args.image_size, args.seed

    def view(path: Path, row: int, epoch: int) -> np.ndarray:
        return augment(decode(path), size, np.random.default_rng([seed, epoch, AUGMENT, row]))

    workers = reading_processes(args.num_workers, args.device_num)
    return Loader(folder, view, (3, size, size), args.batch_size, workers)


def evaluation_loader(folder: ImageFolder, args: argparse.Namespace, devices: int = 1) -> Loader:
    """Reads images with the published preprocessing."""
    size, resize = args.image_size, args.resize_size

    def view(path: Path, row: int, epoch: int) -> np.ndarray:
        return preprocess(decode(path), size, resize)

    return Loader(folder, view, (3, size, size), args.batch_size, reading_processes(args.num_workers, devices))


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
