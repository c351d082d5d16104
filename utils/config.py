"""Settings of a model folder: values from a YAML file, each of which can be given on the command line.

A folder lists its settings in a table, name to `Setting`; `load_config` reads file and flags by it. A value in the file
that is a mapping holds one value per command or training stage.
"""

import argparse
import contextlib
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import yaml

from utils.cli import Parser, UserError, read_file

DEVICES = ("auto", "CPU", "GPU", "Ascend")
PLAIN = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))
MOST_BYTES = 2**16  # of a config file; PyYAML is slow


def number(kind: type, holds: Callable, words: str) -> Callable:
    """A reader of numbers of `kind` (int or float) for which `holds` is true; `words` describe them."""

    def read(text: str | float):
        text = str(text)
        with contextlib.suppress(ValueError, OverflowError):
            value = int(text) if kind is int and text.isdecimal() else float(text)
            if kind(value) == value and holds(kind(value)):
                return kind(value)
        raise argparse.ArgumentTypeError(f"{text:.40} is not {words}")

    return read


def whole(least: int, most: int) -> Callable:
    """A reader of whole numbers in these bounds."""
    return number(int, lambda value: least <= value <= most, f"a whole number from {least} to {most}")


natural, positive, seed = whole(0, 2**31 - 1), whole(1, 2**31 - 1), whole(0, 2**32 - 1)
# Whatever memory or time grow with has a bound that no machine needs to pass.
side, batch, classes, few = whole(1, 2**13), whole(0, 2**12), whole(1, 2**18), whole(1, 2**7)
epoch, port = whole(1, 10_000), whole(1, 2**16 - 1)
not_negative = number(float, lambda value: 0 <= value < float("inf"), "a number from 0")
above_zero = number(float, lambda value: 0 < value < float("inf"), "a number above 0")
below_one = number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
fraction = number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def yes_no(text: str) -> bool:
    """Reads true or false, or what YAML has for them."""
    with contextlib.suppress(KeyError):
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}[text.lower()]
    raise argparse.ArgumentTypeError(f"{text:.40} is neither true nor false")


def optional(read: Callable) -> Callable:
    """A reader that takes the word "none", for no value, besides what `read` takes."""
    return lambda text: None if text.lower() == "none" else read(text)


@dataclass(frozen=True)
class Setting:
    """One setting: what it means, how its text is read, which commands or stages use it.

    choices: the only values allowed. many: a list of values. aliases: other names of the same setting, as flags and in
    the file. own: users for which a plain value in the file does not count, each with its value. free: may differ
    between a training and the one that resumes it.
    """

    help: str
    kind: Callable
    users: tuple[str, ...]
    choices: tuple[str, ...] | None = None
    many: bool = False
    aliases: tuple[str, ...] = ()
    own: Mapping[str, object] = field(default_factory=dict)
    free: bool = False

    def read(self, text: str):
        """The value of a text from the file or the command line; ArgumentTypeError if it is none."""
        try:
            usable = text and b"\0" not in os.fsencode(text)
        except UnicodeEncodeError:  # surrogates
            usable = False
        if not usable or (self.kind is str and not self.choices and text.lower() == "none"):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no value for it; give one")
        return self.kind(text)

    def take(self, value):
        """What a file has, one value or a list, read as on the command line; ArgumentTypeError if it cannot be."""
        many = isinstance(value, list | tuple)
        items = list(value) if many else [value]
        if many != self.many or not all(isinstance(item, str | int | float | None) for item in items):
            raise argparse.ArgumentTypeError(f"it takes {'a list of values' if self.many else 'one value, not a list'}")
        items = [self.read(_words(item)) for item in items]
        if self.choices and items[0] not in self.choices:
            raise argparse.ArgumentTypeError(f"it must be one of {', '.join(self.choices)}, not {items[0]:.40}")
        return items if many else items[0]


