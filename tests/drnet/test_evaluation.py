"""Routed evaluation, and DRNet as one cell, against classifying every image at every resolution and picking after."""

import contextlib
import signal
import tracemalloc

import mindspore as ms
import numpy as np
import pytest
from drnet.tiny import random_images, spread_choices, tiny_drnet
from mindspore import Tensor
from src.evaluation import Queues, dynamic_route, evaluate, fixed_route

from utils.cli import Interrupt, UserError
from utils.images import Batch, ImageFolder, Loader

COUNT, CLASSES = 29, 7
IMAGES = random_images(COUNT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As many files in seven classes; what an image shows is in `IMAGES`."""
    root = tmp_path_factory.mktemp("files")
    for row in range(COUNT):
        path = root / str(row * CLASSES // COUNT) / f"{row:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return ImageFolder(root)


@pytest.fixture(scope="module")
def drnet():
    ms.set_context(mode=ms.GRAPH_MODE)
    drnet = tiny_drnet(num_classes=CLASSES)
    for cell in (drnet.predict, *drnet.classify):  # each compiles once for all the batch sizes of this file
        cell.set_inputs(Tensor(shape=[None, 3, 32, 32], dtype=ms.float32))
    spread_choices(drnet, IMAGES)
    return drnet


@pytest.fixture(scope="module")
def scores(drnet):
    """Of all images, (n, R)."""
    return drnet.predict(Tensor(IMAGES)).asnumpy()


@pytest.fixture(scope="module")
def logits(drnet):
    """Of all images at all resolutions, (n, R, K), computed without any routing."""
    return np.stack([classify(Tensor(IMAGES)).asnumpy() for classify in drnet.classify], 1)


@pytest.fixture(autouse=True)
def signals():
    """`Interrupt` takes the signals; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def reading(folder, batch_size, order=None, bad=()):
    """A loader for which row k shows image `order[k]`, or cannot be read."""
    order = np.arange(COUNT) if order is None else order

    def view(path, row, epoch):
        if row in bad:
            raise OSError("no image")
        return IMAGES[order[row]]

    with Loader(folder, view, (3, 32, 32), batch_size, 1) as loader:
        yield loader


def evaluated(drnet, folder, route, batch_size=8, read=8, **others):
    on_corrupt = others.pop("on_corrupt", lambda rows: None)
    with reading(folder, read, **others) as loader:
        return evaluate(drnet, loader, route, batch_size, Interrupt(), on_corrupt=on_corrupt)


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "PyNative"])
def test_drnet_as_a_cell_gives_the_logits_of_the_chosen_resolution(drnet, scores, logits, mode):
    """With images of all choices, and of one alone."""
    chosen = scores.argmax(1)
    assert len(set(chosen)) == 3
    ms.set_context(mode=mode)
    try:
        if mode == ms.GRAPH_MODE:
            drnet.set_inputs(Tensor(shape=[None, 3, 32, 32], dtype=ms.float32))
        for rows in (np.arange(9), np.flatnonzero(chosen == 1)[:2], np.flatnonzero(chosen == 2)[:1]):
            own, choices = drnet(Tensor(IMAGES[rows]))
            assert choices.asnumpy().tolist() == chosen[rows].tolist()
            np.testing.assert_allclose(own.asnumpy(), logits[rows, chosen[rows]], atol=1e-5)
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)


@pytest.mark.parametrize(("batch_size", "read"), [(8, 8), (8, 3), (1, 1), (32, 29)])
def test_every_image_is_classified_once_at_its_resolution(drnet, folder, scores, logits, batch_size, read):
    result = evaluated(drnet, folder, dynamic_route(drnet, read), batch_size, read)
    chosen, labels = scores.argmax(1), folder.labels
    np.testing.assert_array_equal(result.chosen, chosen)
    picked = logits[np.arange(COUNT), chosen]
    np.testing.assert_array_equal(result.predicted, picked.argmax(1))
    np.testing.assert_array_equal(result.images, np.bincount(chosen, minlength=3))
    first = np.argsort(-picked, axis=1, kind="stable")
    for column, k in enumerate((1, 5)):
        hits = (first[:, :k] == labels[:, None]).any(1)
        assert result.correct[:, column].tolist() == [int(hits[chosen == j].sum()) for j in range(3)]
        assert result.top(column) == pytest.approx(hits.mean())
        assert result.top_of(2, column) == pytest.approx(hits[chosen == 2].mean())
    assert result.mean_gmacs([3.0, 2.0, 1.0]) == pytest.approx((3.0 - chosen).mean())


