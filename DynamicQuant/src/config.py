"""The settings of DynamicQuant: the keys of its config files and the flags of its commands."""

import argparse
from pathlib import Path

from src.quant import MAX_BITS, QUANTIZERS
from src.resnet import GRANULARITIES, SMALLEST, Architecture
from utils.cli import UserError
from utils.config import (
    Setting,
    above_zero,
    batch,
    below_one,
    check_training,
    classes,
    epoch,
    fraction,
    natural,
    not_negative,
    number,
    optional,
    positive,
    run_settings,
    side,
    yes_no,
)
from utils.config import load_config as load
from utils.export import FORMATS
from utils.launcher import check_devices

CONFIG = Path(__file__).resolve().parents[1] / "config" / "resnet18_imagenet_config.yaml"
STAGES = ("float", "quantize")
RUN = (*STAGES, "eval")
ALL = (*RUN, "export")
QUANTIZE = ("quantize",)

bit_width = number(int, lambda value: 1 <= value <= MAX_BITS, f"a whole number from 1 to {MAX_BITS}")
odd = number(int, lambda value: value >= 1 and value % 2 == 1, "an odd whole number")
image_side = number(
    int, lambda value: SMALLEST <= value <= 8192 and value % 4 == 0, f"a multiple of 4 from {SMALLEST} up to 8192"
)

SETTINGS = {
    # ===== Network: what a checkpoint is of it tells itself ===== #
    "ckpt_path": Setting(
        "checkpoint; in training to start from, also a .pth", optional(str), ALL, aliases=("pretrained",), free=True
    ),
    "num_classes": Setting("number of classes", classes, STAGES),
    "image_size": Setting(f"side of the images in pixels, a multiple of 4 from {SMALLEST} up", image_side, STAGES),
    "resize_size": Setting(
        "what evaluation resizes the shorter side to before it cuts out the centre; none: image_size / 0.875, or what "
        "the checkpoint was trained with",
        optional(side),
        ALL,
    ),
    "quant": Setting("quantizer of the activations", str, QUANTIZE, QUANTIZERS),
    "target_bits": Setting("target bit-width", bit_width, QUANTIZE),
    "num_bits": Setting("bit-widths to choose from, around the target; 1: fixed bits, no controller", odd, QUANTIZE),
    "granularity": Setting("one decision for the image, or one for each layer", str, QUANTIZE, GRANULARITIES),
    # ===== Data ===== #
    "batch_size": Setting("images per batch and device; for export 0 means any", batch, ALL, own={"export": 1}),
    # ===== Device and results ===== #
    **run_settings(STAGES, RUN, ALL, distributed=STAGES),
    # ===== Evaluation ===== #
    "force_bits": Setting(
        "run every image at these bits instead of those chosen for it", optional(bit_width), ("eval",)
    ),
    "sample_gumbel": Setting("sample the choices, as the published evaluation does", yes_no, ("eval",)),
    "predictions": Setting("CSV file for the prediction and the bits of every image", optional(str), ("eval",)),
    "download": Setting("fetch the checkpoint from ckpt_url first", yes_no, ("eval",)),
    "ckpt_url": Setting("where the published checkpoint is", str, ("eval",)),
    # ===== Export ===== #
    "file_format": Setting("kind of the exported files", str, ("export",), FORMATS),
    # ===== Training ===== #
    "finetune": Setting("load all of the checkpoint but the classifier, for other classes", yes_no, STAGES, free=True),
    "epochs": Setting("number of epochs", epoch, STAGES),
    "lr": Setting("learning rate after the warm-up, for whatever batch", above_zero, STAGES),
    "lr_steps": Setting("epochs after which the learning rate is multiplied by lr_gamma", positive, STAGES, many=True),
    "lr_gamma": Setting("factor of the learning rate", fraction, STAGES),
    "warmup_epochs": Setting("epochs of linear warm-up", not_negative, STAGES),
    "momentum": Setting("momentum; 0: plain gradient descent", below_one, STAGES),
    "weight_decay": Setting("weight decay of all parameters", not_negative, STAGES),
    "dropout": Setting("share of the inputs of classifier and controller's last layer dropped", below_one, STAGES),
    "bit_budget": Setting("mean bits that cost nothing; none: the target", optional(above_zero), QUANTIZE),
    "even_epochs": Setting(
        "epochs at the start in which bits are drawn evenly; a new controller starts after them", natural, QUANTIZE
    ),
    "controller_lr_ratio": Setting(
        "the controller's learning rate, and its gradient in layer1, as a part of the others'", above_zero, QUANTIZE
    ),
    "penalty": Setting("loss for each bit that the mean is above the budget", not_negative, QUANTIZE),
    "temperature": Setting("temperature of the Gumbel-Softmax", above_zero, QUANTIZE),
    "crop_scale": Setting("range of the random crop's share of the area", above_zero, STAGES, many=True),
    "crop_ratio": Setting("range of the random crop's width / height", above_zero, STAGES, many=True),
    "flip": Setting("probability of a horizontal flip", fraction, STAGES),
    "color_jitter": Setting("largest relative change of brightness, contrast and saturation", fraction, STAGES),
}


def load_config(command: str, description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of `command` ("train", "eval" or "export") from the config file and the command line.

    Raises:
        UserError: as `utils.config.load_config`; also values that do not go together.
    """
    args = load(command, description, SETTINGS, CONFIG, STAGES if command == "train" else (), argv=argv)
    if command != "export" and args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size} is too small for {command}.py")
    if command != "train":
        if args.ckpt_path is None:
            raise UserError(f"{command}.py needs a checkpoint; give it with --ckpt_path")
        if command == "eval" and args.sample_gumbel and args.force_bits is not None:
            raise UserError("--force_bits leaves nothing to sample; leave out --sample_gumbel")
        return args
    check_devices(args)
    check_training(args, "ckpt_path")
    if args.lr_steps != sorted(set(args.lr_steps)):
        raise UserError("--lr_steps takes rising epochs")
    return args


def complete(args: argparse.Namespace) -> None:
    """Fill in the settings of a training that follow from others, some of which a checkpoint may have told.

    Raises:
        UserError: values that do not go together.
    """
    args.resize_size = args.resize_size or default_resize(args.image_size)
    check_crop(args.image_size, args.resize_size)
    if args.stage == "quantize":
        args.bit_budget = args.bit_budget or float(args.target_bits)
        if args.even_epochs >= args.epochs:
            raise UserError(f"--even_epochs {args.even_epochs} leaves none of --epochs {args.epochs} to the controller")
    try:
        architecture_of(args)
    except ValueError as error:
        raise UserError(f"--target_bits {args.target_bits} --num_bits {args.num_bits}: {error}") from error


def check_crop(image_size: int, resize_size: int) -> None:
    """Whether evaluation can cut its centre out.

    Raises:
        UserError: it does not fit.
    """
    if resize_size < image_size:
        raise UserError(f"a crop of {image_size} pixels does not fit into --resize_size {resize_size}; set it higher")


def default_resize(image_size: int) -> int:
    """The published evaluation's shorter side in pixels."""
    return int(image_size / 0.875)


def architecture_of(args: argparse.Namespace) -> Architecture:
    """The network that the settings of a training describe.

    Raises:
        ValueError: bit-widths that are none.
    """
    sizes = {"num_classes": args.num_classes, "image_size": args.image_size}
    if args.stage == "float":
        return Architecture("none", **sizes)
    return Architecture(args.quant, args.target_bits, args.num_bits, args.granularity, **sizes)
