"""The images against Pillow and the recipes written anew; order, augmentation and targets of a training."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from src.checkpoints import BACKBONES
from src.dataset import (
    AuthorsTransform,
    EvalTransform,
    TrainTransform,
    evaluation_loader,
    smooth_one_hot,
    training_batches,
    training_loader,
)

from utils.cli import UserError
from utils.images import ImageFolder, evaluation_rows

PHOTOGRAPHS = [Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]
WHOLE = {"crop_scale": (1.0, 1.0), "flip": 0.0}


def normalised(image: Image.Image) -> np.ndarray:
    """In float64, from 0..255."""
    x = (np.asarray(image, np.float64) - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    return x.transpose(2, 0, 1)


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of five small images in two modes, one of which is no image."""
    root = tmp_path_factory.mktemp("images")
    for label in range(3):
        (root / str(label)).mkdir()
        for number in range(5):
            picture(root / str(label) / f"{number}.png", 40 + number, 50, 10 * label + number)
    Image.open(root / "1/3.png").convert("P").save(root / "1/3.png")
    (root / "2/1.png").write_bytes(b"no image")
    return ImageFolder(root)


def settings(**others) -> Namespace:
    values = {"image_size": 32, "resize_size": 32, "crop_scale": [0.3, 1.0], "crop_ratio": [0.75, 1.33], "flip": 0.5}
    values |= {"batch_size": 3, "num_workers": 1, "seed": 7, "num_classes": 3, "label_smoothing": 0.1}
    return Namespace(**{**values, **others})


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda path: path.stem)
def test_the_documented_evaluation(backbone, photograph):
    """Resized to the square of the document's table, of which the centre is cut out."""
    crop, resize = {
        "resnest50": (224, 256),
        "resnest101": (256, 256),
        "resnest200": (320, 320),
        "resnest269": (416, 416),
    }[backbone]
    assert (BACKBONES[backbone].size, BACKBONES[backbone].resize) == (crop, resize)
    x = EvalTransform(crop, resize)(photograph)
    assert x.shape == (3, crop, crop) and x.dtype == np.float32
    square = np.asarray(Image.open(photograph).convert("RGB").resize((resize, resize), Image.BILINEAR))
    edge = (resize - crop) // 2
    np.testing.assert_allclose(x, normalised(square[edge : edge + crop, edge : edge + crop]), atol=1e-6)


@pytest.mark.parametrize("size", [224, 256, 320, 416])
@pytest.mark.parametrize("shape", [None, (301, 500), (500, 333), (97, 97)])
def test_the_authors_evaluation(size, shape, tmp_path):
    """As in the authors' own code, torchvision's crop and resize included: offsets rounded, the box as Pillow's."""
    path = PHOTOGRAPHS[0] if shape is None else picture(tmp_path / "noise.png", *shape)
    image = Image.open(path).convert("RGB")
    width, height = image.size
    crop = float(size) / (size + 32) * min(width, height)
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    right, bottom = round(left + crop), round(top + crop)
    square = Image.fromarray(np.asarray(image)[top:bottom, left:right]).resize((size, size), Image.BICUBIC)
    np.testing.assert_allclose(AuthorsTransform(size)(path), normalised(square), atol=1e-6)


def test_a_crop_of_everything_is_the_resized_image_and_a_flip_its_mirror(tmp_path):
    path = picture(tmp_path / "noise.png", 90, 60)
    whole = {**WHOLE, "crop_ratio": (1.5, 1.5)}
    plain = TrainTransform(32, **whole)(path, np.random.default_rng(0))
    resized = Image.open(path).resize((32, 32), Image.BICUBIC)
    np.testing.assert_allclose(plain, normalised(resized), atol=1e-6)
    mirrored = TrainTransform(32, **{**whole, "flip": 1.0})(path, np.random.default_rng(0))
    np.testing.assert_array_equal(mirrored, plain[..., ::-1])


def test_a_jpeg_decoded_at_lower_resolution_gives_nearly_the_same_crop():
    transform = TrainTransform(64, (0.5, 1.0), (0.75, 1.33), 0.0)
    for seed in range(5):
        x = transform(PHOTOGRAPHS[1], np.random.default_rng(seed))
        image = Image.open(PHOTOGRAPHS[1])
        box = transform.box(*image.size, np.random.default_rng(seed))
        full = normalised(image.crop(box).resize((64, 64), Image.BICUBIC))
        assert np.abs(x - full).mean() * 57 < 2  # grey levels


