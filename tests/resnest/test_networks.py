"""The four networks against the authors': parameters and logits; both forms; block and poolings in NumPy; export."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from golden.recipe import images, value
from initialisation import check_fan_out
from mindspore import Tensor, nn, ops
from mindspore.nn.utils import no_init_parameters
from src.checkpoints import BACKBONES, fill, from_torch
from src.resnest import Bottleneck, MaxPool, ResNeSt, SplitAttention, fuse, unfuse

GOLDEN = Path(__file__).parents[1] / "golden"
MILLIONS = {"resnest50": 27.5, "resnest101": 48.3, "resnest200": 70.2, "resnest269": 110.9}
# At full size one form of each runs, which keeps the suite short; the other is compared with it at 64 pixels.
FUSED_AT_FULL_SIZE = {"resnest50": False, "resnest101": True, "resnest200": False, "resnest269": True}


BLOCKS = (2, 1, 1, 1)  # of the small network, which has every kind of block


def torch_state(backbone: str) -> dict[str, np.ndarray]:
    """The recipe's weights under the names of the authors' network."""
    return {name: value(name, shape) for name, shape in json.loads((GOLDEN / f"{backbone}_torch.json").read_text())}


def values(network: nn.Cell) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy() for parameter in network.get_parameters()}


def small(num_classes: int = 1000, **options) -> ResNeSt:
    """ResNeSt-50 with the first of its blocks alone."""
    return ResNeSt(BLOCKS, 32, num_classes, **options)


def ready(network: ResNeSt, parameters: dict[str, np.ndarray]) -> ResNeSt:
    """The network in inference mode, compiled once for all sizes."""
    assert {parameter.name for parameter in network.get_parameters()} == set(parameters)
    fill(network, parameters)
    network.set_inputs(Tensor(shape=[None, 3, None, None], dtype=ms.float32))
    network.set_train(False)
    return network


@pytest.fixture(scope="module", autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="module")
def unfused():
    with no_init_parameters():
        names = {parameter.name for parameter in small().get_parameters()}
    parameters = from_torch(torch_state("resnest50"))
    return ready(small(), {name: array for name, array in parameters.items() if name in names})


@pytest.fixture(scope="module")
def fused(unfused):
    return ready(small(fused=True), fuse(values(unfused)))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_parameters_are_those_of_the_authors(backbone):
    with no_init_parameters():
        network = BACKBONES[backbone].constructor()
    rows = json.loads((GOLDEN / f"{backbone}_torch.json").read_text())
    wanted = {name: array.shape for name, array in from_torch({n: np.empty(shape) for n, shape in rows}).items()}
    assert {parameter.name: parameter.shape for parameter in network.get_parameters()} == wanted
    assert sum(p.size for p in network.trainable_params()) == pytest.approx(1e6 * MILLIONS[backbone], rel=2e-3)


@pytest.mark.parametrize(
    "backbone",
    ["resnest50", *(pytest.param(name, marks=pytest.mark.full) for name in BACKBONES if name != "resnest50")],
)
def test_logits_are_those_of_the_authors_network_in_both_forms(backbone):
    expected = json.loads((GOLDEN / f"{backbone}.json").read_text())
    size = BACKBONES[backbone].size
    assert size == expected["image_size"]
    parameters = from_torch(torch_state(backbone))
    forms = {False: parameters, True: fuse(parameters)}
    form = FUSED_AT_FULL_SIZE[backbone]
    network, other = (ready(BACKBONES[backbone].constructor(fused=fused), forms[fused]) for fused in (form, not form))
    logits = network(Tensor(images(1, size, 0))).asnumpy()
    assert logits.shape == (1, 1000) and logits.dtype == np.float32
    np.testing.assert_allclose(logits[:, :10], expected["first10"], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(logits, axis=1), expected["norm"], rtol=1e-5)
    assert logits.argmax(1).tolist() == expected["argmax"]
    small = Tensor(images(2, 64, 0))
    np.testing.assert_allclose(other(small).asnumpy(), network(small).asnumpy(), atol=1e-4)


def test_any_batch_and_any_size_divisible_by_32(unfused):
    rows = images(3, 64, 0)
    whole = unfused(Tensor(rows)).asnumpy()
    np.testing.assert_allclose(unfused(Tensor(rows[1:2])).asnumpy(), whole[1:2], atol=1e-5)
    assert unfused(Tensor(images(1, 96, 0)[:, :, :32])).shape == (1, 1000)


@pytest.mark.parametrize("height, width", [(65, 64), (64, 48), (16, 64)])
def test_other_sizes_are_refused(height, width):
    with pytest.raises(ValueError, match="multiples of 32"):
        small(fused=True)(Tensor(np.zeros((1, 3, height, width), np.float32)))


def test_convolutions_start_as_the_authors_do():
    check_fan_out(ResNeSt(BLOCKS, 32, 7))


def test_split_attention_is_the_softmax_over_the_splits():
    """Section 3.1 in NumPy and float64, for a convolution that only looks at the middle of its windows."""
    rng = np.random.default_rng(0)
    cell = SplitAttention(8, fused=True)
    for parameter in cell.get_parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
    weight = cell.conv.weight.asnumpy().copy()
    weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    cell.conv.weight.set_data(Tensor(weight))
    x = rng.standard_normal((3, 8, 5, 4)).astype(np.float32)

    parameters = {name: array.astype(np.float64) for name, array in values(cell).items()}
    middle, bias = parameters["conv.weight"][:, :, 1, 1], parameters["conv.bias"].reshape(2, 8, 1, 1)
    splits = []
    for radix in (0, 1):  # each split sees its own half of the channels
        u = np.einsum("oc,nchw->nohw", middle[8 * radix : 8 * radix + 8], x[:, 4 * radix : 4 * radix + 4])
        splits.append(np.maximum(u + bias[radix], 0))
    s = sum(splits).mean((2, 3))
    z = np.maximum(s @ parameters["fc1.weight"][:, :, 0, 0].T + parameters["fc1.bias"], 0)
    z = (z @ parameters["fc2.weight"][:, :, 0, 0].T + parameters["fc2.bias"]).reshape(3, 2, 8)
    a = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    v = sum(a[:, radix, :, None, None] * splits[radix] for radix in (0, 1))
    np.testing.assert_allclose(cell.set_train(False)(Tensor(x)).asnumpy(), v, atol=1e-4)


@pytest.mark.parametrize("train", [False, True])
def test_max_pooling_pads_on_all_sides(train):
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 6)).astype(np.float32) - 5  # below zero: no zeros padded
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    np.testing.assert_array_equal(MaxPool().set_train(train)(Tensor(x)).asnumpy(), windows.max((4, 5)))


def test_average_pooling_behind_the_split_attention_counts_the_padding():
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 6)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    pool = Bottleneck(8, 2, 2, False).pool
    np.testing.assert_allclose(pool(Tensor(x)).asnumpy(), windows.mean((4, 5)), atol=1e-6)


def test_fusing_and_unfusing_lose_nothing(unfused, fused):
    """A fused network's parameters survive the way to BNs and back, but for rounding."""
    parameters = values(fused)
    there = unfuse(parameters)
    assert {name: array.shape for name, array in there.items()} == {n: a.shape for n, a in values(unfused).items()}
    back = fuse(there)
    assert set(back) == set(parameters)
    for name, array in parameters.items():
        assert back[name].dtype == np.float32
        np.testing.assert_allclose(back[name], array, rtol=1e-6, atol=1e-7, err_msg=name)


