"""GumbelSoftmax against NumPy."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from src.gumbelmodule import GumbelSoftmax, gumbel_noise

SCORES = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)


def test_forward_is_one_hot_of_the_noisy_argmax():
    noise = gumbel_noise(SCORES.shape, 3)
    for given, wanted in ((noise, SCORES + noise), (None, SCORES)):
        out = GumbelSoftmax()(Tensor(SCORES), None if given is None else Tensor(given)).asnumpy()
        np.testing.assert_allclose(out, np.eye(4)[wanted.argmax(1)], atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gradient_is_that_of_the_softmax(temperature):
    noise = gumbel_noise(SCORES.shape, 3)
    weight = np.random.default_rng(2).standard_normal(SCORES.shape)
    module = GumbelSoftmax(temperature)

    def weighted(scores):
        return (module(scores, Tensor(noise)) * Tensor(weight.astype(np.float32))).sum()

    gradient = ms.grad(weighted)(Tensor(SCORES))
    z = (SCORES.astype(np.float64) + noise) / temperature
    soft = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    wanted = soft * (weight - (weight * soft).sum(1, keepdims=True)) / temperature
    np.testing.assert_allclose(gradient.asnumpy(), wanted, atol=1e-6)


def test_noise_samples_the_softmax():
    """The Gumbel-max theorem: argmax(scores + noise) is distributed as softmax(scores)."""
    scores = np.array([1.0, 0.0, -1.0])
    picks = (scores + gumbel_noise((20000, 3), 0)).argmax(1)
    soft = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(np.bincount(picks) / len(picks), soft, atol=0.02)


def test_noise_depends_on_its_key_alone():
    np.testing.assert_array_equal(gumbel_noise((2, 3), 1, 2, 3), gumbel_noise((2, 3), 1, 2, 3))
    assert np.abs(gumbel_noise((2, 3), 1, 2, 3) - gumbel_noise((2, 3), 1, 2, 4)).min() > 0


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature"):
        GumbelSoftmax(0)
