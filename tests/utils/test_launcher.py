"""Two CPU workers under msrun, started by a script that a test writes, as a user starts `train.py --device_num 2`."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from utils.cli import UserError
from utils.launcher import is_worker, launch

SECONDS = 120  # far more than anything here takes

HEAD = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from utils.cli import UserError, run
from utils.launcher import is_worker, launch

def main():
    if not is_worker():
        return launch(__file__, sys.argv[2:], 2, sys.argv[1])
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
    "statement, reason",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "worker_1 failed: killed by SIGKILL;"),
        ("sys.exit(7)", "worker_1 failed: exit status 7 "),
        ("{}['no key']", "worker_1 failed: KeyError: 'no key' "),
    ],
)
def test_other_failures(start, statement, reason):
    job = start(PLAIN + f"    time.sleep(1)\n    {statement} if rank else time.sleep(600)")
    assert job.ends() == 2
    assert job.err.startswith(f"error: {reason}") and job.err.count("\n") == 1 and str(job.logs) in job.err


def test_all_fail_at_once(start):
    job = start(PLAIN + "    import no_such_module")
    assert job.ends() == 2
    assert re.match(r"error: worker_[01] failed: ModuleNotFoundError: No module named 'no_such_module' .*\n$", job.err)


def test_logs_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write logs to .*choose another place"):
        launch(tmp_path / "job.py", [], 2, tmp_path / "file" / "logs")


def test_this_process_is_no_worker():
    assert not is_worker()
