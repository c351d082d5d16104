"""Checkpoints of the four networks: recognised by what is in them, loaded strictly into either form.

Kinds, as `describe` names them:
- "torch": the authors' PyTorch file, with BNs;
- "unfused", "fused": this project's own .ckpt, with BNs and without. Its record says so: other ResNeSts have the same
  names and shapes, and pad their poolings otherwise, which no parameter shows (mindcv's);
- "mindconverter": a .ckpt of MindConverter. It is of the fused form, under names that MindConverter invents anew in
  every release, so that only order and shapes tell which layer is which.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mindspore.nn as nn
import numpy as np
from mindspore import Tensor

from src import resnest50, resnest101, resnest200, resnest269
from src.resnest import BN_PARAMETERS, ResNeSt, bn_behind, fuse, unfuse
from utils.checkpoint import arrays, read_checkpoint, record_in, save_checkpoint, some_of
from utils.cli import UserError
from utils.kinds import STATE, kind_of
from utils.torch_file import is_torch_file, read_torch_file


class Backbone(NamedTuple):
    """One of the four networks; images are resized to `resize` pixels square, of which the centre of `size` is cut."""

    constructor: Callable[..., ResNeSt]
    size: int
    resize: int


_MODULES = {module.__name__.rpartition(".")[2]: module for module in (resnest50, resnest101, resnest200, resnest269)}
BACKBONES = {name: Backbone(getattr(m, name), m.INPUT_SIZE, m.RESIZE) for name, m in _MODULES.items()}
BLOCKS = {name: module.BLOCKS for name, module in _MODULES.items()}
# Layers with weights: five in each block, a shortcut's in four of them, three in the stem, and the dense one.
DEPTHS = {name: 5 * sum(blocks) + 8 for name, blocks in BLOCKS.items()}
HEAD = ("fc.weight", "fc.bias")
TORCH_WORDS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}

State = Mapping[str, np.ndarray]
Layers = Sequence[tuple[np.ndarray, np.ndarray]]


def load(network: ResNeSt, path: str | Path, finetune: bool = False) -> list[str]:
    """Load every parameter of `network` from a file of any kind; with `finetune` the head keeps its values.

    Returns:
        the parameters that were left out.

    Raises:
        UserError: unreadable file, another backbone or number of classes, or a missing, surplus or misshapen parameter.
    """
    kind, stored, _ = _read(path)
    theirs, ours = _backbone(kind, stored), _named(network.blocks)
    if theirs != ours:
        raise UserError(f"{path} is of a {title(theirs)}, not of a {title(ours)}; set --backbone {theirs}")
    left_out = HEAD if finetune else ()
    if kind == "mindconverter":
        try:
            parameters = from_layers(_pairs(stored), theirs)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        fused = True
    else:
        parameters, fused = (from_torch(stored) if kind == "torch" else stored), kind == "fused"
    classes = parameters[HEAD[0]].shape[0] if parameters.get(HEAD[0], np.empty(0)).ndim == 2 else network.num_classes
    if classes != network.num_classes and not finetune:
        raise UserError(
            f"{path} has {classes} classes, the network {network.num_classes}; set --num_classes {classes}, or, in "
            "training, --finetune to start with a new head"
        )
    parameters = {name: value for name, value in parameters.items() if name not in left_out}
    wanted = {name: shape for name, shape in _shapes(network, fused).items() if name not in left_out}
    _compare(parameters, wanted, path, f"a {title(ours)}")
    if fused != network.fused:
        parameters = (unfuse if fused else fuse)(parameters)
    fill(network, parameters)
    return list(left_out)


def fill(network: ResNeSt, parameters: State) -> None:
    """Set the parameters of `network` that `parameters` names to its values."""
    for parameter in network.get_parameters():
        if parameter.name in parameters:
            parameter.set_data(Tensor(parameters[parameter.name].astype(np.float32)))


def save(network: ResNeSt, path: str | Path, record: Mapping = {}) -> None:
    """Write the parameters, and what is known of the network besides its backbone and number of classes, to `path`."""
    known = {"backbone": _named(network.blocks), "num_classes": network.num_classes}
    save_checkpoint(network.get_parameters(), path, known | record)


def record_of(path: str | Path) -> dict:
    """What the checkpoint `path` tells: its backbone and number of classes, and what training recorded besides.

    Raises:
        UserError: unreadable, or not of a ResNeSt.
    """
    kind, stored, record = _read(path)
    return record | {"backbone": _backbone(kind, stored), "num_classes": _classes(kind, stored, path)}


def describe(path: str | Path) -> tuple[str, str, int]:
    """Kind, backbone and number of classes of the checkpoint `path`.

    Raises:
        UserError: unreadable, or not of a ResNeSt.
    """
    kind, stored, _ = _read(path)
    return kind, _backbone(kind, stored), _classes(kind, stored, path)


def from_torch(state: State) -> dict[str, np.ndarray]:
    """Parameters of the form with BNs from the authors' `state_dict()`: BN parameters have other names here."""
    parameters = {}
    for name, value in state.items():
        layer, _, word = name.rpartition(".")
        if word == "num_batches_tracked":
            continue
        if f"{layer}.running_mean" in state:
            name = f"{layer}.{TORCH_WORDS.get(word, word)}"
        parameters[name] = value
    return parameters


