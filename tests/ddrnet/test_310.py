"""preprocess.py, postprocess.py and run_infer_310.sh with another program in the place of the inference program.

That one is tested in tests/ascend310.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import ROOT, one_line_error, run_script
from ddrnet.mean_colour import CLASSES, logits_of, write_results
from PIL import Image
from sklearn.metrics import top_k_accuracy_score

FOLDER = ROOT / "DDRNet"
SCRIPT = FOLDER / "scripts" / "run_infer_310.sh"
EACH = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An ImageNet root with a space in its path: 7 classes of 6 random images."""
    root = tmp_path_factory.mktemp("data") / "image net"
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        folder = root / "val" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for k in range(EACH):
            # The colour tells the class, not too well.
            colour = rng.normal([40 + 30 * label, 120, 255 - 30 * label], 120)
            pixels = np.clip(rng.normal(colour, 5, (8, 8, 3)), 0, 255).astype(np.uint8)
            name = f"ILSVRC2012_val_{rng.integers(1e8):08d}.{('JPEG', 'png')[k % 2]}"
            Image.fromarray(pixels).save(folder / name)
    return root


@pytest.fixture
def place(tmp_path):
    place = tmp_path / "a place"
    place.mkdir()
    return place


def images(data) -> list:
    return sorted((data / "val").glob("*/*"))


def document(paths) -> str:
    """What scikit-learn makes of it, in the form that the document prints."""
    labels = [int(path.parent.name[1:]) for path in paths]
    logits = np.stack([logits_of(path) for path in paths])
    top = [top_k_accuracy_score(labels, logits, k=k, labels=range(CLASSES)) for k in (1, 5)]
    assert 0.2 < top[0] < top[1] < 1
    return f"Top1 acc: {round(top[0], 5)}\nTop5 acc: {round(top[1], 5)}\n"


# ----- preprocess.py -----


def test_labels(data, place):
    result = run_script(FOLDER / "preprocess.py", "--data_path", data, cwd=place)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"imagenet_label.json: labels of {CLASSES * EACH} images\n"
    content = (place / "imagenet_label.json").read_text()
    classes = [f"n{label:08d}" for label in range(CLASSES)]
    labels = {path.stem: int(path.parent.name[1:]) for path in images(data)}
    assert json.loads(content) == {"/classes": classes, **labels}
    words = ["--dataset_path", data / "val", "--output", "new folder/again.json"]
    assert run_script(FOLDER / "preprocess.py", *words, cwd=place).returncode == 0
    assert (place / "new folder" / "again.json").read_text() == content


def test_labels_of_a_part(data, place):
    folder = place / "part" / "val" / "n00000003"
    folder.mkdir(parents=True)
    (folder / "x.JPEG").write_bytes(b"")
    classes = [f"n{label:08d}" for label in range(CLASSES)]
    (place / "part" / "classes.txt").write_text("\n".join(classes))
    assert run_script(FOLDER / "preprocess.py", "--data_path", "part", cwd=place).returncode == 0
    assert json.loads((place / "imagenet_label.json").read_text()) == {"/classes": classes, "x": 3}


@pytest.mark.parametrize("second", ["b/x.png", "a/x.jpg"])
def test_two_images_with_one_name(place, second):
    for name in ("a/x.JPEG", "b/y.JPEG", second):
        (place / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "data" / name).write_bytes(b"")
    error = one_line_error(run_script(FOLDER / "preprocess.py", "--data_path", "data", cwd=place))
    assert "data/a/x.JPEG" in error and f"data/{second}" in error and "x_0.bin; rename" in error
    assert [path.name for path in place.iterdir()] == ["data"]


def test_no_such_data(data, place):
    def error(*words):
        return one_line_error(run_script(FOLDER / "preprocess.py", *words, cwd=place))

    assert "no folder data/imagenet; set --data_path" in error()
    assert "one setting with two values" in error("--data_path", data, "--dataset_path", place)
    (place / "train").mkdir()
    assert "has no val/" in error("--data_path", ".")
    assert "cannot write" in error("--data_path", data, "--output", "/proc/labels.json")


