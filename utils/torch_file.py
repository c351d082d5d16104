"""PyTorch's checkpoint files, read without running any code that they may hold."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils.cli import UserError


def is_torch_file(path: str | Path) -> bool:
    """Whether a file begins as PyTorch's do, with a ZIP archive or a pickle, or at least has their ending.

    UserError if it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
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
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; put the file there or name another one")
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} is a PyTorch file, and torch, which reads it, is missing; make convert-env") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a dozen kinds, depending on where the file is damaged
        # In a file that does not begin as a pickle, what torch takes for an unknown operand is no code.
        pickled = path.read_bytes()[:1] == b"\x80" and "Unsupported operand" in str(error)
        if pickled or re.search(r"Unsupported (global|class)|Can only (build|set|create)|Trying to", str(error)):
            raise UserError(f"{path} holds pickled code and is not read; get the authors' own file") from error
        fault = f"{path} ({path.stat().st_size} bytes) cannot be read as a PyTorch file"
        raise UserError(f"{fault}; it is truncated, damaged or of another kind, get it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds no tensors by name; give a state_dict() saved by itself")
    return {
        name: (value.float() if value.is_floating_point() else value).detach().numpy() for name, value in state.items()
    }
