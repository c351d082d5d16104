"""Checkpoint files: read with clear errors, loaded strictly, written whole."""

import contextlib
import itertools
import json
import logging
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
import psutil
from google.protobuf.message import DecodeError
from mindspore.train.checkpoint_pb2 import Checkpoint

from utils.cli import UserError, read_file, whole_file

RECORD = "record"  # the text beside the parameters, in JSON
DEEPEST = 9  # levels that it may be nested; with some hundred more Python could not print it
CHECKSUM = b"crc_num"  # stands before the ten bytes of MindSpore's own, at the end of a file that has one
TYPES = {name: name.lower() for name in ("Bool", "Float16", "Float32", "Float64", "Int8", "Int16", "Int32", "Int64")}
TYPES |= {f"U{name}": f"u{kind}" for name, kind in TYPES.items() if "Int" in name} | {"BFloat16": "uint16", "str": ""}


def read_weights(path: str | Path) -> bytes:
    """The content of a file of weights; UserError if there is no such file, or not the memory for it."""
    try:
        mode, size = os.stat(path).st_mode, os.path.getsize(path)
        if not stat.S_ISREG(mode):  # a FIFO would block
            raise ValueError("it is no regular file")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"no checkpoint at {path}: {reason}; put the file there or name another one") from error
    if 2 * size > psutil.virtual_memory().available:
        raise UserError(f"not enough free memory to read {path} ({size} bytes); end other programs and try again")
    return read_file(path, "give a file that you may read")


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray | str]:
    """The content of a MindSpore checkpoint: the parameters by name, and whatever text was stored beside them.

    MindSpore's own reader takes what it is told of shapes for true and may end the process. UserError if there is no
    such file, or it is not a readable checkpoint, or nothing can be computed from its values.
    """
    content = read_weights(path)
    try:
        stored = _parse(content)
    except (DecodeError, ValueError) as error:
        fault = f"{path} ({len(content)} bytes) cannot be read as a MindSpore checkpoint; it is truncated, damaged or"
        raise UserError(f"{fault} of another kind, get it again ({' '.join(str(error).split())[:120]})") from error
    check_values(arrays(stored), path)
    return stored


def _parse(content: bytes) -> dict[str, np.ndarray | str]:
    """What `read_checkpoint` returns; ValueError or DecodeError where the bytes are no checkpoint."""
    if content[-17:-10] == CHECKSUM:
        content, checksum = content[:-17], content[-10:]
        if zlib.crc32(content) != int.from_bytes(checksum, "big"):
            raise ValueError("its checksum is another")
    stored: dict[str, np.ndarray | str] = {}
    for name, parts in itertools.groupby(Checkpoint.FromString(content).value, lambda part: part.tag):
        tensors = [part.tensor for part in parts]  # a large one comes in slices, each with the whole one's shape
        kind, shape, data = tensors[0].tensor_type, list(tensors[0].dims), b"".join(t.tensor_content for t in tensors)
        if name in stored or kind not in TYPES or min(shape, default=0) < 0:
            raise ValueError(f"{name}, of type {kind} and shape {shape}, is there twice or cannot be")
        if kind == "str":
            stored[name] = data.decode("utf-32-le").rstrip("\0")
            continue
        array = np.frombuffer(data, TYPES[kind])
        if kind == "BFloat16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        stored[name] = array.reshape([] if shape == [0] else shape)
    if not stored:
        raise ValueError("it holds nothing")
    return stored


def arrays(content: Mapping[str, np.ndarray | str]) -> dict[str, np.ndarray]:
    """What of the `content` of a checkpoint is no text."""
    return {name: value for name, value in content.items() if not isinstance(value, str)}


def check_values(stored: Mapping[str, np.ndarray], path: str | Path) -> None:
    """UserError if a network cannot compute with the parameters `stored`, which come from the file `path`.

    They must be finite floating-point numbers, variances not negative. A single integer counts something.
    """
    for name, value in stored.items():
        if value.dtype.kind in "iu" and value.size == 1:
            continue
        fault = ""
        with np.errstate(over="ignore"):
            if value.dtype.kind != "f":
                fault = f"values of type {value.dtype}"
            elif not np.isfinite(value.astype(np.float32, copy=False)).all():
                fault = "values that are not finite"
            elif name.endswith(("moving_variance", "running_var")) and (value < 0).any():
                fault = "negative variances"
        if fault:
            raise UserError(f"{path}: {name} holds {fault}, with which nothing can be computed; give another file")


