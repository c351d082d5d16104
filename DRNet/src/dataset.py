"""ImageNet-layout folders, and the published evaluation and the paper's training preprocessing.

Everything random is drawn from (seed, epoch, image): it does not depend on workers, batch size or interruptions.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.cli import UserError

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


class ImageFolder:
    """The images of one split: `<root>/<class>/<image>`.

    A class's label is its position among the sorted class folders or, if the file `classes.txt` stands in the folder or
    beside it, its line there: so a sample of a data set keeps the labels of the whole.

    Attributes:
        paths: the image files, by class, then by name.
        labels: int32 (len(paths),).
        classes: class names in label order.

    Raises:
        UserError: no such folder, no class folders, a class folder without images or not in `classes.txt`.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"no folder {root}; set --data_path to an ImageNet root (with train/ and val/) or a split")
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise UserError(f"{root} has no class folders; images belong into {root}/<class>/")
        listing = next((path for path in (root / "classes.txt", root.parent / "classes.txt") if path.is_file()), None)
        self.classes = listing.read_text().split("\n") if listing else [folder.name for folder in folders]
        self.classes = [name.strip() for name in self.classes if name.strip()]
        number = {name: label for label, name in enumerate(self.classes)}
        self.paths: list[Path] = []
        labels: list[int] = []
        for folder in folders:
            if folder.name not in number:
                raise UserError(f"class folder {folder} is not in {listing}; add it there or move the folder away")
            images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
            if not images:
                raise UserError(f"class folder {folder} holds no images; fill it or remove it (and check the labels)")
            self.paths += images
            labels += [number[folder.name]] * len(images)
        self.labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self.paths)


class CorruptImages:
    """Called with the row of each image that cannot be read: names it once, or stops there if `strict`."""

    def __init__(self, folder: ImageFolder, strict: bool):
        self.folder = folder
        self.strict = strict
        self.rows: set[int] = set()

    def __call__(self, row: int) -> None:
        path = self.folder.paths[row]
        if self.strict:
            raise UserError(f"{path} cannot be read as an image; replace it, or leave out --strict")
        if row not in self.rows:
            print(f"warning: {path} cannot be read as an image; going on without it", file=sys.stderr, flush=True)
        self.rows.add(row)


def open_split(data_path: str | Path, split: str, num_classes: int) -> ImageFolder:
    """The images of `split` ("train" or "val") under the root `data_path`, or of `data_path` if it is a split itself.

    Raises:
        UserError: as `ImageFolder`; also if the number of classes is not `num_classes`.
    """
    root = Path(data_path)
    if (root / split).is_dir():
        root = root / split
    elif (root / "train").is_dir() or (root / "val").is_dir():
        raise UserError(
            f"{root} has no {split}/; add it, or set --data_path to the folder that holds the class folders"
        )
    images = ImageFolder(root)
    if len(images.classes) != num_classes:
        raise UserError(
            f"{root} has {len(images.classes)} classes, not {num_classes}; set --num_classes {len(images.classes)}, "
            "or, if it is a part of a larger data set, list all class names in a file classes.txt beside it"
        )
    return images


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


@dataclass(frozen=True)
class Batch:
    """images float32 (n, 3, S, S), labels int32 (n,), rows int (n,): positions in the `ImageFolder`; n may be 0.

    `corrupt` lists the rows whose files cannot be read; they are in none of the arrays.
    """

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    corrupt: list[int]


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
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
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

    order = np.random.default_rng([seed, epoch, 0]).permutation(len(folder))
    steps = len(folder) // (batch_size * ranks)
    order = order[: steps * batch_size * ranks].reshape(steps, ranks, batch_size)[first_step:, rank].ravel()
    return _batches(folder, order.tolist(), view, batch_size, num_workers)
