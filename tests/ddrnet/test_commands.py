"""train.py, eval.py and export.py, run as a user runs them, with good and with bad input."""

import csv
import hashlib
import json
import re
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT, one_line_error, run_script, stop_training
from golden.recipe import value
from mindspore import Tensor, nn
from PIL import Image

FOLDER = ROOT / "DDRNet"
SAMPLE = ["--config_path", "src/configs/ddrnet23_sample_cpu.yaml"]


def save(path: Path, classes: int = 10) -> Path:
    """A checkpoint with the published names and weights from the recipe."""
    rows = []
    for name, shape in json.loads((ROOT / "tests/golden/ddrnet23_parameters.json").read_text()):
        if name.startswith("linear"):
            shape = [classes, *shape[1:]]
        rows.append({"name": name, "data": Tensor(value(name, shape))})
    ms.save_checkpoint(rows, str(path))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a space in its name, a sample of the digits with 40 and 41 images, and an untrained checkpoint."""
    place = tmp_path_factory.mktemp("ddrnet") / "a place"
    place.mkdir()
    words = ["--output", place / "digits", "--images", "4", "--size", "64"]
    assert run_script(ROOT / "utils/sample_imagenet.py", *words, cwd=place).returncode == 0
    first = sorted((place / "digits/val/0").iterdir())[0]
    shutil.copy(first, first.with_name("extra.JPEG"))
    save(place / "ddrnet23.ckpt")
    return place


def evaluate(place, *words, **options):
    flags = [*SAMPLE, "--data_path", place / "digits", "--pretrained", place / "ddrnet23.ckpt"]
    return run_script("eval.py", *flags, "--output_dir", place / "out", *words, cwd=FOLDER, **options)


def train(place, output, *words):
    flags = [*SAMPLE, "--data_path", place / "digits", "--output_dir", output]
    return ["train.py", *flags, "--batch_size", "8", "--warmup_length", "0", "--epochs", "1", *words]


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(path: Path) -> dict:
    return {name: p.asnumpy() for name, p in ms.load_checkpoint(str(path)).items() if isinstance(p, ms.Parameter)}


def test_eval_counts_every_image_and_survives_a_corrupt_file(place):
    broken = place / "digits/val/3/a_broken.JPEG"
    broken.write_bytes(b"\xff\xd8 no image")
    try:
        result = evaluate(place, "--predictions", place / "p.csv", "--batch_size", "9")
        strict = evaluate(place, "--strict")
    finally:
        broken.unlink()
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == f"warning: {broken} cannot be read as an image; going on without it"
    assert "1 of 42 images could not be read and were left out" in result.stdout
    line = re.search(
        r"^result: \{'Loss': (\S+), 'Top1-Acc': (\S+), 'Top5-Acc': (\S+)\} ckpt= (.*)$", result.stdout, re.M
    )
    assert line and line[4] == str(place / "ddrnet23.ckpt")
    predictions = rows(place / "p.csv")
    assert list(predictions[0]) == ["path", "label", "prediction"] and len(predictions) == 41
    hits = sum(row["label"] == row["prediction"] for row in predictions)
    assert float(line[2]) == pytest.approx(hits / 41, abs=1e-5)
    report = json.loads((place / "out/results.json").read_text())
    assert report["Loss"] == pytest.approx(float(line[1]), abs=1e-5) and report["images"] == 41
    assert report["Top5-Acc"] == pytest.approx(float(line[3]), abs=1e-5) and report["left_out"] == 1
    assert str(broken) in one_line_error(strict)


def test_evaluation_over_two_devices_is_that_of_one(place):
    one = evaluate(place, "--predictions", place / "one.csv", "--batch_size", "16")
    two = evaluate(
        place,
        *("--predictions", place / "two.csv", "--batch_size", "16", "--device_num", "2"),
        *("--device_target", "CPU", "--output_dir", place / "o two"),
    )
    assert one.returncode == two.returncode == 0, two.stderr
    assert "41 images, CPU x 2" in two.stdout
    line = [re.search(r"'Loss': ([\d.]+), (.*)} ckpt", result.stdout).groups() for result in (one, two)]
    assert float(line[0][0]) == pytest.approx(float(line[1][0]), abs=2e-5) and line[0][1] == line[1][1]
    assert (place / "one.csv").read_text() == (place / "two.csv").read_text()


@pytest.mark.parametrize("batch_size", [0, 3])
def test_the_exported_file_predicts_the_same_and_the_manifest_says_how(place, tmp_path, batch_size):
    words = ["--pretrained", place / "ddrnet23.ckpt", "--output_dir", tmp_path / "an export"]
    words += ["--ddr_config", "src/configs/ddrnet23_sample_cpu.yaml", "--batch_size", batch_size]
    result = run_script("export.py", *words, "--device_target", "CPU", cwd=FOLDER)
    assert result.returncode == 0, result.stderr
    assert "differs from the live network by at most" in result.stdout
    file = tmp_path / "an export/ddrnet23.mindir"
    live, loaded = (
        evaluate(place, "--pretrained", pretrained, "--predictions", tmp_path / f"{k}.csv", "--output_dir", tmp_path)
        for k, pretrained in enumerate((place / "ddrnet23.ckpt", file))
    )
    assert live.returncode == loaded.returncode == 0, loaded.stderr
    assert (tmp_path / "0.csv").read_text() == (tmp_path / "1.csv").read_text()
    manifest = json.loads((tmp_path / "an export/ddrnet23.json").read_text())
    assert manifest["input"]["shape"] == [batch_size, 3, 64, 64] and manifest["class_names"] is None
    network, steps = nn.GraphCell(ms.load(str(file.with_name(manifest["file"])))), manifest["preprocess"]
    for row in rows(tmp_path / "1.csv")[::9]:
        image = Image.open(row["path"]).convert("RGB").resize(steps["resize"], Image.Resampling.BICUBIC)
        assert steps["center_crop"] == steps["resize"][0] == 64
        x = (np.asarray(image, np.float64) / steps["divide_by"] - steps["mean"]) / steps["std"]
        x = np.stack([x.transpose(2, 0, 1).astype(np.float32)] * (batch_size or 1))
        assert int(network(Tensor(x)).asnumpy()[0].argmax()) == int(row["prediction"])


def test_export_refuses_what_it_cannot_do(place, tmp_path):
    words = [*SAMPLE, "--pretrained", place / "ddrnet23.ckpt", "--output_dir", tmp_path / "e", "--file_format", "AIR"]
    if not ms.hal.is_available("Ascend"):
        assert "Ascend" in one_line_error(run_script("export.py", *words, cwd=FOLDER))
    assert not (tmp_path / "e").exists()


def test_a_training_stopped_in_mid_epoch_resumes_to_the_same_loss_curve(place, tmp_path):
    """Four epochs straight against two plus a resume in mid-epoch; augmentation, Mixup and drop path are on."""
    words = ["--epochs", "4", "--drop_path_rate", "0.2", "--re_prob", "0.25", "--cutmix", "1.0", "--num_workers", "1"]
    words += ["--loss_scale", "1e39"]  # beyond float32: two steps overflow, and the scale is something to restore
    straight = run_script(*train(place, tmp_path / "straight", *words), cwd=FOLDER)
    assert straight.returncode == 0, straight.stdout + straight.stderr
    # The first stop comes between two epochs or early in the third one, the second one in mid-epoch: while the first
    # step compiles it is only noted, for the end of that step.
    state = tmp_path / "stopped/resume.ckpt"
    output = stop_training(train(place, tmp_path / "stopped", *words), "epoch 2/4: loss", 0, FOLDER)
    assert f"--resume {state}" in output
    command = train(place, tmp_path / "stopped", *words, "--resume", state)
    output = stop_training(command, "epoch 2/4: loss", 2, FOLDER)  # whose evaluation comes again
    stop = re.search(r"stopped after step ([1-5]) of epoch 3; go on with --resume (.*)", output)
    assert stop and stop[2] == str(state), output
    done = rows(tmp_path / "stopped/steps.csv")
    assert (done[-1]["epoch"], done[-1]["step"]) == ("3", stop[1])

    other = run_script(*train(place, tmp_path / "x", *words, "--resume", state, "--base_lr", "0.3"), cwd=FOLDER)
    assert "base_lr 0.2 (now 0.3)" in one_line_error(other)
    swapped = run_script(*train(place, tmp_path / "x", "--resume", place / "ddrnet23.ckpt"), cwd=FOLDER)
    assert "no training state" in one_line_error(swapped)

    resumed = run_script(*train(place, tmp_path / "resumed", *words, "--resume", state), cwd=FOLDER)
    assert resumed.returncode == 0, resumed.stderr
    one, two = (rows(tmp_path / run / "steps.csv") for run in ("straight", "resumed"))
    assert len(one) == len(two) == 20
    assert one[0]["overflow"] == "1" and float(one[11]["loss_scale"]) < 1e39 and one[11]["overflow"] == "0"
    for a, b in zip(one, two):
        wanted = pytest.approx([float(x) for x in b.values()], rel=1e-5, abs=1e-5, nan_ok=True)
        assert [float(x) for x in a.values()] == wanted
    assert float(one[-1]["grad_norm"]) > 0.1
    one, two = (rows(tmp_path / run / "metrics.csv") for run in ("straight", "resumed"))
    assert [row["top1"] for row in one] == [row["top1"] for row in two] and len(one) == 4
    one, two = (checkpoint(tmp_path / run / "resume.ckpt") for run in ("straight", "resumed"))
    assert set(one) == set(two)
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=1e-5, err_msg=key)
    names = [set(path.name for path in (tmp_path / run).iterdir()) for run in ("straight", "resumed")]
    assert names[0] == names[1] and "ddrnet23.ckpt" in names[1]
    for run in ("straight", "resumed"):
        assert (tmp_path / run / "training.png").read_bytes().startswith(b"\x89PNG")
        best = json.loads((tmp_path / run / "results.json").read_text())["best"]
        assert best["top1"] == max(float(row["top1"]) for row in rows(tmp_path / run / "metrics.csv"))
    report = evaluate(place, "--pretrained", tmp_path / "straight/ddrnet23.ckpt", "--output_dir", tmp_path / "e")
    assert f"'Top1-Acc': {round(best['top1'], 5)}" in report.stdout
    assert ms.load_checkpoint(str(tmp_path / "straight/ddrnet23.ckpt"))["classes"] == json.dumps(list("0123456789"))


def test_two_workers_follow_one_with_twice_the_batch(place, tmp_path):
    """Step k sees the same images, their gradients are averaged and clipped together; BNs are frozen."""
    plain = ["--auto_augment", "none", "--color_jitter", "0", "--crop_scale", "1", "1", "--crop_ratio", "1", "1"]
    plain += ["--mix_up", "0", "--cutmix", "0", "--clip_global_norm_value", "0.5", "--epochs", "2"]
    plain += ["--device_target", "CPU", "--warmup_length", "0", "--data_path", place / "digits", *SAMPLE]
    for workers, batch in ((1, 8), (2, 4)):
        words = [workers, *plain, "--batch_size", batch, "--output_dir", tmp_path / str(workers)]
        result = run_script(ROOT / "tests/ddrnet/two_workers.py", *words, cwd=FOLDER)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "CPU x 2, 40 training and 41 validation images" in result.stdout and "[INFO]" not in result.stdout
    assert "mean, variance, gamma: [1.5, 1.5, 1.0]" in result.stdout  # of 1 and 2; weights stay each worker's own
    one, two = (rows(tmp_path / str(workers) / "steps.csv") for workers in (1, 2))
    assert len(one) == len(two) == 10
    for a, b in zip(one, two):
        assert [float(x) for x in a.values()] == pytest.approx([float(x) for x in b.values()], rel=2e-3)
    assert float(one[0]["grad_norm"]) > 0.5  # so the clipping clipped
    one, two = (rows(tmp_path / str(workers) / "metrics.csv") for workers in (1, 2))
    for key in ("top1", "top5"):
        assert [row[key] for row in one] == [row[key] for row in two]
        assert float(one[0][key]) * 41 == pytest.approx(round(float(one[0][key]) * 41), abs=1e-6)
    one, two = (checkpoint(tmp_path / str(workers) / "resume.ckpt") for workers in (1, 2))
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=2e-4, err_msg=key)


def test_own_classes_from_a_checkpoint_with_others(place, tmp_path):
    words = ["--output", tmp_path / "five", "--images", "4", "--classes", "5", "--size", "64"]
    assert run_script(ROOT / "utils/sample_imagenet.py", *words, cwd=tmp_path).returncode == 0
    broken = sorted((tmp_path / "five/train/2").iterdir())[0]
    broken.write_bytes(b"no image")
    own = ["--data_path", tmp_path / "five", "--num_classes", "5", "--pretrained", place / "ddrnet23.ckpt"]
    refused = run_script(*train(place, tmp_path / "o", *own), cwd=FOLDER)
    assert "set --num_classes 10, or, in training, --finetune" in one_line_error(refused)
    words = [*own, "--finetune", "--base_lr", "0.0001", "--amp_level", "O2"]
    result = run_script(*train(place, tmp_path / "o", *words), cwd=FOLDER)
    assert result.returncode == 0, result.stderr
    assert "trained from nothing: linear.weight, linear.bias" in result.stdout
    assert result.stderr.strip() == f"warning: {broken} cannot be read as an image; going on without it"
    assert "1 training images could not be read; others took their places" in result.stdout
    trained, start = checkpoint(tmp_path / "o/ddrnet23.ckpt"), checkpoint(place / "ddrnet23.ckpt")
    assert trained["linear.weight"].shape == (5, 2048)
    np.testing.assert_allclose(trained["layer1.0.conv1.weight"], start["layer1.0.conv1.weight"], atol=1e-3)


def test_a_worker_that_dies_ends_the_training_with_its_rank(place, tmp_path):
    """A validation image that only one of the workers reads, with --strict."""
    data = tmp_path / "data"
    shutil.copytree(place / "digits", data)
    broken = sorted((data / "val/0").iterdir())[1]
    broken.write_bytes(b"no image")
    words = ["--data_path", data, "--device_num", "2", "--device_target", "CPU", "--strict", "--batch_size", "20"]
    result = run_script(*train(place, tmp_path / "o", *words), cwd=FOLDER)
    assert result.returncode == 2
    last = result.stderr.strip().split("\n")[-1]
    assert last.startswith("error: worker_1 failed") and str(broken) in last


def test_download_fetches_and_checks(place, tmp_path):
    source = place / "ddrnet23.ckpt"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    words = ["--download", "--checkpoint_url", source.as_uri(), "--checkpoint_sha256"]
    result = evaluate(place, *words, digest, "--pretrained", tmp_path / "got/it.ckpt")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "got/it.ckpt").read_bytes() == source.read_bytes()
    one_line_error(evaluate(place, *words, "0" * 64, "--pretrained", tmp_path / "other.ckpt"))
    assert not (tmp_path / "other.ckpt").exists()


def test_bad_input_ends_with_one_line(place, tmp_path):
    """Each row: script, flags that are wrong, and what the error must speak of."""
    good = (place / "ddrnet23.ckpt").read_bytes()
    (tmp_path / "truncated.ckpt").write_bytes(good[:100000])
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    save(tmp_path / "five.ckpt", 5)
    names = json.loads((ROOT / "tests/golden/drnet_predictor.json").read_text())
    drnet = [{"name": name, "data": Tensor(value(name, shape))} for name, shape in names]
    ms.save_checkpoint(drnet, str(tmp_path / "drnet.ckpt"))
    config = (FOLDER / "src/configs/ddrnet23_sample_cpu.yaml").read_text()
    (tmp_path / "typo.yaml").write_text(config.replace("cutmix:", "cut_mix:"))
    (tmp_path / "extra.yaml").write_text(config + "\nteacher: resnet\n")
    (tmp_path / "short.yaml").write_text(config.replace("mixup_mode: batch", ""))
    (tmp_path / "value.yaml").write_text(config.replace("beta: [ 0.9, 0.999 ]", "beta: [ 0.9, often ]"))
    shutil.copytree(place / "digits", tmp_path / "mixed")
    (tmp_path / "mixed/classes.txt").unlink()
    (tmp_path / "mixed/val/1").rename(tmp_path / "mixed/val/10")
    rows = [{"name": p.name, "data": p} for p in ms.load_checkpoint(str(place / "ddrnet23.ckpt")).values()]
    names = json.dumps(["0", "one", *"23456789"])
    ms.save_checkpoint(rows, str(tmp_path / "other.ckpt"), append_dict={"classes": names})
    rows[-1]["data"] = Tensor(np.full(10, np.inf, np.float32))
    ms.save_checkpoint(rows, str(tmp_path / "inf.ckpt"))
    for name, classes in (("cut", 10), ("five", 5)):
        (tmp_path / f"{name}.mindir").write_bytes(b"\x12cut")
        manifest = {"input": {"shape": [1, 3, 64, 64]}, "preprocess": {"resize": [64, 64]}, "class_names": None}
        (tmp_path / f"{name}.json").write_text(json.dumps({**manifest, "num_classes": classes}))
    cases = [
        ("eval", ["--data_path", tmp_path / "none"], "no folder"),
        ("eval", ["--num_classes", "1000"], "set --num_classes 10"),
        ("eval", ["--pretrained", tmp_path / "none.ckpt"], "no checkpoint at"),
        ("eval", ["--pretrained", tmp_path / "drnet.ckpt"], "looks like a DRNet"),
        ("eval", ["--pretrained", tmp_path / "truncated.ckpt"], "truncated"),
        ("eval", ["--pretrained", tmp_path / "junk.ckpt"], "cannot be read"),
        ("eval", ["--pretrained", tmp_path / "five.ckpt"], "set --num_classes 5"),
        ("eval", ["--pretrained", tmp_path / "none.mindir"], "no file"),
        ("eval", ["--pretrained", "none"], "needs a checkpoint"),
        ("eval", ["--pretrained", "a", "--ckpt_path", "b"], "one setting with two values"),
        ("eval", ["--download"], "nothing to get"),
        ("eval", ["--image_size", "100"], "a multiple of 32 from 64 up"),
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
        ("train", ["--pretrained", tmp_path / "five.ckpt"], "--finetune to start with a new head"),
        ("train", ["--run_modelarts"], "needs --train_url"),
        ("train", ["--run_modelarts", "--train_url", "obs://x"], "moxing"),
        ("train", ["--device_num", "2", "--rank_table_file", tmp_path / "no.json"], "rank table"),
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
        ("eval", ["--pretrained", tmp_path / "cut.mindir"], "cannot be read as a MINDIR"),
        ("eval", ["--pretrained", tmp_path / "five.mindir"], "was exported for num_classes 5"),
        ("eval", ["--pretrained", tmp_path / "inf.ckpt"], "NaN or infinity"),
        ("train", ["--resume", tmp_path / "none.ckpt"], "no checkpoint at"),
        ("export", ["--pretrained", tmp_path / "five.ckpt"], "set --num_classes 5"),
        ("export", ["--num_workers", "2"], "unrecognized arguments"),
    ]
    if not ms.hal.is_available("GPU"):
        cases.append(("eval", ["--device_target", "GPU"], "no GPU that MindSpore can use"))
    common = [*SAMPLE, "--output_dir", tmp_path / "out"]
    data = ["--data_path", place / "digits"]
    for script, words, wanted in cases:
        flags = [*common, *(data if script != "export" else [])]
        if script == "train":
            flags += ["--batch_size", "8", "--epochs", "1"]
        elif "--pretrained" not in words:
            flags += ["--pretrained", place / "ddrnet23.ckpt"]
        if "--config_path" in words:
            flags = [word for word in flags if word not in SAMPLE]
        if "--data_path" in words:
            flags = [word for word in flags if word not in data]
        if "--output_dir" in words:
            flags = [word for word in flags if word not in common[-2:]]
        line = one_line_error(run_script(f"{script}.py", *flags, *words, cwd=FOLDER))
        assert wanted in line, (script, words, line)
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


def test_float16_on_a_cpu_only_if_insisted(place, tmp_path):
    result = evaluate(place, "--amp_level", "O2")
    assert result.returncode == 0 and "insists" not in result.stdout, result.stderr
    config = (FOLDER / "src/configs/ddrnet23_sample_cpu.yaml").read_text()
    (tmp_path / "o2.yaml").write_text(config.replace("amp_level: O0", "amp_level: O2"))
    words = ["--data_path", place / "digits", "--pretrained", place / "ddrnet23.ckpt", "--output_dir", tmp_path]
    result = run_script("eval.py", "--config_path", tmp_path / "o2.yaml", *words, "--device_target", "CPU", cwd=FOLDER)
    assert "amp_level O0 instead of O2" in result.stdout


def test_help_explains_every_flag():
    for script in ("train", "eval", "export"):
        text = run_script(f"{script}.py", "--help", cwd=FOLDER).stdout
        for flag in ("--config_path", "--ddr_config", "--device_target", "--device_id", "--batch_size", "--output_dir"):
            assert flag in text
        assert text.count("(default: ") >= 9
