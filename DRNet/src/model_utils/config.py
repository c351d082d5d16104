"""The settings of DRNet: the keys of its config files and the flags of its commands."""

import argparse
from pathlib import Path

from utils import config
from utils.cli import UserError
from utils.config import (
    Setting,
    above_zero,
    batch,
    check_training,
    classes,
    epoch,
    few,
    fraction,
    not_negative,
    optional,
    positive,
    run_settings,
    side,
    yes_no,
)
from utils.export import FORMATS
from utils.launcher import check_devices

TRAIN = ("pretrain", "finetune")
ALL = ("eval", "export", *TRAIN)
CONFIG = Path(__file__).resolve().parents[2] / "config" / "resnet50_imagenet2012_config.yaml"

SETTINGS = {
    "num_classes": Setting("number of classes", classes, ALL),
    "image_size": Setting("pixels of the image that both networks get", side, ALL),
    "resize_size": Setting("pixels of the shorter side before the centre crop", side, ALL),
    "resolutions": Setting("candidate resolutions in pixels, the largest first", side, ALL, many=True),
    "predictor_size": Setting("pixels of the predictor's input", side, ALL),
    "layers": Setting("bottlenecks in each of the classifier's four stages", few, TRAIN, many=True),
    "classifier_ckpt": Setting("classifier checkpoint, in training to start from", optional(str), ALL, free=True),
    "predictor_ckpt": Setting(
        "predictor checkpoint, in training to start from", optional(str), ("eval", "export", "finetune"), free=True
    ),
    "batch_size": Setting("images per batch and device; for export 0 means any", batch, ALL),
    **run_settings(TRAIN, ("eval", *TRAIN), ALL, distributed=TRAIN),
    "force_resolution": Setting("classify every image at this resolution", optional(side), ("eval",)),
    "sample_gumbel": Setting("sample the resolution with Gumbel noise, as published", yes_no, ("eval",)),
    "predictions": Setting("CSV file for the prediction of every image", optional(str), ("eval",)),
    "download": Setting("get the published checkpoints first", yes_no, ("eval",)),
    "classifier_url": Setting("where --download gets the classifier", optional(str), ("eval",)),
    "classifier_sha256": Setting("SHA-256 of that file; none: any", optional(str), ("eval",)),
    "predictor_url": Setting("where --download gets the predictor", optional(str), ("eval",)),
    "predictor_sha256": Setting("SHA-256 of that file; none: any", optional(str), ("eval",)),
    "file_format": Setting("kind of the exported files", str, ("export",), FORMATS),
    "epochs": Setting("number of epochs", epoch, TRAIN),
    "optimizer": Setting("optimizer", str, TRAIN, ("sgd", "adamw")),
    "lr": Setting("learning rate of the classifier", above_zero, TRAIN),
    "predictor_lr_ratio": Setting("learning rate of the predictor / of the classifier", above_zero, ("finetune",)),
    "lr_scheduler": Setting("step: times lr_gamma every lr_step epochs; cosine: to 0", str, TRAIN, ("step", "cosine")),
    "lr_step": Setting("epochs between two drops", positive, TRAIN),
    "lr_gamma": Setting("factor of a drop", above_zero, TRAIN),
    "warmup_epochs": Setting("epochs of linear warm-up", not_negative, TRAIN),
    "momentum": Setting("momentum of sgd", fraction, TRAIN),
    "weight_decay": Setting("weight decay", not_negative, TRAIN),
    "crop_scale": Setting("range of the random crop's share of the area", above_zero, TRAIN, many=True),
    "crop_ratio": Setting("range of the random crop's width / height", above_zero, TRAIN, many=True),
    "flip": Setting("probability of a horizontal flip", fraction, TRAIN),
    "alpha": Setting("budget of the classifier, GMACs per image; none: no budget", optional(above_zero), ("finetune",)),
    "eta": Setting("weight of the budget in the loss", not_negative, ("finetune",)),
    "temperature": Setting("temperature of the Gumbel-Softmax", above_zero, ("finetune",)),
    "shortcut_bn": Setting(
        "BN set of the shortcuts, for a classifier trained from nothing (a checkpoint brings its own)",
        str,
        TRAIN,
        ("published", "per_resolution"),
    ),
    "finetune": Setting(
        "load all of the checkpoint but its last layer, for other classes",
        yes_no,
        TRAIN,
        aliases=("new_head",),
        free=True,
    ),
}


def load_config(command: str, description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of `command` ("eval", "export" or "train") from the config file and the command line.

    Raises:
        UserError: as `utils.config.load_config`; also values that do not go together.
    """
    stages = TRAIN if command == "train" else ()
    args = config.load_config(command, description, SETTINGS, CONFIG, stages, argv=argv)
    _check_together(args, command)
    return args


def _check_together(args: argparse.Namespace, command: str) -> None:
    check_sizes(args)
    if command != "train" and args.classifier_ckpt is None:
        raise UserError(f"{command}.py needs a classifier; give it with --classifier_ckpt")
    if command != "train" and args.predictor_ckpt is None and getattr(args, "force_resolution", None) is None:
        raise UserError(f"{command}.py needs a predictor; give it with --predictor_ckpt")
    if command == "export":
        return
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size} is too small for {command}.py")
    if command == "eval" and args.download and None in (args.classifier_url, args.predictor_url):
        raise UserError("--download has nothing to get with this config; set --classifier_url and --predictor_url")
    if command == "eval":
        return
    check_devices(args)
    if len(args.layers) != 4:
        raise UserError(f"--layers takes four numbers, one for each stage, not {len(args.layers)}")
    if args.stage == "finetune" and None is args.classifier_ckpt is args.resume:
        raise UserError("fine-tuning starts from a pre-trained classifier; give it with --classifier_ckpt")
    check_training(args, "classifier_ckpt")


def check_sizes(args: argparse.Namespace) -> None:
    """Check the sizes against each other; they may have come from a checkpoint.

    Raises:
        UserError: they do not go together.
    """
    if sorted(set(args.resolutions), reverse=True) != args.resolutions:
        raise UserError(
            f"--resolutions must differ and fall: {' '.join(map(str, sorted(set(args.resolutions))[::-1]))}"
        )
    if len(args.resolutions) < 2:
        raise UserError(
            "--resolutions needs at least two, or there is nothing to choose; eval.py --force_resolution fixes one"
        )
    if args.image_size > args.resize_size:
        raise UserError(f"--image_size {args.image_size} is larger than --resize_size {args.resize_size}")
    if getattr(args, "force_resolution", None) not in (None, *args.resolutions):
        candidates = " ".join(map(str, args.resolutions))
        raise UserError(f"--force_resolution {args.force_resolution} is none of --resolutions {candidates}")
