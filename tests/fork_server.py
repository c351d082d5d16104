"""Runs scripts in forks of one process that has imported MindSpore, so that a command starts in milliseconds.

The tests run hundreds of commands, and a fresh `python script.py` imports MindSpore for seconds each time. A process
that has imported it, and has run no graph yet, can be forked: the child chooses its device, compiles and runs as usual.

`ForkServer` is the side of the tests. The other one is this file run as a script. For each request it forks a child,
which gets the command's folder, environment, outputs, `sys.argv` and `sys.path`, runs the script as `__main__` and
leaves through the interpreter's own end, with its handlers, tracebacks and exit status. What differs from a fresh
process: the modules in `PRELOADED` are imported, strings have the same hashes in every command, and standard input is
/dev/null. A test about any of these, or about what is read at import, starts a process of its own.
"""

import builtins
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Nothing of the project's own: each command imports that afresh.
PRELOADED = "numpy mindspore mindspore.dataset mindspore.dataset.vision mindspore.communication mindspore.train"
PRELOADED += " PIL.Image tqdm yaml"
# Variables that Python or the modules above read when they start.
READ_AT_IMPORT = ("ASCEND", "DNNL_", "DEVICE_ID", "GLOG_", "KMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL_", "MS_")
READ_AT_IMPORT += ("OMP_", "ONEDNN_", "OPENBLAS_", "OPENCV_", "PROTOCOL_BUFFERS_", "PYTHON", "QT_", "RANK_", "TZ")
LARGEST = 1 << 17  # bytes of a request: the environment and the command line
PR_SET_PDEATHSIG = 1


class Command:
    """A command that runs; its outputs are read as they come.

    Attributes:
        pid: the number of its process, which leads a session of its own.
        stdout, stderr: the lines so far.
    """

    def __init__(self, words: list[str], pid: int, stdout: int, stderr: int, status: int):
        self.words = words
        self.pid = pid
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self._status: list[str] = []
        pairs = ((stdout, self.stdout), (stderr, self.stderr), (status, self._status))
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in pairs]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(file: int, lines: list[str]) -> None:
        with open(file) as stream:
            lines.extend(stream)

    def running(self) -> bool:
        return self._readers[2].is_alive()

    def send_signal(self, number: int) -> None:
        """To the command's own process, while it runs."""
        if self.running():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the command and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout: float) -> subprocess.CompletedProcess:
        """Wait until the command has ended and its outputs are closed, as `subprocess.run` does.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
            RuntimeError: the server died.
        """
        end = time.monotonic() + timeout
        try:
            for reader in self._readers:
                reader.join(max(end - time.monotonic(), 0))
                if reader.is_alive():
                    raise subprocess.TimeoutExpired(self.words, timeout, *map("".join, (self.stdout, self.stderr)))
        except BaseException:
            self.kill()
            raise
        if not self._status:
            raise RuntimeError(f"the fork server died while it ran {self.words}")
        status = os.waitstatus_to_exitcode(int(self._status[0]))
        return subprocess.CompletedProcess(self.words, status, "".join(self.stdout), "".join(self.stderr))


class ForkServer:
    """The server's process; starts with the first command and ends with the process that made it."""

    def __init__(self):
        self.process: subprocess.Popen | None = None

    def takes(self, words: list[str], cwd: Path, environment: dict[str, str]) -> bool:
        """Whether it can run `python words`: a script, in an environment that does not change what has been read."""
        script = Path(cwd, words[0])
        if script.suffix != ".py" or not script.is_file():
            return False
        self._ensure()
        changed = {name for name, _ in environment.items() ^ self.environment.items()}
        return not any(name.startswith(READ_AT_IMPORT) for name in changed)

    def start(self, words: list[str], cwd: Path, environment: dict[str, str]) -> Command:
        """Run `python words` in the folder `cwd` with this environment."""
        self._ensure()
        request = json.dumps([words, str(cwd), environment]).encode()
        assert len(request) <= LARGEST, f"{len(request)} bytes of environment and command line"
        pipes = [os.pipe() for _ in range(3)]
        socket.send_fds(self.socket, [request], [end for _, end in pipes])
        for _, end in pipes:
            os.close(end)
        stdout, stderr, status = (end for end, _ in pipes)
        number = b""
        while not number.endswith(b"\n"):
            number += os.read(status, 1) or b"0\n"
        if not int(number):
            raise RuntimeError("the fork server died")
        return Command([sys.executable, *words], int(number), stdout, stderr, status)

    def _ensure(self) -> None:
        if self.process and self.process.poll() is None:
            return
        self.environment = dict(os.environ)
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * LARGEST)
        with other:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the tests
            )


# ===== The server's process ===== #


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def preload() -> dict[str, str]:
    """Import what the commands need; returns the variables that this has changed."""
    before, path = dict(os.environ), list(sys.path)
    sys.path.insert(0, str(ROOT))
    for name in ["utils", *PRELOADED.split()]:
        importlib.import_module(name)
    del sys.modules["utils"]
    sys.path[:] = path
    gc.collect()
    gc.freeze()  # the memory stays shared with the children
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def serve(requests: socket.socket, changed: dict[str, str]) -> list[str]:
    """Fork a child for each request until the tests end. Returns in the children alone: the words of their command."""
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([requests], [], [], 0.01 if running else None)
        for pid, status in list(running.items()):
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                os.write(status, b"%d\n" % code)
                os.close(running.pop(pid))
        if not ready:
            continue
        request, files, _, _ = socket.recv_fds(requests, LARGEST, 3)
        if not request:
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            sys.exit()
        pid = os.fork()
        if not pid:
            for file in (requests.detach(), *running.values()):
                os.close(file)
            words, cwd, environment = json.loads(request)
            enter(cwd, {**environment, **changed}, *files)
            return words
        os.close(files[0])
        os.close(files[1])
        os.write(files[2], b"%d\n" % pid)
        running[pid] = files[2]


def enter(cwd: str, environment: dict[str, str], stdout: int, stderr: int, status: int) -> None:
    """Make this child the process that Python would start in the folder `cwd`."""
    os.setsid()
    end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for file in (stdout, stderr, status):
        os.close(file)
    for number, name in ((1, "stdout"), (2, "stderr")):  # the server's own take themselves for /dev/null
        setattr(sys, name, os.fdopen(number, "w", errors=getattr(sys, name).errors, closefd=False))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    importlib.import_module("numpy").random.seed()  # from the system's entropy, as in a new process


def show_traceback(kind: type, error: BaseException, traceback: types.TracebackType | None) -> None:
    """As Python does, but from the script on."""
    while traceback and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


def main_module(script: str) -> tuple[types.CodeType, dict]:
    """The script's code and its namespace, which is that of `__main__`."""
    path = os.path.abspath(script)
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    sys.excepthook = show_traceback
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=path, __builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = module
    return compile(Path(path).read_bytes(), path, "exec"), module.__dict__


if __name__ == "__main__":
    end_with_parent()
    sys.argv[:] = serve(socket.socket(fileno=int(sys.argv[1])), preload())
    exec(*main_module(sys.argv[0]))
