"""eval.py, train.py, export.py and show.py, run as a user runs them, with good and with bad input."""

import contextlib
import csv
import ctypes
import hashlib
import json
import os
import re
import shlex
import signal
import time

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT, SERVER, one_line_error, run_script
from golden.recipe import value
from mindspore import Tensor, nn
from PIL import Image
from src.model_utils.config import load_config

from utils.cli import UserError
from utils.images import ImageFolder, epoch_rows

FOLDER = ROOT / "DRNet"
EAGER = ROOT / "tests" / "drnet" / "eager.py"
CONFIG = "config/resnet14_digits_config.yaml"
SIZES = shlex.split(f"--config_path {CONFIG} --image_size 32 --resize_size 32 --predictor_size 16")
DIGITS = [*SIZES, "--num_workers", "1"]
SMALL = [*DIGITS, "--resolutions", "32", "16"]
BUDGET = ["--alpha", "0.029"]  # of the networks below, which cost 0.012 to 0.030 GMACs
SGD = ["--optimizer", "sgd", "--lr", "0.01", "--eval_every", "1"]
EXPORT = [*SIZES, "--resolutions", "32", "16"]  # which reads no images


def save(path, names, classes=10, record=None):
    """A checkpoint with the published names but one block a stage, two candidates and `classes` classes.

    The weights come from the recipe; `record` is the text that it holds besides, if any.
    """
    rows = []
    for name, shape in json.loads((ROOT / "tests" / "golden" / f"drnet_{names}.json").read_text()):
        if "bn_2" in name or re.match(r"layer\d\.[1-9]", name):
            continue
        if name.startswith("end_point"):
            shape = [classes if names == "classifier" else 2, *shape[1:]]
        rows.append({"name": name, "data": Tensor(value(name, shape))})
    ms.save_checkpoint(rows, str(path), append_dict=None if record is None else {"record": record})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a space in its name, a sample of 20 + 20 digits and untrained checkpoints without records."""
    place = tmp_path_factory.mktemp("drnet") / "a place"
    place.mkdir()
    run_script(ROOT / "utils/sample_imagenet.py", "--output", place / "digits", "--images", "2", cwd=place)
    save(place / "classifier_net.ckpt", "classifier")
    save(place / "predictor_net.ckpt", "predictor")
    return place


@pytest.fixture(scope="module")
def networks(place):
    """The flags that name its checkpoints."""
    return ["--classifier_ckpt", place / "classifier_net.ckpt", "--predictor_ckpt", place / "predictor_net.ckpt"]


def evaluate(place, *words):
    return run_script(
        "eval.py", *words, *([] if "--data_path" in words else ["--data_path", place / "digits"]), cwd=FOLDER
    )


@pytest.fixture(scope="module")
def pretrained(place):
    """A folder with what `--stage pretrain` writes: from nothing, two epochs of two steps."""
    words = [*SMALL, *SGD, "--layers", *"1111", "--data_path", place / "digits", "--output_dir", place / "pretrained"]
    result = run_script("train.py", "--stage", "pretrain", *words, "--batch_size", "10", "--epochs", "2", cwd=FOLDER)
    assert result.returncode == 0, result.stderr
    return place / "pretrained"


def finetune(place, output, *words):
    """The flags of a short fine-tuning, from the checkpoint without a record: an epoch of two steps."""
    return [
        *("--stage", "finetune", *SMALL, *BUDGET, "--data_path", place / "digits", "--output_dir", output),
        *("--classifier_ckpt", place / "classifier_net.ckpt", "--batch_size", "10", "--epochs", "1", *SGD, *words),
    ]


@pytest.fixture(scope="module")
def broken(place):
    """The training digits with one file that is no image, among those of the first step."""
    images = ImageFolder(place / "digits" / "train")
    path = images.paths[epoch_rows(len(images), 10, 0, 0)[3]]
    good = path.read_bytes()
    path.write_bytes(b"no image")
    yield path
    path.write_bytes(good)


@pytest.fixture(scope="module")
def finetuned(place, broken):
    """A folder with what `--stage finetune` writes, and its output."""
    result = run_script(EAGER, *finetune(place, place / "finetuned"), cwd=FOLDER)
    assert result.returncode == 0, result.stderr
    return place / "finetuned", result


def stop_when_it_reads(command, path):
    """Run a training, press Ctrl-C as soon as it opens the image `path`, and return its output."""
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode(path), 0x20) > 0  # IN_OPEN
    training = SERVER.start([str(word) for word in command], FOLDER, dict(os.environ))
    seen = b""
    while not seen:
        assert training.running(), training.wait(10)
        time.sleep(0.01)
        with contextlib.suppress(BlockingIOError):
            seen = os.read(watch, 4096)
    training.send_signal(signal.SIGINT)
    os.close(watch)
    result = training.wait(300)
    assert result.returncode == 130, result
    return result.stdout + result.stderr


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def checkpoint(path):
    return {name: p.asnumpy() for name, p in ms.load_checkpoint(str(path)).items() if isinstance(p, ms.Parameter)}


def record(path):
    return json.loads(ms.load_checkpoint(str(path))["record"])


@pytest.fixture(scope="module")
def evaluation(place, networks):
    """The output of an evaluation that predicts, one image of 21 being broken, and of a strict one; and that image."""
    broken = place / "digits" / "val" / "3" / "a_broken.JPEG"
    broken.write_bytes(b"\xff\xd8 no image")
    words = [*SMALL, *networks, "--output_dir", place / "out"]
    try:
        result = evaluate(place, *words, "--predictions", place / "p.csv", "--batch_size", "7")
        strict = evaluate(place, *words, "--strict", "--force_resolution", "16")
    finally:
        broken.unlink()
    assert result.returncode == 0, result.stderr
    return result, strict, broken


def test_eval_reports_predicts_and_survives_a_corrupt_file(place, evaluation):
    result, strict, broken = evaluation
    assert result.stderr.strip() == f"warning: {broken} cannot be read as an image; going on without it"
    assert "1 of 21 images could not be read and were left out" in result.stdout
    checkpoints = f"{place}/classifier_net.ckpt {place}/predictor_net.ckpt"
    acc = re.search(r"^result: \{'acc': (\d+(\.\d{1,3})?)\} ckpt= (.*)$", result.stdout, re.M)
    assert acc and acc[3] == checkpoints
    rows = table(place / "p.csv")
    assert list(rows[0]) == ["path", "label", "prediction", "resolution"] and len(rows) == 20
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    hits = [row["label"] == row["prediction"] for row in rows]
    assert float(acc[1]) == pytest.approx(5 * sum(hits), abs=1e-3)
    report = json.loads((place / "out" / "results.json").read_text())
    assert report["acc"] == pytest.approx(float(acc[1])) and report["images"] == 20 and report["left_out"] == 1
    for part in report["resolutions"]:
        own = [hit for hit, row in zip(hits, rows) if row["resolution"] == str(part["resolution"])]
        assert part["images"] == len(own)
        assert part["top1"] == (pytest.approx(np.mean(own)) if own else None)
    assert str(broken) in one_line_error(strict)


def test_download_fetches_and_checks_then_a_forced_resolution(place, tmp_path):
    words = [*SMALL, "--download", "--force_resolution", "16", "--output_dir", tmp_path / "out"]
    words += ["--predictions", tmp_path / "forced.csv"]
    for name in ("classifier", "predictor"):
        source = place / f"{name}_net.ckpt"
        words += [f"--{name}_ckpt", tmp_path / "got" / f"{name}_net.ckpt"]
        words += [f"--{name}_url", source.as_uri()]
        words += [f"--{name}_sha256", hashlib.sha256(source.read_bytes()).hexdigest()]
    result = evaluate(place, *words)
    assert result.returncode == 0, result.stderr
    assert f"ckpt= {tmp_path}/got/classifier_net.ckpt" in result.stdout
    assert {row["resolution"] for row in table(tmp_path / "forced.csv")} == {"16"}
    cost = re.search(r"mean GMACs (\S+) \(predictor 0\.000 included\), 32 only (\S+): ", result.stdout)
    assert 0 < float(cost[1]) < float(cost[2])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["force_resolution"] == 16
    words[words.index("--predictor_ckpt") + 1] = tmp_path / "other.ckpt"
    one_line_error(evaluate(place, *words[:-1], "0" * 64))
    assert not (tmp_path / "other.ckpt").exists()


def test_a_checkpoint_tells_the_settings_of_its_network(place, pretrained, finetuned, tmp_path):
    """Without flags for the resolutions, which are not those of the config; sampled choices depend on the seed."""
    folder, _ = finetuned
    classes = [str(digit) for digit in range(10)]
    told = {"resolutions": [32, 16], "predictor_size": 16, "image_size": 32, "num_classes": 10, "resize_size": 32}
    told |= {"layers": [1, 1, 1, 1], "classes": classes}
    assert record(pretrained / "classifier_net.ckpt") == told | {"shortcut_bn": "per_resolution"}
    # The published-style checkpoint it started from uses set 0 for the shortcuts, and so does what came of it.
    assert record(folder / "classifier_net.ckpt") == told | {"shortcut_bn": "published"}
    assert record(folder / "predictor_net.ckpt") == told | {"shortcut_bn": "published"}

    words = ["--classifier_ckpt", folder / "classifier_net.ckpt", "--predictor_ckpt", folder / "predictor_net.ckpt"]
    words += [*DIGITS, "--output_dir", tmp_path]
    sampled = evaluate(place, *words, "--sample_gumbel", "--predictions", tmp_path / "p.csv", "--seed", "3")
    assert sampled.returncode == 0, sampled.stderr
    assert {row["resolution"] for row in table(tmp_path / "p.csv")} == {"32", "16"}
    report = json.loads((tmp_path / "results.json").read_text())
    assert [part["resolution"] for part in report["resolutions"]] == [32, 16] and report["sample_gumbel"]

    (tmp_path / "others").mkdir()
    for digit in range(10):
        (tmp_path / "others" / "val" / f"digit {digit}").mkdir(parents=True)
        (tmp_path / "others" / "val" / f"digit {digit}" / "0.png").touch()
    has = f"{folder}/classifier_net.ckpt, which has"
    rows = [
        (["--predictor_size", "24"], f"--predictor_size 24 contradicts {has} 16"),
        (["--resolutions", "32", "24", "16"], f"--resolutions 32 24 16 contradicts {has} 32 16"),
        (["--num_classes", "1000"], f"--num_classes 1000 contradicts {has} 10"),
        (["--data_path", tmp_path / "others"], "label 0 is 0 in"),
    ]
    for flags, wanted in rows:
        assert wanted in one_line_error(evaluate(place, *words, *flags))
    exported = run_script("export.py", *words[:-4], "--image_size", "24", "--output_dir", tmp_path / "e", cwd=FOLDER)
    assert f"--image_size 24 contradicts {has} 32" in one_line_error(exported)


def test_bad_input_ends_with_one_line(place, networks, tmp_path):
    """Each row: what is wrong, the flags that make it so, and what the error must speak of."""
    (tmp_path / "truncated.ckpt").write_bytes((place / "predictor_net.ckpt").read_bytes()[:100000])
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    save(tmp_path / "damaged.ckpt", "classifier", record="{")
    save(tmp_path / "other.ckpt", "predictor", record='{"predictor_size": 24}')
    save(tmp_path / "odd.ckpt", "predictor", record='{"resolutions": [[32], 24]}')
    told = [("shortcut_bn", "none"), ("resolutions", "many"), ("resolutions", [32, "x"]), ("image_size", [32])]
    for number, (key, told_value) in enumerate(told):
        save(tmp_path / f"{number}.ckpt", "classifier", record=json.dumps({key: told_value}))
    (tmp_path / "data" / "val" / "0").mkdir(parents=True)
    rows = [
        (["--data_path", tmp_path / "none"], "no folder"),
        (["--data_path", tmp_path / "data"], "holds no images"),
        (["--num_classes", "1000"], "--num_classes 1000 contradicts"),
        (["--classifier_ckpt", tmp_path / "none.ckpt"], "no checkpoint at"),
        (["--classifier_ckpt", place / "predictor_net.ckpt"], "looks like a DRNet predictor"),
        (["--classifier_ckpt", tmp_path / "truncated.ckpt"], "truncated"),
        (["--classifier_ckpt", tmp_path / "junk.ckpt"], "cannot be read"),
        (["--classifier_ckpt", tmp_path / "damaged.ckpt"], "damaged record"),
        *(
            (["--classifier_ckpt", tmp_path / f"{number}.ckpt"], f"tells no usable {key}")
            for number, (key, _) in enumerate(told)
        ),
        (["--predictor_ckpt", tmp_path / "odd.ckpt"], "resolutions [[32], 24], the classifier with"),
        (["--predictor_ckpt", place / "classifier_net.ckpt"], "looks like a DRNet classifier"),
        (["--predictor_ckpt", tmp_path / "other.ckpt"], "predictor_size 24, the classifier with 16"),
        (["--resolutions", "32", "24", "16"], "bn_2"),
        (["--batch_size", "many"], "many is not a whole number from 0"),
        (["--output_dir", place / "predictor_net.ckpt" / "x", "--force_resolution", "16"], "cannot write"),
    ]
    if not ms.hal.is_available("Ascend"):
        rows.append((["--device_target", "Ascend"], "no Ascend"))
    for words, wanted in rows:
        line = one_line_error(evaluate(place, *SMALL, *networks, "--output_dir", tmp_path / "out", *words))
        assert wanted in line, (words, line)


def test_settings_that_cannot_be_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER)
    config = (FOLDER / "config" / "resnet14_digits_config.yaml").read_text()
    (tmp_path / "typo.yaml").write_text(config.replace("flip:", "flipp:"))
    (tmp_path / "value.yaml").write_text(config.replace("num_classes: 10", "num_classes: ten"))
    (tmp_path / "short.yaml").write_text(config.replace("num_classes: 10", ""))
    (tmp_path / "broken.yaml").write_text("a: [1,\nb: }")
    rows = [
        ("eval", ["--resolutions", "16", "32"], "32 16"),
        ("eval", ["--force_resolution", "24"], "none of --resolutions 32 16"),
        ("eval", ["--batch_size", "0"], "--batch_size"),
        ("eval", ["--batch_size", "many"], "many is not a whole number from 0"),
        ("eval", ["--no_such_flag"], "unrecognized arguments"),
        ("eval", ["--config_path", tmp_path / "typo.yaml"], "flipp; did you mean flip?"),
        ("eval", ["--config_path", tmp_path / "value.yaml"], "num_classes: ten is not a whole number from 1"),
        ("eval", ["--config_path", tmp_path / "short.yaml"], "lacks the key num_classes"),
        ("eval", ["--config_path", tmp_path / "broken.yaml"], "not valid YAML"),
        ("eval", ["--config_path", tmp_path / "none.yaml"], "cannot read the config"),
        ("export", ["--num_workers", "1"], "unrecognized arguments"),
        ("train", ["--classifier_ckpt", "none"], "starts from a pre-trained classifier"),
        ("train", ["--batch_size", "1"], "must be at least 2"),
        ("train", ["--layers", *"111"], "--layers takes four numbers"),
        ("train", ["--crop_scale", "0.5", "2"], "--crop_scale"),
        ("train", ["--flip", "2"], "2 is not a number from 0 to 1"),
        ("train", ["--optimizer", "lamb"], "invalid choice"),
        ("train", ["--finetune", "--new_head", "false"], "one setting with two values"),
    ]
    for command, words, wanted in rows:
        flags = [*(["--stage", "finetune"] if command == "train" else []), *EXPORT]
        with pytest.raises(UserError) as error:
            load_config(command, "", [str(word) for word in [*flags, *words]])
        assert wanted in str(error.value), (words, error)


def test_help_names_every_flag_and_default():
    for script in ("eval.py", "export.py", "train.py"):
        result = run_script(script, "--help", cwd=FOLDER)
        assert result.returncode == 0, result.stderr
        text = " ".join(result.stdout.split())
        options = len(re.findall(r"^  --", result.stdout, re.M))
        assert text.count("(default: ") == options - (script == "train.py")  # --stage has none
        for flag in ("--config_path", "--device_target", "--device_id", "--batch_size", "--output_dir"):
            assert flag in text
    assert "--num_workers" not in run_script("export.py", "--help", cwd=FOLDER).stdout


@pytest.mark.parametrize("batch_size", [0, pytest.param(2, marks=pytest.mark.full)])
def test_export_can_be_rebuilt_from_its_manifest(place, networks, evaluation, tmp_path, batch_size):
    """Another program: MINDIR files and JSON alone, nothing of the project."""
    words = ["--batch_size", batch_size, "--output_dir", tmp_path / "export ed"]
    result = run_script("export.py", *EXPORT, *networks, *words, cwd=FOLDER)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "export ed" / "drnet.json").read_text())
    assert manifest["input"]["shape"] == [batch_size, 3, 32, 32]

    def network(entry):
        return nn.GraphCell(ms.load(str(tmp_path / "export ed" / entry["file"])))

    predictor, classifiers = network(manifest["predictor"]), [network(entry) for entry in manifest["classifiers"]]
    steps = manifest["preprocess"]
    rows = table(place / "p.csv")[:: 7 if batch_size else 3]
    for row in rows:
        image = Image.open(row["path"]).convert("RGB")
        side = steps["resize_shorter_side"]
        assert image.size == (side, side) and steps["center_crop"] == side
        x = (np.asarray(image, np.float32) / steps["divide_by"] - steps["mean"]) / steps["std"]
        x = Tensor(np.stack([x.transpose(2, 0, 1).astype(np.float32)] * (batch_size or 1)))
        choice = int(predictor(x).asnumpy()[0].argmax())
        assert str(manifest["classifiers"][choice]["resolution"]) == row["resolution"]
        assert int(classifiers[choice](x).asnumpy()[0].argmax()) == int(row["prediction"])


def test_export_refuses_what_it_cannot_do(networks, tmp_path):
    (tmp_path / "file").write_text("")
    result = run_script("export.py", *EXPORT, *networks, "--output_dir", tmp_path / "file/x", cwd=FOLDER)
    assert "cannot write to" in one_line_error(result)
    if not ms.hal.is_available("Ascend"):
        words = ["--file_format", "AIR", "--output_dir", tmp_path / "e"]
        assert "Ascend" in one_line_error(run_script("export.py", *EXPORT, *networks, *words, cwd=FOLDER))
    assert not (tmp_path / "e").exists()


RESUMED = [
    ("finetune", EAGER, "1"),
    pytest.param("finetune", "train.py", "2", marks=pytest.mark.full),
    pytest.param("pretrain", "train.py", "2", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("stage", "script", "epochs"), RESUMED)
def test_interrupted_training_resumes_to_the_same_weights(place, broken, request, tmp_path, stage, script, epochs):
    """Ctrl-C in the middle of the first epoch, then --resume without the network's settings, into another folder.

    Augmentation and Gumbel noise are on.
    """
    words = [*finetune(place, tmp_path / "straight"), "--epochs", epochs]
    words[1] = stage
    if stage == "pretrain":
        words = [word for word in words if word not in BUDGET]
    if (stage, script) == ("finetune", EAGER):
        straight, result = request.getfixturevalue("finetuned")
    else:
        straight, result = tmp_path / "straight", run_script(script, *words, cwd=FOLDER)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == f"warning: {broken} cannot be read as an image; going on without it"
    assert "1 training images could not be read" in result.stdout

    output = stop_when_it_reads([script, *words, "--output_dir", tmp_path / "stopped"], broken)
    state = tmp_path / "stopped" / "resume.ckpt"
    assert f"stopped after step 1 of epoch 1; go on with --resume {state}" in output

    words = [*DIGITS, *SGD, "--stage", stage, "--data_path", place / "digits", "--batch_size", "10", "--epochs", epochs]
    words += ["--resume", state, "--output_dir", tmp_path / "resumed", *(BUDGET if stage == "finetune" else [])]
    rows = [
        (["--seed", "5"], "seed 0 (now 5)"),
        (["--layers", *"1211"], f"--layers 1 2 1 1 contradicts {state}, which has 1 1 1 1"),
        (["--resume", place / "predictor_net.ckpt"], "no training state"),
    ]
    for flags, wanted in rows:
        assert wanted in one_line_error(run_script(script, *words, *flags, cwd=FOLDER))
    resumed = run_script(script, *words, cwd=FOLDER)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after step 1 of epoch 1" in resumed.stdout
    assert_same_training(straight, tmp_path / "resumed", stage, int(epochs))


def assert_same_training(straight, resumed, stage, epochs):
    one, two = table(straight / "metrics.csv"), table(resumed / "metrics.csv")
    assert len(one) == len(two) == epochs
    for a, b in zip(one, two):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=1e-5)
        assert a["images_32"] == b["images_32"] and a["top1"] == b["top1"]
    for name in ("classifier_net.ckpt", "resume.ckpt", *(["predictor_net.ckpt"] if stage == "finetune" else [])):
        one, two = checkpoint(straight / name), checkpoint(resumed / name)
        assert set(one) == set(two)
        for key in one:
            np.testing.assert_allclose(one[key], two[key], atol=1e-5, err_msg=key)


def test_the_best_epoch_keeps_to_the_budget_and_then_has_the_highest_accuracy(place, tmp_path):
    """All images cost 0.030 GMACs at the first candidate and 0.012 at the second."""
    words = finetune(place, tmp_path, "--alpha", "0.02", "--batch_size", "20", "--epochs", "5")
    result = run_script(EAGER.with_name("prepared.py"), *words, cwd=FOLDER, RESULTS="0:9 1:3 0:20 1:2 1:4")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("epoch ")]
    assert [line.endswith(", best so far") for line in lines] == [True, True, False, False, True]
    best = json.loads((tmp_path / "results.json").read_text())["best"]
    assert best == {"epoch": 5, "top1": 0.2, "top5": 1, "within_budget": True}


def test_pretraining_resumes_elsewhere_and_takes_the_best_checkpoint_along(place, pretrained, tmp_path):
    """From the state at the end of the last epoch, whose evaluation meets an image that cannot be read."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(place / "digits" / "train")
    for digit in range(10):
        (tmp_path / "data" / "val" / str(digit)).mkdir(parents=True)
        (tmp_path / "data" / "val" / str(digit) / "0.png").touch()
    words = [
        "--stage",
        "pretrain",
        *DIGITS,
        *SGD,
        "--data_path",
        tmp_path / "data",
        "--batch_size",
        "10",
        "--epochs",
        "2",
    ]
    words += ["--resume", pretrained / "resume.ckpt", "--strict", "--output_dir", tmp_path / "new"]
    result = run_script(EAGER, *words, cwd=FOLDER)
    assert "cannot be read as an image; replace it, or leave out --strict" in one_line_error(result)
    assert "going on after step 2 of epoch 2" in result.stdout
    best = "classifier_net.ckpt"
    assert (tmp_path / "new" / best).read_bytes() == (pretrained / best).read_bytes()


