"""The settings of DRNet: the keys of its config files and the flags of its commands."""

import argparse
from pathlib import Path

from utils import config
from utils.cli import UserError
from utils.config import Setting, above_zero, fraction, natural, not_negative, optional, positive, yes_no
from utils.device import DEVICES

TRAIN = ("pretrain", "finetune")
ALL = ("eval", "export", *TRAIN)
CONFIG = Path(__file__).resolve().parents[2] / "config" / "resnet50_imagenet2012_config.yaml"

SETTINGS = {
    "data_path": Setting(
        "ImageNet root with train/ and val/; for eval.py a single split will do", str, ("eval", *TRAIN)
    ),
    "num_classes": Setting("number of classes", positive, ALL),
    "image_size": Setting("pixels of the image that both networks get", positive, ALL),
    "resize_size": Setting("pixels of the shorter side before the centre crop", positive, ALL),
    "resolutions": Setting("candidate resolutions in pixels, the largest first", positive, ALL, many=True),
    "predictor_size": Setting("pixels of the predictor's input", positive, ALL),
    "classifier_ckpt": Setting("classifier checkpoint, in training to start from", optional(str), ALL),
    "predictor_ckpt": Setting(
        "predictor checkpoint, in training to start from", optional(str), ("eval", "export", "finetune")
    ),
    "device_target": Setting("device; auto: Ascend if there is one, else GPU, else CPU", str, ALL, DEVICES),
    "device_id": Setting("number of the device", natural, ALL),
    "batch_size": Setting("images per batch and device; for export 0 means any", natural, ALL),
    "num_workers": Setting("threads that read images; 0: one per core", natural, ("eval", *TRAIN)),
    "seed": Setting("seed of every random draw", natural, ("eval", *TRAIN)),
    "output_dir": Setting("folder for everything written", str, ALL),
    "strict": Setting("stop at the first image that cannot be read", yes_no, ("eval", *TRAIN)),
    "force_resolution": Setting("classify every image at this resolution", optional(positive), ("eval",)),
    "sample_gumbel": Setting("sample the resolution with Gumbel noise, as published", yes_no, ("eval",)),
    "predictions": Setting("CSV file for the prediction of every image", optional(str), ("eval",)),
    "download": Setting("get the published checkpoints first", yes_no, ("eval",)),
    "classifier_url": Setting("where --download gets the classifier", optional(str), ("eval",)),
    "classifier_sha256": Setting("SHA-256 of that file; none: any", optional(str), ("eval",)),
    "predictor_url": Setting("where --download gets the predictor", optional(str), ("eval",)),
    "predictor_sha256": Setting("SHA-256 of that file; none: any", optional(str), ("eval",)),
    "file_format": Setting("kind of the exported files", str, ("export",), ("MINDIR", "AIR")),
    "epochs": Setting("number of epochs", positive, TRAIN),
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
    "new_head": Setting("leave out the checkpoint's last layer, for other classes", yes_no, TRAIN),
    "resume": Setting("training state (resume.ckpt) to go on from", optional(str), TRAIN),
    "eval_every": Setting("epochs between two evaluations", positive, TRAIN),
    "device_num": Setting("devices to train on; more than one starts msrun", positive, TRAIN),
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
    if command == "export":
        return
    if args.batch_size < (2 if command == "train" else 1):
        raise UserError(f"--batch_size {args.batch_size} is too small for {command}.py")
    if command == "eval" and args.download and None in (args.classifier_url, args.predictor_url):
        raise UserError("--download has nothing to get with this config; set --classifier_url and --predictor_url")
    if command == "eval" and args.force_resolution not in (None, *args.resolutions):
        candidates = " ".join(map(str, args.resolutions))
        raise UserError(f"--force_resolution {args.force_resolution} is none of --resolutions {candidates}")
    if command == "train":
        for key in ("crop_scale", "crop_ratio"):
            if len(getattr(args, key)) != 2 or getattr(args, key)[0] > getattr(args, key)[1]:
                raise UserError(f"--{key} takes two rising numbers")
        if args.crop_scale[1] > 1:
            raise UserError("--crop_scale: a crop cannot be larger than the image, give numbers up to 1")


def architecture_settings(args: argparse.Namespace) -> dict:
    """The fields of `drnet.Architecture` that are settings."""
    return {
        "resolutions": tuple(args.resolutions),
        "predictor_size": args.predictor_size,
        "image_size": args.image_size,
        "num_classes": args.num_classes,
    }
