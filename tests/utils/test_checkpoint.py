"""Checkpoints of a small network: exact round trips, and one line for every file that does not fit."""

import json
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
from hypothesis import given, settings
from hypothesis import strategies as st
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
    for name, reason in (
        ("none.ckpt", "No such file or directory"),
        ("folder.ckpt", "it is no regular file"),
        ("pipe.ckpt", "it is no regular file"),
        ("loop.ckpt", "Too many levels of symbolic links"),
        (f"{'x' * 300}.ckpt", "File name too long"),
    ):
        assert f"no checkpoint at {tmp_path / name}: {reason}; put the file there" in refused(Small(2), tmp_path / name)
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


NO_NUMBERS = [
    ("x", np.array([1, np.nan], np.float32), "x holds values that are not finite"),
    ("x", np.array([-np.inf], np.float16), "x holds values that are not finite"),
    ("x", np.array([1e39]), "x holds values that are not finite"),  # in float32, which networks compute in
    ("x", np.array([1, 2], np.int32), "x holds values of type int32"),
    ("x", np.array([True]), "x holds values of type bool"),
    ("bn.moving_variance", np.array([1, -1e-9], np.float32), "bn.moving_variance holds negative variances"),
]
ONLY_TORCH = [
    ("x", np.array([1j], np.complex64), "x holds values of type complex64"),
    ("bn.running_var", np.array(-1, np.float16), "bn.running_var holds negative variances"),
]


@pytest.mark.parametrize(("name", "array", "fault"), NO_NUMBERS, ids=str)
def test_numbers_with_which_nothing_can_be_computed(tmp_path, name, array, fault):
    save_checkpoint([ms.Parameter(ms.Tensor(array), name=name)], tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=rf"x\.ckpt: {fault}, with which nothing can be computed; give another file$"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(("name", "array", "fault"), NO_NUMBERS + ONLY_TORCH, ids=str)
def test_such_numbers_in_a_file_of_pytorch(tmp_path, name, array, fault):
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(array)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"x\.pth: {fault}, with which nothing can be computed"):
        read_torch_file(tmp_path / "x.pth")


def test_any_kind_of_float_is_float32_and_counts_are_left_as_they_are(tmp_path):
    torch = pytest.importorskip("torch")
    numbers, state = torch.tensor([0.5, -2.0]), {"bn.num_batches_tracked": torch.tensor(7)}
    kinds = ("float16", "bfloat16", "float64", "float32")
    torch.save({kind: numbers.to(getattr(torch, kind)) for kind in kinds} | state, tmp_path / "x.pth")
    read = read_torch_file(tmp_path / "x.pth")
    assert read.pop("bn.num_batches_tracked") == 7
    rows = [ms.Parameter(ms.Tensor([0.5, -2.0], getattr(ms, kind)), name=kind) for kind in kinds]
    save_checkpoint(rows, tmp_path / "x.ckpt")
    for stored in (read, read_checkpoint(tmp_path / "x.ckpt")):
        assert {name: value.tolist() for name, value in stored.items()} == {kind: [0.5, -2.0] for kind in kinds}


def message(*parts: tuple[int, bytes | str]) -> bytes:
    """A protobuf message of these fields, all of them of variable length."""
    parts = [(number, part.encode() if isinstance(part, str) else part) for number, part in parts]
    return b"".join(bytes([number << 3 | 2, len(part)]) + part for number, part in parts)


def entry(kind: str, data: bytes, shape: bytes = b"\x01", name: str | bytes = "x") -> bytes:
    """An entry of a checkpoint without a checksum: type, content, shape (each side a byte, if below 128) and name."""
    return message((1, message((1, name), (2, message((1, shape), (2, kind), (3, data))))))