@pytest.mark.full
def test_a_best_checkpoint_that_is_missing_is_named(place, pretrained, tmp_path):
    (tmp_path / "resume.ckpt").symlink_to(pretrained / "resume.ckpt")
    words = [
        "--stage",
        "pretrain",
        *DIGITS,
        *SGD,
        "--data_path",
        place / "digits",
        "--batch_size",
        "10",
        "--epochs",
        "2",
    ]
    words += ["--resume", tmp_path / "resume.ckpt", "--output_dir", tmp_path / "new"]
    missing = one_line_error(run_script("train.py", *words, cwd=FOLDER))
    assert f"{tmp_path}/classifier_net.ckpt, the best checkpoint of that run, is missing" in missing


def train_on_two(place, output, script, *words):
    words = ["--stage", "pretrain", *SMALL, *SGD, "--output_dir", output, "--batch_size", "5", "--epochs", "1", *words]
    words += ["--classifier_ckpt", place / "classifier_net.ckpt", "--device_num", "2", "--device_target", "CPU"]
    return run_script(script, *words, cwd=FOLDER)


def test_own_classes_with_a_new_head_on_two_devices(place, tmp_path):
    words = ["--output", tmp_path / "five", "--images", "3", "--classes", "5"]
    assert run_script(ROOT / "utils/sample_imagenet.py", *words, cwd=tmp_path).returncode == 0
    own = ["--data_path", tmp_path / "five", "--num_classes", "5"]
    refused = run_script("train.py", *finetune(place, tmp_path / "o ut", *own), cwd=FOLDER)
    assert (
        f"--num_classes 5 contradicts {place}/classifier_net.ckpt, which has 10; leave it out, or, for other classes, "
        "add --finetune" in one_line_error(refused)
    )
    result = train_on_two(place, tmp_path / "o ut", EAGER, *own, "--new_head")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "CPU x 2, 15 training and 15 validation images" in result.stdout
    assert "trained from nothing: end_point.weight, end_point.bias" in result.stdout
    assert "[INFO]" not in result.stdout
    (row,) = table(tmp_path / "o ut" / "metrics.csv")
    assert int(row["images_32"]) == int(row["images_16"]) == 15
    assert checkpoint(tmp_path / "o ut" / "classifier_net.ckpt")["end_point.weight"].shape == (5, 2048)
    assert record(tmp_path / "o ut" / "classifier_net.ckpt")["classes"] == [str(digit) for digit in range(5)]


