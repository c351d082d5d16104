"""Checkpoints of a small network: exact round trips, and one line for every file that does not fit."""

import os
import re
import resource
import signal
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT
from mindspore import nn

from utils.checkpoint import load_strictly, read_checkpoint, read_record, save_checkpoint
from utils.cli import UserError
from utils.torch_file import is_torch_file, read_torch_file

NAMES = ["conv.weight", "bn.moving_mean", "bn.moving_variance", "bn.gamma", "bn.beta", "head.weight", "head.bias"]


class Small(nn.Cell):
    """A network of the parameters NAMES, every one of them random, variances above 0."""

    def __init__(self, seed: int, classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Dense(4, classes)
        rng = np.random.default_rng(seed)
        for parameter in self.get_parameters():
            values = rng.standard_normal(parameter.shape).astype(np.float32)
            parameter.set_data(ms.Tensor(np.abs(values) if "variance" in parameter.name else values))


def values(net: nn.Cell) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy().copy() for parameter in net.get_parameters()}


def same(one: dict, other: dict) -> bool:
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


def kind_of(names: set[str]) -> str:
    return f"a file of {len(names)} parameters"


def load(net, path, **options) -> list[str]:
    return load_strictly(net.get_parameters(), path, "a small network", kind_of, **options)


def refused(net, path, **options) -> str:
    """The message of the UserError, which is one line; the network must be as before."""
    before = values(net)
    with pytest.raises(UserError) as caught:
        load(net, path, **options)
    assert same(values(net), before)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    """A file of Small(1)."""
    save_checkpoint(Small(1).get_parameters(), tmp_path / "small.ckpt")
    return tmp_path / "small.ckpt"


def rows_without(net, *names):
    return [parameter for parameter in net.get_parameters() if parameter.name not in names]


def test_round_trip_is_exact(path):
    net = Small(2)
    assert list(values(net)) == NAMES and not same(values(net), values(Small(1)))
    assert load(net, path) == [] and same(values(net), values(Small(1)))
    assert os.listdir(path.parent) == ["small.ckpt"]


def test_mindspore_reads_ours_and_we_read_its(path, tmp_path):
    stored = ms.load_checkpoint(str(path))
    assert same({name: value.asnumpy() for name, value in stored.items()}, values(Small(1)))
    ms.save_checkpoint(Small(5), str(tmp_path / "its.ckpt"))
    net = Small(2)
    assert load(net, tmp_path / "its.ckpt") == [] and same(values(net), values(Small(5)))


@pytest.mark.parametrize(
    "array",
    [
        np.array(1.5, np.float32),
        np.array([[7]], np.int32),
        np.array(2**63 - 1, np.int64),
        np.array([1e-7, 65504], np.float16),
        np.arange(6, dtype=np.float64).reshape(1, 6),
    ],
)
def test_every_shape_and_type_returns(tmp_path, array):
    save_checkpoint([ms.Parameter(ms.Tensor(array), name="x")], tmp_path / "x.ckpt")
    read = read_checkpoint(tmp_path / "x.ckpt")["x"]
    assert read.dtype == array.dtype and read.shape == array.shape and np.array_equal(read, array)


def test_stored_type_becomes_the_networks(tmp_path):
    save_checkpoint([ms.Parameter(ms.Tensor([0.5, 2], ms.float16), name="x")], tmp_path / "x.ckpt")
    parameter = ms.Parameter(ms.Tensor([0, 0], ms.float32), name="x")
    load_strictly([parameter], tmp_path / "x.ckpt", "an x", kind_of)
    assert parameter.dtype == ms.float32 and parameter.asnumpy().tolist() == [0.5, 2]


def test_the_record_survives(tmp_path):
    record = {"täg": 'a\nb "c"', "sizes": [64, 1.25], "classes": None, "long": "x" * 100_000}
    save_checkpoint(Small(1).get_parameters(), tmp_path / "new" / "small.ckpt", record)
    assert read_record(tmp_path / "new" / "small.ckpt") == record
    net = Small(2)
    assert load(net, tmp_path / "new" / "small.ckpt") == [] and same(values(net), values(Small(1)))


def test_a_file_that_tells_nothing_or_nonsense_of_itself(path, tmp_path):
    assert read_record(path) == {}
    for text in ("[1]", "{", "3"):
        rows = [{"name": p.name, "data": p} for p in Small(1).get_parameters()]
        ms.save_checkpoint(rows, str(tmp_path / "odd.ckpt"), append_dict={"record": text})
        with pytest.raises(UserError, match="damaged record"):
            read_record(tmp_path / "odd.ckpt")


class Both(nn.Cell):
    def __init__(self, seed: int):
        super().__init__()
        self.part = Small(seed)


def test_prefix_is_not_in_the_file(tmp_path):
    save_checkpoint(Both(1).get_parameters(), tmp_path / "part.ckpt", prefix="part.")
    assert list(read_checkpoint(tmp_path / "part.ckpt")) == NAMES
    both = Both(2)
    assert "7 parameters missing: part.conv.weight, " in refused(both, tmp_path / "part.ckpt")
    assert load(both, tmp_path / "part.ckpt", prefix="part.") == [] and same(values(both), values(Both(1)))
    save_checkpoint(rows_without(Both(1), "part.head.bias"), tmp_path / "less.ckpt", prefix="part.")
    assert "missing: head.bias)" in refused(both, tmp_path / "less.ckpt", prefix="part.")


