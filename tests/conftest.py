"""What every test folder shares: the paths, and `src`, which exists once in every model folder."""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import utils  # noqa: F401  (sets the environment before any test imports mindspore)

# isort: split
import mindspore

# Once something has run, MindSpore allows the device that has been set only, and none if it has not been set.
mindspore.set_device("CPU")

MODELS = {"drnet": "DRNet", "resnest": "ResNeSt", "dynamicquant": "DynamicQuant", "ddrnet": "DDRNet"}
_modules: dict[str, dict] = {}
_active: list[str] = []


def _activate(path: Path) -> None:
    """Make `src` that of the model which the test file `path` is about, so that one process can test several models."""
    model = next((MODELS[part] for part in path.parts if part in MODELS), None)
    if _active == [model]:
        return
    for name in [name for name in sys.modules if name.split(".")[0] == "src"]:
        _modules.setdefault(_active[0], {})[name] = sys.modules.pop(name)
    if _active and _active[0]:
        sys.path.remove(str(ROOT / _active[0]))
    _active[:] = [model]
    if model:
        sys.path.insert(0, str(ROOT / model))
        sys.modules.update(_modules.get(model, {}))


def pytest_collectstart(collector):
    if collector.path.suffix == ".py":
        _activate(collector.path)


def pytest_runtest_setup(item):
    _activate(item.path)


@pytest.fixture(scope="module", autouse=True)
def memory_goes_back():
    """What a file's networks took is free for the next file, and for the commands that the tests start."""
    yield
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def run_script(*words, cwd: Path, timeout: int = 600, **variables: str) -> subprocess.CompletedProcess:
    """Run `python words` in `cwd` as a user would, and wait for it."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def stop_training(command: list, line: str, seconds: float, cwd: Path) -> str:
    """Run `python command`, a training, and press Ctrl-C so long after a line that begins so; returns its output."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    printed = []
    while not printed or not printed[-1].startswith(line):
        printed.append(process.stdout.readline())
        assert printed[-1], process.stderr.read()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=300)
    assert process.returncode == 130, (printed, rest, errors)
    return "".join(printed) + rest + errors


def one_line_error(result: subprocess.CompletedProcess) -> str:
    """The error of a command that must have failed as the conventions want it: one line on stderr and status 2."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = result.stderr.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]
