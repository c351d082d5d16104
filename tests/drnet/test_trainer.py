"""The training step against the whole loss differentiated in one piece, and its BN statistics against NumPy."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT, run_script
from drnet.tiny import tiny_drnet
from mindspore import Tensor, ops
from src.gumbelmodule import gumbel_noise
from src.layers import Resize
from src.trainer import TrainOneStep, learning_rates, make_optimizer, step_noise

from utils.cli import UserError
from utils.training import load_state, save_state

BATCH = 12
RNG = np.random.default_rng(3)
IMAGES = RNG.standard_normal((BATCH, 3, 32, 32)).astype(np.float32)
LABELS = RNG.integers(0, 7, BATCH).astype(np.int32)
# Noise that large decides the choice: 0 and 2 only, so that the group of 24 px is empty.
CHOICE = np.array([0, 2, 2, 0, 0, 2, 0, 2, 0, 0, 2, 0])
NOISE = gumbel_noise((BATCH, 3), 1) + 50 * np.eye(3, dtype=np.float32)[CHOICE]
SOFT_NOISE = gumbel_noise((BATCH, 3), 2) - np.float32([0, 50, 0])


def sgd(network, rate=1.0):
    """Plain gradient descent, so that a step shows the gradient: momentum 0, no decay."""
    return make_optimizer("sgd", network, np.full(10, rate, np.float32), 0.0, 0.0)


def values(*networks):
    return {parameter.name: parameter.asnumpy().copy() for net in networks for parameter in net.get_parameters()}


def put_back(before, *networks):
    for network in networks:
        for parameter in network.get_parameters():
            parameter.set_data(Tensor(before[parameter.name]))


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="module")
def compiled():
    """Networks and the step that fine-tunes them, which all tests share that train on 32 and 16 px."""
    ms.set_context(mode=ms.GRAPH_MODE)
    drnet = tiny_drnet()
    return drnet, TrainOneStep(drnet, [sgd(drnet.classifier), sgd(drnet.predictor)], BATCH, temperature=1.0)


@pytest.fixture
def finetune(compiled):
    """The same, with its weights put back afterwards."""
    drnet, train_step = compiled
    before = values(drnet.classifier, drnet.predictor)
    yield drnet, train_step
    put_back(before, drnet.classifier, drnet.predictor)


def assert_descends(before, after, weights, gradients):
    """Whether a step of rate 1 was one down the gradient."""
    moved = 0
    for weight, gradient in zip(weights, gradients):
        gradient = gradient.asnumpy()
        step = before[weight.name] - after[weight.name]
        np.testing.assert_allclose(step, gradient, atol=2e-5 + 2e-4 * np.abs(gradient).max(), err_msg=weight.name)
        moved += np.abs(gradient).max() > 1e-4
    return moved


def whole_loss(drnet, noise, budget):
    """Equations of the paper for one batch in one function: every image, weighted by its choice, at its resolution."""
    gmacs = np.array(drnet.gmacs()[1], np.float32)
    choice = (drnet.predict(Tensor(IMAGES)).asnumpy() + noise).argmax(1)
    alpha, eta = budget

    def loss():
        scores = drnet.predict(Tensor(IMAGES)) + Tensor(noise)
        soft = ops.softmax(scores, -1)
        hard = Tensor(np.eye(3, dtype=np.float32)[choice])
        one_hot = hard + soft - ops.stop_gradient(soft)
        total = 0.0
        for j, classify in enumerate(drnet.classify):
            rows = np.flatnonzero(choice == j)
            if len(rows):
                logits = classify(Tensor(IMAGES[rows])) * one_hot[Tensor(rows), j : j + 1]
                log_p = ops.log_softmax(logits, -1)
                total = total - ops.gather_elements(log_p, 1, Tensor(LABELS[rows][:, None])).sum() / BATCH
        excess = ((one_hot * Tensor(gmacs)).sum(1).mean() - alpha) / float(gmacs.max() - gmacs.min())
        return total + eta * ops.relu(excess)

    return loss, choice


@pytest.mark.parametrize(("noise", "budget"), [(NOISE, (10.0, 0.7)), (SOFT_NOISE, (0.001, 0.7))])
def test_finetune_step_takes_the_gradient_of_the_whole_loss(finetune, noise, budget):
    drnet, train_step = finetune
    weights = [*drnet.classifier.trainable_params(), *drnet.predictor.trainable_params()]
    before = values(drnet.classifier, drnet.predictor)
    drnet.set_train(True)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    loss, choice = whole_loss(drnet, noise, budget)
    drnet.set_train(True)
    wanted, gradients = ms.value_and_grad(loss, None, ms.ParameterTuple(weights))()
    put_back(before, drnet.classifier, drnet.predictor)  # undo the statistics of this reference run
    ms.set_context(mode=ms.GRAPH_MODE)

    train_step.budget = budget
    result = train_step(IMAGES, LABELS, noise)
    assert result.chosen.tolist() == np.bincount(choice, minlength=3).tolist()
    assert result.loss == pytest.approx(float(wanted.asnumpy()), rel=1e-5)
    assert assert_descends(before, values(drnet.classifier, drnet.predictor), weights, gradients) > 60


def test_each_bn_learns_from_its_own_images_and_once_a_step(finetune):
    drnet, train_step = finetune
    ms.set_context(mode=ms.PYNATIVE_MODE)
    convolution, of_predictor = drnet.classifier.conv1, drnet.predictor.conv1
    small = Resize(16)
    features = {
        "classifier.bn1.bn_0": convolution(Tensor(IMAGES[CHOICE == 0])),
        "classifier.bn1.bn_2": convolution(small(Tensor(IMAGES[CHOICE == 2]))),
        "predictor.bn1": of_predictor(small(Tensor(IMAGES))),
    }
    features = {name: tensor.asnumpy().astype(np.float64) for name, tensor in features.items()}
    ms.set_context(mode=ms.GRAPH_MODE)
    before = values(drnet.classifier, drnet.predictor)
    train_step.budget = (0.01, 0.2)
    train_step(IMAGES, LABELS, NOISE)
    after = values(drnet.classifier, drnet.predictor)
    for name, array in features.items():
        count = array.size / array.shape[1]
        for kind, new in (
            ("mean", array.mean((0, 2, 3))),
            ("variance", array.var((0, 2, 3)) * count / (count - 1)),
        ):
            wanted = 0.9 * before[f"{name}.moving_{kind}"] + 0.1 * new
            np.testing.assert_allclose(after[f"{name}.moving_{kind}"], wanted, rtol=1e-4, atol=1e-5)
    for name in before:
        if ".bn_1." in name and "moving" in name:
            np.testing.assert_array_equal(before[name], after[name])


def test_pretrain_step_sums_the_losses_of_all_resolutions():
    drnet = tiny_drnet((32, 16))
    drnet.set_train(True)
    weights = drnet.classifier.trainable_params()
    before = values(drnet.classifier)
    ms.set_context(mode=ms.PYNATIVE_MODE)

    def loss():
        return sum(ops.cross_entropy(classify(Tensor(IMAGES)), Tensor(LABELS)) for classify in drnet.classify)

    wanted, gradients = ms.value_and_grad(loss, None, ms.ParameterTuple(weights))()
    put_back(before, drnet.classifier)
    predictor = values(drnet.predictor)
    result = TrainOneStep(drnet, [sgd(drnet.classifier)], BATCH)(IMAGES, LABELS)
    assert result.loss == pytest.approx(float(wanted.asnumpy()), rel=1e-5)
    assert result.chosen.tolist() == [BATCH] * 2
    assert_descends(before, values(drnet.classifier), weights, gradients)
    for name, array in values(drnet.predictor).items():
        np.testing.assert_array_equal(predictor[name], array)


def test_a_lone_image_does_no_harm(finetune):
    """At these sizes the last feature map is one pixel: a BN cannot learn from one image there."""
    drnet, train_step = finetune
    train_step.budget = (0.001, 0.2)
    before = values(drnet.classifier)
    noise = gumbel_noise((BATCH, 3), 1) + 50 * np.eye(3, dtype=np.float32)[[1] + [0] * (BATCH - 1)]
    assert train_step(IMAGES, LABELS, noise).chosen.tolist() == [BATCH - 1, 1, 0]
    after = values(drnet.classifier, drnet.predictor)
    assert all(np.isfinite(array).all() for array in after.values())
    for name, array in before.items():
        if ".bn_1." in name:
            np.testing.assert_array_equal(array, after[name])


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(finetune):
    drnet, train_step = finetune
    bias = drnet.classifier.end_point.bias
    bias.set_data(Tensor(np.full(bias.shape, np.inf, np.float32)))
    weights = [*drnet.classifier.trainable_params(), *drnet.predictor.trainable_params()]
    before = {weight.name: weight.asnumpy().copy() for weight in weights}
    with pytest.raises(UserError, match="diverged"):
        train_step(IMAGES, LABELS, NOISE)
    for weight in weights:
        np.testing.assert_array_equal(before[weight.name], weight.asnumpy())


@pytest.mark.full
def test_two_workers_step_as_one_with_an_empty_group(tmp_path):
    """Rank 1's images all choose 32 px, so its other groups are empty; BN frozen, since its statistics are local."""
    script = ROOT / "tests" / "drnet" / "two_workers.py"
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    result = run_script(script, one, "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = run_script(script, two, "2", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    one, two = np.load(one), np.load(two)
    assert set(one.files) == set(two.files)
    assert one["chosen"].tolist() == two["chosen"].tolist() == [[8, 2, 2], [8, 2, 2]]
    assert one["correct"].tolist() == two["correct"].tolist()
    assert one["interrupt"].tolist() == two["interrupt"].tolist() == [False, True]
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)
    for name in one.files:
        if "." in name:
            np.testing.assert_allclose(one[name], two[name], atol=1e-5, err_msg=name)
    assert np.abs(one["classifier.end_point.bias"] - one["start"]).max() > 1e-4


