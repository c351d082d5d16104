"""Interfaces for training and evaluation: the network, its precision, its checkpoints."""

import argparse

import mindspore.nn as nn

from src.models.ddrnet import DDRNet23
from src.tools.cell import cast_amp
from utils.checkpoint import arrays, load_strictly, read_checkpoint, record_in
from utils.cli import UserError
from utils.kinds import DDRNET, kind_of

HEAD = ("linear.weight", "linear.bias")


def get_network(args: argparse.Namespace, drop_path_rate: float = 0.0) -> DDRNet23:
    """DDRNet-23 as the settings want it, in float32."""
    return DDRNet23(args.num_classes, drop_path_rate)


def set_precision(network: nn.Cell, args: argparse.Namespace, device: str) -> None:
    """Apply `amp_level`; on CPU only if it stood on the command line, because float16 is slower there."""
    level = args.amp_level
    if device == "CPU" and level != "O0" and "amp_level" not in args.given:
        print(f"amp_level O0 instead of {level}, which is slower on a CPU; --amp_level {level} insists", flush=True)
        args.amp_level = "O0"
    cast_amp(network, args.amp_level, args.keep_bn_fp32)


def load_network(network: DDRNet23, path: str, finetune: bool = False) -> list[str]:
    """Load every parameter of `network` from `path`; with `finetune` the head keeps its values.

    Returns:
        the parameters that were left out.

    Raises:
        UserError: unreadable file, or a missing, surplus or misshapen parameter.
    """
    left_out = HEAD if finetune else ()
    return load_strictly(network.get_parameters(), path, DDRNET, kind_of, left_out=left_out)


def record_of(path: str) -> dict:
    """What the checkpoint `path` tells: its number of classes, and what training recorded besides.

    Raises:
        UserError: unreadable, or not of a DDRNet-23.
    """
    content = read_checkpoint(path)
    stored = arrays(content)
    if kind_of(set(stored)) != DDRNET:
        raise UserError(f"{path} looks like {kind_of(set(stored))}; give the file of {DDRNET}")
    return record_in(content, path) | ({"num_classes": stored[HEAD[1]].size} if HEAD[1] in stored else {})
