"""train.py, eval.py and export.py, run as a user runs them, with good and with bad input.

Where the network does not matter it is the one of small_network.py, which compiles in seconds.
"""

import csv
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT, one_line_error, run_script
from golden.recipe import value
from mindspore import Tensor, nn
from PIL import Image

from utils.checkpoint import read_record, save_checkpoint

FOLDER = ROOT / "DDRNet"
TOP = ("top1", "top5")
SMALL = ROOT / "tests/ddrnet/small_network.py"
SAMPLE = ["--config_path", "src/configs/ddrnet23_sample_cpu.yaml"]
# Its 1,000 classes, 224 pixels and crop_pct 0.875 are none of the sample's.
DOCUMENTED = ["--config_path", "src/configs/ddrnet23_imagenet_gpu.yaml", "--device_target", "CPU", "--num_workers", "1"]
# What the training in the module's fixture is run with, besides the data and the folder.
TRAINING = [
    "--batch_size",
    "8",
    "--warmup_length",
    "0",
    "--epochs",
    "3",
    "--drop_path_rate",
    "0.2",
    "--re_prob",
    "0.25",
]
TRAINING += ["--cutmix", "1", "--num_workers", "1"]
TRAINING += ["--loss_scale", "1e39"]  # beyond float32: two steps overflow, and the scale is something to restore


def small(script: str, *words, **options):
    """Run a script with the small network."""
    return run_script(SMALL, script, *words, cwd=FOLDER, **options)