def run_settings(
    training: tuple[str, ...],
    reading: tuple[str, ...],
    everything: tuple[str, ...],
    distributed: tuple[str, ...],
    data_path: tuple[str, ...] = ("data_path", "dataset_path"),
    num_workers: tuple[str, ...] = ("num_workers",),
) -> dict[str, Setting]:
    """The settings that mean the same in every model: data, devices, results, and the run of a training.

    `training`, `reading`, `everything`, `distributed`: the commands or stages that train, read images, run at all, and
    take several devices. `data_path`, `num_workers`: what the model calls these two, its own name first.
    """
    free = partial(Setting, free=True)
    data = "ImageNet root with train/ and val/; for eval.py a single split will do"
    workers = "processes that read images; 0: one per core, shared by the devices"
    device = "device; auto: Ascend if there is one, else GPU, else CPU"
    address = "address of the first server, which the others can reach"
    return {
        data_path[0]: free(data, str, reading, aliases=data_path[1:]),
        num_workers[0]: free(workers, natural, reading, aliases=num_workers[1:]),
        "strict": free("stop at the first image that cannot be read", yes_no, reading),
        "seed": Setting("seed of every random draw", seed, reading),
        "device_target": free(device, str, everything, DEVICES),
        "device_id": free("number of the device", natural, everything),
        "device_num": free("devices of this server to run on", few, distributed),
        "rank_table_file": free("HCCL rank table of the devices, for Ascend", optional(str), distributed),
        "server_num": free("servers that run the same command together", few, distributed),
        "server_rank": free("number of this server among them, from 0", natural, distributed),
        "master_addr": free(address, optional(str), distributed),
        "master_port": free("a free port there", port, distributed),
        "output_dir": free("folder for everything written", str, everything),
        "eval_every": free("epochs between two evaluations", positive, training),
        "resume": free("training state (resume.ckpt) to go on from", optional(str), training),
    }


def load_config(
    command: str,
    description: str,
    settings: Mapping[str, Setting],
    default: Path,
    stages: tuple[str, ...] = (),
    config_aliases: tuple[str, ...] = (),
    argv: list[str] | None = None,
) -> argparse.Namespace:
    """The settings of `command` ("eval", "export", …) from the config file and the command line.

    UserError for an unknown flag or key, a value of the wrong kind, a config file that cannot be read.

    Args:
        settings: the table; `command`, or each of its `stages`, of which `--stage` chooses one, is a user in it.
        default: the config file if `--config_path`, also called `config_aliases`, does not name another.

    Returns:
        a value for every setting that the command uses, `config_path`, `given`: the settings that stood on the command
        line, as a dict of name to the flag used, `fixed`: the names of those that are not free, and `table`: those
        settings themselves.
    """
    prog = f"{command}.py"
    first = Parser(prog=prog, add_help=False, allow_abbrev=False)
    first.set_defaults(given={})
    config = {"default": str(default), "action": Store, "help": "YAML file with the settings (default: %(default)s)"}
    first.add_argument(*(f"--{name}" for name in ("config_path", *config_aliases)), **config)
    if stages:
        stage = first.add_argument("--stage", choices=stages, help="part of the training to run")
    known, _ = first.parse_known_args(argv)
    path, users = Path(known.config_path), stages or (command,)
    values = _read(path, settings, users, default)

    if stages:
        stage.required = True
        users = (known.stage,) if known.stage else users
    parser = Parser(prog=prog, description=description, allow_abbrev=False, parents=[first])
    used = {key: setting for key, setting in settings.items() if set(users) & set(setting.users)}
    for key, setting in used.items():
        own = [user for user in users if user in setting.users]
        _add_flag(parser, key, setting, {user: _checked(key, setting, values, user, settings, path) for user in own})
    args = parser.parse_args(argv)
    args.table = used
    args.fixed = [key for key, setting in used.items() if not setting.free] + (["stage"] if stages else [])
    return args


def _add_flag(parser: Parser, key: str, setting: Setting, defaults: Mapping[str, object]) -> None:
    """The flag of a setting, whose `defaults` are those of each user."""
    value, *others = defaults.values()
    shown = _words(value)
    if any(other != value for other in others):
        shown = ", ".join(f"{user} {_words(other)}" for user, other in defaults.items())
    kind: dict = {"nargs": "+" if setting.many else None, "choices": setting.choices}
    kind["metavar"] = None if setting.choices else key.upper()
    if setting.kind is yes_no:
        kind = {"nargs": "?", "const": True, "metavar": "BOOL"}
    parser.add_argument(
        *(f"--{name}" for name in (key, *setting.aliases)),
        type=setting.read,
        default=value,
        action=Store,
        help=f"{setting.help} (default: {shown})".replace("%", "%%"),
        **kind,
    )


def check_training(args: argparse.Namespace, checkpoint: str, warmup: str = "warmup_epochs") -> None:
    """UserError if settings of a training that every model has do not go together.

    `checkpoint` and `warmup` are what the model calls the checkpoint to start from, and the epochs of warm-up.
    """
    if args.batch_size < 2:
        raise UserError("--batch_size must be at least 2 in training, or BN has nothing to learn a variance from")
    for key in ("crop_scale", "crop_ratio"):
        if len(getattr(args, key)) != 2 or getattr(args, key)[0] > getattr(args, key)[1]:
            raise UserError(f"--{key} takes two rising numbers")
    if args.crop_scale[1] > 1:
        raise UserError("--crop_scale: a crop cannot be larger than the image, give numbers up to 1")
    if getattr(args, warmup) > args.epochs:
        raise UserError(f"the warm-up of {getattr(args, warmup):g} epochs is longer than --epochs {args.epochs}")
    if args.finetune and getattr(args, checkpoint) is None:
        raise UserError(f"--finetune starts from a checkpoint; give it with --{checkpoint}")


