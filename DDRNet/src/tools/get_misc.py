"""Interfaces for training and evaluation: network, checkpoints, training state."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import mindspore.nn as nn
from mindspore import Parameter

from src.models.ddrnet import DDRNet23
from src.tools.cell import cast_amp
from utils.checkpoint import load_strictly, read_checkpoint, save_checkpoint
from utils.cli import UserError

HEAD = ("linear.weight", "linear.bias")
# Texts in a checkpoint beside the parameters.
STATE, CLASSES = "state", "classes"


def get_network(args: argparse.Namespace, drop_path_rate: float = 0.0) -> DDRNet23:
    """DDRNet-23 as the settings want it, in float32."""
    return DDRNet23(args.num_classes, args.image_size, drop_path_rate)


def set_precision(network: nn.Cell, args: argparse.Namespace, device: str) -> None:
    """Apply `amp_level`; on CPU only if it stood on the command line, because float16 is slower there."""
    level = args.amp_level
    if device == "CPU" and level != "O0" and "amp_level" not in args.given:
        print(f"amp_level O0 instead of {level}, which is slower on a CPU; --amp_level {level} insists", flush=True)
        args.amp_level = "O0"
    cast_amp(network, args.amp_level, args.keep_bn_fp32)


def kind_of(names: set[str]) -> str:
    """What a set of parameter names looks like, in words."""
    if "compression3.0.weight" in names:
        if "learning_rate" in names:
            return "a training state (resume.ckpt, for --resume)"
        return "a DDRNet-23"
    if any(".bn_0." in name or name.startswith("end_point") for name in names):
        return "a DRNet"
    if any("Conv2d_" in name or "splat" in name or "splt" in name for name in names):
        return "a ResNeSt"
    if any("quant" in name or name.endswith(".scale") for name in names):
        return "a DynamicQuant network"
    return "another network"


def load_network(network: DDRNet23, path: str, finetune: bool = False) -> list[str]:
    """Load every parameter of `network` from `path`; with `finetune` the head keeps its values.

    Returns:
        the parameters that were left out.

    Raises:
        UserError: unreadable file, or a missing, surplus or misshapen parameter.
    """
    stored = read_checkpoint(path).get(HEAD[0])
    parameters = list(network.get_parameters())
    if finetune:
        kept = {parameter.name: parameter.value().copy() for parameter in parameters if parameter.name in HEAD}
    classes = stored.shape[0] if isinstance(stored, Parameter) else "the file's"
    remedy = f"set --num_classes {classes}, or, in training, --finetune to start with a new head"
    left_out = load_strictly(
        parameters, path, "a DDRNet-23", kind_of, dict.fromkeys(HEAD, remedy), HEAD if finetune else ()
    )
    if finetune:
        for parameter in parameters:
            if parameter.name in kept:
                parameter.set_data(kept[parameter.name])
        left_out = list(HEAD)
    return left_out


def save_network(network: DDRNet23, path: Path, classes: Sequence[str]) -> None:
    """Write the parameters and the class names, in label order, to `path`."""
    save_checkpoint(network.get_parameters(), path, {CLASSES: json.dumps(list(classes))})


def classes_of(path: str) -> list[str] | None:
    """The class names in label order that `save_network` stored in `path`; None for a file without them."""
    stored = read_checkpoint(path).get(CLASSES)
    return None if stored is None else json.loads(stored)


def read_state(path: str | Path) -> dict:
    """The "settings" and the "position" that `save_state` stored in the training state `path`.

    Raises:
        UserError: not a training state.
    """
    stored = read_checkpoint(path).get(STATE)
    if stored is None:
        raise UserError(f"{path} is no training state; --resume takes the resume.ckpt of an interrupted training")
    return json.loads(stored)


def save_state(path: Path, network: nn.Cell, optimizer: nn.Optimizer, settings: dict, position: dict) -> None:
    """Write everything that `load_state` needs to go on from here: weights, optimizer, `settings` and `position`."""
    texts = {STATE: json.dumps({"settings": settings, "position": position})}
    save_checkpoint(_everything(network, optimizer), path, texts)


def load_state(path: str | Path, network: nn.Cell, optimizer: nn.Optimizer, settings: dict) -> dict:
    """Restore what `save_state` wrote; returns the position.

    Raises:
        UserError: not a training state, or one of a run with other settings.
    """
    stored = read_state(path)
    differing = [key for key in settings if stored["settings"].get(key) != json.loads(json.dumps(settings[key]))]
    if differing:
        theirs = ", ".join(f"{key} {stored['settings'].get(key)} (now {settings[key]})" for key in differing)
        raise UserError(f"{path} is of a run with other settings: {theirs}; resume with the same, or start anew")
    load_strictly(_everything(network, optimizer), path, "this training's state", kind_of)
    return stored["position"]


def _everything(network: nn.Cell, optimizer: nn.Optimizer) -> list[Parameter]:
    return list({p.name: p for cell in (network, optimizer) for p in cell.get_parameters()}.values())
