"""The images against the published pipeline, Pillow and NumPy; order and augmentation of a training."""

import json
import resource
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from src.dataset import EvalTransform, TrainTransform, evaluation_loader, training_batches, training_loader

from utils.cli import UserError
from utils.images import ImageFolder

EXPECTED = json.loads((Path(__file__).parents[1] / "golden/preprocessing.json").read_text())["DynamicQuant"]
PHOTOGRAPHS = [Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]
BILINEAR = Image.Resampling.BILINEAR


def normalised(pixels) -> np.ndarray:
    """From (H, W, 3) in 0..255, in float64."""
    x = (np.asarray(pixels, np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return x.transpose(2, 0, 1)


def levels(view: np.ndarray) -> np.ndarray:
    """The way back, in whole numbers (H, W, 3)."""
    x = view.transpose(1, 2, 0).astype(np.float64) * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]
    return np.round(255 * x).astype(int)


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """Noise on a gradient, so that colours, contrast and both sides differ."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 120, (height, width, 3)) + np.linspace(0, 135, width)[None, :, None] * [1, 0.6, 0.2]
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of five small images, of which one is of another mode and one is no image."""
    root = tmp_path_factory.mktemp("images")
    for label in range(3):
        (root / str(label)).mkdir()
        for number in range(5):
            picture(root / str(label) / f"{number}.png", 40 + number, 50, 10 * label + number)
    Image.open(root / "1/3.png").convert("P").save(root / "1/3.png")
    (root / "2/1.png").write_bytes(b"no image")
    return ImageFolder(root)


# ===== Evaluation ===== #


@pytest.mark.parametrize("index", [0, 1])
def test_evaluation_is_the_published_preprocessing(index):
    tensor = EvalTransform(224, 256)(PHOTOGRAPHS[index])
    assert tensor.shape == (3, 224, 224) and tensor.dtype == np.float32
    blocks = tensor.reshape(3, 7, 32, 7, 32).mean((2, 4)).ravel()
    np.testing.assert_allclose(blocks, np.ravel(EXPECTED[index]["blocks"]), atol=0.02)
    np.testing.assert_allclose(tensor[:, 100:103, 100:103].ravel(), np.ravel(EXPECTED[index]["probe"]), atol=0.1)


@pytest.mark.parametrize("size", [(100, 301), (301, 100), (256, 256), (333, 500), (40, 40)])
def test_the_shorter_side_is_resized_and_the_middle_cut_out(size, tmp_path):
    path = picture(tmp_path / "noise.png", *size)
    width, height = size
    scaled = (int(73 * width / min(size)), int(73 * height / min(size)))
    left, top = round((scaled[0] - 64) / 2), round((scaled[1] - 64) / 2)
    resized = np.asarray(Image.open(path).resize(scaled, Image.Resampling.BICUBIC))
    wanted = normalised(resized[top : top + 64, left : left + 64])
    np.testing.assert_allclose(EvalTransform(64, 73)(path), wanted, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode in ("L", "CMYK") else "image.png")
    Image.new(mode, (60, 50)).save(path)
    assert EvalTransform(32, 36)(path).shape == (3, 32, 32)
    assert TrainTransform(32, (0.3, 1), (0.75, 1.3), 0.5, 0.4)(path, np.random.default_rng(0)).shape == (3, 32, 32)


def test_evaluation_reads_every_image_once_and_names_the_broken_one(folder):
    with evaluation_loader(folder, settings(resize_size=36, batch_size=4, num_workers=2)) as loader:
        batches = [(b.images.copy(), b.labels.copy(), b.rows.tolist(), b.corrupt) for b in loader.batches(range(15))]
    read = [row for _, _, rows, _ in batches for row in rows]
    assert read == [row for row in range(15) if row != 11] and [row for *_, bad in batches for row in bad] == [11]
    np.testing.assert_array_equal(np.concatenate([labels for _, labels, _, _ in batches]), folder.labels[read])
    wanted = np.stack([EvalTransform(32, 36)(folder.paths[row]) for row in read])
    np.testing.assert_array_equal(np.concatenate([x for x, *_ in batches]), wanted)


# ===== Training ===== #

WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.5, 1.5)}


def test_a_crop_of_everything_is_the_resized_image_and_a_flip_its_mirror(tmp_path):
    path = picture(tmp_path / "noise.png", 90, 60)
    plain = TrainTransform(32, **WHOLE, flip=0.0, color_jitter=0.0)(path, np.random.default_rng(0))
    np.testing.assert_allclose(plain, normalised(Image.open(path).resize((32, 32), BILINEAR)), atol=1e-6)
    mirrored = TrainTransform(32, **WHOLE, flip=1.0, color_jitter=0.0)(path, np.random.default_rng(0))
    np.testing.assert_array_equal(mirrored, plain[:, :, ::-1])


def test_crops_lie_in_the_image_and_in_the_ranges():
    transform = TrainTransform(32, (0.08, 1.0), (3 / 4, 4 / 3), 0.5, 0.4)
    rng = np.random.default_rng(0)
    shares, ratios = [], []
    for _ in range(2000):
        left, top, right, bottom = transform.box(400, 300, rng)
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        shares.append((right - left) * (bottom - top) / 120000)
        ratios.append((right - left) / (bottom - top))
    assert 0.07 < min(shares) < 0.1 and max(shares) > 0.95
    assert 0.74 < min(ratios) < 0.77 and 1.3 < max(ratios) < 1.35
    whole = TrainTransform(32, (1.0, 1.0), (1.0, 1.0), 0.5, 0.4)
    assert whole.box(400, 100, np.random.default_rng(0)) == (150, 0, 250, 100)