def test_the_noise_of_each_step_is_new_and_the_same_for_any_number_of_devices():
    whole = step_noise(8, 3, 5, 1, 2)
    parts = [step_noise(4, 3, 5, 1, 2, SimpleNamespace(rank=rank, count=2)) for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    for seed, epoch, step in ((6, 1, 2), (5, 2, 2), (5, 1, 3)):
        assert np.abs(whole - step_noise(8, 3, seed, epoch, step)).max() > 0.1
    assert np.abs(whole - gumbel_noise((8, 3), 5, 1, 2)).max() > 0.1  # has a stream of its own


def test_learning_rates_of_a_hand_worked_schedule():
    rates = learning_rates(0.1, "step", epochs=5, steps=2, warmup_epochs=1, lr_step=2, lr_gamma=0.1)
    wanted = [0.05, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.001, 0.001]
    np.testing.assert_allclose(rates, wanted, rtol=1e-6)
    rates = learning_rates(0.2, "cosine", epochs=4, steps=1, warmup_epochs=0, lr_step=1, lr_gamma=0.1)
    np.testing.assert_allclose(rates, [0.2, 0.1 + 0.1 / 2**0.5, 0.1, 0.1 - 0.1 / 2**0.5], rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_reaches_every_parameter(name):
    network = tiny_drnet().predictor
    weights = network.trainable_params()
    before = {weight.name: weight.asnumpy().copy() for weight in weights}
    optimizer = make_optimizer(name, network, np.full(1, 0.1, np.float32), 0.9, 0.5)
    optimizer(tuple(ms.ops.zeros_like(weight) for weight in weights))
    assert any(name.endswith("gamma") for name in before)
    for weight in weights:
        np.testing.assert_allclose(weight.asnumpy(), before[weight.name] * (1 - 0.1 * 0.5), rtol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_state_restores_the_next_step_exactly(tmp_path, name):
    def start():
        drnet = tiny_drnet()
        rates = learning_rates(0.01, "cosine", 1, 6, 0.3, 1, 0.1)
        networks = [drnet.classifier, drnet.predictor]
        optimizers = [make_optimizer(name, network, rates, 0.9, 1e-3) for network in networks]
        return [*networks, *optimizers], TrainOneStep(drnet, optimizers, BATCH, temperature=1.0, budget=(0.01, 0.2))

    cells, train_step = start()
    settings = {"lr": 0.01, "sizes": (32, 24, 16)}
    position = {"epoch": 1, "step": 2, "totals": {"loss": 3.5}, "rows": [], "best": None, "kept": {}}
    for step in range(4):
        if step == 2:
            save_state(tmp_path / "resume.ckpt", cells, settings, position)
        straight = train_step(IMAGES, LABELS, gumbel_noise((BATCH, 3), step))
    wanted = values(*cells)

    cells, train_step = start()
    assert load_state(tmp_path / "resume.ckpt", cells, settings) == position
    for step in (2, 3):
        resumed = train_step(IMAGES, LABELS, gumbel_noise((BATCH, 3), step))
    assert resumed.loss == pytest.approx(straight.loss, abs=1e-6)
    for key, array in values(*cells).items():
        np.testing.assert_allclose(array, wanted[key], atol=1e-6, err_msg=key)
    with pytest.raises(UserError, match=r"lr 0\.01 \(now 0\.02\)"):
        load_state(tmp_path / "resume.ckpt", cells, settings | {"lr": 0.02})
