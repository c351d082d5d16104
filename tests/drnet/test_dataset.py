"""Preprocessing against the published pipeline; order, augmentation and corrupt files."""

import json
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from src.dataset import Augmentation, decode, evaluation_batches, preprocess, training_batches

from utils.images import ImageFolder

EXPECTED = json.loads((Path(__file__).parents[1] / "golden" / "preprocessing.json").read_text())["DRNet"]
AUGMENT = Augmentation((0.3, 1.0), (0.75, 4 / 3), 0.5)


@pytest.fixture
def folder(tmp_path):
    """Three classes of 5, 4 and 3 small images of varied shapes; the pixels are noise."""
    rng = np.random.default_rng(0)
    for name, count in (("a", 5), ("b", 4), ("c", 3)):
        (tmp_path / "val" / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 255, (40 + k, 52 - k, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{k}.JPEG")
    return ImageFolder(tmp_path / "val")


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
    batches = list(evaluation_batches(folder, 32, 36, batch_size, workers))
    assert np.concatenate([batch.rows for batch in batches]).tolist() == list(range(12))
    assert np.concatenate([batch.labels for batch in batches]).tolist() == folder.labels.tolist()
    wanted = np.stack([preprocess(decode(path), 32, 36) for path in folder.paths])
    np.testing.assert_array_equal(np.concatenate([batch.images for batch in batches]), wanted)


def test_evaluation_over_ranks_covers_every_image_once(folder):
    rows = [
        row for rank in range(5) for batch in evaluation_batches(folder, 32, 36, 2, 1, rank, 5) for row in batch.rows
    ]
    assert sorted(rows) == list(range(12))


def test_corrupt_files_are_reported_and_left_out(folder):
    folder.paths[3].write_bytes(folder.paths[3].read_bytes()[:100])
    folder.paths[7].write_bytes(b"")
    batches = list(evaluation_batches(folder, 32, 36, 5, 2))
    assert [row for batch in batches for row in batch.corrupt] == [3, 7]
    assert np.concatenate([batch.rows for batch in batches]).tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]


def stream(folder, batch_size=4, workers=1, epoch=0, first_step=0, rank=0, ranks=1):
    batches = list(training_batches(folder, 16, AUGMENT, batch_size, workers, 7, epoch, first_step, rank, ranks))
    return np.concatenate([b.rows for b in batches]), np.concatenate([b.images for b in batches])


def test_training_order_and_views_depend_on_seed_epoch_and_image_alone(folder):
    rows, views = stream(folder)
    assert sorted(rows) == list(range(12)) and rows.tolist() != list(range(12))
    other_rows, other_views = stream(folder, batch_size=3, workers=3)
    np.testing.assert_array_equal(rows, other_rows)
    np.testing.assert_array_equal(views, other_views)
    resumed_rows, resumed_views = stream(folder, first_step=2)
    np.testing.assert_array_equal(rows[8:], resumed_rows)
    np.testing.assert_array_equal(views[8:], resumed_views)
    next_rows, next_views = stream(folder, epoch=1)
    assert rows.tolist() != next_rows.tolist()
    assert np.abs(views[np.argsort(rows)] - next_views[np.argsort(next_rows)]).max() > 0.1


def test_a_step_takes_the_same_images_for_any_number_of_ranks(folder):
    rows, _ = stream(folder, batch_size=4)
    parts = [stream(folder, batch_size=2, rank=rank, ranks=2)[0] for rank in (0, 1)]
    for step in range(3):
        both = np.concatenate([part[2 * step : 2 * step + 2] for part in parts])
        assert both.tolist() == rows[4 * step : 4 * step + 4].tolist()


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