def test_order_does_not_matter(drnet, folder):
    order = np.random.default_rng(5).permutation(COUNT)
    one = evaluated(drnet, folder, dynamic_route(drnet, COUNT), 16, COUNT)
    other = evaluated(drnet, folder, dynamic_route(drnet, 7), 5, 7, order=order)
    for name in ("predicted", "chosen"):
        np.testing.assert_array_equal(getattr(one, name)[order], getattr(other, name))


def test_fixed_route_uses_one_resolution_or_all(drnet, folder, logits):
    for candidates in ([1], [0, 1, 2]):
        result = evaluated(drnet, folder, fixed_route(drnet, candidates))
        for j in range(3):
            hits = int((logits[:, j].argmax(1) == folder.labels).sum()) if j in candidates else 0
            assert result.correct[j, 0] == hits
            assert result.images[j] == (COUNT if j in candidates else 0)
    assert evaluated(drnet, folder, fixed_route(drnet, [1])).top_of(0) is None


def test_sampling_follows_the_scores_and_the_seed(drnet, folder, scores):
    def sampled(seed, read):
        return evaluated(drnet, folder, dynamic_route(drnet, read, seed), read=read).chosen

    one = sampled(1, 8)
    np.testing.assert_array_equal(one, sampled(1, 5))
    assert (one != sampled(2, 8)).any()
    assert (one != scores.argmax(1)).any()
    batch = Batch(IMAGES, np.zeros(COUNT, np.int32), np.arange(COUNT), [])
    picks = sum(dynamic_route(drnet, COUNT, seed).choose(batch).sum(0) for seed in range(12))
    soft = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(picks / picks.sum(), soft.mean(0), atol=0.08)


def test_corrupt_images_are_counted_and_named(drnet, folder, scores):
    seen = []
    result = evaluated(drnet, folder, dynamic_route(drnet, 8), bad=(6, 20, 21), on_corrupt=seen.extend)
    assert seen == [6, 20, 21] and result.corrupt == 3 and result.images.sum() == COUNT - 3
    assert result.predicted[6] == result.chosen[6] == -1
    left = np.delete(np.arange(COUNT), seen)
    np.testing.assert_array_equal(result.chosen[left], scores.argmax(1)[left])
    with pytest.raises(UserError, match=f"none of the {COUNT} images of .* can be read"):
        evaluated(drnet, folder, fixed_route(drnet, [2]), bad=range(COUNT))


def test_broken_weights_are_refused(drnet, folder):
    weight = drnet.classifier.end_point.bias
    good = weight.asnumpy().copy()
    weight.set_data(Tensor(np.full_like(good, np.nan)))
    try:
        with pytest.raises(UserError, match="NaN"):
            evaluated(drnet, folder, fixed_route(drnet, [0]))
    finally:
        weight.set_data(Tensor(good))


def test_a_queue_holds_at_most_one_batch(drnet):
    """Of ten batches, whose images go to three queues by turns."""
    queues = Queues(drnet, 16)
    tracemalloc.start()
    try:
        for first in range(0, 160, 16):
            batch = Batch(random_images(16, seed=first), np.zeros(16, np.int32), np.arange(first, first + 16), [])
            for _ in queues.add(batch, np.eye(3, dtype=bool)[batch.rows % 3]):
                pass
            assert all(len(rows) < 16 for rows in queues.rows)
            if first == 48:  # each queue has run once
                before, _ = tracemalloc.get_traced_memory()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < batch.images.nbytes / 2, "the queues keep images that they have classified"
