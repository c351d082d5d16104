"""Checkpoint files: read with clear errors, loaded strictly, written whole."""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
import psutil

from utils.cli import UserError, whole_file

RECORD = "record"  # the text beside the parameters, in JSON
NO_MEMORY = "exceeds current available memory"  # in MindSpore's refusal of a file that is larger than what is free


def read_checkpoint(path: str | Path) -> dict:
    """The content of a MindSpore checkpoint: parameter name to Parameter, and whatever text was stored beside them.

    UserError if there is no such file, or it is not a readable checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; put the file there or name another one")
    if path.suffix != ".ckpt":
        raise UserError(f"{path} does not end in .ckpt; MindSpore reads checkpoints under that ending only")
    size = path.stat().st_size
    try:
        with _quiet():
            try:
                return ms.load_checkpoint(str(path), crc_check=True)
            except ValueError as error:
                if NO_MEMORY not in str(error):
                    raise
                # MindSpore takes the kernel's cache of files for memory in use, and on a machine that has just read a
                # data set that is nearly all of it. The cache gives up what is written to here.
                if psutil.virtual_memory().available > 2 * size:
                    np.ones(2 * size, np.uint8)
                return ms.load_checkpoint(str(path), crc_check=True)
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # MindSpore takes Ctrl-C for a damaged file
            raise error.__cause__ from None
        fault = f"not enough free memory to read {path} ({size} bytes)"
        if NO_MEMORY in str(error):
            raise UserError(f"{fault}; end other programs and try again") from error
        fault = (
            f"{path} ({size} bytes) cannot be read as a MindSpore checkpoint; it is truncated, damaged or of another"
        )
        raise UserError(f"{fault} kind, get it again ({' '.join(str(error).split())[:120]})") from error


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
        if not isinstance(record, dict):
            raise ValueError("no object")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} has a damaged record of what it is ({error}); get the file again") from error
    return record


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
    stored = {name: value for name, value in read_checkpoint(path).items() if isinstance(value, ms.Parameter)}
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
        parameter.set_data(stored[name].astype(parameter.dtype))
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
