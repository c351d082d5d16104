"""The augmentation against Pillow, operation by operation; the crop, the erasing, the two transforms, bad files."""

import collections
import contextlib
import json
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import sklearn.datasets
from ddrnet import pillow_pipeline as pillow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from src.data.augment.color_jitter import ColorJitter
from src.data.augment.crop import RandomResizedCrop, decode
from src.data.augment.rand_augment import OPERATIONS, RandAugment, parse_auto_augment
from src.data.augment.random_erasing import RandomErasing
from src.data.transforms import INTERPOLATION, EvalTransform, TrainTransform, normalise

from utils.cli import UserError
from utils.images import Unreadable

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = json.loads((ROOT / "tests" / "golden" / "preprocessing.json").read_text())["DDRNet"]
PHOTOGRAPHS = [Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]
RESAMPLE = {"bilinear": pillow.BILINEAR, "bicubic": pillow.BICUBIC}


def photograph(number, size=(224, 224)):
    with Image.open(PHOTOGRAPHS[number]) as image:
        return image.resize(size, pillow.BICUBIC)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def train(
    interpolation="bicubic", jitter=0.4, augment="rand-m9-mstd0.5-inc1", prob=0.25, mode="pixel", count=1, size=64
):
    return TrainTransform(size, interpolation, jitter, augment, prob, mode, count)


PLAIN = {"jitter": 0, "augment": "none", "prob": 0}


# RandAugment's operations. Noise has every level beside every other; the photographs are what counts.
IMAGES = {
    "china": np.asarray(photograph(0)),
    "flower": np.asarray(photograph(1, (200, 150))),
    "noise": noise(50, 70),
    "dull": noise(50, 70) // 5 + np.array([20, 100, 200], np.uint8),
    "flat": np.full((40, 30, 3), (7, 80, 255), np.uint8),
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("AutoContrast", [None]),
        ("Equalize", [None]),
        ("Invert", [None]),
        ("Posterize", range(5)),
        ("Solarize", [0, 1, 25, 128, 255, 256]),
        ("SolarizeAdd", [0, 1, 99, 110]),
    ],
)
def test_level_operations_equal_pillow_s(kind, name, arguments):
    for argument in arguments:
        ours = OPERATIONS[name].apply(IMAGES[kind], *([] if argument is None else [argument]))
        wanted = pillow.apply(name, Image.fromarray(IMAGES[kind]), argument, None)
        np.testing.assert_array_equal(ours, np.asarray(wanted), err_msg=str(argument))


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_blends_are_within_one_level_of_pillow_s(kind, name):
    for factor in (0.1, 0.37, 0.9, 1.0, 1.19, 1.63, 1.9):
        ours = OPERATIONS[name].apply(IMAGES[kind], factor).astype(int)
        wanted = np.asarray(pillow.apply(name, Image.fromarray(IMAGES[kind]), factor, None)).astype(int)
        assert np.abs(ours - wanted).max() <= 1, factor
        assert (ours != wanted).mean() < 0.01, factor


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Rotate", (-30, -7.5, 18, 27)),
        ("ShearX", (-0.3, 0.11, 0.27)),
        ("ShearY", (-0.3, 0.11, 0.27)),
        ("TranslateXRel", (-0.45, 0.03, 0.405)),
        ("TranslateYRel", (-0.45, 0.03, 0.405)),
    ],
)
def test_warps_are_pillow_s_in_the_interior(name, arguments, interpolation):
    """Within 5 grey levels bilinear (positions are rounded to 1/32 pixel) and 0.6 in the mean; bicubic, whose kernels
    differ (a = -0.75 here, -1 in Pillow), within 20 and 1.2. Interior: two pixels from what was moved in."""
    greatest, mean = {"bilinear": (5, 0.6), "bicubic": (20, 1.2)}[interpolation]
    for kind in ("china", "flower"):
        image = IMAGES[kind]
        inside = Image.new("RGB", image.shape[1::-1], (255, 255, 255))
        for argument in arguments:
            ours = OPERATIONS[name].apply(image, argument, INTERPOLATION[interpolation]).astype(int)
            wanted = np.asarray(pillow.WARPS[name](Image.fromarray(image), argument, RESAMPLE[interpolation]))
            interior = np.asarray(pillow.WARPS[name](inside, argument, pillow.BILINEAR))[..., 0] == 255
            interior = cv2.erode(np.pad(interior, 1).astype(np.uint8), np.ones((5, 5)))[1:-1, 1:-1] > 0
            difference = np.abs(ours - wanted)[interior]
            assert interior.mean() > 0.3
            assert difference.max() <= greatest and difference.mean() <= mean, (kind, argument)


