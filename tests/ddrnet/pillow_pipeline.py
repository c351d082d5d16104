"""DDRNet's training augmentation written with Pillow and NumPy alone: a second opinion, and what to be faster than.

Straightforward: the whole file is decoded, every step is a call of Pillow's that does it, the result is normalised and
erased. `OPERATIONS` are Pillow's own on an image, with the argument that the operation takes.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
FILL = (124, 116, 104)
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def warp(image: Image.Image, matrix: tuple, resample: Image.Resampling) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=FILL)


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """No bits at all, which the strongest setting asks for, is black; recent Pillows refuse it."""
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


def solarize_add(image: Image.Image, addend: int) -> Image.Image:
    table = [min(255, level + addend) if level < 128 else level for level in range(256)]
    return image.point(table * 3)


WARPS = {
    "Rotate": lambda image, v, resample: image.rotate(v, resample, fillcolor=FILL),
    "ShearX": lambda image, v, resample: warp(image, (1, v, 0, 0, 1, 0), resample),
    "ShearY": lambda image, v, resample: warp(image, (1, 0, 0, v, 1, 0), resample),
    "TranslateXRel": lambda image, v, resample: warp(image, (1, 0, v * image.width, 0, 1, 0), resample),
    "TranslateYRel": lambda image, v, resample: warp(image, (1, 0, 0, 0, 1, v * image.height), resample),
}
LEVELS = {
    "AutoContrast": lambda image, v: ImageOps.autocontrast(image),
    "Equalize": lambda image, v: ImageOps.equalize(image),
    "Invert": lambda image, v: ImageOps.invert(image),
    "Posterize": posterize,
    "Solarize": lambda image, v: ImageOps.solarize(image, v),
    "SolarizeAdd": solarize_add,
}
BLENDS = {
    "Color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "Contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "Brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "Sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
}


def increasing_argument(name: str, magnitude: float, sign: int) -> float | None:
    """The argument of an operation at a magnitude of 0 to 10, for severities that increase with it."""
    if name == "Rotate":
        return sign * magnitude / 10 * 30
    if name in ("ShearX", "ShearY"):
        return sign * magnitude / 10 * 0.3
    if name in ("TranslateXRel", "TranslateYRel"):
        return sign * magnitude / 10 * 0.45
    if name in BLENDS:
        return max(0.1, 1 + sign * magnitude / 10 * 0.9)
    return {
        "Posterize": 4 - int(magnitude / 10 * 4),
        "Solarize": 256 - int(magnitude / 10 * 256),
        "SolarizeAdd": int(magnitude / 10 * 110),
    }.get(name)


def apply(name: str, image: Image.Image, argument: float | None, resample: Image.Resampling) -> Image.Image:
    if name in WARPS:
        return WARPS[name](image, argument, resample)
    return {**LEVELS, **BLENDS}[name](image, argument)


def decode(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = rng.uniform(0.08, 1) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resize(image: Image.Image, box: tuple, size: int, resample: Image.Resampling) -> Image.Image:
    return image.resize((size, size), resample, box=box)


def rand_augment(image: Image.Image, magnitude: float, std: float, resample, rng: np.random.Generator) -> Image.Image:
    """Two operations with probability 0.5 each."""
    names = [*LEVELS, *BLENDS, *WARPS]
    for _ in range(2):
        name = names[rng.integers(len(names))]
        if rng.random() < 0.5:
            strength = min(10, max(0, rng.normal(magnitude, std)))
            sign = 1 if rng.random() < 0.5 else -1
            image = apply(name, image, increasing_argument(name, strength, sign), resample)
    return image


def normalise(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image, np.float32)
    pixels *= 1 / (255 * STD)
    pixels -= MEAN / STD
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def erase(tensor: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """One area of normal noise per pixel."""
    _, height, width = tensor.shape
    if rng.random() < probability:
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width
            ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                tensor[:, top : top + h, left : left + w] = rng.standard_normal((3, h, w), np.float32)
                break
    return tensor


def train_view(path: Path, size: int, rng: np.random.Generator) -> np.ndarray:
    """The documented training augmentation: bicubic, rand-m9-mstd0.5-inc1, erasing with noise at 0.25."""
    image = decode(path)
    image = resize(image, crop_box(*image.size, rng), size, BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = rand_augment(image, 9, 0.5, BICUBIC, rng)
    return erase(normalise(image), 0.25, rng)