def read_record(path: str | Path) -> dict:
    """What the checkpoint `path` tells about itself, as `save_checkpoint` was given it; empty where it tells nothing.

    A record holds settings by their names, such as `image_size`, and `classes`, the class names in label order.
    UserError if the file or its record is unreadable.
    """
    return record_in(read_checkpoint(path), path)


def record_in(content: Mapping, path: str | Path) -> dict:
    """The same, from the `content` that `read_checkpoint` returned for `path`."""
    try:
        record = json.loads(content.get(RECORD, "{}"))
        check_told(record)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} has a damaged record of what it is ({error}); get the file again") from error
    return record


def check_told(told: Mapping) -> None:
    """ValueError unless what a file tells is an object whose `classes`, if any, are as many texts as it has classes."""
    if not isinstance(told, Mapping):
        raise ValueError("it is no object")
    level = [told]
    for _ in range(DEEPEST):
        level = [value.values() if isinstance(value, dict) else value for value in level]
        level = [inner for values in level for inner in values if isinstance(inner, dict | list)]
    if level:
        raise ValueError("it is nested too deeply")
    names = told.get("classes")
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and not (texts and told.get("num_classes", len(names)) == len(names)):
        raise ValueError("its classes are no list of as many names")


def load_strictly(
    parameters: Iterable[ms.Parameter],
    path: str | Path,
    wanted: str,
    kind_of: Callable[[set[str]], str],
    remedies: Mapping[str, str] = {},
    left_out: Iterable[str] = (),
    prefix: str = "",
) -> list[str]:
    """Load every one of `parameters` from the checkpoint `path`; UserError if one is missing, surplus or misshapen.

    Args:
        wanted: what the file should be, in words ("a DRNet classifier").
        kind_of: says what a set of parameter names looks like, in words.
        remedies: what to do when the parameter of that name has another shape than the network's.
        left_out: parameters that keep their values, whatever the file holds under their names; they are returned.
        prefix: what the names of `parameters` have in front of those in the file; messages give the latter.
    """
    left_out = list(left_out)
    stored = arrays(read_checkpoint(path))
    parameters = {parameter.name.removeprefix(prefix): parameter for parameter in parameters}
    missing = [name for name in parameters if name not in stored and name not in left_out]
    surplus = [name for name in stored if name not in parameters]
    parameters = {name: parameter for name, parameter in parameters.items() if name in stored and name not in left_out}
    misshapen = [name for name in parameters if stored[name].shape != parameters[name].shape]
    if missing or surplus:
        odd = ", ".join(filter(None, [some_of("missing", missing), some_of("surplus", surplus)]))
        fault = f"{path} does not hold {wanted} but looks like {kind_of(set(stored))} ({odd})"
        raise UserError(f"{fault}; give the file of {wanted}")
    if misshapen:
        name = misshapen[0]
        fault = (
            f"{path}: {len(misshapen)} parameters have another shape, first {name}: {stored[name].shape} in the file"
        )
        remedy = remedies.get(name, f"give a file of {wanted} with the same settings")
        raise UserError(f"{fault}, {parameters[name].shape} in the network; {remedy}")
    for name, parameter in parameters.items():
        parameter.set_data(ms.Tensor(stored[name]).astype(parameter.dtype))
    return left_out


def some_of(word: str, names: Sequence[str]) -> str:
    """How many parameters are missing, surplus or whatever `word` says, and the first of them; "" if there are none."""
    return f"{len(names)} parameters {word}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}" if names else ""


def save_checkpoint(
    parameters: Iterable[ms.Parameter], path: str | Path, record: Mapping = {}, prefix: str = ""
) -> None:
    """Write the parameters, their names without `prefix`, and the `record` to `path`, whole or not at all.

    A checksum goes with them, so that damage is noticed when the file is read. UserError if it cannot be written.
    """
    rows = [{"name": parameter.name.removeprefix(prefix), "data": parameter} for parameter in parameters]
    texts = {RECORD: json.dumps(record)} if record else {}
    with whole_file(path) as temporary:
        try:
            with _quiet():
                ms.save_checkpoint(rows, str(temporary), append_dict=texts, crc_check=True)
        finally:
            temporary.with_suffix(".tmp").unlink(missing_ok=True)  # MindSpore's own, left when it fails


def copy_best(source: Path, target: Path) -> None:
    """Copy the best checkpoint of a resumed run to where the resuming one keeps its own; UserError if there is none."""
    if not source.is_file():
        raise UserError(f"{source}, the best checkpoint of that run, is missing; keep it beside its resume.ckpt")
    if source.resolve() != target.resolve():
        with whole_file(target) as temporary:
            shutil.copyfile(source, temporary)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep MindSpore's log lines about a failure off the terminal; the UserError tells it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
