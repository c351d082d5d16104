"""Starts a script on several devices with msrun, in the foreground, and ends it cleanly."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

from utils.cli import UserError

GRACE_SECONDS = 120
# Environment variable that every process of one launch carries.
MARK = "DEVICE_LAUNCH_ID"


def is_worker() -> bool:
    """Whether msrun started this process: a worker, or the scheduler, which runs the same script as far as `init()`."""
    return "MS_ROLE" in os.environ


def launch(script: str | Path, arguments: list[str], devices: int, log_dir: str | Path) -> int:
    """Run `python script arguments` on `devices` devices; show rank 0's output, keep every rank's in `log_dir`.

    The first Ctrl-C asks the workers with SIGTERM to stop at the end of their step, a second one, or two minutes, ends
    them. None of their processes outlives this call.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        UserError: a worker failed; the message says which and why. Or the logs cannot be written.
    """
    log_dir = Path(log_dir).resolve()
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        for old in log_dir.glob("worker_*.log"):
            old.unlink()
        output = (log_dir / "msrun.log").open("w")
    except OSError as error:
        raise UserError(f"cannot write logs to {log_dir}: {error.strerror}; choose another place") from error
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mindspore.parallel.cluster.run"),
        f"--worker_num={devices}",
        f"--local_worker_num={devices}",
        f"--master_port={port}",
        f"--log_dir={log_dir}",
        f"--tail_worker_log={devices}",  # of no worker: we show rank 0
        "--join=True",
        *("python3", str(script), *arguments),
    ]
    mark = uuid.uuid4().hex
    environment = {
        # Workers share the machine's cores; each would otherwise start threads for all of them.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // devices)),
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # msrun's python3
        "PYTHONUNBUFFERED": "1",
        MARK: mark,
    }
    asked: list[float] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, lambda *_: asked.append(time.monotonic())) for number in numbers}
    shown = _Shown(log_dir / "worker_0.log")
    ranks: dict[int, int] = {}
    failure = None
    with output:
        # Its own session, so that Ctrl-C reaches the workers through us only and they can finish their step.
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while process.poll() is None and not failure and not asked:
            time.sleep(0.3)
            shown.update()
            if len(ranks) < devices:
                ranks |= {worker.pid: rank for rank, worker in _workers(mark)}
            failure = _failure(log_dir, ranks)
        if process.poll():
            failure = failure or f"msrun failed: {_last_line(log_dir / 'msrun.log')} (the logs: {log_dir})"
        if asked and shown.position:  # else the workers are still loading
            _finish_step(process, mark, asked, shown)
    finally:
        _end(mark)
        process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
    shown.update(final=True)
    if asked:
        return 130
    if failure:
        raise UserError(failure)
    return 0


class _Shown:
    """Copies a log file to stdout as it grows."""

    def __init__(self, log: Path):
        self.log = log
        self.position = 0

    def update(self, final: bool = False) -> None:
        """Print the whole lines added since, or everything if `final`."""
        if not self.log.is_file():
            return
        with self.log.open("rb") as file:
            file.seek(self.position)
            added = file.read()
        if not final:
            added = added[: added.rfind(b"\n") + 1]
        self.position += len(added)
        # MindSpore's lines, which come whatever the log level and may follow ours without a line end.
        print(re.sub(r"\[INFO\] DISTRIBUTED.*\n?", "", added.decode(errors="replace")), end="", flush=True)


def _finish_step(process: subprocess.Popen, mark: str, asked: list[float], shown: _Shown) -> None:
    """Send the workers SIGTERM and wait until they have left, for a second request, or for GRACE_SECONDS."""
    print("stopping at the end of this step; Ctrl-C again to stop at once", file=sys.stderr, flush=True)
    process.send_signal(signal.SIGSTOP)  # msrun would kill the others as soon as one has left
    for _, worker in _workers(mark):
        with contextlib.suppress(psutil.Error):
            worker.terminate()  # MindSpore puts a handler of its own on SIGINT
    # Some programs pass the same signal on twice, at once.
    while asked[-1] - asked[0] < 1 and time.monotonic() - asked[0] < GRACE_SECONDS and any(_workers(mark)):
        time.sleep(0.3)
        shown.update()


def _family(mark: str) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """The living processes of a launch, whoever is their parent, with their environments."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get(MARK) == mark:
                yield process, environment


def _workers(mark: str) -> Iterator[tuple[int, psutil.Process]]:
    """Rank and process of the living workers, without processes that they started."""
    for process, environment in _family(mark):
        with contextlib.suppress(ProcessLookupError):
            if environment.get("MS_ROLE") == "MS_WORKER" and os.getsid(process.pid) == process.pid:
                yield int(environment["RANK_ID"]), process


def _end(mark: str) -> None:
    """Kill every process of a launch; nothing to do if all have ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (family := list(_family(mark))):
        for process, _ in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)


def _failure(log_dir: Path, ranks: dict[int, int]) -> str | None:
    """Which worker failed first, and why; None if msrun has not seen one fail."""
    found = re.search(r"Worker process (\d+) exit with exception\. Error code: (-?\d+)", _text(log_dir / "msrun.log"))
    if found is None:
        return None
    rank, status = ranks.get(int(found[1]), 0), int(found[2])  # of a worker that left at once the rank is not known
    log = log_dir / f"worker_{rank}.log"
    telling = re.findall(r"^(?:error: |(?=[\w.]*(?:Error|Exception): ))(.+)", _text(log), re.MULTILINE)
    if status < 0:
        reason = f"killed by {signal.Signals(-status).name}; is the machine out of memory?"
    else:
        reason = telling[-1] if telling else f"exit status {status}"
    return f"{log.stem} failed: {reason} (all of it: {log})"


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.is_file() else ""


def _last_line(log: Path) -> str:
    return _text(log).strip().split("\n")[-1]
