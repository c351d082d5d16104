"""train.py, eval.py and export.py, run as a user runs them, with good and with bad input."""

import csv
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import yaml
from conftest import ROOT, one_line_error, run_script, stop_training
from golden.recipe import value
from mindspore import Tensor, nn
from PIL import Image
from src.checkpoints import BACKBONES, fill, from_torch, save
from src.config import SETTINGS, load_config, set_sizes

sys.path.insert(0, str(ROOT / "tests" / "resnest"))
from resnest14 import small_network  # noqa: F401

from utils.checkpoint import read_record
from utils.cli import UserError
from utils.config import take_settings

FOLDER = ROOT / "ResNeSt"
SCRIPT = ROOT / "tests" / "resnest" / "resnest14.py"
SAMPLE = ["--config_path", "config/resnest_sample_config.yaml"]
SCRIPTS = ("train", "eval", "export")
CLASSES = [str(digit) for digit in range(10)]


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(path: Path) -> dict:
    return {name: p.asnumpy() for name, p in ms.load_checkpoint(str(path)).items() if isinstance(p, ms.Parameter)}


def prepared(paths) -> np.ndarray:
    """The documented evaluation at 64 pixels, in float64 until the end."""
    return normalised([Image.open(path).convert("RGB").resize((64, 64), Image.BILINEAR) for path in paths])


def normalised(images) -> np.ndarray:
    """Pillow's images, (N, H, W, 3) in 0..255, as float32 (N, 3, H, W)."""
    x = (np.stack(images) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return x.transpose(0, 3, 1, 2).astype(np.float32)


@pytest.fixture(scope="module")
def place(small_network, tmp_path_factory):  # noqa: F811
    """A folder with a space in its name: the digits with 40 and 41 images, a checkpoint, and what it predicts.

    The weights are the recipe's; the head's bias makes the mean logits 0, so that not every image gets one class.
    """
    place = tmp_path_factory.mktemp("resnest") / "a place"
    place.mkdir()
    words = ["--output", place / "digits", "--images", "4", "--size", "64"]
    assert run_script(ROOT / "utils/sample_imagenet.py", *words, cwd=place).returncode == 0
    first = sorted((place / "digits/val/0").iterdir())[0]
    shutil.copy(first, first.with_name("extra.JPEG"))
    return place, *recipe("resnest14", place)


def recipe(backbone: str, place: Path) -> tuple[nn.Cell, list]:
    """The network, also as <backbone>.ckpt, and path, label and logits of each validation image."""
    ms.set_context(mode=ms.GRAPH_MODE)
    network = make(backbone, 10)
    names = json.loads((ROOT / "tests/golden/resnest50_torch.json").read_text())
    weights = {name: value(name, [10, *shape[1:]] if name.startswith("fc.") else shape) for name, shape in names}
    fill(network, from_torch(weights))
    network.set_train(False)
    paths = sorted((place / "digits/val").rglob("*.JPEG"))
    logits = network(Tensor(prepared(paths))).asnumpy()
    network.fc.bias.set_data(Tensor(network.fc.bias.asnumpy() - logits.mean(0)))
    save(network, place / f"{backbone}.ckpt", {"classes": CLASSES, "image_size": 64, "resize_size": 64})
    logits = logits - logits.mean(0)
    assert len(set(logits.argmax(1))) > 3
    return network, [(str(path), int(path.parent.name), row) for path, row in zip(paths, logits)]


def make(backbone: str, classes: int) -> nn.Cell:
    return BACKBONES[backbone].constructor(num_classes=classes)


# What a test of the training around the network runs with: nearly none, or also one that is a ResNeSt.
NETWORKS = pytest.mark.parametrize("variables", [{"TINY": "1"}, pytest.param({}, marks=pytest.mark.full)], ids=str)


def command(name: str, *words, **variables):
    """Run train.py, eval.py or export.py of a ResNeSt folder with a fifth network."""
    return run_script(SCRIPT, *words, cwd=FOLDER, COMMAND=name, **variables)


def evaluate(place, *words):
    """eval.py with a checkpoint that tells backbone, number of classes and sizes."""
    flags = [*SAMPLE, "--data_path", place / "digits", "--ckpt_path", place / "resnest14.ckpt"]
    return command("eval", *flags, "--output_dir", place / "out", *words)


def train(data, output, *words) -> list:
    """Flags of train.py, without the network's."""
    flags = [*SAMPLE, "--data_path", data, "--output_dir", output, "--device_target", "CPU"]
    return [*flags, "--batch_size", "8", "--warmup_epochs", "0", "--epochs", "1", *words]


def result_lines(output: str) -> list[tuple[int, int]]:
    """Hits and images of the two documented lines, whose accuracies must be theirs."""
    form = r"^after allreduce eval: top1_correct=(\d+), tot=(\d+), acc=(\d+\.\d\d)%\n"
    form += r"after allreduce eval: top5_correct=(\d+), tot=(\d+), acc=(\d+\.\d\d)%$"
    found = re.search(form, output, re.M)
    assert found, output
    lines = [tuple(map(float, found.groups()[:3])), tuple(map(float, found.groups()[3:]))]
    for correct, images, accuracy in lines:
        assert accuracy == pytest.approx(100 * correct / images, abs=0.00501)
    return [(int(correct), int(images)) for correct, images, _ in lines]


def hits(expected, k: int) -> int:
    return sum(label in np.argsort(-row, kind="stable")[:k] for _, label, row in expected)


def test_eval_counts_every_image_and_prints_the_documented_lines(place):
    place, _, expected = place
    result = evaluate(place, "--predictions", place / "p.csv", "--batch_size", "9")
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert result_lines(result.stdout) == [(hits(expected, 1), 41), (hits(expected, 5), 41)]
    found = {row["path"]: (int(row["label"]), int(row["prediction"])) for row in rows(place / "p.csv")}
    assert found == {path: (label, int(row.argmax())) for path, label, row in expected}
    report = json.loads((place / "out/results.json").read_text())
    assert (report["top1_correct"], report["images"], report["left_out"]) == (hits(expected, 1), 41, 0)
    labels = np.array([label for _, label, _ in expected])
    logits = np.stack([row for _, _, row in expected]).astype(np.float64)
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(41), labels]
    assert report["loss"] == pytest.approx(loss.mean(), abs=1e-5)


