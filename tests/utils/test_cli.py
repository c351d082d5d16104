"""Exit statuses and one-line errors of real processes; files that are written whole or not at all."""

import contextlib
import os
import resource
import signal
import socket
import stat
import subprocess
import sys

import pytest
from conftest import ROOT

from utils.cli import Parser, UserError, read_file, read_json, whole_file


def call(body: str) -> subprocess.CompletedProcess:
    """Run `run(main)` where `body` is that of `main`."""
    code = f"import sys, utils\nfrom utils.cli import *\ndef main():\n    {body}\nrun(main)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "body, status, errors",
    [
        ("pass", 0, ""),
        ("return 0", 0, ""),
        ("return 7", 7, ""),
        ("raise UserError('no such thing; make one')", 2, "error: no such thing; make one\n"),
        (r"raise UserError('two\nlines\r\n\n  and\tmore\n')", 2, "error: two lines and more\n"),
        ("sys.exit(3)", 3, ""),
    ],
)
def test_exit_status(body, status, errors):
    result = call("print('begun'); " + body)
    assert (result.returncode, result.stdout, result.stderr) == (status, "begun\n", errors)


def test_a_line_is_written_in_one_piece():
    """Python writes it and its end separately under PYTHONUNBUFFERED; here each write arrives as a message."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = "import sys\nfrom utils.cli import run\nrun(lambda: print('out') or print('err', file=sys.stderr))"
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=ROOT, stdout=theirs, stderr=theirs, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    theirs.close()
    assert [ours.recv(100) for _ in range(3)] == [b"out\n", b"err\n", b""]


def test_outputs_may_be_closed():
    code = "from utils.cli import run\nrun(lambda: print('nobody reads this') or 5)"
    command = f'"{sys.executable}" -c "{code}"'
    assert subprocess.run(["bash", "-c", f"{command} >&- 2>&-"], cwd=ROOT).returncode == 5


def test_a_bug_keeps_its_traceback():
    result = call("{}['key']")
    assert result.returncode == 1 and "Traceback" in result.stderr and "KeyError: 'key'" in result.stderr


WRITING = """
import sys, time
from utils.cli import run, whole_file
def main():
    with whole_file(sys.argv[1]) as temporary:
        temporary.write_text("half")
        {before}
        print("ready", flush=True)
        time.sleep(60)
run(main)
"""
# After this, MindSpore's own handler is on SIGINT.
A_GRAPH = "import mindspore as ms; ms.nn.Dense(2, 3)(ms.Tensor([[1.0, 2.0]])).asnumpy()"


@pytest.mark.parametrize(
    "number, before",
    [(signal.SIGINT, ""), (signal.SIGTERM, ""), (signal.SIGINT, A_GRAPH)],
    ids=["INT", "TERM", "graph"],
)
def test_interrupt(tmp_path, number, before):
    command = [sys.executable, "-c", WRITING.format(before=before), str(tmp_path / "file")]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in case these tests run in the background
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=30) == ("", "interrupted\n")
    assert process.returncode == 130 and os.listdir(tmp_path) == []


@pytest.fixture
def parser():
    parser = Parser(prog="eval.py")
    parser.add_argument("--size", type=int, choices=[1, 2], help="how large")
    parser.add_argument("--name", required=True)
    return parser


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--name", "x", "--sise", "1"], ["unrecognized arguments", "--sise 1"]),
        (["--name", "x", "--size", "one"], ["--size", "'one'"]),
        (["--name", "x", "--size", "3"], ["--size", "3", "1, 2"]),
        (["--size", "1"], ["required", "--name"]),
        (["--name"], ["--name", "expected one argument"]),
    ],
)
def test_parser_refuses_in_one_line(parser, capsys, arguments, words):
    with pytest.raises(UserError) as caught:
        parser.parse_args(arguments)
    line = str(caught.value)
    assert line.endswith("; see eval.py --help") and "\n" not in line and all(word in line for word in words)
    assert capsys.readouterr() == ("", "")


def test_parser_still_parses_and_helps(parser, capsys):
    assert vars(parser.parse_args(["--name", "x", "--size", "2"])) == {"size": 2, "name": "x"}
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help"])
    out, errors = capsys.readouterr()
    assert "how large" in out and errors == ""


@contextlib.contextmanager
def nobody():
    """As an ordinary user: the tests may run as root, for whom everything is permitted."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


