"""The network against the published one: parameter names and shapes, logits, sizes; stochastic depth."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from golden.recipe import images, value
from initialisation import check_fan_out
from mindspore import Tensor
from src.models.ddrnet import DEPTHS, DDRNet23

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "ddrnet23.json").read_text())


@pytest.fixture(scope="module")
def network():
    ms.set_context(mode=ms.GRAPH_MODE)
    network = DDRNet23()
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(value(parameter.name, parameter.shape)))
    network.set_train(False)
    return network


@pytest.fixture
def pynative():
    """Nothing is compiled."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def test_parameters_are_those_of_the_published_checkpoint(network):
    wanted = {name: tuple(shape) for name, shape in json.loads((GOLDEN / "ddrnet23_parameters.json").read_text())}
    assert {parameter.name: parameter.shape for parameter in network.get_parameters()} == wanted
    assert sum(parameter.size for parameter in network.trainable_params()) == pytest.approx(28.2e6, rel=1e-3)


@pytest.mark.parametrize("size", [224, 64])
def test_logits_are_those_of_the_published_network(network, size):
    logits = network(Tensor(images(2, size, 0))).asnumpy()
    assert logits.shape == (2, 1000) and logits.dtype == np.float32
    np.testing.assert_allclose(logits[:, :10], EXPECTED[f"logits_{size}_first10"], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(logits, axis=1), EXPECTED[f"logits_{size}_norm"], rtol=1e-4)
    assert logits.argmax(1).tolist() == EXPECTED[f"logits_{size}_argmax"]


@pytest.mark.parametrize("count, height, width", [(1, 64, 64), (3, 33, 47), (1, 100, 100), (2, 90, 130), (2, 1, 5)])
def test_one_network_takes_any_size_and_any_batch(pynative, network, count, height, width):
    """Nothing in it needs sides that halve evenly; compared with PyTorch, which the golden size above checks too."""
    pytest.importorskip("torch")
    from ddrnet.torch_ddrnet import ddrnet23

    batch = images(count, 136, 0)[:, :, :height, :width]
    wanted = ddrnet23(batch)
    np.testing.assert_allclose(network(Tensor(batch)).asnumpy(), wanted, atol=1e-5 * np.abs(wanted).max())


def test_convolutions_start_as_published():
    fresh = DDRNet23(10)
    check_fan_out(fresh)
    assert fresh.conv1[0].weight.asnumpy().std() == pytest.approx(0.059, abs=5e-3)


def test_keeping_every_residual_is_no_stochastic_depth(network):
    batch = Tensor(images(2, 64, 0))
    kept = network(batch, Tensor(np.ones((2, 14), np.float32))).asnumpy()
    np.testing.assert_allclose(kept, network(batch).asnumpy(), atol=1e-5)


def test_a_dropped_residual_leaves_the_shortcut_of_that_image_alone(network):
    """Dropping block 1 (`layer1.1`) of image 0 equals a network in which that block's last BN gives zero."""
    batch = Tensor(images(2, 64, 0))
    keep = np.ones((2, 14), np.float32)
    keep[0, 1] = 0
    dropped = network(batch, Tensor(keep)).asnumpy()
    whole = network(batch).asnumpy()
    bn = network.layer1[1].bn2
    before = bn.gamma.value().copy(), bn.beta.value().copy()
    for parameter in (bn.gamma, bn.beta):
        parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
    without = network(batch).asnumpy()
    for parameter, old in zip((bn.gamma, bn.beta), before):
        parameter.set_data(old)
    np.testing.assert_allclose(dropped[0], without[0], atol=1e-5)
    np.testing.assert_allclose(dropped[1], whole[1], atol=1e-5)
    assert np.abs(dropped[0] - whole[0]).max() > 1e-3


@pytest.mark.parametrize("block", range(14))
def test_each_column_of_keep_reaches_a_block_of_its_own(network, block):
    batch = images(1, 64, 0)
    keep = np.ones((1, 14), np.float32)
    keep[0, block] = 0
    others = keep.copy()
    others[0, (block + 1) % 14] = 0
    one, two = (network(Tensor(batch), Tensor(k)).asnumpy() for k in (keep, others))
    assert np.abs(one - network(Tensor(batch)).asnumpy()).max() > 1e-4 and np.abs(one - two).max() > 1e-4


def test_drop_rates_grow_linearly_with_the_depth_and_the_mean_stays():
    network = DDRNet23(10, 0.4)
    keep = network.sample_keep(20000, np.random.default_rng(0))
    assert keep.shape == (20000, 14) and keep.dtype == np.float32
    assert sorted(DEPTHS) == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8]
    np.testing.assert_allclose((keep == 0).mean(0), 0.4 * np.array(DEPTHS) / 8, atol=0.015)
    np.testing.assert_allclose(keep.mean(0), 1, atol=0.02)
    assert (DDRNet23(10, 0.0).sample_keep(5, np.random.default_rng(0)) == 1).all()
