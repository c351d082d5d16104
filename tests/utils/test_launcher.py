"""Two CPU workers under msrun, started by a script that a test writes, as a user starts `train.py --device_num 2`."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, run_script

from utils.cli import UserError
from utils.launcher import device_ids, is_worker, launch

SECONDS = 120  # far more than anything here takes

HEAD = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from utils.cli import UserError, run
from utils.launcher import is_worker, launch

def main():
    if not is_worker():
        return launch(__file__, sys.argv[2:], 2, sys.argv[1], os.environ.get("TABLE"))
"""

# What follows runs in the workers and in the scheduler, which does not come back from init().
COMPUTING = (
    HEAD
    + """
    import mindspore as ms
    from mindspore.communication import get_rank, init
    ms.set_device("CPU")
    init()
    rank = get_rank()
    add_up = ms.ops.AllReduce()
    total = lambda value: float(add_up(ms.Tensor([value], ms.float32)).asnumpy()[0])
"""
)

# No framework, so quicker to start.
PLAIN = (
    HEAD
    + """
    if os.environ["MS_ROLE"] == "MS_SCHED":
        time.sleep(600)
    rank = int(os.environ["RANK_ID"])
"""
)


def processes_of(folder: Path) -> list[psutil.Process]:
    """The living processes with a path in `folder` on their command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()):
                found.append(process)
    return found


class Job:
    """A script that has been started; `out` and `err` are what it has printed so far."""

    def __init__(self, folder: Path, body: str, arguments: list[str]):
        self.logs = folder / "log dir"
        self.folder = folder
        (folder / "job.py").write_text(body + "\nrun(main)\n")
        command = [sys.executable, str(folder / "job.py"), str(self.logs), *arguments]
        environment = {**os.environ, "PATH": "/usr/bin:/bin"}  # without the Python that runs us
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            self.process = subprocess.Popen(
                command,
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

    def wait_for(self, word: str) -> None:
        deadline = time.monotonic() + SECONDS
        while word not in self.out + self.err:
            assert self.process.poll() is None and time.monotonic() < deadline, (self.out, self.err)
            time.sleep(0.05)

    def ends(self) -> int:
        """The exit status; nothing of the job may be left running then."""
        status = self.process.wait(timeout=SECONDS)
        assert processes_of(self.folder) == []
        return status

    def log(self, rank: int) -> str:
        return (self.logs / f"worker_{rank}.log").read_text()


@pytest.fixture
def start(tmp_path):
    jobs = []

    def start_job(body: str, *arguments: str) -> Job:
        jobs.append(Job(tmp_path, body, list(arguments)))
        return jobs[-1]

    yield start_job
    for job in jobs:
        for process in processes_of(job.folder):
            process.kill()
        job.process.wait(timeout=10)


def test_two_workers(start, tmp_path):
    old = tmp_path / "log dir" / "worker_7.log"
    old.parent.mkdir()
    old.write_text("of an earlier, larger job")
    body = "    print('sum', total(rank + 1), sys.argv[1:], sys.executable)\n    print('Grüße', end='')"
    job = start(COMPUTING + body, "two words", "--data_path=a b", "--log_dir", "x")
    assert job.ends() == 0, job.err
    line = f"sum 3.0 ['two words', '--data_path=a b', '--log_dir', 'x'] {Path(sys.executable).with_name('python3')}\n"
    assert job.out == line + "Grüße" and job.err == ""
    assert all(line in job.log(rank) for rank in (0, 1)) and not old.exists()


def test_failing_worker(start):
    body = """
    print("sum", total(1))
    if rank == 1:
        raise UserError("this one\\nwill not")
    total(2)  # waits for the other
    """
    job = start(COMPUTING + body)
    assert job.ends() == 2
    assert job.out == "sum 2.0\n"
    assert job.err == f"error: worker_1 failed: this one will not (all of it: {job.logs / 'worker_1.log'})\n"


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
        time.sleep(4)  # a large file; the other has left by then
        Path(sys.argv[1]).write_text(f"{step}")
    return 130
"""


@pytest.mark.parametrize("to_group", [False, True])
def test_interrupt_lets_every_worker_finish(start, tmp_path, to_group):
    job = start(COMPUTING + STEPS, str(tmp_path / "saved"))
    job.wait_for("step 3\n")
    (os.killpg if to_group else os.kill)(job.process.pid, signal.SIGINT)
    assert job.ends() == 130, job.err
    assert job.err == "stopping at the end of this step; Ctrl-C again to stop at once\n"
    last = int((tmp_path / "saved").read_text())
    assert job.out == "".join(f"step {n}\n" for n in range(last + 1))
    assert f"step {last}\n" in job.log(1) and f"step {last + 1}\n" not in job.log(1)