def odd_places(folder):
    """Paths that are no readable file, made in the folder, with what the system or we say of them."""
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "closed").mkdir(mode=0)
    (folder / "secret").write_text("{}")
    (folder / "secret").chmod(0)
    return {
        folder / "fifo": "no regular file",
        "/dev/zero": "no regular file",
        folder: "Is a directory",
        folder / "loop": "Too many levels of symbolic links",
        folder / ("x" * 256): "File name too long",
        "/".join(["x" * 200] * 30): "File name too long",
        folder / "closed" / "file": "Permission denied",
        folder / "secret": "Permission denied",
        "a\0b": "null byte",
    }


def test_only_regular_files_are_opened(tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(0o755)
        if folder.name.startswith("pytest-of-"):
            break
    for path, words in odd_places(tmp_path).items():
        with nobody(), pytest.raises(UserError, match=f"^cannot read the file: .*{words}.*; give another$"):
            read_file(path, "give another", "the file")


def test_paths_that_the_system_refuses_are_one_line_wherever_they_are_used(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path, words in ((tmp_path / ("x" * 256), "File name too long"), (tmp_path / "loop" / "x", "Too many levels")):
        result = call(f"import os; os.listdir({str(path)!r})")
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"error: cannot use '{path}': {words}"[:200])
    result = call("raise OSError(5, 'no path in it')")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_text_that_no_encoding_has_is_shown_all_the_same():
    assert call(r"print('caf\udce9')").stdout == "caf\\udce9\n"


def test_read_json(tmp_path):
    path = tmp_path / "a file.json"
    path.write_text('{"a": [1, null, "é"]}', encoding="utf-8")
    assert read_json(path, "make one") == read_json(str(path), "make one") == {"a": [1, None, "é"]}
    for content in (b"", b"{", b"\xff\xfe\x80", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a file.json is not valid JSON \(.*\); make one"):
            read_json(path, "make one")
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*a file.json: No such file or directory; make one"):
        read_json(path, "make one")


def test_whole_file_replaces_on_success(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    for text in ("first", "second"):
        with whole_file(str(path)) as temporary:
            assert (temporary.parent, temporary.suffix) == (path.parent, ".txt") and temporary != path
            temporary.write_text(text)
            assert text == "first" or path.read_text() == "first"
        assert path.read_text() == text and os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), UserError("why")])
def test_whole_file_keeps_the_old_file_on_failure(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, whole_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value is error and path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_whole_file_may_be_moved_away_by_the_writer(tmp_path):
    with pytest.raises(ValueError, match="bug"), whole_file(tmp_path / "file") as temporary:
        temporary.unlink()
        raise ValueError("bug")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_whole_file_has_the_permissions_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "file") as temporary:
            temporary.write_text("text")
        (tmp_path / "other").write_text("text")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "other")]
    assert modes == [0o666 & ~umask] * 2


@pytest.mark.parametrize("place", ["file/results.json", "/proc/results.json", "/proc/new/results.json", "folder"])
def test_whole_file_in_an_impossible_place(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    path = tmp_path / place
    with (
        pytest.raises(UserError, match=f"cannot write {path}: [A-Z].*; .*choose another place"),
        whole_file(path) as temp,
    ):
        temp.write_text("text")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and os.listdir(tmp_path / "folder") == []
    assert (tmp_path / "file").read_text() == "in the way"


def test_whole_file_does_not_replace_what_is_no_file(tmp_path):
    """Such as /dev/null, for a user who may."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match=r"cannot write .*fifo: Something else"), whole_file(tmp_path / "fifo"):
        pass
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode) and os.listdir(tmp_path) == ["fifo"]


def test_whole_file_without_room(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match="make room"), whole_file(path) as temporary:
            temporary.write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
