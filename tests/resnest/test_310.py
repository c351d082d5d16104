"""preprocess.py, postprocess.py and run_infer_310.sh of ResNeSt: what is not DDRNet's, which tests/ddrnet tests."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, one_line_error, run_script
from sklearn.metrics import top_k_accuracy_score

sys.path.insert(0, str(ROOT / "tests" / "resnest"))
from program_310 import CLASSES, logits_of, write_results

FOLDER = ROOT / "ResNeSt"
SIDES = {"resnest50": (256, 224), "resnest101": (256, 256), "resnest200": (320, 320), "resnest269": (416, 416)}
# As the document prints them.
LINES = """
after allreduce eval: top1_correct=40560, tot=50000, acc=81.12%
after allreduce eval: top5_correct=47792, tot=50000, acc=95.58%
after allreduce eval: top1_correct=41330, tot=50000, acc=82.66%
after allreduce eval: top5_correct=48151, tot=50000, acc=96.30%
after allreduce eval: top1_correct=42082, tot=50000, acc=84.16%
after allreduce eval: top5_correct=48469, tot=50000, acc=96.94%
after allreduce eval: top1_correct=42288, tot=50000, acc=84.58%
after allreduce eval: top5_correct=48562, tot=50000, acc=97.12%
""".strip().split("\n")
EACH = 3


@pytest.fixture
def place(tmp_path):
    """A folder with a space in its name: a model, an ImageNet root of empty images, and a program for the 310's."""
    place = tmp_path / "a place"
    for label in range(CLASSES):
        folder = place / "image net" / "val" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for k in range(EACH):
            (folder / f"image_{label}_{k}.JPEG").write_bytes(b"")
    (place / "a model.mindir").write_text("a model")
    program = ROOT / "tests" / "resnest" / "program_310.py"
    (place / "program").write_text(f"#!{sys.executable}\n{program.read_text()}")
    (place / "program").chmod(0o755)
    return place


def images(place) -> list:
    return sorted((place / "image net" / "val").glob("*/*"))


def document(paths) -> str:
    """What scikit-learn makes of it, in the form that the document prints."""
    labels = [int(path.parent.name[1:]) for path in paths]
    logits = np.stack([logits_of(path) for path in paths])
    lines = ""
    for k in (1, 5):
        correct = top_k_accuracy_score(labels, logits, k=k, labels=range(CLASSES), normalize=False)
        share = round(100 * correct / len(paths), 2)
        lines += f"after allreduce eval: top{k}_correct={int(correct)}, tot={len(paths)}, acc={share:.2f}%\n"
    return lines


# ----- preprocess.py and postprocess.py -----


def test_lines_of_the_document():
    figures = [tuple(map(int, re.findall(r"(\d+)(?=_correct|,)", line))) for line in LINES]
    code = f"import postprocess\nfor figures in {figures}: print(postprocess.line(*figures))"
    assert run_script("-c", code, cwd=FOLDER).stdout.splitlines() == LINES


def test_labels_and_accuracy(place):
    assert run_script(FOLDER / "preprocess.py", "--data_path", "image net", cwd=place).returncode == 0
    labels = json.loads((place / "imagenet_label.json").read_text())
    assert len(labels.pop("/classes")) == CLASSES
    assert labels == {path.stem: int(path.parent.name[1:]) for path in images(place)}
    write_results(place / "result_Files", images(place))
    result = run_script(FOLDER / "postprocess.py", cwd=place)
    assert (result.returncode, result.stdout, result.stderr) == (0, document(images(place)), "")


def test_results_that_do_not_fit(place):
    """Missing and surplus ones: the accuracy of the others, and status 3. A short one: an error."""
    run_script(FOLDER / "preprocess.py", "--data_path", "image net", cwd=place)
    folder, (first, *others) = place / "result_Files", images(place)
    write_results(folder, others)
    write_results(folder, [first])
    (folder / f"{first.stem}_0.bin").rename(folder / "another_0.bin")
    result = run_script(FOLDER / "postprocess.py", cwd=place)
    assert (result.returncode, result.stdout) == (3, document(others))
    missing, surplus = result.stderr.splitlines()
    assert missing.startswith("warning: 1 of 21 images have no result") and missing.endswith(first.stem)
    assert surplus.startswith("warning: 1 results belong to no image") and surplus.endswith("another")
    short = folder / f"{others[-1].stem}_0.bin"
    short.write_bytes(short.read_bytes()[:-4])
    assert f"{short.name} holds 6 logits" in one_line_error(run_script(FOLDER / "postprocess.py", cwd=place))
    short.write_bytes(short.read_bytes()[:-1])
    assert f"{short.name} holds 23 bytes" in one_line_error(run_script(FOLDER / "postprocess.py", cwd=place))


# ----- run_infer_310.sh -----