def test_start_at_once():
    """Neither of the two loads MindSpore."""
    for script in ("preprocess", "postprocess"):
        code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import {script}; print('mindspore' in sys.modules)"
        assert run_script("-c", code, cwd=FOLDER).stdout == "False\n"


# ----- postprocess.py -----


@pytest.fixture
def results(data, place):
    """A folder with the results of all images, and their labels."""
    write_results(place / "result_Files", images(data))
    run_script(FOLDER / "preprocess.py", "--data_path", data, cwd=place)
    return place / "result_Files"


def postprocess(place, *words):
    return run_script(FOLDER / "postprocess.py", *words, cwd=place)


def test_accuracy(data, place, results):
    (results / "notes.txt").write_text("no result")
    result = postprocess(place)
    assert (result.returncode, result.stdout, result.stderr) == (0, document(images(data)), "")
    results.rename(place / "elsewhere")
    (place / "imagenet_label.json").rename(place / "labels")
    result = postprocess(place, "--result_dir", "elsewhere", "--label_file", "labels")
    assert (result.returncode, result.stdout) == (0, document(images(data)))


@pytest.mark.full
def test_figures_of_the_document(place):
    """50,000 images, of which as many are right as the document's 0.76578 and 0.9331 say."""
    first, fifth = 38289, 46655
    (place / "result_Files").mkdir()
    rows = {1: np.arange(10.0)[::-1], 5: np.array([5, 9, 8, 7, 6, 4, 3, 2, 1, 0.0]), 9: np.arange(10.0)}
    contents = {k: row.astype("<f4").tobytes() for k, row in rows.items()}  # rank of class 0
    names = [f"ILSVRC2012_val_{n:08d}" for n in range(50_000)]
    for n, name in enumerate(names):
        content = contents[1 if n < first else 5 if n < fifth else 9]
        (place / "result_Files" / f"{name}_0.bin").write_bytes(content)
    (place / "imagenet_label.json").write_text(json.dumps(dict.fromkeys(names, 0)))
    result = postprocess(place)
    assert (result.returncode, result.stdout) == (0, "Top1 acc: 0.76578\nTop5 acc: 0.9331\n")


def test_fewer_than_five_classes(place):
    (place / "result_Files").mkdir()
    for name, logits in {"a": [2, 1], "b": [2, 1], "c": [1, 1]}.items():
        (place / "result_Files" / f"{name}_0.bin").write_bytes(np.array(logits, np.float32).tobytes())
    (place / "imagenet_label.json").write_text('{"a": 0, "b": 1, "c": 1}')
    assert postprocess(place).stdout == "Top1 acc: 0.33333\nTop5 acc: 1.0\n"


def test_part_of_the_results(data, place, results):
    """The accuracy is that of the images with a result, but nobody takes it for that of all."""
    paths = images(data)
    for path in paths[::9]:
        (results / f"{path.stem}_0.bin").rename(results / f"of another set {path.stem}_0.bin")
    lost = [path for path in paths if path in paths[::9]]
    result = postprocess(place)
    assert result.returncode == 3
    assert result.stdout == document([path for path in paths if path not in lost])
    missing, surplus = result.stderr.splitlines()
    few = sorted(path.stem for path in lost)[:3]
    assert missing == f"warning: 5 of 42 images have no result and are not counted: {', '.join(few)}, …"
    assert surplus.startswith("warning: 5 results belong to no image and are not counted: of another set ILSVRC")


def test_wrong_results(data, place, results):
    paths = images(data)
    file = results / f"{min(path.stem for path in paths[1:])}_0.bin"

    def error_with(content):
        file.write_bytes(content)
        return one_line_error(postprocess(place))

    assert f"{file.name} holds 0 bytes" in error_with(b"")
    assert f"{file.name} holds 27 bytes" in error_with(bytes(27))
    for number in (np.nan, np.inf):
        assert f"{file.name} holds NaN or infinity" in error_with(np.full(CLASSES, number, np.float32).tobytes())
    error = error_with(np.zeros(CLASSES + 1, np.float32).tobytes())
    assert f"{file.name} holds 8 logits" in error or (f"{file.name} 8;" in error and "holds 7 logits" in error)


