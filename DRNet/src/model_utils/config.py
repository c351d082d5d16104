"""Settings: values from a YAML file, each of which can be given on the command line.

A value in the file that is a mapping holds one value per command or training stage (keys of `USERS`).
"""

import argparse
import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from utils.cli import Parser, UserError
from utils.device import DEVICES

USERS = ("eval", "export", "pretrain", "finetune")
TRAIN = ("pretrain", "finetune")
ALL = USERS


def number(kind: type, holds: Callable, words: str) -> Callable:
    """A reader of numbers of `kind` (int or float) for which `holds` is true; `words` describe them."""

    def read(text):
        try:
            value = kind(str(text))
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value

    return read


natural = number(int, lambda value: value >= 0, "a whole number from 0")
positive = number(int, lambda value: value >= 1, "a whole number from 1")
not_negative = number(float, lambda value: 0 <= value < float("inf"), "a number from 0")
above_zero = number(float, lambda value: 0 < value < float("inf"), "a number above 0")
fraction = number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def yes_no(text) -> bool:
    """Reads true or false."""
    if str(text).lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return str(text).lower() == "true"


def optional(read: Callable) -> Callable:
    """A reader that takes the word "none", for no value, besides what `read` takes."""
    return lambda text: None if str(text).lower() == "none" else read(text)


@dataclass(frozen=True)
class Setting:
    """One setting: what it means, how its text is read, who uses it (of `USERS`); `many` for a list of values."""

    help: str
    kind: Callable
    users: tuple[str, ...]
    choices: tuple[str, ...] | None = None
    many: bool = False


SETTINGS = {
    "data_path": Setting("ImageNet root with train/ and val/, or a single split", str, ("eval", *TRAIN)),
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


def _read(path: Path, users: tuple[str, ...]) -> dict:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}; set --config_path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a list of `key: value` lines")
    for key in values:
        if key not in SETTINGS:
            near = difflib.get_close_matches(str(key), SETTINGS, 1)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            raise UserError(f"{path} has an unknown key {key}; {hint}")
    for key, setting in SETTINGS.items():
        if key not in values and set(users) & set(setting.users):
            raise UserError(f"{path} lacks the key {key}; copy it from config/resnet50_imagenet2012_config.yaml")
    return values


def _value_for(key: str, value, user: str, path: Path):
    if isinstance(value, dict):
        unknown = set(value) - set(USERS)
        if unknown:
            raise UserError(f"{path}: {key} knows {', '.join(USERS)}, not {', '.join(map(str, sorted(unknown)))}")
        if user not in value:
            raise UserError(f"{path}: {key} has no value for {user}")
        value = value[user]
    return value


def _checked(key: str, value, path: Path):
    """`value` of the file, read as the command line would."""
    setting = SETTINGS[key]
    values = value if setting.many and isinstance(value, list) else [value]
    if setting.many != isinstance(value, list) or any(isinstance(item, dict | list) for item in values):
        raise UserError(f"{path}: {key} takes {'a list of values' if setting.many else 'one value'}, not {value}")
    try:
        values = [setting.kind(item) for item in values]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{path}: {key}: {error}") from error
    if setting.choices and values[0] not in setting.choices:
        raise UserError(f"{path}: {key} must be one of {', '.join(setting.choices)}, not {value}")
    return values if setting.many else values[0]


def _words(value) -> str:
    """A value as one would write it on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def load_config(command: str, description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of `command` ("eval", "export" or "train") from the config file and the command line.

    Raises:
        UserError: an unknown flag or key, a value of the wrong kind, a config file that cannot be read.
    """
    argv = sys.argv[1:] if argv is None else argv
    folder = Path(__file__).resolve().parents[2]
    first = Parser(add_help=False, allow_abbrev=False, prog=f"{command}.py")
    config_flag = {"default": str(folder / "config" / "resnet50_imagenet2012_config.yaml")}
    first.add_argument("--config_path", **config_flag)
    first.add_argument("--stage", choices=TRAIN)
    known, _ = first.parse_known_args(argv)
    path = Path(known.config_path)
    users = TRAIN if command == "train" else (command,)
    values = _read(path, users)

    parser = Parser(prog=f"{command}.py", description=description, allow_abbrev=False)
    parser.add_argument("--config_path", help="YAML file with the settings (default: %(default)s)", **config_flag)
    if command == "train":
        parser.add_argument("--stage", choices=TRAIN, required=True, help="part of the training to run")
    if known.stage:
        users = (known.stage,)
    for key, setting in SETTINGS.items():
        stages = [user for user in users if user in setting.users]
        if not stages:
            continue
        defaults = {stage: _checked(key, _value_for(key, values[key], stage, path), path) for stage in stages}
        default = defaults[stages[0]]
        shown = _words(default)
        if any(value != default for value in defaults.values()):
            shown = ", ".join(f"{stage} {_words(value)}" for stage, value in defaults.items())
        text = f"{setting.help} (default: {shown})".replace("%", "%%")
        if setting.kind is yes_no:
            parser.add_argument(
                f"--{key}", type=yes_no, nargs="?", const=True, default=default, help=text, metavar="BOOL"
            )
        else:
            parser.add_argument(
                f"--{key}",
                type=setting.kind,
                nargs="+" if setting.many else None,
                choices=setting.choices,
                default=default,
                help=text,
                metavar=None if setting.choices else key.upper(),
            )
    args = parser.parse_args(argv)
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
