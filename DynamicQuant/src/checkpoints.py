"""Checkpoints: this folder's own, the published one, and float ResNet-18s of this folder or of torchvision (.pth)."""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import mindspore as ms
import numpy as np

from src.config import default_resize
from src.resnet import FLOAT, HIDDEN, SMALLEST, WIDTHS, Architecture, ResNet
from utils.checkpoint import arrays, read_checkpoint, record_in, save_checkpoint, some_of
from utils.cli import UserError
from utils.kinds import STATE, kind_of
from utils.torch_file import is_torch_file, read_torch_file

PUBLISHED_BITS = (4, 3)  # target and number of them in the published checkpoint, which does not tell
TORCH_WORDS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
CONTROLLER = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
CLASSIFIER = ("fc.weight", "fc.bias")
# The published checkpoint holds them, and its network does not use them.
UNUSED = re.compile(r".*\.quan_[aw]\.quantize2?\.scale|layer[2-4]\.\d+\.conv[12]\.bias")


def save(network: ResNet, path: str | Path, architecture: Architecture, record: Mapping = {}) -> None:
    """Write the parameters, what they are of, and what else is known, to `path`, whole or not at all."""
    save_checkpoint(network.get_parameters(), path, asdict(architecture) | record)


def describe(path: str | Path) -> tuple[Architecture, dict]:
    """What network the checkpoint `path` is of, and all that it tells: that, `resize_size` and perhaps `classes`.

    Raises:
        UserError: unreadable, or of another network.
    """
    return _describe(path, *_read(path))


def load(network: ResNet, architecture: Architecture, path: str | Path, finetune: bool = False) -> list[str]:
    """Load the parameters of `network`, which is of `architecture`, from the checkpoint `path`.

    A float checkpoint leaves the controller and PACT's maxima as they are, `finetune` the classifier.

    Returns:
        the parameters that were left out.

    Raises:
        UserError: unreadable, or a missing, surplus or misshapen parameter.
    """
    stored, record = _read(path)
    own, _ = _describe(path, stored, record)
    wanted = {parameter.name: parameter for parameter in network.get_parameters()}
    may_lack = set(CLASSIFIER) if finetune else set()
    same = (own.quant, own.bits, own.decisions) == (
        architecture.quant,
        architecture.bits,
        architecture.decisions,
    )
    if own.quant == FLOAT and architecture.quant != FLOAT:
        may_lack |= {name for name in wanted if name in CONTROLLER or name.endswith(".alpha")}
    elif own.quant != architecture.quant:
        raise UserError(
            f"{path} is quantized with {own.quant}, the network {architecture.quant}; "
            + (f"set --quant {own.quant}" if architecture.quant != FLOAT else "start from a float checkpoint")
        )
    elif not same:
        # Fixed bits, other bits or other decisions: the weights and their statistics are of use all the same.
        may_lack |= set(CONTROLLER)
        stored = {name: value for name, value in stored.items() if name not in CONTROLLER}
    elif own.image_size // SMALLEST != architecture.image_size // SMALLEST:
        may_lack |= {name for name in wanted if name in CONTROLLER}
        stored = {name: value for name, value in stored.items() if name not in CONTROLLER}
    classes = stored[CLASSIFIER[1]].size
    if not finetune and classes != architecture.num_classes:
        raise UserError(
            f"{path} has {classes} classes, the network {architecture.num_classes}; set --num_classes {classes}, or "
            "--finetune to start with a new classifier"
        )
    if finetune:
        stored = {name: value for name, value in stored.items() if name not in CLASSIFIER}
    missing = [name for name in wanted if name not in stored and name not in may_lack]
    surplus = [name for name in stored if name not in wanted]
    if missing or surplus:
        parts = ", ".join(filter(None, [some_of("missing", missing), some_of("surplus", surplus)]))
        raise UserError(f"{path} does not hold the parameters of {_title(architecture)} ({parts}); get the whole file")
    for name, value in stored.items():
        if value.shape != wanted[name].shape:
            raise UserError(
                f"{path}: {name} is {value.shape} in the file and {wanted[name].shape} in {_title(architecture)}; "
                "get the file of the same network"
            )
    for name, value in stored.items():
        wanted[name].set_data(ms.Tensor(value.astype(np.float32)))
    return [name for name in wanted if name not in stored]


def _read(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """The parameters that count, under this folder's names, and the record beside them."""
    if is_torch_file(path):
        stored, record = from_torch(read_torch_file(path)), {}
    else:
        content = read_checkpoint(path)
        record = record_in(content, path)
        stored = arrays(content)
    if (kind := kind_of(stored)) == STATE:
        raise UserError(f"{path} looks like {kind}; give the best checkpoint beside it")
    if not {"conv1.weight", "layer4.0.conv2.weight", *CLASSIFIER} <= set(stored) or "layer1.0.conv3.weight" in stored:
        raise UserError(f"{path} looks like {kind}, not a whole ResNet-18; give the file of one")
    return {name: value for name, value in stored.items() if not UNUSED.fullmatch(name)}, record


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters under this folder's names from torchvision's: those of a BN have other names here."""
    parameters = {}
    for name, value in state.items():
        layer, _, word = name.rpartition(".")
        if f"{layer}.running_mean" in state:
            if word == "num_batches_tracked":
                continue
            name = f"{layer}.{TORCH_WORDS.get(word, word)}"
        parameters[name] = value
    return parameters


def _describe(path: str | Path, stored: Mapping[str, np.ndarray], record: Mapping) -> tuple[Architecture, dict]:
    if not record:
        architecture = _undescribed(path, stored)
    else:
        kinds = {field.name: type(field.default) for field in fields(Architecture)}
        try:
            if wrong := [name for name, kind in kinds.items() if type(record[name]) is not kind]:
                raise TypeError(f"its {wrong[0]} is none")
            architecture = Architecture(**{name: record[name] for name in kinds})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} tells of a network that this version does not know ({error}); give one of its train.py"
            ) from error
    return architecture, asdict(architecture) | {"resize_size": default_resize(architecture.image_size)} | record


def _undescribed(path: str | Path, stored: Mapping[str, np.ndarray]) -> Architecture:
    """The network of a file without a record: a float one, or the published one."""
    num_classes = stored[CLASSIFIER[1]].size
    if "fc1.weight" not in stored:
        return Architecture(FLOAT, num_classes=num_classes)
    inputs, outputs = stored["fc1.weight"].size // HIDDEN, stored.get("fc2.bias", np.empty(0)).size
    side = round((inputs / WIDTHS[0]) ** 0.5)
    target, num_bits = PUBLISHED_BITS
    if stored["fc1.weight"].shape != (HIDDEN, WIDTHS[0] * side * side) or outputs != num_bits:
        raise UserError(
            f"{path} tells nothing about its network, and its controller of {inputs} inputs and {outputs} outputs is "
            "not the published one; give a checkpoint of train.py"
        )
    return Architecture("dorefa", target, num_bits, "image", num_classes, side * SMALLEST)


def _title(architecture: Architecture) -> str:
    return "a float ResNet-18" if architecture.quant == FLOAT else "a quantized ResNet-18"
