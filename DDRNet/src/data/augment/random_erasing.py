"""Random erasing (Zhong et al., arXiv:1708.04896) with the ranges and modes of timm."""

import math
from dataclasses import dataclass

import numpy as np

from utils.cli import UserError

MODES = ("const", "rand", "pixel")


@dataclass(frozen=True)
class RandomErasing:
    """Overwrites 1 to `count` areas of a normalised image, with `probability`.

    mode: "const" writes zeros (the mean colour), "rand" one normally distributed colour per area, "pixel" normal noise.
    An area is 0.02 to 1/3 of the image, divided by the number of areas, and height / width 0.3 to 1 / 0.3,
    log-uniformly; it is left out if ten draws do not fit.

    Raises:
        UserError: an unknown mode, or a number out of its range.
    """

    probability: float
    mode: str
    count: int

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"re_mode {self.mode!r} is not known; choose one of {', '.join(MODES)}")
        if not 0 <= self.probability <= 1:
            raise UserError(f"re_prob is {self.probability}; set it to a number from 0 to 1")
        if self.count < 1:
            raise UserError(f"re_count is {self.count}; set it to 1 or more")

    def areas(self, height: int, width: int, rng: np.random.Generator) -> list[tuple[slice, slice]]:
        """The areas to erase, (rows, columns) each."""
        count = int(rng.integers(1, self.count + 1))
        found = []
        for _ in range(count):
            for _ in range(10):
                area = rng.uniform(0.02, 1 / 3) * height * width / count
                ratio = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
                h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
                if 0 < h < height and 0 < w < width:
                    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                    found.append((slice(top, top + h), slice(left, left + w)))
                    break
        return found

    def __call__(self, tensor: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`tensor`, float32 (3, H, W), changed in place."""
        if rng.random() >= self.probability:
            return tensor
        for rows, columns in self.areas(*tensor.shape[1:], rng):
            area = tensor[:, rows, columns]
            if self.mode == "const":
                area[:] = 0
            else:
                area[:] = rng.standard_normal(area.shape if self.mode == "pixel" else (3, 1, 1), dtype=np.float32)
        return tensor
