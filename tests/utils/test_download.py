"""Downloads from file:// and from a server on this machine that breaks off, ignores ranges or hangs when told to."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from utils import download as module
from utils.cli import UserError
from utils.download import download

PAYLOAD = os.urandom(300_000)
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()
HALF = 200_000


class Server(ThreadingHTTPServer):
    """Serves PAYLOAD as /file; the attributes say how it misbehaves, `asked` keeps every Range header (or None)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/file"
        self.asked: list[str | None] = []
        self.break_after: int | None = None
        self.hang_after: int | None = None
        self.ranges = "right"  # or "ignored", "wrong"
        self.chunked = False
        self.released = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        asked = self.headers["Range"]
        server.asked.append(asked)
        if self.path != "/file":
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges != "ignored" else 0
        if start >= len(PAYLOAD):
            return self.send_error(416)
        body = PAYLOAD[start:]
        self.send_response(206 if start else 200)
        if start:
            shown = start + (1 if server.ranges == "wrong" else 0)
            self.send_header("Content-Range", f"bytes {shown}-{len(PAYLOAD) - 1}/{len(PAYLOAD)}")
        if not server.chunked:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        stop = server.break_after if server.break_after is not None else server.hang_after
        self.wfile.write(body[:stop])
        if server.hang_after is not None:
            server.released.wait(timeout=20)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new folder" / "model.ckpt"


def part_of(path):
    return path.with_name(path.name + ".part")


def refused(url, path, sha256=SHA256) -> str:
    """The one line of the UserError; it always names the URL and the remedy."""
    with pytest.raises(UserError) as caught:
        download(url, path, sha256)
    line = str(caught.value)
    assert "\n" not in line and url in line and f"put the file by hand at {path}" in line
    return line


def test_downloads_whole_file(server, target, capsys):
    assert download(server.url, target, SHA256.upper()) == SHA256
    assert target.read_bytes() == PAYLOAD and os.listdir(target.parent) == [target.name]
    assert server.asked == [None]
    assert "sha256" not in capsys.readouterr().out


def test_without_a_hash_the_digest_is_printed(server, target, capsys):
    assert download(server.url, target, None) == SHA256
    assert f"sha256 {SHA256}" in capsys.readouterr().out
    assert download(server.url, target, None) == SHA256
    assert SHA256 in capsys.readouterr().out and len(server.asked) == 1


def test_existing_good_file_is_not_fetched(server, target, capsys):
    target.parent.mkdir()
    target.write_bytes(PAYLOAD)
    assert download(server.url, target, SHA256) == SHA256
    assert server.asked == [] and "nothing to download" in capsys.readouterr().out


def test_existing_other_file_is_kept(server, target):
    target.parent.mkdir()
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match="move it away or delete it"):
        download(server.url, target, SHA256)
    assert server.asked == [] and target.read_bytes() == b"mine"


def test_broken_transfer_is_resumed_where_it_stopped(server, target):
    server.break_after = HALF
    assert f"broke off after {HALF} of {len(PAYLOAD)} bytes" in refused(server.url, target)
    assert part_of(target).read_bytes() == PAYLOAD[:HALF] and not target.exists()
    server.break_after = 50_000
    refused(server.url, target)
    server.break_after = None
    assert download(server.url, target, SHA256) == SHA256
    assert server.asked == [None, f"bytes={HALF}-", f"bytes={HALF + 50_000}-"]
    assert target.read_bytes() == PAYLOAD and os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("ranges, requests", [("ignored", 1), ("wrong", 2)])
def test_server_that_cannot_resume_starts_over(server, target, ranges, requests):
    target.parent.mkdir()
    part_of(target).write_bytes(PAYLOAD[:HALF])
    server.ranges = ranges
    assert download(server.url, target, SHA256) == SHA256
    assert server.asked == [f"bytes={HALF}-", None][:requests] and target.read_bytes() == PAYLOAD


@pytest.mark.parametrize("surplus", [0, 10])
def test_part_as_long_as_the_file_or_longer_starts_over(server, target, surplus):
    target.parent.mkdir()
    part_of(target).write_bytes(bytes(len(PAYLOAD) + surplus))
    assert download(server.url, target, SHA256) == SHA256
    assert server.asked == [f"bytes={len(PAYLOAD) + surplus}-", None] and target.read_bytes() == PAYLOAD


def test_part_of_another_file_fails_once_then_downloads_anew(server, target):
    target.parent.mkdir()
    part_of(target).write_bytes(bytes(HALF))
    refused(server.url, target)
    assert download(server.url, target, SHA256) == SHA256


