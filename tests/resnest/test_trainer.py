"""The training step against NumPy in float64, its learning rates, what it does with numbers that are not finite."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from src.resnest import ResNeSt
from src.trainer import (
    SoftTargetCrossEntropy,
    TrainOneStep,
    dropout_mask,
    learning_rates,
    make_optimizer,
    zero_last_gamma,
)

from utils.cli import UserError

MOMENTUM, DECAY = 0.9, 0.05


class Linear(nn.Cell):
    """Logits of the flattened image, so that the gradient is known in closed form."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(1)
        self.dense = nn.Dense(12, 3, weight_init=Tensor(rng.standard_normal((3, 12)), ms.float32))
        self.dense.bias.set_data(Tensor(rng.standard_normal(3), ms.float32))

    def construct(self, images, keep=None):
        x = images.reshape((images.shape[0], -1))
        if keep is not None:
            x = x * keep
        return self.dense(x)


def batch(seed, count=4):
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((count, 3, 2, 2)).astype(np.float32)
    return images, rng.dirichlet(np.ones(3), count).astype(np.float32)


def make(network=None, momentum=MOMENTUM):
    ms.set_context(mode=ms.GRAPH_MODE)
    network = network or Linear()
    network.set_train(True)
    optimizer = make_optimizer(network.trainable_params(), 1.0, momentum, DECAY)
    return network, TrainOneStep(network, SoftTargetCrossEntropy(), optimizer)


def reference(weight, bias, images, targets, keep=1.0):
    """Loss and gradients of weight and bias in float64."""
    x = images.reshape(len(images), -1).astype(np.float64) * keep
    logits = x @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - targets) / len(images)
    return -(targets * np.log(p)).sum(1).mean(), error.T @ x, error.sum(0)


@pytest.mark.parametrize("momentum", [0.0, MOMENTUM])
def test_steps_are_nesterovs_with_decay_of_the_weights_only(momentum):
    """Sutskever et al. 2013, equation 4, in the usual form: v = m v + g, w = w - lr (g + m v)."""
    network, step = make(momentum=momentum)
    weight, bias = (p.asnumpy().astype(np.float64) for p in (network.dense.weight, network.dense.bias))
    v, u = 0.0, 0.0
    for number, lr in enumerate((0.1, 0.3, 0.02, 0.2)):
        images, targets = batch(number)
        loss, g, b = reference(weight, bias, images, targets)
        assert step(images, targets, None, lr).loss == pytest.approx(loss, rel=1e-5)
        g = g + DECAY * weight
        v, u = momentum * v + g, momentum * u + b
        weight, bias = weight - lr * (g + momentum * v), bias - lr * (b + momentum * u)
        np.testing.assert_allclose(network.dense.weight.asnumpy(), weight, atol=1e-5)
        np.testing.assert_allclose(network.dense.bias.asnumpy(), bias, atol=1e-5)


def test_keep_reaches_the_network():
    network, step = make()
    images, targets = batch(0)
    keep = np.random.default_rng(3).integers(0, 2, (4, 12)).astype(np.float32)
    weight, bias = network.dense.weight.asnumpy(), network.dense.bias.asnumpy()
    loss, _, _ = reference(weight, bias, images, targets, keep)
    assert step(images, targets, keep, 0.1).loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_numbers_that_are_not_finite_stop_the_training_before_they_reach_the_weights(bad):
    network, step = make()
    images, targets = batch(0)
    step(images, targets, None, 0.1)
    before = network.dense.weight.asnumpy().copy()
    with pytest.raises(UserError, match="diverged, start again with a lower --lr"):
        step(np.float32(bad) * np.abs(images), targets, None, 0.1)
    np.testing.assert_array_equal(network.dense.weight.asnumpy(), before)


def test_learning_rates_rise_linearly_and_fall_along_a_cosine():
    rates = learning_rates(0.4, 0.1, 1.5, 5, 10)
    assert rates.shape == (50,) and rates.dtype == np.float32
    np.testing.assert_allclose(rates[:15], 0.4 * np.arange(1, 16) / 15, rtol=1e-6)
    position = np.arange(35) / 35
    np.testing.assert_allclose(rates[15:], 0.1 + 0.3 * np.cos(np.pi * position / 2) ** 2, rtol=1e-5)
    np.testing.assert_allclose(learning_rates(0.4, 0.0, 0.0, 1, 4), 0.4 * np.cos(np.pi * np.arange(4) / 8) ** 2, 1e-5)


def test_dropout_is_drawn_from_seed_epoch_and_step_for_all_devices_together():
    network = ResNeSt((1, 1, 1, 1), 32, 3, dropout=0.25)
    whole = dropout_mask(network, 6, 1, 2, 3)
    parts = [dropout_mask(network, 3, 1, 2, 3, rank, 2) for rank in (0, 1)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert whole.shape == (6, 2048) and whole.dtype == np.float32
    np.testing.assert_allclose(np.unique(whole), [0, 4 / 3], rtol=1e-6)
    assert (whole == 0).mean() == pytest.approx(0.25, abs=0.02)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert (dropout_mask(network, 6, *other) != whole).any()
    assert dropout_mask(ResNeSt((1, 1, 1, 1), 32, 3), 6, 1, 2, 3) is None


def test_a_network_with_zero_last_gammas_starts_as_its_shortcuts():
    network = ResNeSt((2, 1, 1, 1), 32, 3)
    zero_last_gamma(network)
    network.set_train(False)
    x = np.abs(np.random.default_rng(0).standard_normal((2, 256, 8, 8))).astype(np.float32)
    np.testing.assert_array_equal(network.layer1[1](Tensor(x)).asnumpy(), x)
    assert all(p.asnumpy().all() for p in network.trainable_params() if p.name.endswith("bn1.gamma"))
