"""Every training key of the config has an effect: with another value, other batches or another training.

The network is a small one, because every training compiles graphs of its own; all else is what train.py runs. The fast
tests compile nothing.
"""

import csv
import functools
import importlib.util
import signal
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT, run_script
from mindspore import nn
from src.configs.settings import SETTINGS, load_config
from src.data.imagenet import TrainingBatches, evaluation_loader, training_loader

from utils.device import ONE_DEVICE
from utils.images import open_split

FOLDER = ROOT / "DDRNet"
SAMPLE = ["--config_path", str(FOLDER / "src/configs/ddrnet23_sample_cpu.yaml")]
# What the trainings have in common: everything on.
BASE = {
    "image_size": "64",
    "batch_size": "4",
    "epochs": "2",
    "warmup_length": "0.5",
    "base_lr": "2",
    "mix_up": "0.8",
    "cutmix": "1.0",
    "re_prob": "0.25",
    "drop_path_rate": "0.3",
    "flip": "0.5",
    "num_parallel_workers": "1",
}
ADAM = {"optimizer": "adamw", "base_lr": "0.2"}
DROPS = {"lr_scheduler": "multistep_lr", "lr_adjust": "1"}
# Key, other value, what both have besides BASE. First what the network is fed with, then how it is trained.
INPUT = [
    ("image_size", "96", {}),
    ("crop_scale", "0.2 0.3", {}),
    ("crop_ratio", "0.4 0.5", {}),
    ("flip", "0", {}),
    ("interpolation", "bilinear", {}),
    ("interpolation", "random", {}),
    ("auto_augment", "none", {}),
    ("auto_augment", "rand-m9-mstd0.5-inc1", {}),
    ("auto_augment", "rand-m3-mstd0.5-inc0", {}),
    ("auto_augment", "rand-m3-n4-mstd0.5-inc1", {}),
    ("color_jitter", "0", {"auto_augment": "none"}),
    ("re_prob", "1", {}),
    ("re_mode", "const", {"re_prob": "1"}),
    ("re_mode", "rand", {"re_prob": "1"}),
    ("re_count", "5", {"re_prob": "1"}),
    ("mix_up", "0", {}),
    ("cutmix", "0", {}),
    ("mixup_prob", "0", {}),
    ("switch_prob", "1", {}),
    ("switch_prob", "0", {}),
    ("mixup_mode", "pair", {}),
    ("mixup_mode", "elem", {}),
    ("mixup_off_epoch", "1", {}),
    ("label_smoothing", "0.3", {}),
    ("accumulation_step", "2", {}),
    ("batch_size", "8", {}),
    ("seed", "1", {}),
]
TRAINING = [
    ("base_lr", "1", {}),
    ("warmup_lr", "0.01", {}),
    ("min_lr", "0.01", {}),
    ("warmup_length", "1", {}),
    ("lr_scheduler", "constant_lr", {}),
    ("lr_scheduler", "exp_lr", DROPS),
    ("lr_adjust", "2", DROPS),
    ("lr_gamma", "0.5", DROPS),
    ("epochs", "3", {}),
    ("optimizer", "adamw", {}),
    ("optimizer", "lamb", {}),
    ("optimizer", "rmsprop", {}),
    ("use_nesterov", "false", {}),
    ("momentum", "0.5", {}),
    ("beta", "0.5 0.9", ADAM),
    ("decay", "0.5", {"optimizer": "rmsprop"}),
    ("weight_decay", "0.1", {}),
    ("clip_global_norm", "false", {"clip_global_norm_value": "0.01"}),
    ("clip_global_norm_value", "0.01", {}),
    ("amp_level", "O1", {}),
    ("amp_level", "O2", {}),
    ("keep_bn_fp32", "false", {"amp_level": "O2"}),
    ("loss_scale", "64", {}),
    ("is_dynamic_loss_scale", "false", {"amp_level": "O3", "keep_bn_fp32": "false", "loss_scale": "16777216"}),
    ("drop_path_rate", "0.6", {}),
    ("crop_pct", "0.5", {}),
    ("eval_every", "2", {}),
]
RATES = {"base_lr", "warmup_lr", "min_lr", "warmup_length", "lr_scheduler", "lr_adjust", "lr_gamma"}
# Tested elsewhere, with what they need.
ELSEWHERE = {
    *("arch", "set", "num_classes", "data_url", "num_parallel_workers", "strict", "output_dir"),  # test_commands.py
    *("pretrained", "finetune", "resume", "device_target", "device_id", "device_num"),  # test_commands.py
    *("rank_table_file", "server_num", "server_rank", "master_addr", "master_port"),  # tests/utils/test_launcher.py
    *("run_modelarts", "train_url", "save_every"),  # test_moxing.py
}


