"""The settings of DDRNet: the keys of its config files and the flags of its commands."""

import argparse
from pathlib import Path

from src.data.augment.rand_augment import parse_auto_augment
from utils.cli import UserError
from utils.config import (
    Setting,
    above_zero,
    batch,
    below_one,
    check_training,
    classes,
    epoch,
    few,
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

CONFIG = Path(__file__).resolve().parent / "ddrnet23_imagenet_ascend.yaml"
TRAIN = ("train",)
RUN = ("train", "eval")
ALL = ("train", "eval", "export")

SETTINGS = {
    "arch": Setting("network", str, ALL, ("DDRNet23",)),
    # ===== Dataset ===== #
    "set": Setting("kind of data set", str, RUN, ("ImageNet",)),
    "num_classes": Setting("number of classes", classes, ALL),
    "image_size": Setting("side of the images in pixels", side, ALL),
    "crop_pct": Setting(
        "share of the resized side that evaluation's centre crop keeps",
        number(float, lambda v: 0.1 <= v <= 1, "a number from 0.1 to 1"),
        ALL,
    ),
    "interpolation": Setting(
        "of the random crop; random: drawn for each image", str, TRAIN, ("bilinear", "bicubic", "random")
    ),
    "crop_scale": Setting("range of the random crop's share of the area", above_zero, TRAIN, many=True),
    "crop_ratio": Setting("range of the random crop's width / height", above_zero, TRAIN, many=True),
    "flip": Setting("probability of a horizontal flip", fraction, TRAIN),
    "auto_augment": Setting(
        "RandAugment as rand-m9-mstd0.5-inc1: magnitude, its noise, increasing severities; n: layers; none: off",
        optional(str),
        TRAIN,
    ),
    "color_jitter": Setting(
        "brightness, contrast and saturation by up to this, where auto_augment is none", fraction, TRAIN
    ),
    "re_prob": Setting("probability of random erasing", fraction, TRAIN),
    "re_mode": Setting(
        "fill of random erasing: zero, one colour an area, noise", str, TRAIN, ("const", "rand", "pixel")
    ),
    "re_count": Setting("areas that random erasing erases at most", few, TRAIN),
    "mix_up": Setting("alpha of Mixup; 0: off", not_negative, TRAIN),
    "cutmix": Setting("alpha of CutMix; 0: off", not_negative, TRAIN),
    "mixup_prob": Setting("probability that a batch (or pair, or image) is mixed", fraction, TRAIN),
    "switch_prob": Setting("probability of CutMix where both are on", fraction, TRAIN),
    "mixup_mode": Setting("what shares one draw of Mixup and CutMix", str, TRAIN, ("batch", "pair", "elem")),
    "mixup_off_epoch": Setting("epochs after which Mixup and CutMix end; 0: never", natural, TRAIN),
    "label_smoothing": Setting("label smoothing", below_one, TRAIN),
    # ===== Learning rate ===== #
    "base_lr": Setting("learning rate for 256 images a step; it grows in proportion", above_zero, TRAIN),
    "warmup_lr": Setting("learning rate that the warm-up starts from, likewise", not_negative, TRAIN),
    "min_lr": Setting("least learning rate after the warm-up, likewise", not_negative, TRAIN),
    "lr_scheduler": Setting(
        "how the learning rate falls", str, TRAIN, ("constant_lr", "cosine_lr", "multistep_lr", "exp_lr")
    ),
    "warmup_length": Setting("epochs of linear warm-up", not_negative, TRAIN),
    "lr_adjust": Setting("epochs per drop of multistep_lr and exp_lr", positive, TRAIN),
    "lr_gamma": Setting(
        "factor of such a drop", number(float, lambda v: 0 < v <= 1, "a number above 0, up to 1"), TRAIN
    ),
    # ===== Optimizer ===== #
    "optimizer": Setting("optimizer", str, TRAIN, ("momentum", "adamw", "lamb", "rmsprop")),
    "use_nesterov": Setting("Nesterov's form of momentum", yes_no, TRAIN),
    "momentum": Setting("momentum of momentum and rmsprop", below_one, TRAIN),
    "beta": Setting("the two decays of adamw and lamb", below_one, TRAIN, many=True),
    "decay": Setting("decay of rmsprop", below_one, TRAIN),
    "weight_decay": Setting("weight decay, of all but BN and biases", not_negative, TRAIN),
    "clip_global_norm": Setting("clip the gradients' global norm", yes_no, TRAIN),
    "clip_global_norm_value": Setting("the norm to clip to", above_zero, TRAIN),
    "accumulation_step": Setting("batches whose gradients make one step", few, TRAIN),
    # ===== Precision ===== #
    "amp_level": Setting(
        "O0: float32; O1: float16 in convolutions and matrix products; O2: float16 but for BN; O3: float16",
        str,
        ("train", "eval"),
        ("O0", "O1", "O2", "O3"),
    ),
    "keep_bn_fp32": Setting("BN in float32 with amp_level O2 and O3", yes_no, RUN),
    "is_dynamic_loss_scale": Setting(
        "halve the loss scale at an overflow, double it after 2,000 steps without", yes_no, TRAIN
    ),
    "loss_scale": Setting("loss scale, to start with if it is dynamic", above_zero, TRAIN),
    # ===== Training ===== #
    "epochs": Setting("number of epochs", epoch, TRAIN),
    "drop_path_rate": Setting("stochastic depth: how often the deepest residual is dropped", below_one, TRAIN),
    "batch_size": Setting("images per batch and device; for export 0 means any", batch, ALL, own={"export": 1}),
    "pretrained": Setting(
        "checkpoint; in training, to start from", optional(str), ALL, aliases=("ckpt_path",), free=True
    ),
    "finetune": Setting("load all of the checkpoint but the head, for other classes", yes_no, TRAIN, free=True),
    # ===== Data, devices and results ===== #
    **run_settings(
        TRAIN,
        RUN,
        ALL,
        distributed=RUN,
        data_path=("data_url", "data_path", "dataset_path"),
        num_workers=("num_parallel_workers", "num_workers"),
    ),
    # ===== Evaluation ===== #
    "predictions": Setting("CSV file for the prediction of every image", optional(str), ("eval",)),
    "download": Setting("get the published checkpoint first", yes_no, ("eval",)),
    "checkpoint_url": Setting("where --download gets it", optional(str), ("eval",)),
    "checkpoint_sha256": Setting("SHA-256 of that file; none: any", optional(str), ("eval",)),
    # ===== Export ===== #
    "file_format": Setting("kind of the exported file", str, ("export",), FORMATS),
    # ===== ModelArts ===== #
    "run_modelarts": Setting("fetch data_url from and copy the results to OBS, on ModelArts", yes_no, TRAIN, free=True),
    "train_url": Setting("OBS folder for the results", optional(str), TRAIN, free=True),
    "save_every": Setting("epochs after which the results so far are copied to train_url", positive, TRAIN, free=True),
}


def load_config(command: str, description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of `command` ("train", "eval" or "export") from the config file and the command line.

    Raises:
        UserError: as `utils.config.load_config`; also values that do not go together.
    """
    args = load(command, description, SETTINGS, CONFIG, config_aliases=("ddr_config",), argv=argv)
    if command != "export" and args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size} is too small for {command}.py")
    if command != "export":
        check_devices(args)
    if command != "train":
        if args.pretrained is None:
            raise UserError(f"{command}.py needs a checkpoint; give it with --pretrained")
        if command == "eval" and args.download and args.checkpoint_url is None:
            raise UserError("--download has nothing to get with this config; set --checkpoint_url")
        return args
    check_training(args, "pretrained", "warmup_length")
    if len(args.beta) != 2:
        raise UserError("--beta takes two numbers")
    parse_auto_augment(args.auto_augment or "none")
    if (args.mix_up or args.cutmix) and args.mixup_mode == "pair" and args.batch_size % 2:
        raise UserError(
            f"--mixup_mode pair needs an even batch, not {args.batch_size}; change --batch_size or the mode"
        )
    if args.run_modelarts and args.train_url is None:
        raise UserError("--run_modelarts needs --train_url, the OBS folder for the results")
    return args
