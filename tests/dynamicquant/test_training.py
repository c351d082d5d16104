"""train.py, run as a user runs it: both stages, other forms, other classes, Ctrl-C and resume, several devices."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import src.resnet as resnet
from conftest import one_line_error, stop_training
from dynamicquant import tiny
from dynamicquant.commands import (
    CLASSES,
    FOLDER,
    SIZES,
    accuracy,
    checkpoint,
    command,
    digits,
    rows,
    run,
    succeeded,
    training,
)
from mindspore import Parameter
from src.checkpoints import describe
from src.resnet import Architecture

from utils.checkpoint import save_checkpoint
from utils.cli import UserError
from utils.training import read_state

LAST = "layer4.0.conv2.weight"
AUGMENTED = ["--flip", "0.5", "--color_jitter", "0.3", "--dropout", "0.2"]
# The state tells what the network is.
NETWORK = ["--target_bits", "5"]
TWO_EPOCHS = [*AUGMENTED, "--num_workers", "1", "--epochs", "2", "--lr", "0.01", "--bit_budget", "4.9"]
TWO_EPOCHS += ["--even_epochs", "1"]
ONE_STEP = ["--batch_size", "40", "--lr", "0.05"]
# (flags, the network that they make)
LAYER = (["--granularity", "layer"], Architecture(granularity="layer", **SIZES))
FIXED = (["--num_bits", "1", "--quant", "pact", "--target_bits", "2"], Architecture("pact", 2, 1, **SIZES))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return digits(tmp_path_factory.getbasetemp())


@pytest.fixture
def small(monkeypatch):
    """The small network's cost."""
    for name, size in {**tiny.SIZES, "WIDTHS": tiny.WIDER}.items():
        monkeypatch.setattr(resnet, name, size)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The output folder of a float training of one epoch."""
    output = tmp_path_factory.mktemp("float")
    succeeded(training("float", "frozen", data, output, *AUGMENTED))
    return output


@pytest.fixture(scope="module")
def straight(data, trained, tmp_path_factory):
    """That of a quantized training of two epochs from it, without an interruption; the controller starts between."""
    output = tmp_path_factory.mktemp("quantize")
    words = ["--ckpt_path", trained / "resnet18.ckpt", *NETWORK]
    succeeded(training("quantize", "plain", data, output, *TWO_EPOCHS, *words))
    return output


@pytest.fixture(scope="module")
def fixed(data, trained, tmp_path_factory):
    """That of a training with fixed bits from it, of one step; one training image is broken."""
    output = tmp_path_factory.mktemp("fixed")
    shutil.copytree(data, output / "data")
    broken = sorted((output / "data/train/2").iterdir())[0]
    broken.write_bytes(b"no image")
    words = ["--ckpt_path", trained / "resnet18.ckpt", *ONE_STEP, *FIXED[0]]
    result = run(training("quantize", "eager", output / "data", output, *words))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr.strip() == f"warning: {broken} cannot be read as an image; going on without it"
    assert "1 training images could not be read; others took their places" in result.stdout
    strict = run(training("quantize", "eager", output / "data", output / "x", *words, "--strict"))
    assert f"{broken} cannot be read as an image" in one_line_error(strict)
    return output


def told(architecture: Architecture, classes: list[str] = CLASSES) -> tuple[Architecture, dict]:
    """What a checkpoint of that network should tell."""
    return architecture, asdict(architecture) | {"resize_size": 32, "classes": classes}


def check_float(output: Path) -> None:
    """The files of a float training of one epoch."""
    assert describe(output / "resnet18.ckpt") == told(Architecture("none", **SIZES))
    (row,) = rows(output / "metrics.csv")
    best = json.loads((output / "results.json").read_text())["best"]
    assert best["top1"] == float(row["top1"]) and best["mean_bits"] is None and "train_bits" not in row
    with pytest.raises(UserError, match=r"a training state \(resume.ckpt, for --resume\); give the best checkpoint"):
        describe(output / "resume.ckpt")


def check_quantized(start: Path, data: Path, output: Path, architecture: Architecture, form: str | None) -> None:
    """The files of a training that started from the float checkpoint `start`, and what eval.py makes of them."""
    path = output / "resnet18_dq.ckpt"
    assert describe(path) == told(architecture)
    pair = (checkpoint(path)[LAST].ravel(), checkpoint(start)[LAST].ravel())
    assert 0.5 < np.corrcoef(*pair)[0, 1] < 1 - 1e-7  # trained on, not anew
    row = rows(output / "metrics.csv")[-1]
    fixed, chosen = architecture.gmacs()
    if architecture.decisions:
        counts = {bits: int(row[f"chosen_{bits}"]) for bits in architecture.bits}
        assert sum(counts.values()) == 40 * architecture.decisions
        assert float(row["bits"]) == pytest.approx(sum(k * n for k, n in counts.items()) / sum(counts.values()))
        assert architecture.bits[0] <= float(row["train_bits"]) <= architecture.bits[-1]
    else:
        assert float(row["bit_gflops"]) == pytest.approx((fixed + chosen.sum()) * 2**2) and "bits" not in row

    words = ["--ckpt_path", path, "--output_dir", output / "e", "--data_path", data, "--batch_size", "40"]
    printed = succeeded(command("eval", form, *words))
    # A value on a rounding edge may fall on its other side in another process.
    assert accuracy(printed, path) == pytest.approx(float(row["top1"]), abs=0.051)
    found = json.loads((output / "e/results.json").read_text())
    cost = sum((np.array(one["chosen"]) / 40 * chosen).sum() * one["bits"] ** 2 for one in found["bits"])
    assert found["mean_bit_gflops"] == pytest.approx(fixed * architecture.target_bits**2 + cost)
    assert found["mean_bit_gflops"] == pytest.approx(float(row["bit_gflops"]), rel=0.05)


def test_a_float_network_is_trained_first(trained):
    check_float(trained)


def test_dropout_reaches_the_network(data, tmp_path):
    """One step, which begins with the same weights and sees the same images."""
    losses = {}
    for rate in ("0", "0.5"):
        output = tmp_path / rate
        succeeded(training("float", "eager", data, output, "--batch_size", "40", "--dropout", rate))
        (row,) = rows(output / "metrics.csv")
        losses[rate] = float(row["loss"])
    assert abs(losses["0"] - losses["0.5"]) > 1e-3


def test_a_quantized_network_starts_from_it_and_is_evaluated(small, data, trained, straight):
    check_quantized(trained / "resnet18.ckpt", data, straight, Architecture(target_bits=5, **SIZES), "eager")


def test_so_does_one_with_a_decision_for_each_layer(small, data, trained, tmp_path):
    words, architecture = LAYER
    start = trained / "resnet18.ckpt"
    succeeded(training("quantize", "eager", data, tmp_path, "--ckpt_path", start, *ONE_STEP, *words))
    check_quantized(start, data, tmp_path, architecture, "eager")


def test_so_does_one_of_fixed_bits(small, data, trained, fixed):
    check_quantized(trained / "resnet18.ckpt", data, fixed, FIXED[1], "eager")


@pytest.mark.full
def test_the_real_network_is_trained_in_every_form(data, tmp_path):
    succeeded(training("float", None, data, tmp_path / "float", *AUGMENTED))
    check_float(tmp_path / "float")
    start = tmp_path / "float/resnet18.ckpt"
    for number, (words, architecture) in enumerate((([], Architecture(**SIZES)), LAYER, FIXED)):
        output = tmp_path / str(number)
        succeeded(training("quantize", None, data, output, "--ckpt_path", start, *words))
        check_quantized(start, data, output, architecture, None)


def test_finetuning_takes_the_bits_of_the_checkpoint_and_other_trainings_the_classes(data, fixed, tmp_path):
    """From 2 bits by PACT to other classes with the same; then to the bits of the settings, with those classes."""
    for split in ("train", "val"):
        for digit in "67":
            shutil.copytree(data / split / digit, tmp_path / "two" / split / digit)
    start = fixed / "resnet18_dq.ckpt"
    words = ["--ckpt_path", start, "--finetune", "--num_classes", "2"]
    printed = succeeded(training("quantize", "eager", tmp_path / "two", tmp_path / "tuned", *words))
    assert f"not loaded from {start}, trained from nothing: fc.weight, fc.bias\n" in printed
    tuned = tmp_path / "tuned/resnet18_dq.ckpt"
    two = {"num_classes": 2, "image_size": 32}
    assert describe(tuned) == told(Architecture("pact", 2, 1, **two), ["6", "7"])
    words = ["--ckpt_path", tuned, "--quant", "pact", "--num_bits", "1"]
    succeeded(training("quantize", "eager", tmp_path / "two", tmp_path / "other", *words))
    assert describe(tmp_path / "other/resnet18_dq.ckpt") == told(Architecture("pact", 4, 1, **two), ["6", "7"])


def stopped(command: list, output: Path) -> tuple[Path, str]:
    """Press Ctrl-C in a training that writes to `output`; returns its state and the step after which it stopped.

    While the first step compiles, Ctrl-C is only noted, for the end of that step.
    """
    printed = stop_training(command, "5 steps an epoch", 0.5, FOLDER)
    stop = re.search(r"stopped after step ([1-4]) of epoch 1; go on with --resume (.*)", printed)
    assert stop and stop[2] == str(output / "resume.ckpt"), printed
    assert not (output / "metrics.csv").exists()
    return output / "resume.ckpt", stop[1]


def check_same(one: Path, two: Path) -> None:
    """Whether two trainings, one of them resumed, ended with the same parameters and the same figures."""
    for a, b in zip(rows(one / "metrics.csv"), rows(two / "metrics.csv"), strict=True):
        assert set(a) == set(b)
        for key in set(a) - {"train_images_per_s"}:
            assert a[key] == b[key] or float(a[key]) == pytest.approx(float(b[key]), rel=1e-5), key
    first, second = (checkpoint(folder / "resume.ckpt") for folder in (one, two))
    assert set(first) == set(second) and "accum.fc.weight" in first
    for key in first:
        np.testing.assert_allclose(first[key], second[key], atol=1e-6, err_msg=key)


def test_a_training_stopped_in_mid_epoch_resumes_to_the_same_weights(data, trained, tmp_path):
    """Crops and colours are drawn."""
    words = training("float", "frozen", data, tmp_path / "stopped", *AUGMENTED)
    state, step = stopped(words, tmp_path / "stopped")
    again = training("float", "frozen", data, tmp_path / "resumed", *AUGMENTED, "--resume", state)
    assert "lr 0.02 (now 0.03)" in one_line_error(run([*again, "--lr", "0.03"]))
    assert f"going on after step {step} of epoch 1" in succeeded(again)
    check_same(trained, tmp_path / "resumed")


def test_what_the_network_is_need_not_be_given_again(data, straight, tmp_path):
    """All steps are done, the evaluation is not."""
    again = training("quantize", "eager", data, tmp_path, *TWO_EPOCHS, "--resume", straight / "resume.ckpt")
    assert "going on after step 5 of epoch 2" in succeeded(again)
    assert describe(tmp_path / "resnet18_dq.ckpt") == describe(straight / "resnet18_dq.ckpt")
    one, two = (checkpoint(folder / "resnet18_dq.ckpt") for folder in (straight, tmp_path))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    (first, one), (same, two) = (rows(folder / "metrics.csv") for folder in (straight, tmp_path))
    assert first == same and not first["top1"] and one["train_bits"] == two["train_bits"]
    # A value on a rounding edge may fall on its other side where nothing is compiled.
    assert float(one["top1"]) == pytest.approx(float(two["top1"]), abs=0.051)


def test_a_state_tells_whether_bits_are_drawn_evenly_and_how_good_the_best_epoch_was(data, straight, tmp_path):
    """Made as if the controller had learnt before, and the best epoch had exceeded the budget."""
    state = read_state(straight / "resume.ckpt")
    state["settings"]["bit_budget"] = 6.0
    best = {"epoch": 1, "top1": 1.0, "top5": 1.0, "loss": 0.0, "within_budget": False, "mean_bits": 6.1}
    state["position"] |= {"epoch": 0, "rows": [], "best": best, "kept": {"even_epochs": 0}}
    stored = ms.load_checkpoint(str(straight / "resume.ckpt"))
    parameters = [value for value in stored.values() if isinstance(value, Parameter)]
    save_checkpoint(parameters, tmp_path / "resume.ckpt", state)
    shutil.copy(straight / "resnet18_dq.ckpt", tmp_path)
    words = [*TWO_EPOCHS, "--bit_budget", "6", "--resume", tmp_path / "resume.ckpt"]
    printed = succeeded(training("quantize", "eager", data, tmp_path, *words))
    assert "going on after step 5 of epoch 1" in printed and "best so far" in printed
    first, second = rows(tmp_path / "metrics.csv")
    assert first["top1"] and second["top1"]


@pytest.mark.full
def test_a_stopped_training_resumes_to_the_same_choices(data, trained, straight, tmp_path):
    """Gumbel noise is drawn, too, and the controller starts after the first epoch, which is therefore not evaluated."""
    words = ["--ckpt_path", trained / "resnet18.ckpt", *NETWORK]
    first = training("quantize", "plain", data, tmp_path / "stopped", *TWO_EPOCHS, *words)
    state, step = stopped(first, tmp_path / "stopped")
    again = training("quantize", "plain", data, tmp_path / "resumed", *TWO_EPOCHS, "--resume", state)
    assert "bit_budget 4.9 (now 3.0)" in one_line_error(run([*again, "--bit_budget", "3"]))
    assert f"going on after step {step} of epoch 1" in succeeded(again)
    check_same(straight, tmp_path / "resumed")


def check_equal(one: Path, two: Path, numbers: tuple[str, ...], same: tuple[str, ...]) -> None:
    """Whether two trainings of one epoch ended the same: parameters and `numbers` nearly, columns `same` exactly."""
    ((a,), (b,)) = (rows(folder / "metrics.csv") for folder in (one, two))
    for key in numbers:
        assert float(a[key]) == pytest.approx(float(b[key]), rel=2e-3), key
    assert all(a[key] == b[key] for key in same)
    a, b = (checkpoint(folder / "resume.ckpt") for folder in (one, two))
    assert set(a) == set(b)
    for key in a:
        np.testing.assert_allclose(a[key], b[key], atol=5e-4, err_msg=key)


def test_two_devices_follow_one_with_twice_the_batch(data, trained, tmp_path):
    """Step k sees the same images, the gradients are averaged; BNs are frozen."""
    words = [*AUGMENTED, "--batch_size", "4", "--device_num", "2"]
    result = run(training("float", "frozen", data, tmp_path, *words))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "CPU x 2, 40 training and 40 validation images" in result.stdout and "[INFO]" not in result.stdout
    check_equal(trained, tmp_path, ("lr", "loss", "val_loss"), ("top1", "top5"))


@pytest.mark.full
def test_two_devices_choose_the_bits_that_one_does(data, tmp_path):
    """The same noise is drawn, and the budget is for the mean over both."""
    for devices, batch in ((1, 8), (2, 4)):
        words = ["--batch_size", batch, "--lr", "0.01", "--bit_budget", "3.9", "--penalty", "0.5"]
        words += ["--device_num", devices, "--ckpt_path", "none"]
        result = run(training("quantize", "frozen", data, tmp_path / str(devices), *words))
        assert result.returncode == 0, result.stdout + result.stderr
    numbers = ("lr", "loss", "val_loss", "train_bits", "bits")
    check_equal(tmp_path / "1", tmp_path / "2", numbers, ("top1", "top5", "chosen_3", "chosen_4", "chosen_5"))