@pytest.mark.full
def test_training_on_two_devices_in_graph_mode(place, tmp_path):
    result = train_on_two(place, tmp_path / "o", "train.py", "--data_path", place / "digits")
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = table(tmp_path / "o" / "metrics.csv")
    assert int(row["images_32"]) == int(row["images_16"]) == 20


def test_training_errors(place, tmp_path):
    rows = [
        (["--classifier_ckpt", place / "predictor_net.ckpt"], "looks like a DRNet predictor"),
        (["--batch_size", "64"], "set --batch_size lower"),
        (["--layers", *"1112"], "--layers 1 1 1 2 contradicts"),
        (["--alpha", "0.03"], "--alpha 0.03 is no budget: the classifier costs 0.01163 to 0.02995 GMACs an image"),
        (["--alpha", "0.011"], "--alpha 0.011 is no budget"),
    ]
    for words, wanted in rows:
        line = one_line_error(run_script("train.py", *finetune(place, tmp_path / "o", *words), cwd=FOLDER))
        assert wanted in line, (words, line)
    assert not list(tmp_path.glob("o/*"))


def test_show_takes_the_files_of_eval_and_nothing_else(place, tmp_path):
    picture, image = tmp_path / "x.png", next((place / "digits" / "val").rglob("*.JPEG"))
    rows = [{"resolution": 32, "images": 1, "gmacs": 0.08}, {"resolution": 16, "images": 2, "gmacs": 0.03}]
    good = {"acc": 50.0, "images": 3, "mean_gmacs": 0.06, "resolutions": rows, "force_resolution": None}
    header, line = "path,label,prediction,resolution", f"{image},3,3,32"

    def show(results, *lines, words=()):
        (tmp_path / "results.json").write_text(results if isinstance(results, str) else json.dumps(results))
        (tmp_path / "predictions.csv").write_text("\n".join(lines))
        return run_script("show.py", "--results", tmp_path, "--output", picture, *words, cwd=FOLDER)

    for results, lines, wanted in [
        ({"top1": 0.5}, [], "results.json is not as"),
        (json.dumps(good).replace("50.0", "NaN"), [], "results.json is not as"),
        (good, [header, f"{image},3,$x_$,32"], "predictions.csv is not as"),
        (good, [header, f"{tmp_path}/results.json,3,3,32"], "results.json cannot be read as an image"),
    ]:
        assert wanted in one_line_error(show(results, *lines))
    assert not picture.exists()
    not_fixed = show(good, header, line, words=["--fixed", tmp_path])
    assert "is not of one resolution" in one_line_error(not_fixed)
    (tmp_path / "results.json").unlink()
    assert "run eval.py" in one_line_error(
        run_script("show.py", "--results", tmp_path, "--output", picture, cwd=FOLDER)
    )


