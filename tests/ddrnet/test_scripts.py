"""The shell scripts, run by Bash as a user runs them.

What they give to Python, their logs, exit status and signals are seen with a real program in the place of Python; at
the end they train and evaluate on the CPU.
"""

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, one_line_error, run_script

SCRIPTS = ROOT / "DDRNet" / "scripts"
TRAIN, EVAL = (str(ROOT / "DDRNet" / name) for name in ("train.py", "eval.py"))
SECONDS = 60  # far more than anything here takes but training

# Stands in the place of Python: writes what it was given, then does what the variable DO says.
RECORDER = f"""#!{sys.executable}
import json, os, signal, sys, time
print(json.dumps([sys.argv[1:], os.getcwd()]))
print("to stderr", file=sys.stderr)
sys.stdout.flush()
exec(os.environ.get("DO", ""))
"""


@pytest.fixture
def place(tmp_path):
    """A folder with a space in its name, with the program that records."""
    place = tmp_path / "a place"
    place.mkdir()
    (place / "my python").write_text(RECORDER)
    (place / "my python").chmod(0o755)
    return place


def environment(place, **variables):
    # The last one makes Python write a line and its end separately, and the two outputs meet in one log.
    names = ("DEVICE_TARGET", "DEVICE_NUM", "INFER_PROGRAM", "BACKEND", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "PYTHON": str(place / "my python"), **variables}


def bash(place, script, *words, cwd=None, **variables):
    return subprocess.run(
        ["bash", str(script), *map(str, words)],
        cwd=cwd or place,
        env=environment(place, **variables),
        capture_output=True,
        text=True,
        timeout=10 * SECONDS,
    )


def recorded(result):
    """What the program said it was given: its arguments and its folder."""
    assert result.returncode == 0, result.stderr
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("[")))


# Script, its arguments as a shell reads them, variables, what the script then runs; {} is the caller's folder.
CALLS = [
    (
        "run_standalone_train_ascend.sh",
        "3 'my config.yaml'",
        {},
        f"{TRAIN} --config_path '{{}}/my config.yaml' --device_target Ascend --device_id 3",
    ),
    (
        "run_standalone_train_gpu.sh",
        "0 /etc/config.yaml --epochs 3 --data_path 'two words'",
        {},
        f"{TRAIN} --config_path /etc/config.yaml --device_target GPU --device_id 0 --epochs 3 --data_path 'two words'",
    ),
    (
        "run_standalone_train_gpu.sh",
        "0 c.yaml",
        {"DEVICE_TARGET": "CPU"},
        f"{TRAIN} --config_path '{{}}/c.yaml' --device_target CPU --device_id 0",
    ),
    (
        "run_distribute_train_ascend.sh",
        "'my table.json' c.yaml --seed 1",
        {},
        f"{TRAIN} --config_path '{{}}/c.yaml' --device_target Ascend --device_num 8"
        " --rank_table_file '{}/my table.json' --seed 1",
    ),
    (
        "run_distribute_train_ascend.sh",
        "- c.yaml --seed 1",
        {"DEVICE_TARGET": "CPU", "DEVICE_NUM": "2"},
        f"{TRAIN} --config_path '{{}}/c.yaml' --device_target CPU --device_num 2 --seed 1",
    ),
    (
        "run_distribute_train_gpu.sh",
        "c.yaml a ''",
        {"DEVICE_NUM": "4"},
        f"{TRAIN} --config_path '{{}}/c.yaml' --device_target GPU --device_num 4 a ''",
    ),
    (
        "run_eval_ascend.sh",
        "7 c.yaml 'best one.ckpt'",
        {},
        f"{EVAL} --config_path '{{}}/c.yaml' --pretrained '{{}}/best one.ckpt' --device_target Ascend --device_id 7",
    ),
    (
        "run_eval_gpu.sh",
        "0 ../c.yaml ./x.ckpt --strict",
        {},
        f"{EVAL} --config_path '{{}}/../c.yaml' --pretrained '{{}}/./x.ckpt' --device_target GPU --device_id 0"
        " --strict",
    ),
]


@pytest.mark.parametrize("script, words, variables, expected", CALLS)
def test_call(place, script, words, variables, expected):
    result = bash(place, SCRIPTS / script, *shlex.split(words), **variables)
    arguments, folder = recorded(result)
    assert arguments == [word.format(place) for word in shlex.split(expected)]
    assert folder == str(place)
    log = place / ("eval.log" if "eval" in script else "train.log")
    first, line = result.stdout.splitlines()
    assert first == f"log: {log}" and result.stderr == "to stderr\n"
    assert sorted(log.read_text().splitlines()) == sorted([line, "to stderr"])