def blend(image: np.ndarray, other: np.ndarray, factor: float) -> np.ndarray:
    """Pillow's ImageEnhance: other + factor * (image - other), within 0..255, cut to whole numbers."""
    return np.trunc(np.clip(other + factor * (image - other), 0, 255))


def luma(image: np.ndarray) -> np.ndarray:
    """ITU-R 601-2, rounded."""
    return np.floor(image @ [0.299, 0.587, 0.114] + 0.5)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return blend(image, np.zeros_like(image), factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    return blend(image, np.full_like(image, np.floor(luma(image).mean() + 0.5)), factor)


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    return blend(image, np.repeat(luma(image)[..., None], 3, -1), factor)


@pytest.mark.parametrize("seed", range(8))
def test_colour_jitter_is_brightness_contrast_and_saturation_in_random_order(tmp_path, seed):
    path = picture(tmp_path / "noise.png", 90, 60)
    rng = np.random.default_rng(seed)
    plain = levels(TrainTransform(32, **WHOLE, flip=0.5, color_jitter=0.0)(path, rng)).astype(float)
    jittered = levels(TrainTransform(32, **WHOLE, flip=0.5, color_jitter=0.4)(path, np.random.default_rng(seed)))
    # The generator is now where the jitter's begins.
    steps = [(brightness, contrast, saturation)[index] for index in rng.permutation(3)]
    wanted = plain
    for step in steps:
        factor = 0.6 + 0.8 * rng.random()
        wanted = step(wanted, factor)
    assert np.abs(jittered - wanted).max() <= 2  # a step cuts to whole numbers what may be off by one before
    assert np.abs(jittered - wanted).mean() < 0.1 and np.abs(jittered - plain).mean() > 2


def settings(**others) -> Namespace:
    values = {"image_size": 32, "crop_scale": [0.3, 1.0], "crop_ratio": [0.75, 1.33], "flip": 0.5, "color_jitter": 0.4}
    return Namespace(**{**values, "batch_size": 3, "num_workers": 1, "device_num": 1, "seed": 7, **others})


def test_views_depend_on_seed_epoch_and_image_only(folder):
    def views(workers, epoch, first=0, rank=0, devices=1, **others):
        args = settings(num_workers=workers, **others)
        with training_loader(folder, args) as loader:
            return [(x.copy(), y.tolist()) for x, y, _ in training_batches(loader, args, epoch, first, rank, devices)]

    one = views(1, 4)
    assert len(one) == 5 and one[0][0].shape == (3, 3, 32, 32)
    for again, start in ((views(3, 4), 0), (views(1, 4, 2), 2)):
        for (x, y), (u, v) in zip(one[start:], again, strict=True):
            np.testing.assert_array_equal(x, u)
            assert y == v
    assert np.abs(one[0][0] - views(1, 5)[0][0]).max() > 0.1
    assert np.abs(one[0][0] - views(1, 4, seed=8)[0][0]).max() > 0.1
    # Two devices share the steps of one with twice the batch; the broken image is replaced within its part.
    twice = views(1, 4, batch_size=4)
    parts = [views(1, 4, rank=rank, devices=2, batch_size=2) for rank in (0, 1)]
    same = [np.array_equal(x, np.concatenate([part[step][0] for part in parts])) for step, (x, _) in enumerate(twice)]
    assert len(same) == len(parts[0]) == len(parts[1]) == 3 and sum(same) >= 2


def test_an_image_that_cannot_be_read_is_named_and_replaced(folder):
    args = settings(batch_size=15)
    with training_loader(folder, args) as loader:
        ((images, labels, corrupt),) = training_batches(loader, args, 0)
    assert [folder.paths[row].name for row in corrupt] == ["1.png"] and folder.labels[corrupt] == [2]
    assert images.shape == (15, 3, 32, 32)
    np.testing.assert_array_equal(images[14], images[0])
    assert labels[14] == labels[0]
    alone = settings(batch_size=1)
    with training_loader(folder, alone) as loader, pytest.raises(UserError, match="is the data set damaged"):
        list(training_batches(loader, alone, 0))


@pytest.mark.parametrize("size", [(1300, 10), (10, 1301), (65, 1), (1, 700)])
def test_of_a_very_long_image_the_middle_is_resized(tmp_path, size):
    """What is seen is what it would be of the whole."""
    path = tmp_path / "long.png"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    image.save(path)
    scaled = [36 * side // min(size) for side in size]
    left, top = (round((side - 32) / 2) for side in scaled)
    whole = image.resize(scaled, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    wanted = (np.asarray(whole, np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(EvalTransform(32, 36)(path), wanted.transpose(2, 0, 1), atol=1.01 / 255 / 0.224)


def test_a_very_long_image_takes_no_more_memory_than_others(tmp_path):
    path = tmp_path / "long.png"
    Image.new("RGB", (60_000, 1)).save(path)
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (200 << 20), before[1]))  # the whole, resized, is 18 GB
    try:
        assert EvalTransform(224, 256)(path).shape == (3, 224, 224)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
