"""The training step against PyTorch's automatic differentiation, momentum, resume, several workers, the best epoch."""

import json
import signal

import mindspore as ms
import mindspore.nn as nn
import numpy as np
import pytest
import src.resnet as resnet
from conftest import ROOT, run_script
from dynamicquant import tiny
from mindspore import ParameterTuple, Tensor, ops
from PIL import Image
from src.checkpoints import save
from src.config import complete, load_config
from src.dataset import evaluation_loader
from src.evaluation import TOLERANCE, evaluate
from src.gumbelsoftmax import gumbel_noise
from src.inference import Front, Predictor
from src.trainer import SPREAD, DynamicLoss, TrainOneStep, dropout, learning_rates, make_optimizer, step_noise

from utils.cli import UserError
from utils.device import ONE_DEVICE
from utils.images import ImageFolder
from utils.training import Training, load_state, read_state, save_state

BATCH = 8
BUDGET, PENALTY, TEMPERATURE = 3.2, 0.7, 0.8
MOMENTUM, DECAY, RATIO, DROPOUT = 0.9, 1e-2, 0.3, 0.2


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((BATCH, 3, 32, 32)).astype(np.float32)
    return images, rng.integers(0, tiny.CLASSES, BATCH).astype(np.int32)


IMAGES, LABELS = batch(1)


@pytest.fixture(scope="module", autouse=True)
def small():
    ms.set_context(mode=ms.GRAPH_MODE)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in tiny.SIZES.items():
            patch.setattr(resnet, name, size)
        yield


@pytest.fixture
def eager():
    """Nothing is compiled."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


class Run:
    """A step, whose graphs are compiled once, and the way back to where it began."""

    def __init__(self, architecture: resnet.Architecture):
        self.architecture = architecture
        self.network = tiny.network(architecture)
        self.optimizer = make_optimizer(self.network, 0.1, MOMENTUM, DECAY)
        loss = DynamicLoss(self.network, architecture.bits, BUDGET, PENALTY, TEMPERATURE)
        self.step = TrainOneStep(loss, self.optimizer, controller_lr_ratio=RATIO)
        self.begin = self.state()
        self.gradients: dict[str, np.ndarray] = {}
        self.update = self.step.update
        self.step.update = self.keep_gradients

    def keep_gradients(self) -> None:
        """The update, which clears the gradients; they are kept before."""
        sums = {p.name.removeprefix("gradient."): p for p in self.update.sums}
        self.gradients = {name: parameter.asnumpy().copy() for name, parameter in sums.items()}
        self.update()
        assert not any(parameter.asnumpy().any() for parameter in sums.values())

    def parameters(self) -> dict:
        return {p.name: p for cell in (self.network, self.optimizer) for p in cell.get_parameters()}

    def state(self) -> dict[str, np.ndarray]:
        return {name: parameter.asnumpy().copy() for name, parameter in self.parameters().items()}

    def set(self, state: dict[str, np.ndarray]) -> None:
        for name, parameter in self.parameters().items():
            parameter.set_data(Tensor(state[name]))
        for gradient in self.update.sums:
            gradient.set_data(ops.zeros_like(gradient))

    def draws(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Noise and dropout."""
        return step_noise(self.architecture, BATCH, 1, 0, step), dropout(self.network, DROPOUT, BATCH, 1, 0, step)


@pytest.fixture(scope="module")
def by_image():
    return Run(tiny.architecture("pact", "image"))


@pytest.fixture(scope="module")
def by_layer():
    return Run(tiny.architecture("dorefa", "layer"))


