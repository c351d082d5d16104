"""MindSpore Lite and the programs built with it, made once and kept in the environment's folder.

    python tests/ascend310/lite.py

prints the folder to which MS_LITE_HOME can be set.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
RELEASE = "2.0.0"  # which tests/fixtures/digits_tiny_v1.mindir is exported for
MODEL = ROOT / "tests" / "fixtures" / "digits_tiny_v1.mindir"
KEPT = Path(sys.prefix) / "ascend310"


def once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of what is kept; `make` fills it if it is not there, in one process only."""
    folder = KEPT / name
    KEPT.mkdir(exist_ok=True)
    with (KEPT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            part = KEPT / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder


def lite_home() -> Path:
    """The unpacked wheel of MindSpore Lite; a test that needs it is skipped if it cannot be had.

    It is made for an older Python, but its C++ library needs none.
    """

    def download(folder: Path) -> None:
        words = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.7"]
        words += [f"mindspore-lite=={RELEASE}", "-d", str(folder)]
        result = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"MindSpore Lite {RELEASE} cannot be downloaded: {result.stderr.strip().splitlines()[-1]}")
        (wheel,) = folder.glob("*.whl")
        shutil.unpack_archive(wheel, folder, "zip")
        wheel.unlink()

    return once(f"mindspore_lite-{RELEASE}", download)


def run(words: list, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a command without this process's device, program and Lite settings."""
    dropped = ("DEVICE_TARGET", "BACKEND", "INFER_PROGRAM", "MS_LITE_HOME", "LITE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**kept, "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


def content(*paths: Path) -> str:
    """A name for what the files hold."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def sources(model: str) -> dict[str, Path]:
    """The files of a model's program by relative path, without what building leaves."""
    folder = ROOT / model / "ascend310_infer"
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if name.split("/")[0] not in ("build", "out")}


def program(model: str = "ResNeSt", *options: str) -> Path:
    """`main`, built by the model's build.sh; what needs it is skipped if build.sh says that a tool is missing."""
    files = sources(model)
    home = lite_home()

    def build(folder: Path) -> None:
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / name)
        result = run(["bash", "build.sh", "-DWERROR=ON", *options], folder, MS_LITE_HOME=str(home))
        if result.returncode == 2 and result.stderr.startswith("error: no "):
            pytest.skip(result.stderr.strip())
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]

    return once(f"{model}{''.join(options)}-{content(*files.values())}", build) / "out" / "main"


def tensors(paths: list[Path], resize: int, crop: int, interpolation: str, output: Path) -> np.ndarray:
    """What the program gives to its model for these images, float32 (N, 3, crop, crop); `output` is a file to use."""
    result = run([tensors_program(), resize, crop, interpolation, output, *paths], ROOT)
    assert result.returncode == 0, result.stderr
    return np.fromfile(output, np.float32).reshape(len(paths), 3, crop, crop)


def tensors_program() -> Path:
    """tensors.cc with the program's preprocessing."""
    folder = ROOT / "ResNeSt" / "ascend310_infer"
    files = [Path(__file__).with_name("tensors.cc"), folder / "src" / "preprocess.cc", folder / "src" / "resample.cc"]
    headers = [folder / "inc" / name for name in ("preprocess.h", "resample.h")]

    def build(target: Path) -> None:
        if not shutil.which("g++") or not shutil.which("pkg-config"):
            pytest.skip("no g++ or no pkg-config; install them (apt-get install g++ pkg-config)")
        opencv = run(["pkg-config", "--cflags", "opencv4"], target)
        if opencv.returncode:
            pytest.skip("no OpenCV for C++; install it (apt-get install libopencv-dev)")
        words = ["g++", "-std=c++17", "-O2", "-ffp-contract=off", "-I", folder / "inc", *opencv.stdout.split(), *files]
        result = run([*words, "-lopencv_imgcodecs", "-lopencv_core", "-o", target / "tensors"], target)
        assert result.returncode == 0, result.stderr[-4000:]

    return once(f"tensors-{content(*files, *headers)}", build) / "tensors"


if __name__ == "__main__":
    print(lite_home())
