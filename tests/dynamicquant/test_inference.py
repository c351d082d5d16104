"""Grouped inference against the network that computes every bit-width and multiplies with the choice."""

import mindspore as ms
import numpy as np
import pytest
import src.resnet as resnet
from dynamicquant import tiny
from golden.recipe import images, value
from mindspore import Tensor
from src.gumbelsoftmax import gumbel_noise
from src.inference import Front, Predictor
from src.resnet import Architecture

SMALL = {"num_classes": 7, "image_size": 32}
BATCH = 4
IMAGES = images(11, 32, 0)
SIZES = (4, 3, 4)  # of the batches in which they come; the last of each group is incomplete


@pytest.fixture(scope="module", autouse=True, params=["tiny", pytest.param("whole", marks=pytest.mark.full)])
def sizes(request):
    """Few channels and one block a stage; the whole network has nothing more to group."""
    ms.set_context(mode=ms.GRAPH_MODE)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in tiny.SIZES.items() if request.param == "tiny" else ():
            patch.setattr(resnet, name, size)
        yield request.param


def filled(network, alpha: float = 6.0):
    """The recipe's weights; PACT's maxima away from where they start."""
    for parameter in network.get_parameters():
        array = value(parameter.name, parameter.shape)
        parameter.set_data(Tensor(array + np.float32(alpha) if parameter.name.endswith(".alpha") else array))
    return network.set_train(False)


class Counting(Predictor):
    """Notes which back part runs."""

    def _run(self, group: int) -> np.ndarray:
        self.ran.append(group)
        return super()._run(group)


def made(architecture: Architecture, network, **options) -> Counting:
    predictor = Counting(architecture, BATCH, **options).load(network)
    predictor.ran = []
    return predictor