def test_keeping_every_feature_is_no_dropout_and_a_mask_reaches_the_classifier(unfused):
    network = small()
    fill(network, values(unfused))
    network.set_train(False)
    batch = Tensor(images(2, 64, 0))
    whole = unfused(batch).asnumpy()
    kept = network(batch, Tensor(np.ones((2, 2048), np.float32))).asnumpy()
    np.testing.assert_allclose(kept, whole, atol=1e-5)
    mask = np.ones((2, 2048), np.float32)
    mask[0] = 0
    dropped = network(batch, Tensor(mask)).asnumpy()
    np.testing.assert_allclose(dropped[0], network.fc.bias.asnumpy(), atol=1e-6)
    np.testing.assert_allclose(dropped[1], whole[1], atol=1e-5)


def test_dropout_keeps_the_mean():
    keep = small(10, dropout=0.2).sample_keep(200, np.random.default_rng(0))
    assert keep.shape == (200, 2048) and keep.dtype == np.float32
    assert (keep == 0).mean() == pytest.approx(0.2, abs=0.01) and keep.mean() == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match="dropout"):
        small(dropout=1.0)


def test_a_training_step_moves_every_parameter(unfused):
    """And the statistics of every BN; but not the bias before a BN, which its mean takes away."""
    network = small()
    fill(network, values(unfused))
    network.set_train(True)
    before = {name: array.copy() for name, array in values(network).items()}
    optimizer = nn.SGD(network.trainable_params(), 0.01)

    def loss(batch, targets):
        return ops.cross_entropy(network(batch), targets)

    gradients = ms.value_and_grad(loss, None, optimizer.parameters)

    @ms.jit
    def step(batch, targets):
        value, grads = gradients(batch, targets)
        optimizer(grads)
        return value

    batch, targets = Tensor(images(4, 64, 0)), Tensor(np.arange(4, dtype=np.int32))
    losses = [float(step(batch, targets).asnumpy()) for _ in range(3)]
    assert losses[2] < losses[0]
    after = values(network)
    still = {name for name, array in after.items() if np.array_equal(array, before[name])}
    assert all(name.endswith("fc1.bias") for name in still), still
    assert all(np.isfinite(array).all() for array in after.values())


@pytest.mark.parametrize("form", ["unfused", "fused"])
def test_an_export_for_any_batch_size_computes_the_same(form, request, tmp_path, monkeypatch):
    source = request.getfixturevalue(form)
    network = small(fused=form == "fused")
    fill(network, values(source))
    network.set_train(False)
    monkeypatch.chdir(tmp_path)
    ms.export(network, Tensor(shape=[None, 3, 64, 64], dtype=ms.float32), file_name="net", file_format="MINDIR")
    loaded = nn.GraphCell(ms.load("net.mindir"))
    for count in (1, 3):
        batch = Tensor(images(count, 64, 0))
        np.testing.assert_allclose(loaded(batch).asnumpy(), source(batch).asnumpy(), atol=1e-5)
