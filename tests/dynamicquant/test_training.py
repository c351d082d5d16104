"""train.py, run as a user runs it: both stages, other forms, Ctrl-C and resume, several devices."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, one_line_error, run_script, stop_training
from dynamicquant.commands import CLASSES, FOLDER, SAMPLE, SIZES, accuracy, checkpoint, digits, evaluate, rows, train
from src.checkpoints import Description, describe
from src.resnet import Architecture

from utils.cli import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a space in its name and the digits in it."""
    place = tmp_path_factory.mktemp("dynamicquant") / "a place"
    place.mkdir()
    digits(place)
    return place


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """The output folder of a float training of one epoch, and what was printed; one training image is broken."""
    output = tmp_path_factory.mktemp("float")
    shutil.copytree(place / "digits", output / "data")
    broken = sorted((output / "data/train/2").iterdir())[0]
    broken.write_bytes(b"no image")
    result = run_script(
        *train("float", output / "data", output / "o", "--flip", "0.5", "--color_jitter", "0.3"), cwd=FOLDER
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr.strip() == f"warning: {broken} cannot be read as an image; going on without it"
    assert "1 training images could not be read; others took their places" in result.stdout
    return output / "o"


def test_a_float_network_is_trained_first(trained):
    description = describe(trained / "resnet18.ckpt")
    assert description == Description(Architecture("none", **SIZES), 32, CLASSES)
    (row,) = rows(trained / "metrics.csv")
    best = json.loads((trained / "results.json").read_text())["best"]
    assert best["top1"] == float(row["top1"]) and best["mean_bits"] is None and "train_bits" not in row
    with pytest.raises(UserError, match=r"a training state \(resume.ckpt, for --resume\); give the best checkpoint"):
        describe(trained / "resume.ckpt")


@pytest.mark.parametrize(
    "words, architecture",
    [
        ([], Architecture(**SIZES)),
        (["--granularity", "layer"], Architecture(granularity="layer", **SIZES)),
        (["--num_bits", "1", "--quant", "pact", "--target_bits", "2"], Architecture("pact", 2, 1, **SIZES)),
    ],
    ids=["image", "layer", "fixed"],
)
def test_a_quantized_network_starts_from_it_and_is_evaluated(place, trained, tmp_path, words, architecture):
    command = train("quantize", place / "digits", tmp_path / "o", "--ckpt_path", trained / "resnet18.ckpt", *words)
    result = run_script(*command, cwd=FOLDER)
    assert result.returncode == 0, result.stdout + result.stderr
    assert describe(tmp_path / "o/resnet18_dq.ckpt") == Description(architecture, 32, CLASSES)
    before, after = checkpoint(trained / "resnet18.ckpt"), checkpoint(tmp_path / "o/resnet18_dq.ckpt")
    pair = (after["layer4.1.conv2.weight"].ravel(), before["layer4.1.conv2.weight"].ravel())
    assert 0.5 < np.corrcoef(*pair)[0, 1] < 1 - 1e-7  # trained on, not anew
    (row,) = rows(tmp_path / "o/metrics.csv")
    fixed, chosen = architecture.gmacs()
    if architecture.decisions:
        counts = {bits: int(row[f"chosen_{bits}"]) for bits in (3, 4, 5)}
        assert sum(counts.values()) == 40 * architecture.decisions
        assert float(row["bits"]) == pytest.approx(sum(k * n for k, n in counts.items()) / sum(counts.values()))
        assert 3 <= float(row["train_bits"]) <= 5
    else:
        assert float(row["bit_gflops"]) == pytest.approx((fixed + chosen.sum()) * 2**2) and "bits" not in row

    report = evaluate(
        place, "--ckpt_path", tmp_path / "o/resnet18_dq.ckpt", "--output_dir", tmp_path / "e", "--batch_size", "8"
    )
    assert report.returncode == 0, report.stderr
    # A value on a rounding edge may fall on its other side in another process.
    assert accuracy(report.stdout, tmp_path / "o/resnet18_dq.ckpt") == pytest.approx(float(row["top1"]), abs=0.051)
    found = json.loads((tmp_path / "e/results.json").read_text())
    cost = sum((np.array(one["chosen"]) / 40 * chosen).sum() * one["bits"] ** 2 for one in found["bits"])
    assert found["mean_bit_gflops"] == pytest.approx(fixed * architecture.target_bits**2 + cost)
    assert found["mean_bit_gflops"] == pytest.approx(float(row["bit_gflops"]), rel=0.05)
    if architecture.granularity == "layer":
        export = ["export.py", *SAMPLE, "--ckpt_path", tmp_path / "o/resnet18_dq.ckpt", "--output_dir", tmp_path / "x"]
        assert "chooses the bits of every layer by itself" in one_line_error(run_script(*export, cwd=FOLDER))
        assert not (tmp_path / "x").exists()
    if not architecture.decisions:
        sampled = evaluate(place, "--ckpt_path", tmp_path / "o/resnet18_dq.ckpt", "--sample_gumbel")
        assert "has fixed bits, there is nothing to sample" in one_line_error(sampled)


def small(workers, bn, data, output, *words):
    flags = train("quantize", data, output, "--ckpt_path", "none", *words)[1:]
    return [ROOT / "tests/dynamicquant/small_network.py", workers, bn, *flags]


def test_a_training_stopped_in_mid_epoch_resumes_to_the_same_weights(place, tmp_path):
    """Two epochs straight, against a stop in mid-epoch plus a resume; crops, colours and Gumbel noise are drawn.

    The controller starts after the first epoch, which is therefore not evaluated.
    """
    words = ["--flip", "0.5", "--color_jitter", "0.3", "--num_workers", "1", "--epochs", "2", "--lr", "0.01"]
    words += ["--even_epochs", "1"]
    straight = run_script(*small(1, "own", place / "digits", tmp_path / "straight", *words), cwd=FOLDER)
    assert straight.returncode == 0, straight.stdout + straight.stderr
    # While the first step compiles, Ctrl-C is only noted, for the end of that step.
    state = tmp_path / "stopped/resume.ckpt"
    output = stop_training(
        small(1, "own", place / "digits", tmp_path / "stopped", *words), "5 steps an epoch", 1, FOLDER
    )
    stop = re.search(r"stopped after step ([1-4]) of epoch 1; go on with --resume (.*)", output)
    assert stop and stop[2] == str(state), output
    assert not (tmp_path / "stopped/metrics.csv").exists()
    other = small(1, "own", place / "digits", tmp_path / "x", *words, "--resume", state, "--bit_budget", "3")
    assert "bit_budget 3.6 (now 3.0)" in one_line_error(run_script(*other, cwd=FOLDER))
    command = small(1, "own", place / "digits", tmp_path / "resumed", *words, "--resume", state)
    resumed = run_script(*command, cwd=FOLDER)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on after step {stop[1]} of epoch 1" in resumed.stdout

    one, two = (rows(tmp_path / run / "metrics.csv") for run in ("straight", "resumed"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        assert all(a[key] == b[key] for key in ("top1", "chosen_3", "chosen_4", "chosen_5", "train_bits"))
        for key in ("lr", "loss", "val_loss")[: 3 if a["top1"] else 2]:
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-5)
    assert not one[0]["top1"] and one[1]["top1"]
    one, two = (checkpoint(tmp_path / run / "resume.ckpt") for run in ("straight", "resumed"))
    assert set(one) == set(two) and "accum.fc.weight" in one
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=1e-6, err_msg=key)


def test_two_workers_follow_one_with_twice_the_batch(place, tmp_path):
    """Step k sees the same images and noise, the gradients are averaged; BNs are frozen."""
    for workers, batch in ((1, 8), (2, 4)):
        words = ["--batch_size", batch, "--lr", "0.01", "--bit_budget", "3.9", "--penalty", "0.5"]
        result = run_script(*small(workers, "frozen", place / "digits", tmp_path / str(workers), *words), cwd=FOLDER)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "CPU x 2, 40 training and 40 validation images" in result.stdout and "[INFO]" not in result.stdout
    ((one,), (two,)) = (rows(tmp_path / str(workers) / "metrics.csv") for workers in (1, 2))
    for key in ("lr", "loss", "val_loss", "train_bits", "bits"):
        assert float(one[key]) == pytest.approx(float(two[key]), rel=2e-3), key
    assert all(one[key] == two[key] for key in ("top1", "top5", "chosen_3", "chosen_4", "chosen_5"))
    one, two = (checkpoint(tmp_path / str(workers) / "resume.ckpt") for workers in (1, 2))
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=5e-4, err_msg=key)
