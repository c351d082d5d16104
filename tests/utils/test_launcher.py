"""Workers of a script that a test writes, started as a user starts `train.py --device_num 2`."""

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
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, run_script

from utils.cli import UserError
from utils.images import MOST_PROCESSES, reading_processes
from utils.launcher import MOST_DEVICES, check_devices, distribute, is_worker

SECONDS = 120  # far more than anything here takes
MSRUN = ("-m", "mindspore.parallel.cluster.run")

HEAD = f"""
import argparse, json, os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from utils.cli import UserError, run
from utils.launcher import check_devices, distribute

def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, kind, value in (
        ("device_num", int, 2), ("rank_table_file", str, None), ("output_dir", str, "the output"),
        ("server_num", int, 1), ("server_rank", int, 0), ("master_addr", str, None), ("master_port", int, 8118),
    ):
        parser.add_argument("--" + name, type=kind, default=value)
    args, words = parser.parse_known_args()
    args.given = {{}}
    check_devices(args)
    if (status := distribute(args, __file__)) is not None:
        return status
    rank, local = int(os.environ["RANK_ID"]), int(os.environ["DEVICE_ID"])
"""

COMPUTING = (
    HEAD
    + """
    import mindspore as ms
    from mindspore.communication import get_rank, init
    ms.set_device("CPU")
    init()
    assert rank == get_rank()
    add_up = ms.ops.AllReduce()
    total = lambda value: float(add_up(ms.Tensor([value], ms.float32)).asnumpy()[0])
    print("sum", total(rank + 1))
"""
)


def processes_of(folder: Path) -> list[psutil.Process]:
    """The living processes that were started in `folder`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def gone(folder: Path) -> bool:
    """Whether none of them is left; the kernel has a moment to take leave of those that have been killed."""
    deadline = time.monotonic() + 3
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left


class Job:
    """A script that has been started in `folder`; `out` and `err` are what it has printed so far."""

    def __init__(self, folder: Path, body: str, arguments: list[str]):
        folder.mkdir(exist_ok=True)
        self.folder, self.logs = folder, folder / "the output" / "logs"
        (folder / "job.py").write_text(body + "\nrun(main)\n")
        environment = {**os.environ, "PATH": "/usr/bin:/bin"}  # without the Python that runs us
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(folder / "job.py"), *arguments],
                cwd=folder,
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # in case nohup started these tests
            )

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def wait_for(self, word: str, *logs: int) -> None:
        """Wait until it stands in the output, or in the logs of these ranks."""
        deadline = time.monotonic() + SECONDS
        while not all(word in text for text in map(self.log, logs)) or (not logs and word not in self.out + self.err):
            assert self.process.poll() is None and time.monotonic() < deadline, (self.out, self.err)
            time.sleep(0.05)

    def ends(self) -> int:
        """The exit status; nothing of the job may be left running then."""
        status = self.process.wait(timeout=SECONDS)
        assert gone(self.folder)
        return status

    def log(self, rank: int) -> str:
        log = self.logs / f"worker_{rank}.log"
        return log.read_text() if log.exists() else ""


@pytest.fixture
def start(tmp_path):
    jobs = []

    def start_job(body: str, *arguments: str, folder: str = "job") -> Job:
        jobs.append(Job(tmp_path / folder, body, list(arguments)))
        return jobs[-1]

    yield start_job
    for job in jobs:
        for process in processes_of(job.folder):
            process.kill()
        job.process.wait(timeout=10)


@pytest.fixture
def servers():
    """The flags of two servers, which have this machine's loopback addresses."""
    with socket.create_server(("127.0.0.2", 0)) as free:
        port = str(free.getsockname()[1])
    flags = ["--device_num", "1", "--server_num", "2", "--master_addr", "127.0.0.2", "--master_port", port]
    return [[*flags, "--server_rank", rank] for rank in ("0", "1")]


# ----- with MindSpore -----

STEPS = """
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):  # once a graph has run, MindSpore makes the second of the first
        signal.signal(number, lambda *_: stop.append(1))
    for step in range(100_000):
        time.sleep(0.05)
        last = total(len(stop)) > 0
        print("step", step)
        if last:
            break
    if rank == 0:
        time.sleep(2)  # a large file; the other has left by then
        Path("saved").write_text(f"{step}")
    return 130
"""