@pytest.mark.parametrize(
    "cwd, path",
    [
        (ROOT, "DDRNet/scripts"),
        (ROOT / "DDRNet", "./scripts"),
        (ROOT / "DDRNet" / "scripts", "."),
        (Path("/"), str(SCRIPTS)),
    ],
)
def test_call_from_any_folder(place, tmp_path, cwd, path):
    """Of a copy of the model folder, in which a log does no harm; CDPATH makes cd print."""
    if cwd.is_relative_to(ROOT):
        cwd = tmp_path / cwd.relative_to(ROOT)
        shutil.copytree(SCRIPTS, tmp_path / "DDRNet" / "scripts")
        root = tmp_path
    else:
        cwd, root = place, ROOT
    result = bash(place, f"{path}/run_eval_gpu.sh", "0", "c.yaml", "x.ckpt", cwd=cwd, CDPATH=".:/")
    arguments, folder = recorded(result)
    assert arguments[:3] == [str(root / "DDRNet" / "eval.py"), "--config_path", f"{cwd}/c.yaml"]
    assert folder == str(cwd) and (cwd / "eval.log").is_file()


USAGE = {
    "run_standalone_train_ascend.sh": "[DEVICE_ID] [CONFIG_PATH]",
    "run_standalone_train_gpu.sh": "[DEVICE_ID] [CONFIG_PATH]",
    "run_distribute_train_ascend.sh": "[RANK_TABLE_FILE] [CONFIG_PATH]",
    "run_distribute_train_gpu.sh": "[CONFIG_PATH]",
    "run_eval_ascend.sh": "[DEVICE_ID] [CONFIG_PATH] [CHECKPOINT_PATH]",
    "run_eval_gpu.sh": "[DEVICE_ID] [CONFIG_PATH] [CHECKPOINT_PATH]",
    "run_infer_310.sh": "[MINDIR_PATH] [DATASET_NAME(imagenet2012)] [DATASET_PATH] [DEVICE_ID(optional)]",
}


def test_scripts_are_those_of_the_document():
    assert {path.name for path in SCRIPTS.iterdir()} == {*USAGE, "common.sh"}
    assert all(os.access(SCRIPTS / script, os.X_OK) for script in USAGE)


@pytest.mark.parametrize(
    "script, words",
    [
        *[(script, []) for script in USAGE],
        *[(script, [""] * 4) for script in USAGE],
        ("run_standalone_train_ascend.sh", ["0"]),
        ("run_standalone_train_ascend.sh", ["first", "c.yaml"]),
        ("run_standalone_train_gpu.sh", ["-1", "c.yaml"]),
        ("run_standalone_train_gpu.sh", ["0", "--epochs", "3"]),
        ("run_distribute_train_ascend.sh", ["table.json"]),
        ("run_distribute_train_gpu.sh", ["--epochs", "3"]),
        ("run_eval_ascend.sh", ["0", "c.yaml"]),
        ("run_eval_ascend.sh", ["0", "c.yaml", "--strict"]),
        ("run_eval_gpu.sh", ["0.5", "c.yaml", "x.ckpt"]),
        ("run_infer_310.sh", ["x.mindir", "imagenet2012"]),
        ("run_infer_310.sh", ["x.mindir", "cifar10", "data"]),
        ("run_infer_310.sh", ["x.mindir", "imagenet2012", "data", "one"]),
        ("run_infer_310.sh", ["x.mindir", "imagenet2012", "data", "0", "more"]),
        ("run_infer_310.sh", ["x.mindir", "imagenet2012", "--", "--flag", "data"]),
    ],
)
def test_usage(place, script, words):
    before = sorted(place.iterdir())
    result = bash(place, SCRIPTS / script, *words)
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(r"Usage: bash \S+ .*\n", result.stderr) and f"{script} {USAGE[script]} (" in result.stderr
    assert sorted(place.iterdir()) == before


def test_what_can_be_put_right(place):
    def refused(script, *words, **variables):
        result = bash(place, SCRIPTS / script, *words, **variables)
        assert result.returncode == 2 and re.fullmatch(r"error: .+\n", result.stderr), result
        return result.stderr

    standalone = ("run_standalone_train_gpu.sh", "0", "c.yaml")
    assert "there is no program no python; activate" in refused(*standalone, PYTHON="no python")
    for variables in ({}, {"DEVICE_TARGET": "Ascend"}):
        assert "need a rank table" in refused("run_distribute_train_ascend.sh", "-", "c.yaml", **variables)
    (place / "train.log").mkdir()
    assert f"cannot write {place}/train.log" in refused(*standalone)


