"""The C++ program on the CPU, through MindSpore Lite: a trained network on scanned digits of many sizes and formats."""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mindspore as ms
import mindspore.nn as nn
import numpy as np
import pytest
from conftest import ROOT, one_line_error
from mindspore.train.mind_ir_pb2 import ModelProto
from PIL import Image

sys.path.insert(0, str(ROOT / "tests" / "ascend310"))
import samples
from lite import MODEL, program, run, sources, tensors

from utils.export import load_mindir
from utils.result_files import read_logits

MANY = 2000


@pytest.fixture(scope="module")
def main():
    return program()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders with 240 images, in a path with a space."""
    root = tmp_path_factory.mktemp("data") / "image net"
    samples.make(root, 240, largest=400)
    return root


@pytest.fixture
def place(tmp_path):
    place = tmp_path / "a place"
    place.mkdir()
    return place


def words(program, data, place, *more) -> list:
    flags = ["--model_path", MODEL, "--dataset_path", data, "--device_target", "CPU", "--output_dir", place]
    return [program, *flags, *more]


def infer(program, data, place, *more, **variables):
    return run(words(program, data, place, *more), place, **variables)


def results(place: Path) -> dict[str, bytes]:
    """Every result by image name."""
    return {path.name.removesuffix("_0.bin"): path.read_bytes() for path in (place / "result_Files").glob("*_0.bin")}


@pytest.fixture(scope="module")
def expected(main, data, tmp_path_factory):
    """The results of all images."""
    place = tmp_path_factory.mktemp("results")
    result = infer(main, data, place)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert "240 of 240 images, 0 skipped, " in result.stdout.splitlines()[-1]
    text = (place / "time_Result" / "test_perform_static.txt").read_text()
    times = {name: float(value) for name, value in re.findall("(.+): (.+)", text)}
    assert times["images"] == 240 and times["images/s end to end"] > 0
    assert 0 < times["inference of a batch, p50 ms"] <= times["inference of a batch, p99 ms"]
    assert sorted(path.name for path in place.iterdir()) == ["result_Files", "time_Result"]
    return results(place)


def test_both_folders_hold_the_same_program():
    models = ("ResNeSt", "DDRNet")
    ours, theirs = ({name: path.read_bytes() for name, path in sources(model).items()} for model in models)
    assert ours == theirs and {"CMakeLists.txt", "build.sh", "src/main.cc", "inc/resample.h"} <= ours.keys()


def test_logits_are_mindspores(expected, data, tmp_path):
    """On the same tensors to 1e-3, and the same class; on the tensors of eval.py the same class for 99 %."""
    paths = sorted(data.glob("*/*"))
    network = load_mindir(MODEL)
    inputs = tensors(paths, 256, 224, "bilinear", tmp_path / "out")
    wanted = np.concatenate([network(ms.Tensor(image[None])).asnumpy() for image in inputs])
    found = np.stack([np.frombuffer(expected[path.stem], np.float32) for path in paths])
    print(f"largest difference of {len(paths)} x 10 logits: {np.abs(found - wanted).max():.2g}")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)

    python_program = [sys.executable, ROOT / "utils" / "infer_310.py"]
    python = run([*python_program, *words("", data, tmp_path)[1:], "--num_threads", "2"], tmp_path)
    lines = python.stderr.splitlines()
    assert python.returncode == 0 and all(line.endswith("first such image only)") for line in lines), python.stderr
    other = results(tmp_path)
    assert other.keys() == expected.keys()
    other = np.stack([np.frombuffer(other[path.stem], np.float32) for path in paths])
    agreement = float((other.argmax(1) == found.argmax(1)).mean())
    print(f"top-1 agreement with the Python program: {100 * agreement:.2f} %")
    assert agreement >= 0.99


@pytest.mark.parametrize("threads", ["0", "1", "3", "16"])
def test_threads_change_nothing(main, expected, data, place, threads):
    assert infer(main, data, place, "--num_threads", threads).returncode == 0
    assert results(place) == expected


@pytest.mark.parametrize("threads", ["1", "2"])
def test_threads_of_the_model_change_nothing(main, expected, data, place, threads):
    assert infer(main, data, place, "--model_threads", threads).returncode == 0
    assert results(place) == expected


def edited(place: Path, batch: int) -> Path:
    """The model, exported as for another batch size; -1 for any."""
    model = ModelProto.FromString(MODEL.read_bytes())
    model.graph.input[0].tensor[0].dims[0] = batch
    path = place / f"batch {batch}.mindir"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("batch", [7, -1])
def test_batches(main, expected, data, place, batch):
    """240 images in batches of 7, the last one incomplete."""
    result = infer(main, data, place, "--model_path", edited(place, batch), "--batch_size", "7")
    assert (result.returncode, result.stderr) == (0, "")
    found = results(place)
    assert found.keys() == expected.keys()
    for name, logits in found.items():
        np.testing.assert_allclose(np.frombuffer(logits, "f4"), np.frombuffer(expected[name], "f4"), rtol=0, atol=1e-4)


def spoil(data: Path, place: Path) -> tuple[Path, list[str]]:
    """A copy of the images of which some are damaged, and the words about each of those."""
    copy = place / "damaged"
    shutil.copytree(data, copy)
    paths = sorted(copy.glob("*/*"))
    kinds = (" jpeg", " progressive", " png.")
    jpeg, progressive, png = ([path for path in paths if kind in path.name] for kind in kinds)
    jpeg[0].write_bytes(b"")
    jpeg[1].write_bytes(jpeg[1].read_bytes()[: jpeg[1].stat().st_size // 2])
    jpeg[2].write_bytes(jpeg[2].read_bytes()[:-2])  # all pixels, but no end
    jpeg[3].write_text("no image at all")
    jpeg[4].write_bytes(b"\xff\xd8\xff")
    jpeg[5].unlink()
    jpeg[5].symlink_to("nowhere")
    progressive[0].write_bytes(progressive[0].read_bytes()[: progressive[0].stat().st_size // 3])
    png[0].write_bytes(png[0].read_bytes()[:-100])
    png[1].write_bytes(png[1].read_bytes()[:30])
    # More pixels than Pillow takes, by the header; there are none to decode.
    content = png[2].read_bytes()
    png[2].write_bytes(content[:16] + 2 * (13_378).to_bytes(4, "big") + content[24:])
    for path, marker in ((jpeg[6], b"\xff\xc0"), (progressive[1], b"\xff\xc2")):
        before, after = path.read_bytes().split(marker, 1)
        path.write_bytes(before + marker + after[:3] + 2 * (40_000).to_bytes(2, "big") + after[7:])
    return copy, [
        *(f"{jpeg[0]} is empty", f"{jpeg[1]} is truncated", f"{jpeg[2]} is truncated"),
        *(f"{jpeg[3]} cannot be read as an image", f"{jpeg[4]} is truncated", f"{jpeg[5]} cannot be opened"),
        *(f"{progressive[0]} is truncated", f"{png[0]} is truncated", f"{png[1]} is truncated"),
        *(f"{path} has too many pixels" for path in (jpeg[6], progressive[1], png[2])),
    ]


@pytest.mark.parametrize("options", [(), ("-DSANITIZE=ON",)])
def test_damaged_images(expected, data, place, options):
    """Named, counted, left out, status 3; the rest is done. Also with addresses and undefined behaviour checked."""
    copy, problems = spoil(data, place)
    # Lite keeps its singletons; the leak check would take them for leaks.
    result = infer(program("DDRNet", *options), copy, place, "--num_threads", "3", ASAN_OPTIONS="detect_leaks=0")
    assert result.returncode == 3, result.stderr
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert sorted(warnings) == sorted(f"warning: {problem}; going on without it" for problem in problems)
    assert f"240 of 240 images, {len(problems)} skipped" in result.stdout.splitlines()[-1]
    skipped = {Path(re.match(r"(.*\.(JPEG|png)) ", problem)[1]).stem for problem in problems}
    found = results(place)
    assert len(skipped) == len(problems) and found.keys() == expected.keys() - skipped
    assert found == {name: logits for name, logits in expected.items() if name in found}


def test_no_image_can_be_read(main, place):
    (place / "images").mkdir()
    (place / "images" / "a.JPEG").write_bytes(b"")
    (place / "time_Result").mkdir()
    (place / "time_Result" / "test_perform_static.txt").write_text("of an earlier run")
    result = infer(main, place / "images", place)
    assert result.returncode == 3 and "1 of 1 images, 1 skipped" in result.stdout
    assert results(place) == {} and not list((place / "time_Result").iterdir())


def test_where_images_are_found(main, expected, data, place):
    """A flat folder; a root with val/; endings in any case; hidden folders and other files left alone.

    What counts is the content, not the ending.
    """
    paths = sorted(data.glob("*/*"))[:6]
    for number, path in enumerate(paths):
        suffix = (".jpg", ".jpeg", ".JPEG", ".png", ".PNG", ".JPG")[number]
        for folder in ("flat", "root/val/class", "root/val/.hidden", "root/train/class"):
            (place / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place / folder / f"{path.stem}{suffix}")
    (place / "flat" / "notes.txt").write_text("no image")
    for folder in ("flat", "root", "root/val"):
        result = infer(main, place / folder, place)
        assert result.returncode == 0, result.stderr
        assert results(place) == {path.stem: expected[path.stem] for path in paths}
    path = next(data.glob("*/????? png.png"))
    bad = place / "other content"
    bad.mkdir()
    for name, kind in {"a": "TIFF", "b": "GIF", "c": "PPM", "d": "JPEG2000"}.items():
        Image.open(path).save(bad / f"{name}.jpg", format=kind)
    os.mkfifo(bad / "e.jpg")
    Image.new("RGB", (70_000, 1)).save(bad / "f.png")
    Image.new("RGB", (1, 70_000)).save(bad / "g.bmp")
    (bad / "._h.jpg").write_bytes(b"of macOS")
    shutil.copy2(path, bad)
    result = infer(main, bad, place)
    assert result.returncode == 3 and results(place) == {path.stem: expected[path.stem]}
    told = dict.fromkeys("abcd", "cannot be read as an image") | dict.fromkeys("fg", "has too many pixels")
    told["e"] = "is no regular file"
    found = dict(re.findall(r"^warning: .*/(\w)\.\w+ (.*); going on without it$", result.stderr, re.MULTILINE))
    assert found == told


# ----- what cannot run -----


def test_one_line_and_status_2(main, data, place):
    def error(*more, **variables):
        return one_line_error(infer(main, data, place, *more, **variables))

    assert "no model nowhere; export.py" in error("--model_path", "nowhere")
    assert "no folder nowhere; set --dataset_path" in error("--dataset_path", "nowhere")
    (place / "empty").mkdir()
    assert "no images" in error("--dataset_path", place / "empty")
    assert "cannot write /proc/" in error("--output_dir", "/proc/nowhere")
    assert "cannot write" in error("--output_dir", MODEL)
    found = error("--device_target", "Ascend", "--device_id", "3")
    assert "on Ascend 3 (" in found and f", see {place}/libraries.log)" in found
    assert "ERROR" in (place / "libraries.log").read_text()
    for wrong in (["--crop", "200"], ["--batch_size", "2"]):
        found = error(*wrong)
        assert "is 1x3x224x224, but" in found and "set them as it was exported" in found
    text = place / "text.mindir"
    text.write_text("no model")
    assert "cannot load" in error("--model_path", text)
    text.write_bytes(MODEL.read_bytes()[:100_000])
    assert "cannot load" in error("--model_path", text)
    for flags, words in {
        ("--device_target", "GPU"): "choose Ascend or CPU",
        ("--interpolation", "lanczos"): "choose bilinear or bicubic",
        ("--num_threads", "-1"): "whole number from 0",
        ("--num_threads", "1000000"): "whole number from 0 to",
        ("--crop", "12x"): "whole number",
        ("--batch_size", "0"): "whole number from 1",
        ("--crop", "300"): "--crop 300 is larger than --resize 256",
        ("--colour", "red"): "--colour is no flag",
        ("--crop",): "--crop has no value",
        ("--output_dir=",): "--output_dir is empty",
        ("--output_dir", "--resume"): "--output_dir has no value",
    }.items():
        assert words in error(*flags)
    assert "no model; set --model_path" in one_line_error(run([main], place))
    (place / "two" / "a").mkdir(parents=True)
    for name in ("x.JPEG", "x.png"):
        (place / "two" / "a" / name).write_bytes(b"")
    assert "x_0.bin; rename one of them" in error("--dataset_path", place / "two")
    assert results(place) == {}


def test_help(main, place):
    result = run([main, "--help"], place)
    assert result.returncode == 0 and result.stderr == ""
    paths = ("--model_path", "--dataset_path", "--output_dir")
    preparation = ("--resize", "--crop", "--interpolation", "--batch_size", "--num_threads")
    for flag in (*paths, *preparation, "--device_target", "--device_id", "--resume"):
        assert flag in result.stdout


def test_a_model_of_a_newer_mindspore(main, data, place):
    class Mean(nn.Cell):
        def construct(self, images):
            return images.mean((2, 3))

    here = os.getcwd()
    os.chdir(place)
    try:
        ms.export(Mean(), ms.Tensor(np.zeros((1, 3, 224, 224), np.float32)), file_name="new", file_format="MINDIR")
    finally:
        os.chdir(here)
    error = one_line_error(infer(main, data, place, "--model_path", "new.mindir"))
    assert "cannot load new.mindir" in error and "of a newer MindSpore; take the MindSpore Lite of the release" in error


def test_no_room(main, data, place):
    """Files may not grow beyond 20 bytes: one line, and nothing half-written."""
    result = subprocess.run(
        ["bash", "-c", 'trap "" XFSZ; exec prlimit --fsize=20 "$@"', "bash", *map(str, words(main, data, place))],
        capture_output=True,
        text=True,
    )
    assert "File too large; make room or set --output_dir" in one_line_error(result)
    assert not list((place / "result_Files").iterdir())


# ----- many images -----


@pytest.fixture(scope="module")
def many(data, tmp_path_factory):
    """2,000 images: links to the 240."""
    folder = tmp_path_factory.mktemp("many") / "images"
    folder.mkdir()
    paths = sorted(data.glob("*/*"))
    for number in range(MANY):
        path = paths[number % len(paths)]
        (folder / f"{number:04d}{path.suffix}").hardlink_to(path)
    return folder, [path.stem for path in paths]


def start(main, data, place, *more) -> subprocess.Popen:
    command = [str(word) for word in words(main, data, place, *more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def peak(main, data, place) -> int:
    """Largest memory in MB of a run (not its ru_maxrss, in which this process's from before exec counts)."""
    place.mkdir()
    process = start(main, data, place)
    most = 0
    while process.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        most = max(most, int(found[1]) if found else 0)  # none left when it has ended
        time.sleep(0.01)
    assert process.communicate()[1] == "" and process.returncode == 0
    return most // 1024


def test_memory_is_flat(main, data, many, place):
    few, all_of_them = peak(main, data, place / "few"), peak(main, many[0], place / "many")
    print(f"peak memory: {few} MB for 240 images, {all_of_them} MB for {MANY}")
    assert all_of_them <= few + 30


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_interrupted_and_resumed(main, expected, many, place, number):
    """Only what is missing is computed, and the results are those of one run."""
    folder, names = many
    process = start(main, folder, place)
    deadline = time.monotonic() + 120
    while len(results(place)) < MANY // 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert (process.returncode, errors) == (130, "interrupted; go on with --resume\n")
    done = {path: path.stat().st_mtime_ns for path in (place / "result_Files").glob("*_0.bin")}
    assert MANY // 4 <= len(done) < MANY

    result = infer(main, folder, place, "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{len(done)} of {MANY} images are done already\n" in result.stdout
    assert f"{MANY - len(done)} of {MANY - len(done)} images, 0 skipped" in result.stdout
    assert done == {path: path.stat().st_mtime_ns for path in done}, "computed again"
    assert results(place) == {f"{k:04d}": expected[names[k % len(names)]] for k in range(MANY)}


def test_resume_needs_the_same_run(main, expected, data, place):
    def texts(*more):
        result = infer(main, data, place, *more)
        assert result.returncode == 0, result.stderr
        return result.stdout

    texts("--resume")  # nothing is there yet
    assert "240 of 240 images are done already\n0 images" in texts("--resume", "--num_threads", "1")
    victim = place / "result_Files" / f"{next(iter(expected))}_0.bin"
    victim.write_bytes(b"cut")
    assert "239 of 240 images are done already\n" in texts("--resume")
    assert results(place) == expected
    (place / "root").mkdir()  # the same images
    (place / "root" / "val").symlink_to(data)
    assert "240 of 240 images are done already\n" in texts("--resume", "--dataset_path", place / "root")
    same_names = shutil.copytree(data, place / "same names")

    def refused(*more):
        error = one_line_error(infer(main, data, place, "--resume", *more))
        assert "result_Files is of another run (" in error and "leave out --resume" in error

    refused("--interpolation", "bicubic")
    refused("--resize", "300")
    refused("--model_path", edited(place, 1))
    refused("--dataset_path", same_names)
    settings = place / "result_Files" / ".settings"
    before = settings.read_text()
    settings.write_text(before.replace(" on CPU, ", " on Ascend, "))  # as if there had been one
    refused()
    settings.write_text(before)
    assert results(place) == expected
    (place / "result_Files" / "old_0.bin").write_bytes(b"1234")
    assert f"removed 241 results of an earlier run from {place}/result_Files\n" in texts("--interpolation", "bicubic")
    assert results(place).keys() == expected.keys() and results(place) != expected
    assert len(read_logits(victim)) == 10


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_what_a_killed_run_left_is_removed(main, expected, data, place, more):
    """Temporary files of another process, and nothing that is called otherwise."""
    others = {"result_Files": [".12a.part", "12.part", "..part"], "time_Result": [".part"]}
    for folder, names in others.items():
        (place / folder).mkdir()
        for name in (".4194304.part", *names):
            (place / folder / name).write_bytes(b"half")
    assert infer(main, data, place, *more).returncode == 0
    assert results(place) == expected
    for folder, names in others.items():
        left = {path.name for path in (place / folder).iterdir() if path.name.endswith(".part")}
        assert left == set(names)


# Put before the program: SIGINT as soon as it is caught, which is before the model is loaded.
SIGINT_AT_ONCE = """
#include <dlfcn.h>
#include <signal.h>
int sigaction(int number, const struct sigaction* action, struct sigaction* before) {
  int (*real)(int, const struct sigaction*, struct sigaction*) = dlsym(RTLD_NEXT, "sigaction");
  int status = real(number, action, before);
  if (number == SIGINT && action) raise(SIGINT);
  return status;
}
"""


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_interrupted_before_the_first_image(main, data, place, more):
    """Status 130, one line, and the results of an earlier run are still there."""
    words = ["c++", "-D_GNU_SOURCE", "-w", "-shared", "-fPIC", "-x", "c", "-", "-o", place / "early.so"]
    subprocess.run(words, input=SIGINT_AT_ONCE, text=True, check=True)
    earlier = place / "result_Files" / "earlier_0.bin"
    earlier.parent.mkdir()
    earlier.write_bytes(b"1234")
    result = infer(main, data, place, *more, LD_PRELOAD="./early.so")  # its path must have no space
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")
    assert [path.name for path in earlier.parent.iterdir()] == [earlier.name]


def test_the_progress_on_a_terminal(main, expected, many, place):
    """One line that is rewritten."""
    leader, follower = pty.openpty()
    process = subprocess.Popen([str(word) for word in words(main, many[0], place)], stdout=follower)
    os.close(follower)
    shown = b""
    while select.select([leader], [], [], 120)[0]:
        try:
            shown += os.read(leader, 1 << 16)
        except OSError:  # the program has gone
            break
    os.close(leader)
    assert process.wait() == 0
    lines = re.findall(rb"\r\x1b\[K(\d+) of 2000 images, 0 skipped, [\d.]+ images/s", shown)
    assert len(lines) > 1 and lines[-1] == b"2000" and sorted(lines, key=int) == lines
