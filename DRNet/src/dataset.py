"""The published evaluation and the paper's training preprocessing.

Everything random is drawn from (seed, epoch, image): it does not depend on workers, batch size or interruptions.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.images import UNREADABLE, Batch, ImageFolder, epoch_rows

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def decode(path: Path) -> Image.Image:
    """The image as 8-bit RGB.

    Raises:
        OSError, ValueError, SyntaxError: not a readable image.
    """
    with Image.open(path) as image:
        return image.convert("RGB")


def to_tensor(image: Image.Image) -> np.ndarray:
    """RGB image of W x H pixels to float32 (3, H, W): /255, less ImageNet's mean, by its deviation."""
    return np.ascontiguousarray(((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1))


def preprocess(image: Image.Image, image_size: int, resize_size: int) -> np.ndarray:
    """The published evaluation preprocessing, to float32 (3, image_size, image_size).

    Shorter side to `resize_size` pixels (the longer one truncated, bilinear with antialiasing), centre crop, normalise.
    """
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


def _batches(
    folder: ImageFolder,
    rows: Sequence[int],
    to_array: Callable[[Image.Image, int], np.ndarray],
    batch_size: int,
    num_workers: int,
) -> Iterator[Batch]:
    """The images `rows` of `folder`, each made an array by `to_array(image, row)`, in order, two batches read ahead.

    Threads do it, because decoding and resizing release the interpreter lock. (MindSpore's own pipeline would take over
    the process's signals, and Ctrl-C would end a training without saving it.)
    """

    def read(row: int) -> np.ndarray | None:
        try:
            return to_array(decode(folder.paths[row]), row)
        except UNREADABLE:
            return None

    def batch(rows: Sequence[int], futures: list[Future]) -> Batch:
        arrays = [future.result() for future in futures]
        good = np.array([row for row, array in zip(rows, arrays) if array is not None], int)
        corrupt = [row for row, array in zip(rows, arrays) if array is None]
        images = [array for array in arrays if array is not None]
        return Batch(np.stack(images) if images else np.zeros(0), folder.labels[good], good, corrupt)

    pool = ThreadPoolExecutor(num_workers)
    ahead: deque = deque()
    try:
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            ahead.append((part, [pool.submit(read, row) for row in part]))
            if len(ahead) > 2:
                yield batch(*ahead.popleft())
        while ahead:
            yield batch(*ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def evaluation_batches(
    folder: ImageFolder,
    image_size: int,
    resize_size: int,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """Every image of `folder` once, in order (every `ranks`-th, for one of several processes), the last batch short."""

    def view(image: Image.Image, row: int) -> np.ndarray:
        return preprocess(image, image_size, resize_size)

    return _batches(folder, range(rank, len(folder), ranks), view, batch_size, num_workers)


def training_batches(
    folder: ImageFolder,
    image_size: int,
    augment: Augmentation,
    batch_size: int,
    num_workers: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """The augmented batches of one epoch from step `first_step` on; an incomplete last one is left out.

    The order is drawn from (seed, epoch). Step k takes the same `batch_size * ranks` images for any number of
    processes; process `rank` gets the `rank`-th part of them.
    """

    def view(image: Image.Image, row: int) -> np.ndarray:
        return augment(image, image_size, np.random.default_rng([seed, epoch, 1, row]))

    rows = epoch_rows(len(folder), batch_size, seed, epoch, first_step, rank, ranks)
    return _batches(folder, rows, view, batch_size, num_workers)
