"""Starts a script on several devices with msrun, in the foreground, and ends it cleanly."""

import argparse
import contextlib
import json
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
from utils.hccl_tools.merge_hccl import field, read_server

GRACE_SECONDS = 120
TAIL_LINES = 15
# Environment variable that every process of one launch carries.
MARK = "DEVICE_LAUNCH_ID"
# Comes whatever the log level, and may follow our output without a line end.
MINDSPORE_LINE = r"\[INFO\] DISTRIBUTED.*\n?"


def is_worker() -> bool:
    """Whether msrun started this process: a worker, or the scheduler, which runs the same script as far as `init()`."""
    return "MS_ROLE" in os.environ


def is_scheduler() -> bool:
    """Whether this process is msrun's scheduler, which only waits in `init()` for the workers to end."""
    return os.environ.get("MS_ROLE") == "MS_SCHED"


def device_ids(rank_table_file: str | Path, devices: int) -> list[int]:
    """The devices of a rank table in the order of their ranks.

    The table is as `utils/hccl_tools/hccl_tools.py` writes it, version 1.0, of one server with `devices` devices.

    Raises:
        UserError: it is not.
    """
    path = Path(rank_table_file)
    again = f'make it with utils/hccl_tools/hccl_tools.py --device_num "[0,{devices})"'
    try:
        table = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the rank table {path}: {error.strerror}; {again}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the rank table {path} is not valid JSON ({error}); {again}") from error
    table = field({"JSON": table}, "JSON", dict, str(path))
    for key, expected in (("version", "1.0"), ("status", "completed")):
        if field(table, key, str, str(path)) != expected:
            raise UserError(f"the rank table {path} has {key} {table[key]!r}, not {expected!r}; {again}")
    servers = field(table, "server_list", list, str(path))
    if len(servers) > 1:
        raise UserError(
            f"{path} lists {len(servers)} servers, and the script starts the processes of one; give this server's own "
            "table, or start msrun on each server by hand, with --master_addr and --node_rank"
        )
    listed = read_server(path)["device"]
    if len(listed) != devices:
        raise UserError(f"{path} lists {len(listed)} devices for {devices}; set --device_num {len(listed)}, or {again}")
    ranks = [int(device["rank_id"]) for device in listed]
    if ranks != list(range(devices)):
        raise UserError(f"{path} lists the ranks {', '.join(map(str, ranks))}, not 0 to {devices - 1}; {again}")
    return [int(device["device_id"]) for device in listed]


def check_devices(args: argparse.Namespace) -> None:
    """Check `rank_table_file`, `device_num` and `device_id` against each other; a table of one device decides its id.

    Args:
        args: the settings, from `utils.config.load_config`.

    Raises:
        UserError: as `device_ids`; also if `device_id` was given for several devices.
    """
    if args.rank_table_file is not None:
        listed = device_ids(args.rank_table_file, args.device_num)
        if args.device_num == 1:
            args.device_id = listed[0]
    if args.device_num > 1 and "device_id" in args.given:
        raise UserError(f"--device_id is for one device, not {args.device_num}; leave it out, or --device_num")


def _visible(rank_table_file: Path, devices: int) -> dict[str, str]:
    """The environment that makes the worker of rank r use the r-th device of the table.

    msrun gives it the number r as DEVICE_ID whatever the table says; HCCL compares the table with the device behind
    that number.

    Raises:
        UserError: as `device_ids`; also if the variable is set to something that contradicts the table.
    """
    listed = ",".join(map(str, device_ids(rank_table_file, devices)))
    set_already = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "").replace(" ", "")
    if not set_already:
        plain = listed == ",".join(map(str, range(devices)))
        return {} if plain else {"ASCEND_RT_VISIBLE_DEVICES": listed}
    if set_already.split(",")[:devices] != listed.split(","):
        raise UserError(
            f"ASCEND_RT_VISIBLE_DEVICES is {set_already}, but {rank_table_file} lists the devices {listed}; unset the "
            "variable or make the table of the same devices"
        )
    return {}


