"""The network against the published one, its quantizers in NumPy, cost."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from dynamicquant.published import (
    CHOICES,
    EDGE,
    Published,
    activation_steps,
    convolve,
    from_edge,
    weight_steps,
)
from golden.recipe import images, value
from initialisation import check_fan_out
from mindspore import Tensor, ops
from src.checkpoints import UNUSED
from src.gumbelsoftmax import GumbelSoftmax, gumbel_noise
from src.inference import Back, Front
from src.quant import (
    LEAST_ALPHA,
    FixedConv2d,
    QuantConv2d,
    StoredConv2d,
    activation,
    decode_weight,
    quantize_weight,
    weight_codes,
    weight_positions,
)
from src.resnet import Architecture, load_fixed, resnet18

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "dynamicquant.json").read_text())
PARAMETERS = json.loads((GOLDEN / "dynamicquant_parameters.json").read_text())
SMALL = {"num_classes": 7, "image_size": 32}
WEIGHT = 0.1 * np.random.default_rng(0).standard_normal((24, 12, 3, 3))


@pytest.fixture(scope="module", autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture
def pynative():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def values(network) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy().copy() for parameter in network.get_parameters()}


def filled(network, alpha: float = 6.0):
    """The recipe's weights; PACT's maxima away from where they start."""
    for parameter in network.get_parameters():
        array = value(parameter.name, parameter.shape)
        parameter.set_data(Tensor(array + np.float32(alpha) if parameter.name.endswith(".alpha") else array))
    return network.set_train(False)


def one_hot(decisions, candidates: int = 3) -> Tensor:
    """float32 (N, D, R) from positions (N, D)."""
    return Tensor(np.eye(candidates, dtype=np.float32)[np.asarray(decisions)])


# ===== The published network ===== #


def test_parameters_are_those_of_the_published_checkpoint():
    """But for the ones that its network does not use, which the file holds all the same."""
    ours = {parameter.name: list(parameter.shape) for parameter in resnet18().get_parameters()}
    unused = [name for name, _ in PARAMETERS if UNUSED.fullmatch(name)]
    assert ours == {name: shape for name, shape in PARAMETERS if name not in unused}
    assert all(name.endswith((".scale", "conv1.bias", "conv2.bias")) for name in unused)
    assert len(unused) == 2 * 19 + 12


def test_convolutions_start_as_the_authors_do():
    check_fan_out(resnet18())


def relative(logits: np.ndarray, bits: int, image: int) -> float:
    """Error of an image's first ten logits relative to their norm."""
    wanted = np.array(EXPECTED[f"bits{bits}_first10"][image])
    return np.linalg.norm(logits[:10] - wanted) / np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def golden_features():
    """By image, the published output of `layer1`, (1, 64, 56, 56) float64, with the choices of a golden run."""
    rows = {row["image"]: row["choices"] for row in CHOICES.values()}
    return {image: Published(4, rows[image]).features(images(2, 224, 0)[image : image + 1]) for image in rows}


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_the_network_in_numpy_is_the_published_one(golden_features, bits):
    """The golden logits follow from it and a few rounding choices, each of them next to an edge.

    Whatever else is rounded lies 1e-6 steps or more from an edge, where float64 errs by less than 1e-12: the result is
    the same on every processor, a few 1e-6 from the golden one. Near misses are ten thousand times as far.
    """
    image, choices = CHOICES[str(bits)]["image"], CHOICES[str(bits)]["choices"]
    network = Published(bits, choices)
    features = golden_features[image]
    np.testing.assert_allclose(network.scores(features)[0], EXPECTED["bit_logits"][image], atol=1e-4)
    if image == 0:
        np.testing.assert_allclose(features[0, 0:4, 20, 20], EXPECTED["layer1_probe"], atol=1e-4)
    (logits,) = network.logits(features)
    assert relative(logits, bits, image) < 1e-4
    assert np.linalg.norm(logits) == pytest.approx(EXPECTED[f"bits{bits}_norm"][image], rel=1e-4)
    assert logits.argmax() == EXPECTED[f"bits{bits}_argmax"][image]
    assert max(network.chosen) < EDGE and len(network.chosen) < 25 and network.edges > 1e-6