@pytest.mark.parametrize(
    "content",
    {
        "shape larger than the data": entry("Float32", bytes(4), b"\x64"),
        "shape smaller than the data": entry("Float32", bytes(8)),
        "vast shape": entry("Float32", bytes(4), b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f" * 2),
        "negative shape": entry("Float32", bytes(4), b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
        "part of a number": entry("Float32", bytes(3)),
        "many dimensions": entry("Float32", bytes(4), b"\x01" * 100),
        "type that is none": entry("Object", bytes(8)),
        "type of MindSpore's own": entry("Int4", bytes(1)),
        "no type": message((1, message((1, "x"), (2, b"")))),
        "no tensor": message((1, message((1, "x")))),
        "map": message((1, message((1, "x"), (3, message((1, b"")))))),
        "name that is no text": entry("Float32", bytes(4), name=b"\xff"),
        "name that is there twice": b"".join(entry("Float32", bytes(4), name=name) for name in "xyx"),
        "text that is none": entry("str", b"\xff\xff\xff\xff", b"\x00"),
        "part of a text": entry("str", b"abc", b"\x00"),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_what_is_false_of_itself_is_refused_and_does_not_end_the_process(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(entry("Float32", bytes(4)))
    assert read_checkpoint(tmp_path / "x.ckpt")["x"].tolist() == [0]
    (tmp_path / "x.ckpt").write_bytes(content[1])
    with pytest.raises(UserError, match=r"x\.ckpt \(\d+ bytes\) cannot be read as a MindSpore checkpoint; it is"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "record",
    [
        *("[" * 100_000, '{"resolutions":' + "[" * 800 + "]" * 800 + "}", '{"a":' * 900, "9" * 5000),
        *("NaN", "null", '"text"', ""),
        *({"classes": value} for value in ("ab", ["a", 1], [["a"]], {"a": 1}, 3)),
        {"classes": ["a", "b"], "num_classes": 3},
        {"resolutions": [[[[[[[[[[1]]]]]]]]]]},
    ],
    ids=lambda record: str(record)[:20],
)
def test_records_of_another_kind(tmp_path, record):
    text = record if isinstance(record, str) else json.dumps(record)
    rows = [{"name": p.name, "data": p} for p in Small(1).get_parameters()]
    ms.save_checkpoint(rows, str(tmp_path / "odd.ckpt"), append_dict={"record": text})
    with pytest.raises(UserError, match=r"odd\.ckpt has a damaged record of what it is \(.*; get the file again"):
        read_record(tmp_path / "odd.ckpt")


def test_a_bit_in_a_file_of_pytorch_is_noticed(tmp_path):
    """Its zip has a checksum of every entry, which PyTorch does not look at."""
    torch = pytest.importorskip("torch")
    path, values = tmp_path / "x.pth", np.random.default_rng(0).standard_normal(999).astype(np.float32)
    torch.save({"x": torch.from_numpy(values)}, path)
    whole, data = path.read_bytes(), values.tobytes()
    assert np.array_equal(read_torch_file(path)["x"], values) and whole.count(data) == 1
    for place in range(whole.index(data), whole.index(data) + len(data), 501):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert np.isfinite(torch.load(path)["x"].numpy()).all()
        with pytest.raises(
            UserError, match=r"x\.pth \(\d+ bytes\) cannot be read as a PyTorch file; it is truncated, dam"
        ):
            read_torch_file(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch will do without quantized tensors
def test_tensors_of_pytorch_that_are_not_plain(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {
        "meta": torch.empty(3, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "sparse": torch.ones(3).to_sparse(),
        "conjugate": torch.ones(3, dtype=torch.complex64).conj(),
        "one number, told to be many": torch.ones(1).expand(10**12),
    }
    for name, tensor in tensors.items():
        torch.save({name: tensor}, tmp_path / "x.pth")
        with pytest.raises(UserError, match=rf"x\.pth: {name} is no plain tensor; give a state_dict\(\) of"):
            read_torch_file(tmp_path / "x.pth")
    for state in ({1: torch.ones(1)}, {b"x": torch.ones(1)}, {("x",): torch.ones(1)}, {"x": 1}, torch.ones(1)):
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(UserError, match="holds no tensors by name; give a state_dict"):
            read_torch_file(tmp_path / "x.pth")


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """`whole` with some bytes changed, left out or put in, or cut off; or any bytes at all."""
    content = bytearray(draw(st.sampled_from([whole, whole, whole, draw(st.binary(max_size=400))])))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        count = draw(st.sampled_from([0, 0, 1, 1, 1, 2, 8, len(content)]))
        content[start : start + count] = draw(st.binary(max_size=12))
    return bytes(content)


def read_or_refused(read, path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        stored = read(path)
    except UserError as error:
        assert str(path) in str(error) and "; " in str(error)
    else:
        assert all(isinstance(name, str) for name in stored)
        numbers = [value for value in stored.values() if isinstance(value, np.ndarray)]
        assert all(np.isfinite(value.astype(np.float32)).all() for value in numbers)


EXAMPLES = settings(max_examples=3000, deadline=1000)


@pytest.mark.full
@EXAMPLES
@given(data=st.data(), checksum=st.booleans())
def test_any_bytes_are_a_checkpoint_or_refused_in_one_line(tmp_path_factory, data, checksum):
    path = tmp_path_factory.getbasetemp() / "any.ckpt"
    if not path.with_name("whole.ckpt").is_file():
        save_checkpoint(Small(1).get_parameters(), path.with_name("whole.ckpt"), {"classes": ["a"], "image_size": 32})
    whole = path.with_name("whole.ckpt").read_bytes()
    content = data.draw(damaged(whole if checksum else whole[:-17]))
    read_or_refused(read_record, path, content)
    read_or_refused(read_checkpoint, path, content)


@pytest.mark.full
@EXAMPLES
@given(data=st.data(), zipped=st.booleans())
def test_any_bytes_are_a_file_of_pytorch_or_refused_in_one_line(tmp_path_factory, data, zipped):
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.getbasetemp() / "any.pth"
    whole = path.with_name(f"whole_{zipped}.pth")
    if not whole.is_file():
        state = {name: torch.from_numpy(value) for name, value in values(Small(1)).items()}
        torch.save(state, whole, _use_new_zipfile_serialization=zipped)
    read_or_refused(read_torch_file, path, data.draw(damaged(whole.read_bytes())))
