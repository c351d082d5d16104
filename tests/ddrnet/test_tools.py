"""Schedules, losses, optimizers and mixed precision against NumPy in float64, written here anew."""

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from own_files import of_others
from src.configs.settings import load_config
from src.tools.cell import cast_amp
from src.tools.criterion import SoftTargetCrossEntropy
from src.tools.get_misc import record_of
from src.tools.optimizer import make_optimizer
from src.tools.schedulers import learning_rates
from src.trainers.train_one_step import Update

from utils.cli import UserError
from utils.metrics import cross_entropy

RNG = np.random.default_rng(0)
CONFIGS = ROOT / "DDRNet/src/configs"


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)  # as utils.device.set_device does


def rate(name, step, epochs=20, steps=7, lr=0.4, low=1e-6, least=1e-3, warm=2.0, adjust=3, gamma=0.5):
    """The learning rate of one step, from the definitions."""
    import math

    begin = round(warm * steps)
    if step < begin:
        return low + (lr - low) * step / begin
    if name == "constant_lr":
        return lr
    if name == "cosine_lr":
        share = (step - begin) / (epochs * steps - begin)
        return least + 0.5 * (lr - least) * (1 + math.cos(math.pi * share))
    drops = (step / steps) / adjust
    return max(least, lr * gamma ** (math.floor(drops) if name == "multistep_lr" else drops))


@pytest.mark.parametrize("name", ["constant_lr", "cosine_lr", "multistep_lr", "exp_lr"])
def test_schedules(name):
    rates = learning_rates(name, 0.4, 1e-6, 1e-3, 2.0, 20, 7, 3, 0.5)
    assert rates.shape == (140,) and rates.dtype == np.float32
    np.testing.assert_allclose(rates, [rate(name, step) for step in range(140)], rtol=1e-6)


def test_the_documented_schedule_has_the_published_ends():
    """The published code multiplies its whole schedule by batch * devices / 256."""
    found = {}
    for device, count in (("ascend", 512 * 8), ("gpu", 256)):
        args = load_config("train", "", ["--config_path", str(CONFIGS / f"ddrnet23_imagenet_{device}.yaml")])
        schedule = (args.base_lr, args.warmup_lr, args.min_lr, args.warmup_length, args.epochs, 50)
        rates = learning_rates(args.lr_scheduler, *schedule, args.lr_adjust, args.lr_gamma, count)
        assert len(rates) == 300 * 50 and rates.argmax() == 10 * 50
        found[device] = [rates[0], rates.max(), rates[-1]]
    np.testing.assert_allclose(found["ascend"], [1.6e-5, 1.6, 1.6e-4], rtol=1e-3)
    np.testing.assert_allclose(found["gpu"], [1e-6, 0.1, 1e-5], rtol=1e-3)


def test_a_schedule_without_warm_up_starts_at_the_rate():
    for name in ("constant_lr", "cosine_lr", "multistep_lr", "exp_lr"):
        assert learning_rates(name, 0.4, 1e-6, 1e-3, 0, 3, 5, 1, 0.1)[0] == np.float32(0.4)
    with pytest.raises(ValueError, match="no schedule"):
        learning_rates("step", 0.4, 0, 0, 0, 3, 5, 1, 0.1)