@pytest.mark.parametrize(
    "bits, other",
    [
        (3, {"shortcut_bits": 4}),  # as the authors' own network has them
        pytest.param(5, {"shortcut_bits": 4}, marks=pytest.mark.full),
        (3, {"plain_weights": True}),
        pytest.param(4, {"plain_weights": True}, marks=pytest.mark.full),
        pytest.param(5, {"shortcut_bn": False}, marks=pytest.mark.full),
    ],
)
def test_a_near_miss_is_another_network(golden_features, bits, other):
    image = CHOICES[str(bits)]["image"]
    assert relative(Published(bits, **other).logits(golden_features[image])[0], bits, image) > 3e-2


class Bounded(Published):
    """The published network with the weights of `cells`, which may be others next to an edge alone.

    Attributes:
        doubt: of the last activations that were rounded, 1 / levels where float32 may take either side of an edge.
    """

    def __init__(self, bits: int, cells: dict):
        super().__init__(bits)
        self.cells = cells

    def weight(self, name: str, shape: tuple, bits: int) -> np.ndarray:
        steps = weight_steps(value(f"{name}.weight", shape), bits)
        exact = (self.cells[name].weight.asnumpy().astype(float) + 1) / 2 * (2**bits - 1)
        codes = np.round(exact)
        np.testing.assert_allclose(codes, exact, atol=1e-5)
        assert np.abs(codes - steps).max() < 0.5 + 1e-4
        return 2 * codes / (2**bits - 1) - 1

    def activation(self, x: np.ndarray, name: str, bits: int) -> np.ndarray:
        levels = 2**bits - 1
        self.doubt = (from_edge(activation_steps(x, bits)) < 1e-4 * levels) / levels  # float32 errs by about 1e-5
        return super().activation(x, name, bits)

    def bound(self, name: str, channels: int, bits: int) -> np.ndarray:
        """How far a block's output may be from this one's, when its own input was in no doubt."""
        weight = np.abs(self.weight(f"{name}.conv2", (channels, channels, 3, 3), bits))
        moved = convolve(self.doubt, weight, 1)
        return 1e-3 + np.abs(self.bn(moved, f"{name}.bn2") - self.bn(0 * moved, f"{name}.bn2"))


def off_edges(x: np.ndarray, bits: tuple[int, ...]) -> np.ndarray:
    """`x` in float32, with what is next to a rounding edge moved a little away from it."""
    x = x.astype(np.float32)
    while (near := np.min([from_edge(activation_steps(x.astype(float), b)) for b in bits], 0) < 2 * EDGE).any():
        x[near] += np.float32(1e-4)
    return x


@pytest.fixture(scope="module")
def recipe():
    """The network with the recipe's weights."""
    return filled(resnet18())


@pytest.fixture(scope="module")
def fixed(recipe):
    """By bit-width, the recipe's network for inference and its cells."""
    networks = {bits: Architecture().fixed(bits) for bits in (3, 4, 5)}
    for network in networks.values():
        load_fixed(network, recipe)
    return {bits: (network, dict(network.cells_and_names())) for bits, network in networks.items()}


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_each_block_computes_what_the_published_one_does(fixed, pynative, bits):
    """Given an input without a value on an edge.

    Of what its second convolution rounds, a little may be on an edge and fall to another side on another processor; the
    bound says for each value of the output how far that can move it.
    """
    cells = fixed[bits][1]
    network, x = Bounded(bits, cells), off_edges(Published(bits).stem(images(2, 64, 0)), (4,))
    for name, channels, stride in network.blocks():
        got = cells[name](Tensor(x), None).asnumpy()
        wanted = network.block(x.astype(float), name, channels, stride)
        bound = network.bound(name, channels, 4 if name.startswith("layer1") else bits)
        assert (np.abs(got - wanted) <= bound).all() and np.median(bound) < 2e-2, name
        if stride > 1 and bits != 4:
            miss = Published(bits, shortcut_bits=4).block(x.astype(float), name, channels, stride)
            assert (np.abs(miss - wanted) > bound).mean() > 0.4
        x = off_edges(wanted, (4, bits))