@pytest.mark.full
def test_msrun_by_hand(tmp_path, servers):
    """Its scheduler runs the script, too."""
    (tmp_path / "job.py").write_text(COMPUTING + "\nrun(main)\n")
    words = [
        "--worker_num=2",
        "--local_worker_num=2",
        f"--master_port={servers[0][7]}",
        "--log_dir=logs",
        "--join=True",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = run_script(*MSRUN, *words, "job.py", "--device_num", "2", cwd=tmp_path, timeout=SECONDS, PATH=path)
    assert result.returncode == 0, result
    assert all("sum 3.0\n" in (tmp_path / "logs" / f"worker_{rank}.log").read_text() for rank in (0, 1))
    assert not (tmp_path / "the output").exists()


def test_two_servers_compute_together(start, servers):
    jobs = [start(COMPUTING, *servers[n], folder=f"server {n}") for n in (1, 0)]
    assert [job.ends() for job in jobs] == [0, 0], [job.err for job in jobs]
    assert jobs[1].out == "sum 3.0\n" and jobs[0].out == f"ranks 1 to 1 run; their output is in {jobs[0].logs}\n"
    assert [path.name for path in sorted(jobs[0].logs.iterdir())] == ["worker_1.log"] and "sum 3.0\n" in jobs[0].log(1)


@pytest.mark.full
def test_interrupt_on_one_of_two_servers(start, servers):
    jobs = [start(COMPUTING + STEPS, *servers[n], folder=f"server {n}") for n in (0, 1)]
    jobs[0].wait_for("step 3\n")
    jobs[1].process.send_signal(signal.SIGINT)
    assert [job.ends() for job in jobs] == [130, 130], [job.err for job in jobs]
    assert jobs[0].err == "interrupted on another server\n" and jobs[1].err.startswith("stopping at the end of this")
    assert f"step {(jobs[0].folder / 'saved').read_text()}\n" in jobs[1].log(1)


@pytest.mark.full
def test_failing_worker_on_one_of_two_servers(start, servers, monkeypatch):
    """MindSpore notices after MS_NODE_TIMEOUT, by default 30 seconds, and lets the others fail."""
    monkeypatch.setenv("MS_NODE_TIMEOUT", "10")
    body = COMPUTING + "    if rank == 1:\n        raise UserError('no\\nwill')\n    total(2)  # waits for the other\n"
    jobs = [start(body, *servers[n], folder=f"server {n}") for n in (0, 1)]
    assert [job.ends() for job in jobs] == [2, 2]
    assert jobs[1].err == f"error: worker_1 failed: no will (all of it: {jobs[1].logs / 'worker_1.log'})\n"
    assert re.search(
        r"\nerror: (worker_0|scheduler) failed: .+; or did another server fail first\? \(.*\)\n$", jobs[0].err
    )


# ----- without MindSpore, so quicker to start -----


def test_two_workers(start, tmp_path):
    old = tmp_path / "job" / "the output" / "logs" / "worker_7.log"
    old.parent.mkdir(parents=True)
    old.write_text("of an earlier, larger job")
    body = """
    time.sleep(0.5 * rank)
    print("[INFO] DISTRIBUTED of MindSpore")
    print(words, sys.executable, os.environ["OMP_NUM_THREADS"])
    print("Grüße", end="[INFO] DISTRIBUTED after it")
    """
    job = start(HEAD + body, "two words", "--data_path=a b", "--log_dir", "x")
    assert job.ends() == 0, job.err
    line = f"['two words', '--data_path=a b', '--log_dir', 'x'] {sys.executable} {max(1, os.cpu_count() // 2)}\n"
    assert job.out == line + "Grüße" and job.err == ""
    assert all(line in job.log(rank) for rank in (0, 1)) and not old.exists()


NAMES = (
    "MS_ROLE",
    "MS_WORKER_NUM",
    "RANK_SIZE",
    "MS_SCHED_HOST",
    "MS_SCHED_PORT",
    "MS_NODE_ID",
    "RANK_ID",
    "DEVICE_ID",
)
NAMES += ("OMP_NUM_THREADS", "MS_TOPO_TIMEOUT", "PYTHONUNBUFFERED", "RANK_TABLE_FILE", "ASCEND_RT_VISIBLE_DEVICES")
SAY = HEAD + f"    print(json.dumps([os.environ.get(name) for name in {NAMES}]))"


def test_what_msrun_would_set(start, tmp_path, monkeypatch, servers):
    """msrun itself, with the same settings, is what the environment is compared with; scheduler and workers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for name in ("MS_TOPO_TIMEOUT", "RANK_TABLE_FILE", "ASCEND_RT_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    _, flags = servers
    job = start(SAY, *flags[2:], "--device_num", "2")
    assert job.ends() == 0, job.err
    (tmp_path / "say.py").write_text(f"import json, os\nprint(json.dumps([os.environ.get(name) for name in {NAMES}]))")
    words = ["--worker_num=4", "--local_worker_num=2", "--node_rank=1", "--master_addr=127.0.0.2", "--join=True"]
    words += [f"--master_port={flags[7]}", "--log_dir=logs", "say.py"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = run_script(*MSRUN, *words, cwd=tmp_path, timeout=SECONDS, PATH=path, PYTHONUNBUFFERED="1")
    assert result.returncode == 0, result
    for rank in (2, 3):
        assert json.loads(job.log(rank)) == json.loads((tmp_path / "logs" / f"worker_{rank}.log").read_text())
    assert job.out == f"ranks 2 to 3 run; their output is in {job.logs}\n"


def test_logs_in_the_folder_of_all_servers(start, tmp_path, servers):
    folder = tmp_path / "job" / "the output" / "logs"
    folder.mkdir(parents=True)
    for rank in (0, 1, 2):
        (folder / f"worker_{rank}.log").write_text("before\n")
    job = start(SAY, *servers[1])
    assert job.ends() == 0, job.err
    assert job.log(0) == "before\n" and "before" not in job.log(1) and not (folder / "worker_2.log").exists()


def test_failing_worker(start):
    job = start(HEAD + "    raise UserError('this one\\nwill not') if rank else time.sleep(600)")
    began = time.monotonic()
    assert job.ends() == 2 and time.monotonic() - began < 30
    assert job.out == ""
    assert job.err == f"error: worker_1 failed: this one will not (all of it: {job.logs / 'worker_1.log'})\n"


@pytest.mark.parametrize(
    "statement, reason, said",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL; is the machine out of memory?", "a step"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV", "a step"),
        ("sys.exit(7)", "exit status 7", "a step"),
        ("{}['no key']", "KeyError: 'no key'", "KeyError: 'no key'"),
        ("sys.exit('error: not from a UserError')", "not from a UserError", "error: not from a UserError"),
    ],
)
def test_other_failures(start, statement, reason, said):
    body = f"""
    if not rank:
        time.sleep(600)
    for step in range(30):
        print("step", step)
    print("a step")
    {statement}"""
    job = start(HEAD + body)
    assert job.ends() == 2
    heading, *tail, error = job.err.splitlines()
    log = job.logs / "worker_1.log"
    assert heading == f"the last lines of {log}:"
    assert tail == job.log(1).splitlines()[-15:] and tail[-1] == said
    assert error == f"error: worker_1 failed: {reason} (all of it: {log})"


def test_dies_without_a_word(start):
    job = start(HEAD + "    os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(600)")
    assert job.ends() == 2
    assert job.err.startswith("error: worker_1 failed: killed by SIGKILL;") and job.err.count("\n") == 1


def test_all_fail_at_once(start):
    job = start(HEAD + "    import no_such_module")
    assert job.ends() == 2
    assert re.search(
        r"\nerror: worker_[01] failed: ModuleNotFoundError: No module named 'no_such_module' .*\n$", job.err
    )
    assert "Traceback (most recent call last):" in job.err


def test_address_that_is_taken(start, servers):
    with socket.create_server(("127.0.0.3", 0)) as other:
        flags = [*servers[0], "--master_addr", "127.0.0.3", "--master_port", str(other.getsockname()[1])]
        job = start(HEAD + "    time.sleep(600)", *flags)
        assert job.ends() == 2
        assert re.fullmatch(r"error: cannot use 127.0.0.3:\d+, .*: .*Address already in use.*\n", job.err)


def test_scheduler_that_fails(start, tmp_path, monkeypatch):
    """The workers would wait for it for ten minutes. Here it finds no MindSpore that works."""
    (tmp_path / "mindspore.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = start(HEAD + "    time.sleep(600)")
    assert job.ends() == 2
    log = job.logs / "scheduler.log"
    assert job.err.endswith(f"\nerror: scheduler failed: ImportError: broken (all of it: {log})\n")


CHILD = "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"


@pytest.mark.parametrize("last", ["print('done')", "raise KeyError(rank)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_children_of_workers_do_not_outlive_them(start, last):
    job = start(HEAD + CHILD + "    " + last)
    assert job.ends() == (0 if "done" in last else 2)


def test_launcher_that_is_killed(start):
    job = start(HEAD + "    print('works')\n    time.sleep(600)")
    job.wait_for("works", 0, 1)
    job.wait_for("works")
    assert len(processes_of(job.folder)) == 4  # with two workers and the scheduler
    job.process.kill()
    job.process.wait()
    assert gone(job.folder)


FINISHING = """
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    print("works")
    while not stop:
        time.sleep(0.05)
    time.sleep(0.4 * rank)
    print("saved")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt(start, number):
    job = start(HEAD + FINISHING + "    return 130")
    job.wait_for("works", 0, 1)
    job.wait_for("works")
    # As a terminal does, to all of the group; the workers must not see that.
    os.killpg(job.process.pid, number)
    assert job.ends() == 130
    assert job.out == "works\nsaved\n" and job.log(1) == "works\nsaved\n"
    assert job.err == "stopping at the end of this step; Ctrl-C again to stop at once\n"


def test_failure_while_finishing(start):
    job = start(HEAD + FINISHING + "    raise UserError('disk full') if not rank else time.sleep(600)")
    job.wait_for("works", 0, 1)
    job.wait_for("works")
    job.process.send_signal(signal.SIGINT)
    assert job.ends() == 2
    assert f"error: worker_0 failed: disk full (all of it: {job.logs / 'worker_0.log'})\n" in job.err


def test_hang_up_under_nohup(start):
    body = HEAD.replace("def main():", "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n\ndef main():")
    job = start(body + "    print('works')\n    time.sleep(1)")
    job.wait_for("works", 0, 1)
    job.wait_for("works")
    job.process.send_signal(signal.SIGHUP)
    assert job.ends() == 0


def test_second_interrupt_ends_at_once(start):
    job = start(HEAD + "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    print('deaf')\n    time.sleep(600)")
    job.wait_for("deaf", 0, 1)
    job.wait_for("deaf")
    job.process.send_signal(signal.SIGINT)
    job.process.send_signal(signal.SIGINT)  # the same one, passed on by a shell as well
    job.wait_for("stopping at the end of this step")
    time.sleep(1.2)
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGINT)
    assert job.ends() == 130