def reference(run: Run, noise: np.ndarray, keep: np.ndarray, images=IMAGES, labels=LABELS):
    """Loss, mean bits, gradients and BN statistics of one batch in PyTorch and float64, written from the papers."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    arrays = {name: torch.tensor(run.begin[name].astype(np.float64)) for name in run.begin}
    w = {p.name: arrays[p.name].requires_grad_() for p in run.network.trainable_params()}
    layers, bits = run.architecture.granularity == "layer", run.architecture.bits

    def nearest(x, k):
        return x + (torch.round(x * (2**k - 1)) / (2**k - 1) - x).detach()

    def bn(x, name):
        statistics = [arrays[f"{name}.moving_{kind}"] for kind in ("mean", "variance")]
        return functional.batch_norm(x, *statistics, w[f"{name}.gamma"], w[f"{name}.beta"], training=True)

    def conv(x, name, stride, choice):
        """`choice` (N, 3) one-hot, or None for 4 bits."""
        alpha = w.get(f"{name}.quan_a.alpha")
        top = torch.ones(1) if alpha is None else alpha
        clipped = torch.where(x >= top, top, torch.relu(x))
        squashed = torch.tanh(w[f"{name}.weight"])
        position = squashed / (2 * squashed.abs().max()) + 0.5
        total = 0
        for column, k in enumerate(bits if choice is not None else (4,)):
            a = nearest(clipped / top.detach(), k) * top.detach()
            out = functional.conv2d(a, 2 * nearest(position, k) - 1, None, stride, squashed.shape[-1] // 2)
            total = total + (out if choice is None else out * choice[:, column, None, None, None])
        return total

    def block(x, name, stride, choices):
        shortcut = x
        if stride > 1:
            chosen = None if layers or choices is None else choices[:, 0]
            shortcut = bn(conv(x, f"{name}.downsample.0", stride, chosen), f"{name}.downsample.1")
        stage = int(name[5])
        first, second = [None] * 2
        if choices is not None:
            first, second = (choices[:, 2 * (stage - 2) + number if layers else 0] for number in (0, 1))
        x = torch.relu(bn(conv(x, f"{name}.conv1", stride, first), f"{name}.bn1"))
        return torch.relu(bn(conv(x, f"{name}.conv2", 1, second), f"{name}.bn2") + shortcut)

    x = functional.conv2d(torch.tensor(images.astype(np.float64)), w["conv1.weight"], None, 2, 3)
    x = functional.max_pool2d(torch.relu(bn(x, "bn1")), 3, 2, 1)
    x = block(x, "layer1.0", 1, None)
    pooled = functional.avg_pool2d(x, 7, 7).flatten(1)
    kept, kept_hidden = torch.tensor(keep.astype(np.float64)).split([tiny.SIZES["WIDTHS"][-1], 64], 1)
    hidden = (pooled @ w["fc1.weight"].T + w["fc1.bias"]) * kept_hidden
    scores = (hidden @ w["fc2.weight"].T + w["fc2.bias"]).reshape(BATCH, -1, 3) + torch.tensor(noise)
    soft = torch.softmax(scores / TEMPERATURE, -1)
    choices = functional.one_hot(scores.argmax(-1), 3) + soft - soft.detach()
    for stage in (2, 3, 4):
        x = block(x, f"layer{stage}.0", 2, choices)
    logits = (x.mean((2, 3)) * kept) @ w["fc.weight"].T + w["fc.bias"]
    mean = (choices * torch.tensor(bits)).sum(-1).mean()
    loss = functional.cross_entropy(logits, torch.tensor(labels.astype(np.int64)))
    loss = loss + PENALTY * torch.relu(mean - BUDGET)
    loss.backward()
    statistics = {name: array.numpy() for name, array in arrays.items() if "moving_" in name and name[0] != "a"}
    return loss.item(), mean.item(), {name: array.grad.numpy() for name, array in w.items()}, statistics


@pytest.mark.parametrize("name", ["by_image", pytest.param("by_layer", marks=pytest.mark.full)])
def test_a_step_takes_the_gradient_of_the_whole_loss(name, request):
    """Equation 8 with its penalty, through hard choices, dropout and both quantizers, and the statistics of the BNs.

    In about one batch of four some value is on a rounding edge and falls on its other side in float32, which changes
    gradients by percents; so two batches of three have to agree.
    """
    run = request.getfixturevalue(name)
    errors = []
    for seed in (1, 4, 5):
        images, labels = batch(seed)
        run.set(run.begin)
        loss, bits, gradients, statistics = reference(run, *run.draws(seed), images, labels)
        assert bits > BUDGET + 0.1  # so that the penalty counts
        result = run.step(images, labels, *run.draws(seed), 0.01)
        got, after = run.gradients, run.state()
        assert set(got) == set(gradients)
        error = [abs(result.loss - loss), abs(result.bits - bits)]
        for key, wanted in gradients.items():
            assert np.abs(wanted).max() > 1e-4, key
            error.append(np.abs(got[key] - wanted).max() / np.abs(wanted).max())
        error += [np.abs(after[key] - wanted).max() for key, wanted in statistics.items()]
        errors.append(max(error))
    assert sorted(errors)[1] <= 1e-4, errors


@pytest.mark.parametrize("budget", [5.0, 6.0])
def test_bits_below_the_budget_neither_cost_nor_earn_anything(eager, budget):
    """The loss is then the cross entropy, in NumPy, of the logits at the chosen bits."""
    architecture = tiny.architecture()
    network = tiny.network(architecture)
    images, labels = (Tensor(array) for array in batch(0))
    noise = step_noise(architecture, len(labels), 1, 0, 0)
    loss, bits = DynamicLoss(network, architecture.bits, budget, PENALTY, TEMPERATURE)(images, labels, Tensor(noise))
    features, scores = network.front(images)
    choices = np.eye(3, dtype=np.float32)[(scores.asnumpy() + noise).argmax(-1)]
    logits = network.back(features, Tensor(choices)).asnumpy().astype(np.float64)
    log_sums = np.log(np.exp(logits).sum(1))
    wanted = (log_sums - logits[np.arange(len(labels)), labels.asnumpy()]).mean()
    assert float(bits.asnumpy()) < 5.0 and loss.asnumpy() == pytest.approx(wanted, rel=1e-5)


def test_steps_are_gradient_descent_with_momentum_and_decay(by_image):
    """In NumPy, with the gradients that the test above has compared; the controller has its own learning rate."""
    run = by_image
    run.set(run.begin)
    weights = {p.name: run.begin[p.name].astype(np.float64) for p in run.network.trainable_params()}
    velocity = {name: 0.0 for name in weights}
    for step, lr in enumerate((0.05, 0.02, 0.01)):
        run.step(IMAGES, LABELS, *run.draws(step), lr)
        gradients, after = run.gradients, run.state()
        assert set(gradients) == set(weights)
        for name, gradient in gradients.items():
            velocity[name] = MOMENTUM * velocity[name] + gradient + DECAY * weights[name]
            rate = lr * (RATIO if name.startswith(("fc1.", "fc2.")) else 1)
            weights[name] = weights[name] - rate * velocity[name]
            np.testing.assert_allclose(after[name], weights[name], atol=1e-6, err_msg=f"{step} {name}")
            weights[name] = after[name].astype(np.float64)


def test_the_penalty_counts_above_the_budget_only(by_image):
    """With all images at 3 bits there is none; at 5 bits it is what the bits exceed the budget by."""
    run = by_image
    losses = {}
    for column, bits in ((0, 3), (2, 5)):
        run.set(run.begin)
        noise = np.zeros((BATCH, 1, 3), np.float32)
        noise[..., column] = 50
        keep = run.draws(0)[1]
        result = run.step(IMAGES, LABELS, noise, keep, 0.01)
        assert result.bits == pytest.approx(bits)
        losses[bits] = result.loss
        # A choice without doubt has no gradient from the softmax.
        assert np.abs(run.gradients["fc2.bias"]).max() < 1e-12
    loss, mean, _, _ = reference(run, noise, keep)
    assert mean == 5 and losses[5] == pytest.approx(loss, rel=1e-5)
    assert losses[5] - PENALTY * (5 - BUDGET) > 0


def test_state_restores_the_next_steps_exactly(by_image, tmp_path):
    run = by_image
    run.set(run.begin)
    settings = {"lr": 0.01, "sizes": (32, 24)}
    position = {"epoch": 1, "step": 2, "totals": {}, "rows": [], "best": None, "kept": {}}
    for step in range(4):
        if step == 2:
            save_state(tmp_path / "resume.ckpt", [run.network, run.optimizer], settings, position)
        straight = run.step(IMAGES, LABELS, *run.draws(step), 0.01)
    wanted = run.state()
    rng = np.random.default_rng(0)
    run.set({name: rng.random(array.shape).astype(array.dtype) for name, array in wanted.items()})
    assert load_state(tmp_path / "resume.ckpt", [run.network, run.optimizer], settings) == position
    for step in (2, 3):
        resumed = run.step(IMAGES, LABELS, *run.draws(step), 0.01)
    assert resumed == straight
    for name, array in run.state().items():
        np.testing.assert_allclose(array, wanted[name], atol=1e-6, err_msg=name)
    with pytest.raises(UserError, match=r"lr 0\.01 \(now 0\.02\)"):
        load_state(tmp_path / "resume.ckpt", [run.network, run.optimizer], settings | {"lr": 0.02})
    assert read_state(tmp_path / "resume.ckpt")["settings"] == json.loads(json.dumps(settings))
    with pytest.raises(UserError, match="no checkpoint at"):
        read_state(tmp_path / "none.ckpt")


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(by_image):
    run = by_image
    run.set(run.begin)
    run.network.fc.bias.set_data(Tensor(np.full(tiny.CLASSES, np.inf, np.float32)))
    before = {p.name: p.asnumpy().copy() for p in run.network.trainable_params()}
    with pytest.raises(UserError, match="training has diverged"):
        run.step(IMAGES, LABELS, *run.draws(0), 0.01)
    for parameter in run.network.trainable_params():
        np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name])


def test_a_new_controller_tells_images_apart(by_image):
    """Each score has mean 0 and the given deviation over the images; its momentum is gone, and nothing else moves."""
    run, network = by_image, by_image.network
    run.set(run.begin)
    run.step(IMAGES, LABELS, *run.draws(0), 0.01)
    before = run.state()
    run.step.start_controller(IMAGES, 0)
    assert network.training
    after = run.state()
    moved = {name for name in after if not np.array_equal(after[name], before[name])}
    velocities = {f"accum.fc{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")}
    assert moved == {"fc1.weight", "fc2.weight", "fc2.bias"} | velocities
    assert not any(after[name].any() for name in velocities)
    scores = Front(network.set_train(False))(Tensor(IMAGES))[1].asnumpy()
    network.set_train(True)
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scores.std(0), SPREAD, rtol=1e-4)


class Scores(nn.Cell):
    """The gradient of the scores' squares with respect to a weight of `layer1` and one of the controller."""

    def __init__(self, network: resnet.ResNet):
        super().__init__(auto_prefix=False)
        self.network = network
        self.weights = ParameterTuple([network.layer1[0].conv1.weight, network.fc1.weight])
        self.gradient = ops.value_and_grad(self.squares, None, self.weights)

    def squares(self, images: Tensor) -> Tensor:
        return ops.square(self.network.front(images)[1]).sum()

    def construct(self, images: Tensor) -> tuple:
        return self.gradient(images)


