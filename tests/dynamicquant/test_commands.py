"""eval.py and export.py, run as a user runs them; bad input and settings of all commands."""

import hashlib
import importlib.util
import json
import re
import shutil
import sys
import threading
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess

import mindspore as ms
import numpy as np
import pytest
import src.resnet as resnet
import yaml
from conftest import one_line_error
from dynamicquant import tiny
from dynamicquant.commands import (
    CLASSES,
    FOLDER,
    SAMPLE,
    SIZES,
    accuracy,
    checkpoint,
    command,
    digits,
    rows,
    run,
    training,
)
from golden.recipe import value
from mindspore import Tensor, nn
from PIL import Image
from src.checkpoints import save
from src.config import SETTINGS, complete, load_config
from src.inference import Front
from src.resnet import Architecture

from utils.cli import UserError
from utils.training import save_state


def prepared(paths) -> np.ndarray:
    """The evaluation of 32 pixels out of 32, in float64 until the end; float32 (N, 3, 32, 32)."""
    x = np.stack([Image.open(path).convert("RGB") for path in paths]) / 255
    x = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return x.transpose(0, 3, 1, 2).astype(np.float32)


def recipe(path: Path, architecture: Architecture, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Save the recipe's network, of which both heads have mean 0 over `images`, so that all answers occur.

    Returns its logits for `images`, (N, K), and the bits it chooses, (N,).
    """
    network = architecture.network().set_train(False)
    for parameter in network.get_parameters():
        array = value(parameter.name, parameter.shape)
        parameter.set_data(Tensor(array + np.float32(3) if parameter.name.endswith(".alpha") else array))
    choices = ()
    if architecture.decisions:
        scores = Front(network)(Tensor(images))[1].asnumpy()
        network.fc2.bias.set_data(Tensor(network.fc2.bias.asnumpy() - scores.mean(0).ravel()))
        choices = (np.eye(len(architecture.bits), dtype=np.float32)[(scores - scores.mean(0)).argmax(-1)],)
    logits = network(Tensor(images), *map(Tensor, choices)).asnumpy()
    network.fc.bias.set_data(Tensor(network.fc.bias.asnumpy() - logits.mean(0)))
    save(network, path, architecture, {"resize_size": 32, "classes": CLASSES})
    bits = np.array(architecture.bits)[choices[0][:, 0].argmax(-1)] if choices else np.full(len(images), 4)
    return logits - logits.mean(0), bits


@dataclass
class Place:
    """Checkpoints, the digits to evaluate them on, the logits and bits they should have there.

    form: of the commands (`small_network.py`), None for the real network.
    """

    folder: Path
    data: Path
    paths: list[Path]
    expected: dict[str, tuple[np.ndarray, np.ndarray]]
    form: str | None

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.ckpt"

    def evaluate(self, *flags, form: str = "eager") -> CompletedProcess:
        """eval.py on the digits and dynamic.ckpt, unless `flags` name others."""
        given = ["--output_dir", self.folder / "out"]
        given += [] if "--dataset_path" in flags else ["--data_path", self.data]
        given += [] if "--ckpt_path" in flags else ["--ckpt_path", self.path("dynamic")]
        return run(command("eval", self.form and form, *given, *flags))

    def export(self, *flags) -> CompletedProcess:
        return run(command("export", self.form, "--device_target", "CPU", *flags))


@pytest.fixture(scope="module", params=["small", pytest.param("whole", marks=pytest.mark.full)])
def place(request, tmp_path_factory):
    """With the small network, and with the real one."""
    small = request.param == "small"
    folder = tmp_path_factory.mktemp("dynamicquant") / "a place"
    folder.mkdir()
    data = digits(tmp_path_factory.getbasetemp())
    paths = sorted((data / "val").rglob("*.JPEG"))
    images = prepared(paths)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            for name, size in {**tiny.SIZES, "WIDTHS": tiny.WIDER}.items():
                patch.setattr(resnet, name, size)
        ms.set_context(mode=ms.PYNATIVE_MODE if small else ms.GRAPH_MODE)
        architectures = {
            "dynamic": Architecture(**SIZES),
            "fixed": Architecture("pact", 4, 1, **SIZES),
            "layer": Architecture(granularity="layer", **SIZES),
        }
        expected = {name: recipe(folder / f"{name}.ckpt", of, images) for name, of in architectures.items()}
        ms.set_context(mode=ms.GRAPH_MODE)
        assert len(set(expected["dynamic"][0].argmax(1))) > 3 and set(expected["dynamic"][1]) == {3, 4, 5}
        plain = Architecture("none", **SIZES)
        save(plain.network(), folder / "float.ckpt", plain, {"resize_size": 32, "classes": CLASSES})
        yield Place(folder, data, paths, expected, "plain" if small else None)


# ===== eval.py ===== #


def test_eval_reports_what_it_chose_what_came_of_it_and_what_it_cost(place):
    logits, bits = place.expected["dynamic"]
    labels = np.array([int(path.parent.name) for path in place.paths])
    predictions = place.folder / "p.csv"
    result = place.evaluate("--predictions", predictions, "--batch_size", "9", form="plain")
    assert result.returncode == 0 and not result.stderr, result.stderr
    found = rows(predictions)
    assert list(found[0]) == ["path", "label", "prediction", "bits"]
    assert [row["path"] for row in found] == [str(path) for path in place.paths]
    assert [int(row["label"]) for row in found] == labels.tolist()
    assert [int(row["bits"]) for row in found] == bits.tolist()
    predicted = np.array([int(row["prediction"]) for row in found])
    # A value on a rounding edge may fall on its other side in another batch.
    assert (predicted == logits.argmax(1)).sum() >= 38
    hits = predicted == labels
    assert accuracy(result.stdout, place.path("dynamic")) == round(hits.mean(), 4)

    report = json.loads((place.folder / "out/results.json").read_text())
    assert (report["acc"], report["images"], report["left_out"]) == (hits.mean(), 40, 0)
    loss = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - logits[range(40), labels]
    assert report["loss"] == pytest.approx(loss.mean(), rel=1e-2)
    top5 = [label in row for label, row in zip(labels, np.argsort(-logits, 1)[:, :5])]
    assert report["top5"] == pytest.approx(np.mean(top5), abs=0.051)
    assert report["mean_bits"] == pytest.approx(bits.mean())
    fixed, chosen = Architecture(**SIZES).gmacs()
    assert report["mean_bit_gflops"] == pytest.approx(fixed * 16 + chosen[0] * (bits**2).mean())
    assert report["fixed_bit_gflops"] == {str(k): pytest.approx((fixed + chosen[0]) * k**2) for k in (4, 8)}
    for row in report["bits"]:
        own = bits == row["bits"]
        assert row["chosen"] == [own.sum()] and row["top1"] == pytest.approx(hits[own].mean())
        line = rf"^ +{row['bits']} +{own.sum()} +{100 * own.mean():.1f}% +{hits[own].mean():.4f}$"
        assert re.search(line, result.stdout, re.M), (line, result.stdout)
    assert re.search(rf"^ all +40 +100\.0% +{hits.mean():.4f}, top-5 {report['top5']:.4f}$", result.stdout, re.M)
    assert f"mean bits {bits.mean():.3f}" in result.stdout
    shares = [f"{report['mean_bit_gflops'] / report['fixed_bit_gflops'][str(k)]:.1%} of fixed {k} bits" for k in (4, 8)]
    assert f"mean bit-FLOPs {report['mean_bit_gflops']:.3f} G: {', '.join(shares)}" in result.stdout


def test_sampling_repeats_itself_and_takes_the_split_or_its_parent(place, tmp_path):
    words = ["--sample_gumbel", "--output_dir", tmp_path]
    splits = (["--dataset_path", place.data / "val"], ["--dataset_path", place.data, "--data_path", place.data])
    results = [place.evaluate(*words, *split, "--predictions", tmp_path / f"{k}.csv") for k, split in enumerate(splits)]
    assert all(result.returncode == 0 for result in results), [result.stderr for result in results]
    one, two = (rows(tmp_path / f"{k}.csv") for k in (0, 1))
    assert one == two
    sampled = np.array([int(row["bits"]) for row in one])
    assert set(sampled) == {3, 4, 5} and (sampled != place.expected["dynamic"][1]).any()


def test_forced_bits_with_a_downloaded_checkpoint_and_a_corrupt_image(place, tmp_path):
    shutil.copytree(place.data, tmp_path / "data")
    broken = tmp_path / "data/val/3/a_broken.JPEG"
    broken.write_bytes(b"\xff\xd8 no image")
    handler = partial(SimpleHTTPRequestHandler, directory=str(place.folder))
    handler.log_message = lambda *words: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = ["--download", "--ckpt_url", f"http://127.0.0.1:{server.server_port}/dynamic.ckpt"]
        words += ["--ckpt_path", tmp_path / "got/net.ckpt", "--data_path", tmp_path / "data", "--output_dir", tmp_path]
        result = place.evaluate(*words, "--resize_size", "36", "--force_bits", "7", "--predictions", tmp_path / "p.csv")
        server.shutdown()
    assert result.returncode == 0, result.stderr
    assert f"sha256 {hashlib.sha256(place.path('dynamic').read_bytes()).hexdigest()}" in result.stdout
    assert f"warning: {broken} cannot be read as an image; going on without it" in result.stderr
    assert "1 of 41 images could not be read and were left out" in result.stdout
    accuracy(result.stdout, tmp_path / "got/net.ckpt")
    found = rows(tmp_path / "p.csv")
    assert len(found) == 40 and {row["bits"] for row in found} == {"7"}
    report = json.loads((tmp_path / "results.json").read_text())
    fixed, chosen = Architecture(**SIZES).gmacs()
    assert report["mean_bits"] == 7 and report["left_out"] == 1
    assert report["mean_bit_gflops"] == pytest.approx(fixed * 16 + chosen[0] * 49)
    strict = place.evaluate("--data_path", tmp_path / "data", "--strict", "--output_dir", tmp_path)
    assert f"{broken} cannot be read as an image" in one_line_error(strict)


# ===== export.py ===== #


@pytest.mark.parametrize("name, batch_size", [("dynamic", 0), pytest.param("fixed", 1, marks=pytest.mark.full)])
def test_the_exported_parts_chained_by_the_manifest_predict_the_same(place, tmp_path, name, batch_size):
    """Another program: MINDIR files and JSON alone, nothing of the project."""
    words = ["--ckpt_path", place.path(name), "--batch_size", batch_size]
    words += ["--resize_size", "36"] if name == "dynamic" else []  # else that of the checkpoint
    result = place.export(*words, "--output_dir", tmp_path / "an export")
    assert result.returncode == 0, result.stderr
    bits = (3, 4, 5) if name == "dynamic" else (4,)
    assert result.stdout.count("differs from the live network by at most") == 1 + len(bits)
    manifest = json.loads((tmp_path / "an export/resnet18_dq.json").read_text())
    parts = [manifest["front"], *manifest["backs"]]
    written = {path.name for path in (tmp_path / "an export").iterdir()}
    assert written == {"resnet18_dq.json", *(part["file"] for part in parts)}
    assert [back["bits"] for back in manifest["backs"]] == list(bits)
    assert manifest["input"]["shape"] == [batch_size, 3, 32, 32] and manifest["class_names"] == list(CLASSES)
    assert manifest["front"]["outputs"][0]["shape"] == [batch_size, 64, 8, 8]

    # One byte for each quantized weight, four for everything else, and little (names, places in the source) around it.
    arrays = checkpoint(place.path(name))
    for part in parts:
        beginnings = (
            ("layer2", "layer3", "layer4", "fc.") if "bits" in part else ("conv1", "bn1", "layer1", "fc1", "fc2")
        )
        own = {key: array for key, array in arrays.items() if key.startswith(beginnings)}
        assert part["float32_bytes"] == 4 * sum(array.size for array in own.values())
        stored = sum(array.size * (1 if key[:5] == "layer" and array.ndim == 4 else 4) for key, array in own.items())
        size = (tmp_path / "an export" / part["file"]).stat().st_size
        assert part["bytes"] == size and 0 <= size - stored < 300_000, part
        assert f"{size:,}" in result.stdout

    steps = manifest["preprocess"]
    # The digits have 32 pixels.
    assert (steps["resize_shorter_side"], steps["center_crop"]) == (36 if name == "dynamic" else 32, 32)
    x = [np.asarray(Image.open(path).convert("RGB")) / steps["divide_by"] for path in place.paths]
    x = ((np.stack(x) - steps["mean"]) / steps["std"]).transpose(0, 3, 1, 2).astype(np.float32)
    front, *backs = (nn.GraphCell(ms.load(str(tmp_path / "an export" / part["file"]))) for part in parts)
    logits, chosen = [], []
    for image in x:
        out = front(Tensor(image[None]))
        features, scores = out if name == "dynamic" else (out, None)
        choice = 0 if scores is None else int(scores.asnumpy().argmax())
        logits.append(backs[choice](features).asnumpy()[0])
        chosen.append(bits[choice])
    wanted, wanted_bits = place.expected[name]
    assert chosen == wanted_bits.tolist()
    # A value on a rounding edge may fall on its other side in another batch.
    error = np.linalg.norm(np.stack(logits) - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert np.median(error) < 1e-5 and error.max() < 0.2, error
    if place.form is None or name == "fixed":  # the test of the report has compared them with the small network's
        words = ["--ckpt_path", place.path(name), "--predictions", tmp_path / "p.csv", "--output_dir", tmp_path]
        assert place.evaluate(*words, "--batch_size", "1", form="plain").returncode == 0
        live = [int(row["prediction"]) for row in rows(tmp_path / "p.csv")]
        assert [int(row.argmax()) for row in logits] == live


def test_one_decision_a_layer_is_evaluated_and_not_exported(place, tmp_path):
    logits, _ = place.expected["layer"]
    words = ["--ckpt_path", place.path("layer"), "--output_dir", tmp_path, "--predictions", tmp_path / "p.csv"]
    result = place.evaluate(*words, "--batch_size", "40")
    assert result.returncode == 0, result.stderr
    found = rows(tmp_path / "p.csv")
    assert list(found[0]) == ["path", "label", "prediction"]
    # A value on a rounding edge may fall on its other side in another batch.
    assert (np.array([int(row["prediction"]) for row in found]) == logits.argmax(1)).sum() >= 36
    decisions = Architecture(granularity="layer", **SIZES).decisions
    report = json.loads((tmp_path / "results.json").read_text())
    assert np.sum([row["chosen"] for row in report["bits"]], 0).tolist() == [40] * decisions
    refused = place.export("--ckpt_path", place.path("layer"), "--output_dir", tmp_path / "x")
    assert "chooses the bits of every layer by itself" in one_line_error(refused)
    assert not (tmp_path / "x").exists()


# ===== Bad input ===== #


def main_of(script: str) -> Callable:
    """The script's `main`; its errors are those that a command ends with (the test below) in one line."""
    spec = importlib.util.spec_from_file_location(f"dynamicquant_{script}", FOLDER / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_bad_input_is_refused(place, tmp_path, monkeypatch):
    """Each row: script, flags that are wrong, and what the error must speak of."""
    dynamic = place.path("dynamic")
    (tmp_path / "truncated.ckpt").write_bytes(dynamic.read_bytes()[:100000])
    config = (FOLDER / "config/resnet18_sample_config.yaml").read_text()
    (tmp_path / "typo.yaml").write_text(config.replace("penalty:", "penalti:"))
    (tmp_path / "file").write_text("")
    for digit in "01":
        for split in ("train", "val"):
            shutil.copytree(place.data / split / digit, tmp_path / "two" / split / digit)
    two, new_head = ["--data_path", tmp_path / "two"], "add --finetune to start with a new classifier"
    at_four = ["--finetune", "--num_classes", "2", *two, "--ckpt_path", dynamic]
    state = tmp_path / "resume.ckpt"
    network = {"quant": "pact", "target_bits": 3, "num_bits": 3, "granularity": "image", "num_classes": 10}
    position = {"epoch": 0, "step": 0, "totals": {}, "rows": [], "best": None, "kept": {}}
    save_state(state, [nn.Dense(2, 2)], network, position)
    (tmp_path / "other").mkdir()
    for split in ("train", "val"):
        shutil.copytree(place.data / split, tmp_path / "other" / split)
        (tmp_path / "other" / split / "9").rename(tmp_path / "other" / split / "90")
    cases = [
        ("eval", ["--ckpt_path", place.path("float")], "is a float ResNet-18: it has no controller"),
        ("eval", ["--ckpt_path", tmp_path / "truncated.ckpt"], "truncated"),
        ("eval", ["--ckpt_path", tmp_path / "none.ckpt"], "no checkpoint at"),
        ("eval", ["--ckpt_path", state], "looks like another network"),
        ("eval", ["--ckpt_path", place.path("fixed"), "--sample_gumbel"], "has fixed bits, there is nothing to sample"),
        ("eval", ["--data_path", tmp_path / "none"], "no folder"),
        ("eval", two, "has 2 classes, not 10; give a checkpoint of 2 classes"),
        ("eval", ["--data_path", tmp_path / "other"], f"label 9 is 9 in {dynamic} and 90 in the images"),
        ("eval", ["--resize_size", "28"], "a crop of 32 pixels does not fit into --resize_size 28; set it higher"),
        ("eval", ["--output_dir", tmp_path / "file/x"], "cannot write to"),
        ("eval", ["--config_path", tmp_path / "typo.yaml"], "penalti; did you mean penalty?"),
        ("float", ["--ckpt_path", tmp_path / "none.ckpt"], "no checkpoint at"),
        ("float", ["--batch_size", "41"], "40 training images do not fill one step of 41; set --batch_size lower"),
        ("float", ["--ckpt_path", "none", *two], "has 2 classes, not 10; set --num_classes 2"),
        # What the checkpoint tells.
        ("quantize", ["--ckpt_path", dynamic, *two], f"not 10; {new_head} for --num_classes 2"),
        ("float", ["--ckpt_path", place.path("float"), "--data_path", tmp_path / "other"], f"images; {new_head}"),
        (
            "quantize",
            ["--ckpt_path", dynamic, "--num_classes", "2", *two],
            f"--num_classes 2 contradicts {dynamic}, which has 10; leave it out, or, for other classes, {new_head}",
        ),
        ("quantize", [*at_four, "--target_bits", "5"], f"--target_bits 5 contradicts {dynamic}, which has 4; leave it"),
        ("quantize", [*at_four, "--quant", "pact"], f"--quant pact contradicts {dynamic}, which has dorefa; leave"),
        ("quantize", [*at_four, "--num_bits", "1"], f"--num_bits 1 contradicts {dynamic}, which has 3; leave it out"),
        ("quantize", [*at_four, "--granularity", "layer"], f"contradicts {dynamic}, which has image; leave it out"),
        ("quantize", ["--resume", state, "--target_bits", "4"], f"--target_bits 4 contradicts {state}, which has 3"),
        ("quantize", ["--resume", state, "--num_classes", "2"], f"--num_classes 2 contradicts {state}, which has 10"),
        ("quantize", ["--resume", dynamic], f"{dynamic} is no training state; --resume takes the resume.ckpt"),
        ("quantize", ["--resume", tmp_path / "none.ckpt"], "no checkpoint at"),
        # Settings that fit those of the checkpoint only in part.
        ("quantize", ["--resume", state, "--even_epochs", "1"], "--even_epochs 1 leaves none of --epochs 1"),
        ("export", ["--ckpt_path", place.path("float")], "is a float ResNet-18; train a quantized one"),
        ("export", ["--ckpt_path", dynamic, "--output_dir", tmp_path / "file/x"], "cannot write to"),
        ("export", ["--ckpt_path", dynamic, "--resize_size", "28"], "a crop of 32 pixels does not fit"),
    ]
    if not ms.hal.is_available("GPU"):
        words = ["--ckpt_path", dynamic, "--device_target", "GPU"]
        cases.append(("export", words, "no GPU that MindSpore can use"))
    if not ms.hal.is_available("Ascend"):
        words = ["--ckpt_path", dynamic, "--file_format", "AIR"]
        cases.append(("export", words, "AIR files can be exported on Ascend only"))
    monkeypatch.chdir(FOLDER)
    for script, words, wanted in cases:
        flags = [*SAMPLE, "--output_dir", tmp_path / "out", "--device_target", "CPU", *words]
        if script == "eval":
            flags += [] if "--data_path" in words else ["--data_path", place.data]
            flags += [] if "--ckpt_path" in words else ["--ckpt_path", dynamic]
        elif script != "export":
            script, flags = "train", training(script, None, place.data, tmp_path / "out", *words)[1:]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        with pytest.raises(UserError, match=re.escape(wanted)):
            main_of(script)()
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_commands_that_fail_end_with_one_line(place, tmp_path):
    """Whatever the script, before and after the device and the reading processes have started."""
    output, none = tmp_path / "out", tmp_path / "none.ckpt"
    train = partial(training, form=place.form, data=place.data, output=output)
    results = {
        "no checkpoint at": place.evaluate("--ckpt_path", none, "--output_dir", output),
        f"no checkpoint at {none}": place.export("--ckpt_path", none, "--output_dir", output),
        "is no training state": run([*train("quantize"), "--resume", place.path("dynamic")]),
        "is quantized with pact, the network dorefa": run([*train("quantize"), "--ckpt_path", place.path("fixed")]),
        "start from a float checkpoint": run([*train("float"), "--ckpt_path", place.path("dynamic")]),
    }
    if not ms.hal.is_available("GPU"):
        no_gpu = place.evaluate("--device_target", "GPU", "--output_dir", output)
        results["no GPU that MindSpore can use"] = no_gpu
    for wanted, result in results.items():
        assert wanted in one_line_error(result)
    assert not output.exists() or not any(output.iterdir())


@pytest.mark.parametrize(
    "user, words, wanted",
    [
        ("eval", ["--ckpt_path", "none"], "needs a checkpoint; give it with --ckpt_path"),
        ("eval", ["--ckpt_path", "a", "--pretrained", "b"], "one setting with two values"),
        ("eval", ["--data_path", "a", "--dataset_path", "b"], "one setting with two values"),
        ("eval", ["--force_bits", "0"], "0 is not a whole number from 1 to 8"),
        ("eval", ["--force_bits", "9"], "9 is not a whole number from 1 to 8"),
        ("eval", ["--force_bits", "3", "--sample_gumbel"], "nothing to sample"),
        ("eval", ["--batch_size", "0"], "too small for eval.py"),
        ("eval", ["--image_size", "32"], "unrecognized arguments"),
        ("export", ["--num_workers", "2"], "unrecognized arguments"),
        ("export", ["--file_format", "ONNX"], "invalid choice"),
        ("float", ["--target_bits", "3"], "unrecognized arguments"),
        ("float", ["--batch_size", "1"], "at least 2"),
        ("float", ["--image_size", "30"], "30 is not a multiple of 4 from 28 up"),
        ("float", ["--image_size", "24"], "24 is not a multiple of 4 from 28 up"),
        ("float", ["--image_size", "64", "--resize_size", "32"], "a crop of 64 pixels does not fit"),
        ("float", ["--lr_steps", "30", "20"], "--lr_steps takes rising epochs"),
        ("float", ["--crop_ratio", "2", "1"], "--crop_ratio takes two rising numbers"),
        ("float", ["--crop_scale", "0.5", "2"], "cannot be larger than the image"),
        ("float", ["--warmup_epochs", "200"], "longer than --epochs"),
        ("quantize", ["--even_epochs", "110"], "leaves none of --epochs 110 to the controller"),
        ("float", ["--finetune"], "--finetune starts from a checkpoint"),
        ("quantize", ["--target_bits", "1"], "--target_bits 1 --num_bits 3: 3 bit-widths around 1 are 0 to 2"),
        ("quantize", ["--target_bits", "9"], "9 is not a whole number from 1 to 8"),
        ("quantize", ["--target_bits", "8"], "7 to 9, outside of 1 to 8"),
        ("quantize", ["--num_bits", "2"], "2 is not an odd whole number"),
        ("quantize", ["--quant", "none"], "invalid choice"),
        ("quantize", ["--temperature", "0"], "0 is not a number above 0"),
        ("quantize", ["--bit_budget", "few"], "few is not a number above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(user, words, wanted):
    stage = [] if user in ("eval", "export") else ["--stage", user]
    with pytest.raises(UserError, match=re.escape(wanted)):
        args = load_config("train" if stage else user, "", [*stage, *words])
        complete(args)


# ===== Settings ===== #


def training_settings(*flags) -> Namespace:
    args = load_config("train", "", ["--stage", *flags])
    complete(args)
    return args


def test_the_budget_is_the_target_unless_given():
    assert training_settings("quantize", "--target_bits", "5").bit_budget == 5
    assert training_settings("quantize", "--bit_budget", "3.5").bit_budget == 3.5
    assert training_settings("quantize", "--image_size", "112").resize_size == 128
    assert training_settings("float").resize_size == 256


def test_both_configs_have_every_key_and_the_recipe_is_the_papers():
    published, sample = (
        yaml.safe_load((FOLDER / f"config/resnet18_{name}_config.yaml").read_text()) for name in ("imagenet", "sample")
    )
    assert list(published) == list(sample) and set(sample) == set(SETTINGS)
    args = training_settings("quantize")
    assert (args.epochs, args.batch_size, args.lr, args.momentum, args.weight_decay) == (110, 256, 0.1, 0.9, 1e-4)
    assert (args.lr_steps, args.lr_gamma, args.warmup_epochs, args.penalty) == ([30, 60, 85, 95], 0.1, 5, 0.05)
    assert (args.quant, args.target_bits, args.num_bits, args.granularity) == ("dorefa", 4, 3, "image")
    assert (args.image_size, args.resize_size, args.flip, args.color_jitter) == (224, 256, 0.5, 0.4)
    assert (args.dropout, training_settings("float").dropout) == (0.2, 0)  # torchvision's, to start from, has none
    args = load_config("eval", "", [])
    assert (args.ckpt_path, args.data_path, args.device_target) == ("./resnet18_dq.ckpt", "./data/imagenet", "auto")


def test_help_explains_every_key(capsys):
    documented = set()
    for words in (["eval"], ["export"], ["train", "--stage", "float"], ["train", "--stage", "quantize"]):
        with pytest.raises(SystemExit) as left:
            load_config(words[0], "", [*words[1:], "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert not left.value.code
        flags = set(re.findall(r" --([a-z0-9_]+)", text))
        for flag in (
            "config_path",
            "device_target",
            "device_id",
            "batch_size",
            "output_dir",
            "ckpt_path",
            "pretrained",
        ):
            assert flag in flags
        documented |= flags
    assert set(SETTINGS) <= documented and "dataset_path" in documented
    assert "num_workers" not in SETTINGS or "export" not in SETTINGS["num_workers"].users