def from_layers(layers: Layers, backbone: str) -> dict[str, np.ndarray]:
    """Parameters of the fused form from weight and bias of each convolution and of the dense layer, in order.

    The order is that of execution, but the shortcut's convolution may stand anywhere among those of its block: nothing
    makes it wait for the others, and what PyTorch runs last MindConverter 1.7.0 stores in second place. Shapes tell
    which it is, but for the first block of ResNeSt-50, whose `conv3` has the same shape; the latter cannot run before
    `conv2.fc2` has, and where both come after it, PyTorch's order holds, `conv3` first.

    Raises:
        UserError: another number of layers, or shapes in any other order.
    """
    layers = list(layers)
    classes = len(layers[-1][0]) if layers else 0
    wanted = _layers(BACKBONES[backbone].constructor(num_classes=max(classes, 1), fused=True))
    what = title(backbone)
    if len(layers) != len(wanted):
        raise UserError(f"{len(layers)} layers instead of the {len(wanted)} of a {what}; get the whole file of one")
    parameters = {}
    names = list(wanted)
    while names:
        block = names[0].rpartition("conv1")[0] if names[0].endswith(".conv1") else names[0]
        group = [name for name in names if name.startswith(block)]
        *others, last = group
        # `last` is the shortcut's convolution, if there is one; the others keep their order.
        places = range(len(others), -1, -1) if last.endswith("downsample.1") else [len(others)]
        for place in places:
            order = [*others[:place], last, *others[place:]]
            if all(weight.shape == wanted[name] for (weight, _), name in zip(layers, order)):
                break
        else:
            first = next(i for i, name in enumerate(group) if layers[i][0].shape != wanted[name])
            raise UserError(
                f"layer {len(wanted) - len(names) + first + 1} of {len(wanted)} does not fit a {what} in execution "
                f"order: {layers[first][0].shape} instead of the {wanted[group[first]]} of {group[first]}; get the "
                "whole file of one"
            )
        for name, (weight, bias) in zip(order, layers):
            parameters |= {f"{name}.weight": weight, f"{name}.bias": bias}
        layers, names = layers[len(group) :], names[len(group) :]
    return {f"{name}.{word}": parameters[f"{name}.{word}"] for name in wanted for word in ("weight", "bias")}


def layer_names(network: ResNeSt) -> list[str]:
    """Names of the convolutions and the dense layer in the order in which the network runs them."""
    return list(_layers(network))


def _layers(network: ResNeSt) -> dict[str, tuple[int, ...]]:
    """Shape of the weight of each convolution and dense layer; the cells are defined in the order of execution."""
    cells = network.cells_and_names()
    return {name: cell.weight.shape for name, cell in cells if isinstance(cell, nn.Conv2d | nn.Dense)}


def _shapes(network: ResNeSt, fused: bool) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter that `network` has in the form `fused`, whatever form it is in."""
    shapes = {}
    for layer, shape in _layers(network).items():
        behind = bn_behind(layer)
        shapes[f"{layer}.weight"] = shape
        if fused or not behind or layer.endswith(".fc1"):
            shapes[f"{layer}.bias"] = shape[:1]
        if behind and not fused:
            shapes |= {f"{behind}.{word}": shape[:1] for word in BN_PARAMETERS}
    return shapes


def _read(path: str | Path) -> tuple[str, dict[str, np.ndarray], dict]:
    """Kind, arrays under the file's own names, and record of the checkpoint `path`."""
    if is_torch_file(path):
        stored, record = read_torch_file(path), {}
    else:
        content = read_checkpoint(path)
        stored, record = arrays(content), record_in(content, path)
    kind = _kind(set(stored))
    if kind.startswith("a") or (kind == "mindconverter" and not _is_chain(stored)):
        what = kind if kind.startswith("a") else "another network"
        raise UserError(f"{path} looks like {what}, not a ResNeSt; give the file of a ResNeSt")
    blocks = _blocks(stored)
    if all(blocks) and blocks not in BLOCKS.values():
        what = f"a ResNeSt-{3 * sum(blocks) + 2}, with {' '.join(map(str, blocks))} blocks in its stages"
        raise UserError(f"{path} is of {what}; give the whole file of a {', '.join(map(title, BLOCKS))}")
    if kind in ("unfused", "fused") and not is_torch_file(path) and record.get("backbone") not in list(BACKBONES):
        raise UserError(
            f"{path} has the parameters of a ResNeSt and no record that it is one of this folder's; others, such as "
            "mindcv's, have the same names, pad otherwise and would compute something else here; convert the authors' "
            ".pth with convert.py, or see Checkpoints in README.md"
        )
    return kind, stored, record