def test_a_part_of_the_controllers_gradient_goes_on_into_layer1(eager):
    found = []
    for part in (1.0, 0.25):
        network = tiny.network(tiny.architecture())
        network.controller_gradient = part
        value, gradients = Scores(network)(Tensor(IMAGES))
        found.append([value.asnumpy(), *(gradient.asnumpy() for gradient in gradients)])
    (value, inner, outer), (same, less, as_much) = found
    assert value == same and np.abs(inner).max() > 0
    np.testing.assert_array_equal(outer, as_much)
    np.testing.assert_allclose(less, 0.25 * inner, rtol=1e-3, atol=1e-5 * np.abs(inner).max())


@pytest.mark.full
def test_two_workers_step_as_one(tmp_path):
    """One of them is below the budget by itself, and both above it together; rank 1 asks to stop."""
    script = ROOT / "tests" / "dynamicquant" / "two_workers.py"
    files = {workers: tmp_path / f"{workers}.npz" for workers in (1, 2)}
    for workers, file in files.items():
        result = run_script(script, file, workers, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
    one, two = (dict(np.load(file)) for file in files.values())
    assert set(one) == set(two)
    assert one["told bits"].tolist() == two["told bits"].tolist()
    assert one["told bits"][0] == 4
    assert one["told interrupt"].all() and two["told interrupt"].all()
    np.testing.assert_allclose(one["told loss"], two["told loss"], rtol=1e-5)
    assert one["moved"] > 1e-3
    assert one.pop("means").tolist() == [1, 1, 1] and two.pop("means").tolist() == [1.5, 1.5, 1]
    for name in one:
        if not name.startswith("told"):
            np.testing.assert_allclose(one[name], two[name], atol=1e-5, err_msg=name)


def test_the_noise_of_a_step_is_the_same_for_any_number_of_devices():
    architecture = tiny.architecture()
    whole = step_noise(architecture, 8, 3, 1, 2)
    assert whole.shape == (8, 1, 3)
    parts = [step_noise(architecture, 4, 3, 1, 2, rank, 2) for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert np.abs(whole - step_noise(architecture, 8, 3, 1, 3)).max() > 0.1
    assert step_noise(tiny.architecture(num_bits=1), 8, 3, 1, 2) is None
    assert np.abs(whole - gumbel_noise((8, 1, 3), 3, 1, 2)).max() > 0.1  # has a stream of its own


def test_the_dropout_of_a_step_is_the_same_for_any_number_of_devices_and_keeps_the_mean():
    network = tiny.network(tiny.architecture())
    whole = dropout(network, 0.2, 800, 3, 1, 2)
    assert whole.shape == (800, 16 + 64) and whole.dtype == np.float32
    assert set(np.unique(whole)) == {0, np.float32(1.25)} and whole.mean() == pytest.approx(1, abs=0.01)
    parts = [dropout(network, 0.2, 400, 3, 1, 2, rank, 2) for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    for seed, epoch, step in ((4, 1, 2), (3, 2, 2), (3, 1, 3)):
        assert ((dropout(network, 0.2, 800, seed, epoch, step) == 0) & (whole == 0)).mean() == pytest.approx(0.04, 0.1)
    assert dropout(network, 0.0, 8, 3, 1, 2) is None
    assert dropout(tiny.network(tiny.architecture(num_bits=1)), 0.2, 8, 3, 1, 2).shape == (8, 16)


def test_the_best_epoch_keeps_to_the_budget_and_then_has_the_highest_accuracy(eager, tmp_path):
    """The classifier's bias decides the class of every image, and the controller's the bits."""
    counts = (5, 3, 2, 1, 1)
    for label, count in enumerate(counts):
        (tmp_path / "val" / str(label)).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (32, 32), (20 * label, 9 * number, 99)).save(
                tmp_path / "val" / str(label) / f"{number}.png"
            )
    folder = ImageFolder(tmp_path / "val")
    architecture = tiny.architecture()
    network = tiny.network(architecture)
    for weight in (network.fc.weight, network.fc2.weight):
        weight.set_data(Tensor(np.zeros(weight.shape, np.float32)))
    words = ["--stage", "quantize", "--batch_size", "4", "--num_workers", "1", "--image_size", "32"]
    words += ["--resize_size", "32", "--num_classes", str(tiny.CLASSES), "--epochs", "6", "--warmup_epochs", "0"]
    args = load_config("train", "", [*words, "--output_dir", str(tmp_path / "out")])
    complete(args)
    predictor = Predictor(architecture, 4)
    best = tmp_path / "out/best.ckpt"
    # (class that every image gets, bits, the best epoch after it)
    epochs = ((0, 5, 1), (4, 3, 2), (2, 4, 3), (0, 5, 3), (2, 3, 5), (3, 3, 5))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with evaluation_loader(folder, args) as loader:
        training = Training(args, ONE_DEVICE, (loader, loader), 4, [network], [], ["best.ckpt"])
        for (label, bits, wanted), epoch in zip(epochs, training.epochs()):
            network.fc.bias.set_data(Tensor(np.eye(tiny.CLASSES, dtype=np.float32)[label]))
            network.fc2.bias.set_data(Tensor(np.eye(3, dtype=np.float32)[bits - 3]))
            result = evaluate(predictor.load(network), loader, training.interrupt)
            assert (result.images, result.top(), result.mean_bits((3, 4, 5))) == (12, counts[label] / 12, bits)
            assert result.chosen.tolist() == [[12 * (bits == b) for b in (3, 4, 5)]]
            assert result.top(1) == 1 and (result.predicted == label).all() and (result.decided == bits - 3).all()
            fixed, chosen = architecture.gmacs()
            cost = fixed * 4**2 + chosen.sum() * bits**2
            assert result.bit_flops(architecture, (3, 4, 5)) == pytest.approx(cost)
            logits = np.eye(tiny.CLASSES)[label]
            loss = np.log(np.exp(logits).sum()) - logits[folder.labels].mean()
            assert result.mean_loss() == pytest.approx(loss, rel=1e-6)
            figures = result.best_figures(architecture, 4 - TOLERANCE / 2)
            line = training.keep_best(figures, lambda: save(network, best, architecture), ("within_budget", "top1"))
            assert training.best["epoch"] == wanted and bool(line) == (wanted == epoch + 1)
            # Rewritten exactly when an epoch becomes the best.
            stored = ms.load_checkpoint(str(best))["fc2.bias"].asnumpy()
            assert stored.argmax() + 3 == {1: 5, 2: 3, 3: 4, 5: 3}[wanted]
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)
    assert training.best == {"epoch": 5, "top1": 2 / 12, "top5": 1, "loss": training.best["loss"]} | {
        "within_budget": True,
        "mean_bits": 3,
    }


def test_learning_rates_of_a_hand_worked_schedule():
    rates = learning_rates(0.1, [2, 4], 0.1, 1, 5, 2)
    wanted = [0.05, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.001, 0.001]
    np.testing.assert_allclose(rates, wanted, rtol=1e-6)
    assert rates.dtype == np.float32
    # The paper's: 110 epochs, drops at 30, 60, 85 and 95, 5 warm-up epochs.
    rates = learning_rates(0.1, [30, 60, 85, 95], 0.1, 5, 110, 3)
    assert len(rates) == 330 and rates[0] == pytest.approx(0.1 / 15) and rates[14] == pytest.approx(0.1)
    by_epoch = {29: 0.1, 30: 0.01, 59: 0.01, 60: 1e-3, 84: 1e-3, 85: 1e-4, 94: 1e-4, 95: 1e-5, 109: 1e-5}
    for epoch, rate in by_epoch.items():
        np.testing.assert_allclose(rates[3 * epoch : 3 * epoch + 3], rate, rtol=1e-5)
    np.testing.assert_allclose(learning_rates(0.2, [9], 0.5, 0, 2, 2), 0.2)
