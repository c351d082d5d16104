"""Preprocessing against the published pipeline; order, augmentation and corrupt files."""

import json
import resource
from argparse import Namespace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from src.dataset import (
    MEAN,
    STD,
    Augmentation,
    decode,
    evaluation_loader,
    preprocess,
    training_batches,
    training_loader,
)

from utils.cli import UserError
from utils.images import ImageFolder, evaluation_rows

EXPECTED = json.loads((Path(__file__).parents[1] / "golden" / "preprocessing.json").read_text())["DRNet"]
AUGMENT = Augmentation((0.3, 1.0), (0.75, 4 / 3), 0.5)


@pytest.fixture
def folder(tmp_path):
    """Three classes of 5, 4 and 3 small images of varied shapes; row k is noise around the grey level 10 + 20 k."""
    rng = np.random.default_rng(0)
    levels = iter(range(10, 250, 20))
    for name, count in (("a", 5), ("b", 4), ("c", 3)):
        (tmp_path / "val" / name).mkdir(parents=True)
        for k in range(count):
            pixels = next(levels) + rng.integers(-8, 9, (40 + k, 52 - k, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "val" / name / f"{k}.png")
    return ImageFolder(tmp_path / "val")


def settings(**others) -> Namespace:
    values = {"image_size": 16, "resize_size": 16, "crop_scale": [0.3, 1.0], "crop_ratio": [0.75, 4 / 3], "flip": 0.5}
    return Namespace(**{**values, "batch_size": 4, "num_workers": 1, "device_num": 1, "seed": 7, **others})


def evaluated(folder, batch_size, workers=1, rank=0, devices=1):
    """The rows, labels and images that one of several devices reads for an evaluation, and the corrupt rows."""
    args = settings(image_size=32, resize_size=36, batch_size=batch_size, num_workers=workers)
    with evaluation_loader(folder, args, devices) as loader:
        # A batch holds until the next one is asked for.
        batches = [
            (batch.rows, batch.labels, batch.images.copy(), batch.corrupt)
            for batch in loader.batches(evaluation_rows(folder, rank, devices))
        ]
    rows, labels, images, corrupt = zip(*batches)
    return np.concatenate(rows).tolist(), np.concatenate(labels).tolist(), np.concatenate(images), [*chain(*corrupt)]


@pytest.mark.parametrize("index", [0, 1])
def test_evaluation_preprocessing_is_the_published_one(index):
    files = Path(sklearn.datasets.__file__).parent / "images"
    tensor = preprocess(decode(files / ("china.jpg", "flower.jpg")[index]), 224, 256)
    assert tensor.shape == (3, 224, 224) and tensor.dtype == np.float32
    blocks = tensor.reshape(3, 7, 32, 7, 32).mean((2, 4)).ravel()
    np.testing.assert_allclose(blocks, np.ravel(EXPECTED[index]["blocks"]), atol=0.02)
    np.testing.assert_allclose(tensor[:, 100:103, 100:103].ravel(), np.ravel(EXPECTED[index]["probe"]), atol=0.1)


@pytest.mark.parametrize("size", [(100, 300), (301, 100), (256, 256), (256, 400), (40, 40), (1000, 257)])
def test_any_shape_gives_the_crop(size):
    assert preprocess(Image.new("RGB", size, (124, 116, 104)), 224, 256).shape == (3, 224, 224)


def test_centre_crop_of_a_hand_worked_image():
    """8 x 6 pixels, shorter side 6 stays 6; crop 4: columns 2 to 5, rows 1 to 4."""
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    tensor = preprocess(Image.fromarray(np.dstack([grey] * 3)), 4, 6)
    wanted = (grey[1:5, 2:6] / 255 - 0.485) / 0.229
    np.testing.assert_allclose(tensor[0], wanted, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode in ("L", "CMYK") else "image.png")
    Image.new(mode, (30, 20)).save(path)
    assert decode(path).mode == "RGB"


@pytest.mark.parametrize(("batch_size", "workers"), [(5, 1), (12, 3), (50, 2)])
def test_evaluation_gives_every_image_once_and_in_order(folder, batch_size, workers):
    rows, labels, images, corrupt = evaluated(folder, batch_size, workers)
    assert rows == list(range(12)) and labels == [0] * 5 + [1] * 4 + [2] * 3 and not corrupt
    np.testing.assert_array_equal(images, np.stack([preprocess(decode(path), 32, 36) for path in folder.paths]))


def test_evaluation_over_devices_covers_every_image_once(folder):
    rows = [row for rank in range(5) for row in evaluated(folder, 2, rank=rank, devices=5)[0]]
    assert sorted(rows) == list(range(12))


def test_corrupt_files_are_reported_and_left_out(folder):
    folder.paths[3].write_bytes(folder.paths[3].read_bytes()[:100])
    folder.paths[7].write_bytes(b"")
    rows, _, _, corrupt = evaluated(folder, 5, 2)
    assert corrupt == [3, 7] and rows == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]