def test_eval_with_the_authors_preprocessing(place, tmp_path):
    """Of 64 pixels the middle 64 * 64 / 96, rounded as the authors' code rounds, resized to 64 with bicubic."""
    place, network, _ = place
    paths = sorted((place / "digits/val").rglob("*.JPEG"))
    squares = [Image.open(path).convert("RGB").crop((11, 11, 54, 54)).resize((64, 64), Image.BICUBIC) for path in paths]
    logits = network(Tensor(normalised(squares))).asnumpy()
    expected = [(str(path), int(path.parent.name), row) for path, row in zip(paths, logits)]
    words = ["--preprocess", "authors", "--predictions", tmp_path / "p.csv", "--output_dir", tmp_path]
    result = evaluate(place, *words)
    assert result_lines(result.stdout) == [(hits(expected, 1), 41), (hits(expected, 5), 41)], result.stderr
    assert [int(row["prediction"]) for row in rows(tmp_path / "p.csv")] == [row.argmax() for _, _, row in expected]
    report = json.loads((tmp_path / "results.json").read_text())
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(41), [label for _, label, _ in expected]]
    assert report["preprocess"] == "authors" and report["loss"] == pytest.approx(loss.mean(), abs=1e-4)


def test_a_corrupt_image_is_left_out_over_two_devices_and_with_strict_it_is_an_error(place, tmp_path):
    place, _, expected = place
    data = tmp_path / "data"
    shutil.copytree(place / "digits", data)
    broken = data / "val/3/a_broken.JPEG"
    broken.write_bytes(b"\xff\xd8 no image")
    words = ["--data_path", data, "--predictions", tmp_path / "p.csv", "--batch_size", "16", "--output_dir", tmp_path]
    result = evaluate(place, *words, "--device_num", "2", "--device_target", "CPU")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "42 images, CPU x 2" in result.stdout and "[INFO]" not in result.stdout
    assert "1 of 42 images could not be read and were left out" in result.stdout
    assert result_lines(result.stdout) == [(hits(expected, 1), 41), (hits(expected, 5), 41)]
    found = {Path(row["path"]).name: int(row["prediction"]) for row in rows(tmp_path / "p.csv")}
    assert found == {Path(path).name: int(row.argmax()) for path, _, row in expected}
    assert str(broken) in one_line_error(evaluate(place, "--data_path", data, "--strict"))


