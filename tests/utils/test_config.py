"""Settings from file and command line: aliases, own values, and what is refused."""

import argparse
import os

import pytest
from conftest import ROOT, one_line_error, run_script

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
    whole,
    yes_no,
)

SETTINGS = {
    "data_url": Setting("data", str, ("train", "eval"), aliases=("data_path",)),
    "batch_size": Setting("batch", natural, ("train", "eval", "export"), own={"export": 1}),
    "mode": Setting("mode", str, ("train",), ("batch", "pair"), aliases=("way",)),
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
        ([], FILE.replace("mode: pair", "mode: none"), "mode: it must be one of batch, pair"),
        ([], FILE.replace("mode: pair, ", ""), "lacks the key mode"),
        ([], FILE.replace("512", "2.5"), "2.5 is not a whole number"),
        ([], FILE.replace("512", ".inf"), "inf is not a whole number"),
        ([], FILE.replace("512", "{fit: 3}"), "batch_size knows eval, export, train, not fit"),
        ([], FILE.replace("[0.5, 1.]", "0.5"), "beta: it takes a list"),
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


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("data_url: d", "data_url: null", "data_url: 'none' is no value"),
        ("data_url: d", "data_url: ", "data_url: 'none' is no value"),
        ("data_url: d", 'data_url: ""', "data_url: '' is no value"),
        ("data_url: d", r'data_url: "a\0b"', "data_url: .* is no value"),
        ("data_url: d", r'data_url: "a\ud800b"', "data_url: .* is no value"),
        ("data_url: d", "data_url: d, data_url: d", "has data_url twice, again in line 1"),
        ("data_url: d", "data_url: d, data_path: d", "two values for data_url"),
        ("data_url: d", "data_url: !!binary d", "data_url has a tag, tag:yaml.org,2002:binary"),
        ("data_url: d", "data_url: !!python/name:os.system d", "data_url has a tag"),
        ("data_url: d", "data_url: [d]", "data_url: it takes one value, not a list"),
        ("data_url: d", "data_url: {train: {eval: d}}", "data_url: train is not one value"),
        ("data_url: d", "data_url: {train: d, train: d}", "data_url has train twice"),
        ("data_url: d", "[data_url]: d", "is not one value"),
        ("data_url: d", r'data_url: "\UFFFFFFFF"', "is not valid YAML"),
        ("512", "0x10", "batch_size: 0x10 is not a whole number"),
        ("512", "1:30", "batch_size: 1:30 is not a whole number"),
        ("512", "9" * 5000, "batch_size: 9{40} is not a whole number"),
        ("512", "1e999999999", "is not a whole number"),
        ("512", "true", "batch_size: true is not a whole number"),
        ("512", "4294967297", "batch_size: 4294967297 is not a whole number from 0 to 2147483647"),
        ("[0.5, 1.]", "[0.5, .nan]", "beta: .nan is not a number"),
        ("[0.5, 1.]", "[0.5, [1.]]", "beta is not one value"),
        ("[0.5, 1.]", "&a [*a, *a]", "beta is not one value"),
        ("[0.5, 1.]", "[0.5, 2001-01-01]", "beta: 2001-01-01 is not a number"),
        ("strict: false", "strict: 0", "0 is neither true nor false"),
    ],
)
def test_values_that_yaml_takes_for_something(load, old, new, message):
    with pytest.raises(UserError, match=message):
        load(text=FILE.replace(old, new))


def test_a_value_means_what_it_means_on_the_command_line(load):
    """For YAML 010 is 8, 1_0 is 10, 2001-01-01 a date and 1.10 the number 1.1."""
    for text in ("010", "2001-01-01", "1.10", "0x10", "yes"):
        assert load(text=FILE.replace("data_url: d", f"data_url: {text}")).data_url == text
    assert load(text=FILE.replace("512", "010")).batch_size == load("--batch_size", "010").batch_size == 10
    assert load(text=FILE.replace("512", "{train: &a 7, eval: *a}"), command="eval").batch_size == 7
    for text in ("null", "~", "", "none"):
        assert load(text=FILE.replace("limit: none", f"limit: {text}")).limit is None
    assert [load(text=FILE.replace("false", text)).strict for text in ("yes", "off", "TRUE")] == [True, False, True]


def test_whole_numbers_are_exact():
    read = whole(0, 2**64)
    assert [read(text) for text in ("9007199254740993", "8.", "1e3")] == [9007199254740993, 8, 1000]


def test_anchors_do_not_expand(load):
    """Each line holds the one before ten times, which makes 10**30 values."""
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30))]
    for text in ("\n".join(lines), "\n".join([*lines, "data_url: *a29"]), "&a {data_url: *a}", "{*a : &a b}"):
        with pytest.raises(UserError):
            load(text=text)
    with pytest.raises(UserError, match="bytes, far more than a config"):
        load(text="#" * 100_000)


@pytest.mark.parametrize("folder", ["DRNet", "ResNeSt", "DynamicQuant", "DDRNet"])
def test_odd_places_are_refused_in_one_line_in_every_folder(tmp_path, folder):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    long = "x" * 300
    rows = [
        (["--config_path", tmp_path / "fifo"], "no regular file; set --config_path"),
        (["--config_path", long], "File name too long"),
        (["--output_dir", long], f"cannot write to {long}: File name too long"),
        (["--resume", long], "no checkpoint at"),
        (["--data_path", tmp_path / long], "File name too long"),
        (["--data_path", tmp_path / "loop" / "x"], "set --data_path"),
        (["--rank_table_file", tmp_path / "fifo"], "no regular file"),
        (["--seed", "4294967296"], "from 0 to 4294967295"),
        (["--epochs", "4294967296"], "from 1 to 10000"),
        (["--batch_size", "65537"], "from 0 to 4096"),
        (["--image_size", "1048576"], "8192"),
        (["--num_workers", "2147483648"], "whole number from 0 to"),
    ]
    stage = {"DRNet": ["--stage", "pretrain"], "DynamicQuant": ["--stage", "float"]}.get(folder, [])
    for words, wanted in rows:
        words = ["train.py", *stage, "--output_dir", tmp_path / "out", *words]
        if "--output_dir" in words[-2:]:
            words[-4:-2] = []
        assert wanted in one_line_error(run_script(*words, cwd=ROOT / folder, timeout=60)), words


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
    with pytest.raises(UserError, match=r"^--way batch contradicts a\.ckpt, which has pair; put it right$"):
        take_settings(load("--way", "batch"), "a.ckpt", {"mode": "pair"}, "put it right")


@pytest.mark.parametrize(
    "told",
    [
        *({"batch_size": value} for value in ("seven", -1, 1.5, True, None, [7], {"train": 7}, float("nan"), 10**400)),
        *({"beta": value} for value in (0.1, [2], ["x"], [None], [[0.1]], {"a": 1})),
        *({"mode": value} for value in ("other", 1, None, ["pair"], {})),
        {"data_url": "elsewhere"},  # where the user's files are no other file says
    ],
    ids=str,
)
def test_what_a_file_tells_is_read_as_the_command_line_would(load, told):
    args = load()
    before = dict(vars(args))
    with pytest.raises(UserError, match=rf"^a\.ckpt tells no usable {next(iter(told))}: .*; give another file$"):
        take_settings(args, "a.ckpt", told)
    assert vars(args) == before


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
