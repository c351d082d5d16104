"""Random resized crop of an image file, which decodes no more detail than the crop needs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.images import Unreadable, decoding, open_image, rgb
from utils.opencv import cv2

END_OF_JPEG = b"\xff\xd9"
# JPEG decoding to a half, a quarter and an eighth of each side, out of the DCT coefficients.
REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def decode(data: bytes, image: Image.Image, shrink: int) -> np.ndarray:
    """The image file `data`, opened by Pillow as `image`, as uint8 (ceil(H / shrink), ceil(W / shrink), 3), RGB.

    Sides are shrunk by 1, 2, 4 or 8 without aliasing. The Exif orientation is ignored, as Pillow does. OpenCV decodes
    whole RGB and grey JPEGs; Pillow decodes whatever the two see differently (CMYK, 16 bits, palettes) and JPEGs that
    do not end as they should. Of a truncated one it raises, while OpenCV before 4.11 returns a part.

    Raises:
        Unreadable: not a readable image.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not data.endswith(END_OF_JPEG):
        return np.asarray(rgb(image).reduce(shrink))
    with decoding():
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), REDUCED[shrink] | cv2.IMREAD_IGNORE_ORIENTATION)
    width, height = image.size
    if pixels is None or pixels.shape[:2] != (-(-height // shrink), -(-width // shrink)):
        raise Unreadable("the JPEG data cannot be decoded")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, resized to a square: Szegedy et al., "Going deeper with convolutions", section 6.

    size: side of the result in pixels; scale: range of the crop's share of the image's area; ratio: range of its
    width / height, drawn log-uniformly.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """A crop (left, top, right, bottom) within (width, height); the largest centred one if ten draws do not fit."""
        low, high = np.log(self.ratio)
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = np.exp(rng.uniform(low, high))
            w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        w = max(1, min(width, round(height * self.ratio[1])))
        h = max(1, min(height, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def shrink(self, box: tuple[int, int, int, int]) -> int:
        """The largest of 1, 2, 4, 8 that leaves each side of `box` at least `size` pixels."""
        side = min(box[2] - box[0], box[3] - box[1])
        return next((shrink for shrink in (8, 4, 2) if side >= shrink * self.size), 1)

    def __call__(self, path: Path, interpolation: int, rng: np.random.Generator) -> np.ndarray:
        """A crop of the image file `path`, resized with OpenCV's `interpolation`: uint8 (size, size, 3), RGB.

        Raises:
            Unreadable: not a readable image.
        """
        with open_image(path) as image:
            box = self.box(*image.size, rng)
            shrink = self.shrink(box)
            pixels = decode(path.read_bytes(), image, shrink)
        left, top, right, bottom = (round(edge / shrink) for edge in box)
        return cv2.resize(pixels[top:bottom, left:right], (self.size, self.size), interpolation=interpolation)