def launch(
    script: str | Path,
    arguments: list[str],
    devices: int,
    log_dir: str | Path,
    rank_table_file: str | Path | None = None,
) -> int:
    """Run `python script arguments` on `devices` devices; show rank 0's output, keep every rank's in `log_dir`.

    `rank_table_file` is the HCCL rank table of Ascend devices; without it they find each other by themselves.

    The first Ctrl-C asks the workers with SIGTERM to stop at the end of their step, a second one, or two minutes, ends
    them. None of their processes outlives this call.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        UserError: a worker failed; the message says which and why, and unless that was a UserError there, too, the
            last lines of its log have been printed on stderr. Or the rank table does not fit (`device_ids`), or the
            logs cannot be written.
    """
    visible = {}
    if rank_table_file is not None:
        rank_table_file = Path(rank_table_file).resolve()
        visible = _visible(rank_table_file, devices)
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
        *([f"--rank_table_file={rank_table_file}"] if rank_table_file is not None else []),
        *("python3", str(script), *arguments),
    ]
    mark = uuid.uuid4().hex
    environment = {
        # Workers share the machine's cores; each would otherwise start threads for all of them.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // devices)),
        **os.environ,
        **visible,
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
            failure = _failure(log_dir, ranks, devices)
        if process.poll():
            failure = failure or _failure(log_dir, ranks, devices) or _msrun_failure(log_dir)
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
        tail, reason = failure
        print(tail, end="", file=sys.stderr, flush=True)
        raise UserError(reason)
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
        print(re.sub(MINDSPORE_LINE, "", added.decode(errors="replace")), end="", flush=True)


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


def _failure(log_dir: Path, ranks: dict[int, int], devices: int) -> tuple[str, str] | None:
    """The end of the log of the worker that failed first, and which that was and why; None if msrun saw none fail."""
    found = re.search(r"Worker process (\d+) exit with exception\. Error code: (-?\d+)", _text(log_dir / "msrun.log"))
    if found is None:
        return None
    process, status = int(found[1]), int(found[2])
    if process not in ranks:  # it left before it was seen; so it is one of those that were not, one that said something
        unseen = [rank for rank in range(devices) if rank not in ranks.values()] or [0]
        ranks[process] = next((rank for rank in unseen if _text(log_dir / f"worker_{rank}.log")), unseen[0])
    log = log_dir / f"worker_{ranks[process]}.log"
    tail = _tail(log)
    if status < 0:
        reason = f"killed by {signal.Signals(-status).name}"
        reason += "; is the machine out of memory?" if status == -signal.SIGKILL else ""
    else:
        telling = re.findall(r"^(?:error: |(?=[\w.]*(?:Error|Exception): ))(.+)", _text(log), re.MULTILINE)
        reason = telling[-1] if telling else f"exit status {status}"
        if status == 2 and f"error: {reason}\n" in tail:
            tail = ""  # a UserError: its line is all there is to say
    return tail, f"{log.stem} failed: {reason} (all of it: {log})"


def _msrun_failure(log_dir: Path) -> tuple[str, str]:
    """The same where msrun failed by itself."""
    tail = _tail(log_dir / "msrun.log")
    return tail, f"msrun failed: {tail.strip().splitlines()[-1] if tail else 'it said nothing'} (the logs: {log_dir})"


def _text(log: Path) -> str:
    """What the program wrote, without the lines that MindSpore adds whatever the log level."""
    return re.sub(MINDSPORE_LINE, "", log.read_text(errors="replace")) if log.is_file() else ""


def _tail(log: Path) -> str:
    """The last lines of a log under a heading; nothing if it is empty."""
    lines = _text(log).rstrip().split("\n")[-TAIL_LINES:]
    return "".join(f"{line}\n" for line in [f"the last lines of {log}:", *lines]) if lines != [""] else ""


def distribute(args, script):
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        from mindspore.communication import init

        init()
        return 0
    if is_worker() or args.device_num == 1:
        return None
    return launch(
        Path(script).resolve(), sys.argv[1:], args.device_num, Path(args.output_dir) / "logs", args.rank_table_file
    )
