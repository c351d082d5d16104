"""The sample maker: digits against scikit-learn's scans, cuts against the tree they come from, and its refusals."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits

from utils.cli import UserError
from utils.sample_imagenet import main

SCRIPT = ROOT / "utils" / "sample_imagenet.py"
SPLITS = ("train", "val")


def make(cwd: Path, *flags) -> str:
    """What the command prints when it is run in `cwd`, here in this process."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [SCRIPT.name, *map(str, flags)])
        main()
    assert errors.getvalue() == ""
    return out.getvalue()


def refusal(cwd: Path, *flags) -> str:
    """The error of the command, run likewise."""
    with pytest.raises(UserError) as caught:
        make(cwd, *flags)
    return str(caught.value)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.JPEG"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """All digits at 40 x 40: an odd enlargement, so that the middle pixel of every 5 x 5 block is a scanned value."""
    folder = tmp_path_factory.mktemp("digits")
    out = make(folder, "--output", "all", "--size", 40)
    assert out.splitlines()[-1] == "train 1437 images of 10 classes, val 360 images of 10 classes: written to all"
    return folder / "all"


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """12 classes, 6 train and 4 val files each; their bytes are random, as a copy never looks into them."""
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for label in range(12):
            folder = root / split / f"n{label * 37 % 100:08d}"
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_text("not an image")
            for index in range(count):
                (folder / f"{folder.name}_{split}_{index}.JPEG").write_bytes(random.bytes(100))
    return root


def test_split_is_complete_disjoint_and_labelled(digits):
    target = load_digits().target
    seen = {split: [int(path.stem.removeprefix("digit_")) for path in images(digits / split)] for split in SPLITS}
    assert len(seen["train"]) == 1437 and len(seen["val"]) == 360
    assert sorted(seen["train"] + seen["val"]) == list(range(1797))
    for split in SPLITS:
        counts = np.array([len(images(digits / split / str(label))) for label in range(10)])
        share = np.bincount(target) * len(seen[split]) / 1797
        assert np.abs(counts - share).max() <= 1, "not stratified"
    assert all(target[int(path.stem[-4:])] == int(path.parent.name) for path in images(digits))
    assert (digits / "classes.txt").read_text() == "".join(f"{label}\n" for label in range(10))


def test_grey_values_are_those_of_the_scans(digits):
    scans = load_digits().images
    errors = []
    for path in images(digits):
        image = Image.open(path)
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 40))
        pixels = np.asarray(image, np.float64)
        assert (pixels == pixels[..., :1]).all()
        errors.append(pixels[2::5, 2::5, 0] - scans[int(path.stem[-4:])] * 255 / 16)
    assert np.abs(errors).max() < 12 and np.abs(errors).mean() < 1  # one of 16 steps is 15.9 grey levels


def test_smallest_size_is_the_scan_itself(tmp_path):
    make(tmp_path, "--output", "small", "--size", 8, "--images", 3)
    scans = load_digits().images
    for path in images(tmp_path / "small"):
        grey = np.asarray(Image.open(path), np.float64)[..., 0]
        assert np.abs(grey - scans[int(path.stem[-4:])] * 255 / 16).max() < 12


def test_default_size_and_any_working_folder(tmp_path):
    make(tmp_path, "--output", tmp_path / "a b" / "tiny", "--classes", 3, "--images_per_class", 2)
    found = images(tmp_path / "a b" / "tiny")
    assert len(found) == 2 * 3 * 2 and {np.asarray(Image.open(path)).shape for path in found} == {(32, 32, 3)}
    assert (tmp_path / "a b" / "tiny" / "classes.txt").read_text() == "0\n1\n2\n"
    assert [path.name for path in (tmp_path / "a b").iterdir()] == ["tiny"]
    assert (tmp_path / "a b" / "tiny").stat().st_mode & 0o777 == (tmp_path / "a b").stat().st_mode & 0o777


def test_varied_digits_are_the_scans_at_three_sizes(tmp_path):
    out = make(tmp_path, "--output", "varied", "--vary", "--size", 48, "--images", 9)
    assert out.splitlines()[-1] == "train 270 images of 10 classes, val 270 images of 10 classes: written to varied"
    scans, sides, papers = load_digits().images, {}, []
    for path in images(tmp_path / "varied"):
        row, side = int(path.stem[6:10]), int(path.stem[11:-2])
        sides.setdefault(row, []).append(side)
        grey = Image.open(path).convert("L")
        assert grey.size == (48, 48)
        start = (48 - side) // 2
        digit = np.asarray(grey.crop((start, start, start + side, start + side)).resize((8, 8), Image.Resampling.BOX))
        assert np.corrcoef(digit.ravel(), scans[row].ravel())[0, 1] > (0.97 if side > 20 else 0.85), path
        pixels, around = np.asarray(grey, np.float64), np.ones((48, 48), bool)
        around[max(start - 8, 0) : start + side + 8, max(start - 8, 0) : start + side + 8] = False  # a block of JPEG's
        if around.any():
            assert np.ptp(pixels[around]) < 8, path
            papers.append(pixels[around].mean())
    assert all(8 <= small < 21 <= middle < 33 <= large <= 45 for small, middle, large in map(sorted, sides.values()))
    assert min(map(min, sides.values())) < 10 and max(map(max, sides.values())) > 43
    assert min(papers) < 10 and max(papers) > 90


def test_two_runs_write_the_same_bytes(digits, tmp_path):
    (tmp_path / "again").mkdir()  # an empty folder is as good as none
    make(tmp_path, "--output", "again", "--size", 40, "--images", 9)
    again, before = tree(tmp_path / "again"), tree(digits)
    assert len(again) == 2 * 10 * 9 + 1 and again.items() <= before.items()


def test_cut_of_imagenet(imagenet, tmp_path):
    flags = ("--source", imagenet, "--classes", 5, "--images", 3)
    out = make(tmp_path, "--output", "cut", *flags)
    assert out.splitlines()[-1] == "train 15 images of 5 classes, val 15 images of 5 classes: written to cut"
    cut, whole = tree(tmp_path / "cut"), tree(imagenet)
    everything = sorted(path.name for path in (imagenet / "train").iterdir())
    assert cut.pop("classes.txt").decode().splitlines() == everything
    assert len(cut) == 30 and all(whole[path] == data for path, data in cut.items())
    folders = [sorted(path.name for path in (tmp_path / "cut" / split).iterdir()) for split in SPLITS]
    assert folders[0] == folders[1] and len(folders[0]) == 5

    make(tmp_path, "--output", "same", *flags, "--seed", 0)
    make(tmp_path, "--output", "other", *flags, "--seed", 1)
    assert tree(tmp_path / "same") == tree(tmp_path / "cut") != tree(tmp_path / "other")

    make(tmp_path, "--output", "cut of cut", "--source", "cut", "--classes", 2, "--images", 1)
    assert (tmp_path / "cut of cut" / "classes.txt").read_text().splitlines() == everything


def test_source_with_one_split(imagenet, tmp_path):
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "val").symlink_to(imagenet / "val")
    out = make(tmp_path, "--output", "cut", "--source", "imagenet", "--classes", 12, "--images", 4)
    assert out.splitlines()[-1] == "val 48 images of 12 classes: written to cut"
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["classes.txt", "val"]


def test_exist_ok(imagenet, tmp_path):
    flags = ("--output", "sample", "--source", imagenet, "--classes", 2, "--images", 2)
    make(tmp_path, *flags, "--exist_ok")
    before = tree(tmp_path / "sample")
    assert "already in sample" in make(tmp_path, *flags, "--exist_ok")
    assert "exists and is not empty" in refusal(tmp_path, *flags)
    assert "something other" in refusal(tmp_path, *flags, "--exist_ok", "--seed", 3)
    assert "something other" in refusal(tmp_path, "--output", "sample", "--exist_ok")
    assert tree(tmp_path / "sample") == before
    (tmp_path / "sample" / "val" / "n99999999").mkdir()  # would shift the labels
    assert "something other" in refusal(tmp_path, *flags, "--exist_ok")
    (tmp_path / "sample" / "val" / "n99999999").rmdir()
    make(tmp_path, *flags, "--exist_ok")
    changed = images(tmp_path / "sample")[0]
    changed.write_bytes(changed.read_bytes() + b"x")
    assert "something other" in refusal(tmp_path, *flags, "--exist_ok")
    changed.unlink()
    assert "something other" in refusal(tmp_path, *flags, "--exist_ok")


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--size", "7"], "8 to 1024"),
        (["--size", "1025"], "8 to 1024"),
        (["--size", "big"], "big is not a whole number"),
        (["--images", "0"], "0 is not a whole number from 1"),
        (["--classes", "-2"], "-2 is not a whole number from 1"),
        (["--images", "2", "--images_per_class", "3"], "one setting with two values"),
        (["--classes", "11"], "has 10 classes, 11 asked for"),
        (["--images", "100"], "val/0 has 36 images"),
        (["--seed", "1"], "fixed"),
        (["--vary", "--size", "15"], "no room for different sizes"),
        (["--seed", "-1"], "-1 is not a whole number from 0"),
        (["--source", "nowhere", "--classes", "1", "--images", "1"], "neither train/ nor val/"),
        (["--source", "flat", "--classes", "1", "--images", "1"], "no class folders"),
        (["--source", "hollow", "--classes", "1", "--images", "1"], "hollow/val/a holds no images"),
        (["--source", "listed", "--classes", "1", "--images", "1"], "b is not in listed/classes.txt"),
        (["--source", "uneven", "--classes", "1", "--images", "1"], "different classes, such as b"),
        (["--source", "good", "--classes", "3", "--images", "1"], "has 2 classes"),
        (["--source", "good", "--classes", "1", "--images", "1", "--vary"], "digits only"),
        (["--source", "good", "--classes", "2", "--images", "2"], "has 1 images"),
        (["--source", "good", "--classes", "1"], "needs --classes and --images"),
        (["--source", "good", "--classes", "1", "--images", "1", "--size", "32"], "digits only"),
        (["--source", "good", "--classes", "1", "--images", "1", "--output", "good/val/c"], "is inside good"),
        (["--output", "file"], "not empty"),
        (["--output", "file", "--exist_ok"], "something other"),
        (["--output", "file/below", "--images", "1"], "File exists"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, flags, complaint):
    folders = ("flat/train", "uneven/train/a", "uneven/train/b", "uneven/val/a", "good/val/a", "good/val/b")
    folders += ("listed/val/a", "listed/val/b")
    for name in ("file", "hollow/val/a/notes.txt", *(f"{folder}/1.JPEG" for folder in folders)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "listed" / "classes.txt").write_text("a\n")
    before = sorted(tmp_path.rglob("*"))
    assert complaint in refusal(tmp_path, "--output", "sample", *flags)
    assert sorted(tmp_path.rglob("*")) == before


def make_after(first: str, cwd: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run the statement `first`, then the script, in one process."""
    program = f"import runpy, sys; {first}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run([sys.executable, "-c", program, SCRIPT, *flags], cwd=cwd, capture_output=True, text=True)


