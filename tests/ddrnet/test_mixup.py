"""Mixup and CutMix against the arithmetic of their papers, written as float64 loops."""

import numpy as np
import pytest
from src.data.augment.mixup import Mixup, random_box, smooth_one_hot

from utils.cli import UserError

CLASSES = 7


def batch(count, size=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3, size, size), dtype=np.float32), rng.integers(0, CLASSES, count)


def mixup(mix_up=0.8, cutmix=1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1):
    return Mixup(mix_up, cutmix, prob, switch_prob, mode, label_smoothing, CLASSES)


def target(label, smoothing=0.1):
    """One soft target: the label's share is 1 - s + s / K, that of every other class s / K."""
    return [1 - smoothing + smoothing / CLASSES if k == label else smoothing / CLASSES for k in range(CLASSES)]


def recover(images, mixed, i):
    """(lambda, box) that explain image i of a batch of noise; box: None for mixup, else (top, bottom, left, right)."""
    x, other, out = (array.astype(float) for array in (images[i], images[len(images) - 1 - i], mixed[i]))
    foreign = np.all(out == other, 0) & np.any(x != other, 0)
    if np.any(foreign) or np.array_equal(out, x):
        rows, columns = np.flatnonzero(foreign.any(1)), np.flatnonzero(foreign.any(0))
        if not len(rows):
            return 1.0, (0, 0, 0, 0)
        box = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        return 1 - (box[1] - box[0]) * (box[3] - box[2]) / foreign.size, box
    difference = x - other
    return float((difference * (out - other)).sum() / (difference**2).sum()), None


def loops(images, labels, drawn):
    """The mixed images and targets for the (lambda, box) of each image, in float64, one pixel after the other."""
    count, channels, height, width = images.shape
    out, targets = np.zeros(images.shape), np.zeros((count, CLASSES))
    for i, (keep, box) in enumerate(drawn):
        j = count - 1 - i
        for k in range(CLASSES):
            targets[i, k] = keep * target(labels[i])[k] + (1 - keep) * target(labels[j])[k]
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    own, other = float(images[i, c, y, x]), float(images[j, c, y, x])
                    if box is None:
                        out[i, c, y, x] = keep * own + (1 - keep) * other
                    else:
                        inside = box[0] <= y < box[1] and box[2] <= x < box[3]
                        out[i, c, y, x] = other if inside else own
    return out, targets


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("mode", "count"), [("batch", 6), ("batch", 5), ("pair", 6), ("elem", 6), ("elem", 5)])
def test_images_and_targets_are_mixed_with_the_same_share(mode, count, seed):
    images, labels = batch(count)
    kept = images.copy(), labels.copy()
    mixed, targets = mixup(mode=mode)(images, labels, np.random.default_rng(seed))
    drawn = [recover(images, mixed, i) for i in range(count)]
    if count % 2:  # the one in the middle is its own partner, so nothing can be read off it
        drawn[count // 2] = drawn[0]
    wanted_images, wanted_targets = loops(images, labels, drawn)
    np.testing.assert_allclose(mixed, wanted_images, atol=2e-6)
    np.testing.assert_allclose(targets, wanted_targets, atol=2e-6)
    assert mixed.dtype == targets.dtype == np.float32
    np.testing.assert_array_equal(images, kept[0])
    np.testing.assert_array_equal(labels, kept[1])


def draws(mode, seed, count=8, **settings):
    images, labels = batch(count, 32)
    mixed, _ = mixup(mode=mode, **settings)(images, labels, np.random.default_rng(seed))
    return [recover(images, mixed, i) for i in range(count)]


def same(one, other):
    return one[1] == other[1] and one[0] == pytest.approx(other[0], abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_modes_share_their_draws(seed):
    whole, pairs, single = (draws(mode, seed) for mode in ("batch", "pair", "elem"))
    assert all(same(drawn, whole[0]) for drawn in whole)
    assert all(same(pairs[i], pairs[7 - i]) for i in range(4))
    assert not all(same(drawn, pairs[0]) for drawn in pairs)
    assert not any(same(single[i], single[7 - i]) for i in range(4))


def test_alpha_zero_turns_a_method_off():
    assert all(box is None for seed in range(20) for _, box in draws("elem", seed, cutmix=0))
    assert all(box is not None for seed in range(20) for _, box in draws("elem", seed, mix_up=0))
    images, labels = batch(4)
    mixed, targets = mixup(0, 0)(images, labels, np.random.default_rng(0))
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_allclose(targets, [target(label) for label in labels], atol=1e-7)


def test_probabilities():
    """Of 1,600 draws: 30 % mixed, of these a quarter with CutMix; bounds of about 4 deviations."""
    settings = mixup(prob=0.3, switch_prob=0.25)
    rng = np.random.default_rng(0)
    drawn = [settings.draw(32, 32, rng) for _ in range(1600)]
    cut = sum(box is not None for _, box in drawn)
    mixed = cut + sum(box is None and keep < 1 for keep, box in drawn)
    assert mixed / 1600 == pytest.approx(0.3, abs=0.05)
    assert cut / mixed == pytest.approx(0.25, abs=0.08)
    images, labels = batch(4)
    np.testing.assert_array_equal(mixup(prob=0)(images, labels, rng)[0], images)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 3.0])