def test_two_minutes_are_enough(start, monkeypatch):
    body = "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    print('deaf')\n    time.sleep(600)"
    job = start(
        HEAD.replace("def main():", "import utils.launcher\nutils.launcher.GRACE_SECONDS = 2\n\ndef main():") + body
    )
    job.wait_for("deaf", 0, 1)
    job.wait_for("deaf")
    job.process.send_signal(signal.SIGINT)
    assert job.ends() == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_while_workers_load(start, number):
    job = start(HEAD + "    Path(f'rank {rank}').touch()\n    time.sleep(600)")
    deadline = time.monotonic() + SECONDS
    while len(list(job.folder.glob("rank *"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    job.process.send_signal(number)
    assert job.ends() == 130
    assert job.out == job.err == ""


# ----- rank tables and settings -----


@pytest.fixture
def write_table(tmp_path):
    """Writes the rank table of some devices, one range a server, with the hccl tools; `change` is done to it then."""

    def write(*ranges: str, change=lambda table: None) -> Path:
        tools, folder, names = ROOT / "utils" / "hccl_tools", tmp_path / "a table", []
        for n, devices in enumerate(ranges):
            (tmp_path / "hccn.conf").write_text("".join(f"address_{d}=192.168.{n}.{100 + d}\n" for d in range(8)))
            words = ["--device_num", devices, "--server_ip", f"192.168.1.{7 + n}", "--hccn_conf", "hccn.conf"]
            made = run_script(tools / "hccl_tools.py", *words, "--output_dir", folder, cwd=tmp_path)
            names.append(made.stdout.removeprefix("wrote ").strip())
        if len(ranges) > 1:
            made = run_script(tools / "merge_hccl.py", *names, "--output_dir", folder, cwd=tmp_path)
        path = Path(made.stdout.removeprefix("wrote ").strip())
        table = json.loads(path.read_text())
        change(table)
        path.write_text(json.dumps(table))
        return path

    return write


def settings(table: Path | None = None, given: tuple = (), **changes) -> argparse.Namespace:
    """What `utils.config.load_config` returns, as far as it is of interest here."""
    usual = {"device_num": 2, "device_id": 0, "server_num": 1, "server_rank": 0, "master_addr": None}
    usual |= {"master_port": 8118, "output_dir": "out", "rank_table_file": table and str(table)}
    return argparse.Namespace(**usual | changes, given={name: f"--{name}" for name in given})


@pytest.mark.parametrize("devices, visible", [("[0,2)", None), ("[4,6)", "4,5")])
def test_rank_table(start, write_table, monkeypatch, devices, visible):
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    path = write_table(devices)
    job = start(SAY, "--rank_table_file", os.path.join("..", path.parent.name, path.name))
    assert job.ends() == 0, job.err
    for rank in (0, 1):
        seen = dict(zip(NAMES, json.loads(job.log(rank))))
        assert [seen["RANK_TABLE_FILE"], seen["ASCEND_RT_VISIBLE_DEVICES"]] == [str(path), visible]
        assert [seen["RANK_ID"], seen["DEVICE_ID"], seen["RANK_SIZE"]] == [str(rank), str(rank), "2"]


def test_rank_table_of_two_servers(start, write_table, monkeypatch, servers):
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)

    def other_way_round(table):
        table["server_list"].reverse()
        table["server_list"][0]["device"].reverse()

    path = write_table("[0,2)", "[5,7)", change=other_way_round)
    job = start(SAY, *servers[1], "--device_num", "2", "--rank_table_file", str(path))
    assert job.ends() == 0, job.err
    seen = dict(zip(NAMES, json.loads(job.log(3))))
    assert [seen["RANK_TABLE_FILE"], seen["ASCEND_RT_VISIBLE_DEVICES"]] == [str(path), "5,6"]
    assert [seen["RANK_ID"], seen["DEVICE_ID"], seen["RANK_SIZE"]] == ["3", "1", "4"]


def test_rank_table_of_one_device(write_table):
    args = settings(write_table("[6,7)"), device_num=1)
    check_devices(args)
    assert args.device_id == 6
    assert distribute(args, "job.py") is None


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda table: table["server_list"][0]["device"].pop(), "lists 1 devices for 2; set --device_num 1"),
        (
            lambda table: [
                device.update(rank_id=str(8 + n)) for n, device in enumerate(table["server_list"][0]["device"])
            ],
            "lists the ranks 8, 9, not 0 to 1",
        ),
        (lambda table: table["server_list"][0]["device"][1].update(rank_id="0"), "rank_id 0 twice"),
        (lambda table: table["server_list"][0]["device"][1].pop("device_id"), "'device_id' is missing"),
        (lambda table: table.update(version="0.1"), "version '0.1', not '1.0'; make it again with"),
        (lambda table: table.update(status="initializing"), "status 'initializing', not 'completed'"),
        (lambda table: table.pop("server_list"), "'server_list' is missing"),
    ],
)
def test_rank_table_that_does_not_fit(write_table, tmp_path, change, words):
    args = settings(write_table("[0,2)", change=change), output_dir=tmp_path / "out")
    for check in (check_devices, lambda args: distribute(args, "job.py")):
        with pytest.raises(UserError, match=words):
            check(args)
    assert not (tmp_path / "out").exists()