def test_hash_mismatch_removes_the_part(server, target):
    wrong = "0123456789abcdef" * 4
    line = refused(server.url, target, wrong)
    assert SHA256[:12] in line and wrong[:12] in line and wrong[:13] not in line
    assert os.listdir(target.parent) == []


def test_the_first_digits_of_a_hash_are_checked(server, target):
    """As PyTorch's file names hold them; a part is removed, a file that is there is kept."""
    wrong = SHA256[:7] + ("0" if SHA256[7] != "0" else "1")
    line = refused(server.url, target, wrong)
    assert SHA256[:12] in line and f"expected {wrong}; removed" in line
    assert os.listdir(target.parent) == []
    assert download(server.url, target, SHA256[:8].upper()) == SHA256
    assert download(server.url, target, SHA256[:63]) == SHA256
    with pytest.raises(UserError, match=f"expected {wrong}; move it away"):
        download(server.url, target, wrong)
    assert target.read_bytes() == PAYLOAD and len(server.asked) == 2


@pytest.mark.parametrize("sha256", ["", 7 * "0", 65 * "0", 64 * "g", "sha256:00000000", "00000000\n"])
def test_what_is_no_hash_is_refused_before_anything_is_fetched(sha256, server, target):
    with pytest.raises(UserError, match="is no SHA-256; give its 64 hexadecimal digits"):
        download(server.url, target, sha256)
    assert server.asked == [] and not target.parent.exists()


def test_size_not_told(server, target):
    server.chunked = True
    assert download(server.url, target, SHA256) == SHA256


def test_not_found(server, target):
    assert "404" in refused(server.url + "s", target)
    assert not target.parent.exists()


def test_silent_server_times_out(server, target, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    server.hang_after = HALF
    assert "timed out" in refused(server.url, target)
    assert 0 < part_of(target).stat().st_size <= HALF
    server.hang_after = None
    assert download(server.url, target, SHA256) == SHA256


def test_nobody_listens(target, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        assert "refused" in refused(f"http://127.0.0.1:{taken.getsockname()[1]}/file", target)


@pytest.mark.parametrize(
    "url",
    [
        "model.ckpt",
        "ftp://127.0.0.1/file",
        "http://",
        "http://[::1",
        f"http://127.0.0.1:{2**70}",
        "file:///no/such",
    ],
)
def test_bad_urls(url, target):
    refused(url, target)
    assert not part_of(target).exists()


def test_what_is_no_file_is_not_opened(server, target, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    refused((tmp_path / "fifo").as_uri(), target)
    for path in (part_of(target), target):
        path.parent.mkdir(exist_ok=True)
        os.mkfifo(path)
        with pytest.raises(UserError, match=f"cannot read {path}: it is no regular file; move it away"):
            download(server.url, target, SHA256)


def test_unwritable_place(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(server.url, tmp_path / "file" / "model.ckpt")


def test_file_url(tmp_path, target):
    source = tmp_path / "with space.bin"
    source.write_bytes(PAYLOAD)
    assert download(source.as_uri(), target, SHA256) == SHA256
    target.unlink()
    for start in (PAYLOAD[:HALF], PAYLOAD, PAYLOAD + b"surplus"):
        part_of(target).write_bytes(start)
        assert download(source.as_uri(), target, SHA256) == SHA256
        assert target.read_bytes() == PAYLOAD and os.listdir(target.parent) == [target.name]
        target.unlink()
    part_of(target).write_bytes(bytes(HALF))  # resumed by seeking: the wrong start is kept and found out
    refused(source.as_uri(), target)


CALL = """
import resource, sys
from pathlib import Path
limit = int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from utils.cli import run
from utils.download import download
run(lambda: print(download(sys.argv[1], Path(sys.argv[2]))))
"""


def start(url, path, limit=0) -> subprocess.Popen:
    command = [sys.executable, "-c", CALL, url, str(path), str(limit)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_interrupt_keeps_the_part_for_resuming(server, target):
    server.hang_after = HALF
    with start(server.url, target) as process:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and not (part_of(target).exists() and part_of(target).stat().st_size):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=15)[1] == "interrupted\n"
    assert process.returncode == 130
    kept = part_of(target).stat().st_size
    server.hang_after = None
    assert download(server.url, target, SHA256) == SHA256
    assert server.asked == [None, f"bytes={kept}-"] and kept > 0


def test_full_disk_is_one_line(server, target):
    with start(server.url, target, limit=100_000) as process:
        errors = process.communicate(timeout=15)[1]
    assert process.returncode == 2 and errors.count("\n") == 1
    assert "File too large" in errors and f"put the file by hand at {target}" in errors and server.url in errors
    assert not target.exists()