@pytest.mark.parametrize("status", [1, 2, 3, 77])
def test_exit_status(place, status):
    result = bash(place, SCRIPTS / "run_eval_gpu.sh", "0", "c", "x", DO=f"print('last'); sys.exit({status})")
    assert result.returncode == status
    assert result.stdout.endswith("\nlast\n") and result.stderr == "to stderr\n"


def test_killed(place):
    result = bash(place, SCRIPTS / "run_eval_gpu.sh", "0", "c", "x", DO="os.kill(os.getpid(), signal.SIGKILL)")
    assert result.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("output", ["stdout", "stderr"])
def test_log_is_whole_at_the_end(place, output):
    """Much output at last, and the script returns when all of it is in the log, though no pipe is read to its end."""
    do = f"print(*range(50_000), sep='\\n', file=sys.{output})"
    command = ["bash", str(SCRIPTS / "run_standalone_train_gpu.sh"), "0", "c.yaml"]
    (place / "train.log").write_text("of an earlier run\n")
    with (place / "shown").open("w") as shown:
        subprocess.run(command, cwd=place, env=environment(place, DO=do), stdout=shown, stderr=shown, check=True)
        kept = (place / "train.log").read_text()
    numbers = "".join(f"{n}\n" for n in range(50_000))
    for text in (kept, (place / "shown").read_text()):
        for word in ("to stderr\n", r"\[\[.*\]\n", r"log: .*\n"):  # may stand within a line of the other output
            text = re.sub(word, "", text)
        assert text == numbers


def processes_of(place):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(place) in word for word in process.cmdline()):
                found.append(process)
    return found


@pytest.fixture
def start(place):
    """Starts a script in a session of its own, as a terminal does, and waits until its output has the `word`."""
    jobs = []

    def start_job(script, *words, word="ready", **variables):
        out = (place / "out").open("w")
        jobs.append(
            subprocess.Popen(
                ["bash", str(SCRIPTS / script), *map(str, words)],
                cwd=place,
                env=environment(place, **variables),
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # in case nohup started these tests
            )
        )
        out.close()
        deadline = time.monotonic() + 10 * SECONDS
        while word not in (place / "out").read_text():
            assert jobs[-1].poll() is None and time.monotonic() < deadline, (place / "out").read_text()
            time.sleep(0.05)
        return jobs[-1]

    yield start_job
    for process in processes_of(place):
        process.kill()
    for job in jobs:
        job.wait(timeout=10)


# Ends as train.py does: with work after the first signal, at once after a second.
CAREFUL = """
got = []
def note(number, frame):
    got.append(number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, note)
print("ready", flush=True)
while not got:
    time.sleep(0.05)
time.sleep(1)
print("saved after", [signal.Signals(number).name for number in got], flush=True)
sys.exit(130)
"""


@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize("number, seen", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")])
def test_signal(place, start, to_group, number, seen):
    """To the script alone, as kill sends it, or to its process group, as a terminal does: Python gets it once."""
    job = start("run_standalone_train_ascend.sh", "0", "c.yaml", DO=CAREFUL)
    (os.killpg if to_group else os.kill)(job.pid, signal.Signals[number])
    assert job.wait(timeout=SECONDS) == 130
    assert processes_of(place) == []
    for file in ("out", "train.log"):
        assert (place / file).read_text().endswith(f"\nsaved after ['{seen}']\n")


def test_ctrl_c_in_a_terminal(place):
    process, terminal = pty.fork()
    if not process:
        os.chdir(place)
        words = ["bash", str(SCRIPTS / "run_eval_gpu.sh"), "0", "c.yaml", "x.ckpt"]
        os.execvpe("bash", words, environment(place, DO=CAREFUL))
    shown = b""
    try:
        with contextlib.suppress(OSError):  # what a terminal without a process raises
            while part := os.read(terminal, 1000):
                asked = b"ready" in shown
                shown += part
                if b"ready" in shown and not asked:
                    os.write(terminal, b"\x03")
    finally:
        os.close(terminal)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status == 130 and processes_of(place) == []
    assert (place / "eval.log").read_text().endswith("\nsaved after ['SIGINT']\n")
    assert shown.endswith(b"saved after ['SIGINT']\r\n")


def test_signal_that_ends_the_program(place, start):
    job = start("run_eval_ascend.sh", "0", "c.yaml", "x.ckpt", DO="print('ready', flush=True); time.sleep(600)")
    job.terminate()
    assert job.wait(timeout=SECONDS) == 128 + signal.SIGTERM
    assert processes_of(place) == []


def test_second_signal(place, start):
    do = """
got = []
signal.signal(signal.SIGINT, lambda *_: got.append(1))
print("ready", flush=True)
while len(got) < 2:
    time.sleep(0.05)
sys.exit(9)
"""
    job = start("run_distribute_train_gpu.sh", "c.yaml", DO=do)
    job.send_signal(signal.SIGINT)
    time.sleep(1)
    assert job.poll() is None
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=SECONDS) == 9