def test_the_network_is_its_parts_in_the_published_order(fixed, pynative):
    """To the last bit, being the same operations: a rounding that differs would change everything behind it."""
    network, cells = fixed[3]
    batch = Tensor(images(1, 224, 0))
    x = network.max_pool(ops.relu(network.bn1(network.conv1(batch))))
    for name, *_ in Published(3).blocks():
        x = cells[name](x, None)
        if name == "layer1.1":
            seen = network.fc2(network.fc1(network.avg_pool(x).flatten(start_dim=1))).asnumpy()
    np.testing.assert_array_equal(network.front(batch)[1].asnumpy()[:, 0], seen)
    np.testing.assert_array_equal(network(batch).asnumpy(), network.fc(x.mean((2, 3))).asnumpy())


def test_stem_controller_and_classifier_compute_what_the_published_ones_do(recipe, pynative):
    batch = images(2, 224, 0)
    network = Published(4)
    x = network.stem(batch)
    stem = recipe.max_pool(ops.relu(recipe.bn1(recipe.conv1(Tensor(batch)))))
    np.testing.assert_allclose(stem.asnumpy(), x, atol=1e-4)
    seen = recipe.avg_pool(Tensor(x.astype(np.float32))).flatten(start_dim=1)
    np.testing.assert_allclose(recipe.fc2(recipe.fc1(seen)).asnumpy(), network.scores(x), atol=1e-4)
    last = np.random.default_rng(0).random((2, 512, 7, 7))
    np.testing.assert_allclose(
        recipe.fc(Tensor(last.astype(np.float32)).mean((2, 3))).asnumpy(), network.classify(last), atol=1e-4
    )


# Of the logits and of their norm. With every value on an edge rounded anyhow they stay within 7 % and 1 %.
WHOLE, WHOLE_NORM = 0.15, 0.04


@pytest.mark.parametrize("bits", [pytest.param(3, marks=pytest.mark.full), 4, pytest.param(5, marks=pytest.mark.full)])
def test_the_whole_network_is_the_published_one_but_for_roundings(recipe, fixed, bits):
    """Compiled; that the blocks are right to much less, and in their order, the tests above have shown."""
    features, scores = Front(recipe)(Tensor(images(2, 224, 0)))
    np.testing.assert_allclose(scores.asnumpy()[:, 0], EXPECTED["bit_logits"], atol=2e-2)
    logits = Back(fixed[bits][0])(features).asnumpy()
    assert max(relative(logits[image], bits, image) for image in (0, 1)) < WHOLE
    np.testing.assert_allclose(np.linalg.norm(logits, axis=1), EXPECTED[f"bits{bits}_norm"], rtol=WHOLE_NORM)


@pytest.mark.parametrize(
    "bits, other",
    [
        (3, {"without": "layer3.1"}),
        (4, {"without": "layer4.1"}),
        (4, {"shortcut_bn": False}),
        pytest.param(5, {"without": "layer3.1"}, marks=pytest.mark.full),
        pytest.param(5, {"bits": 3}, marks=pytest.mark.full),
        (5, {"bits": 4}),
    ],
)
def test_a_larger_miss_is_beyond_the_bounds_of_the_whole_network(golden_features, bits, other):
    image = CHOICES[str(bits)]["image"]
    (logits,) = Published(**{"bits": bits} | other).logits(golden_features[image])
    assert relative(logits, bits, image) > 1.2 * WHOLE
    if "shortcut_bn" in other:
        assert abs(np.linalg.norm(logits) / EXPECTED[f"bits{bits}_norm"][image] - 1) > 1.2 * WHOLE_NORM