def test_lambda_is_beta_distributed(alpha):
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)) of Beta(alpha, alpha)."""
    rng = np.random.default_rng(1)
    keep = [mixup(alpha, 0).draw(32, 32, rng)[0] for _ in range(4000)]
    assert np.mean(keep) == pytest.approx(0.5, abs=0.03)
    assert np.var(keep) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_lambda_is_the_share_outside_of_the_box():
    settings = mixup(mix_up=0)
    rng = np.random.default_rng(2)
    for _ in range(500):
        keep, (rows, columns) = settings.draw(200, 100, rng)
        assert 0 <= rows.start <= rows.stop <= 200 and 0 <= columns.start <= columns.stop <= 100
        assert keep == pytest.approx(1 - (rows.stop - rows.start) * (columns.stop - columns.start) / 20000)


def test_box_has_its_share_and_the_image_s_shape_and_lies_anywhere():
    """A quarter of 200 x 100 pixels is 100 x 50, unless an edge cuts it: with centres uniform, three times of four."""
    rng = np.random.default_rng(3)
    boxes = [random_box(200, 100, 0.75, rng) for _ in range(2000)]
    sides = np.array([(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in boxes])
    assert (sides.max(0) == (100, 50)).all() and (sides.min(0) >= (50, 25)).all()
    assert (sides == (100, 50)).all(1).mean() == pytest.approx(0.25, abs=0.05)
    centres = np.array([(rows.start + rows.stop, columns.start + columns.stop) for rows, columns in boxes]) / 2
    np.testing.assert_allclose(centres.mean(0), (100, 50), rtol=0.04)


def test_same_seed_same_batch():
    images, labels = batch(6)
    one, two, three = (mixup(mode="elem")(images, labels, np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
    assert not np.array_equal(one[0], three[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smooth_one_hot(smoothing):
    targets = smooth_one_hot(np.array([2, 0, 6]), CLASSES, smoothing)
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets, [target(label, smoothing) for label in (2, 0, 6)], atol=1e-7)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"mode": "half"}, "mixup_mode"),
        ({"mix_up": -1}, "mix_up"),
        ({"cutmix": -0.1}, "cutmix"),
        ({"prob": 1.5}, "mixup_prob"),
        ({"switch_prob": -1}, "switch_prob"),
        ({"label_smoothing": 2}, "label_smoothing"),
    ],
)
def test_bad_settings_are_named(settings, word):
    with pytest.raises(UserError, match=word):
        mixup(**settings)


def test_pairs_need_an_even_batch():
    with pytest.raises(UserError, match="even batch size, not 5"):
        mixup(mode="pair")(*batch(5), np.random.default_rng(0))