def test_warps_fill_with_the_mean_colour():
    for name, argument in (("Rotate", 30), ("ShearX", -0.3), ("ShearY", 0.3), ("TranslateXRel", 0.4)):
        ours = OPERATIONS[name].apply(IMAGES["china"], argument, cv2.INTER_LINEAR)
        assert tuple(ours[-1, -1]) == pillow.FILL or tuple(ours[-1, 0]) == pillow.FILL, name


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("magnitude", [0, 2.5, 5, 9, 10])
def test_arguments_are_timm_s(magnitude, increasing):
    """The increasing ones against `pillow_pipeline`, the others by hand."""
    augment = RandAugment(magnitude, 0, increasing)
    rng = np.random.default_rng(0)
    for name in OPERATIONS:
        if OPERATIONS[name].argument is None:
            assert name in ("AutoContrast", "Equalize", "Invert")
            continue
        found = {augment.argument(name, rng) for _ in range(40)}
        wanted = {pillow.increasing_argument(name, magnitude, sign) for sign in (-1, 1)}
        if not increasing and name in pillow.BLENDS:
            wanted = {0.1 + 0.18 * magnitude}
        elif not increasing and name == "Posterize":
            wanted = {{0: 0, 2.5: 1, 5: 2, 9: 3, 10: 4}[magnitude]}
        elif not increasing and name == "Solarize":
            wanted = {{0: 0, 2.5: 64, 5: 128, 9: 230, 10: 256}[magnitude]}
        assert sorted(found) == pytest.approx(sorted(wanted)), name


def test_magnitude_noise_has_its_deviation_and_is_cut():
    rng = np.random.default_rng(0)
    degrees = [abs(RandAugment(5, 0.5).argument("Rotate", rng)) for _ in range(4000)]
    assert np.mean(degrees) / 3 == pytest.approx(5, abs=0.05)
    assert np.std(degrees) / 3 == pytest.approx(0.5, rel=0.06)
    strong = [abs(RandAugment(9, 5).argument("Rotate", rng)) for _ in range(500)]
    assert max(strong) == 30 and min(strong) < 15


def test_every_operation_is_drawn_equally_often_and_applied_with_its_probability(monkeypatch):
    """15,000 layers, 0.3 of them applied: 300 of each operation, bounds of about 5 deviations."""
    seen = collections.Counter()
    for name, operation in OPERATIONS.items():

        def count(image, *arguments, name=name):
            seen[name] += 1
            return image

        monkeypatch.setitem(OPERATIONS, name, type(operation)(count, operation.argument, None, operation.warp))
    rng = np.random.default_rng(0)
    for _ in range(5000):
        RandAugment(9, 0.5, True, 3, 0.3)(IMAGES["flat"], cv2.INTER_LINEAR, rng)
    assert len(seen) == 15 and all(220 < number < 380 for number in seen.values())