def test_missing(tmp_path):
    save_checkpoint(rows_without(Small(1), *NAMES[:5]), tmp_path / "less.ckpt")
    assert refused(Small(2), tmp_path / "less.ckpt") == (
        f"{tmp_path}/less.ckpt does not hold a small network but looks like a file of 2 parameters (5 parameters "
        "missing: conv.weight, bn.moving_mean, bn.moving_variance, …); give the file of a small network"
    )


def test_surplus(path):
    net = Small(2)
    before = values(net)
    with pytest.raises(UserError, match=r"file of 7 parameters \(1 parameters surplus: head\.bias\); give the file of"):
        load_strictly(rows_without(net, "head.bias"), path, "a headless one", kind_of)
    assert same(values(net), before)


def test_misshapen(path):
    net = Small(2, classes=5)
    message = refused(net, path)
    assert "2 parameters have another shape, first head.weight: (3, 4) in the file, (5, 4) in the network;" in message
    assert message.endswith("; give a file of a small network with the same settings")
    assert refused(net, path, remedies={"head.weight": "set --num_classes"}).endswith("; set --num_classes")


def test_what_is_left_out_keeps_its_values_whatever_the_file_holds(path, tmp_path):
    head = ["head.weight", "head.bias"]
    for classes in (3, 5):  # the file has 3
        net, own = Small(2, classes=classes), values(Small(2, classes=classes))
        assert load(net, path, left_out=iter(head)) == head
        for name, value in values(net).items():
            assert np.array_equal(value, own[name] if name in head else values(Small(1))[name]), name

    save_checkpoint(rows_without(Small(1), "bn.beta"), tmp_path / "less.ckpt")
    assert load(Small(2), tmp_path / "less.ckpt", left_out=["bn.beta"]) == ["bn.beta"]
    assert "1 parameters missing: bn.beta" in refused(Small(2), tmp_path / "less.ckpt", left_out=["bn.gamma"])
    assert "head.bias: (3,) in the file" in refused(Small(2, classes=5), path, left_out=["head.weight"])


def test_truncated_anywhere(path, tmp_path):
    whole = path.read_bytes()
    cut = tmp_path / "cut.ckpt"
    net = Small(2)
    for size in set(range(len(whole))) - {len(whole) - 17}:  # of that size it is whole but for the checksum
        cut.write_bytes(whole[:size])
        assert re.search(r"cannot be read as|parameters missing", refused(net, cut)), size
    cut.write_bytes(whole[:300])
    assert f"{cut} (300 bytes) cannot be read as a MindSpore checkpoint; it is truncated, damaged or" in refused(
        net, cut
    )


def test_damaged_anywhere(path, tmp_path):
    """Without the checksum, MindSpore takes other weights silently, or a wrong shape ends the process."""
    whole = path.read_bytes()
    bad = tmp_path / "bad.ckpt"
    net = Small(2)
    for position in range(0, len(whole) - 17, 7):
        bad.write_bytes(whole[:position] + bytes([whole[position] ^ 0x11]) + whole[position + 1 :])
        assert "damaged" in refused(net, bad), position


@pytest.mark.parametrize(
    "content", [b"", b"hello\n" * 50, bytes(1000), np.random.default_rng(0).bytes(5000), b"PK\x03\x04" + bytes(99)]
)
def test_junk(tmp_path, content):
    (tmp_path / "junk.ckpt").write_bytes(content)
    message = refused(Small(2), tmp_path / "junk.ckpt")
    assert f"({len(content)} bytes) cannot be read as a MindSpore checkpoint" in message


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.ckpt").mkdir()
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")
    for name in ("none.ckpt", "folder.ckpt", "pipe.ckpt", "loop.ckpt", f"{'x' * 300}.ckpt"):
        assert "no checkpoint at " in refused(Small(2), tmp_path / name)
        with pytest.raises(UserError, match="no checkpoint at "):
            read_torch_file(tmp_path / name)
        assert not is_torch_file(tmp_path / name)


def test_failure_to_write_leaves_the_old_file(path, capfd):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*small\.ckpt: File too large; make room"):
            save_checkpoint(Small(3).get_parameters(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capfd.readouterr() == ("", "") and os.listdir(path.parent) == ["small.ckpt"]
    net = Small(2)
    assert load(net, path) == [] and same(values(net), values(Small(1)))


SCRIPT = """
import sys
from utils.cli import run
from utils.checkpoint import load_strictly
run(lambda: load_strictly([], sys.argv[1], "nothing", lambda names: "something"))
"""


def test_user_sees_one_line(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:300] + b"?" + whole[301:])
    command = [sys.executable, "-c", SCRIPT, str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(r"error: .*small\.ckpt \(\d+ bytes\) cannot be read as a MindSpore .*\n", result.stderr)


def test_ctrl_c_while_a_file_is_read_is_no_damage(tmp_path):
    """MindSpore makes an error of its own of whatever ends its reading."""
    big = ms.Parameter(ms.Tensor(np.zeros(50_000_000, np.float32)), name="big")
    save_checkpoint([big], tmp_path / "big.ckpt")

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            read_checkpoint(tmp_path / "big.ckpt")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_file_that_is_larger_than_the_memory(tmp_path):
    (tmp_path / "vast.ckpt").touch()
    os.truncate(tmp_path / "vast.ckpt", 1 << 42)
    assert "not enough free memory to read" in refused(Small(0), tmp_path / "vast.ckpt")
