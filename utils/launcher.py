"""Starts a script on several devices with msrun, in the foreground, and ends it cleanly."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from utils.cli import UserError

GRACE_SECONDS = 120


def is_worker() -> bool:
    """Whether this process was started by msrun."""
    return os.environ.get("MS_ROLE") == "MS_WORKER"


def launch(script: str | Path, arguments: list[str], devices: int, log_dir: str | Path) -> int:
    """Run `python script arguments` on `devices` devices; show rank 0's output, keep every rank's in `log_dir`.

    The first Ctrl-C asks the workers to stop at the end of their step, a second one, or two minutes, ends them.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        UserError: a worker failed; the message holds the last line of its log.
    """
    log_dir = Path(log_dir).resolve()
    log_dir.mkdir(parents=True, exist_ok=True)
    for old in log_dir.glob("worker_*.log"):
        old.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("msrun")),
        f"--worker_num={devices}",
        f"--local_worker_num={devices}",
        f"--master_port={port}",
        f"--log_dir={log_dir}",
        "--join=True",
        str(script),
        *arguments,
    ]
    # Workers share the machine's cores; each would otherwise start threads for all of them.
    threads = str(max(1, (os.cpu_count() or 1) // devices))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1"}
    with (log_dir / "msrun.log").open("w") as msrun_log:
        # Its own session, so that Ctrl-C reaches the workers through us only and they can finish their step.
        process = subprocess.Popen(
            command, env=environment, stdout=msrun_log, stderr=subprocess.STDOUT, start_new_session=True
        )
        interrupted_at = 0.0
        shown = 0

        def interrupt(number, frame):
            nonlocal interrupted_at
            if interrupted_at:
                _end(process)
            else:
                print("stopping at the end of this step; Ctrl-C again to stop at once", file=sys.stderr, flush=True)
                for worker in _workers(process):
                    worker.send_signal(signal.SIGINT)
            interrupted_at = time.monotonic()

        previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while process.poll() is None:
                shown = _show(log_dir / "worker_0.log", shown)
                if interrupted_at and time.monotonic() - interrupted_at > GRACE_SECONDS:
                    _end(process)
                time.sleep(0.3)
            _show(log_dir / "worker_0.log", shown)
        finally:
            _end(process)
            for number, handler in previous.items():
                signal.signal(number, handler)
    if interrupted_at:
        return 130
    if process.returncode:
        log, line = _failure(log_dir, devices)
        raise UserError(f"{log.stem} failed: {line.removeprefix('error: ')} (all of it: {log})")
    return 0


def _workers(msrun: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(msrun.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _end(msrun: subprocess.Popen) -> None:
    """End msrun and all its processes at once; nothing to do if they have ended."""
    for process in _workers(msrun):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if msrun.poll() is None:
        msrun.kill()
        msrun.wait()


def _show(log: Path, position: int) -> int:
    """Print what has been added to `log` since `position`; returns the new position."""
    if not log.is_file():
        return position
    with log.open(errors="replace") as file:
        file.seek(position)
        for line in file:
            if "[INFO] DISTRIBUTED" not in line:
                print(line, end="")
        sys.stdout.flush()
        return file.tell()


def _failure(log_dir: Path, devices: int) -> tuple[Path, str]:
    """The log that tells why the job failed, and its telling line."""
    logs = [log_dir / f"worker_{rank}.log" for rank in range(devices)]
    texts = {log: log.read_text(errors="replace").strip().split("\n") for log in logs if log.is_file()}
    for sign in ("error: ", "Error: ", "Error"):
        for log, lines in texts.items():
            for line in reversed(lines):
                if sign in line:
                    return log, line
    return log_dir / "msrun.log", (log_dir / "msrun.log").read_text(errors="replace").strip().split("\n")[-1]