def take_settings(
    args: argparse.Namespace, path: str | Path, told: Mapping, remedy: str = "leave it out, or give another file"
) -> None:
    """Give `args` those settings among what the file `path` has `told`.

    UserError if a flag has another value, or the command line would not take what is told.
    """
    for key in [key for key in args.table if key in told]:
        value = _told(key, args.table[key], told[key], path)
        flag, now = args.given.get(key), getattr(args, key)
        if flag and now not in (None, value):
            raise UserError(f"{flag} {_words(now)} contradicts {path}, which has {_words(value)}; {remedy}")
        setattr(args, key, value)


def _told(key: str, setting: Setting, value, path: str | Path):
    """The `value` that the file `path` tells, read as the command line would; free texts, such as paths, are none."""
    try:
        found = setting.take(value)
        if isinstance(found, str) and not setting.choices:
            raise argparse.ArgumentTypeError(f"it is {found:.40}")
        return found
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{path} tells no usable {key}: {error}; give another file") from error


class Store(argparse.Action):
    """Stores the value and notes the flag; two names of one setting must not disagree."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, "given", {})
        before = given.get(self.dest)
        if before not in (None, option_string) and getattr(namespace, self.dest) != values:
            raise UserError(f"{before} and {option_string} are one setting with two values; give one of them")
        namespace.given = {**given, self.dest: option_string}
        setattr(namespace, self.dest, values)


def _read(path: Path, settings: Mapping[str, Setting], users: tuple[str, ...], default: Path) -> dict:
    """The content of the file, under the settings' first names."""
    values = _content(_yaml(path), str(path))
    names = {name: key for key, setting in settings.items() for name in (key, *setting.aliases)}
    found: dict = {}
    for name, value in values.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            raise UserError(f"{path} has an unknown key {name:.40}; {hint}")
        if names[name] in found:
            raise UserError(f"{path} has two values for {names[name]}, one of them as {name}; keep one")
        found[names[name]] = value
    for key, setting in settings.items():
        if key not in found and set(users) & (set(setting.users) - set(setting.own)):
            raise UserError(f"{path} lacks the key {key}; copy it from {default.parent.name}/{default.name}")
    return found


def _yaml(path: Path) -> yaml.Node | None:
    """The YAML file `path` before any of it is interpreted: for PyYAML 010 is eight, 1:30 ninety, and no a boolean."""
    content = read_file(path, "set --config_path", f"the config {path}")
    if len(content) > MOST_BYTES:
        raise UserError(f"{path} has {len(content)} bytes, far more than a config; set --config_path")
    try:
        return yaml.compose(content, yaml.BaseLoader)
    except Exception as error:  # errors of its own, of Unicode, of numbers, of recursion, …
        raise UserError(f"{path} is not valid YAML: {error}") from error


def _content(node: yaml.Node | None, where: str, depth: int = 0) -> str | list | dict[str, str | list | dict]:
    """What a node holds: texts as they would stand on the command line, in lists or mappings as deep as settings go."""
    if node is not None and node.tag not in PLAIN:
        raise UserError(f"{where} has a tag, {node.tag:.40}; leave it out")
    if isinstance(node, yaml.ScalarNode) and depth:
        return "none" if node.style is None and node.value.lower() in ("", "~", "null") else node.value
    if isinstance(node, yaml.SequenceNode) and 0 < depth < 3:
        return [_content(item, where, 3) for item in node.value]
    if not isinstance(node, yaml.MappingNode) or depth > 1:
        wanted = "one value, a list, or one value per command or stage" if depth else "a list of `key: value` lines"
        raise UserError(f"{where} is not {wanted}")
    found: dict[str, str | list | dict] = {}
    for key, value in node.value:
        name = _content(key, where, 3)
        if name in found:
            raise UserError(f"{where} has {name:.40} twice, again in line {key.start_mark.line + 1}; keep one")
        found[name] = _content(value, f"{where}: {name:.40}", depth + 1)
    return found


def _checked(key: str, setting: Setting, values: dict, user: str, settings: Mapping[str, Setting], path: Path):
    """The value for `user`, read as the command line would."""
    value = values.get(key)
    if isinstance(value, dict):
        known = {user for one in settings.values() for user in one.users}
        if unknown := set(value) - known:
            raise UserError(f"{path}: {key} knows {', '.join(sorted(known))}, not {min(unknown):.40}")
        if user not in value:
            raise UserError(f"{path}: {key} has no value for {user}")
        value = value[user]
    elif user in setting.own:
        return setting.own[user]
    try:
        return setting.take(value)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{path}: {key}: {error}") from error


def _words(value) -> str:
    """A value as one would write it on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
