"""The settings of ResNeSt: the keys of its config files and the flags of its commands."""

import argparse
import sys
from pathlib import Path

from src.checkpoints import BACKBONES
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
    not_negative,
    number,
    optional,
    run_settings,
    side,
    yes_no,
)
from utils.config import load_config as load
from utils.export import FORMATS
from utils.launcher import check_devices

CONFIG = Path(__file__).resolve().parents[1] / "config" / "resnest_imagenet_config.yaml"
TRAIN = ("train",)
RUN = ("train", "eval")
ALL = ("train", "eval", "export")

IMAGENET_CLASSES = 1000

image_size = number(int, lambda value: 32 <= value <= 8192 and value % 32 == 0, "a multiple of 32 up to 8192")

SETTINGS = {
    # ===== Network ===== #
    "backbone": Setting("network", str, ALL, tuple(BACKBONES)),
    "ckpt_path": Setting(
        "checkpoint (.pth, .ckpt; for eval.py also .mindir); in training, to start from",
        optional(str),
        ALL,
        aliases=("pretrained",),
        free=True,
    ),
    "num_classes": Setting("number of classes", classes, ALL),
    "image_size": Setting(
        "side of the images in pixels, a multiple of 32; none: the checkpoint's, else the backbone's own",
        optional(image_size),
        ALL,
    ),
    "resize_size": Setting(
        "side of the square that evaluation resizes to before it cuts out the centre; none: the checkpoint's, else the "
        "backbone's own",
        optional(side),
        ALL,
    ),
    # ===== Data ===== #
    "batch_size": Setting("images per batch and device; for export 0 means any", batch, ALL, own={"export": 1}),
    # ===== Device and results ===== #
    **run_settings(TRAIN, RUN, ALL, distributed=RUN),
    # ===== Evaluation ===== #
    "preprocess": Setting(
        "documented: to a square, then its centre; authors: the centred square of the image, then to size, bicubic",
        str,
        ("eval",),
        ("documented", "authors"),
    ),
    "predictions": Setting("CSV file for the prediction of every image", optional(str), ("eval",)),
    # ===== Export ===== #
    "file_format": Setting("kind of the exported file", str, ("export",), FORMATS),
    "file_name": Setting(
        "exported file in output_dir, with or without ending; none: the backbone's name", optional(str), ("export",)
    ),
    # ===== Training ===== #
    "finetune": Setting("load all of the checkpoint but the head, for other classes", yes_no, TRAIN, free=True),
    "last_gamma": Setting(
        "without a checkpoint, start with the last BN gamma of every block at 0", yes_no, TRAIN, free=True
    ),
    "epochs": Setting("number of epochs", epoch, TRAIN),
    "lr": Setting("learning rate after the warm-up, for whatever batch", above_zero, TRAIN),
    "min_lr": Setting("learning rate at the end of the cosine", not_negative, TRAIN),
    "warmup_epochs": Setting("epochs of linear warm-up", not_negative, TRAIN),
    "momentum": Setting("Nesterov momentum; 0: plain gradient descent", below_one, TRAIN),
    "weight_decay": Setting("weight decay, of all but BN and biases", not_negative, TRAIN),
    "label_smoothing": Setting("label smoothing", below_one, TRAIN),
    "dropout": Setting("how often a feature is dropped before the classifier", below_one, TRAIN),
    "crop_scale": Setting("range of the random crop's share of the area", above_zero, TRAIN, many=True),
    "crop_ratio": Setting("range of the random crop's width / height", above_zero, TRAIN, many=True),
    "flip": Setting("probability of a horizontal flip", fraction, TRAIN),
}


def load_config(command: str, description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of `command` ("train", "eval" or "export") from the config file and the command line.

    Image and resize size may be None, for what the checkpoint tells; `set_sizes` makes them numbers.

    Raises:
        UserError: as `utils.config.load_config`; also values that do not go together.
    """
    args = load(command, description, SETTINGS, CONFIG, argv=argv)
    if command != "export" and args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size} is too small for {command}.py")
    if command != "export":
        check_devices(args)
    if command != "train":
        if args.ckpt_path is None:
            raise UserError(f"{command}.py needs a checkpoint; give it with --ckpt_path")
        return args
    check_training(args, "ckpt_path")
    return args


def set_sizes(args: argparse.Namespace, warn: bool = True) -> None:
    """Fill in image and resize size, where neither the checkpoint nor a flag tells them, from the backbone's own.

    Args:
        warn: say if they are others than the backbone's on ImageNet.

    Raises:
        UserError: the crop does not fit.
    """
    _, size, resize = BACKBONES[args.backbone]
    if args.image_size is None:
        args.image_size = size
    if args.resize_size is None:
        args.resize_size = args.image_size * resize // size  # in proportion for images of another size
    meant = f"{args.backbone} is meant for a crop of {size} out of {resize}"
    if args.resize_size < args.image_size:
        raise UserError(
            f"a crop of {args.image_size} pixels does not fit into {args.resize_size}; {meant}, set --resize_size and "
            "--image_size"
        )
    if warn and args.num_classes == IMAGENET_CLASSES and (args.image_size, args.resize_size) != (size, resize):
        given = f"{args.image_size} out of {args.resize_size}"
        print(f"warning: {meant}, not of {given}; expect another accuracy", file=sys.stderr, flush=True)