@pytest.mark.parametrize("other", [{"without": "layer1.1"}, {"first_bits": 3}])
def test_another_layer1_would_have_other_scores(other):
    network = Published(4, **other)
    scores = network.scores(network.features(images(2, 224, 0)[:1]))
    assert np.abs(scores[0] - EXPECTED["bit_logits"][0]).max() > 0.1


# ===== Quantizers ===== #


def rounded(x: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """`x` in [0, 1] rounded to multiples of 1 / steps, and where that is beyond doubt in float32."""
    return np.round(x * steps) / steps, np.abs(x * steps % 1 - 0.5) > 1e-4


@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_are_quantized_as_dorefa_has_it(bits):
    """DoReFa, equations 7 and 9, in float64; the stored codes give the same floats to the last bit."""
    weight = Tensor(WEIGHT.astype(np.float32))
    quantized = quantize_weight(weight, weight_positions(weight), bits).asnumpy()
    if bits == 1:
        wanted, sure = np.where(WEIGHT >= 0, 1, -1) * np.abs(WEIGHT).mean(), np.full(WEIGHT.shape, True)
    else:
        squashed = np.tanh(WEIGHT)
        wanted, sure = rounded(squashed / (2 * np.abs(squashed).max()) + 0.5, 2**bits - 1)
        wanted = 2 * wanted - 1
    assert sure.mean() > 0.98
    np.testing.assert_allclose(quantized[sure], wanted[sure], atol=2e-7)
    assert len(np.unique(quantized)) <= 2**bits

    codes, scale = weight_codes(weight, bits)
    assert codes.dtype == ms.int8
    np.testing.assert_array_equal(decode_weight(codes, scale, bits).asnumpy(), quantized)
    codes = codes.asnumpy()
    assert -(2 ** (bits - 1)) <= codes.min() and codes.max() <= 2 ** (bits - 1) - 1
    # The largest weight in absolute value is at one end.
    assert codes.min() == -(2 ** (bits - 1)) or codes.max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("quant", ["dorefa", "pact"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("train", [False, True])
def test_activations_are_quantized_as_the_papers_have_it(quant, bits, train):
    cell = activation(quant).set_train(train)
    x = 3 * np.random.default_rng(bits).standard_normal(40000)
    if quant == "dorefa":
        wanted, sure = rounded(np.clip(x, 0, 1), 2**bits - 1)
    else:
        alpha = 4.5
        cell.alpha.set_data(Tensor([alpha], ms.float32))
        wanted, sure = rounded(0.5 * (np.abs(x) - np.abs(x - alpha) + alpha) / alpha, 2**bits - 1)
        wanted = wanted * alpha
    got = cell(cell.clip(Tensor(x.astype(np.float32))), bits).asnumpy()
    assert sure.mean() > 0.98 and len(np.unique(got)) == 2**bits
    np.testing.assert_allclose(got[sure], wanted[sure], atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pact_rounds_what_the_published_arithmetic_does(bits):
    """x * (n / alpha), rounded, / (n / alpha) in float32, next to every edge; another order goes wrong there."""
    cell, differ = activation("pact"), 0
    for alpha in np.random.default_rng(bits).uniform(0.5, 10, 20).astype(np.float32):
        scale = np.float32(2**bits - 1) / alpha
        x = ((np.arange(2**bits - 1) + 0.5) / scale).astype(np.float32)
        x = (x.view(np.int32)[:, None] + np.arange(-3, 4, dtype=np.int32)).view(np.float32)
        wanted = np.round(x * scale)
        differ += (wanted != np.round(x / alpha * np.float32(2**bits - 1))).sum()
        cell.alpha.set_data(Tensor([alpha], ms.float32))
        np.testing.assert_array_equal(cell(Tensor(x), bits).asnumpy(), wanted / scale)
    assert differ or bits == 1  # n = 1 makes the orders one


@pytest.mark.parametrize("alpha", [-1e8, -2.0, -1e-30, 0.0, 1e-30, LEAST_ALPHA / 2])
def test_an_alpha_below_its_least_value_counts_as_that_and_goes_on_learning(pynative, alpha):
    """The gradient is that of the least value, by which alpha finds its way back."""
    x, factors = np.linspace(-1, 1, 41).astype(np.float32), np.arange(41, dtype=np.float32)
    found = []
    for value_of_alpha in (alpha, LEAST_ALPHA):
        cell = activation("pact")
        cell.alpha.set_data(Tensor([value_of_alpha], ms.float32))

        def quantized(x, cell=cell):
            return (cell(cell.clip(x), 4) * Tensor(factors)).sum()

        found.append(
            [cell(cell.clip(Tensor(x)), 4).asnumpy(), ms.grad(quantized, None, cell.alpha)(Tensor(x)).asnumpy()]
        )
    for got, least in zip(*found):
        np.testing.assert_array_equal(got, least)
    np.testing.assert_allclose(found[0][0], np.where(x > 0, LEAST_ALPHA, 0), atol=1e-7)
    assert found[0][1] == factors[x > LEAST_ALPHA].sum()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_weights_that_are_all_zero_are_quantized_as_a_zero_among_others(pynative, bits):
    zeros = np.zeros((4, 3, 3, 3), np.float32)
    among = zeros.copy()
    among[0, 0, 0] = 0.3, -0.3, 0.1
    alone, others = (quantize_weight(Tensor(w), weight_positions(Tensor(w)), bits).asnumpy() for w in (zeros, among))
    assert len(np.unique(alone)) == 1 and np.isfinite(alone).all()
    assert bits == 1 or (others[1:] == alone[1:]).all()
    np.testing.assert_array_equal(decode_weight(*weight_codes(Tensor(zeros), bits), bits).asnumpy(), alone)
    gradient = ms.grad(lambda w: (quantize_weight(w, weight_positions(w), bits) * 3).sum())(Tensor(zeros)).asnumpy()
    np.testing.assert_array_equal(gradient, np.full(zeros.shape, 3, np.float32))


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_a_convolution_with_stored_integers_computes_what_is_trained(bits):
    """The same floats in all three forms."""
    sizes = (12, 24, 3, 2)
    forms = [QuantConv2d(*sizes, bits=(bits,), quant="dorefa")]
    forms += [conv(*sizes, bits=bits, quant="dorefa") for conv in (FixedConv2d, StoredConv2d)]
    forms[0].weight.set_data(Tensor(WEIGHT.astype(np.float32)))
    for conv in forms[1:]:
        conv.load(forms[0].weight)
    assert [conv.weight.dtype for conv in forms] == [ms.float32, ms.float32, ms.int8]
    x = Tensor(np.random.default_rng(bits).standard_normal((2, 12, 9, 9)).astype(np.float32))
    trained, fixed, stored = (conv.set_train(False)(x).asnumpy() for conv in forms)
    np.testing.assert_array_equal(fixed, trained)
    np.testing.assert_array_equal(stored, trained)


def differences(surrogate, x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of a function of `x`, float64."""
    gradient = np.empty(x.size)
    for place in range(x.size):
        shift = np.zeros(x.size)
        shift[place] = step
        gradient[place] = (surrogate(x + shift.reshape(x.shape)) - surrogate(x - shift.reshape(x.shape))) / (2 * step)
    return gradient.reshape(x.shape)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_gradient_of_quantized_weights_is_that_of_the_surrogate(pynative, bits):
    """Without rounding; the largest weight gets the share that comes through the division by it."""
    weight, factors = WEIGHT[:4, :3], np.random.default_rng(bits).standard_normal((4, 3, 3, 3))

    def surrogate(w):
        if bits == 1:
            return (w * factors).sum()
        return ((np.tanh(w) / np.abs(np.tanh(w)).max()) * factors).sum()

    def quantized(w):
        return (quantize_weight(w, weight_positions(w), bits) * Tensor(factors)).sum()

    gradient = ms.grad(quantized)(Tensor(weight)).asnumpy()
    assert gradient.dtype == np.float64
    np.testing.assert_allclose(gradient, differences(surrogate, weight), rtol=1e-6, atol=1e-7)
    if bits > 1:  # without the division's share it would be proportional to 1 - tanh²
        largest = np.unravel_index(np.abs(weight).argmax(), weight.shape)
        plain = factors[largest] * (1 - np.tanh(weight[largest]) ** 2) / np.abs(np.tanh(weight)).max()
        assert abs(gradient[largest] - plain) > 0.01


@pytest.mark.parametrize("quant", ["dorefa", "pact"])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_the_gradient_of_quantized_activations_is_that_of_the_surrogate(pynative, quant, bits):
    """PACT, equation 3: alpha's is the sum over the clipped ones alone."""
    rng = np.random.default_rng(bits)
    x, factors = 2 * rng.standard_normal(60), rng.standard_normal(60)
    cell = activation(quant).set_train(True)

    def quantized(x):
        return (cell(cell.clip(x), bits) * Tensor(factors)).sum()

    if quant == "dorefa":
        gradient = ms.grad(quantized)(Tensor(x)).asnumpy()
        wanted = differences(lambda x: (np.clip(x, 0, 1) * factors).sum(), x)
    else:
        alpha = np.array([1.7])
        cell.alpha.set_dtype(ms.float64)
        cell.alpha.set_data(Tensor(alpha))

        def surrogate(x, alpha):
            return (np.clip(x, 0, alpha) * factors).sum()

        gradient, of_alpha = (g.asnumpy() for g in ms.grad(quantized, 0, cell.alpha)(Tensor(x)))
        np.testing.assert_allclose(of_alpha, differences(lambda alpha: surrogate(x, alpha), alpha), rtol=1e-6)
        assert abs(of_alpha[0]) > 0.1
        wanted = differences(lambda x: surrogate(x, alpha), x)
    assert (gradient == 0).any() and (gradient != 0).any()
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-8)


# ===== Choices ===== #


def test_gumbel_softmax_chooses_hard_and_learns_soft(pynative):
    rng = np.random.default_rng(0)
    scores, noise = rng.standard_normal((5, 2, 3)), gumbel_noise((5, 2, 3), 1, 2)
    factors, temperature = rng.standard_normal((5, 2, 3)), 0.7
    cell = GumbelSoftmax(temperature)

    def soft(s):
        s = np.exp((s + noise) / temperature)
        return ((s / s.sum(-1, keepdims=True)) * factors).sum()

    def chosen(s):
        return (cell(s, Tensor(noise)) * Tensor(factors.astype(np.float32))).sum()

    x = Tensor(scores.astype(np.float32))
    np.testing.assert_allclose(cell(x, Tensor(noise)).asnumpy(), np.eye(3)[(scores + noise).argmax(-1)], atol=1e-6)
    np.testing.assert_allclose(ms.grad(chosen)(x).asnumpy(), differences(soft, scores), atol=1e-5)
    with pytest.raises(ValueError, match="positive"):
        GumbelSoftmax(0)


def test_gumbel_noise_has_the_gumbel_distribution_and_depends_on_its_key_alone():
    noise = gumbel_noise((200000,), 5, 1)
    assert noise.dtype == np.float32
    assert noise.mean() == pytest.approx(0.5772, abs=0.01) and noise.var() == pytest.approx(np.pi**2 / 6, rel=0.02)
    np.testing.assert_array_equal(noise, gumbel_noise((200000,), 5, 1))
    assert np.abs(noise - gumbel_noise((200000,), 5, 2)).max() > 1


@pytest.mark.parametrize("granularity", ["image", "layer"])
def test_each_convolution_has_its_bits_and_its_decision(granularity):
    """In the order in which they run; one decision a layer leaves the shortcuts at the target."""
    network = Architecture("pact", 4, 3, granularity, **SMALL).network()
    bits, decisions = {}, {}
    for name, cell in network.cells_and_names():
        if isinstance(cell, QuantConv2d):
            bits[name], decisions[name] = cell.bits, cell.decision
    fixed = [f"layer1.{block}.conv{conv}" for block in (0, 1) for conv in (1, 2)]
    shortcuts = [f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)]
    chosen = [f"layer{stage}.{block}.conv{conv}" for stage in (2, 3, 4) for block in (0, 1) for conv in (1, 2)]
    chosen += shortcuts if granularity == "image" else []
    fixed += shortcuts if granularity == "layer" else []
    assert bits == {name: (3, 4, 5) for name in chosen} | dict.fromkeys(fixed, (4,))
    order = range(12) if granularity == "layer" else [0] * 15
    assert [decisions[name] for name in chosen] == list(order)
    assert network.fc2.weight.shape == ((36, 64) if granularity == "layer" else (3, 64))


# ===== Cost and errors ===== #


@pytest.mark.parametrize("size", [224, 36])
@pytest.mark.parametrize("granularity", ["image", "layer"])
def test_multiply_adds_are_those_that_hooks_count_in_pytorch(size, granularity):
    torch = pytest.importorskip("torch")
    from dynamicquant.torch_resnet import ResNet18

    costs = {}

    def count(name):
        def hook(layer, inputs, output):
            costs[name] = output.numel() * layer.weight[0].numel() / 1e9

        return hook

    with torch.device("meta"):
        network = ResNet18(1000)
        for name, layer in network.named_modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                layer.register_forward_hook(count(name))
        network(torch.empty(1, 3, size, size))
    if size == 224:
        assert sum(costs.values()) == pytest.approx(1.814, abs=1e-3)  # what is commonly told of ResNet-18
    quantized = {name: cost for name, cost in costs.items() if name.startswith("layer")}
    behind = {name: cost for name, cost in quantized.items() if not name.startswith("layer1")}
    by_layer = [cost for name, cost in behind.items() if "downsample" not in name]
    fixed, chosen = Architecture(granularity=granularity, image_size=size).gmacs()
    np.testing.assert_allclose(chosen, by_layer if granularity == "layer" else [sum(behind.values())])
    assert fixed + chosen.sum() == pytest.approx(sum(quantized.values()))


@pytest.mark.parametrize(
    "words, wanted",
    [
        ({"target_bits": 1}, "3 bit-widths around 1 are 0 to 2, outside of 1 to 8"),
        ({"target_bits": 8}, "7 to 9, outside of 1 to 8"),
        ({"target_bits": 9, "num_bits": 1}, "9 to 9, outside"),
        ({"num_bits": 2}, "num_bits must be odd"),
        ({"num_bits": 0}, "num_bits must be odd"),
        ({"image_size": 30}, "a multiple of 4 from 28 up"),
        ({"image_size": 24}, "a multiple of 4 from 28 up"),
        ({"quant": "lsq"}, "no network for quant lsq"),
        ({"granularity": "channel"}, "granularity channel"),
    ],
)
def test_what_makes_no_network_is_refused(words, wanted):
    with pytest.raises(ValueError, match=wanted):
        Architecture(**words)


def test_the_smallest_and_the_lowest_network_are_none_of_these():
    assert Architecture(image_size=28).network().fc1.weight.shape == (64, 64)
    assert Architecture(image_size=60).network().fc1.weight.shape == (64, 4 * 64)
    assert Architecture(target_bits=1, num_bits=1).bits == (1,)
    assert Architecture(target_bits=2).bits == (1, 2, 3) and Architecture(target_bits=8, num_bits=1).bits == (8,)