def test_rank_table_of_other_servers(write_table):
    both = write_table("[0,2)", "[0,4)")
    for changes, words in [
        ({}, "lists 2 servers for 1; set --server_num, or use another table"),
        ({"server_num": 2, "master_addr": "127.0.0.1"}, "lists 4 devices for 2; set --device_num 4, or .* 192.168.1.8"),
    ]:
        with pytest.raises(UserError, match=words):
            check_devices(settings(both, **changes))


def test_rank_table_that_is_none(tmp_path):
    table = tmp_path / "table.json"
    for path, content, words in [
        (table, None, r"cannot read .*: No such file or directory; make it again with"),
        (tmp_path, None, "cannot read .*: Is a directory"),
        (table, "{", "not valid JSON"),
        (table, "[]", "must be an object"),
    ]:
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=words):
            check_devices(settings(path))


def test_visible_devices_against_the_table(write_table, tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match=r"is 0,1, but .* lists the devices 4,5; unset"):
        distribute(settings(write_table("[4,6)"), output_dir=tmp_path / "out"), "job.py")


@pytest.mark.parametrize(
    "changes, given, words",
    [
        ({}, ["device_id"], "--device_id is for one device, not 2; leave it out"),
        ({"device_num": 1, "server_num": 2, "master_addr": "10.0.0.1"}, ["device_id"], "for one device, not 2"),
        ({}, ["server_rank"], "--server_rank is for several servers; leave it out, or set --server_num"),
        ({"master_addr": "10.0.0.1"}, ["master_addr"], "--master_addr is for several servers"),
        ({"master_port": 9}, ["master_port"], "--master_port is for several servers"),
        ({"server_num": 2}, ["server_num"], "--server_num 2 needs server 0's --master_addr"),
        ({"server_num": 2, "server_rank": 2, "master_addr": "10.0.0.1"}, [], "--server_rank from 0 to 1"),
        ({"server_rank": 1}, [], "--server_num 1 .* --server_rank from 0 to 0"),
    ],
)
def test_settings_that_contradict(changes, given, words):
    with pytest.raises(UserError, match=words):
        check_devices(settings(given=given, **changes))


