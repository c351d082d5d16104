"""Settings from file and command line: aliases, own values, and what is refused."""

import argparse

import pytest

from utils.cli import UserError
from utils.config import (
    Setting,
    check_training,
    fraction,
    load_config,
    natural,
    optional,
    positive,
    take_settings,
    yes_no,
)

SETTINGS = {
    "data_url": Setting("data", str, ("train", "eval"), aliases=("data_path",)),
    "batch_size": Setting("batch", natural, ("train", "eval", "export"), own={"export": 1}),
    "mode": Setting("mode", str, ("train",), ("batch", "pair")),
    "beta": Setting("betas", fraction, ("train",), many=True),
    "limit": Setting("limit", optional(positive), ("train",)),
    "strict": Setting("strict", yes_no, ("train", "eval")),
}
FILE = "{data_url: d, batch_size: 512, mode: pair, beta: [0.5, 1.], limit: none, strict: false}"


@pytest.fixture
def load(tmp_path):
    def load(*argv, text=FILE, command="train"):
        path = tmp_path / "a.yaml"
        path.write_text(text)
        return load_config(command, "", SETTINGS, path, config_aliases=("the_config",), argv=list(argv))

    return load


def test_file_and_flags(load, tmp_path):
    args = load()
    assert (args.data_url, args.batch_size, args.mode, args.beta, args.limit) == ("d", 512, "pair", [0.5, 1.0], None)
    assert args.given == {}
    args = load("--data_path", "e", "--limit", "3", "--strict", "--beta", "0.1", "0.2")
    assert (args.data_url, args.limit, args.strict, args.beta) == ("e", 3, True, [0.1, 0.2])
    assert args.given == {"data_url": "--data_path", "limit": "--limit", "strict": "--strict", "beta": "--beta"}
    (tmp_path / "b.yaml").write_text(FILE.replace("512", "8."))
    assert load("--the_config", str(tmp_path / "b.yaml")).batch_size == 8


def test_a_file_may_use_an_alias_or_a_value_per_command(load):
    text = FILE.replace("data_url", "data_path").replace("512", "{train: 4, eval: 5, export: 6}")
    assert load(text=text).data_url == "d"
    assert [load(text=text, command=command).batch_size for command in ("train", "eval", "export")] == [4, 5, 6]


def test_a_plain_value_does_not_reach_a_user_with_its_own(load):
    assert load(command="export").batch_size == 1
    assert load("--batch_size", "7", command="export").batch_size == 7


@pytest.mark.parametrize(
    ("argv", "text", "message"),
    [
        (["--data_url", "a", "--data_path", "b"], FILE, "--data_url and --data_path are one setting"),
        (["--config_path", "a", "--the_config", "b"], FILE, "are one setting"),
        ([], FILE.replace("}", ", data_path: x}"), "two values for data_url"),
        ([], FILE.replace("beta:", "betta:"), "unknown key betta; did you mean beta"),
        ([], FILE.replace("mode: pair", "mode: none"), "mode must be one of batch, pair"),
        ([], FILE.replace("mode: pair, ", ""), "lacks the key mode"),
        ([], FILE.replace("512", "2.5"), "2.5 is not a whole number"),
        ([], FILE.replace("512", ".inf"), "inf is not a whole number"),
        ([], FILE.replace("512", "{fit: 3}"), "batch_size knows eval, export, train, not fit"),
        ([], FILE.replace("[0.5, 1.]", "0.5"), "beta takes a list"),
        ([], "- a", "is not a list of"),
        ([], FILE.replace("512", "2001-13-41"), "batch_size: 2001-13-41 is not a whole number"),
        ([], "[" * 2_000, "is not valid YAML"),
        ([], FILE.replace("pair", "\x00"), "is not valid YAML"),
        (["--mode", "elem"], FILE, "invalid choice"),
        (["--data"], FILE, "unrecognized"),
    ],
)
def test_what_is_refused(load, argv, text, message):
    with pytest.raises(UserError, match=message):
        load(*argv, text=text)


def test_the_same_value_twice_is_no_contradiction(load):
    assert load("--data_url", "a", "--data_path", "a").data_url == "a"


def test_the_settings_of_a_resumed_training_are_those_that_are_not_free(tmp_path):
    table = {**SETTINGS, "place": Setting("folder", str, ("train",), free=True)}
    path = tmp_path / "a.yaml"
    path.write_text(FILE.replace("}", ", place: here}"))
    assert load_config("train", "", table, path, argv=[]).fixed == [name for name in SETTINGS]
    assert load_config("export", "", table, path, argv=[]).fixed == ["batch_size"]


def test_settings_that_a_file_tells_need_not_be_given_and_cannot_be_contradicted(load):
    args = load()
    take_settings(args, "a.ckpt", {"batch_size": 7, "beta": (0.1, 0.2), "classes": ["x"]})
    assert args.batch_size == 7 and args.beta == [0.1, 0.2] and "classes" not in args
    take_settings(load("--batch_size", "7"), "a.ckpt", {"batch_size": 7})
    with pytest.raises(UserError, match=r"^--batch_size 8 contradicts a\.ckpt, which has 7; leave it out"):
        take_settings(load("--batch_size", "8"), "a.ckpt", {"batch_size": 7})
    with pytest.raises(UserError, match=r"^--data_path e contradicts a\.ckpt, which has d; put it right$"):
        take_settings(load("--data_path", "e"), "a.ckpt", {"data_url": "d"}, "put it right")


GOOD = {"batch_size": 2, "crop_scale": [0.1, 1.0], "crop_ratio": [0.75, 1.5], "epochs": 3, "warm": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1}, "--batch_size must be at least 2"),
        ({"crop_scale": [0.5]}, "--crop_scale takes two rising numbers"),
        ({"crop_ratio": [1.5, 0.75]}, "--crop_ratio takes two rising numbers"),
        ({"crop_scale": [0.5, 1.1]}, "cannot be larger than the image"),
        ({"warm": 3.5}, r"the warm-up of 3\.5 epochs is longer than --epochs 3"),
        ({"finetune": True}, "give it with --start"),
    ],
)
def test_settings_of_a_training_that_do_not_go_together(change, message):
    settings = {**GOOD, "finetune": False, "start": None}
    check_training(argparse.Namespace(**settings), "start", "warm")
    with pytest.raises(UserError, match=message):
        check_training(argparse.Namespace(**{**settings, **change}), "start", "warm")
