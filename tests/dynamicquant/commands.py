"""What the tests of the commands share."""

import csv
import re
from pathlib import Path
from subprocess import CompletedProcess

import mindspore as ms
import numpy as np
from conftest import ROOT, run_script

FOLDER = ROOT / "DynamicQuant"
SAMPLE = ["--config_path", "config/resnet18_sample_config.yaml"]
CLASSES = tuple(str(digit) for digit in range(10))
SIZES = {"num_classes": 10, "image_size": 32}


def digits(place: Path) -> Path:
    """The digits with 40 images in each split, in `place`."""
    words = ["--output", place / "digits", "--images", "4"]
    assert run_script(ROOT / "utils/sample_imagenet.py", *words, cwd=place).returncode == 0
    return place / "digits"


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(path: Path) -> dict[str, np.ndarray]:
    return {name: p.asnumpy() for name, p in ms.load_checkpoint(str(path)).items() if isinstance(p, ms.Parameter)}


def evaluate(place: Path, *words) -> CompletedProcess:
    """Run eval.py on the digits and the checkpoint dynamic.ckpt in `place`, unless `words` name others."""
    flags = [*SAMPLE, "--output_dir", place / "out"]
    flags += [] if "--dataset_path" in words else ["--data_path", place / "digits"]
    flags += [] if "--ckpt_path" in words else ["--ckpt_path", place / "dynamic.ckpt"]
    return run_script("eval.py", *flags, *words, cwd=FOLDER)


def accuracy(output: str, path: Path) -> float:
    """That of the documented line."""
    found = re.search(r"^result: \{'acc': ([01]\.\d{4})\} ckpt= (.*)$", output, re.M)
    assert found and found[2] == str(path), output
    return float(found[1])


def train(stage: str, data: Path, output: Path, *words) -> list:
    """A command that trains for one epoch of five steps."""
    flags = ["--stage", stage, *SAMPLE, "--data_path", data, "--output_dir", output, "--device_target", "CPU"]
    flags += ["--even_epochs", "0"] if stage == "quantize" else []
    return ["train.py", *flags, "--batch_size", "8", "--warmup_epochs", "0", "--epochs", "1", *words]
