"""Starts a script on the devices of a server, one process each, in the foreground, and ends it cleanly."""

import argparse
import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

from utils.cli import UserError, check_writable
from utils.hccl_tools.rank_table import devices_of, variables_for

GRACE_SECONDS, TAIL_LINES, STOPS = 120, 15, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST_DEVICES = 2  # for each core, on CPU
SCHEDULER = ["-c", "from mindspore.communication import init; init()"]
MINDSPORE_LINE = r"\[INFO\] DISTRIBUTED.*\n?"  # comes whatever the log level, and may follow half a line of ours
LIBC = ctypes.CDLL(None)


def is_worker() -> bool:
    """Whether this process is one of several that do the work together."""
    return os.environ.get("MS_ROLE") == "MS_WORKER"


def check_devices(args: argparse.Namespace) -> None:
    """Check the settings of devices and servers, UserError if they do not fit; a table of one device decides its id."""
    servers, total = args.server_num, args.server_num * args.device_num
    several = [args.given[name] for name in ("server_rank", "master_addr", "master_port") if name in args.given]
    if servers == 1 and several:
        raise UserError(f"{several[0]} is for several servers; leave it out, or set --server_num")
    if args.server_rank >= servers or (servers > 1 and args.master_addr is None):
        raise UserError(f"--server_num {servers} needs server 0's --master_addr, --server_rank from 0 to {servers - 1}")
    if args.rank_table_file is not None:
        listed = devices_of(args.rank_table_file, args.device_num, servers, args.server_rank)
        args.device_id = listed[0] if total == 1 else vars(args).get("device_id")
    if total > 1 and "device_id" in args.given:
        raise UserError(f"--device_id is for one device, not {total}; leave it out, or --device_num")


def distribute(args: argparse.Namespace, script: str | Path) -> int | None:
    """Where this process is to do the work itself, return None; else have it done, as `launch`, with our arguments.

    UserError as `launch`, or for more devices than the cores can be, if they are the device.
    """
    if os.environ.get("MS_ROLE") == "MS_SCHED":  # of an msrun that somebody has started by hand
        from mindspore.communication import init

        return init() or 0
    several = args.device_num * args.server_num > 1 and not is_worker()
    if several and args.device_num > (most := MOST_DEVICES * (cores := len(os.sched_getaffinity(0)))):
        from utils.device import chosen

        if chosen(args.device_target) == "CPU":
            fault = f"--device_num {args.device_num} is too much for the {cores} cores of this machine"
            raise UserError(f"{fault}, which would stand still; on CPU set it to {most} or less")
    return launch(args, [str(script), *sys.argv[1:]]) if several else None


