"""The training step: gradients, accumulation, clipping, loss scale, overflow, divergence."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from src.tools.criterion import SoftTargetCrossEntropy
from src.tools.optimizer import make_optimizer
from src.trainers.train_one_step import MAX_OVERFLOWS, SCALE_WINDOW, LossScale, TrainOneStep, drop_path

from utils.cli import UserError

LR = 0.1


class Linear(nn.Cell):
    """Logits of the flattened image, so that the gradient is known in closed form."""

    def __init__(self, features=12, classes=3):
        super().__init__()
        ms.set_seed(0)
        rng = np.random.default_rng(1)
        self.dense = nn.Dense(
            features, classes, weight_init=Tensor(rng.standard_normal((classes, features)), ms.float32)
        )

    def construct(self, images, keep=None):
        x = images.reshape((images.shape[0], -1))
        if keep is not None:
            x = x * keep
        return self.dense(x)


def batch(seed, count=4):
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((count, 3, 2, 2)).astype(np.float32)
    return images, rng.dirichlet(np.ones(3), count).astype(np.float32), None


@pytest.fixture(scope="module")
def compiled():
    """A network and its step, whose graphs are compiled once; and the network's weights at the start."""
    ms.set_context(mode=ms.GRAPH_MODE)
    network = Linear()
    network.set_train(True)
    optimizer = make_optimizer("momentum", network.trainable_params(), 1.0, 0.0, 0.0, False, (0.9, 0.999), 0.9)
    step = TrainOneStep(network, SoftTargetCrossEntropy(), optimizer, LossScale(1024.0, True), None)
    return network, step, [parameter.asnumpy().copy() for parameter in network.trainable_params()]


@pytest.fixture
def make(compiled):
    """Gives the network and the step as new, with this clipping and loss scale, which are no part of the graphs."""
    network, step, weights = compiled

    def make(clip=None, loss_scale=1024.0, dynamic=True):
        for parameter, weight in zip(network.trainable_params(), weights):
            parameter.set_data(Tensor(weight))
        step.clear()
        step.clip, step.loss_scale = clip, LossScale(loss_scale, dynamic)
        return network, step

    return make


def reference(network, batches):
    """Loss and gradients of weight and bias in float64, mean over the batches."""
    weight, bias = (p.asnumpy().astype(np.float64) for p in (network.dense.weight, network.dense.bias))
    losses, weights, biases = [], [], []
    for images, targets, keep in batches:
        x = images.reshape(len(images), -1).astype(np.float64) * (1 if keep is None else keep)
        logits = x @ weight.T + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        losses.append(-(targets * np.log(p)).sum(1).mean())
        error = (p - targets) / len(images)
        weights.append(error.T @ x)
        biases.append(error.sum(0))
    return np.mean(losses), np.mean(weights, 0), np.mean(biases, 0)


@pytest.mark.parametrize("clip", [None, 0.05, 50.0])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_is_the_mean_gradient_clipped_to_its_global_norm(make, clip, parts):
    network, step = make(clip)
    batches = [batch(seed) for seed in range(parts)]
    if parts > 1:
        batches[1] = (*batches[1][:2], None)
    loss, weight_gradient, bias_gradient = reference(network, batches)
    weight, bias = network.dense.weight.asnumpy().copy(), network.dense.bias.asnumpy().copy()
    result = step(batches, LR)
    norm = np.sqrt((weight_gradient**2).sum() + (bias_gradient**2).sum())
    factor = 1 if clip is None else min(1, clip / norm)
    assert factor < 0.5 if clip == 0.05 else factor == 1
    assert result.loss == pytest.approx(loss, rel=1e-5) and result.norm == pytest.approx(norm, rel=1e-5)
    assert not result.overflow and result.loss_scale == 1024
    np.testing.assert_allclose(network.dense.weight.asnumpy(), weight - LR * factor * weight_gradient, atol=1e-6)
    np.testing.assert_allclose(network.dense.bias.asnumpy(), bias - LR * factor * bias_gradient, atol=1e-6)
    again, weight_gradient, _ = reference(network, batches)  # nothing is left over from the step before
    second = step(batches, 0.0)
    assert second.loss == pytest.approx(again, rel=1e-5)
    np.testing.assert_allclose(
        second.norm, np.sqrt((weight_gradient**2).sum() + (reference(network, batches)[2] ** 2).sum()), rtol=1e-4
    )