@pytest.mark.skipif(not shutil.which("nohup"), reason="needs nohup")
def test_nohup(place, start):
    """The terminal may go; Python then has SIGHUP ignored as the script has."""
    do = "print('ready', flush=True); time.sleep(2); sys.exit(5)"
    job = subprocess.Popen(
        ["nohup", "bash", str(SCRIPTS / "run_eval_gpu.sh"), "0", "c", "x"],
        cwd=place,
        env=environment(place, DO=do),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + SECONDS
    while not ((place / "eval.log").is_file() and "ready" in (place / "eval.log").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGHUP)
    assert job.wait(timeout=SECONDS) == 5


# ----- with train.py and eval.py -----

CONFIG = ROOT / "DDRNet" / "src" / "configs" / "ddrnet23_imagenet_gpu.yaml"
SMALL = shlex.split("--data_path digits --num_classes 10 --image_size 64 --batch_size 8 --num_workers 1")
TRAINING = [*SMALL, "--warmup_length", "0", "--output_dir", "my output"]
# In the place of Python: runs the script that it is given with a small network.
WITH_SMALL_NETWORK = f"""#!/bin/sh
exec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT / "tests/ddrnet/small_network.py"))} "$@"
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A sample of the digits."""
    digits = tmp_path_factory.mktemp("sample") / "digits"
    words = ["--output", digits, "--images", "4", "--size", "64"]
    assert run_script(ROOT / "utils" / "sample_imagenet.py", *words, cwd=digits.parent).returncode == 0
    return digits


@pytest.fixture
def work(place, digits):
    """The folder with a sample of the digits, and the variables for a run on the CPU."""
    (place / "digits").symlink_to(digits)
    python = place / "python with a small network"
    python.write_text(WITH_SMALL_NETWORK)
    python.chmod(0o755)
    return place, {"PYTHON": str(python), "DEVICE_TARGET": "CPU"}


def run(work, script, *words, **variables):
    place, usual = work
    return bash(place, SCRIPTS / script, *words, **usual, **variables)


def train_and_evaluate(work, script, *words, **variables) -> str:
    """Evaluation finds the accuracy that training has written last. Returns what training has printed."""
    trained = run(work, script, *words, CONFIG, *TRAINING, "--epochs", "1", **variables)
    assert trained.returncode == 0, trained.stderr
    top1 = re.search(r"top-1 ([\d.]+) ?%", trained.stdout)[1]
    checkpoint = "my output/ddrnet23.ckpt"
    evaluated = run(work, "run_eval_gpu.sh", "0", CONFIG, checkpoint, *SMALL, "--output_dir", "evaluated")
    assert evaluated.returncode == 0, evaluated.stderr
    found = float(re.search(r"'Top1-Acc': ([\d.]+)", evaluated.stdout)[1])
    assert 100 * found == pytest.approx(float(top1), abs=0.01)
    return trained.stdout


def test_train_and_evaluate(work):
    assert "CPU x 1" in train_and_evaluate(work, "run_standalone_train_ascend.sh", "0")


@pytest.mark.full
def test_train_on_two_devices_and_evaluate(work):
    """DDRNet-23 itself, two CPU workers through msrun."""
    work[1]["PYTHON"] = sys.executable
    assert "CPU x 2" in train_and_evaluate(work, "run_distribute_train_ascend.sh", "-", DEVICE_NUM="2")


def test_ctrl_c_while_training(work, start):
    place, usual = work
    job = start("run_standalone_train_gpu.sh", "0", CONFIG, *TRAINING, word="epoch 1/300:", **usual)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(timeout=2 * SECONDS) == 130
    assert processes_of(place) == [] and (place / "my output" / "resume.ckpt").is_file()
    assert "go on with --resume" in (place / "out").read_text() and "Traceback" not in (place / "out").read_text()


def test_rank_table_of_fewer_devices(work):
    """DEVICE_NUM is 8; the table is of 2."""
    (work[0] / "hccn.conf").write_text("address_0=192.168.100.100\naddress_1=192.168.100.101\n")
    words = ["--device_num", "[0,2)", "--server_ip", "192.168.1.7", "--hccn_conf", "hccn.conf"]
    made = run_script(ROOT / "utils" / "hccl_tools" / "hccl_tools.py", *words, cwd=work[0])
    table = made.stdout.split()[-1]
    error = one_line_error(run(work, "run_distribute_train_ascend.sh", table, CONFIG, *TRAINING))
    assert f"{table} lists 2 devices for 8; set --device_num 2" in error