def launch(args: argparse.Namespace, command: list[str]) -> int:
    """Run `python command` on all devices of this server, server 0 showing rank 0's output; logs: `output_dir`/logs.

    Ctrl-C asks the workers with SIGTERM to stop at the end of their step; another, a second later (some programs pass
    it on twice), or two minutes end them. Returns 0, or 130 after Ctrl-C on any server; none of the processes is left.
    UserError if one failed (unless for one, too, the end of its log is on stderr), or a setting cannot be used.
    """
    devices, first, total = args.device_num, args.server_rank * args.device_num, args.server_num * args.device_num
    host, port = (args.master_addr, args.master_port) if args.server_num > 1 else ("127.0.0.1", 0)
    try:
        host = socket.gethostbyname(host)
        if args.server_rank == 0:
            with socket.create_server((host, port)) as free:
                port = free.getsockname()[1]
    except (OSError, UnicodeError, OverflowError) as error:
        raise UserError(f"cannot use {host}:{port}, --master_addr and --master_port: {error}; correct them") from error
    common = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // devices)), "MS_TOPO_TIMEOUT": "600"} | os.environ
    common |= variables_for(args.rank_table_file, devices, args.server_num, args.server_rank)
    common |= {"MS_SCHED_HOST": host, "MS_SCHED_PORT": str(port), "MS_WORKER_NUM": str(total), "RANK_SIZE": str(total)}
    logs = (Path(args.output_dir) / "logs").resolve()
    check_writable(logs)
    others = {f"worker_{rank}.log" for rank in range(total) if rank // devices != args.server_rank}
    for old in [path for path in logs.glob("worker_*.log") if path.name not in others]:
        old.unlink()
    running, asked, handlers = {}, [], {}
    with (logs / f"worker_{first}.log").open("w+b") as shown:
        try:
            for number in STOPS[: 2 if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else 3]:  # as under nohup
                handlers[number] = signal.signal(number, lambda *_: asked.append(time.monotonic()))
            for rank in range(first, first + devices):
                own = {"MS_ROLE": "MS_WORKER", "DEVICE_ID": str(rank - first), "MS_NODE_ID": str(rank)}
                running[f"worker_{rank}"] = _start(logs / f"worker_{rank}.log", command, common | own, rank)
            if args.server_rank == 0:
                running["scheduler"] = _start(logs / "scheduler.log", SCHEDULER, common | {"MS_ROLE": "MS_SCHED"}, 0)
            else:
                print(f"ranks {first} to {first + devices - 1} run; their output is in {logs}", flush=True)
            return _wait(running, logs, shown, asked, args)
        finally:
            _end(list(running.values()))
            _show(shown, args, final=True)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _start(log: Path, command: list[str], variables: dict[str, str], rank: int) -> Popen:
    """Start Python in a session of its own, which Ctrl-C reaches through us only; it is killed when we are."""
    own = {"start_new_session": True, "preexec_fn": lambda: LIBC.prctl(1, signal.SIGKILL)}  # PR_SET_PDEATHSIG
    own["env"] = variables | {"RANK_ID": str(rank), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        return Popen([sys.executable, *command], stdin=DEVNULL, stdout=output, stderr=STDOUT, **own)


def _wait(running: dict[str, Popen], logs: Path, shown, asked: list[float], args: argparse.Namespace) -> int:
    """Until all have left or are to be ended; return the exit status, or raise UserError for one that failed."""
    told, several = False, args.server_num > 1
    while running and (several or list(running) != ["scheduler"]):  # it waits for the workers of all servers
        time.sleep(0.1)
        left = [(name, process.returncode) for name, process in running.items() if process.poll() is not None]
        _show(shown, args)
        for name, status in left:
            _end([running.pop(name)])
            if several and status == 130 and not asked:
                print("interrupted on another server", file=sys.stderr, flush=True)
                told, asked[:] = True, [time.monotonic()]
            elif status and not (asked and (name == "scheduler" or status in (130, -signal.SIGTERM))):
                raise _failure(logs / f"{name}.log", status, "; or did another server fail first?" if several else "")
        if asked and not told and shown.tell():  # else they are still loading
            told = True
            print("stopping at the end of this step; Ctrl-C again to stop at once", file=sys.stderr, flush=True)
            for name in running.keys() - {"scheduler"}:
                running[name].terminate()  # MindSpore puts a handler of its own on SIGINT
        if asked and (not told or asked[-1] - asked[0] >= 1 or time.monotonic() - asked[0] >= GRACE_SECONDS):
            break
    return 130 if asked else 0


def _failure(log: Path, status: int, elsewhere: str) -> UserError:
    """Says which process failed and why; the end of its log is printed, unless that was a UserError, too."""
    text = re.sub(MINDSPORE_LINE, "", log.read_text(errors="replace")).rstrip()
    telling = re.findall(r"^(?:error: |(?=[\w.]*(?:Error|Exception): ))(.+)", text, re.MULTILINE)
    reason = telling[-1] if telling else f"exit status {status}"
    if status < 0:
        reason = f"killed by {signal.Signals(-status).name}"
    hint = "; is the machine out of memory?" if status == -signal.SIGKILL else elsewhere if status != 2 else ""
    tail = text.split("\n")[-TAIL_LINES:]
    if text and not (status == 2 and f"error: {reason}" in tail):
        print(f"the last lines of {log}:", *tail, sep="\n", file=sys.stderr, flush=True)
    return UserError(f"{log.stem} failed: {reason}{hint} (all of it: {log})")


def _show(log, args: argparse.Namespace, final: bool = False) -> None:
    """Go on in the log, on server 0 printing it, by whole lines unless `final`."""
    start, added = log.tell(), log.read()
    added = added if final else added[: added.rfind(b"\n") + 1]
    log.seek(start + len(added))
    if args.server_rank == 0:
        print(re.sub(MINDSPORE_LINE, "", added.decode(errors="replace")), end="", flush=True)


def _end(processes: list[Popen]) -> None:
    """Kill these processes and what they have started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()