@pytest.mark.parametrize(
    "batch_size, name", [(3, None), (0, "my_net.v1"), pytest.param(1, "other.MINDIR", marks=pytest.mark.full)]
)
def test_the_exported_file_predicts_the_same_and_the_manifest_says_how(place, tmp_path, batch_size, name):
    place, _, expected = place
    words = [*SAMPLE, "--backbone", "resnest14", "--ckpt_path", place / "resnest14.ckpt", "--device_target", "CPU"]
    words += ["--device_id", "0", "--file_format", "MINDIR", "--output_dir", tmp_path / "an export"]
    words += ["--batch_size", batch_size, *(["--file_name", name] if name else [])]
    result = command("export", *words)
    assert result.returncode == 0, result.stderr
    assert "differs from the live network by at most" in result.stdout
    stem = {"other.MINDIR": "other", None: "resnest14"}.get(name, name)
    file, manifest = (tmp_path / "an export" / f"{stem}.{ending}" for ending in ("mindir", "json"))
    assert sorted(file.parent.iterdir()) == sorted([file, manifest])
    manifest = json.loads(manifest.read_text())
    assert manifest["input"]["shape"] == [batch_size, 3, 64, 64] and manifest["class_names"] == CLASSES
    steps = manifest["preprocess"]
    assert steps["resize"] == [64, 64] and steps["center_crop"] == 64 and "bilinear" in steps["interpolation"]
    assert (steps["mean"], steps["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    if batch_size == 3:
        loaded = nn.GraphCell(ms.load(str(file)))
        for start in (0, 6):
            some = expected[start : start + 3]
            logits = loaded(Tensor(prepared([path for path, _, _ in some]))).asnumpy()
            np.testing.assert_allclose(logits, [row for _, _, row in some], atol=1e-4)
    # 41 images do not fill the last batch of 3.
    result = evaluate(place, "--ckpt_path", file, "--predictions", tmp_path / "p.csv", "--output_dir", tmp_path)
    assert result_lines(result.stdout) == [(hits(expected, 1), 41), (hits(expected, 5), 41)], result.stderr
    assert [int(row["prediction"]) for row in rows(tmp_path / "p.csv")] == [row.argmax() for _, _, row in expected]
    if batch_size == 3:
        for flag, wrong, right in (("--image_size", "32", 64), ("--backbone", "resnest101", "resnest14")):
            line = one_line_error(evaluate(place, "--ckpt_path", file, flag, wrong))
            assert f"{flag} {wrong} contradicts {file}, which has {right}; " in line
        (tmp_path / "cut.mindir").write_bytes(file.read_bytes()[:1000])
        digest = hashlib.sha256(file.read_bytes()[:1000]).hexdigest()
        for change, wanted in (
            ({"format": "AIR"}, "is of a later export, to AIR"),
            ({}, "cut.mindir is damaged or not the file that"),
            ({"sha256": digest}, "cannot be read as a MINDIR file"),
            ({"model": "DDRNet23"}, "cut.json is of DDRNet23, not of resnest50 or resnest101 or"),
        ):
            (tmp_path / "cut.json").write_text(json.dumps(manifest | change))
            assert wanted in one_line_error(evaluate(place, "--ckpt_path", tmp_path / "cut.mindir"))


@pytest.mark.full
def test_resnest50_by_the_commands_themselves(place, tmp_path):
    """Fine-tuned, evaluated and exported; the config names the backbone."""
    place, *_ = place
    recipe("resnest50", place)
    flags = train(place / "digits", tmp_path, "--ckpt_path", place / "resnest50.ckpt", "--lr", "0.001")
    tuned = [*SAMPLE, "--ckpt_path", tmp_path / "resnest50.ckpt", "--device_target", "CPU"]
    data = ["--data_path", place / "digits", "--output_dir", tmp_path / "e"]
    lines = []
    for script, words in (
        ("train.py", flags),
        ("eval.py", [*tuned, *data]),
        ("export.py", [*tuned, "--output_dir", tmp_path]),
        ("eval.py", [*SAMPLE, *data, "--ckpt_path", tmp_path / "resnest50.mindir"]),
    ):
        result = run_script(script, *words, cwd=FOLDER)
        assert result.returncode == 0, result.stdout + result.stderr
        lines += [result_lines(result.stdout)] if script == "eval.py" else []
    best = json.loads((tmp_path / "results.json").read_text())["best"]
    assert lines[0] == lines[1] and lines[0][0] == (round(41 * best["top1"]), 41)


def test_own_classes_from_a_checkpoint_with_others(place, tmp_path):
    place, *_ = place
    words = ["--output", tmp_path / "five", "--images", "4", "--classes", "5", "--size", "64"]
    assert run_script(ROOT / "utils/sample_imagenet.py", *words, cwd=tmp_path).returncode == 0
    broken = sorted((tmp_path / "five/train/2").iterdir())[0]
    broken.write_bytes(b"no image")
    start = place / "resnest14.ckpt"
    own = ["--num_classes", "5", "--ckpt_path", start, "--finetune", "--lr", "0.01", "--flip", "0.5"]
    result = command("train", *train(tmp_path / "five", tmp_path / "o", *own, "--batch_size", "5"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "trained from nothing: fc.weight, fc.bias" in result.stdout
    assert result.stderr.strip() == f"warning: {broken} cannot be read as an image; going on without it"
    assert "1 training images could not be read; others took their places" in result.stdout
    trained, before = checkpoint(tmp_path / "o/resnest14.ckpt"), checkpoint(start)
    assert trained["fc.weight"].shape == (5, 2048)
    pair = (trained["layer1.0.conv1.weight"].ravel(), before["layer1.0.conv1.weight"].ravel())
    assert 0.95 < np.corrcoef(*pair)[0, 1] < 1 - 1e-6  # trained on, not anew
    assert read_record(tmp_path / "o/resnest14.ckpt") == {
        **{"backbone": "resnest14", "num_classes": 5, "classes": CLASSES[:5]},
        **{"image_size": 64, "resize_size": 64},
    }

    # The best checkpoint has the accuracy and loss that the training reports; its state is no checkpoint of a network.
    best = json.loads((tmp_path / "o/results.json").read_text())["best"]
    words = ["--data_path", tmp_path / "five", "--output_dir", tmp_path / "e", "--ckpt_path"]
    report = evaluate(place, *words, tmp_path / "o/resnest14.ckpt")
    assert result_lines(report.stdout)[0] == (round(20 * best["top1"]), 20)
    assert json.loads((tmp_path / "e/results.json").read_text())["loss"] == pytest.approx(best["loss"], rel=1e-4)
    line = one_line_error(evaluate(place, *words, tmp_path / "o/resume.ckpt"))
    assert "a training state (resume.ckpt, for --resume)" in line
    swapped = train(tmp_path / "five", tmp_path / "x", *own, "--resume", start)
    assert "no training state" in one_line_error(command("train", *swapped))


@NETWORKS
def test_a_training_stopped_in_mid_epoch_resumes_to_the_same_weights(place, tmp_path, monkeypatch, variables):
    """Two epochs straight, against a stop in mid-epoch plus a resume; crop, flip and dropout are on.

    The state tells the network and the sizes, so the second command need not.
    """
    place, *_ = place
    data = place / "digits"
    for name, text in {"COMMAND": "train", **variables}.items():
        monkeypatch.setenv(name, text)
    words = ["--dropout", "0.2", "--flip", "0.5", "--num_workers", "1", "--lr", "0.01", "--epochs", "2"]
    network = ["--backbone", "resnest14", "--image_size", "32", "--resize_size", "32"]
    straight = command("train", *train(data, tmp_path / "straight", *words, *network))
    assert straight.returncode == 0, straight.stdout + straight.stderr
    state = tmp_path / "stopped/resume.ckpt"
    flags = train(data, tmp_path / "stopped", *words, *network)
    if variables:
        stopped = command("train", *flags, INTERRUPTED="2")
        assert stopped.returncode == 130, stopped
        output = stopped.stdout
    else:  # while the first step compiles, Ctrl-C is only noted, for the end of that step
        output = stop_training([SCRIPT, *flags], "5 steps an epoch", 1, FOLDER)
    stop = re.search(r"stopped after step ([1-4]) of epoch 1; go on with --resume (.*)", output)
    assert stop and stop[2] == str(state) and (not variables or stop[1] == "3"), output
    assert not (tmp_path / "stopped/metrics.csv").exists()
    again = train(data, tmp_path / "resumed", *words, "--resume", state)
    for flag, given, wanted in (
        ("--lr", "0.3", "lr 0.01 (now 0.3)"),
        ("--image_size", "64", "image_size 32 (now 64)"),
        ("--backbone", "resnest50", f"--backbone resnest50 contradicts {state}, which has resnest14"),
        ("--num_classes", "5", f"--num_classes 5 contradicts {state}, which has 10"),
    ):
        more = ["--resize_size", "64"] if flag == "--image_size" else []
        assert wanted in one_line_error(command("train", *again, flag, given, *more))
    resumed = command("train", *again)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on after step {stop[1]} of epoch 1" in resumed.stdout
    assert read_record(tmp_path / "resumed/resnest14.ckpt") == {
        **{"backbone": "resnest14", "num_classes": 10, "classes": CLASSES},
        **{"image_size": 32, "resize_size": 32},
    }

    one, two = (rows(tmp_path / run / "metrics.csv") for run in ("straight", "resumed"))
    assert len(one) == len(two) == 2 and [row["top1"] for row in one] == [row["top1"] for row in two]
    for key in ("lr", "loss", "val_loss"):
        assert [float(r[key]) for r in one] == pytest.approx([float(r[key]) for r in two], rel=1e-5)
    last = float(one[-1]["lr"])
    one, two = (checkpoint(tmp_path / run / "resume.ckpt") for run in ("straight", "resumed"))
    assert one["learning_rate"] == pytest.approx(last, rel=1e-5)
    assert set(one) == set(two) and "accum.fc.weight" in one
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=1e-5, err_msg=key)
    best = json.loads((tmp_path / "resumed/results.json").read_text())["best"]
    assert best["top1"] == max(float(row["top1"]) for row in rows(tmp_path / "resumed/metrics.csv"))


@NETWORKS
def test_two_workers_follow_one_with_twice_the_batch(place, tmp_path, variables):
    """Step k sees the same images and dropout, the gradients are averaged; BNs are frozen."""
    place, *_ = place
    words = ["--backbone", "resnest14", "--dropout", "0.3", "--lr", "0.02", "--last_gamma", "false", "--epochs", "2"]
    for workers, batch in ((1, 8), (2, 4)):
        more = [*words, "--batch_size", batch, "--device_num", workers]
        result = command("train", *train(place / "digits", tmp_path / str(workers), *more), BN="frozen", **variables)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "CPU x 2, 40 training and 41 validation images" in result.stdout and "[INFO]" not in result.stdout
    one, two = (rows(tmp_path / str(workers) / "metrics.csv") for workers in (1, 2))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        for key in ("lr", "loss", "val_loss"):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=2e-3)
        assert (a["top1"], a["top5"]) == (b["top1"], b["top5"])
    one, two = (checkpoint(tmp_path / str(workers) / "resume.ckpt") for workers in (1, 2))
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=5e-4, err_msg=key)


@NETWORKS
def test_a_diverging_training_stops_with_one_line(place, tmp_path, variables):
    place, *_ = place
    flags = train(place / "digits", tmp_path, "--backbone", "resnest14", "--lr", "1e30")
    line = one_line_error(command("train", *flags, **variables))
    assert "training has diverged, start again with a lower --lr" in line
    assert not list(tmp_path.iterdir())


def test_bad_input_ends_with_one_line(place, tmp_path):
    """Each row: script, flags that are wrong, and what the error must speak of."""
    place, *_ = place
    whole = place / "resnest14.ckpt"
    (tmp_path / "truncated.ckpt").write_bytes(whole.read_bytes()[:100000])
    save(make("resnest14", 5), tmp_path / "five.ckpt")
    save(make("resnest14", 10), tmp_path / "letters.ckpt", {"classes": [f"letter {digit}" for digit in CLASSES]})
    for name, record in (("size", {"image_size": "large"}), ("place", {"predictions": str(tmp_path / "p.csv")})):
        save(make("resnest14", 10), tmp_path / f"{name}.ckpt", record)
    spoilt = make("resnest14", 10)
    spoilt.fc.bias.set_data(Tensor(np.full(10, np.nan, np.float32)))
    save(spoilt, tmp_path / "nan.ckpt")
    ms.save_checkpoint(make("resnest14", 10), str(tmp_path / "mindcv.ckpt"))
    (tmp_path / "odd.mindir").write_bytes(b"x")
    (tmp_path / "odd.json").write_text("[]")
    cases = [
        ("eval", ["--data_path", tmp_path / "none"], "no folder"),
        ("eval", ["--num_classes", "1000"], f"--num_classes 1000 contradicts {whole}, which has 10; "),
        ("eval", ["--image_size", "32"], f"--image_size 32 contradicts {whole}, which has 64; "),
        ("eval", ["--ckpt_path", tmp_path / "none.ckpt"], "no checkpoint at"),
        ("eval", ["--ckpt_path", tmp_path / "truncated.ckpt"], "truncated"),
        ("eval", ["--ckpt_path", tmp_path / "five.ckpt"], "10 class"),
        ("eval", ["--backbone", "resnest101"], f"--backbone resnest101 contradicts {whole}, which has resnest14; "),
        *((script, ["--ckpt_path", tmp_path / "nan.ckpt"], "fc.bias holds values that") for script in SCRIPTS),
        *((script, ["--ckpt_path", tmp_path / "mindcv.ckpt"], "such as mindcv's, have the") for script in SCRIPTS),
        ("eval", ["--ckpt_path", tmp_path / "size.ckpt"], "tells no usable image_size: large is not a multiple of 32"),
        ("eval", ["--ckpt_path", tmp_path / "place.ckpt"], "tells no usable predictions: it is "),
        ("eval", ["--ckpt_path", tmp_path / "none.mindir"], "no file"),
        ("eval", ["--ckpt_path", tmp_path / "odd.mindir"], "not a manifest"),
        ("train", ["--batch_size", "64"], "set --batch_size lower"),
        ("train", ["--ckpt_path", tmp_path / "five.ckpt"], "--finetune to start with a new classifier"),
        ("train", ["--ckpt_path", whole, "--num_classes", "5"], f"--num_classes 5 contradicts {whole}, which has 10; "),
        ("train", ["--ckpt_path", tmp_path / "letters.ckpt"], "label 0 is letter 0 in"),
        ("eval", ["--ckpt_path", tmp_path / "letters.ckpt"], "label 0 is letter 0 in"),
        ("train", ["--device_num", "2", "--rank_table_file", tmp_path / "no.json"], "rank table"),
        ("train", ["--resume", tmp_path / "none.ckpt"], "no checkpoint at"),
        ("export", ["--num_classes", "5"], f"--num_classes 5 contradicts {whole}, which has 10; "),
        ("export", ["--file_name", "my net"], "take letters, digits and"),
    ]
    if not ms.hal.is_available("GPU"):
        cases.append(("eval", ["--device_target", "GPU"], "no GPU that MindSpore can use"))
    if not ms.hal.is_available("Ascend"):
        cases.append(("export", ["--file_format", "AIR"], "Ascend"))
    for script, words, wanted in cases:
        flags = [*SAMPLE, "--output_dir", tmp_path / "out"]
        if script == "train":
            flags += ["--batch_size", "8", "--epochs", "1"]
        elif "--ckpt_path" not in words:
            flags += ["--ckpt_path", whole]
        if script != "export" and "--data_path" not in words:
            flags += ["--data_path", place / "digits"]
        line = one_line_error(command(script, *flags, *words))
        assert wanted in line, (script, words, line)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "command, words, wanted",
    [
        ("eval", [], "needs a checkpoint; give it with --ckpt_path"),
        ("eval", ["--ckpt_path", "a", "--pretrained", "b"], "one setting with two values"),
        ("eval", ["--ckpt_path", "a", "--image_size", "100"], "a multiple of 32"),
        ("eval", ["--ckpt_path", "a", "--batch_size", "0"], "too small for eval.py"),
        ("eval", ["--ckpt_path", "a", "--preprocess", "torch"], "invalid choice"),
        ("eval", ["--backbone", "resnest201"], "invalid choice"),
        ("eval", ["--device_id", "-1"], "-1 is not a whole number"),
        ("export", ["--num_workers", "2"], "unrecognized arguments"),
        ("train", ["--batch_size", "1"], "at least 2"),
        ("train", ["--warmup_epochs", "99"], "longer than --epochs"),
        ("train", ["--finetune"], "--finetune starts from a checkpoint"),
        ("train", ["--crop_scale", "0.5"], "--crop_scale takes two rising numbers"),
        ("train", ["--crop_scale", "0.5", "2"], "cannot be larger than the image"),
        ("train", ["--crop_ratio", "2", "1"], "--crop_ratio takes two rising numbers"),
        ("train", ["--lr", "fast"], "fast is not a number above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(command, words, wanted):
    with pytest.raises(UserError, match=re.escape(wanted)):
        load_config(command, "", words)


def test_keys_of_the_config_file_are_checked(tmp_path):
    text = (FOLDER / "config/resnest_sample_config.yaml").read_text()
    for old, new, wanted in (
        ("momentum:", "momentun:", "unknown key momentun; did you mean momentum?"),
        ("momentum: 0.9\n", "", "lacks the key momentum; copy it from config/resnest_imagenet_config.yaml"),
        ("momentum: 0.9", "momentum: much", "momentum: much is not a number from 0 to below 1"),
    ):
        assert old in text
        (tmp_path / "other.yaml").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=re.escape(wanted)):
            load_config("train", "", ["--config_path", str(tmp_path / "other.yaml")])


@pytest.mark.parametrize("backbone, crop, resize", [(50, 224, 256), (101, 256, 256), (200, 320, 320), (269, 416, 416)])
def test_sizes_are_those_of_the_document_unless_the_checkpoint_tells_or_they_are_given(backbone, crop, resize, capsys):
    words = ["--backbone", f"resnest{backbone}", "--ckpt_path", "x"]
    meant = f"resnest{backbone} is meant for a crop of {crop} out of {resize}"
    checkpoint = {"image_size": 64, "resize_size": 96}
    for more, told, sizes, warning in (
        ([], {}, (crop, resize), ""),
        ([], checkpoint, (64, 96), meant),
        (["--num_classes", "10"], checkpoint, (64, 96), ""),
        (["--image_size", str(2 * crop)], {}, (2 * crop, 2 * resize), meant),
        (["--image_size", str(2 * crop), "--num_classes", "10"], {}, (2 * crop, 2 * resize), ""),
    ):
        args = load_config("eval", "", [*words, *more])
        take_settings(args, "x", told)
        set_sizes(args)
        assert (args.image_size, args.resize_size, args.preprocess) == (*sizes, "documented")
        said = capsys.readouterr().err
        assert said.startswith(f"warning: {warning}") and said.count("\n") == 1 if warning else not said
    args = load_config("eval", "", [*words, "--image_size", "128"])
    with pytest.raises(UserError, match="--image_size 128 contradicts x, which has 64; "):
        take_settings(args, "x", checkpoint)
    args = load_config("eval", "", [*words, "--resize_size", "192"])
    with pytest.raises(
        UserError, match=re.escape(f"{meant}, set --resize_size and --image_size") if crop > 192 else ""
    ):
        set_sizes(args)
    args = load_config("export", "", words)
    assert (args.output_dir, args.batch_size) == (".", 1)


def test_both_configs_have_the_same_keys():
    one, two = (yaml.safe_load(path.read_text()) for path in sorted((FOLDER / "config").glob("*.yaml")))
    assert list(one) == list(two)


def test_help_explains_every_flag():
    for script in ("train", "eval", "export"):
        flags = {key for key, setting in SETTINGS.items() if script in setting.users}
        text = " ".join(run_script(f"{script}.py", "--help", cwd=FOLDER).stdout.split())
        assert flags | {"config_path", "pretrained"} <= set(re.findall(r" --([a-z0-9_]+)", text))
        assert text.count("(default: ") >= len(flags)