def test_crops_keep_to_their_ranges():
    transform = TrainTransform(32, (0.2, 0.5), (0.5, 2.0), 0.0)
    rng = np.random.default_rng(0)
    boxes = np.array([transform.box(400, 300, rng) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 400 and boxes[:, 3].max() <= 300
    share, ratio = width * height / (400 * 300), width / height
    assert 0.19 < share.min() < 0.22 and 0.48 < share.max() < 0.51
    assert 0.49 < ratio.min() < 0.52 and 1.9 < ratio.max() < 2.05 and abs(np.log(ratio).mean()) < 0.05
    assert transform.box(3000, 10, rng) == (1490, 0, 1510, 10)  # the largest that the ratio allows


def test_views_depend_on_seed_epoch_and_image_only(folder):
    def views(workers, epoch, first=0, rank=0, devices=1, **others):
        args = settings(num_workers=workers, **others)
        with training_loader(folder, args) as loader:
            return [(x.copy(), y) for x, y, _ in training_batches(loader, args, epoch, first, rank, devices)]

    one = views(1, 4)
    assert len(one) == 5 and one[0][0].shape == (3, 3, 32, 32) and one[0][1].shape == (3, 3)
    for again, start in ((views(3, 4), 0), (views(1, 4, 2), 2)):
        for (x, y), (u, v) in zip(one[start:], again, strict=True):
            np.testing.assert_array_equal(x, u)
            np.testing.assert_array_equal(y, v)
    assert np.abs(one[0][0] - views(1, 5)[0][0]).max() > 0.1
    assert np.abs(one[0][0] - views(1, 4, seed=8)[0][0]).max() > 0.1
    # Two devices share the steps of one with twice the batch; an image that cannot be read is replaced within its part.
    twice = views(1, 4, batch_size=4)
    parts = [views(1, 4, rank=rank, devices=2, batch_size=2) for rank in (0, 1)]
    same = 0
    for step, (x, _) in enumerate(twice):
        same += np.array_equal(x, np.concatenate([part[step][0] for part in parts]))
    assert len(twice) == len(parts[0]) == len(parts[1]) == 3 and same >= 2


def test_an_image_that_cannot_be_read_is_named_and_replaced(folder):
    args = settings(batch_size=15)
    with training_loader(folder, args) as loader:
        ((images, targets, corrupt),) = training_batches(loader, args, 0)
    assert [folder.paths[row].name for row in corrupt] == ["1.png"] and folder.labels[corrupt] == [2]
    assert images.shape == (15, 3, 32, 32)
    np.testing.assert_array_equal(images[14], images[0])
    np.testing.assert_array_equal(targets[14], targets[0])
    alone = settings(batch_size=1)
    with training_loader(folder, alone) as loader, pytest.raises(UserError, match="is the data set damaged"):
        list(training_batches(loader, alone, 0))


def test_evaluation_reads_every_image_once(folder):
    args = settings(batch_size=4)
    with evaluation_loader(folder, args) as loader:
        parts = [
            [(row, label, image) for batch in loader.batches(rows) for row, label, image in _each(batch)]
            for rows in (evaluation_rows(folder, rank, 2) for rank in (0, 1))
        ]
    read = sorted(parts[0] + parts[1], key=lambda entry: entry[0])
    assert [row for row, _, _ in read] == [row for row in range(15) if row != 11]
    assert all(label == folder.labels[row] for row, label, _ in read)
    for row, _, image in read:
        resized = Image.open(folder.paths[row]).convert("RGB").resize((32, 32), Image.BILINEAR)
        np.testing.assert_allclose(image, normalised(resized), atol=1e-6)


def _each(batch):
    return zip(batch.rows.tolist(), batch.labels.tolist(), batch.images.copy())


def test_targets_are_smoothed():
    targets = smooth_one_hot(np.array([2, 0]), 4, 0.1)
    np.testing.assert_allclose(targets, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]], atol=1e-7)
    assert targets.dtype == np.float32
    np.testing.assert_array_equal(smooth_one_hot(np.array([1]), 3, 0.0), [[0, 1, 0]])