def reference_loss(logits, targets):
    shifted = logits - logits.max(1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -(targets * log_softmax).sum(1).mean()


def test_soft_target_cross_entropy_and_its_gradient():
    logits, targets = RNG.standard_normal((5, 7)) * 4, RNG.dirichlet(np.ones(7), 5)
    criterion = SoftTargetCrossEntropy()
    loss, gradient = ms.value_and_grad(criterion)(Tensor(logits, ms.float32), Tensor(targets, ms.float32))
    assert float(loss.asnumpy()) == pytest.approx(reference_loss(logits, targets), rel=1e-5)
    differences = np.zeros_like(logits)
    for place in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[place] = 1e-5
        differences[place] = (reference_loss(logits + step, targets) - reference_loss(logits - step, targets)) / 2e-5
    np.testing.assert_allclose(gradient.asnumpy(), differences, atol=1e-6)


def test_the_loss_of_half_precision_logits_is_computed_in_single_precision():
    logits, targets = RNG.standard_normal((4, 9)).astype(np.float16) * 20, np.eye(9)[[1, 2, 3, 4]]
    loss = SoftTargetCrossEntropy()(Tensor(logits), Tensor(targets, ms.float32))
    assert loss.dtype == ms.float32
    assert float(loss.asnumpy()) == pytest.approx(reference_loss(logits.astype(np.float64), targets), rel=1e-5)


def test_evaluation_loss():
    logits, labels = RNG.standard_normal((6, 4)) * 100, np.array([0, 1, 2, 3, 1, 1])
    np.testing.assert_allclose(cross_entropy(logits, labels).mean(), reference_loss(logits, np.eye(4)[labels]))


def step_of(name, weight, gradient, state, decayed, lr, number):
    """One step in float64, from the definitions of the papers; AdamW as MindSpore has it, without bias correction."""
    decay = 0.1 if decayed else 0.0
    if name == "momentum":
        gradient = gradient + decay * weight
        state["v"] = 0.8 * state.get("v", 0) + gradient
        return weight - lr * (gradient + 0.8 * state["v"])
    if name == "rmsprop":
        gradient = gradient + decay * weight
        state["s"] = 0.7 * state.get("s", 1) + 0.3 * gradient**2  # MindSpore starts with ones
        state["v"] = 0.8 * state.get("v", 0) + lr * gradient / np.sqrt(state["s"] + 1e-10)
        return weight - state["v"]
    state["m"] = 0.6 * state.get("m", 0) + 0.4 * gradient
    state["s"] = 0.9 * state.get("s", 0) + 0.1 * gradient**2
    m, s = state["m"], state["s"]
    if name == "lamb":
        m, s = m / (1 - 0.6**number), s / (1 - 0.9**number)
    update = m / (np.sqrt(s) + 1e-6) + decay * weight
    if name == "lamb":
        trust = np.linalg.norm(weight) / np.linalg.norm(update)
        lr = lr * trust
    return weight - lr * update


@pytest.mark.parametrize("name", ["momentum", "adamw", "lamb", "rmsprop"])
def test_optimizers_decay_weights_but_not_vectors(name):
    weights = [RNG.standard_normal(shape) for shape in ((3, 4), (4,), (2, 3, 1, 1))]
    names = ("dense.weight", "dense.bias", "conv.weight")
    parameters = [Parameter(Tensor(w, ms.float32), name=n) for w, n in zip(weights, names)]
    optimizer = make_optimizer(name, parameters, 1.0, 0.1, 0.8, True, (0.6, 0.9), 0.7)
    states = [{} for _ in weights]
    order = [names.index(parameter.name) for parameter in optimizer.parameters]
    sums = ParameterTuple(
        [Parameter(Tensor(np.zeros(p.shape), ms.float32), name=f"sum.{p.name}") for p in optimizer.parameters]
    )
    update = Update(optimizer, sums)
    for number, lr in enumerate((0.1, 0.05, 0.02), 1):
        gradients = [RNG.standard_normal(w.shape) for w in weights]
        optimizer.learning_rate.set_data(Tensor(lr, ms.float32))
        for total, k in zip(sums, order):
            total.set_data(Tensor(2 * gradients[k], ms.float32))
        update(Tensor(0.5, ms.float32))
        weights = [
            step_of(name, w, g, state, w.ndim > 1, lr, number) for w, g, state in zip(weights, gradients, states)
        ]
    for parameter, wanted in zip(parameters, weights):
        np.testing.assert_allclose(parameter.asnumpy(), wanted, rtol=2e-4, atol=2e-5, err_msg=parameter.name)


def test_nesterov_makes_a_difference_and_other_names_are_refused():
    after = []
    for nesterov in (True, False):
        weight = Parameter(Tensor(np.ones((2, 2)), ms.float32), name="w")
        optimizer = make_optimizer("momentum", [weight], 0.1, 0.0, 0.5, nesterov, (0.9, 0.999), 0.9)
        sums = ParameterTuple([Parameter(Tensor(np.ones((2, 2)), ms.float32), name="sum.w")])
        Update(optimizer, sums)(Tensor(1.0, ms.float32))
        after.append(float(weight.asnumpy()[0, 0]))
    assert after == pytest.approx([1 - 0.15, 1 - 0.1])
    with pytest.raises(ValueError, match="no optimizer"):
        make_optimizer("sgd", [], 0.1, 0.0, 0.5, True, (0.9, 0.999), 0.9)


class Layers(nn.Cell):
    """A convolution, a BN, a dense layer; gives what each of them gives."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.dense = nn.Dense(4, 2)

    def construct(self, x):
        a = self.conv(x)
        b = self.bn(a)
        return a, b, self.dense(ops.relu(b).mean((2, 3)))


@pytest.mark.parametrize(
    ("level", "keep", "wanted"),
    [
        ("O0", True, "float32 float32 float32"),
        ("O1", True, "float16 float32 float16"),
        ("O2", True, "float16 float32 float16"),
        ("O2", False, "float16 float16 float16"),
        ("O3", True, "float16 float32 float16"),
        ("O3", False, "float16 float16 float16"),
    ],
)
def test_each_amp_level_computes_in_its_precision_and_keeps_the_weights(level, keep, wanted):
    network = Layers()
    cast_amp(network, level, keep)
    results = network(Tensor(RNG.standard_normal((2, 3, 8, 8)), ms.float32))
    assert " ".join(str(result.dtype).lower() for result in results) == wanted
    assert {str(p.dtype) for p in ParameterTuple(network.get_parameters())} == {"Float32"}


def test_another_amp_level_is_refused():
    with pytest.raises(ValueError, match="no amp_level"):
        cast_amp(Layers(), "O4", True)


def test_files_of_the_other_models_are_named(tmp_path):
    for kind, path in of_others("DDRNet", tmp_path):
        with pytest.raises(UserError) as caught:
            record_of(path)
        assert f"{path} looks like {kind}; give the file of a DDRNet-23" in str(caught.value)
