"""Export of a network to a file that is proved to compute the same, and its way back."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Tensor

from utils.checkpoint import check_told
from utils.cli import UserError, check_writable, read_json, whole_file
from utils.download import file_sha256

FORMATS = ("MINDIR", "AIR")
# Of the largest output: the exported graph may fuse operators that the live network runs one by one.
MAX_DIFFERENCE = 1e-4


@contextlib.contextmanager
def no_stderr() -> Iterator[None]:
    """Keep what MindSpore's C++ side reports on stderr, besides raising, off the terminal."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def load_mindir(path: str | Path) -> nn.GraphCell:
    """The network in a MINDIR file; UserError if it is not readable as one."""
    try:
        with no_stderr():
            return nn.GraphCell(ms.load(str(path)))
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a MINDIR file; truncated or damaged, export it again") from error


def read_manifest(path: Path, models: Iterable[str], read: Callable[[dict], dict]) -> tuple[dict, int]:
    """What the manifest beside the exported MINDIR file `path` tells; `read` takes the model's own settings from it.

    Returns settings by their names, with `classes`, the class names or None, and the batch size, 0 for any. UserError
    if one of the files is missing, or damaged, or of another export, or the network is none of `models`.
    """
    file = path.with_suffix(".json")
    for needed in (path, file):
        if not os.path.isfile(needed):
            raise UserError(f"no file {needed}; export.py writes a .mindir file and its .json side by side")
    manifest = read_json(file, "export the network again")
    try:
        if isinstance(model := manifest["model"], str) and model not in models:
            raise UserError(f"{file} is of {model}, not of {' or '.join(models)}; give an export of this folder")
        told = {"num_classes": manifest["num_classes"], "classes": manifest["class_names"]} | read(manifest)
        check_told(told)
        kind, digest, batch_size = manifest["format"], manifest["sha256"], manifest["input"]["shape"][0]
        if not isinstance(model, str) or kind not in FORMATS or type(batch_size) is not int or batch_size < 0:
            raise ValueError("values of another kind")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{file} is not a manifest of export.py; export the network again") from error
    if kind != "MINDIR":
        raise UserError(f"{file} is of a later export, to {kind}; export {path.name} again, with its own --file_name")
    if digest != file_sha256(path):
        raise UserError(f"{path} is damaged or not the file that {file} was written for; export the network again")
    return told, batch_size


@contextlib.contextmanager
def whole_export(manifest: Path) -> Iterator[Path]:
    """Yield a folder for the files of an export, which take their places beside `manifest`, the last, if all goes well.

    So a manifest never lies beside files that are not its own. UserError if they cannot be written.
    """
    check_writable(manifest.parent)
    with tempfile.TemporaryDirectory(prefix=".export_", dir=manifest.parent) as folder:
        yield Path(folder)
        try:
            manifest.unlink(missing_ok=True)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == manifest.name):
                file.replace(manifest.with_name(file.name))
        except OSError as error:
            raise UserError(f"cannot write to {manifest.parent}: {error.strerror}; choose another place") from error


def check_format(file_format: str, device: str, batch_size: int) -> None:
    """UserError if `device` cannot export `file_format` for `batch_size` images, 0 for any number."""
    if file_format == "AIR" and device != "Ascend":
        raise UserError("AIR files can be exported on Ascend only; use --file_format MINDIR here")
    if file_format == "AIR" and not batch_size:
        raise UserError("an AIR file has a fixed batch size; set --batch_size to 1 or more")


def export(cell: nn.Cell, shape: list[int | None], path: Path, file_format: str, live: nn.Cell | None = None) -> dict:
    """Write `cell`, which takes float32 of `shape` (None: any number), as `path` with the ending of `file_format`.

    A MINDIR file is loaded again and its output compared with that of `live` (default: `cell`) before it gets its name;
    UserError if it computes something else, or nothing. Returns what a manifest tells of it: its name and its SHA-256.
    """
    name = path.with_suffix(f".{file_format.lower()}")
    images = np.random.default_rng(0).standard_normal((shape[0] or 2, *shape[1:])).astype(np.float32)
    with whole_file(name) as temporary, tempfile.TemporaryDirectory() as folder:
        # MindSpore refuses file names with spaces and the like, so it is given a bare one.
        here = os.getcwd()
        os.chdir(folder)
        try:
            ms.export(cell, Tensor(shape=shape, dtype=ms.float32), file_name=name.name, file_format=file_format)
            if file_format == "MINDIR":
                loaded = _arrays(nn.GraphCell(ms.load(name.name))(Tensor(images)))
        finally:
            os.chdir(here)
        if file_format == "MINDIR":
            expected = _arrays((cell if live is None else live)(Tensor(images)))
            pairs = zip(expected, loaded, strict=True)
            if not all(np.isfinite(one).all() for one in expected):
                raise UserError(f"{name.name} would compute numbers that are not finite; export other weights")
            difference = max(np.abs(one - two).max() if one.shape == two.shape else np.inf for one, two in pairs)
            if not difference <= MAX_DIFFERENCE * max(1.0, *(float(np.abs(one).max()) for one in expected)):
                raise UserError(f"{name.name} computes something else (by {difference:.2g}) and is not written")
            print(f"{name.name}: differs from the live network by at most {difference:.1e}", flush=True)
        shutil.copyfile(Path(folder) / name.name, temporary)
    return {"file": name.name, "sha256": file_sha256(name)}


def _arrays(output: Tensor | tuple[Tensor, ...]) -> list[np.ndarray]:
    """The outputs of a cell that has one or several."""
    return [tensor.asnumpy() for tensor in (output if isinstance(output, tuple) else (output,))]
