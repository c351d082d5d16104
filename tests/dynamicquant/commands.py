"""What the tests of the commands share."""

import csv
import re
from pathlib import Path
from subprocess import CompletedProcess

import mindspore as ms
import numpy as np
from conftest import ROOT, run_script

FOLDER = ROOT / "DynamicQuant"
SMALL = ROOT / "tests/dynamicquant/small_network.py"
SAMPLE = ["--config_path", "config/resnet18_sample_config.yaml"]
CLASSES = [str(digit) for digit in range(10)]
SIZES = {"num_classes": 10, "image_size": 32}


def digits(base: Path) -> Path:
    """The digits with 40 images in each split, in a folder with a space in its name; made once in `base`."""
    place = base / "a place" / "digits"
    if not place.exists():
        words = ["--output", place, "--images", "4"]
        assert run_script(ROOT / "utils/sample_imagenet.py", *words, cwd=base).returncode == 0
    return place


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(path: Path) -> dict[str, np.ndarray]:
    return {name: p.asnumpy() for name, p in ms.load_checkpoint(str(path)).items() if isinstance(p, ms.Parameter)}


def accuracy(output: str, path: Path) -> float:
    """That of the documented line."""
    found = re.search(r"^result: \{'acc': ([01]\.\d{4})\} ckpt= (.*)$", output, re.M)
    assert found and found[2] == str(path), output
    return float(found[1])


def command(script: str, form: str | None, *flags) -> list:
    """A command with the settings of the sample and the small network in that form (`small_network.py`), or None."""
    return [*([f"{script}.py"] if form is None else [SMALL, script, form]), *SAMPLE, *flags]


def training(stage: str, form: str | None, data: Path, output: Path, *flags) -> list:
    """A command that trains for one epoch of five steps."""
    given = ["--stage", stage, "--data_path", data, "--output_dir", output, "--device_target", "CPU"]
    given += ["--even_epochs", "0"] if stage == "quantize" else []
    given += ["--batch_size", "8", "--warmup_epochs", "0", "--epochs", "1"]
    return command("train", form, *given, *flags)


def run(words: list) -> CompletedProcess:
    return run_script(*words, cwd=FOLDER)


def succeeded(words: list) -> str:
    """Run a command that must succeed without a word on stderr; returns its output."""
    result = run(words)
    assert result.returncode == 0 and not result.stderr, result.stdout + result.stderr
    return result.stdout
