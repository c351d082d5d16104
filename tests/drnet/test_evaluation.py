"""Routed evaluation against classifying every image at every resolution and picking afterwards."""

import resource

import mindspore as ms
import numpy as np
import pytest
from drnet.tiny import random_batches, tiny_drnet
from mindspore import Tensor
from src.evaluation import Queues, dynamic_route, evaluate, fixed_route

from utils.cli import UserError
from utils.images import Batch

COUNT = 53


@pytest.fixture(scope="module")
def drnet():
    ms.set_context(mode=ms.GRAPH_MODE)
    drnet = tiny_drnet()
    # Centre the scores, so that every resolution is chosen for some of the images.
    images = np.concatenate([batch.images for batch in random_batches(COUNT, [COUNT])])
    scores = drnet.predict(Tensor(images)).asnumpy()
    bias = drnet.predictor.end_point.bias
    bias.set_data(Tensor(bias.asnumpy() - scores.mean(0)))
    return drnet


@pytest.fixture(scope="module")
def everything(drnet):
    """(scores (n, R), logits (n, R, K), labels (n,)) of all images, computed without any routing."""
    (batch,) = random_batches(COUNT, [COUNT])
    logits = [classify(Tensor(batch.images)).asnumpy() for classify in drnet.classify]
    return drnet.predict(Tensor(batch.images)).asnumpy(), np.stack(logits, 1), batch.labels


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8]), (8, [3, 8, 1]), (1, [1]), (64, [53])])
def test_every_image_is_classified_once_at_its_resolution(drnet, everything, batch_size, sizes):
    scores, logits, labels = everything
    result = evaluate(
        drnet, random_batches(COUNT, sizes), COUNT, dynamic_route(drnet, max(sizes)), batch_size, show=False
    )
    chosen = scores.argmax(1)
    assert len(set(chosen)) == 3
    np.testing.assert_array_equal(result.chosen, chosen)
    picked = logits[np.arange(COUNT), chosen]
    np.testing.assert_array_equal(result.predicted, picked.argmax(1))
    np.testing.assert_array_equal(result.images, np.bincount(chosen, minlength=3))
    first = np.argsort(-picked, axis=1, kind="stable")
    for column, k in enumerate((1, 5)):
        hits = (first[:, :k] == labels[:, None]).any(1)
        assert result.correct[:, column].tolist() == [int(hits[chosen == j].sum()) for j in range(3)]
    assert result.top() == pytest.approx(100 * (first[:, 0] == labels).mean())
    assert result.mean_gmacs([3.0, 2.0, 1.0]) == pytest.approx((3.0 - chosen).mean())


def test_order_does_not_matter(drnet):
    (batch,) = random_batches(COUNT, [COUNT])
    order = np.random.default_rng(5).permutation(COUNT)
    shuffled = [Batch(batch.images[rows], batch.labels[rows], rows, []) for rows in np.split(order, range(7, COUNT, 7))]
    one = evaluate(drnet, [batch], COUNT, dynamic_route(drnet, COUNT), 16, show=False)
    other = evaluate(drnet, shuffled, COUNT, dynamic_route(drnet, 7), 5, show=False)
    for name in ("correct", "images", "predicted", "chosen"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_fixed_route_uses_one_resolution_or_all(drnet, everything):
    _, logits, labels = everything
    for candidates in ([1], [0, 1, 2]):
        result = evaluate(drnet, random_batches(COUNT, [8]), COUNT, fixed_route(drnet, candidates), 8, show=False)
        for j in range(3):
            hits = int((logits[:, j].argmax(1) == labels).sum()) if j in candidates else 0
            assert result.correct[j, 0] == hits
            assert result.images[j] == (COUNT if j in candidates else 0)


def test_sampling_follows_the_scores_and_the_seed(drnet, everything):
    scores, _, _ = everything

    def sampled(seed, size):
        batches = random_batches(COUNT, [size])
        return evaluate(drnet, batches, COUNT, dynamic_route(drnet, size, seed), 8, show=False).chosen

    np.testing.assert_array_equal(sampled(1, 8), sampled(1, 5))
    assert (sampled(1, 8) != sampled(2, 8)).any()
    assert (sampled(1, 8) != scores.argmax(1)).any()
    soft = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    picks = np.concatenate([sampled(seed, 53) for seed in range(30)])
    np.testing.assert_allclose(np.bincount(picks, minlength=3) / len(picks), soft.mean(0), atol=0.05)


def test_corrupt_images_are_counted_and_named(drnet):
    batches = [*random_batches(6, [6]), Batch(np.zeros((0, 3, 32, 32), np.float32), np.zeros(0, int), np.zeros(0), [6])]
    seen = []
    result = evaluate(drnet, batches, 7, dynamic_route(drnet, 6), 4, on_corrupt=seen.append, show=False)
    assert seen == result.corrupt == [6] and result.images.sum() == 6 and result.predicted[6] == -1


def test_broken_weights_are_refused(drnet):
    weight = drnet.classifier.end_point.bias
    good = weight.asnumpy().copy()
    weight.set_data(Tensor(np.full_like(good, np.nan)))
    try:
        with pytest.raises(UserError, match="NaN"):
            evaluate(drnet, random_batches(4, [4]), 4, fixed_route(drnet, [0]), 4, show=False)
    finally:
        weight.set_data(Tensor(good))


def test_a_queue_holds_at_most_one_batch(drnet):
    """4,000 images, none of which fills a queue of its own for long: the peak memory stays what it was after 400."""
    queues = Queues(drnet, 16)

    def run(count):
        for batch in random_batches(count, [16]):
            mask = np.eye(3, dtype=bool)[batch.rows % 3]
            for _ in queues.add(batch, mask):
                pass
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = run(400)
    images = 16 * 3 * 32 * 32 * 4
    after = before
    for _ in range(9):
        after = run(400)
    assert (after - before) * 1024 < 400 * images / 16, "the queues keep images that they have classified"
    assert all(len(rows) < 16 for rows in queues.rows)
