"""The settings of ResNeSt: the keys of its config files and the flags of its commands."""

import argparse
import sys
from pathlib import Path

from src.checkpoints import BACKBONES
from utils.cli import UserError
from utils.config import Setting, above_zero, fraction, natural, not_negative, number, optional, positive, seed, yes_no
from utils.config import load_config as load
from utils.device import DEVICES
from utils.export import FORMATS
from utils.launcher import check_devices

CONFIG = Path(__file__).resolve().parents[1] / "config" / "resnest_imagenet_config.yaml"
TRAIN = ("train",)
RUN = ("train", "eval")
ALL = ("train", "eval", "export")

IMAGENET_CLASSES = 1000

below_one = number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
image_size = number(int, lambda value: value >= 32 and value % 32 == 0, "a multiple of 32")

SETTINGS = {
    # ===== Network ===== #
    "backbone": Setting("network", str, ALL, tuple(BACKBONES)),
    "ckpt_path": Setting(
        "checkpoint (.pth, .ckpt; for eval.py also .mindir); in training, to start from",
        optional(str),
        ALL,
        aliases=("pretrained",),
    ),
    "num_classes": Setting("number of classes", positive, ALL),
    "image_size": Setting(
        "side of the images in pixels, a multiple of 32; none: the checkpoint's, else the backbone's own",
        optional(image_size),
        ALL,
    ),
    "resize_size": Setting(
        "side of the square that evaluation resizes to before it cuts out the centre; none: the checkpoint's, else the "
        "backbone's own",
        optional(positive),
        ALL,
    ),
    # ===== Data ===== #
    "data_path": Setting("ImageNet root with train/ and val/; for eval.py a single split will do", str, RUN),
    "batch_size": Setting("images per batch and device; for export 0 means any", natural, ALL, own={"export": 1}),
    "num_workers": Setting("processes that read images; 0: one per core, shared by the devices", natural, RUN),
    "strict": Setting("stop at the first image that cannot be read", yes_no, RUN),
    # ===== Device and results ===== #
    "device_target": Setting("device; auto: Ascend if there is one, else GPU, else CPU", str, ALL, DEVICES),
    "device_id": Setting("number of the device", natural, ALL),
    "device_num": Setting("devices; more than one starts msrun", positive, RUN),
    "rank_table_file": Setting("HCCL rank table of the devices, for Ascend", optional(str), RUN),
    "seed": Setting("seed of every random draw", seed, RUN),
    "output_dir": Setting("folder for everything written", str, ALL),
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
    "finetune": Setting("load all of the checkpoint but the head, for other classes", yes_no, TRAIN),
    "last_gamma": Setting("without a checkpoint, start with the last BN gamma of every block at 0", yes_no, TRAIN),
    "epochs": Setting("number of epochs", positive, TRAIN),
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
    "eval_every": Setting("epochs between two evaluations", positive, TRAIN),
    "resume": Setting("training state (resume.ckpt) to go on from", optional(str), TRAIN),
}


def load_config(command: str, description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of `command` ("train", "eval" or "export") from the config file and the command line.

    Image and resize size are numbers in the result for "train"; for the others `set_sizes` makes them so.

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
    set_sizes(args, warn=False)  # one may well train for another size
    if args.batch_size < 2:
        raise UserError("--batch_size must be at least 2 in training, or BN has nothing to learn a variance from")
    for key in ("crop_scale", "crop_ratio"):
        if len(getattr(args, key)) != 2 or getattr(args, key)[0] > getattr(args, key)[1]:
            raise UserError(f"--{key} takes two rising numbers")
    if args.crop_scale[1] > 1:
        raise UserError("--crop_scale: a crop cannot be larger than the image, give numbers up to 1")
    if args.warmup_epochs > args.epochs:
        raise UserError(f"the warm-up of {args.warmup_epochs:g} epochs is longer than --epochs {args.epochs}")
    if args.finetune and args.ckpt_path is None:
        raise UserError("--finetune starts from a checkpoint; give it with --ckpt_path")
    return args


def set_sizes(args: argparse.Namespace, told: tuple[int, int] | None = None, warn: bool = True) -> None:
    """Fill in image and resize size where none are given.

    Args:
        told: those of the checkpoint, if it tells; else the backbone's own count.
        warn: say if others are given than those of the checkpoint, or of the backbone on ImageNet.

    Raises:
        UserError: the crop does not fit.
    """
    backbone = BACKBONES[args.backbone]
    size, resize = told or (backbone.size, backbone.resize)
    if args.image_size is None:
        args.image_size = size
    if args.resize_size is None:
        args.resize_size = args.image_size * resize // size  # in proportion for images of another size
    meant = f"{args.ckpt_path if told else args.backbone} is meant for a crop of {size} out of {resize}"
    if args.resize_size < args.image_size:
        raise UserError(
            f"a crop of {args.image_size} pixels does not fit into {args.resize_size}; {meant}, set --resize_size and "
            "--image_size"
        )
    known = told or args.num_classes == IMAGENET_CLASSES
    if warn and known and (args.image_size, args.resize_size) != (size, resize):
        given = f"{args.image_size} out of {args.resize_size}"
        print(f"warning: {meant}, not of {given}; expect another accuracy", file=sys.stderr, flush=True)