class Small(nn.Cell):
    """A convolution, a BN, a residual that can be dropped, a dense layer."""

    def __init__(self, num_classes: int, drop_path_rate: float):
        super().__init__()
        self.rate = drop_path_rate
        self.conv = nn.Conv2d(3, 4, 3, 8)
        self.bn = nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 4, 3)
        self.linear = nn.Dense(4, num_classes)

    def sample_keep(self, count, rng):
        return ((rng.random((count, 1)) >= self.rate) / (1 - self.rate)).astype(np.float32)

    def construct(self, images, keep=None):
        x = self.bn(self.conv(images))
        residual = self.deep(x)
        if keep is not None:
            residual = residual * keep.astype(residual.dtype).reshape((-1, 1, 1, 1))
        return self.linear((x + residual).mean((2, 3)))


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("ddrnet_train", FOLDER / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.get_network = lambda args, rate: Small(args.num_classes, rate)
    module.plot = lambda *words: None  # takes longer than the training; test_commands.py looks at it
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Eight training and eight validation images of two classes, more colourful than digits."""
    place = tmp_path_factory.mktemp("keys")
    words = ["--output", place / "data", "--images", "4", "--classes", "2", "--size", "100"]
    assert run_script(ROOT / "utils/sample_imagenet.py", *words, cwd=place).returncode == 0
    return place


def settings(place, values: dict, output="out"):
    words = [word for key, value in values.items() for word in (f"--{key}", *value.split())]
    common = ["--data_path", str(place / "data"), "--num_classes", "2", "--output_dir", str(place / output)]
    return load_config("train", "", [*SAMPLE, *common, *words])


@pytest.fixture(scope="module")
def batches(place):
    """Two epochs of what the network is fed with: a list of (images, targets) for each step."""

    @functools.cache
    def batches(values: tuple) -> list:
        args = settings(place, dict(values))
        with training_loader(open_split(args.data_url, "train", 2), args) as loader:
            stream = TrainingBatches(loader, args)
            return [
                [(images.tobytes(), targets.tobytes()) for images, targets, _ in parts]
                for epoch in range(2)
                for parts in stream.epoch(epoch)
            ]

    return lambda values: batches(tuple(values.items()))


@pytest.mark.parametrize(("key", "value", "common"), INPUT, ids=lambda value: str(value)[:30])
def test_another_value_feeds_the_network_otherwise(batches, key, value, common):
    common = {**BASE, **common}
    assert batches(common) != batches({**common, key: value})


def test_the_same_settings_give_the_same_batches_with_any_number_of_processes(batches):
    assert batches(BASE) == batches({**BASE, "num_parallel_workers": "3"})


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(ms.PYNATIVE_MODE, id="pynative"),
        pytest.param(ms.GRAPH_MODE, id="graph", marks=pytest.mark.full),  # as train.py; each training compiles
    ],
)
def record(train, place, request):
    """What a training with these settings leaves: the rows of steps.csv and of metrics.csv."""
    ms.set_context(mode=request.param)
    known = {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def record(values: dict) -> list[list[dict]]:
        if (key := str(values)) not in known:
            args = settings(place, values, f"out/{request.param}/{len(known)}")
            folders = [open_split(args.data_url, split, 2) for split in ("train", "val")]
            with training_loader(folders[0], args) as train_loader, evaluation_loader(folders[1], args) as val_loader:
                assert train.train(args, ONE_DEVICE, train_loader, val_loader) == 0
            rows = [
                list(csv.DictReader((Path(args.output_dir) / name).open())) for name in ("steps.csv", "metrics.csv")
            ]
            for row in rows[1]:
                row.pop("train_images_per_s")
            known[key] = rows
        return known[key]

    yield record
    ms.set_context(mode=ms.GRAPH_MODE)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("key", "value", "common"), TRAINING, ids=lambda value: str(value)[:30])
def test_another_value_makes_another_training(record, key, value, common):
    common = {**BASE, **common}
    one, other = record(common), record({**common, key: value})
    if key not in ("epochs", "eval_every", "crop_pct", "loss_scale", "is_dynamic_loss_scale"):
        # Not what is only written down, but what comes of it. Without a graph MindSpore's SGD stays at its first rate.
        written = key in RATES and ms.get_context("mode") == ms.PYNATIVE_MODE
        columns = ("loss", "grad_norm", "lr") if written else ("loss", "grad_norm")
        one, other = ([[row[name] for name in columns] for row in steps] for steps, _ in (one, other))
    assert one != other


def test_the_same_settings_make_the_same_training(record):
    (steps, metrics), (again, metrics_again) = record(BASE), record({**BASE, "num_parallel_workers": "3"})
    for one, two in zip(steps, again):
        assert [float(value) for value in one.values()] == pytest.approx([float(v) for v in two.values()], abs=1e-5)
    assert metrics[-1]["top1"] == metrics_again[-1]["top1"]


def test_no_training_key_is_forgotten():
    keys = {key for key, setting in SETTINGS.items() if "train" in setting.users}
    assert keys - ELSEWHERE == {key for key, _, _ in INPUT + TRAINING}