def run(predictor: Counting) -> tuple[np.ndarray, np.ndarray]:
    """Decisions (n, D) and logits (n, K) of IMAGES. Each comes back once, in full batches, and nothing is compiled."""
    predictor.compile()
    predictor.ran.clear()
    cells = [predictor.front, *predictor.backs]
    compiled = [set(cell.compile_cache) for cell in cells]
    assert all(len(phases) == 1 for phases in compiled)
    decisions = np.full((len(IMAGES), predictor.choices.shape[1]), -1)
    logits = np.full((len(IMAGES), SMALL["num_classes"]), np.nan)

    def take(classified):
        for rows, chosen, out in classified:
            assert len(rows) == len(set(rows)) and (decisions[rows] == -1).all()
            decisions[rows], logits[rows] = chosen, out

    first = 0
    for size in SIZES:
        rows = np.arange(first, first + size)
        take(predictor.add(IMAGES[rows], rows))
        first += size
    take(predictor.flush())
    assert not list(predictor.flush()) and (decisions >= 0).all() and np.isfinite(logits).all()
    groups = np.zeros(len(IMAGES), int) if len(cells) == 2 else decisions[:, 0]
    batches = -(-np.bincount(groups) // BATCH)
    assert np.bincount(predictor.ran).tolist() == batches.tolist()
    assert [set(cell.compile_cache) for cell in cells] == compiled
    return decisions, logits


def in_batches(cell, *arrays: np.ndarray) -> list[np.ndarray]:
    """Outputs of a network for IMAGES and what goes with them, in batches of the predictor's size."""
    parts = []
    for first in range(0, len(IMAGES), BATCH):
        rows = np.arange(first, first + BATCH) % len(IMAGES)
        out = cell(*(Tensor(array[rows]) for array in (IMAGES, *arrays)))
        parts.append([tensor.asnumpy() for tensor in (out if isinstance(out, tuple) else (out,))])
    return [np.concatenate(column)[: len(IMAGES)] for column in zip(*parts)]


def balanced(architecture: Architecture) -> tuple:
    """The recipe's network, its controller's bias such that all bit-widths are chosen, and its scores (n, D, R)."""
    network = filled(architecture.network())
    scores = in_batches(Front(network))[1]
    network.fc2.bias.set_data(Tensor(network.fc2.bias.asnumpy() - scores.mean(0).ravel()))
    return network, scores - scores.mean(0)


@pytest.fixture(scope="module")
def all_bits(sizes):
    """The network that computes 1 to 7 bits: what the others are compared with. Its controller is not asked."""
    return filled(Architecture(num_bits=7, **SMALL).network())


def of_seven(bits: np.ndarray) -> np.ndarray:
    """Choices float32 (n, 1, 7) of `all_bits`."""
    return np.eye(7, dtype=np.float32)[bits - 1][:, None]


@pytest.fixture(scope="module")
def dynamic(sizes):
    """A network of 3, 4 or 5 bits, its scores, and its predictor."""
    network, scores = balanced(Architecture(**SMALL))
    return network, scores, made(Architecture(**SMALL), network)


def test_grouped_inference_equals_the_network_that_computes_all_bit_widths(dynamic, all_bits):
    _, scores, predictor = dynamic
    decisions, logits = run(predictor)
    assert set(decisions[:, 0]) == {0, 1, 2}
    np.testing.assert_array_equal(decisions, scores.argmax(-1))
    wanted = in_batches(all_bits, of_seven(decisions[:, 0] + 3))[0]
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    # The bit-widths differ by far more than the bound.
    other = in_batches(all_bits, of_seven((decisions[:, 0] + 1) % 3 + 3))[0]
    assert np.abs(logits - other).max(1).min() > 1e-2


def test_sampled_choices_depend_on_the_seed_and_the_image(dynamic):
    _, scores, predictor = dynamic
    predictor.sample_seed = 3
    decisions, _ = run(predictor)
    predictor.sample_seed = None
    noise = np.stack([gumbel_noise((1, 3), 3, row) for row in range(len(IMAGES))])
    np.testing.assert_array_equal(decisions, (scores + noise).argmax(-1))


@pytest.mark.parametrize("bits", [1, 7])
def test_forced_bits_may_be_others_than_those_to_choose_from(dynamic, all_bits, bits):
    decisions, logits = run(made(Architecture(**SMALL), dynamic[0], force_bits=bits))
    assert not decisions.any()
    wanted = in_batches(all_bits, of_seven(np.full(len(IMAGES), bits)))[0]
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_fixed_bits_have_no_controller(all_bits):
    architecture = Architecture(num_bits=1, **SMALL)
    network = filled(architecture.network())
    assert not [p.name for p in network.get_parameters() if p.name.startswith(("fc1", "fc2"))]
    _, logits = run(made(architecture, network))
    np.testing.assert_allclose(logits, in_batches(all_bits, of_seven(np.full(len(IMAGES), 4)))[0], atol=1e-5)


def test_grouped_inference_with_pact_takes_over_each_alpha(sizes):
    architecture = Architecture("pact", **SMALL)
    network, scores = balanced(architecture)
    alphas = [p.asnumpy().item() for p in network.get_parameters() if p.name.endswith(".alpha")]
    assert len(alphas) == len(set(alphas)) == (11 if sizes == "tiny" else 19)
    decisions, logits = run(made(architecture, network))
    np.testing.assert_array_equal(decisions, scores.argmax(-1))
    wanted = in_batches(network, np.eye(3, dtype=np.float32)[decisions])[0]
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_one_decision_a_layer_is_computed_as_it_is_trained():
    architecture = Architecture(granularity="layer", **SMALL)
    network, scores = balanced(architecture)
    decisions, logits = run(made(architecture, network))
    assert decisions.shape == (len(IMAGES), resnet.DECISIONS) and len(np.unique(decisions, axis=0)) > 5
    np.testing.assert_array_equal(decisions, scores.argmax(-1))
    wanted = in_batches(network, np.eye(3, dtype=np.float32)[decisions])[0]
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_the_float_network_runs_in_one_part():
    architecture = Architecture("none", **SMALL)
    network = filled(architecture.network())
    np.testing.assert_allclose(run(made(architecture, network))[1], in_batches(network)[0], atol=1e-5)