def test_label_beyond_the_classes(data, place, results):
    labels = json.loads((place / "imagenet_label.json").read_text())
    name = sorted(labels)[4]
    (place / "imagenet_label.json").write_text(json.dumps(labels | {name: CLASSES}))
    assert f"image {name} has label 7, but the model has 7 classes, 0 to 6" in one_line_error(postprocess(place))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"a": "b"}', '{"a": -1}', '{"a": true}', '{"a": 1.0}'])
def test_wrong_labels(place, content):
    (place / "imagenet_label.json").write_text(content)
    assert "imagenet_label.json is not " in one_line_error(postprocess(place))


def test_nothing_to_count(data, place):
    assert "cannot read imagenet_label.json: No such file or directory; make it" in one_line_error(postprocess(place))
    run_script(FOLDER / "preprocess.py", "--data_path", data, cwd=place)
    assert "no folder result_Files; run the inference" in one_line_error(postprocess(place))
    (place / "result_Files").mkdir()
    assert "no result for any of the 42 images" in one_line_error(postprocess(place))


def test_some_of_the_classes_without_a_list_of_all(data, place):
    """The labels would be others: refused by the number of logits, as eval.py refuses it."""
    part = place / "part" / "val"
    for name in ("n00000004", "n00000006"):
        shutil.copytree(data / "val" / name, part / name)
    write_results(place / "result_Files", images(place / "part"))
    run_script(FOLDER / "preprocess.py", "--data_path", "part", cwd=place)
    error = one_line_error(postprocess(place))
    assert "images are of 2 classes, but the model has 7; " in error and "classes.txt" in error
    (place / "part" / "classes.txt").write_text("".join(f"n{label:08d}\n" for label in range(CLASSES)))
    run_script(FOLDER / "preprocess.py", "--data_path", "part", cwd=place)
    labels, logits = zip(*((int(path.parent.name[1:]), logits_of(path)) for path in images(place / "part")))
    top = top_k_accuracy_score(labels, np.stack(logits), k=1, labels=range(CLASSES))
    assert postprocess(place).stdout.startswith(f"Top1 acc: {round(top, 5)}\n")


# ----- run_infer_310.sh -----

# Takes the arguments of the Ascend 310 program and classifies by the mean colour. Further ones: --leave N images out,
# --then what to do at the end.
PROGRAM = f"""#!{sys.executable}
import argparse, json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests")!r})
from ddrnet.mean_colour import write_results
parser = argparse.ArgumentParser()
flags = ("model_path", "dataset_path", "device_target", "device_id", "output_dir", "resize", "crop", "interpolation")
for name in flags:
    parser.add_argument("--" + name, required=True)
parser.add_argument("--leave", type=int, default=0)
parser.add_argument("--then", default="")
args = parser.parse_args()
print("given", json.dumps([vars(args), os.getcwd()]), flush=True)
paths = sorted(Path(args.dataset_path).glob("*/*"))
write_results(Path(args.output_dir) / "result_Files", paths[args.leave:])
exec(args.then)
"""


@pytest.fixture
def program(tmp_path):
    program = tmp_path / "my program"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    (tmp_path / "a place" / "ddrnet 23.mindir").write_text("a model")
    return program