def test_settings_are_parsed():
    assert parse_auto_augment("rand-m9-mstd0.5-inc1") == RandAugment(9, 0.5, True, 2, 0.5)
    assert parse_auto_augment("rand-n3-p0.25-m4.5-inc0") == RandAugment(4.5, 0, False, 3, 0.25)
    assert parse_auto_augment("none") is None and parse_auto_augment(None) is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "augmix-m3", "rand-", "rand-m", "rand-q3", "rand-m11", "rand-m-1", "rand-mstd20", "rand-inc2", "rand-n0"),
        *("rand-n1.5", "rand-p1.2", "rand-m9-m8", "rand-m9mstd0.5", "Rand-m9"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_one_line(text):
    with pytest.raises(UserError, match=re.escape(repr(text))) as error:
        parse_auto_augment(text)
    assert "\n" not in str(error.value)


# Colour jitter.
def test_jitter_factors_cover_their_range():
    """Of a grey image saturation changes nothing and contrast nothing, so the level shows the brightness."""
    grey, rng = np.full((4, 4, 3), 100, np.uint8), np.random.default_rng(0)
    levels = np.array([ColorJitter(0.4)(grey, rng)[0, 0, 0] for _ in range(1000)])
    assert 59 <= levels.min() <= 62 and 138 <= levels.max() <= 140
    assert levels.mean() == pytest.approx(99.5, abs=3)
    assert ColorJitter(3.0)(grey, rng).shape == grey.shape


def test_jitter_is_pillow_s_three_enhancements_in_the_order_drawn():
    """To 3 levels: each of the three may be off by one, and the next one enlarges that."""
    orders = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        view = ColorJitter(0.4)(IMAGES["china"], np.random.default_rng(seed)).astype(int)
        names = [("Brightness", "Contrast", "Color")[number] for number in rng.permutation(3)]
        image = Image.fromarray(IMAGES["china"])
        for name in names:
            image = pillow.BLENDS[name](image, rng.uniform(0.6, 1.4))
        assert np.abs(view - np.asarray(image)).max() <= 3
        orders.add(tuple(names))
    assert len(orders) == 6
    np.testing.assert_array_equal(ColorJitter(0.0)(IMAGES["china"], rng), IMAGES["china"])


def test_jitter_counts_only_without_auto_augment():
    def view(**settings):
        return train(prob=0, **settings)(PHOTOGRAPHS[0], np.random.default_rng(1))

    np.testing.assert_array_equal(view(jitter=0.4), view(jitter=0))
    assert not np.array_equal(view(jitter=0.4, augment="none"), view(jitter=0, augment="none"))


# Random erasing.
def areas(mode="pixel", count=1, draws=600, size=100):
    erase, rng = RandomErasing(1.0, mode, count), np.random.default_rng(0)
    return [erase.areas(size, size, rng) for _ in range(draws)]


def test_erased_areas_have_their_size_and_shape():
    found = [(r.stop - r.start, c.stop - c.start) for ((r, c),) in areas()]
    share = np.array([h * w / 10000 for h, w in found])
    ratio = np.array([h / w for h, w in found])
    assert 0.018 < share.min() < 0.03 and 0.30 < share.max() < 0.34
    assert 0.27 < ratio.min() < 0.35 and 2.9 < ratio.max() < 3.7
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.15)


def test_number_of_areas_is_uniform_and_divides_them():
    numbers = collections.Counter(len(found) for found in areas(count=3))
    assert set(numbers) == {1, 2, 3} and all(150 < number < 250 for number in numbers.values())
    largest = max(
        (r.stop - r.start) * (c.stop - c.start) for found in areas(count=3) if len(found) == 3 for r, c in found
    )
    assert 0.09 < largest / 10000 < 0.118


def area_of(seed):
    """The area that a call with this seed erases: it is drawn after the probability."""
    rng = np.random.default_rng(seed)
    rng.random()
    return RandomErasing(1.0, "const", 1).areas(100, 100, rng)[0]


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erased_pixels(mode):
    tensor = np.full((3, 100, 100), 9, np.float32)
    RandomErasing(1.0, mode, 1)(tensor, np.random.default_rng(3))
    rows, columns = area_of(3)
    inside = tensor[:, rows, columns]
    outside = tensor.copy()
    outside[:, rows, columns] = 9
    assert (outside == 9).all() and tensor.dtype == np.float32
    if mode == "const":
        assert (inside == 0).all()
    elif mode == "rand":
        assert (inside == inside[:, :1, :1]).all() and len(np.unique(inside)) == 3
    else:
        assert inside.mean() == pytest.approx(0, abs=0.1) and inside.std() == pytest.approx(1, abs=0.05)


