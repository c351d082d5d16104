"""eval.py, train.py, export.py and show.py, run as a user runs them, with good and with bad input."""

import csv
import json
import os
import re

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT, one_line_error, run_script, stop_training
from golden.recipe import value
from mindspore import Tensor, nn
from PIL import Image

FOLDER = ROOT / "DRNet"
SMALL = ["--config_path", "config/resnet50_digits_config.yaml", "--resolutions", "32", "16"]


def save(path, names, classes=10, skip=()):
    """A checkpoint with the published names, weights from the recipe; two candidates and `classes` classes."""
    rows = []
    for name, shape in json.loads((ROOT / "tests" / "golden" / f"drnet_{names}.json").read_text()):
        if "bn_2" in name:
            continue
        if name.startswith("end_point"):
            shape = [classes if names == "classifier" else 2, *shape[1:]]
        rows.append({"name": name, "data": Tensor(value(name, shape))})
    ms.save_checkpoint(rows, str(path))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a space in its name, a sample of the digits and untrained checkpoints."""
    place = tmp_path_factory.mktemp("drnet") / "a place"
    place.mkdir()
    run_script(ROOT / "utils/sample_imagenet.py", "--output", place / "digits", "--images", "4", cwd=place)
    save(place / "classifier_net.ckpt", "classifier")
    save(place / "predictor_net.ckpt", "predictor")
    return place


@pytest.fixture(scope="module")
def usual(place):
    """The flags with which eval.py and export.py use `place`."""
    return [
        *SMALL,
        "--classifier_ckpt",
        place / "classifier_net.ckpt",
        "--predictor_ckpt",
        place / "predictor_net.ckpt",
    ]


def evaluate(place, usual, *words, **options):
    return run_script(
        "eval.py", *usual, "--data_path", place / "digits", "--output_dir", place / "out", *words, cwd=FOLDER, **options
    )


def test_eval_reports_predicts_and_survives_a_corrupt_file(place, usual):
    broken = place / "digits" / "val" / "3" / "a_broken.JPEG"
    broken.write_bytes(b"\xff\xd8 no image")
    try:
        result = evaluate(place, usual, "--predictions", place / "p.csv", "--batch_size", "7")
        strict = evaluate(place, usual, "--strict")
    finally:
        broken.unlink()
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == f"warning: {broken} cannot be read as an image; going on without it"
    assert "1 of 41 images could not be read and were left out" in result.stdout
    checkpoints = f"{place}/classifier_net.ckpt {place}/predictor_net.ckpt"
    acc = re.search(r"^result: \{'acc': (\d+(\.\d{1,3})?)\} ckpt= (.*)$", result.stdout, re.M)
    assert acc and acc[3] == checkpoints
    rows = list(csv.DictReader((place / "p.csv").open()))
    assert list(rows[0]) == ["path", "label", "prediction", "resolution"] and len(rows) == 40
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    hits = sum(row["label"] == row["prediction"] for row in rows)
    assert float(acc[1]) == pytest.approx(100 * hits / 40, abs=1e-3)
    report = json.loads((place / "out" / "results.json").read_text())
    assert report["acc"] == pytest.approx(float(acc[1])) and report["images"] == 40 and report["left_out"] == 1
    counts = {str(row["resolution"]): row["images"] for row in report["resolutions"]}
    assert counts == {size: sum(row["resolution"] == size for row in rows) for size in ("32", "16")}
    assert "error: " in one_line_error(strict) and str(broken) in strict.stderr


def test_forced_and_sampled_resolutions(place, usual):
    forced = evaluate(place, usual, "--force_resolution", "16", "--predictions", place / "forced.csv")
    assert forced.returncode == 0, forced.stderr
    assert {row["resolution"] for row in csv.DictReader((place / "forced.csv").open())} == {"16"}
    assert re.search(r"mean GMACs 0\.03\d \(predictor 0\.000 included\)", forced.stdout)
    sampled = evaluate(place, usual, "--sample_gumbel", "--predictions", place / "sampled.csv")
    assert sampled.returncode == 0, sampled.stderr
    assert {row["resolution"] for row in csv.DictReader((place / "sampled.csv").open())} == {"32", "16"}


def test_download_fetches_and_checks(place, usual, tmp_path):
    import hashlib

    words = []
    for name in ("classifier", "predictor"):
        source = place / f"{name}_net.ckpt"
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        words += [f"--{name}_url", source.as_uri(), f"--{name}_sha256", digest]
        words += [f"--{name}_ckpt", tmp_path / "got" / f"{name}_net.ckpt"]
    result = evaluate(place, usual, "--download", *words)
    assert result.returncode == 0, result.stderr
    assert f"ckpt= {tmp_path}/got/classifier_net.ckpt" in result.stdout
    words[3] = "0" * 64
    words[5] = tmp_path / "other.ckpt"
    one_line_error(evaluate(place, usual, "--download", *words))


def test_bad_input_ends_with_one_line(place, usual, tmp_path):
    """Each row: what is wrong, the flags that make it so, and what the error must speak of."""
    (tmp_path / "truncated.ckpt").write_bytes((place / "predictor_net.ckpt").read_bytes()[:100000])
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    save(tmp_path / "five.ckpt", "classifier", classes=5)
    config = (FOLDER / "config" / "resnet50_digits_config.yaml").read_text()
    (tmp_path / "typo.yaml").write_text(config.replace("flip:", "flipp:"))
    (tmp_path / "value.yaml").write_text(config.replace("num_classes: 10", "num_classes: ten"))
    (tmp_path / "short.yaml").write_text(config.replace("num_classes: 10", ""))
    (tmp_path / "broken.yaml").write_text("a: [1,\nb: }")
    (tmp_path / "data" / "val" / "0").mkdir(parents=True)
    rows = [
        (["--data_path", tmp_path / "none"], "no folder"),
        (["--data_path", tmp_path / "data"], "holds no images"),
        (["--num_classes", "1000"], "set --num_classes 10"),
        (["--classifier_ckpt", tmp_path / "none.ckpt"], "no checkpoint at"),
        (["--classifier_ckpt", place / "predictor_net.ckpt"], "looks like a DRNet predictor"),
        (["--predictor_ckpt", place / "classifier_net.ckpt"], "looks like a DRNet classifier"),
        (["--predictor_ckpt", tmp_path / "truncated.ckpt"], "truncated"),
        (["--predictor_ckpt", tmp_path / "junk.ckpt"], "cannot be read"),
        (["--classifier_ckpt", tmp_path / "five.ckpt"], "set --num_classes to the file's"),
        (["--resolutions", "32", "24", "16"], "bn_2"),
        (["--resolutions", "16", "32"], "32 16"),
        (["--force_resolution", "24"], "none of --resolutions 32 16"),
        (["--batch_size", "0"], "--batch_size"),
        (["--batch_size", "many"], "many is not a whole number from 0"),
        (["--no_such_flag"], "unrecognized arguments"),
        (["--config_path", tmp_path / "typo.yaml"], "flipp; did you mean flip?"),
        (["--config_path", tmp_path / "value.yaml"], "num_classes: ten is not a whole number from 1"),
        (["--config_path", tmp_path / "short.yaml"], "lacks the key num_classes"),
        (["--config_path", tmp_path / "broken.yaml"], "not valid YAML"),
        (["--config_path", tmp_path / "none.yaml"], "cannot read the config"),
        (["--output_dir", place / "predictor_net.ckpt" / "x", "--force_resolution", "16"], "cannot write"),
    ]
    if not ms.hal.is_available("Ascend"):
        rows.append((["--device_target", "Ascend"], "no Ascend"))
    for words, wanted in rows:
        line = one_line_error(evaluate(place, usual, *words))
        assert wanted in line, (words, line)


def test_help_names_every_flag_and_default():
    for script in ("eval.py", "export.py", "train.py"):
        result = run_script(script, "--help", cwd=FOLDER)
        assert result.returncode == 0, result.stderr
        text = " ".join(result.stdout.split())
        assert text.count("(default: ") == len(set(re.findall(r" --[a-z0-9_]+", result.stdout))) - 1 - (
            script == "train.py"
        )
        for flag in ("--config_path", "--device_target", "--device_id", "--batch_size", "--output_dir"):
            assert flag in text
    assert "--num_workers" not in run_script("export.py", "--help", cwd=FOLDER).stdout


@pytest.mark.parametrize("batch_size", [0, 2])
def test_export_can_be_rebuilt_from_its_manifest(place, usual, tmp_path, batch_size):
    """Another program: MINDIR files and JSON alone, nothing of the project."""
    words = ["--batch_size", batch_size, "--output_dir", tmp_path / "export ed"]
    result = run_script("export.py", *usual, *words, cwd=FOLDER)
    assert result.returncode == 0, result.stderr
    predictions = tmp_path / "p.csv"
    assert evaluate(place, usual, "--predictions", predictions, "--batch_size", "5").returncode == 0
    manifest = json.loads((tmp_path / "export ed" / "drnet.json").read_text())
    assert manifest["input"]["shape"] == [batch_size, 3, 32, 32]

    def network(entry):
        return nn.GraphCell(ms.load(str(tmp_path / "export ed" / entry["file"])))

    predictor, classifiers = network(manifest["predictor"]), [network(entry) for entry in manifest["classifiers"]]
    steps = manifest["preprocess"]
    rows = list(csv.DictReader(predictions.open()))[:: 7 if batch_size else 3]
    for row in rows:
        image = Image.open(row["path"]).convert("RGB")
        side = steps["resize_shorter_side"]
        assert image.size == (side, side) and steps["center_crop"] == side
        x = (np.asarray(image, np.float32) / steps["divide_by"] - steps["mean"]) / steps["std"]
        x = Tensor(np.stack([x.transpose(2, 0, 1).astype(np.float32)] * (batch_size or 1)))
        choice = int(predictor(x).asnumpy()[0].argmax())
        assert str(manifest["classifiers"][choice]["resolution"]) == row["resolution"]
        assert int(classifiers[choice](x).asnumpy()[0].argmax()) == int(row["prediction"])


def test_export_refuses_what_it_cannot_do(usual, tmp_path):
    (tmp_path / "file").write_text("")
    result = run_script("export.py", *usual, "--output_dir", tmp_path / "file/x", cwd=FOLDER)
    assert "cannot write to" in one_line_error(result)
    if not ms.hal.is_available("Ascend"):
        result = run_script("export.py", *usual, "--file_format", "AIR", "--output_dir", tmp_path / "e", cwd=FOLDER)
        assert "Ascend" in one_line_error(result)
    assert not (tmp_path / "e").exists()


def train(place, output, *words):
    return [
        *("train.py", "--stage", "finetune", *SMALL, "--data_path", place / "digits", "--output_dir", output),
        *("--classifier_ckpt", place / "classifier_net.ckpt", "--batch_size", "8", "--epochs", "2", *words),
    ]


def checkpoint(path):
    return {name: p.asnumpy() for name, p in ms.load_checkpoint(str(path)).items() if isinstance(p, ms.Parameter)}


def test_interrupted_training_resumes_to_the_same_weights(place, tmp_path):
    """Ctrl-C in the middle of the first epoch, then --resume; augmentation and Gumbel noise are on."""
    straight = run_script(*train(place, tmp_path / "straight"), cwd=FOLDER)
    assert straight.returncode == 0, straight.stderr
    # While the first step compiles the handler is installed and the step is held: the stop comes at its end.
    output = stop_training(train(place, tmp_path / "resumed"), "GMACs", 8, FOLDER)
    assert re.search(r"stopped after step [1-4] of epoch 1; go on with --resume (.*)", output), output
    state = tmp_path / "resumed" / "resume.ckpt"

    other = run_script(*train(place, tmp_path / "x", "--resume", state, "--seed", "5"), cwd=FOLDER)
    assert "seed 0 (now 5)" in one_line_error(other)
    swapped = run_script(*train(place, tmp_path / "x", "--resume", place / "predictor_net.ckpt"), cwd=FOLDER)
    assert "no training state" in one_line_error(swapped)

    resumed = run_script(*train(place, tmp_path / "resumed", "--resume", state), cwd=FOLDER)
    assert resumed.returncode == 0, resumed.stderr
    one, two = (list(csv.DictReader((tmp_path / run / "metrics.csv").open())) for run in ("straight", "resumed"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=1e-5)
        assert a["images_32"] == b["images_32"] and a["top1"] == b["top1"]
    for name in ("classifier_net.ckpt", "predictor_net.ckpt", "resume.ckpt"):
        one, two = checkpoint(tmp_path / "straight" / name), checkpoint(tmp_path / "resumed" / name)
        assert set(one) == set(two)
        for key in one:
            np.testing.assert_allclose(one[key], two[key], atol=1e-5, err_msg=key)
    record = json.loads(ms.load_checkpoint(str(tmp_path / "straight" / "classifier_net.ckpt"))["drnet"])
    # The published-style checkpoint it started from uses set 0 for the shortcuts, and so does what came of it.
    assert record == {
        "resolutions": [32, 16],
        "predictor_size": 16,
        "image_size": 32,
        "num_classes": 10,
        "shortcut_bn": "published",
    }
    words = ["--classifier_ckpt", tmp_path / "straight" / "classifier_net.ckpt"]
    words += ["--predictor_ckpt", tmp_path / "straight" / "predictor_net.ckpt"]
    assert evaluate(place, SMALL, *words).returncode == 0
    wrong = evaluate(place, SMALL, *words, "--predictor_size", "24")
    assert "--predictor_size 16" in one_line_error(wrong)


@pytest.mark.parametrize("command", ["pretrain"])
def test_training_on_two_workers(place, tmp_path, command):
    """Through msrun: both stages share the step, so the short one is run; the other is tested in test_trainer.py."""
    words = ["train.py", "--stage", command, *SMALL, "--data_path", place / "digits", "--output_dir", tmp_path / "o ut"]
    words += ["--batch_size", "8", "--epochs", "1", "--device_num", "2", "--device_target", "CPU"]
    result = run_script(*words, cwd=FOLDER)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "CPU x 2, 40 training and 40 validation images" in result.stdout
    assert "[INFO]" not in result.stdout
    (row,) = csv.DictReader((tmp_path / "o ut" / "metrics.csv").open())
    assert int(row["images_32"]) == int(row["images_16"]) == 40
    assert (tmp_path / "o ut" / "classifier_net.ckpt").is_file()


def test_own_classes_with_a_new_head_and_a_corrupt_image(place, tmp_path):
    words = ["--output", tmp_path / "five", "--images", "4", "--classes", "5"]
    assert run_script(ROOT / "utils/sample_imagenet.py", *words, cwd=tmp_path).returncode == 0
    broken = sorted((tmp_path / "five" / "train" / "2").iterdir())[0]
    broken.write_bytes(b"no image")
    own = ["--data_path", tmp_path / "five", "--num_classes", "5", "--epochs", "1"]
    refused = run_script(*train(place, tmp_path / "o", *own), cwd=FOLDER)
    assert "train with --new_head for other classes" in one_line_error(refused)
    result = run_script(*train(place, tmp_path / "o", *own, "--new_head"), cwd=FOLDER)
    assert result.returncode == 0, result.stderr
    assert "trained from nothing: end_point.weight, end_point.bias" in result.stdout
    assert result.stderr.strip() == f"warning: {broken} cannot be read as an image; going on without it"
    assert "1 training images could not be read" in result.stdout
    assert checkpoint(tmp_path / "o" / "classifier_net.ckpt")["end_point.weight"].shape == (5, 2048)


def test_training_errors(place, tmp_path):
    rows = [
        (["--classifier_ckpt", "none"], "starts from a pre-trained classifier"),
        (["--classifier_ckpt", place / "predictor_net.ckpt"], "looks like a DRNet predictor"),
        (["--batch_size", "64"], "set --batch_size lower"),
        (["--batch_size", "1"], "too small"),
        (["--crop_scale", "0.5", "2"], "--crop_scale"),
        (["--flip", "2"], "2 is not a number from 0 to 1"),
        (["--optimizer", "lamb"], "invalid choice"),
    ]
    for words, wanted in rows:
        line = one_line_error(run_script(*train(place, tmp_path / "o", *words), cwd=FOLDER))
        assert wanted in line, (words, line)
    assert not (tmp_path / "o").exists()


def test_show_needs_results(tmp_path):
    result = run_script("show.py", "--results", tmp_path, "--output", tmp_path / "x.png", cwd=FOLDER)
    assert "run eval.py" in one_line_error(result)
    assert os.listdir(tmp_path) == []
