"""run_infer_310.sh of both models from the model file to the accuracy, and build.sh, with what is really there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, one_line_error, run_script

sys.path.insert(0, str(ROOT / "tests" / "ascend310"))
from lite import MODEL, lite_home, program, run

ARGUMENTS = {"ResNeSt": ["resnest50", "imagenet"], "DDRNet": ["imagenet2012"]}
LINES = {
    "ResNeSt": r"after allreduce eval: top1_correct=\d+, tot=360, acc=([\d.]+)%\n"
    r"after allreduce eval: top5_correct=\d+, tot=360, acc=([\d.]+)%\n",
    "DDRNet": r"Top1 acc: ([\d.]+)\nTop5 acc: ([\d.]+)\n",
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The 360 held-out digits of the sample data."""
    root = tmp_path_factory.mktemp("data") / "the digits"
    result = run_script("utils/sample_imagenet.py", "--output", root, "--size", "64", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return root


@pytest.fixture
def copy(tmp_path):
    """A copy of what the scripts need, without what has been built."""
    copy = tmp_path / "a copy"
    for name in ("ResNeSt", "DDRNet", "utils"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("build", "out", "data", "output"))
    return copy


@pytest.fixture
def place(tmp_path):
    place = tmp_path / "a place"
    place.mkdir()
    return place


def script(copy: Path, model: str, digits: Path, *more) -> list:
    return ["bash", copy / model / "scripts" / "run_infer_310.sh", MODEL, *ARGUMENTS[model], digits, *more]


def accuracies(model: str, result: subprocess.CompletedProcess, place: Path) -> list[float]:
    """The percentages of a run that must have succeeded."""
    assert (result.returncode, result.stderr) == (0, ""), result.stdout + result.stderr
    lines = (place / "acc.log").read_text()
    assert result.stdout.endswith(lines)
    scale = 1 if model == "ResNeSt" else 100
    return [scale * float(figure) for figure in re.fullmatch(LINES[model], lines).groups()]


def test_the_users_settings_stay_out(place, monkeypatch):
    """What these tests run must not depend on them."""
    names = ("DEVICE_TARGET", "BACKEND", "INFER_PROGRAM", "MS_LITE_HOME", "LITE_HOME")
    for name in names:
        monkeypatch.setenv(name, "of the user")
    lines = run(["env"], place, LITE_HOME="of the test").stdout.splitlines()
    assert [line for line in lines if line.split("=")[0] in names] == ["LITE_HOME=of the test"]


@pytest.mark.parametrize("model", ["ResNeSt", pytest.param("DDRNet", marks=pytest.mark.full)])
def test_from_the_model_file_to_the_accuracy(model, copy, digits, place):
    """Built, run on the CPU and counted; a second run does not build; MindSpore in Python gives the same."""
    command = script(copy, model, digits)
    variables = {"DEVICE_TARGET": "CPU", "MS_LITE_HOME": str(lite_home())}
    program()  # skips where a tool is missing
    first = accuracies(model, run(command, place, **variables), place)
    print(f"{model}: top-1 {first[0]:.2f} %, top-5 {first[1]:.2f} %")
    assert first[0] >= 96
    assert len(list((place / "result_Files").glob("*_0.bin"))) == 360
    assert (place / "time_Result" / "test_perform_static.txt").read_text().startswith("images: 360\n")

    (place / "build.log").unlink()
    again = run([*command, "--", "--resume", "--num_threads", "1"], place, **variables)
    assert accuracies(model, again, place) == first and "360 of 360 images are done already" in again.stdout
    assert not (place / "build.log").exists()

    python = run([*command[:2], "--backend", "mindspore", *command[2:]], place, DEVICE_TARGET="CPU", MS_LITE_HOME="")
    assert accuracies(model, python, place) == first and "removed 360 results" in python.stdout
    by_variable = run([*command, "--", "--resume"], place, DEVICE_TARGET="CPU", MS_LITE_HOME="", BACKEND="mindspore")
    assert accuracies(model, by_variable, place) == first and "0 of 360 images to do" in by_variable.stdout


def test_a_damaged_image_and_a_failing_build(copy, digits, place):
    """The first costs its own result only, and status 3; the second ends the script with the end of its log."""
    data = place / "some digits"
    shutil.copytree(digits, data)
    victim = min((data / "val").glob("*/*"))
    victim.write_bytes(victim.read_bytes()[:200])
    # Copied as new files: a checkout may be younger than the program that is kept of the same sources.
    shutil.copytree(program().parent, copy / "DDRNet" / "ascend310_infer" / "out", copy_function=shutil.copy)
    command = script(copy, "DDRNet", data)
    # Under PYTHONUNBUFFERED, too, a line is in the log in one piece.
    variables = {"DEVICE_TARGET": "CPU", "MS_LITE_HOME": str(lite_home()), "PYTHONUNBUFFERED": "1"}
    result = run(command, place, **variables)
    assert result.returncode == 3 and not (place / "build.log").exists()
    assert result.stderr.splitlines() == [
        f"warning: {victim} is truncated; going on without it",
        f"warning: 1 of 360 images have no result and are not counted: {victim.stem}",
    ]
    lines = (place / "acc.log").read_text().splitlines(keepends=True)  # the warning may come first
    assert re.fullmatch(LINES["DDRNet"], "".join(line for line in lines if not line.startswith("warning: ")))

    result = run([*script(copy, "DDRNet", data, "--", "--crop", "200")], place, **variables)
    assert "is 1x3x224x224, but" in one_line_error(result) and not (place / "acc.log").exists()

    (copy / "DDRNet" / "ascend310_infer" / "src" / "main.cc").write_text("int main() { return missing; }\n")
    result = run(command, place, **variables)
    assert result.returncode == 2 and "missing" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: build ended with status 2"
    assert not (place / "acc.log").exists()


# ----- build.sh -----


def without(tools: list[str], folder: Path) -> str:
    """A PATH with everything but the `tools`."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for path in Path(place).glob("*"):
            link = folder / path.name
            if path.name not in tools and not link.exists():
                link.symlink_to(path)
    return str(folder)


def test_what_building_needs(copy, place):
    """One line that says what to install."""

    def error(*options, **variables):
        script = copy / "ResNeSt" / "ascend310_infer" / "build.sh"
        return one_line_error(run(["bash", script, *options], place, **variables))

    home = str(lite_home())
    program()  # skips where a tool is missing
    for tool, *others in (["cmake"], ["make"], ["c++", "g++", "clang++"]):
        found = error(PATH=without([tool, *others], place / tool), MS_LITE_HOME=home)
        assert found.startswith("error: no ") and "apt-get install " in found and tool.rstrip("+") in found
    assert "install g++ 8" in error(CXX="no compiler", MS_LITE_HOME=home)
    assert "does not compile C++17; install g++ 8" in error(CXX="false", MS_LITE_HOME=home)
    for option, fault in {  # what is built with is what is checked
        "-DCMAKE_CXX_COMPILER=/nowhere/g++": "no C++ compiler; install g++ 8",
        "-DCMAKE_CXX_FLAGS=-nostdinc++": "does not compile C++17; install g++ 8",
        "-DCMAKE_DISABLE_FIND_PACKAGE_OpenCV=ON": "no OpenCV for C++; install it (apt-get install libopencv-dev), or",
    }.items():
        assert fault in error(option, MS_LITE_HOME=home)
    assert "MS_LITE_HOME is not set; unpack" in error(MS_LITE_HOME="")
    assert "which is no folder" in error(MS_LITE_HOME="nowhere")
    assert "holds neither a release of MindSpore Lite (runtime/include" in error(MS_LITE_HOME=str(place))
    assert not (copy / "ResNeSt" / "ascend310_infer" / "out").exists()
    result = run(script(copy, "ResNeSt", place), place, DEVICE_TARGET="CPU", MS_LITE_HOME="")
    assert result.returncode == 2  # no labels can be made


def test_warnings_of_another_compiler_end_no_build(copy, place):
    """They are errors where these tests build it, only."""
    program()  # skips where a tool is missing
    for options, wanted in ([], False), (["-DWERROR=ON"], True):
        words = ["-S", copy / "DDRNet" / "ascend310_infer", "-B", place, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options]
        result = run(["cmake", *words], place)
        assert result.returncode == 0, result.stderr
        commands = (place / "compile_commands.json").read_text()
        assert "-Wall" in commands and ("-Werror" in commands) == wanted


@pytest.mark.full
def test_the_layout_of_a_release(copy, digits, place):
    """The library and the headers under runtime/, in a path with a space; LITE_HOME, the older name.

    Another name of that folder changes nothing; another folder, and the program is built with that.
    """
    program()  # skips where a tool is missing
    home = place / "a release"
    wheel = lite_home() / "mindspore_lite"
    (home / "runtime" / "lib").mkdir(parents=True)
    shutil.copytree(wheel / "include", home / "runtime" / "include")
    for path in (wheel / "lib").iterdir():
        (home / "runtime" / "lib" / path.name).symlink_to(path)
    (home / "runtime" / "lib" / "libmindspore-lite.so").symlink_to(wheel / "lib" / "libmindspore-extendrt_python.so")
    command = script(copy, "ResNeSt", digits)
    main = copy / "ResNeSt" / "ascend310_infer" / "out" / "main"

    def built(**variables):
        """With which Lite, if it was."""
        (place / "build.log").unlink(missing_ok=True)
        result = run(command, place, DEVICE_TARGET="CPU", **variables)
        assert accuracies("ResNeSt", result, place)[0] >= 96
        return (main.parent / "lite_home").read_text() if (place / "build.log").exists() else None

    assert built(LITE_HOME=home.name) == f"{home}\n"  # relative to the caller's folder
    (place / "a link").symlink_to(home)
    for same in ({"MS_LITE_HOME": f"{home}/"}, {"MS_LITE_HOME": "a link", "LITE_HOME": "nowhere"}, {}):
        assert built(**same) is None
    assert built(MS_LITE_HOME=str(lite_home()), LITE_HOME=str(home)) == f"{lite_home().resolve()}\n"
    assert str(home).encode() not in main.read_bytes()
    result = run(command, place, DEVICE_TARGET="CPU", MS_LITE_HOME="nowhere")
    assert f"MS_LITE_HOME names {place}/nowhere, which is no folder" in one_line_error(result)
    assert not (place / "acc.log").exists()
