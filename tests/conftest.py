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
import cv2  # noqa: F401  (this one and the next set variables, which must not look as if a test had set them)
import mindspore
import sklearn  # noqa: F401
from fork_server import ForkServer

# Once something has run, MindSpore allows the device that has been set only, and none if it has not been set.
mindspore.set_device("CPU")

MODELS = {"drnet": "DRNet", "resnest": "ResNeSt", "dynamicquant": "DynamicQuant", "ddrnet": "DDRNet"}
SERVER = ForkServer()
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
    """Run `python words` in `cwd` as a user would, and wait for it.

    A script runs in a fork of a process that has imported MindSpore, anything else in a process of its own; so does a
    script whose `variables` are read at import.
    """
    words, environment = [str(word) for word in words], {**os.environ, **variables}
    if not SERVER.takes(words, cwd, environment):
        return run_process(*words, cwd=cwd, timeout=timeout, **variables)
    return SERVER.start(words, cwd, environment).wait(timeout)


def run_process(*words, cwd: Path, timeout: int = 600, **variables: str) -> subprocess.CompletedProcess:
    """`run_script` in a fresh process, for tests about what Python or MindSpore do when they start."""
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
    training = SERVER.start([str(word) for word in command], cwd, dict(os.environ))
    while not any(printed.startswith(line) for printed in list(training.stdout)):
        assert training.running(), training.wait(10)
        time.sleep(0.01)
    time.sleep(seconds)
    training.send_signal(signal.SIGINT)
    result = training.wait(300)
    assert result.returncode == 130, result
    return result.stdout + result.stderr


def one_line_error(result: subprocess.CompletedProcess) -> str:
    """The error of a command that must have failed as the conventions want it: one line on stderr and status 2."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = result.stderr.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]