def done(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def save(path: Path, classes: int = 10) -> Path:
    """A checkpoint with the published names and weights from the recipe."""
    rows = []
    for name, shape in json.loads((ROOT / "tests/golden/ddrnet23_parameters.json").read_text()):
        if name.startswith("linear"):
            shape = [classes, *shape[1:]]
        rows.append({"name": name, "data": Tensor(value(name, shape))})
    ms.save_checkpoint(rows, str(path))
    return path


def data(place: Path) -> list:
    return ["--data_path", place / "digits"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a space in its name, and a sample of the digits with 40 and 41 images."""
    place = tmp_path_factory.mktemp("ddrnet") / "a place"
    place.mkdir()
    words = ["--output", place / "digits", "--images", "4", "--size", "64"]
    done(run_script(ROOT / "utils/sample_imagenet.py", *words, cwd=place))
    first = sorted((place / "digits/val/0").iterdir())[0]
    shutil.copy(first, first.with_name("extra.JPEG"))
    return place


@pytest.fixture(scope="module")
def trained(place):
    """The folder of a training of the small network, and what it printed."""
    words = [*data(place), *SAMPLE, *TRAINING, "--output_dir", place / "trained"]
    return place / "trained", done(small("train", *words))


@pytest.fixture(scope="module")
def exported(place, trained):
    """The folder with the small network's export for any number of images, and what export.py printed."""
    words = ["--pretrained", trained[0] / "ddrnet23.ckpt", "--output_dir", place / "an export", "--batch_size", "0"]
    words += ["--ddr_config", DOCUMENTED[1], "--device_target", "CPU"]
    return place / "an export", done(small("export", *words))


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(path: Path) -> dict:
    return {name: p.asnumpy() for name, p in ms.load_checkpoint(str(path)).items() if isinstance(p, ms.Parameter)}


def result_line(output: str) -> list[str]:
    """Loss, Top1-Acc, Top5-Acc and the checkpoint of the line that the document prints."""
    line = r"^result: \{'Loss': (\S+), 'Top1-Acc': (\S+), 'Top5-Acc': (\S+)\} ckpt= (.*)$"
    return list(re.search(line, output, re.M).groups())


# ----- evaluation and export -----


def test_eval_counts_every_image_and_survives_a_corrupt_file(place, trained, tmp_path):
    """DDRNet-23 itself, from a file that tells nothing but its weights, as the published one."""
    save(tmp_path / "ddrnet23.ckpt")
    shutil.copytree(place / "digits", tmp_path / "digits")
    broken = tmp_path / "digits/val/3/a_broken.JPEG"
    broken.write_bytes(b"\xff\xd8 no image")
    words = [*SAMPLE, *data(tmp_path), "--pretrained", tmp_path / "ddrnet23.ckpt", "--output_dir", tmp_path / "out"]
    words += ["--predictions", tmp_path / "p.csv", "--batch_size", "9"]
    result = run_script("eval.py", *words, cwd=FOLDER)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == f"warning: {broken} cannot be read as an image; going on without it"
    assert "1 of 42 images could not be read and were left out" in result.stdout
    loss, top1, top5, path = result_line(result.stdout)
    assert path == str(tmp_path / "ddrnet23.ckpt")
    predictions = rows(tmp_path / "p.csv")
    assert list(predictions[0]) == ["path", "label", "prediction"] and len(predictions) == 41
    hits = sum(row["label"] == row["prediction"] for row in predictions)
    assert float(top1) == pytest.approx(hits / 41, abs=1e-5)
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert report["Loss"] == pytest.approx(float(loss), abs=1e-5) and report["images"] == 41
    assert report["Top5-Acc"] == pytest.approx(float(top5), abs=1e-5) and report["left_out"] == 1
    words += ["--pretrained", trained[0] / "ddrnet23.ckpt", "--strict"]
    assert str(broken) in one_line_error(small("eval", *words))


@pytest.mark.full
def test_evaluation_over_two_devices_is_that_of_one(place, trained):
    words = [*data(place), *SAMPLE, "--pretrained", trained[0] / "ddrnet23.ckpt", "--batch_size", "16"]
    words += ["--device_target", "CPU"]
    one, two = (
        done(small("eval", *words, *more, "--predictions", place / f"{k}.csv", "--output_dir", place / "out"))
        for k, more in enumerate(([], ["--device_num", "2"]))
    )
    assert "41 images, CPU x 2" in two
    one, two = result_line(one), result_line(two)
    assert float(one[0]) == pytest.approx(float(two[0]), abs=2e-5) and one[1:] == two[1:]
    assert (place / "0.csv").read_text() == (place / "1.csv").read_text()


def test_the_best_checkpoint_tells_what_it_needs(place, trained, tmp_path):
    """Its record, and so an evaluation with another config file gives what the training has found."""
    record = {"num_classes": 10, "image_size": 64, "crop_pct": 1.0, "classes": list("0123456789")}
    assert read_record(trained[0] / "ddrnet23.ckpt") == record
    words = [*data(place), *DOCUMENTED, "--pretrained", trained[0] / "ddrnet23.ckpt", "--output_dir", tmp_path / "e"]
    output = done(small("eval", *words))
    assert "amp_level O0 instead of O2, which is slower on a CPU; --amp_level O2 insists" in output
    loss, top1, top5, _ = result_line(output)
    best = json.loads((trained[0] / "results.json").read_text())["best"]
    assert float(loss) == pytest.approx(best["loss"], abs=2e-5)
    assert [float(top1), float(top5)] == pytest.approx([best["top1"], best["top5"]], abs=1e-5)
    insisting = done(small("eval", *words, "--amp_level", "O2"))
    assert "insists" not in insisting and float(result_line(insisting)[0]) == pytest.approx(float(loss), rel=1e-2)


def test_the_exported_file_predicts_the_same_and_the_manifest_says_how(place, trained, exported, tmp_path):
    folder, output = exported
    assert "ddrnet23.mindir: differs from the live network by at most" in output
    file = folder / "ddrnet23.mindir"
    outputs = [
        done(small("eval", *words, *data(place), *DOCUMENTED, "--output_dir", tmp_path))
        for words in (
            ["--pretrained", trained[0] / "ddrnet23.ckpt", "--predictions", tmp_path / "0.csv"],
            ["--pretrained", file, "--predictions", tmp_path / "1.csv"],
        )
    ]
    assert result_line(outputs[0])[:3] == result_line(outputs[1])[:3] and result_line(outputs[1])[3] == str(file)
    assert (tmp_path / "0.csv").read_text() == (tmp_path / "1.csv").read_text()
    manifest = json.loads((folder / "ddrnet23.json").read_text())
    assert manifest["input"]["shape"] == [0, 3, 64, 64] and manifest["output"]["shape"] == [0, 10]
    assert manifest["class_names"] == list("0123456789") and manifest["num_classes"] == 10
    network, steps = nn.GraphCell(ms.load(str(file))), manifest["preprocess"]
    assert steps["center_crop"] == steps["resize"][0] == 64 and steps["crop_pct"] == 1
    predictions = rows(tmp_path / "1.csv")[::5]
    x = []
    for row in predictions:
        image = Image.open(row["path"]).convert("RGB").resize(steps["resize"], Image.Resampling.BICUBIC)
        pixels = (np.asarray(image, np.float64) / steps["divide_by"] - steps["mean"]) / steps["std"]
        x.append(pixels.transpose(2, 0, 1).astype(np.float32))
    found = network(Tensor(np.stack(x))).asnumpy().argmax(1)
    assert found.tolist() == [int(row["prediction"]) for row in predictions]


@pytest.mark.full
def test_ddrnet_23_is_exported_for_a_fixed_number_of_images(place, tmp_path):
    """And evaluated, the last batch filled up; the sides do not halve evenly."""
    words = [*SAMPLE, "--device_target", "CPU", "--pretrained", save(tmp_path / "ddrnet23.ckpt"), "--image_size", "100"]
    done(run_script("export.py", *words, "--output_dir", tmp_path, "--batch_size", "3", cwd=FOLDER))
    assert json.loads((tmp_path / "ddrnet23.json").read_text())["input"]["shape"] == [3, 3, 100, 100]
    words += [*data(place), "--output_dir", tmp_path]
    for name in ("ckpt", "mindir"):
        flags = ["--pretrained", tmp_path / f"ddrnet23.{name}", "--predictions", tmp_path / f"{name}.csv"]
        done(run_script("eval.py", *words, *flags, cwd=FOLDER))
    assert len(rows(tmp_path / "ckpt.csv")) == 41
    assert (tmp_path / "ckpt.csv").read_text() == (tmp_path / "mindir.csv").read_text()


def test_download_fetches_and_checks(place, trained, tmp_path):
    source = trained[0] / "ddrnet23.ckpt"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    words = [*data(place), *SAMPLE, "--output_dir", tmp_path, "--download", "--checkpoint_url", source.as_uri()]
    done(small("eval", *words, "--checkpoint_sha256", digest, "--pretrained", tmp_path / "got/it.ckpt"))
    assert (tmp_path / "got/it.ckpt").read_bytes() == source.read_bytes()
    one_line_error(small("eval", *words, "--checkpoint_sha256", "0" * 64, "--pretrained", tmp_path / "other.ckpt"))
    assert not (tmp_path / "other.ckpt").exists()


# ----- training -----


def test_what_a_training_prints_and_writes(place, trained):
    folder, output = trained
    assert "CPU x 1, 40 training and 41 validation images\n" in output
    assert f"5 steps an epoch, learning rate {0.2 * 8 / 256:.4g}, O0; the first step compiles\n" in output
    assert "auto_augment is on, so color_jitter is not applied\n" in output
    epochs, results = rows(folder / "metrics.csv"), json.loads((folder / "results.json").read_text())
    best = max(epochs, key=lambda row: (float(row["top1"]), int(row["epoch"])))
    assert results["best"]["epoch"] == int(best["epoch"]) and results["best"]["top1"] == float(best["top1"])
    last = f"best: epoch {best['epoch']}, top-1 {float(best['top1']):.2%}; {folder}/ddrnet23.ckpt\n"
    assert output.endswith(last)
    lines = re.findall(r"^epoch (\d)/3: loss (\S+); validation loss (\S+), top-1 (\S+)%, top-5 (\S+)%", output, re.M)
    for row, line in zip(epochs, lines, strict=True):
        wanted = [*(float(row[key]) for key in ("epoch", "loss", "val_loss")), *(100 * float(row[k]) for k in TOP)]
        assert [float(word) for word in line] == pytest.approx(wanted, abs=5e-3)
    steps = rows(folder / "steps.csv")
    assert [(row["epoch"], row["step"]) for row in steps] == [(e, s) for e in "123" for s in "12345"]
    for row in epochs:
        losses = [float(step["loss"]) for step in steps if step["epoch"] == row["epoch"]]
        assert float(row["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    overflows = [row["overflow"] for row in steps]
    assert overflows[0] == "1" and overflows[-1] == "0" and float(steps[-1]["loss_scale"]) < 1e39
    assert results["overflow_steps"] == overflows.count("1")
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_training_resumes_to_the_same_loss_curve(place, trained, tmp_path):
    """Ctrl-C in the first step, which compiles, in an evaluation, and in mid-epoch.

    The state tells the resumed runs the number of classes. The last one keeps its results elsewhere.
    """
    state = tmp_path / "stopped/resume.ckpt"
    config = (FOLDER / SAMPLE[1]).read_text().replace("num_classes: 10", "num_classes: 1000")
    (tmp_path / "config.yaml").write_text(config)
    words = [*data(place), "--config_path", tmp_path / "config.yaml", *TRAINING]
    begin = [*words, "--num_classes", "10", "--output_dir", tmp_path / "stopped"]
    result = small("train", *begin, INTERRUPT="step 1")
    assert result.returncode == 130, result.stdout + result.stderr
    assert f"\nstopped after step 1 of epoch 1; go on with --resume {state}\n" in result.stdout

    again = [*words, "--output_dir", tmp_path / "stopped", "--resume", state]
    result = small("train", *again, INTERRUPT="evaluation 1")
    assert result.returncode == 130, result.stdout + result.stderr
    assert "going on after step 1 of epoch 1\n" in result.stdout
    assert result.stderr == f"interrupted; go on with --resume {state}\n"
    assert len(rows(tmp_path / "stopped/steps.csv")) == 5 and not (tmp_path / "stopped/metrics.csv").exists()

    result = small("train", *again, INTERRUPT="step 3")  # after the evaluation, which comes again
    assert "stopped after step 3 of epoch 2; " in result.stdout, result.stdout + result.stderr
    done_last = rows(tmp_path / "stopped/steps.csv")[-1]
    assert (done_last["epoch"], done_last["step"]) == ("2", "3")

    elsewhere = [*words, "--output_dir", tmp_path / "resumed", "--resume", state]
    other = one_line_error(small("train", *elsewhere, "--base_lr", "0.3"))
    assert f"{state} is of a run with other settings: base_lr 0.2 (now 0.3); resume with the same" in other
    other = one_line_error(small("train", *elsewhere, "--num_classes", "5"))
    assert f"--num_classes 5 contradicts {state}, which has 10; " in other
    (tmp_path / "alone").mkdir()
    shutil.copy(state, tmp_path / "alone")
    words = [*words, "--output_dir", tmp_path / "resumed", "--resume", tmp_path / "alone/resume.ckpt"]
    assert "alone/ddrnet23.ckpt, the best checkpoint of that run, is missing" in one_line_error(small("train", *words))
    shutil.copy(state.with_name("ddrnet23.ckpt"), tmp_path / "alone")
    assert "steps.csv does not hold the 8 steps before" in one_line_error(small("train", *words))

    output = done(small("train", *elsewhere, "--num_workers", "2"))
    assert "going on after step 3 of epoch 2\n" in output
    one, two = (rows(folder / "steps.csv") for folder in (trained[0], tmp_path / "resumed"))
    assert len(one) == len(two) == 15
    for a, b in zip(one, two):
        wanted = pytest.approx([float(x) for x in b.values()], rel=1e-5, abs=1e-5, nan_ok=True)
        assert [float(x) for x in a.values()] == wanted
    assert float(one[-1]["grad_norm"]) > 0.1
    one, two = (rows(folder / "metrics.csv") for folder in (trained[0], tmp_path / "resumed"))
    assert [row["top1"] for row in one] == [row["top1"] for row in two] and len(one) == 3
    for name in ("resume.ckpt", "ddrnet23.ckpt"):
        one, two = (checkpoint(folder / name) for folder in (trained[0], tmp_path / "resumed"))
        assert set(one) == set(two)
        for key in one:
            np.testing.assert_allclose(one[key], two[key], atol=1e-5, err_msg=key)
    one, two = (sorted(path.name for path in folder.iterdir()) for folder in (trained[0], tmp_path / "resumed"))
    assert one == two


@pytest.mark.full
def test_ddrnet_23_resumes_to_the_same_loss_curve(place, tmp_path):
    """The network itself, two epochs, stopped in the second one."""
    words = [*data(place), *SAMPLE, *TRAINING, "--epochs", "2"]
    done(run_script("train.py", *words, "--output_dir", tmp_path / "straight", cwd=FOLDER))
    stop = [*words, "--output_dir", tmp_path / "stopped"]
    result = run_script(SMALL, "train", *stop, cwd=FOLDER, INTERRUPT="step 7", NETWORK="DDRNet-23")
    assert "stopped after step 2 of epoch 2; " in result.stdout, result.stdout + result.stderr
    resume = ["--resume", tmp_path / "stopped/resume.ckpt", "--output_dir", tmp_path / "resumed"]
    done(run_script("train.py", *words, *resume, cwd=FOLDER))
    one, two = (rows(tmp_path / run / "steps.csv") for run in ("straight", "resumed"))
    assert len(one) == len(two) == 10
    for a, b in zip(one, two):
        wanted = pytest.approx([float(x) for x in b.values()], rel=1e-5, abs=1e-5, nan_ok=True)
        assert [float(x) for x in a.values()] == wanted
    one, two = (checkpoint(tmp_path / run / "resume.ckpt") for run in ("straight", "resumed"))
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=1e-5, err_msg=key)


def test_two_workers_follow_one_with_twice_the_batch(place, tmp_path):
    """Step k sees the same images, their gradients are averaged and clipped together; BNs are frozen."""
    plain = ["--auto_augment", "none", "--color_jitter", "0", "--crop_scale", "1", "1", "--crop_ratio", "1", "1"]
    plain += ["--mix_up", "0", "--cutmix", "0", "--clip_global_norm_value", "0.5", "--epochs", "2"]
    plain += ["--device_target", "CPU", "--warmup_length", "0", *data(place), *SAMPLE]
    for workers, size in ((1, 8), (2, 4)):
        words = [*plain, "--batch_size", size, "--device_num", workers, "--output_dir", tmp_path / str(workers)]
        output = done(small("frozen", *words))
    assert "CPU x 2, 40 training and 41 validation images" in output and "[INFO]" not in output
    assert "mean, variance, gamma: [1.5, 1.5, 1.0]" in output  # of 1 and 2; weights stay each worker's own
    one, two = (rows(tmp_path / str(workers) / "steps.csv") for workers in (1, 2))
    assert len(one) == len(two) == 10
    for a, b in zip(one, two):
        assert [float(x) for x in a.values()] == pytest.approx([float(x) for x in b.values()], rel=2e-3)
    assert float(one[0]["grad_norm"]) > 0.5  # so the clipping clipped
    one, two = (rows(tmp_path / str(workers) / "metrics.csv") for workers in (1, 2))
    for key in TOP:
        assert [row[key] for row in one] == [row[key] for row in two]
        assert float(one[0][key]) * 41 == pytest.approx(round(float(one[0][key]) * 41), abs=1e-6)
    one, two = (checkpoint(tmp_path / str(workers) / "resume.ckpt") for workers in (1, 2))
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=2e-4, err_msg=key)


def test_own_classes_from_a_checkpoint_with_others(place, trained, tmp_path):
    words = ["--output", tmp_path / "five", "--images", "4", "--classes", "5", "--size", "64"]
    done(run_script(ROOT / "utils/sample_imagenet.py", *words, cwd=tmp_path))
    broken = sorted((tmp_path / "five/train/2").iterdir())[0]
    broken.write_bytes(b"no image")
    own = [*SAMPLE, "--data_path", tmp_path / "five", "--pretrained", trained[0] / "ddrnet23.ckpt"]
    own += ["--output_dir", tmp_path / "o", "--batch_size", "8", "--epochs", "1", "--warmup_length", "0"]
    refused = one_line_error(small("train", *own, "--num_classes", "5"))
    assert f"--num_classes 5 contradicts {trained[0]}/ddrnet23.ckpt, which has 10; " in refused
    assert refused.endswith("for other classes, add --finetune to start with a new classifier")
    refused = one_line_error(small("train", *own))
    assert "has 5 classes, not 10; add --finetune to start with a new classifier for --num_classes 5, or" in refused
    assert "has 5 classes, not 10; set --num_classes 5" in one_line_error(small("train", *own, "--finetune"))
    words = [*own, "--num_classes", "5", "--finetune", "--base_lr", "0.0001", "--amp_level", "O2"]
    result = small("train", *words)
    assert "trained from nothing: linear.weight, linear.bias" in done(result)
    assert result.stderr.strip() == f"warning: {broken} cannot be read as an image; going on without it"
    assert "1 training images could not be read; others took their places" in result.stdout
    new, start = checkpoint(tmp_path / "o/ddrnet23.ckpt"), checkpoint(trained[0] / "ddrnet23.ckpt")
    assert new["linear.weight"].shape == (5, start["linear.weight"].shape[1])
    np.testing.assert_allclose(new["layer1.0.conv1.weight"], start["layer1.0.conv1.weight"], atol=1e-3)
    assert read_record(tmp_path / "o/ddrnet23.ckpt")["classes"] == list("01234")


@pytest.mark.full
def test_a_worker_that_dies_ends_the_training_with_its_rank(place, tmp_path):
    """A validation image that only one of the workers reads, with --strict."""
    shutil.copytree(place / "digits", tmp_path / "digits")
    broken = sorted((tmp_path / "digits/val/0").iterdir())[1]
    broken.write_bytes(b"no image")
    words = [*SAMPLE, *data(tmp_path), "--device_num", "2", "--device_target", "CPU", "--strict", "--batch_size", "20"]
    words += ["--output_dir", tmp_path / "o", "--epochs", "1", "--warmup_length", "0"]
    result = small("train", *words)
    assert result.returncode == 2, result.stdout + result.stderr
    last = result.stderr.strip().split("\n")[-1]
    assert last.startswith("error: worker_1 failed") and str(broken) in last


# ----- bad input -----


def test_bad_input_ends_with_one_line(place, trained, exported, tmp_path):
    """Each row: script, flags that are wrong, and what the error must speak of."""
    best = trained[0] / "ddrnet23.ckpt"
    (tmp_path / "truncated.ckpt").write_bytes(best.read_bytes()[:5000])
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    names = json.loads((ROOT / "tests/golden/drnet_predictor.json").read_text())
    drnet = [{"name": name, "data": Tensor(value(name, shape))} for name, shape in names]
    ms.save_checkpoint(drnet, str(tmp_path / "drnet.ckpt"))
    config = (FOLDER / SAMPLE[1]).read_text()
    (tmp_path / "typo.yaml").write_text(config.replace("cutmix:", "cut_mix:"))
    (tmp_path / "extra.yaml").write_text(config + "\nteacher: resnet\n")
    (tmp_path / "short.yaml").write_text(config.replace("mixup_mode: batch", ""))
    (tmp_path / "value.yaml").write_text(config.replace("beta: [ 0.9, 0.999 ]", "beta: [ 0.9, often ]"))
    shutil.copytree(place / "digits", tmp_path / "mixed")
    (tmp_path / "mixed/classes.txt").unlink()
    (tmp_path / "mixed/val/1").rename(tmp_path / "mixed/val/10")
    parameters = {name: p for name, p in ms.load_checkpoint(str(best)).items() if isinstance(p, ms.Parameter)}
    save_checkpoint(parameters.values(), tmp_path / "other.ckpt", {"classes": ["0", "one", *"23456789"]})
    for name, large in (("large", 3e38), ("inf", np.inf)):
        for head in ("linear.weight", "linear.bias"):
            parameters[head].set_data(Tensor(np.full(parameters[head].shape, large, np.float32)))
        save_checkpoint(parameters.values(), tmp_path / f"{name}.ckpt")
    for name in ("linear.weight", "linear.bias"):
        parameters[name] = ms.Parameter(Tensor(value(name, (5, *parameters[name].shape[1:]))), name=name)
    save_checkpoint(parameters.values(), tmp_path / "five.ckpt")
    mindir = exported[0] / "ddrnet23.mindir"
    manifest = json.loads(mindir.with_suffix(".json").read_text())
    cut = {"sha256": hashlib.sha256(b"\x12cut").hexdigest()}
    five = {**cut, "num_classes": 5, "class_names": None}
    for name, changes in (
        *(("cut", cut), ("five", five), ("air", {"format": "AIR"}), ("swapped", {}), ("other", {"model": "resnest50"})),
        ("strange", {**cut, "num_classes": "ten", "class_names": None}),
    ):
        (tmp_path / f"{name}.mindir").write_bytes(b"\x12cut")
        (tmp_path / f"{name}.json").write_text(json.dumps({**manifest, **changes}))
    del manifest["preprocess"]["crop_pct"]
    (tmp_path / "old.mindir").write_bytes(b"\x12cut")
    (tmp_path / "old.json").write_text(json.dumps(manifest))
    cases = [
        ("eval", ["--data_path", tmp_path / "none"], "no folder"),
        ("eval", ["--num_classes", "1000"], f"--num_classes 1000 contradicts {best}, which has 10; leave it out"),
        ("eval", ["--image_size", "96"], f"--image_size 96 contradicts {best}, which has 64; leave it out"),
        ("eval", ["--crop_pct", "0.875"], f"--crop_pct 0.875 contradicts {best}, which has 1.0; leave it out"),
        (
            "eval",
            ["--pretrained", exported[0] / "ddrnet23.mindir", "--image_size", "96"],
            "ddrnet23.mindir, which has 64",
        ),
        ("eval", ["--pretrained", tmp_path / "none.ckpt"], "no checkpoint at"),
        (
            "eval",
            ["--pretrained", tmp_path / "drnet.ckpt"],
            "looks like a DRNet predictor; give the file of",
        ),
        ("eval", ["--pretrained", trained[0] / "resume.ckpt"], "looks like a training state"),
        ("eval", ["--pretrained", tmp_path / "truncated.ckpt"], "truncated"),
        ("eval", ["--pretrained", tmp_path / "junk.ckpt"], "cannot be read"),
        (
            "eval",
            ["--pretrained", tmp_path / "five.ckpt"],
            "has 10 classes, not 5; give a checkpoint of 10 classes",
        ),
        ("eval", ["--pretrained", tmp_path / "none.mindir"], "no file"),
        ("eval", ["--pretrained", "none"], "needs a checkpoint"),
        ("eval", ["--pretrained", "a", "--ckpt_path", "b"], "one setting with two values"),
        ("eval", ["--download"], "nothing to get"),
        ("eval", ["--image_size", "0"], "0 is not a whole number from 1"),
        ("eval", ["--set", "CIFAR10"], "invalid choice"),
        ("eval", ["--arch", "DDRNet39"], "invalid choice"),
        ("eval", ["--device_id", "-1"], "-1 is not a whole number"),
        (
            "eval",
            ["--config_path", tmp_path / "typo.yaml", "--ddr_config", tmp_path / "typo.yaml"],
            "cut_mix; did you mean cutmix?",
        ),
        ("train", ["--config_path", tmp_path / "extra.yaml"], "unknown key teacher"),
        ("train", ["--config_path", tmp_path / "short.yaml"], "lacks the key mixup_mode"),
        ("train", ["--config_path", tmp_path / "value.yaml"], "beta: often is not a number"),
        ("train", ["--mixup_mode", "pair", "--batch_size", "7"], "needs an even batch, not 7"),
        ("train", ["--auto_augment", "rand-q9"], "q9"),
        ("train", ["--batch_size", "64"], "set --batch_size lower"),
        ("train", ["--batch_size", "1"], "at least 2"),
        ("train", ["--batch_size", "8", "--warmup_length", "9"], "longer than --epochs"),
        ("train", ["--finetune"], "--finetune starts from a checkpoint"),
        ("train", ["--beta", "0.9"], "--beta takes two numbers"),
        ("train", ["--num_classes", "1000"], "has 10 classes, not 1000; set --num_classes 10"),
        ("train", ["--pretrained", tmp_path / "five.ckpt"], "has 10 classes, not 5; add --finetune to start"),
        ("train", ["--run_modelarts"], "needs --train_url"),
        ("train", ["--run_modelarts", "--train_url", "obs://x"], "moxing"),
        ("train", ["--device_num", "2", "--rank_table_file", tmp_path / "no.json"], "cannot read the rank table"),
        ("train", ["--rank_table_file", tmp_path / "no.json"], "rank table"),
        ("train", ["--device_num", "2", "--device_id", "1"], "--device_id is for one device"),
        ("train", ["--data_path", place / "digits/train"], "has no train/"),
        ("train", ["--data_path", tmp_path / "mixed"], "label 1 is 1 in"),
        ("train", ["--seed", "5000000000"], "--seed"),
        ("train", ["--num_workers", "9999"], "set --num_workers to"),
        ("train", ["--output_dir", tmp_path / "junk.ckpt"], "cannot write to"),
        ("eval", ["--output_dir", tmp_path / "junk.ckpt"], "cannot write to"),
        ("eval", ["--predictions", tmp_path / "junk.ckpt/p.csv"], "cannot write to"),
        ("eval", ["--pretrained", tmp_path / "other.ckpt"], "label 1 is one in"),
        ("eval", ["--pretrained", tmp_path / "five.mindir"], "has 10 classes, not 5; give a checkpoint of 10 classes"),
        ("eval", ["--pretrained", tmp_path / "air.mindir"], "is of a later export, to AIR"),
        ("eval", ["--pretrained", tmp_path / "swapped.mindir"], "swapped.mindir is damaged or not the file that"),
        ("eval", ["--pretrained", tmp_path / "other.mindir"], "other.json is of resnest50, not of DDRNet23"),
        ("eval", ["--pretrained", tmp_path / "strange.mindir"], "tells no usable num_classes: ten is not a whole"),
        ("eval", ["--pretrained", tmp_path / "inf.ckpt"], "linear.weight holds values that are not finite"),
        ("export", ["--pretrained", tmp_path / "inf.ckpt"], "linear.weight holds values that are not finite"),
        ("eval", ["--pretrained", tmp_path / "old.mindir"], "old.json is not a manifest of export.py"),
        ("train", ["--resume", tmp_path / "none.ckpt"], "no checkpoint at"),
        ("train", ["--resume", best], f"{best} is no training state; --resume takes the resume.ckpt"),
        ("export", ["--num_classes", "5"], f"--num_classes 5 contradicts {best}, which has 10; leave it out"),
        ("export", ["--num_workers", "2"], "unrecognized arguments"),
    ]
    later = [  # with a device at hand
        ("eval", ["--pretrained", best], "does not hold a DDRNet-23 but looks like"),
        ("eval", ["--pretrained", tmp_path / "cut.mindir"], "cannot be read as a MINDIR"),
    ]
    if not ms.hal.is_available("GPU"):
        later.append(("eval", ["--device_target", "GPU"], "no GPU that MindSpore can use"))
    if not ms.hal.is_available("Ascend"):
        later.append(("export", ["--file_format", "AIR"], "on Ascend only; use --file_format MINDIR here"))
    usual = {"--config_path": SAMPLE[1], "--output_dir": tmp_path / "out"}

    def flags(script: str, words: list) -> list[str]:
        flags = {**usual, **({"--data_path": place / "digits"} if script != "export" else {})}
        flags |= {"--batch_size": "8", "--epochs": "1"} if script == "train" else {"--pretrained": best}
        return [str(word) for pair in flags.items() if pair[0] not in words for word in pair] + [*map(str, words)]

    (tmp_path / "rows.json").write_text(json.dumps([[script, flags(script, words)] for script, words, _ in cases]))
    outcomes = json.loads(done(run_script(ROOT / "tests/ddrnet/bad_rows.py", tmp_path / "rows.json", cwd=FOLDER)))
    for (script, words, wanted), (status, stderr) in zip(cases, outcomes, strict=True):
        line = one_line_error(subprocess.CompletedProcess(words, status, "", stderr))
        assert wanted in line, (script, words, line)
    for script, words, wanted in later:
        assert wanted in one_line_error(run_script(f"{script}.py", *flags(script, words), cwd=FOLDER))
    words = [*SAMPLE, *data(place), "--output_dir", tmp_path / "out", "--pretrained", tmp_path / "large.ckpt"]
    assert "returns NaN or infinity" in one_line_error(small("eval", *words))
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_the_documented_configs_hold_the_documented_values():
    import yaml

    wanted = {
        **{"arch": "DDRNet23", "data_url": "./data/imagenet", "set": "ImageNet", "num_classes": 1000, "mix_up": 0.8},
        **{"cutmix": 1.0, "color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"},
        **{"re_prob": 0.25, "re_mode": "pixel", "re_count": 1, "mixup_prob": 1.0, "switch_prob": 0.5},
        **{"mixup_mode": "batch", "mixup_off_epoch": 0, "image_size": 224, "crop_pct": 0.875, "optimizer": "momentum"},
        **{"use_nesterov": True, "base_lr": 0.1, "warmup_lr": 1e-6, "min_lr": 1e-5, "lr_scheduler": "cosine_lr"},
        **{"warmup_length": 10, "lr_adjust": 30, "amp_level": "O2", "keep_bn_fp32": True, "beta": [0.9, 0.999]},
        **{"clip_global_norm_value": 5, "clip_global_norm": True, "is_dynamic_loss_scale": True, "epochs": 300},
        **{"label_smoothing": 0.1, "loss_scale": 1024, "weight_decay": 1e-4, "decay": 0.9, "momentum": 0.9},
        **{"batch_size": 512, "num_parallel_workers": 16, "device_target": "Ascend", "drop_path_rate": 0.1},
    }
    for device, batch in (("Ascend", 512), ("GPU", 256)):
        path = FOLDER / "src/configs" / f"ddrnet23_imagenet_{device.lower()}.yaml"
        found = yaml.safe_load(path.read_text())
        assert {key: found[key] for key in wanted} == {**wanted, "batch_size": batch, "device_target": device}


def test_help_explains_every_flag():
    for script in ("train", "eval", "export"):
        text = run_script(f"{script}.py", "--help", cwd=FOLDER).stdout
        for flag in ("--config_path", "--ddr_config", "--device_target", "--device_id", "--batch_size", "--output_dir"):
            assert flag in text
        assert text.count("(default: ") >= 9