def test_the_residuals_dropped_in_a_step_are_new_and_the_same_for_any_number_of_devices():
    network = SimpleNamespace(sample_keep=lambda count, rng: rng.random((count, 14)))

    def drawn(batch_size, epoch, step, *devices, seed=5, rate=0.1):
        args = SimpleNamespace(drop_path_rate=rate, accumulation_step=2, batch_size=batch_size, seed=seed)
        return drop_path(network, args, epoch, step, *devices)

    whole = np.concatenate(drawn(8, 1, 2))
    parts = [keep for rank in (0, 1) for keep in drawn(4, 1, 2, SimpleNamespace(rank=rank, count=2))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    for other in (drawn(8, 1, 2, seed=6), drawn(8, 2, 2), drawn(8, 1, 3)):
        assert np.abs(whole - np.concatenate(other)).max() > 0.1
    assert drawn(8, 1, 2, rate=0.0) == [None, None]


def test_keep_reaches_the_network(make):
    network, step = make()
    images, targets, _ = batch(0)
    keep = np.random.default_rng(3).integers(0, 2, (4, 12)).astype(np.float32)
    loss, _, _ = reference(network, [(images, targets, keep)])
    assert step([(images, targets, keep)], LR).loss == pytest.approx(loss, rel=1e-5)


def test_an_overflow_skips_the_step_and_halves_a_dynamic_scale(make):
    network, step = make(loss_scale=2.0**127)  # times a gradient above 2, beyond float32
    images, targets, keep = batch(0)
    parts = [(100 * images, targets, keep)]
    before = network.dense.weight.asnumpy().copy()
    first = step(parts, LR)
    assert first.overflow and first.loss_scale == 2.0**127 and np.isfinite(first.loss)
    np.testing.assert_array_equal(network.dense.weight.asnumpy(), before)
    assert step.loss_scale.value == 2.0**126 and step.loss_scale.overflows == 1
    for _ in range(12):
        if not step(parts, LR).overflow:
            break
    assert np.abs(network.dense.weight.asnumpy() - before).max() > 0
    assert np.isfinite(network.dense.weight.asnumpy()).all()


def test_a_fixed_scale_stays_and_too_many_overflows_end_the_training(make):
    _, step = make(loss_scale=2.0**127, dynamic=False)
    images, targets, keep = batch(0)
    parts = [(100 * images, targets, keep)]
    for _ in range(MAX_OVERFLOWS - 1):
        assert step(parts, LR).overflow
    assert step.loss_scale.value == 2.0**127
    with pytest.raises(UserError, match="not finite"):
        step(parts, LR)


def test_a_dynamic_scale_doubles_after_a_window_without_overflow():
    scale = LossScale(8.0, True)
    for _ in range(SCALE_WINDOW - 1):
        scale.update(False)
    assert scale.value == 8
    scale.update(False)
    assert (scale.value, scale.good) == (16, 0)
    scale.update(True)
    assert (scale.value, scale.overflows, scale.in_a_row) == (8, 1, 1)
    scale.update(False)
    assert scale.in_a_row == 0
    fixed = LossScale(8.0, False)
    for _ in range(SCALE_WINDOW):
        fixed.update(False)
    assert fixed.value == 8


def test_a_scaled_loss_gives_the_same_step(make):
    after = []
    for scale in (1.0, 4096.0):
        network, step = make(loss_scale=scale, dynamic=False)
        step([batch(0)], LR)
        after.append(network.dense.weight.asnumpy())
    np.testing.assert_allclose(*after, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make):
    network, step = make()
    before = network.dense.weight.asnumpy().copy()
    images, targets, keep = batch(0)
    images[0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"the loss is nan; training has diverged"):
        step([(images, targets, keep)], LR)
    np.testing.assert_array_equal(network.dense.weight.asnumpy(), before)