def test_second_interrupt_ends_at_once(start):
    body = "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    print('deaf')\n    time.sleep(600)"
    job = start(PLAIN + body)
    job.wait_for("deaf")
    job.process.send_signal(signal.SIGINT)
    job.process.send_signal(signal.SIGINT)  # the same one, passed on by a shell as well
    job.wait_for("stopping at the end of this step")
    time.sleep(2)
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGINT)
    assert job.ends() == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_while_workers_load(start, tmp_path, number):
    body = "    (Path(sys.argv[1]) / f'rank {rank}').touch()\n    time.sleep(600)"
    job = start(PLAIN + body, str(tmp_path))
    deadline = time.monotonic() + SECONDS
    while len(list(tmp_path.glob("rank *"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    job.process.send_signal(number)
    assert job.ends() == 130
    assert job.out == job.err == ""


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
    time.sleep(1)
    if not rank:
        time.sleep(600)
    for step in range(30):
        print("step", step)
    print("a step")
    {statement}"""
    job = start(PLAIN + body)
    assert job.ends() == 2
    heading, *tail, error = job.err.splitlines()
    log = job.logs / "worker_1.log"
    assert heading == f"the last lines of {log}:"
    assert tail == job.log(1).splitlines()[-15:] and tail[-1] == said
    assert error == f"error: worker_1 failed: {reason} (all of it: {log})"


def test_dies_without_a_word(start):
    job = start(PLAIN + "    time.sleep(1)\n    os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(600)")
    assert job.ends() == 2
    assert job.err.startswith("error: worker_1 failed: killed by SIGKILL;") and job.err.count("\n") == 1


def test_one_fails_at_once(start):
    """Before it was seen: which it was follows from the others."""
    job = start(PLAIN + "    time.sleep(600 if rank == 0 else 0)\n    raise KeyError('early')")
    assert job.ends() == 2
    assert job.err.endswith(f"\nerror: worker_1 failed: KeyError: 'early' (all of it: {job.logs / 'worker_1.log'})\n")


def test_all_fail_at_once(start):
    job = start(PLAIN + "    import no_such_module")
    assert job.ends() == 2
    assert re.search(
        r"\nerror: worker_[01] failed: ModuleNotFoundError: No module named 'no_such_module' .*\n$", job.err
    )
    assert "Traceback (most recent call last):" in job.err


@pytest.fixture
def write_table(tmp_path):
    """Writes the rank table of some devices with hccl_tools; `change` is done to it afterwards."""

    def write(devices: str, change=lambda table: None) -> Path:
        (tmp_path / "hccn.conf").write_text("".join(f"address_{n}=192.168.100.{100 + n}\n" for n in range(8)))
        folder = tmp_path / "a table"
        words = ["--device_num", devices, "--server_ip", "192.168.1.7", "--hccn_conf", tmp_path / "hccn.conf"]
        result = run_script(ROOT / "utils/hccl_tools/hccl_tools.py", *words, "--output_dir", folder, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        path = next(folder.iterdir())
        table = json.loads(path.read_text())
        change(table)
        path.write_text(json.dumps(table))
        return path

    return write


NAMES = ("RANK_TABLE_FILE", "DEVICE_ID", "RANK_ID", "RANK_SIZE", "ASCEND_RT_VISIBLE_DEVICES")


@pytest.mark.parametrize("devices, visible", [("[0,2)", None), ("[4,6)", "4,5")])
def test_rank_table(start, write_table, monkeypatch, devices, visible):
    """What HCCL needs reaches each worker through msrun, and CPU workers, who need no table, are not disturbed."""
    path = write_table(devices)
    monkeypatch.setenv("TABLE", os.path.relpath(path, path.parents[1]))
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    body = f"""
    import json
    print(json.dumps([os.environ.get(name) for name in {NAMES}]))
    print("sum", total(rank + 1))"""
    job = start(COMPUTING + body)
    assert job.ends() == 0, job.err
    assert job.err == ""
    for rank in (0, 1):
        environment, total = job.log(rank).splitlines()[:2]
        assert json.loads(environment) == [str(path), str(rank), str(rank), "2", visible]
        assert total == "sum 3.0"


def test_rank_table_in_any_order(write_table):
    assert device_ids(write_table("[4,8)", lambda table: table["server_list"][0]["device"].reverse()), 4) == [
        4,
        5,
        6,
        7,
    ]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda table: table["server_list"].append(table["server_list"][0]), "lists 2 servers, .* by hand"),
        (lambda table: table["server_list"][0]["device"].pop(), "lists 1 devices for 2; set --device_num 1"),
        (
            lambda table: [
                device.update(rank_id=str(8 + n)) for n, device in enumerate(table["server_list"][0]["device"])
            ],
            "lists the ranks 8, 9, not 0 to 1; make it with",
        ),
        (lambda table: table["server_list"][0]["device"][1].update(rank_id="0"), "rank_id 0 twice"),
        (lambda table: table["server_list"][0]["device"][1].pop("device_id"), "'device_id' is missing"),
        (lambda table: table.update(version="0.1"), "version '0.1', not '1.0'; make it with"),
        (lambda table: table.update(status="initializing"), "status 'initializing', not 'completed'"),
        (lambda table: table.pop("server_list"), "'server_list' is missing"),
    ],
)
def test_rank_table_that_does_not_fit(write_table, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        launch(tmp_path / "job.py", [], 2, tmp_path / "logs", write_table("[0,2)", change))
    assert not (tmp_path / "logs").exists()


def test_rank_table_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the rank table .*: No such file or directory; make it with"):
        device_ids(tmp_path / "none.json", 2)
    with pytest.raises(UserError, match=r"cannot read the rank table .*: Is a directory"):
        device_ids(tmp_path, 2)
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        device_ids(tmp_path / "table.json", 2)
    (tmp_path / "table.json").write_text("[]")
    with pytest.raises(UserError, match="must be an object"):
        device_ids(tmp_path / "table.json", 2)


def test_visible_devices_against_the_table(write_table, tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match=r"is 0,1, but .* lists the devices 4,5; unset"):
        launch(tmp_path / "job.py", [], 2, tmp_path / "logs", write_table("[4,6)"))


def test_logs_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write logs to .*choose another place"):
        launch(tmp_path / "job.py", [], 2, tmp_path / "file" / "logs")


def test_this_process_is_no_worker():
    assert not is_worker()