def test_show_compares_with_the_line_through_the_fixed_resolutions(place, tmp_path):
    def write(name, acc, cost, size):
        rows = [{"resolution": 32, "images": 3, "gmacs": 0.4}, {"resolution": 16, "images": 1, "gmacs": 0.1}]
        result = {"acc": acc, "mean_gmacs": cost, "images": 4, "force_resolution": size, "resolutions": rows}
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(result))

    write("16", 70.0, 0.1, 16)
    write("32", 90.0, 0.4, 32)
    write("dynamic", 86.5, 0.25, None)
    path = sorted((place / "digits" / "val").rglob("*.JPEG"))[0]
    rows = "".join(f"{path},0,0,{size}\n" for size in (32, 32, 32, 16))
    (tmp_path / "dynamic" / "predictions.csv").write_text(f"path,label,prediction,resolution\n{rows}")
    folders = ["--results", tmp_path / "dynamic", "--fixed", tmp_path / "32", tmp_path / "16"]
    result = run_script("show.py", *folders, "--output", tmp_path / "x.png", cwd=FOLDER)
    assert result.returncode == 0, result.stderr
    *table, line, wrote = result.stdout.splitlines()
    assert [row.split()[-4:] for row in table[1:]] == [
        ["px", "70.000", "0.1000", "25.0%"],
        ["px", "90.000", "0.4000", "100.0%"],
        ["dynamic", "86.500", "0.2500", "62.5%"],
    ]
    # Half-way between 70 and 90.
    assert line.endswith("+6.50 points") and wrote == f"wrote {tmp_path / 'x.png'}"
    assert Image.open(tmp_path / "x.png").width > 1000
