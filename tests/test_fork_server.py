"""A script that the fork server runs against the same script in a Python of its own."""

import os
import signal
import subprocess
import time

import pytest
from conftest import SERVER, run_process, run_script, stop_training

SCRIPTS = {
    "arguments": "import sys; print(sys.argv, sys.path[0], len(sys.path), __file__, __name__, sys.executable)",
    "status": "raise SystemExit(7)",
    "message": "import sys; sys.exit('no')",
    "chained traceback": """
try:
    1 / 0
except ZeroDivisionError as error:
    raise OSError("x") from error""",
    "syntax": "a b",
    "Ctrl-C": "raise KeyboardInterrupt",
    "killed": "import os; os.write(1, b'a\\rb\\r\\n'); os.kill(os.getpid(), 9)",
    "environment": "import mindspore, os; print(sorted(os.environ.items()))",
    "handlers": "import signal; print([signal.getsignal(s) for s in signal.valid_signals()])",
    "files": "import os, sys; print(sorted(os.listdir('/proc/self/fd')), sys.stdout.isatty(), os.getcwd())",
    "main thread's end": """
import atexit, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
raise ValueError""",
    "workers": """
import multiprocessing

def square(x):
    return x * x

if __name__ == "__main__":
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(pool.map(square, [1, 2]))""",
    "own modules": "import sys, src; sys.path.insert(0, 'x'); print(src.NAME, 'utils' in sys.modules)",
}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/__init__.py").write_text(f"NAME = {tmp_path.name!r}")
    return tmp_path


def write(place, text: str) -> str:
    (place / "script.py").write_text(text)
    return "script.py"


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_a_command_ends_as_in_a_process_of_its_own(place, text):
    words = (write(place, text), "two words", "")
    assert SERVER.takes([*words], place, dict(os.environ))
    forked, own = (run(*words, cwd=place, ANY="1") for run in (run_script, run_process))
    assert vars(forked) == vars(own)


def test_a_graph_runs_in_every_command(place):
    script = write(
        place,
        "import mindspore as ms; ms.set_device('CPU'); ms.set_context(mode=ms.GRAPH_MODE)\n"
        "@ms.jit\ndef f(x):\n    return x @ x\n"
        "print(f(ms.ops.ones((64, 64))).sum())",
    )
    outputs = [run(script, cwd=place).stdout for run in (run_script, run_script, run_process)]
    assert outputs == [f"{64**3}.0\n"] * 3


def test_numpy_draws_other_numbers_in_every_command(place):
    script = write(place, "import numpy; print(numpy.random.rand())")
    assert len({run_script(script, cwd=place).stdout for _ in range(3)}) == 3


@pytest.mark.parametrize("words, variables", [(["-c", "0"], {}), (["none.py"], {}), (["script.py"], {"GLOG_v": "1"})])
def test_what_needs_a_process_of_its_own_gets_one(place, words, variables):
    write(place, "import os; print(os.environ['GLOG_v'])")
    assert not SERVER.takes(words, place, {**os.environ, **variables})
    result = run_script(*words, cwd=place, **variables)
    assert (result.returncode, result.stdout) == (2 if "none.py" in words else 0, "1\n" if variables else "")


def test_a_command_that_takes_too_long_is_killed_with_what_it_started(place):
    script = write(
        place,
        "import subprocess, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)",
    )
    with pytest.raises(subprocess.TimeoutExpired) as error:
        run_script(script, cwd=place, timeout=1)
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{error.value.stdout.strip()}/cwd") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{error.value.stdout.strip()}/cwd")
    assert run_script(write(place, ""), cwd=place).returncode == 0


def test_commands_run_side_by_side_and_have_groups_of_their_own(place):
    script = write(place, "import os, sys, time; print(os.getpgid(0), flush=True); time.sleep(1); sys.exit(5)")
    start = time.monotonic()
    commands = [SERVER.start([script], place, dict(os.environ)) for _ in range(4)]
    commands[0].send_signal(signal.SIGTERM)
    results = [command.wait(60) for command in commands]
    assert [result.returncode for result in results] == [-signal.SIGTERM, 5, 5, 5]
    assert [result.stdout for result in results[1:]] == [f"{command.pid}\n" for command in commands[1:]]
    assert time.monotonic() - start < 3.5


def test_ctrl_c_comes_after_the_line(place):
    text = "import time, sys\nfor line in 'abc':\n    print(line, flush=True)\n"
    text += "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    sys.exit(130)"
    assert stop_training([write(place, text)], "b", 0.2, place) == "a\nb\nc\n"


def test_the_server_ends_with_the_tests(place):
    """A Python that uses one is killed."""
    write(place, "import os, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(60)")
    user = "import os, sys; sys.path.insert(0, sys.argv[1]); from fork_server import ForkServer\n"
    user += "server = ForkServer()\ncommand = server.start(['script.py'], '.', dict(os.environ))\n"
    user += "while not command.stdout: assert command.running()\n"
    user += "print(command.stdout[0], flush=True); os.kill(os.getpid(), 9)"
    result = run_process("-c", user, os.path.dirname(__file__), cwd=place)
    assert result.returncode == -signal.SIGKILL
    end = time.monotonic() + 10
    while (left := [n for n in result.stdout.split() if os.path.exists(f"/proc/{n}/cwd")]) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(result.stdout.split()) == 2 and not left