def stream(folder, epoch=0, first_step=0, rank=0, devices=1, **others):
    """The views of an epoch, and the row of each, told from its grey level; also the corrupt rows of each step."""
    args = settings(device_num=devices, **others)
    with training_loader(folder, args) as loader:
        batches = [
            (views.copy(), labels.copy(), corrupt)
            for views, labels, corrupt in training_batches(loader, args, epoch, first_step, rank, devices)
        ]
    views, labels, corrupt = zip(*batches)
    views = np.concatenate(views)
    levels = (views * STD[:, None, None] + MEAN[:, None, None]).mean((1, 2, 3)) * 255
    rows = np.round((levels - 10) / 20).astype(int)
    assert folder.labels[rows].tolist() == np.concatenate(labels).tolist()
    return rows, views, list(corrupt)


def test_training_order_and_views_depend_on_seed_epoch_and_image_alone(folder):
    rows, views, _ = stream(folder)
    assert sorted(rows) == list(range(12)) and rows.tolist() != list(range(12))
    other_rows, other_views, _ = stream(folder, batch_size=3, num_workers=3)
    np.testing.assert_array_equal(rows, other_rows)
    np.testing.assert_array_equal(views, other_views)
    resumed_rows, resumed_views, _ = stream(folder, first_step=2)
    np.testing.assert_array_equal(rows[8:], resumed_rows)
    np.testing.assert_array_equal(views[8:], resumed_views)
    for change in ({"epoch": 1}, {"seed": 8}):
        next_rows, next_views, _ = stream(folder, **change)
        assert rows.tolist() != next_rows.tolist()
        assert np.abs(views[np.argsort(rows)] - next_views[np.argsort(next_rows)]).max() > 0.1


def test_a_step_takes_the_same_images_for_any_number_of_devices(folder):
    rows, *_ = stream(folder)
    parts = [stream(folder, batch_size=2, rank=rank, devices=2)[0] for rank in (0, 1)]
    for step in range(3):
        both = np.concatenate([part[2 * step : 2 * step + 2] for part in parts])
        assert both.tolist() == rows[4 * step : 4 * step + 4].tolist()


def test_other_images_take_the_places_of_corrupt_ones(folder):
    rows, *_ = stream(folder)
    bad = rows[4:7].tolist()
    for row in bad:
        folder.paths[row].write_bytes(b"no image")
    left, _, corrupt = stream(folder)
    assert [sorted(step) for step in corrupt] == [[], sorted(bad), []]
    assert left.tolist() == [*rows[:4], *[rows[7]] * 4, *rows[8:]]
    folder.paths[int(rows[7])].write_bytes(b"no image")
    with pytest.raises(UserError, match="no image of a whole batch can be read"):
        stream(folder)


def test_crops_lie_in_the_image_and_in_the_ranges():
    rng = np.random.default_rng(0)
    shares, ratios = [], []
    for _ in range(2000):
        left, top, right, bottom = AUGMENT.box(400, 300, rng)
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        shares.append((right - left) * (bottom - top) / 120000)
        ratios.append((right - left) / (bottom - top))
    assert 0.29 < min(shares) < 0.35 and max(shares) > 0.9
    assert 0.74 < min(ratios) < 0.8 and 1.28 < max(ratios) < 1.35


def test_an_image_too_narrow_for_any_crop_is_cut_at_its_centre():
    assert Augmentation((1.0, 1.0), (1.0, 1.0), 0).box(400, 100, np.random.default_rng(0)) == (150, 0, 250, 100)


def test_flip_mirrors_the_view():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    plain = Augmentation((1.0, 1.0), (1.0, 1.0), 0.0)(image, 16, np.random.default_rng(0))
    mirrored = Augmentation((1.0, 1.0), (1.0, 1.0), 1.0)(image, 16, np.random.default_rng(0))
    np.testing.assert_array_equal(plain[:, :, ::-1], mirrored)


@pytest.mark.parametrize("size", [(1300, 10), (10, 1301), (65, 1), (1, 700)])
def test_of_a_very_long_image_the_middle_is_resized(tmp_path, size):
    """What is seen is what it would be of the whole."""
    path = tmp_path / "long.png"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    image.save(path)
    scaled = [36 * side // min(size) for side in size]
    left, top = (round((side - 32) / 2) for side in scaled)
    whole = image.resize(scaled, Image.Resampling.BILINEAR).crop((left, top, left + 32, top + 32))
    wanted = (np.asarray(whole, np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(preprocess(decode(path), 32, 36), wanted.transpose(2, 0, 1), atol=1.01 / 255 / 0.224)


def test_a_very_long_image_takes_no_more_memory_than_others(tmp_path):
    path = tmp_path / "long.png"
    Image.new("RGB", (60_000, 1)).save(path)
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (200 << 20), before[1]))  # the whole, resized, is 18 GB
    try:
        assert preprocess(decode(path), 224, 256).shape == (3, 224, 224)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