def test_erasing_has_its_probability():
    erase, rng = RandomErasing(0.25, "const", 1), np.random.default_rng(0)
    erased = sum((erase(np.ones((3, 20, 20), np.float32), rng) == 0).any() for _ in range(2000))
    assert erased / 2000 == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"mode": "white"}, "re_mode"),
        ({"prob": 1.1}, "re_prob"),
        ({"count": 0}, "re_count"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"jitter": -1}, "color_jitter"),
        ({"augment": "v0"}, "auto_augment"),
    ],
)
def test_bad_settings_are_named(settings, word):
    with pytest.raises(UserError, match=word):
        train(**settings)


# The crop.
def test_crops_lie_in_the_image_and_in_the_ranges():
    rng, crop = np.random.default_rng(0), RandomResizedCrop(224)
    shares, ratios = [], []
    for _ in range(3000):
        left, top, right, bottom = crop.box(500, 400, rng)
        assert 0 <= left < right <= 500 and 0 <= top < bottom <= 400
        shares.append((right - left) * (bottom - top) / 200000)
        ratios.append((right - left) / (bottom - top))
    assert 0.079 < min(shares) < 0.1 and max(shares) > 0.95
    assert 0.74 < min(ratios) < 0.77 and 1.3 < max(ratios) < 1.35
    assert np.log(ratios).mean() == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((400, 30), (180, 0, 220, 30)),
        ((30, 400), (0, 180, 30, 220)),
        ((1, 1), (0, 0, 1, 1)),
        ((500, 1), (249, 0, 250, 1)),
    ],
)
def test_an_image_too_narrow_for_any_crop_is_cut_at_its_centre(size, wanted):
    assert RandomResizedCrop(224, (1.0, 1.0)).box(*size, np.random.default_rng(0)) == wanted


@pytest.mark.parametrize(
    ("width", "height", "shrink"),
    [(223, 300, 1), (447, 900, 1), (448, 600, 2), (895, 900, 2), (896, 1000, 4), (1800, 2000, 8)],
)
def test_decoding_keeps_the_detail_that_the_crop_needs(width, height, shrink):
    assert RandomResizedCrop(224).shrink((10, 20, 10 + width, 20 + height)) == shrink


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(320, 240), (321, 243)])
def test_reduced_decoding_is_the_image_averaged(tmp_path, shrink, size):
    """DCT scaling against averages over squares of the whole image; equal to Pillow's own where nothing is reduced."""
    path = tmp_path / "image.jpg"
    photograph(1, size).save(path, quality=95)
    with Image.open(path) as image:
        pixels = decode(path.read_bytes(), image, shrink)
    wanted = np.asarray(pillow.decode(path).reduce(shrink)).astype(int)
    assert pixels.shape == wanted.shape
    difference = np.abs(pixels - wanted)
    assert difference.mean() <= (0 if shrink == 1 else 1.5)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("factor", [1, 2, 5, 9])
def test_a_large_image_gives_the_view_of_the_small_one(tmp_path, factor, suffix):
    """The same crop of one picture in several sizes: place and scale stay, to 4 levels in the mean."""
    small, large = tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"
    picture = photograph(0, (160, 120))
    picture.save(small, quality=95)
    picture.resize((160 * factor, 120 * factor), pillow.BICUBIC).save(large, quality=95)
    crop = RandomResizedCrop(100, (1.0, 1.0), (4 / 3, 4 / 3))
    wanted = pillow.resize(pillow.decode(small), (0, 0, 160, 120), 100, pillow.BICUBIC)
    for path in (small, large):
        view = crop(path, cv2.INTER_CUBIC, np.random.default_rng(0))
        assert view.shape == (100, 100, 3) and view.dtype == np.uint8
        assert np.abs(view.astype(int) - np.asarray(wanted)).mean() < 4