@pytest.mark.parametrize(
    "address, port, words",
    [
        ("203.0.113.1", 8118, "Cannot assign requested address"),
        ("no such host", 8118, ""),
        ("x" * 64 + ".org", 8118, ""),
        ("127.0.0.1", 70000, "0-65535"),
    ],
)
def test_address_that_cannot_be_used(tmp_path, address, port, words):
    args = settings(server_num=2, master_addr=address, master_port=port, output_dir=tmp_path / "out")
    with pytest.raises(UserError, match=f"cannot use {address}:{port}, --master_addr and --master_port: .*{words}"):
        distribute(args, "job.py")
    assert not (tmp_path / "out").exists()


def test_no_more_processes_on_cpu_than_the_cores_can_run(tmp_path):
    cores = len(os.sched_getaffinity(0))
    most = MOST_DEVICES * cores
    assert most >= 2
    args = settings(device_num=most + 1, device_target="CPU", output_dir=tmp_path / "out")
    with pytest.raises(UserError, match=f"--device_num {most + 1} is too much for the {cores} cores .* to {most} or"):
        distribute(args, "job.py")
    assert not (tmp_path / "out").exists()
    assert reading_processes(2) == reading_processes(1) + 1 == 2
    for devices in (1, 2):
        most = MOST_PROCESSES * cores // devices
        assert reading_processes(most, devices) == most
        with pytest.raises(UserError, match=f"too many for {cores} cores; set --num_workers to {most} or less"):
            reading_processes(most + 1, devices)


def test_logs_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*choose another place"):
        distribute(settings(output_dir=tmp_path / "file"), "job.py")


def test_who_does_the_work(monkeypatch):
    monkeypatch.delenv("MS_ROLE", raising=False)
    assert not is_worker() and distribute(settings(device_num=1), "job.py") is None
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    assert is_worker() and distribute(settings(), "job.py") is None
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    assert not is_worker()
