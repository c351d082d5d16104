"""utils/infer_310.py, the program in Python; that its results are those of the C++ program, test_program.py tests."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, one_line_error

sys.path.insert(0, str(ROOT / "tests" / "ascend310"))
import samples
from lite import MODEL, run


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "image net"
    samples.make(root, 24, largest=300)
    return root


def infer(data: Path, place: Path, *more) -> subprocess.CompletedProcess:
    flags = ["--model_path", MODEL, "--dataset_path", data, "--device_target", "CPU", "--output_dir", place]
    return run([sys.executable, ROOT / "utils" / "infer_310.py", *flags, "--num_threads", "2", *more], data)


def results(place: Path) -> dict[str, bytes]:
    return {path.name.removesuffix("_0.bin"): path.read_bytes() for path in (place / "result_Files").glob("*_0.bin")}


def test_damaged_images_and_resume(data, tmp_path):
    """Named and left out with status 3; with --resume the missing ones are computed, if the settings are the same."""
    place = tmp_path / "a place"
    victims = sorted(data.glob("*/* jpeg.JPEG"))[:2]
    content = [victim.read_bytes() for victim in victims]
    victims[0].write_bytes(b"")
    victims[1].write_bytes(content[1][: len(content[1]) // 2])
    result = infer(data, place)
    assert result.returncode == 3 and "22 images, 2 skipped" in result.stdout
    warnings = [line for line in result.stderr.splitlines() if "going on without it" in line]
    for victim, line in zip(victims, sorted(warnings), strict=True):
        assert line.startswith(f"warning: {victim} cannot be read as an image")
    # Of what is lost in others, such as greys of 16 bits, one is named.
    assert len(re.findall("^warning: .* have 16 bits, .* the first such image only", result.stderr, re.MULTILINE)) == 1
    before = results(place)
    assert len(before) == 22
    times = (place / "time_Result" / "test_perform_static.txt").read_text()
    assert times.startswith("images: 22\nskipped: 2\nbatch_size: 1\ninference of a batch, mean ms: ")

    for victim, whole in zip(victims, content):
        victim.write_bytes(whole)
    cut = place / "result_Files" / f"{next(iter(before))}_0.bin"
    cut.write_bytes(b"cut")
    kept = {path: path.stat().st_mtime_ns for path in cut.parent.glob("*_0.bin") if path != cut}
    same_names = shutil.copytree(data, tmp_path / "same names")
    settings = cut.parent / ".settings"
    right = settings.read_text()
    for more, text in {
        ("--interpolation", "bicubic"): right,
        ("--dataset_path", same_names): right,
        (): right.replace(" on CPU, ", " on GPU, "),
    }.items():
        settings.write_text(text)
        assert "result_Files is of another run (" in one_line_error(infer(data, place, "--resume", *more))
    settings.write_text(right)
    result = infer(data, place, "--resume")
    assert result.returncode == 0 and "3 of 24 images to do" in result.stdout
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    after = results(place)
    assert len(after) == 24 and after == before | {victim.stem: after[victim.stem] for victim in victims}


def test_one_line_and_status_2(data, tmp_path):
    def error(*more):
        return one_line_error(infer(data, tmp_path / "place", *more))

    assert "no model nowhere; export.py" in error("--model_path", "nowhere")
    assert "no folder nowhere" in error("--dataset_path", "nowhere")
    assert "cannot write to /proc/" in error("--output_dir", "/proc/nowhere")
    assert "--crop 300 is larger than --resize 256" in error("--crop", "300")
    assert "--num_threads 100000 is too much" in error("--num_threads", "100000")
    assert "no Ascend that MindSpore can use" in error("--device_target", "Ascend")
    for wrong in (["--crop", "200"], ["--batch_size", "2"]):
        found = error(*wrong)
        assert "is [1, 3, 224, 224], but" in found and "set them as it was exported" in found
    (tmp_path / "text.mindir").write_text("no model")
    assert "cannot be read as a MINDIR file" in error("--model_path", tmp_path / "text.mindir")
    assert results(tmp_path / "place") == {}
