"""Images for training and evaluation: which, in what order, prepared how.

Everything random is drawn from the seed and from what it is drawn for: an image's crop and flip from (seed, epoch,
image). So it does not depend on the number of reading processes or on interruptions. Does not import MindSpore.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.images import ImageFolder, Loader, epoch_rows, filled, open_image, reading_processes, rgb

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
# (3, 256): what each level of each channel becomes.
NORMALISED = ((np.arange(256)[:, None] / 255 - MEAN) / STD).T.astype(np.float32)
# The authors cut out the centre as if it came from images this many pixels larger than what the network sees.
AUTHORS_MARGIN = 32

# What a stream of random numbers is for: third part of its seed. (0 is the order, in `epoch_rows`.)
AUGMENT, DROPOUT = 1, 2


def normalise(image: Image.Image) -> np.ndarray:
    """RGB image to float32 (3, H, W): /255, less ImageNet's mean, by its deviation."""
    pixels = np.asarray(image)
    return np.stack([table[pixels[..., channel]] for channel, table in enumerate(NORMALISED)])


@dataclass(frozen=True)
class EvalTransform:
    """The documented evaluation: resized to a square of `resize_size`, and its centre of `image_size` (both pixels).

    The aspect ratio is not kept; bilinear with antialiasing (Pillow's).
    """

    image_size: int
    resize_size: int

    def __call__(self, path: Path) -> np.ndarray:
        """The image file `path` as float32 (3, image_size, image_size).

        Raises:
            Unreadable: not a readable image.
        """
        with open_image(path) as image:
            square = rgb(image).resize((self.resize_size, self.resize_size), Image.Resampling.BILINEAR)
        edge = round((self.resize_size - self.image_size) / 2)
        return normalise(square.crop((edge, edge, edge + self.image_size, edge + self.image_size)))


@dataclass(frozen=True)
class AuthorsTransform:
    """The evaluation of the authors' code: a centred square of the image, resized to `image_size` pixels.

    The square's side is image_size / (image_size + 32) of the shorter one; bicubic with antialiasing (Pillow's).
    """

    image_size: int

    def __call__(self, path: Path) -> np.ndarray:
        """The image file `path` as float32 (3, image_size, image_size).

        Raises:
            Unreadable: not a readable image.
        """
        with open_image(path) as image:
            side = min(image.size) * self.image_size / (self.image_size + AUTHORS_MARGIN)
            left, top = (round((length - side) / 2) for length in image.size)
            # Pillow rounds the other two edges.
            square = rgb(image).crop((left, top, left + side, top + side))
        return normalise(square.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop (Szegedy et al., "Going deeper with convolutions", section 6) and horizontal flip.

    Args:
        image_size: side of the result in pixels.
        crop_scale, crop_ratio: range of the crop's share of the image's area and of its width / height, the latter
            drawn log-uniformly.
        flip: probability of the flip.
    """

    image_size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float

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
            view = rgb(image).resize((side, side), Image.Resampling.BICUBIC, box)
        if rng.random() < self.flip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
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


def training_loader(folder: ImageFolder, args: argparse.Namespace, devices: int = 1) -> Loader:
    """Reads augmented images as the settings say."""
    transform = TrainTransform(args.image_size, tuple(args.crop_scale), tuple(args.crop_ratio), args.flip)
    seed = args.seed

    def view(path: Path, row: int, epoch: int) -> np.ndarray:
        return transform(path, np.random.default_rng([seed, epoch, AUGMENT, row]))

    shape = (3, args.image_size, args.image_size)
    return Loader(folder, view, shape, args.batch_size, reading_processes(args.num_workers, devices))


def evaluation_loader(
    folder: ImageFolder, args: argparse.Namespace, devices: int = 1, preprocess: str = "documented"
) -> Loader:
    """Reads images with the "documented" or the "authors" preprocessing."""
    transform = EvalTransform(args.image_size, args.resize_size)
    if preprocess == "authors":
        transform = AuthorsTransform(args.image_size)
    shape = (3, args.image_size, args.image_size)
    workers = reading_processes(args.num_workers, devices)
    return Loader(folder, lambda path, row, epoch: transform(path), shape, args.batch_size, workers)


def training_batches(
    loader: Loader, args: argparse.Namespace, epoch: int, first_step: int = 0, rank: int = 0, devices: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray, list[int]]]:
    """This device's batches of an epoch from `first_step` on; an incomplete last step is left out.

    A batch is images float32 (N, 3, S, S), targets float32 (N, K), and the rows whose files cannot be read. Other
    images of the batch take their places, so that every batch is full. Step k takes the same images for any number of
    devices.

    Raises:
        UserError: no image of a batch can be read.
    """
    rows = epoch_rows(len(loader.folder), args.batch_size, args.seed, epoch, first_step, rank, devices)
    for batch in loader.batches(rows, epoch):
        images, labels = filled(batch, args.batch_size, loader.folder)
        yield images, smooth_one_hot(labels, args.num_classes, args.label_smoothing), batch.corrupt


def smooth_one_hot(labels: np.ndarray, num_classes: int, smoothing: float) -> np.ndarray:
    """Targets float32 (N, K) of labels int (N,): `smoothing` is spread over all classes, the label has the rest."""
    targets = np.full((len(labels), num_classes), smoothing / num_classes, np.float32)
    targets[np.arange(len(labels)), labels] += 1 - smoothing
    return targets
