"""Images of many sizes, shapes and formats, written with Pillow and OpenCV."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

JPEGS = ("jpeg", "4:4:4", "progressive", "grey", "exif", "cmyk")
PNGS = ("png", "palette", "alpha", "grey png", "exif png", "deep", "deep grey", "exif deep grey")
BMPS = ("bmp", "palette bmp", "grey bmp", "alpha bmp")
WEBPS = ("webp", "alpha webp", "exif webp", "lossy webp", "lossy alpha webp")
KINDS = (*JPEGS, *PNGS, *BMPS, *WEBPS)
ENDINGS = {"JPEG": JPEGS, "png": PNGS, "bmp": BMPS, "webp": WEBPS}


def digit(number: int, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """RGB image of a scanned digit: bright, slightly coloured strokes on black, with a little noise."""
    scan = np.uint8((load_digits().images[number] * (255 / 16)).round())
    grey = np.asarray(Image.fromarray(scan).resize((width, height), Image.Resampling.BICUBIC), np.float64)
    pixels = grey[..., None] * rng.uniform(0.9, 1, 3) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write(image: Image.Image, kind: str, path: Path) -> None:
    """Write the RGB image as one of `KINDS`."""
    pixels = np.asarray(image)
    words = kind.split()
    options = {"4:4:4": {"subsampling": 0}, "progressive": {"progressive": True, "quality": 90}}.get(kind, {})
    if "webp" in words:
        options["lossless"] = "lossy" not in words
    if "exif" in words:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6  # orientation
    if "deep" in words and "grey" in words:  # 16 bits
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 2)
    elif "deep" in words:  # 16 bits a channel, which Pillow cannot write
        cv2.imwrite(str(path), pixels[..., ::-1].astype(np.uint16) * 257 + 100)
        return
    elif "grey" in words:
        image = image.convert("L")
    elif "palette" in words:
        image = image.quantize(32)
    elif "alpha" in words:
        image.putalpha(Image.fromarray(pixels[..., 0] // 2))
    elif "cmyk" in words:  # what the three inks have in common is printed in black
        inks = 255 - pixels
        black = inks.min(2, keepdims=True)
        image = Image.fromarray(np.concatenate([inks - black, black], 2), "CMYK")
    image.save(path, **options)


def make(folder: Path, count: int, largest: int = 700) -> list[Path]:
    """`count` images of digits in ten class folders, kinds by turns, sides from 1 to `largest` pixels."""
    rng = np.random.default_rng(0)
    targets = load_digits().target
    paths = []
    for number in range(count):
        width, height = (int(side) for side in np.exp(rng.uniform(np.log(12), np.log(largest), 2)))
        if number % 25 == 24:
            width, height = ((1, 50), (50, 1), (1, 1), (1200, 20))[number // 25 % 4]
        kind = KINDS[number % len(KINDS)]
        (ending,) = (ending for ending, kinds in ENDINGS.items() if kind in kinds)
        path = folder / str(targets[number]) / f"{number:05d} {kind.replace(':', '')}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(digit(number, width, height, rng), kind, path)
        paths.append(path)
    return paths
