"""The run around a training, with steps that only count: order, interruption, resume, the best epoch, the results."""

import argparse
import csv
import json
import os
import signal
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from utils.checkpoint import read_checkpoint, read_record, save_checkpoint
from utils.cli import UserError
from utils.config import Setting, positive
from utils.device import Devices
from utils.images import ImageFolder
from utils.training import (
    Training,
    Update,
    begin,
    check_finite,
    gradient_sums,
    open_images,
    read_state,
    told_by_state,
)

STEPS, IMAGES = 3, 4


class Network(nn.Cell):
    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor([1.0, 2.0], ms.float32), name="weight")


@pytest.fixture
def folder(tmp_path):
    """A root with 13 training images in two classes, of which only the names count, and 2 validation images."""
    for split, counts in (("train", (7, 6)), ("val", (1, 1))):
        for name, count in zip("ab", counts):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for k in range(count):
                (tmp_path / "data" / split / name / f"{k}.png").touch()
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def handlers():
    """A training takes the signals over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)
    for number, handler in before.items():
        signal.signal(number, handler)


POSITION = {"epoch": 1, "step": 2, "totals": {"loss": 1.5}, "rows": [], "best": None, "kept": {}}


class Run:
    """A training of three epochs, in which every step adds 1 to the weights and the accuracies are given.

    `stop` is an (epoch, step) in which Ctrl-C is pressed; `seen` lists those that ran.
    """

    def __init__(self, folder, output, tops=(0.5, 0.7, 0.7), resume=None, stop=None, **settings):
        args = {"output_dir": str(output), "resume": resume, "strict": False, "epochs": 3, "eval_every": 1, "lr": 0.1}
        self.args = argparse.Namespace(**{**args, "fixed": ["epochs", "lr"], **settings})
        self.loaders = [SimpleNamespace(folder=ImageFolder(folder / split)) for split in ("train", "val")]
        self.tops, self.stop, self.seen = tops, stop, []
        self.network = Network()
        self.counter = {"calls": 0}

    def train(self) -> int:
        optimizer = nn.SGD(self.network.trainable_params(), 0.1)
        self.training = training = Training(
            self.args,
            Devices(),
            self.loaders,
            IMAGES,
            [self.network],
            [optimizer],
            ["best.ckpt"],
            kept={"counter": self.counter, "plain": 3},
        )
        for epoch in training.epochs():
            with training.steps(iter(range(training.step, training.steps_per_epoch))) as left:
                for step, batch in left:
                    assert step == batch
                    self.seen.append((epoch, step))
                    self.counter["calls"] += 1
                    self.network.weight.set_data(self.network.weight + 1)
                    if (epoch, step) == self.stop:
                        os.kill(os.getpid(), signal.SIGINT)
                    training.add(False, loss=10.0 * epoch + step)
            row, line = training.row(self.args.lr)
            if training.evaluates():
                line += training.keep_best({"top1": self.tops[epoch]}, lambda: self.save(training.output))
            training.tell(row, line)
        return training.finish(extra=1)

    def save(self, output):
        ms.save_checkpoint(self.network, str(output / "best.ckpt"))


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_whole_run(folder, tmp_path, capsys):
    run = Run(folder, tmp_path / "out")
    assert run.train() == 0
    assert run.seen == [(epoch, step) for epoch in range(3) for step in range(STEPS)]
    table = rows(tmp_path / "out/metrics.csv")
    assert [float(row["loss"]) for row in table] == [1.0, 11.0, 21.0]
    assert [row["epoch"] for row in table] == ["1", "2", "3"] and float(table[0]["lr"]) == pytest.approx(0.1)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results == {"best": {"epoch": 3, "top1": 0.7}, "extra": 1}  # of equal ones the last
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "CPU x 1, 13 training and 2 validation images"
    assert lines[1] == "epoch 1/3: loss 1.0000, best so far"
    assert lines[-1] == f"best: epoch 3, top-1 70.00%; {tmp_path}/out/best.ckpt"
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "out/best.ckpt")["weight"], [10, 11])


@pytest.mark.parametrize("stop", [(0, 0), (1, 1), (1, 2), (2, 2)])
def test_ctrl_c_ends_the_step_and_resume_goes_on_behind_it(folder, tmp_path, capsys, stop):
    straight = Run(folder, tmp_path / "straight")
    straight.train()
    run = Run(folder, tmp_path / "out", stop=stop)
    with pytest.raises(SystemExit) as left:
        run.train()
    assert left.value.code == 130 and run.seen[-1] == stop
    state = tmp_path / "out/resume.ckpt"
    where = f"stopped after step {stop[1] + 1} of epoch {stop[0] + 1}; go on with --resume {state}"
    assert where in capsys.readouterr().out

    again = Run(folder, tmp_path / "elsewhere", resume=str(state))
    assert again.train() == 0
    assert run.seen + again.seen == straight.seen
    assert again.counter == straight.counter and again.training.kept["plain"] == 3
    np.testing.assert_array_equal(again.network.weight.asnumpy(), straight.network.weight.asnumpy())
    for name in ("metrics.csv", "results.json"):
        one, two = ((tmp_path / place / name).read_text() for place in ("straight", "elsewhere"))
        if name == "metrics.csv":  # but for the speed
            one, two = ([row[:3] for row in csv.reader(text.splitlines())] for text in (one, two))
        assert one == two
    assert (tmp_path / "elsewhere/best.ckpt").is_file()


def test_the_best_epoch_is_kept_by_several_figures_in_order(folder, tmp_path):
    run = Run(folder, tmp_path / "out")
    run.train()
    training, saved = run.training, []

    def offer(within, top1):
        return training.keep_best({"within": within, "top1": top1}, lambda: saved.append(top1), by=("within", "top1"))

    training.best = None
    assert [offer(*figures) for figures in ((False, 0.9), (True, 0.2), (False, 0.95), (True, 0.1), (True, 0.3))] == [
        ", best so far",
        ", best so far",
        "",
        "",
        ", best so far",
    ]
    assert saved == [0.9, 0.2, 0.3] and training.best["top1"] == 0.3


def test_evaluation_every_so_many_epochs_and_at_the_end(folder, tmp_path):
    run = Run(folder, tmp_path / "out", eval_every=2)
    assert run.train() == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["best"] == {"epoch": 3, "top1": 0.7}
    evaluated = []
    for epoch in range(3):
        run.training.epoch = epoch
        evaluated.append(run.training.evaluates())
    assert evaluated == [False, True, True]


def test_a_state_of_another_run_is_refused(folder, tmp_path):
    with pytest.raises(SystemExit):
        Run(folder, tmp_path / "out", stop=(0, 1)).train()
    state = str(tmp_path / "out/resume.ckpt")
    with pytest.raises(UserError, match=r"other settings: lr 0\.1 \(now 0\.2\); resume with the same, or start anew"):
        Run(folder, tmp_path / "x", resume=state, lr=0.2).train()
    (folder / "train/a/0.png").unlink()
    with pytest.raises(UserError, match=r"images 13 \(now 12\)"):
        Run(folder, tmp_path / "x", resume=state).train()
    assert told_by_state(state, ("lr", "devices", "none")) == {"lr": 0.1, "devices": 1}
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "state",
    [
        {"settings": {}},
        {"settings": {}, "position": {"epoch": 1}},
        *({"settings": value, "position": POSITION} for value in (None, [], "lr", 3)),
        *({"settings": {}, "position": POSITION | {key: "x"}} for key in POSITION),
        *({"settings": {}, "position": POSITION | {key: None}} for key in POSITION if key != "best"),
    ],
    ids=str,
)
def test_what_is_no_position_in_a_training(tmp_path, state):
    save_checkpoint(Network().get_parameters(), tmp_path / "resume.ckpt", {"settings": {}, "position": POSITION})
    assert read_state(tmp_path / "resume.ckpt")["position"] == POSITION
    save_checkpoint(Network().get_parameters(), tmp_path / "resume.ckpt", state)
    with pytest.raises(UserError, match="is no training state; --resume takes the"):
        read_state(tmp_path / "resume.ckpt")


def test_what_is_wrong_is_said_before_anything_starts(folder, tmp_path):
    ms.save_checkpoint(Network(), str(tmp_path / "weights.ckpt"))
    args = {"resume": str(tmp_path / "weights.ckpt"), "output_dir": str(tmp_path / "o")}
    with pytest.raises(UserError, match="is no training state"):
        begin(argparse.Namespace(**args), __file__)
    (tmp_path / "file").touch()
    args = {"resume": None, "output_dir": str(tmp_path / "file/o")}
    with pytest.raises(UserError, match="cannot write to"):
        begin(argparse.Namespace(**args), __file__)
    with pytest.raises(UserError, match="no checkpoint at"):
        read_state(tmp_path / "none.ckpt")
    assert read_record(tmp_path / "weights.ckpt") == {}


def test_images_and_the_checkpoint_they_start_from(folder):
    args = {"data_path": str(folder), "num_classes": 2, "batch_size": 3, "device_num": 2, "server_num": 2}
    args |= {"image_size": 32, "given": {}, "resume": None, "table": {"num_classes": Setting("", positive, ())}}

    def opened(told, finetune=False, **change):
        names = argparse.Namespace(**{**args, **change})
        return open_images(names, "a.ckpt", told, finetune), names

    (train, val), _ = opened({})
    assert (len(train), len(val)) == (13, 2)
    with pytest.raises(UserError, match="13 training images do not fill one step of 16; set --batch_size lower"):
        opened({}, batch_size=4)
    _, names = opened({"num_classes": 2, "image_size": 64}, num_classes=9)
    assert (names.num_classes, names.image_size) == (2, 32)  # what images it is trained on is the training's own
    with pytest.raises(UserError, match=r"2 classes, not 3; add --finetune .* --num_classes 2"):
        opened({"num_classes": 3})
    opened({"num_classes": 3, "classes": ["x", "y", "z"]}, finetune=True)
    with pytest.raises(UserError, match=r"label 1 is c in a\.ckpt and b in the images; add --finetune"):
        opened({"num_classes": 2, "classes": ["a", "c"]})
    with pytest.raises(UserError, match=r"--num_classes 2 contradicts a\.ckpt, which has 3; .*--finetune"):
        opened({"num_classes": 3}, given={"num_classes": "--num_classes"})


def test_an_update_takes_the_sums_and_clears_them():
    ms.set_context(mode=ms.GRAPH_MODE)
    network = Network()
    optimizer = nn.SGD(network.trainable_params(), 0.5)
    sums = gradient_sums(optimizer.parameters)
    update = Update(optimizer, sums, 1, mean=True)
    sums[0].set_data(Tensor([2.0, -4.0], ms.float32))
    update()
    np.testing.assert_allclose(network.weight.asnumpy(), [0.0, 4.0])
    np.testing.assert_array_equal(sums[0].asnumpy(), [0.0, 0.0])
    update()
    np.testing.assert_allclose(network.weight.asnumpy(), [0.0, 4.0])


@pytest.mark.parametrize("numbers", [(np.nan, 0.0), (np.inf, 1.0), (1.0, np.nan)])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_training(numbers):
    check_finite(1.0, 2.0)
    with pytest.raises(UserError, match="training has diverged, start again with a lower --lr"):
        check_finite(*numbers)