def environment(program, **variables):
    dropped = ("DEVICE_TARGET", "BACKEND", "MS_LITE_HOME", "LITE_HOME", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PYTHON": sys.executable, "INFER_PROGRAM": str(program), **variables}


def infer(place, program, *words, script=SCRIPT, **variables):
    return subprocess.run(
        ["bash", str(script), *map(str, words)],
        cwd=place,
        env=environment(program, **variables),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "words, variables, device",
    [
        (["imagenet2012", "{data}"], {}, ("Ascend", "0")),
        (["ImageNet", "{data}/val", "3"], {}, ("Ascend", "3")),
        (
            ["IMAGENET2012", "{relative}", "1", "--", "--then", "print('two  words')"],
            {"DEVICE_TARGET": "CPU"},
            ("CPU", "1"),
        ),
    ],
)
def test_infer(data, place, program, words, variables, device):
    words = [word.format(data=data, relative=os.path.relpath(data, place)) for word in words]
    result = infer(place, program, "ddrnet 23.mindir", *words, **variables)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    expected = document(images(data))
    assert result.stdout.endswith(f"\n{expected}") and (place / "acc.log").read_text() == expected
    given, folder = json.loads(re.search("^given (.*)", result.stdout, re.MULTILINE)[1])
    assert folder == given.pop("output_dir") == str(place)
    assert given.pop("model_path") == f"{place}/ddrnet 23.mindir"
    dataset = given.pop("dataset_path")
    assert os.path.isabs(dataset) and os.path.samefile(dataset, data / "val")
    assert (given["device_target"], given["device_id"]) == device
    assert (given["resize"], given["crop"], given["interpolation"]) == ("256", "224", "bicubic")
    assert ("\ntwo  words\n" in result.stdout) == bool(given["then"])
    assert (place / "inference.log").read_text() in result.stdout
    assert sorted(path.name for path in place.iterdir()) == [
        *("acc.log", "ddrnet 23.mindir", "imagenet_label.json", "inference.log", "preprocess.log"),
        "result_Files",
    ]


MANIFEST = {  # the part of it that is read here
    "input": {"shape": [4, 3, 160, 160]},
    "preprocess": {"resize": [176, 176], "keep_aspect_ratio": False, "interpolation": "bilinear, antialiased"},
    "num_classes": CLASSES,
    "class_names": [f"n{label:08d}" for label in range(CLASSES)],
}


def test_what_the_manifest_tells(data, place, program):
    """The preparation and the batch; flags after -- come later, so they count. Other classes are refused at first."""
    manifest = place / "ddrnet 23.json"
    words = ["ddrnet 23.mindir", "imagenet", data]
    program.write_text(PROGRAM.replace('"interpolation")', '"interpolation", "batch_size")'))

    def given(told, *more):
        manifest.write_text(json.dumps(told))
        result = infer(place, program, *words, *more)
        assert (result.returncode, result.stderr) == (0, "")
        found = json.loads(re.search("^given (.*)", result.stdout, re.MULTILINE)[1])[0]
        return [found[name] for name in ("resize", "crop", "interpolation", "batch_size")]

    assert given(MANIFEST) == ["176", "160", "bilinear", "4"]
    assert given(MANIFEST | {"class_names": None}, "--", "--crop", "96") == ["176", "96", "bilinear", "4"]
    (place / "result_Files").rename(place / "earlier")
    for other, fault in (
        ({"num_classes": 8, "class_names": None}, "has 7 classes, not 8"),
        ({"class_names": [f"n{label:08d}" for label in (1, 0, *range(2, CLASSES))]}, "label 0 is n00000001 in"),
        ({"preprocess": {"resize": 256}}, "is no manifest of a model for this program"),
        ({"preprocess": MANIFEST["preprocess"] | {"keep_aspect_ratio": True}}, "is no manifest of a model for this"),
        ({"num_classes": "7"}, "is no manifest of a model for this program"),
    ):
        manifest.write_text(json.dumps(MANIFEST | other))
        assert fault in one_line_error(infer(place, program, *words))
    assert not (place / "result_Files").exists()


def test_warnings_of_the_first_step_are_shown(data, place, program):
    """What preprocess.py, whose output is in its log only, says about the folder."""
    shutil.copytree(data, place / "data")
    (place / "data" / "val" / "x.JPEG").write_bytes(b"")
    result = infer(place, program, "ddrnet 23.mindir", "imagenet", "data")
    assert result.returncode == 0 and result.stderr.count("\n") == 1
    assert f"warning: 1 files of {place}/data/val are left out" in result.stderr


def test_part_of_the_images_inferred(data, place, program):
    result = infer(place, program, "ddrnet 23.mindir", "imagenet", data, "--", "--leave", "2")
    assert result.returncode == 3
    assert "warning: 2 of 42 images have no result" in result.stderr
    assert "warning: 2 of 42" in (place / "acc.log").read_text()


def test_images_skipped(data, place, program):
    """Status 3 of the program: the accuracy of the others, and that status."""
    words = ["--", "--leave", "2", "--then", "sys.exit(3)"]
    result = infer(place, program, "ddrnet 23.mindir", "imagenet", data, *words)
    assert result.returncode == 3
    lines = (place / "acc.log").read_text().splitlines(keepends=True)  # of both outputs
    assert "".join(line for line in lines if not line.startswith("warning: ")) == document(images(data)[2:])


@pytest.mark.parametrize("then, status", [("raise KeyError('x')", 1), ("sys.exit(7)", 7), ("os.abort()", 134)])
def test_inference_fails(data, place, program, then, status):
    (place / "acc.log").write_text("Top1 acc: 1.0\n")  # of an earlier run
    words = ["--", "--then", f"for n in range(40): print('image', n)\nsys.stdout.flush()\n{then}"]
    result = infer(place, program, "ddrnet 23.mindir", "imagenet", data, *words)
    assert result.returncode == status
    *_, error = lines = result.stderr.splitlines()
    assert error == f"error: inference ended with status {status}"
    heading = lines.index(f"the last lines of {place}/inference.log:")
    assert lines[heading + 1 : -1] == (place / "inference.log").read_text().splitlines()[-15:]
    assert "image 39" in lines and not (place / "acc.log").exists()


def test_step_that_cannot_start(data, place, program):
    def error(*words, program=program, **variables):
        result = infer(place, program, *words, **variables)
        assert "Top1" not in result.stdout
        return one_line_error(result)

    assert "no model" in error("no.mindir", "imagenet", data)
    assert "no folder" in error("ddrnet 23.mindir", "imagenet", "no data")  # what preprocess.py says
    assert "no program no python;" in error("ddrnet 23.mindir", "imagenet", data, PYTHON="no python")
    assert "no such program is no program" in error("ddrnet 23.mindir", "imagenet", data, program="no such program")
    then = "print('error: this device is busy; wait', file=sys.stderr)\nsys.exit(2)"
    last = error("ddrnet 23.mindir", "imagenet", data, "--", "--then", then)
    assert last == "error: this device is busy; wait"


@pytest.mark.parametrize("backend", ["INFER_PROGRAM", "lite", "mindspore"])
def test_flags_that_would_part_results_and_labels(data, place, program, backend):
    """The paths are the script's own, and --help computes nothing: nothing is run."""
    write_results(place / "result_Files", images(data))  # of an earlier run
    words = ["ddrnet 23.mindir", "imagenet", data]
    words += [] if backend == "INFER_PROGRAM" else ["--backend", backend]
    before = sorted(place.rglob("*"))

    def error(*more):
        return one_line_error(infer(place, program if backend == "INFER_PROGRAM" else "", *words, "--", *more))

    for flag in ("--model_path", "--dataset_path", "--output_dir"):
        for given in ([flag, "elsewhere"], [f"{flag}=elsewhere"]):
            assert error("--leave", "0", *given).startswith(f"error: {flag} after -- is the script's own; ")
    name = {"INFER_PROGRAM": program, "lite": "ascend310_infer/out/main", "mindspore": "utils/infer_310.py"}[backend]
    for flag in ("--help", "-h"):
        assert error(flag).endswith(f"{name} --help")
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", ["acc.log", "preprocess.log", "inference.log"])
def test_a_log_that_cannot_be_written(data, place, program, name):
    (place / name).mkdir()
    error = one_line_error(infer(place, program, "ddrnet 23.mindir", "imagenet", data))
    assert f" {place}/{name}; start the script in another folder" in error


@pytest.fixture
def copy(place):
    """A copy of what the script needs, without the program's sources."""
    copy = place / "copy of the repository"
    for name in ("DDRNet/scripts", "DDRNet/preprocess.py", "DDRNet/postprocess.py", "utils"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", ROOT / name, copy / name], check=True)
    return copy


def test_build(data, place, tmp_path, program, copy):
    """Built at first, not again, again after a change or for another Lite; a build that fails.

    After the first one nothing is computed: `true` stands in the places of Python and of the program.
    """
    script = copy / "DDRNet" / "scripts" / SCRIPT.name
    sources = copy / "DDRNet" / "ascend310_infer"
    (sources / "src").mkdir(parents=True)
    (sources / "src" / "main.cc").write_text("one\n")
    (sources / "build.sh").write_text(
        f'cd "$(dirname "$0")"\necho building\nmkdir -p out\ncp {shlex.quote(str(program))} out/main\ntouch out/built\n'
        'echo "${MS_LITE_HOME:-}" >out/lite_home\n'
    )
    os.utime(sources / "src" / "main.cc", (1, 1))
    os.utime(sources / "build.sh", (1, 1))

    def run(**variables):
        (sources / "out" / "built").unlink(missing_ok=True)
        result = infer(place, "", "ddrnet 23.mindir", "imagenet", data, script=script, **variables)
        return result, (sources / "out" / "built").exists()

    result, built = run()
    assert result.returncode == 0, result.stderr
    assert built and (place / "build.log").read_text() == "building\n"
    result, built = run()
    assert result.returncode == 0 and not built
    program.write_text("#!/bin/sh\n")
    run_with_python, python = run, shutil.which("true")

    def run(**variables):
        return run_with_python(PYTHON=python, **variables)

    homes = [tmp_path / "one lite", tmp_path / "another"]
    for home in homes:
        home.mkdir()
        assert run(MS_LITE_HOME=str(home))[1] and not run(MS_LITE_HOME=str(home))[1] and not run()[1]
    assert not run(MS_LITE_HOME=os.path.relpath(homes[1], place))[1] and not run(LITE_HOME=f"{homes[1]}/")[1]
    assert not run(MS_LITE_HOME=str(homes[1]), LITE_HOME=str(homes[0]))[1] and run(LITE_HOME=str(homes[0]))[1]
    (place / "build.log").unlink()
    (place / "build.log").mkdir()
    (sources / "out" / "main").unlink()
    assert f"cannot write {place}/build.log; start" in one_line_error(run()[0])
    (place / "build.log").rmdir()
    assert run()[1]
    late = time.time() + 10
    os.utime(sources / "src" / "main.cc", (late, late))
    assert run()[1]
    (sources / "build.sh").write_text("echo 'main.cc: no such type'\nexit 4\n")
    os.utime(sources / "build.sh", (late + 10, late + 10))
    result, _ = run()
    assert result.returncode == 4
    assert result.stderr.splitlines() == [
        f"the last lines of {place}/build.log:",
        "main.cc: no such type",
        "error: build ended with status 4",
    ]
    (sources / "build.sh").write_text('rm "$(dirname "$0")/out/main"\n')
    os.utime(sources / "build.sh", (late + 20, late + 20))
    assert "build.sh has not made" in one_line_error(run()[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(data, place, program, number):
    then = "print('ready', flush=True)\ntime.sleep(600)"
    with (place / "out").open("w") as out:
        job = subprocess.Popen(
            ["bash", str(SCRIPT), "ddrnet 23.mindir", "imagenet", str(data), "--", "--then", then],
            cwd=place,
            env=environment(program),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    deadline = time.monotonic() + 60
    while "ready\n" not in (place / "out").read_text():
        assert job.poll() is None and time.monotonic() < deadline, (place / "out").read_text()
        time.sleep(0.05)
    job.send_signal(number)
    assert job.wait(timeout=60) == (130 if number == signal.SIGINT else 143)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            assert str(program) not in process.cmdline() and process.cwd() != str(place)
    assert "the last lines" not in (place / "out").read_text() and not (place / "acc.log").exists()