def _kind(names: set[str]) -> str:
    """The kind of file that has these parameter names, or what else it is, in words that begin with "a"."""
    words = {name.rpartition(".")[2] for name in names}
    if (kind := kind_of(names)) == STATE:
        return kind
    if any(re.fullmatch(r"layer[1-4]\.\d+\.conv2\.(conv|fc1|fc2)\.weight", name) for name in names):
        if "running_mean" in words:
            return "torch"
        return "unfused" if words & set(BN_PARAMETERS) else "fused"
    return "mindconverter" if names and words == {"weight", "bias"} else kind


def _is_chain(stored: State) -> bool:
    """Whether these are layers, of which the first is of a ResNeSt's stem and a dense one is the last."""
    pairs = list(_pairs(stored))
    shapes = [weight.shape for weight, _ in pairs]
    return (
        len(pairs) > 0.9 * min(DEPTHS.values()) and shapes[0] in ((32, 3, 3, 3), (64, 3, 3, 3)) and len(shapes[-1]) == 2
    )


def _pairs(stored: State) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight and bias of the layers of a MindConverter file in the order of the file."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in stored)
    empty = np.empty(0, np.float32)
    return [(stored.get(f"{layer}.weight", empty), stored.get(f"{layer}.bias", empty)) for layer in layers]


def _blocks(stored: State) -> tuple[int, ...]:
    """Number of blocks in each stage, by the names of the parameters."""
    found = {m.groups() for m in (re.match(r"layer([1-4])\.(\d+)\.", name) for name in stored) if m}
    return tuple(sum(stage == number for number, _ in found) for stage in "1234")


def _backbone(kind: str, stored: State) -> str:
    """The backbone that a file is of, or comes nearest to, by the number of its blocks, or of its layers."""
    if kind == "mindconverter":
        return min(DEPTHS, key=lambda name: abs(DEPTHS[name] - len(_pairs(stored))))
    blocks = _blocks(stored)
    return min(BLOCKS, key=lambda name: sum(abs(a - b) for a, b in zip(BLOCKS[name], blocks)))


def _classes(kind: str, stored: State, path: str | Path) -> int:
    """Number of classes of the file `path`; UserError if it has no classifier."""
    head = stored.get(HEAD[0]) if kind != "mindconverter" else _pairs(stored)[-1][0]
    if head is None or not head.ndim or not len(head):
        raise UserError(f"{path} has no {HEAD[0]}, so the number of classes is unknown; get the whole file")
    return head.shape[0]


def _named(blocks: tuple[int, ...]) -> str:
    return next(name for name, own in BLOCKS.items() if own == tuple(blocks))


def title(backbone: str) -> str:
    """The backbone's name as the paper writes it."""
    return backbone.replace("resnest", "ResNeSt-")


def _compare(parameters: State, wanted: Mapping[str, tuple[int, ...]], path: str | Path, what: str) -> None:
    """Raise a UserError unless `parameters` are exactly those of `wanted`, in name and shape."""
    missing = [name for name in wanted if name not in parameters]
    surplus = [name for name in parameters if name not in wanted]
    if missing or surplus:
        parts = ", ".join(filter(None, [some_of("missing", missing), some_of("surplus", surplus)]))
        raise UserError(f"{path} does not hold the parameters of {what} ({parts}); get the whole file of one")
    misshapen = [name for name, shape in wanted.items() if parameters[name].shape != shape]
    if misshapen:
        name = misshapen[0]
        raise UserError(
            f"{path}: {some_of('of another shape', misshapen)}; {name} is {parameters[name].shape} in the file and "
            f"{wanted[name]} in {what}; get the whole file of one"
        )