def test_views_are_those_of_the_pillow_pipeline():
    """Nothing behind the crop, the same box: to 6 levels in the mean, for OpenCV does not antialias."""
    transform = train(**PLAIN, size=224)
    for number, path in enumerate(PHOTOGRAPHS * 4):
        rng = np.random.default_rng(number)
        rng.integers(1)  # the interpolation
        image = pillow.decode(path)
        image = pillow.resize(image, transform.crop.box(*image.size, rng), 224, pillow.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        view = transform(path, np.random.default_rng(number))
        assert np.abs(view - pillow.normalise(image)).mean() < 6 / 255 / 0.225


def test_flip_mirrors_with_its_probability(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(noise(16, 16)).save(path)

    def view(flip, seed):
        transform = TrainTransform(16, "bilinear", 0, "none", 0, "pixel", 1, (1.0, 1.0), (1.0, 1.0), flip)
        return transform(path, np.random.default_rng(seed))

    plain, mirrored = view(0, 0), view(1, 0)
    np.testing.assert_array_equal(plain, normalise(noise(16, 16)))
    np.testing.assert_array_equal(plain[:, :, ::-1], mirrored)
    flipped = sum(np.array_equal(view(0.25, seed), mirrored) for seed in range(800))
    assert flipped / 800 == pytest.approx(0.25, abs=0.06)


# Files.
def save(path, mode, **options):
    if mode == "I;16":
        Image.fromarray(np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 20).save(path)
    elif mode == "RGB;16":
        wide = noise(40, 60).astype(np.uint16) * 256 + noise(40, 60, 1)
        cv2.imwrite(str(path), wide)
    else:
        image = photograph(1, (60, 40))
        if mode == "RGBA":
            image.putalpha(Image.fromarray(noise(40, 60)[..., 0]))
        image.convert(mode).save(path, **options)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *(("L", "jpg"), ("CMYK", "jpg"), ("RGB", "jpg"), ("L", "png"), ("P", "png"), ("P", "gif"), ("LA", "png")),
        *(("RGBA", "png"), ("1", "png"), ("RGB;16", "png"), ("RGB", "webp"), ("RGB", "bmp")),
    ],
)
def test_every_kind_of_file_is_decoded_as_pillow_does(tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    save(path, mode)
    with Image.open(path) as image:
        pixels = decode(path.read_bytes(), image, 1)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(pillow.decode(path)))


def test_of_greys_of_16_bits_the_upper_8_are_shown(tmp_path):
    """As OpenCV reads them; Pillow's conversion would make white of nearly all."""
    path = tmp_path / "image.png"
    save(path, "I;16")
    with Image.open(path) as image, pytest.warns(UserWarning, match="16 bits"):
        np.testing.assert_array_equal(decode(path.read_bytes(), image, 1), cv2.imread(str(path)))


