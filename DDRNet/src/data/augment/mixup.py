"""Mixup (Zhang et al., arXiv:1710.09412) and CutMix (Yun et al., arXiv:1905.04899) of a batch, with timm's modes."""

from dataclasses import dataclass

import numpy as np

from utils.cli import UserError
from utils.opencv import cv2

MODES = ("batch", "pair", "elem")


def smooth_one_hot(labels: np.ndarray, num_classes: int, smoothing: float) -> np.ndarray:
    """Targets float32 (n, K) of labels int (n,): smoothing / K, and 1 - smoothing more at the label."""
    targets = np.full((len(labels), num_classes), smoothing / num_classes, np.float32)
    targets[np.arange(len(labels)), labels] = 1 - smoothing + smoothing / num_classes
    return targets


def random_box(height: int, width: int, keep: float, rng: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a box of 1 - `keep` of the area and the image's shape; its centre uniform, its edges cut."""
    side = np.sqrt(1 - keep)
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    return slice(max(y - half_h, 0), min(y + half_h, height)), slice(max(x - half_w, 0), min(x + half_w, width))


@dataclass(frozen=True)
class Mixup:
    """Mixes image i of n with image n - 1 - i, and their targets alike.

    mix_up, cutmix: alpha of the share lambda ~ Beta(alpha, alpha) of the image itself, 0 turns the method off; prob:
    probability of mixing at all; switch_prob: that of CutMix, if both are on; mode: "batch" draws once for all images,
    "pair" once for i and n - 1 - i, "elem" for each image.

    Raises:
        UserError: an unknown mode, or a number out of its range.
    """

    mix_up: float
    cutmix: float
    prob: float
    switch_prob: float
    mode: str
    label_smoothing: float
    num_classes: int

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"mixup_mode {self.mode!r} is not known; choose one of {', '.join(MODES)}")
        for name, value in (("mix_up", self.mix_up), ("cutmix", self.cutmix)):
            if value < 0:
                raise UserError(f"{name} is {value}; set it to 0, which turns it off, or more")
        for name, value in (
            ("mixup_prob", self.prob),
            ("switch_prob", self.switch_prob),
            ("label_smoothing", self.label_smoothing),
        ):
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value}; set it to a number from 0 to 1")

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[float, tuple[slice, slice] | None]:
        """lambda and CutMix's box: (1, None) for no mixing, (lambda, None) for mixup.

        With a box, lambda is the share of the image's pixels outside of it.
        """
        if not (self.mix_up or self.cutmix) or rng.random() >= self.prob:
            return 1.0, None
        if not (self.cutmix and (not self.mix_up or rng.random() < self.switch_prob)):
            return float(rng.beta(self.mix_up, self.mix_up)), None
        rows, columns = random_box(height, width, rng.beta(self.cutmix, self.cutmix), rng)
        return 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width), (rows, columns)

    def __call__(
        self, images: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mixed images float32 (n, 3, H, W) and targets float32 (n, K); the arguments are left as they are.

        Args:
            images: float32 (n, 3, H, W).
            labels: int (n,).

        Raises:
            UserError: mode "pair" with an odd number of images.
        """
        count, (height, width) = len(images), images.shape[2:]
        if self.mode == "pair" and count % 2:
            raise UserError(
                f"mixup_mode pair needs an even batch size, not {count}; change it, or choose batch or elem"
            )
        draws = {"batch": 1, "pair": count // 2, "elem": count}[self.mode]
        plan = [self.draw(height, width, rng) for _ in range(draws)]
        if self.mode == "batch":
            plan = plan * count
        elif self.mode == "pair":
            plan = plan + plan[::-1]
        images = np.asarray(images, np.float32)
        mixed = np.empty(images.shape, np.float32)
        # i and its partner one after the other, while both are in the cache.
        for i in np.column_stack((np.arange(count), np.arange(count)[::-1])).ravel()[:count]:
            image, partner, (keep, box) = images[i], images[count - 1 - i], plan[i]
            if box is None and keep != 1:
                flat = (-1, width)
                cv2.addWeighted(image.reshape(flat), keep, partner.reshape(flat), 1 - keep, 0, mixed[i].reshape(flat))
                continue
            mixed[i] = image
            if box:
                rows, columns = box
                mixed[i, :, rows, columns] = partner[:, rows, columns]
        targets = smooth_one_hot(labels, self.num_classes, self.label_smoothing)
        keep = np.array([keep for keep, _ in plan], np.float32)[:, None]
        return mixed, keep * targets + (1 - keep) * targets[::-1]
