"""PyTorch's checkpoint files, read without running any code that they may hold."""

import io
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils.checkpoint import check_values, read_weights
from utils.cli import UserError


def is_torch_file(path: str | Path) -> bool:
    """Whether a file begins as PyTorch's do, with a ZIP archive or a pickle, or at least has their ending.

    UserError if it cannot be read.
    """
    path = Path(path)
    if not os.path.isfile(path):
        return False
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a file that you may read") from error
    return start == b"PK" or start[:1] == b"\x80" or path.suffix in (".pth", ".pt")


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of the PyTorch file `path` by name, floating-point ones as float32.

    UserError if there is no such file or torch, or the file is unreadable or holds more than tensors.
    """
    content = read_weights(path)
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} is a PyTorch file, and torch, which reads it, is missing; make convert-env") from error
    try:
        if content[:2] == b"PK" and (bad := zipfile.ZipFile(io.BytesIO(content)).testzip()):
            raise ValueError(f"{bad} has another checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of a dozen kinds, depending on where the file is damaged
        # In a file that does not begin as a pickle, what torch takes for an unknown operand is no code.
        pickled = content[:1] == b"\x80" and "Unsupported operand" in str(error)
        if pickled or re.search(r"Unsupported (global|class)|Can only (build|set|create)|Trying to", str(error)):
            raise UserError(f"{path} holds pickled code and is not read; get the authors' own file") from error
        fault = f"{path} ({len(content)} bytes) cannot be read as a PyTorch file"
        raise UserError(f"{fault}; it is truncated, damaged or of another kind, get it again") from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path} holds no tensors by name; give a state_dict() saved by itself")
    arrays = {}
    for name, value in state.items():
        try:
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("its values are not all in the file")
            arrays[name] = (value.float() if value.is_floating_point() else value).detach().numpy()
        except Exception as error:  # sparse, quantized or without data: torch has a kind of error for each
            raise UserError(f"{path}: {name} is no plain tensor; give a state_dict() of the trained network") from error
    check_values(arrays, path)
    return arrays