def test_exif_orientation_is_ignored_by_both(tmp_path):
    path, turned = tmp_path / "image.jpg", tmp_path / "turned.jpg"
    save(path, "RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(turned, "RGB", exif=exif)
    rng = np.random.default_rng
    np.testing.assert_array_equal(train()(path, rng(0)), train()(turned, rng(0)))
    np.testing.assert_array_equal(EvalTransform(32, 0.875)(path), EvalTransform(32, 0.875)(turned))


def broken(path, kind):
    save(path, "RGB", quality=95)
    whole = path.read_bytes()
    data = {
        "empty": b"",
        "text": b"no image at all",
        "header": whole[:100],
        "half": whole[: len(whole) // 2],
        "late": whole[:-20],
        "no end": whole[: len(whole) * 9 // 10],
        "headless": whole[300:],
    }[kind]
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("kind", ["empty", "text", "header", "half", "no end", "headless"])
def test_broken_files_are_unreadable_and_nothing_is_printed(tmp_path, kind, suffix, capfd):
    path = tmp_path / f"image.{suffix}"
    broken(path, kind)
    with pytest.raises(Unreadable):
        train()(path, np.random.default_rng(0))
    with pytest.raises(Unreadable):
        EvalTransform(32, 0.875)(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["late"])
def test_training_and_evaluation_agree_on_what_is_readable(tmp_path, kind, capfd):
    path = tmp_path / "image.jpg"
    broken(path, kind)
    answers = []
    for view in (lambda: train()(path, np.random.default_rng(0)), lambda: EvalTransform(32, 0.875)(path)):
        try:
            answers.append(view() is not None)
        except Unreadable:
            answers.append(False)
    assert answers[0] == answers[1]
    assert capfd.readouterr() == ("", "")


@pytest.mark.full
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(st.tuples(st.integers(0, 2500), st.binary(max_size=6), st.integers(0, 6)), max_size=4))
def test_any_jpeg_is_read_or_unreadable_by_opencv_too(tmp_path_factory, changes):
    """Bytes flipped, put in and cut off: OpenCV's errors are no others than Pillow's, and it takes no second."""
    path = tmp_path_factory.getbasetemp() / "any.jpg"
    save(path, "RGB", quality=95)
    content = bytearray(path.read_bytes())
    for place, more, over in changes:
        content[place : place + over] = more
    path.write_bytes(bytes(content))
    start = time.process_time()
    for view in (lambda: train()(path, np.random.default_rng(0)), lambda: EvalTransform(32, 0.875)(path)):
        with contextlib.suppress(Unreadable):
            assert np.isfinite(view()).all()
    assert time.process_time() - start < 1


def test_bytes_behind_the_end_do_no_harm(tmp_path):
    path, longer = tmp_path / "image.jpg", tmp_path / "longer.jpg"
    save(path, "RGB")
    longer.write_bytes(path.read_bytes() + b"\0\0more")
    rng = np.random.default_rng
    np.testing.assert_array_equal(train()(path, rng(0)), train()(longer, rng(0)))


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        train()(tmp_path / "none.jpg", np.random.default_rng(0))


# The transforms.
def test_normalise():
    image = noise(30, 20)
    tensor = normalise(image)
    wanted = (image.astype(np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert tensor.dtype == np.float32 and tensor.flags.c_contiguous
    np.testing.assert_allclose(tensor, wanted.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize("index", [0, 1])
def test_evaluation_is_the_published_preprocessing(index):
    tensor = EvalTransform(224, 0.875)(PHOTOGRAPHS[index])
    assert tensor.shape == (3, 224, 224) and tensor.dtype == np.float32
    blocks = tensor.reshape(3, 7, 32, 7, 32).mean((2, 4)).ravel()
    np.testing.assert_allclose(blocks, np.ravel(EXPECTED[index]["blocks"]), atol=0.02)
    np.testing.assert_allclose(tensor[:, 100:103, 100:103].ravel(), np.ravel(EXPECTED[index]["probe"]), atol=0.1)


@pytest.mark.parametrize("size", [(100, 300), (301, 100), (256, 256), (3, 4)])
@pytest.mark.parametrize(("image_size", "crop_pct"), [(32, 0.875), (33, 0.8), (16, 1.0)])
def test_evaluation_of_any_shape(tmp_path, size, image_size, crop_pct):
    path = tmp_path / "image.png"
    Image.new("RGB", size, (124, 116, 104)).save(path)
    tensor = EvalTransform(image_size, crop_pct)(path)
    assert tensor.shape == (3, image_size, image_size) and np.abs(tensor).max() < 0.02


def test_centre_crop_of_a_hand_worked_image(tmp_path):
    """7 x 7 pixels stay as they are, for int(7.5) = 7; the offset of 4 of them is round(1.5) = 2."""
    grey = np.arange(49, dtype=np.uint8).reshape(7, 7)
    Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "image.png")
    tensor = EvalTransform(4, 4 / 7.5)(tmp_path / "image.png")
    np.testing.assert_allclose(tensor[0], (grey[2:6, 2:6] / 255 - 0.485) / 0.229, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.stem)
def test_the_generator_alone_decides(path, interpolation):
    """Two transforms, one of them sent through pickle, and a third generator state in between."""
    one = train(interpolation, prob=1.0)
    two = pickle.loads(pickle.dumps(one))
    for seed in range(8):
        first = one(path, np.random.default_rng(seed))
        assert first.shape == (3, 64, 64) and first.dtype == np.float32 and np.isfinite(first).all()
        other = two(path, np.random.default_rng(seed + 100))
        np.testing.assert_array_equal(two(path, np.random.default_rng(seed)), first)
        assert not np.array_equal(other, first)


@pytest.mark.parametrize(
    "change",
    [
        {"interpolation": "bilinear"},
        {"jitter": 0.8, "augment": "none"},
        {"augment": "rand-m2-mstd0.5-inc1"},
        {"augment": "rand-m9-mstd0.5"},
        {"augment": "rand-m9-mstd0.5-inc1-n4"},
        {"augment": "rand-m9-mstd0.5-inc1-p1"},
        {"augment": "rand-m9-mstd2-inc1"},
        {"prob": 0.0},
        {"mode": "const"},
        {"mode": "rand"},
        {"count": 4},
    ],
    ids=str,
)
def test_every_argument_has_an_effect(change):
    """Within ten seeds some view differs."""
    base = {"prob": 1.0, "jitter": 0.4, "augment": "none"} if "jitter" in change else {"prob": 1.0}
    views = [
        [train(**settings)(PHOTOGRAPHS[0], np.random.default_rng(seed)) for seed in range(10)]
        for settings in (base, {**base, **change})
    ]
    assert any(not np.array_equal(one, other) for one, other in zip(*views))


def test_random_interpolation_is_one_of_the_two():
    """The first draw decides; with nothing but crop and flip behind it, the view is that of the one drawn."""
    either = collections.Counter()
    for seed in range(30):
        random = train("random", **PLAIN)
        drawn = ("bilinear", "bicubic")[np.random.default_rng(seed).integers(2)]
        image = random(PHOTOGRAPHS[0], np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        rng.integers(2)
        cropped = random.crop(PHOTOGRAPHS[0], INTERPOLATION[drawn], rng)
        if rng.random() < 0.5:
            cropped = cropped[:, ::-1]
        np.testing.assert_array_equal(image, normalise(np.ascontiguousarray(cropped)))
        either[drawn] += 1
    assert min(either.values()) > 5 and len(either) == 2


def test_warps_use_the_interpolation_of_the_image(tmp_path):
    """The crop is the image itself, so the two can differ in the warps alone, and in no other operation."""
    path = tmp_path / "image.png"
    photograph(0, (64, 64)).save(path)

    def view(interpolation, seed):
        settings = (0, "rand-m9-inc1-n1-p1", 0, "pixel", 1, (1.0, 1.0), (1.0, 1.0), 0)
        return TrainTransform(64, interpolation, *settings)(path, np.random.default_rng(seed))

    differ = sum(not np.array_equal(view("bilinear", seed), view("bicubic", seed)) for seed in range(200))
    assert differ / 200 == pytest.approx(5 / 15, abs=0.13)


def test_reading_processes_stay_light():
    """`src.data` imports neither MindSpore nor anything of the model."""
    code = (
        "import sys; import src.data.transforms, src.data.augment.mixup; "
        "print([name for name in sys.modules if name.split('.')[0] in ('mindspore', 'torch')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = ['{ROOT}', '{ROOT / 'DDRNet'}']; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
