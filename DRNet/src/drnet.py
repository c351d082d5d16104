"""DRNet put together: predictor and classifier behind their resizes, their cost, and their checkpoint files."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Tensor, ops

from src.classifier import SHORTCUT_BN, ResNet
from src.layers import Resize
from src.predictor import predictor
from utils.checkpoint import arrays, load_strictly, read_checkpoint, read_record, record_in, save_checkpoint
from utils.cli import UserError
from utils.kinds import DRNET_CLASSIFIER, DRNET_PREDICTOR, kind_of

PREDICTOR, CLASSIFIER = "predictor.", "classifier."


@dataclass(frozen=True)
class Architecture:
    """What the weights of a DRNet were made for.

    resolutions: candidate resolutions in pixels, the largest first; position j uses BN set j.
    predictor_size, image_size: pixels of the predictor's input and of the images given to both networks.
    shortcut_bn: BN set of the projection shortcuts, "published" (set 0 everywhere) or "per_resolution".
    layers: number of bottlenecks in each of the classifier's four stages.
    """

    resolutions: tuple[int, ...]
    predictor_size: int
    image_size: int
    num_classes: int
    shortcut_bn: str
    layers: tuple[int, ...] = (3, 4, 6, 3)


class Predict(nn.Cell):
    """Resize and predictor: images float32 (N, 3, S, S) to scores float32 (N, R)."""

    def __init__(self, network: nn.Cell, architecture: Architecture):
        super().__init__(auto_prefix=False)
        self.network = network
        self.resize = Resize(architecture.predictor_size)
        self.same_size = architecture.predictor_size == architecture.image_size

    def construct(self, images: Tensor) -> Tensor:
        if not self.same_size:
            images = self.resize(images)
        return self.network(images)


class Classify(nn.Cell):
    """Resize and classifier for one candidate: images float32 (N, 3, S, S) to logits float32 (N, K)."""

    def __init__(self, network: nn.Cell, architecture: Architecture, index: int):
        super().__init__(auto_prefix=False)
        self.network = network
        self.index = index
        size = architecture.resolutions[index]
        self.resize = Resize(size)
        self.same_size = size == architecture.image_size

    def construct(self, images: Tensor) -> Tensor:
        if not self.same_size:
            images = self.resize(images)
        return self.network(images, self.index)


class DRNet(nn.Cell):
    """The two networks behind their resizes: each image is classified once, at the resolution predicted for it.

    In memory the parameters of the two are named apart, by "predictor." and "classifier."; files hold the plain names.

    Attributes:
        predictor, classifier: the networks. predict: a `Predict`; classify[j]: the `Classify` of candidate j.

    Inputs:
        images: float32 (N, 3, S, S), S being the architecture's `image_size`.

    Outputs:
        logits float32 (N, K) and choices int (N,), the candidate of each image.
    """

    def __init__(self, architecture: Architecture):
        super().__init__(auto_prefix=False)
        candidates = len(architecture.resolutions)
        self.architecture = architecture
        self.predictor = predictor(candidates)
        self.classifier = ResNet(
            architecture.layers, architecture.num_classes, candidates, shortcut_bn=architecture.shortcut_bn
        )
        self.predictor.update_parameters_name(PREDICTOR)
        self.classifier.update_parameters_name(CLASSIFIER)
        self.predict = Predict(self.predictor, architecture)
        self.classify = nn.CellList(
            [Classify(self.classifier, architecture, index) for index in range(candidates)], auto_prefix=False
        )
        self.num_classes = architecture.num_classes
        self.set_train(False)

    def construct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        choices = self.predict(images).argmax(1)
        logits = ops.zeros((images.shape[0], self.num_classes), images.dtype)
        for index, classify in enumerate(self.classify):
            rows = ops.nonzero(choices == index).reshape((-1,))
            own = classify(ops.gather(images, rows, 0))
            logits = ops.tensor_scatter_update(logits, rows.expand_dims(1), own)
        return logits, choices

    def gmacs(self) -> tuple[float, list[float]]:
        """Cost of one image in GMACs: the predictor's, and the classifier's at every candidate (C_j of section 3.4)."""
        return count_gmacs(self.predict, self.architecture.image_size), [
            count_gmacs(cell, self.architecture.image_size) for cell in self.classify
        ]


def count_gmacs(cell: nn.Cell, size: int) -> float:
    """Multiply-accumulates in units of 1e9 that the convolutions and dense layers of `cell` do for one image.

    Counted by running the cell once on a (1, 3, size, size) image, from the shapes that each layer really gets.
    """
    macs = 0

    def count(layer, inputs, output):
        nonlocal macs
        macs += int(np.prod(output.shape)) * int(np.prod(layer.weight.shape[1:]))

    mode, training = ms.get_context("mode"), cell.training
    ms.set_context(mode=ms.PYNATIVE_MODE)
    cell.set_train(False)
    layers = [layer for _, layer in cell.cells_and_names() if isinstance(layer, nn.Conv2d | nn.Dense)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        cell(Tensor(np.zeros((1, 3, size, size), np.float32)))
    finally:
        for hook in hooks:
            hook.remove()
        cell.set_train(training)
        ms.set_context(mode=mode)
    return macs / 1e9


def record_of(path: str | Path) -> dict:
    """What the classifier checkpoint `path` tells: the fields of `Architecture`, and what training recorded besides.

    The published checkpoint, which has no record, tells its number of classes and of blocks, and its kind of shortcuts.

    Raises:
        UserError: unreadable, or no classifier of a DRNet.
    """
    content = read_checkpoint(path)
    stored = arrays(content)
    if kind_of(set(stored)) != DRNET_CLASSIFIER:
        raise UserError(f"{path} looks like {kind_of(set(stored))}; give the file of {DRNET_CLASSIFIER}")
    blocks = [len({name.split(".")[1] for name in stored if name.startswith(f"layer{k}.")}) for k in (1, 2, 3, 4)]
    told = {"shortcut_bn": "published"} | record_in(content, path) | {"layers": blocks}
    if told["shortcut_bn"] not in SHORTCUT_BN:
        raise UserError(f"{path} tells no usable shortcut_bn, {' or '.join(SHORTCUT_BN)}; give another file")
    if "end_point.bias" in stored:
        told["num_classes"] = stored["end_point.bias"].size
    return told


def architecture_of(args: argparse.Namespace, told: Mapping = {}) -> Architecture:
    """What the settings describe, and what a checkpoint tells that is no setting."""
    values = {field.name: getattr(args, field.name, told.get(field.name)) for field in fields(Architecture)}
    return Architecture(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def load_classifier(drnet: DRNet, path: str | Path, finetune: bool = False) -> list[str]:
    """Fill the classifier from its file, strictly; `finetune` keeps its own last layer.

    Returns:
        The names of the parameters that were left out.

    Raises:
        UserError: the file is missing, unreadable, of another network or for another number of classes or resolutions.
    """
    left_out = ("end_point.weight", "end_point.bias") if finetune else ()
    return load_strictly(
        drnet.classifier.get_parameters(),
        path,
        DRNET_CLASSIFIER,
        kind_of,
        {"end_point.weight": "set --num_classes to the file's, or train with --finetune for other classes"},
        left_out=left_out,
        prefix=CLASSIFIER,
    )


def load_predictor(drnet: DRNet, path: str | Path) -> None:
    """Fill the predictor from its file, strictly.

    Raises:
        UserError: as `load_classifier`; also a predictor that was trained for other sizes.
    """
    told, architecture = read_record(path), asdict(drnet.architecture)
    for key in ("resolutions", "predictor_size", "image_size"):
        if key in told and told[key] != json.loads(json.dumps(architecture[key])):
            raise UserError(
                f"{path} was trained with {key} {told[key]}, the classifier with {architecture[key]}; give the "
                "predictor of the same training"
            )
    load_strictly(
        drnet.predictor.get_parameters(),
        path,
        DRNET_PREDICTOR,
        kind_of,
        {"end_point.weight": "it has another number of candidates; set --resolutions to the file's"},
        prefix=PREDICTOR,
    )


def save_networks(drnet: DRNet, folder: Path, record: Mapping, with_predictor: bool) -> None:
    """Write `classifier_net.ckpt` and, `with_predictor`, `predictor_net.ckpt` into `folder`.

    Both record the architecture and, besides, `record`.
    """
    record = asdict(drnet.architecture) | record
    save_checkpoint(drnet.classifier.get_parameters(), folder / "classifier_net.ckpt", record, CLASSIFIER)
    if with_predictor:
        save_checkpoint(drnet.predictor.get_parameters(), folder / "predictor_net.ckpt", record, PREDICTOR)