@pytest.fixture
def copy(place):
    """What the script needs, in a place of its own, so that it can be started there too."""
    copy = place / "copy of the repository"
    for name in ("scripts", "preprocess.py", "postprocess.py"):
        (copy / "ResNeSt" / name).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", FOLDER / name, copy / "ResNeSt" / name], check=True)
    shutil.copytree(ROOT / "utils", copy / "utils")
    return copy / "ResNeSt"


def infer(script, cwd, program, *words, **variables):
    kept = {name: value for name, value in os.environ.items() if name not in ("DEVICE_TARGET", "BACKEND")}
    return subprocess.run(
        ["bash", script, *map(str, words)],
        cwd=cwd,
        env={**kept, "PYTHON": sys.executable, "INFER_PROGRAM": str(program), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("backbone", SIDES)
def test_infer(place, copy, backbone):
    """Each backbone's preparation, from the folder of the scripts, of the model and of the data."""
    resize, crop = SIDES[backbone]
    module = importlib.import_module(f"src.{backbone}")
    assert SIDES[backbone] == (module.RESIZE, module.INPUT_SIZE)
    folder, script, dataset, rest = {
        "resnest50": (copy / "scripts", "run_infer_310.sh", "imagenet", []),
        "resnest101": (copy, "scripts/run_infer_310.sh", "ImageNet2012", ["2"]),
        "resnest200": (place, copy / "scripts" / "run_infer_310.sh", "IMAGENET", ["0", "--", "--num_threads", "3"]),
        "resnest269": (place, os.path.relpath(copy / "scripts" / "run_infer_310.sh", place), "imagenet2012", []),
    }[backbone]
    variables = {"DEVICE_TARGET": "CPU"} if backbone == "resnest50" else {}
    model, data = (os.path.relpath(place / name, folder) for name in ("a model.mindir", "image net"))
    result = infer(script, folder, place / "program", model, backbone, dataset, data, *rest, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    expected = document(images(place))
    assert result.stdout.endswith(f"\n{expected}") and (folder / "acc.log").read_text() == expected
    given = json.loads(re.search("^given (.*)", result.stdout, re.MULTILINE)[1])
    assert given == [
        *("--model_path", f"{folder}/{model}", "--dataset_path", f"{folder}/{data}/val"),
        *("--device_target", variables.get("DEVICE_TARGET", "Ascend"), "--device_id", rest[0] if rest else "0"),
        *("--output_dir", str(folder), "--resize", str(resize), "--crop", str(crop), "--interpolation", "bilinear"),
        *rest[2:],
    ]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a model.mindir", "resnest50", "imagenet"],
        ["a model.mindir", "resnest50", "imagenet", "image net", "0", "1"],
        ["a model.mindir", "resnest50", "imagenet", "image net", "one"],
        ["a model.mindir", "resnest201", "imagenet", "image net"],
        ["a model.mindir", "resnest50", "cifar10", "image net"],
        ["a model.mindir", "imagenet", "image net", "0"],
        ["a model.mindir", "resnest50", "imagenet", "image net", "--backend", "tensorflow"],
        ["a model.mindir", "resnest50", "imagenet", "image net", "--backend"],
    ],
)
def test_wrong_arguments(place, words):
    result = infer(FOLDER / "scripts" / "run_infer_310.sh", place, place / "program", *words)
    assert result.returncode == 1 and not result.stdout
    (usage,) = result.stderr.splitlines()
    assert usage.startswith("Usage: bash ") and "[MINDIR_PATH] [BACKBONE(resnest50, resnest101, " in usage
    assert not (place / "imagenet_label.json").exists()


def test_missing(place, copy):
    """Images that were left out, no model."""
    script = copy / "scripts" / "run_infer_310.sh"
    words = ["a model.mindir", "resnest50", "imagenet", "image net"]
    result = infer(script, place, place / "program", *words, "--", "--leave", "2")
    assert result.returncode == 3
    assert "warning: 2 of 21 images have no result" in (place / "acc.log").read_text()
    assert "no model" in one_line_error(infer(script, place, "", "no.mindir", *words[1:]))


def test_what_is_the_same_as_for_ddrnet():
    """The functions of common.sh, and the script but for its arguments and the preparation of the images."""

    def functions(model):
        code = f"source {ROOT}/{model}/scripts/common.sh; declare -f"
        text = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout
        return dict(re.findall(r"^(\w+) \(\) *\n(.*?^\})", text, re.MULTILINE | re.DOTALL))

    def steps(model):
        script = (ROOT / model / "scripts" / "run_infer_310.sh").read_text()
        return script[script.index("\nneed_python\n") :]

    ours, theirs = functions("ResNeSt"), functions("DDRNet")
    assert len(ours) >= 8 and ours == {name: theirs[name] for name in ours}
    assert steps("ResNeSt") == steps("DDRNet")
