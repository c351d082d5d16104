"""DRNet put together: predictor and classifier behind their resizes, their cost, and their checkpoint files."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Tensor

from src.classifier import resnet50
from src.layers import Resize
from src.predictor import predictor
from utils.checkpoint import load_strictly, read_checkpoint, save_checkpoint
from utils.cli import UserError

PREDICTOR, CLASSIFIER = "predictor.", "classifier."
RECORD = "drnet"


@dataclass(frozen=True)
class Architecture:
    """What the weights of a DRNet were made for.

    resolutions: candidate resolutions in pixels, the largest first; position j uses BN set j.
    predictor_size, image_size: pixels of the predictor's input and of the images given to both networks.
    shortcut_bn: BN set of the projection shortcuts, "published" (set 0 everywhere) or "per_resolution".
    """

    resolutions: tuple[int, ...]
    predictor_size: int
    image_size: int
    num_classes: int
    shortcut_bn: str


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


class DRNet:
    """The two networks, and the cells that compute with them.

    In memory the parameters of the two are named apart, by "predictor." and "classifier."; files hold the plain names.

    `predict` is a `Predict`, `classify[j]` the `Classify` of candidate j; they share their weights with `predictor`
    and `classifier`.
    """

    def __init__(self, architecture: Architecture):
        self.architecture = architecture
        self.predictor = predictor(len(architecture.resolutions))
        self.classifier = resnet50(
            architecture.num_classes, len(architecture.resolutions), shortcut_bn=architecture.shortcut_bn
        )
        self.predictor.update_parameters_name(PREDICTOR)
        self.classifier.update_parameters_name(CLASSIFIER)
        self.predict = Predict(self.predictor, architecture)
        self.classify = [
            Classify(self.classifier, architecture, index) for index in range(len(architecture.resolutions))
        ]
        self.set_train(False)

    def set_train(self, mode: bool) -> None:
        """Training or inference mode, for both networks."""
        for cell in (self.predict, *self.classify):
            cell.set_train(mode)

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


def kind_of(names: set[str]) -> str:
    """What a checkpoint with these parameter names looks like, in words for an error message."""
    if any(name.startswith(CLASSIFIER) for name in names):
        return "the training state that --resume takes"
    if "conv1.weight" in names and any(".bn_0." in name for name in names):
        return "a DRNet classifier"
    if "layer1.0.conv2.weight" in names and "end_point.weight" in names and "layer1.1.conv1.weight" not in names:
        return "a DRNet predictor"
    return "the weights of another network"


def load_classifier_record(path: str | Path) -> dict:
    """What training wrote into the classifier checkpoint `path` beside the weights; empty for the published one."""
    return json.loads(read_checkpoint(path).get(RECORD, "{}"))


def shortcut_bn_of(path: str | Path, architecture: dict) -> str:
    """The shortcut BN set of classifier checkpoint `path`, after checking its record against `architecture`.

    `architecture` holds the fields of `Architecture` but `shortcut_bn`. The published checkpoint carries no record and
    is of the kind "published".

    Raises:
        UserError: the checkpoint was trained for other sizes.
    """
    record = load_classifier_record(path)
    differing = [key for key, value in architecture.items() if key in record and _plain(record[key]) != _plain(value)]
    if differing:
        flags = " ".join(f"--{key} {_words(record[key])}" for key in differing)
        raise UserError(f"{path} was trained with other sizes; add {flags} (or the --config_path it was trained with)")
    return record.get("shortcut_bn", "published")


def _plain(value):
    return list(value) if isinstance(value, list | tuple) else value


def _words(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def load_networks(
    drnet: DRNet, classifier_ckpt: str | Path | None, predictor_ckpt: str | Path | None, new_head: bool = False
) -> list[str]:
    """Fill the networks from their files, strictly; None leaves one as it is.

    Args:
        new_head: keep the classifier's own last layer.

    Returns:
        The names of the parameters that were left out.

    Raises:
        UserError: a file is missing, unreadable, of another network or for another number of classes or resolutions.
    """
    head = ("end_point.weight", "end_point.bias")
    left_out = []
    if classifier_ckpt is not None:
        left_out = load_strictly(
            drnet.classifier.get_parameters(),
            classifier_ckpt,
            "a DRNet classifier",
            kind_of,
            {"end_point.weight": "set --num_classes to the file's, or train with --new_head for other classes"},
            optional=head if new_head else (),
            prefix=CLASSIFIER,
        )
    if predictor_ckpt is not None:
        load_strictly(
            drnet.predictor.get_parameters(),
            predictor_ckpt,
            "a DRNet predictor",
            kind_of,
            {"end_point.weight": "it has another number of candidates; set --resolutions to the file's"},
            prefix=PREDICTOR,
        )
    return left_out


def save_networks(drnet: DRNet, folder: Path) -> None:
    """Write `classifier_net.ckpt` and `predictor_net.ckpt` into `folder`, with the architecture recorded in both."""
    record = {RECORD: json.dumps(asdict(drnet.architecture))}
    save_checkpoint(drnet.classifier.get_parameters(), folder / "classifier_net.ckpt", record, CLASSIFIER)
    save_checkpoint(drnet.predictor.get_parameters(), folder / "predictor_net.ckpt", record, PREDICTOR)
