"""RandAugment (Cubuk et al., arXiv:1909.13719) with the operations, ranges and settings string of timm.

Images are uint8 (H, W, 3), RGB. Each operation gives what Pillow's of the same name gives: look-up tables to the last
bit, blends to within one grey level, warps but for the interpolation's rounding and their outermost pixels.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from utils.cli import UserError
from utils.opencv import cv2

# What a warp moves in from outside: ImageNet's mean colour.
FILL = (124, 116, 104)
LEVELS = np.arange(256)
# Pillow's filter SMOOTH.
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def _blend(other: float, image: np.ndarray, factor: float) -> np.ndarray:
    """The constant grey `other` at factor 0, the image at 1, extrapolated beyond; fractions cut off as Pillow does."""
    table = np.float32(other) + np.float32(factor) * (LEVELS - other).astype(np.float32)
    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))


def _mix(other: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """The same with an image for the grey. OpenCV rounds, and the -0.499 makes that Pillow's cutting off."""
    return cv2.addWeighted(image, factor, other, 1 - factor, -0.499)


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Each channel stretched to 0..255."""
    table = np.empty((256, 1, 3), np.uint8)
    for channel, plane in enumerate(cv2.split(image)):
        low, high, _, _ = cv2.minMaxLoc(plane)
        scale = 255 / (high - low) if high > low else 1.0
        offset = -low * scale if high > low else 0.0
        table[:, 0, channel] = np.clip((LEVELS * scale + offset).astype(int), 0, 255)
    return cv2.LUT(image, table)


def equalize(image: np.ndarray) -> np.ndarray:
    """Each channel's histogram made flat."""
    table = np.empty((256, 1, 3), np.uint8)
    for channel in range(3):
        count = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(int)
        step = (count.sum() - count[np.flatnonzero(count)[-1]]) // 255
        below = np.cumsum(count) - count
        table[:, 0, channel] = np.minimum((step // 2 + below) // step, 255) if step else LEVELS
    return cv2.LUT(image, table)


def invert(image: np.ndarray) -> np.ndarray:
    """255 - image."""
    return cv2.bitwise_not(image)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """The `bits` highest bits, 0 to 8."""
    return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Levels from `threshold`, 0 to 256, on inverted."""
    return cv2.LUT(image, np.where(threshold > LEVELS, LEVELS, 255 - LEVELS).astype(np.uint8))


def solarize_add(image: np.ndarray, addend: int) -> np.ndarray:
    """`addend` added to the levels below 128."""
    return cv2.LUT(image, np.where(LEVELS < 128, np.minimum(LEVELS + addend, 255), LEVELS).astype(np.uint8))


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Saturation: grey at factor 0, the image at 1."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _mix(grey, image, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Contrast: the mean grey at factor 0, the image at 1."""
    return _blend(int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5), image, factor)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Brightness: black at factor 0, the image at 1."""
    return _blend(0, image, factor)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Sharpness: smoothed at factor 0, the image at 1; the outermost pixels stay."""
    sharp = _mix(cv2.filter2D(image, -1, SMOOTH), image, factor)
    sharp[[0, -1]] = image[[0, -1]]
    sharp[:, [0, -1]] = image[:, [0, -1]]
    return sharp


def affine(image: np.ndarray, matrix: tuple[float, ...], interpolation: int) -> np.ndarray:
    """Pillow's affine transform: the point (x, y) of the result is (ax + by + c, dx + ey + f) of the image.

    Pixel k covers k to k + 1, as Pillow has it; OpenCV counts from the pixels' centres.
    """
    a, b, c, d, e, f = matrix
    centred = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    return cv2.warpAffine(
        image,
        centred,
        image.shape[1::-1],
        flags=interpolation | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=FILL,
    )


def rotate(image: np.ndarray, degrees: float, interpolation: int) -> np.ndarray:
    """Turned about the centre, counter-clockwise."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = image.shape[1] / 2, image.shape[0] / 2
    return affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), interpolation)


def shear_x(image: np.ndarray, factor: float, interpolation: int) -> np.ndarray:
    """Row y moved left by `factor` * y."""
    return affine(image, (1, factor, 0, 0, 1, 0), interpolation)


def shear_y(image: np.ndarray, factor: float, interpolation: int) -> np.ndarray:
    """Column x moved up by `factor` * x."""
    return affine(image, (1, 0, 0, factor, 1, 0), interpolation)


def translate_x(image: np.ndarray, share: float, interpolation: int) -> np.ndarray:
    """Moved left by `share` of the width."""
    return affine(image, (1, 0, share * image.shape[1], 0, 1, 0), interpolation)


def translate_y(image: np.ndarray, share: float, interpolation: int) -> np.ndarray:
    """Moved up by `share` of the height."""
    return affine(image, (1, 0, 0, 0, 1, share * image.shape[0]), interpolation)


@dataclass(frozen=True)
class Operation:
    """One operation: what it does, and its argument as a function of level (0 to 1) and sign (-1 or 1).

    argument: None if there is none; increasing: for severities that grow with the level, if other than `argument`;
    warp: `apply` takes the interpolation too.
    """

    apply: Callable[..., np.ndarray]
    argument: Callable[[float, int], float] | None = None
    increasing: Callable[[float, int], float] | None = None
    warp: bool = False


def _factor(level: float, sign: int) -> float:
    return 0.1 + 1.8 * level


def _increasing_factor(level: float, sign: int) -> float:
    return max(0.1, 1 + 0.9 * level * sign)


OPERATIONS = {
    "AutoContrast": Operation(auto_contrast),
    "Equalize": Operation(equalize),
    "Invert": Operation(invert),
    "Rotate": Operation(rotate, lambda level, sign: 30 * level * sign, warp=True),
    "Posterize": Operation(posterize, lambda level, sign: int(4 * level), lambda level, sign: 4 - int(4 * level)),
    "Solarize": Operation(solarize, lambda level, sign: int(256 * level), lambda level, sign: 256 - int(256 * level)),
    "SolarizeAdd": Operation(solarize_add, lambda level, sign: int(110 * level)),
    "Color": Operation(color, _factor, _increasing_factor),
    "Contrast": Operation(contrast, _factor, _increasing_factor),
    "Brightness": Operation(brightness, _factor, _increasing_factor),
    "Sharpness": Operation(sharpness, _factor, _increasing_factor),
    "ShearX": Operation(shear_x, lambda level, sign: 0.3 * level * sign, warp=True),
    "ShearY": Operation(shear_y, lambda level, sign: 0.3 * level * sign, warp=True),
    "TranslateXRel": Operation(translate_x, lambda level, sign: 0.45 * level * sign, warp=True),
    "TranslateYRel": Operation(translate_y, lambda level, sign: 0.45 * level * sign, warp=True),
}
NAMES = tuple(OPERATIONS)


@dataclass(frozen=True)
class RandAugment:
    """`layers` operations drawn from `OPERATIONS`, each applied with `probability`.

    magnitude: 0 to 10; magnitude_std: deviation of the normal noise that each operation adds to it (the sum is cut to
    0..10); increasing: severities grow with the magnitude, where otherwise factors run from 0.1 to 1.9, and Posterize
    and Solarize get weaker.
    """

    magnitude: float = 10.0
    magnitude_std: float = 0.0
    increasing: bool = False
    layers: int = 2
    probability: float = 0.5

    def argument(self, name: str, rng: np.random.Generator) -> float | None:
        """A random argument for the operation `name`, which must take one."""
        operation = OPERATIONS[name]
        noise = self.magnitude_std * rng.standard_normal()
        level = min(max(self.magnitude + noise, 0.0), 10.0) / 10
        increasing = self.increasing and operation.increasing
        return (increasing or operation.argument)(level, 1 if rng.random() < 0.5 else -1)

    def __call__(self, image: np.ndarray, interpolation: int, rng: np.random.Generator) -> np.ndarray:
        """The augmented image, uint8 (H, W, 3); warps use OpenCV's `interpolation`."""
        for _ in range(self.layers):
            name = NAMES[rng.integers(len(NAMES))]
            if rng.random() >= self.probability:
                continue
            operation = OPERATIONS[name]
            arguments = [self.argument(name, rng)] if operation.argument else []
            image = operation.apply(image, *arguments, *([interpolation] if operation.warp else []))
        return image


# Part of the settings string: field, type, least and greatest value.
PARTS = {
    "m": ("magnitude", float, 0, 10),
    "mstd": ("magnitude_std", float, 0, 10),
    "inc": ("increasing", int, 0, 1),
    "n": ("layers", int, 1, 15),
    "p": ("probability", float, 0, 1),
}


def parse_auto_augment(text: str | None) -> RandAugment | None:
    """timm's settings string, such as `rand-m9-mstd0.5-inc1`; None for `none` (or None).

    Raises:
        UserError: an unknown, repeated or incomplete part, or a value out of its range.
    """
    if text in (None, "none"):
        return None
    policy, *parts = text.split("-")
    if policy != "rand":
        raise UserError(f"auto_augment {text!r} is not known; write none, or something like rand-m9-mstd0.5-inc1")
    settings = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if not match or match[1] not in PARTS:
            raise UserError(
                f"auto_augment {text!r}: {part!r} is not known; the parts are m, mstd, inc, n and p, each followed by "
                "a number, as in rand-m9-mstd0.5-inc1"
            )
        field, kind, least, greatest = PARTS[match[1]]
        value = float(match[2])
        if field in settings:
            raise UserError(f"auto_augment {text!r} gives {match[1]} twice; leave one of them out")
        if not least <= value <= greatest or value != kind(value):
            number = "a whole number" if kind is int else "a number"
            raise UserError(f"auto_augment {text!r}: {match[1]} must be {number} from {least} to {greatest}")
        settings[field] = kind(value)
    return RandAugment(**settings)
