"""From an image file to a normalised float32 array: the training augmentation and the published evaluation."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from src.data.augment.color_jitter import ColorJitter
from src.data.augment.crop import RandomResizedCrop
from src.data.augment.rand_augment import parse_auto_augment
from src.data.augment.random_erasing import RandomErasing
from utils.cli import UserError
from utils.images import open_image, rgb
from utils.opencv import cv2

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
# (3, 256): what each level of each channel becomes.
NORMALISED = np.ascontiguousarray(((np.arange(256)[:, None] / 255 - MEAN) / STD).T, np.float32)
INTERPOLATION = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def normalise(image: np.ndarray) -> np.ndarray:
    """RGB image uint8 (H, W, 3) to float32 (3, H, W): /255, less ImageNet's mean, by its deviation."""
    tensor = np.empty((3, *image.shape[:2]), np.float32)
    for plane, table, out in zip(cv2.split(image), NORMALISED, tensor):
        cv2.LUT(plane, table, out)
    return tensor


class TrainTransform:
    """Random resized crop, horizontal flip, RandAugment or else colour jitter, normalisation, random erasing.

    As in timm, `color_jitter` counts only if `auto_augment` is none.

    Args:
        image_size: side of the result in pixels.
        interpolation: "bilinear" or "bicubic", for the crop and RandAugment's warps; "random" draws one per image.
        color_jitter: greatest change of brightness, contrast and saturation; 0 for none.
        auto_augment: settings of RandAugment as timm writes them, such as rand-m9-mstd0.5-inc1; none or None for none.
        re_prob, re_mode, re_count: probability, filling ("const", "rand", "pixel") and greatest number of areas of
            random erasing.
        crop_scale, crop_ratio: range of the crop's share of the image's area and of its width / height.
        flip: probability of the horizontal flip.

    Raises:
        UserError: a value out of its range.
    """

    def __init__(
        self,
        image_size: int,
        interpolation: str,
        color_jitter: float,
        auto_augment: str | None,
        re_prob: float,
        re_mode: str,
        re_count: int,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ):
        if interpolation not in (*INTERPOLATION, "random"):
            raise UserError(f"interpolation {interpolation!r} is not known; choose bilinear, bicubic or random")
        if color_jitter < 0:
            raise UserError(f"color_jitter is {color_jitter}; set it to 0, which turns it off, or more")
        self.crop = RandomResizedCrop(image_size, tuple(crop_scale), tuple(crop_ratio))
        self.flip = flip
        chosen = INTERPOLATION if interpolation == "random" else [interpolation]
        self.interpolations = [INTERPOLATION[name] for name in chosen]
        self.augment = parse_auto_augment(auto_augment)
        self.jitter = ColorJitter(color_jitter) if color_jitter and not self.augment else None
        self.erase = RandomErasing(re_prob, re_mode, re_count)

    def __call__(self, path: Path, rng: np.random.Generator) -> np.ndarray:
        """One augmented view of the image file `path`, float32 (3, S, S); all that is random comes from `rng`.

        Raises:
            Unreadable: not a readable image.
        """
        interpolation = self.interpolations[rng.integers(len(self.interpolations))]
        image = self.crop(path, interpolation, rng)
        if rng.random() < self.flip:
            image = cv2.flip(image, 1)
        if self.augment:
            image = self.augment(image, interpolation, rng)
        if self.jitter:
            image = self.jitter(image, rng)
        return self.erase(normalise(image), rng)


def resize_side(image_size: int, crop_pct: float) -> int:
    """Side in pixels of the square that evaluation resizes to before it cuts out the centre."""
    return int(image_size / crop_pct)


@dataclass(frozen=True)
class EvalTransform:
    """The published evaluation: resized to a square of `image_size` / `crop_pct`, and its centre.

    The aspect ratio is not kept; bicubic with antialiasing (Pillow's).
    """

    image_size: int
    crop_pct: float

    def __call__(self, path: Path) -> np.ndarray:
        """The image file `path` as float32 (3, image_size, image_size).

        Raises:
            Unreadable: not a readable image.
        """
        side = resize_side(self.image_size, self.crop_pct)
        with open_image(path) as image:
            square = rgb(image).resize((side, side), Image.Resampling.BICUBIC)
        edge = round((side - self.image_size) / 2)
        return normalise(np.asarray(square)[edge : edge + self.image_size, edge : edge + self.image_size])
