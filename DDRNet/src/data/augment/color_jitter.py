"""Random brightness, contrast and saturation."""

from dataclasses import dataclass

import numpy as np

from src.data.augment.rand_augment import brightness, color, contrast


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation, in random order, each by a factor from [max(0, 1 - amount), 1 + amount]."""

    amount: float

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The changed image, uint8 (H, W, 3), RGB."""
        for number in rng.permutation(3):
            image = (brightness, contrast, color)[number](image, rng.uniform(max(0, 1 - self.amount), 1 + self.amount))
        return image