def test_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "tree" / "val" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "val" / "a" / "1.JPEG").write_bytes(b"x")
    no_space = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    flags = ("--output", "cut", "--source", "tree", "--classes", "1", "--images", "1")
    done = make_after(no_space, tmp_path, *flags)
    assert done.returncode == 2 and "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


@pytest.mark.parametrize("package", ["sklearn", "cv2"])
def test_missing_package_names_the_requirements(tmp_path, package):
    done = make_after(f"sys.modules['{package}'] = None", tmp_path, "--output", "out")
    assert done.returncode == 2 and "requirements.txt" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_names_every_default_and_imports_nothing_slow(tmp_path):
    done = make_after("sys.modules.update(dict.fromkeys(['sklearn', 'cv2', 'mindspore']))", tmp_path, "--help")
    assert done.returncode == 0 and done.stdout.count("default") >= 7


def test_interrupt_leaves_nothing_behind(tmp_path):
    """While it waits for its second image, a pipe."""
    (tmp_path / "tree" / "val" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "val" / "a" / "1.JPEG").write_bytes(b"x")
    os.mkfifo(tmp_path / "tree" / "val" / "a" / "2.JPEG")
    command = [sys.executable, SCRIPT, "--output", "cut", "--source", "tree", "--classes", "1", "--images", "2"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob(".cut.*/cut/val/a/1.JPEG")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("writing 2 images\n", "interrupted\n")
    assert process.returncode == 130 and [path.name for path in tmp_path.iterdir()] == ["tree"]
