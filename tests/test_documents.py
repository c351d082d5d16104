"""Runs the commands of the READMEs, taken from the files, in a copy of the repository.

A fenced bash block is run unless the line before it is a comment `<!-- needs: … -->` (an accelerator or ImageNet),
`<!-- not run: … -->` (this test suite) or `<!-- benchmark -->` (run by `make bench`). Trainings are shortened. That the
flags in all blocks exist is tested without running anything.
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "tests" / "ascend310"))
from lite import lite_home, program

DOCUMENTS = ["utils/hccl_tools/README.md"]
# Their commands take minutes.
LONG = ["README.md", "DRNet/readme.md", "ResNeSt/README.md", "DynamicQuant/readme.md", "DDRNet/README.md"]
TRANSLATIONS = {"ResNeSt/README_CN.md": "ResNeSt/README.md", "DDRNet/README_CN.md": "DDRNet/README.md"}
MARK = re.compile(r"<!-- (needs: (ImageNet|Ascend|GPU)|not run: .+|benchmark) -->")
SHORTER = {
    "make demo": 'make demo SAMPLE="--images 4" TRAIN="--epochs 1 --batch_size 8"',
    "--output data/digits ": "--output data/digits --images 4 ",
    "--vary --size 48": "--vary --size 48 --images 4",
    "python train.py": "python train.py --epochs 1 --batch_size 8",
    "--stage quantize": "--stage quantize --even_epochs 0",
    "--output data/sample64": "--output data/sample64 --images 4",
    "$config --epochs 1": "$config --epochs 1 --batch_size 8",
}
# Replaced by a link to what the tests of ascend310_infer have fetched.
FETCH_LITE = """
pip download --no-deps --only-binary=:all: --python-version 3.7 mindspore-lite==2.0.0 -d lite
python -m zipfile -e lite/*.whl lite
"""


def blocks(document: Path) -> list[tuple[str, bool]]:
    """The bash blocks of a Markdown file, each with whether to run it."""
    found, lines = [], document.read_text().split("\n")
    for number, line in enumerate(lines):
        if line.strip() == "```bash":
            end = next(k for k in range(number + 1, len(lines)) if lines[k].strip() == "```")
            found.append(("\n".join(lines[number + 1 : end]), not MARK.fullmatch(lines[number - 1].strip())))
    return found


@pytest.fixture
def copy(tmp_path):
    """The files that git tracks, or would, with the running environment as its .venv."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    copy = tmp_path / "repository"
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.suffix != ".stamp":
            (copy / ".venv" / entry.name).symlink_to(entry)
    for stamp in ("requirements.stamp", "requirements-dev.stamp", "requirements-convert.stamp"):
        (copy / ".venv" / stamp).touch()
    return copy


@pytest.mark.parametrize("document", [*DOCUMENTS, *(pytest.param(name, marks=pytest.mark.full) for name in LONG)])
def test_commands_run_as_printed(document, copy):
    commands = [text for text, run in blocks(ROOT / document) if run]
    assert commands, "nothing to run; is the document still written with bash blocks?"
    script = "\n".join(commands)
    for printed, shorter in SHORTER.items():
        script = script.replace(printed, shorter)
    if FETCH_LITE in script:
        program()  # skips where a tool is missing
        script = script.replace(FETCH_LITE, f"\nln -s {shlex.quote(str(lite_home()))} lite\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=copy,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    if document == "README.md":
        assert (copy / "demo" / "drnet.png").read_bytes().startswith(b"\x89PNG")
        again = subprocess.run(["make", "-n", "demo"], cwd=copy, capture_output=True, text=True)
        assert "pip install" not in again.stdout, "a second run must not install again"


@functools.cache
def flags_of(script: Path) -> set[str]:
    """The flags that a script takes, by its own --help."""
    result = run_script(script, "--help", cwd=script.parent)
    assert result.returncode == 0, result.stderr
    return set(re.findall(r"--[a-zA-Z_0-9]+", result.stdout))


@pytest.mark.parametrize("document", [*DOCUMENTS, *LONG, *TRANSLATIONS])
def test_flags_in_the_commands_are_those_of_the_scripts(document):
    """Also in the blocks that are not run."""
    folder = (ROOT / document).parent
    found = 0
    for text, _ in blocks(ROOT / document):
        for line in text.replace("\\\n", " ").split("\n"):
            words = line.split(" # ")[0].split()
            scripts = [word for word in words if word.endswith(".py")]
            if not scripts or "tests/" in line:
                continue
            places = [folder, ROOT, *(ROOT / model for model in TREES)]
            script = next((path for base in places if (path := base / scripts[0]).is_file()), None)
            assert script is not None, line
            for word in words[words.index(scripts[0]) :]:
                if word.startswith("--"):
                    assert word in flags_of(script), line
                    found += 1
    assert found or document == "README.md"


@pytest.mark.parametrize("document", [*DOCUMENTS, *LONG, *TRANSLATIONS])
def test_links_and_marks_hold(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert target.startswith("https://") or (ROOT / document).parent.joinpath(target).exists(), target
    for mark in re.findall(r"<!--.*?-->", text):
        assert MARK.fullmatch(mark), mark
    anchors = {
        re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ \[?([^\]\n]+)", text, re.M)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in anchors, anchor


@pytest.mark.parametrize(("translation", "original"), TRANSLATIONS.items())
def test_a_translation_has_the_same_commands(translation, original):
    assert blocks(ROOT / translation) == blocks(ROOT / original)
    counts = [
        [len(re.findall(pattern, (ROOT / name).read_text(), re.M)) for pattern in (r"^#+ ", r"^\|", r"^```", r"^ *- ")]
        for name in (translation, original)
    ]
    assert counts[0] == counts[1]


# The trees of the published documents.
TREES = {
    "DRNet": """eval.py readme.md checkpoint fig/DRNet.JPG config/resnet50_imagenet2012_config.yaml src/predictor.py
        src/classifier.py src/dataset.py src/gumbelmodule.py src/model_utils/config.py""",
    "ResNeSt": """README_CN.md ascend310_infer scripts/run_infer_310.sh src/resnest50.py src/resnest101.py
        src/resnest200.py src/resnest269.py export.py preprocess.py postprocess.py""",
    "DynamicQuant": """src/dataset.py src/gumbelsoftmax.py src/quant.py src/resnet.py eval.py readme.md""",
    "DDRNet": """README_CN.md README.md ascend310_infer scripts/run_standalone_train_ascend.sh
        scripts/run_distribute_train_ascend.sh scripts/run_eval_ascend.sh scripts/run_standalone_train_gpu.sh
        scripts/run_distribute_train_gpu.sh scripts/run_eval_gpu.sh scripts/run_infer_310.sh src/configs
        src/data/imagenet.py src/data/augment src/data/data_utils src/models src/trainers src/tools/callback.py
        src/tools/cell.py src/tools/criterion.py src/tools/get_misc.py src/tools/optimizer.py src/tools/schedulers.py
        train.py eval.py export.py preprocess.py postprocess.py""",
}


@pytest.mark.parametrize("model", TREES)
def test_every_documented_file_is_there(model):
    for name in TREES[model].split():
        assert (ROOT / model / name).exists(), name
