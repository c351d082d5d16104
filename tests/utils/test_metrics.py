"""Metrics against NumPy's stable sort, scikit-learn and hand-worked numbers; progress on a pty; the result files."""

import csv
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from conftest import ROOT
from sklearn.metrics import top_k_accuracy_score

from utils.cli import UserError
from utils.metrics import Progress, Throughput, TopKAccuracy, write_results, write_rows

INF = float("inf")


def by_sorting(logits, labels, k) -> float:
    order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")
    return float(np.mean([label in row[:k] for row, label in zip(order, labels)]))


def shares(accuracy) -> dict:
    return {int(k): correct / accuracy.total for k, correct in zip(accuracy.ks, accuracy.correct)}


def random_batch(seed, n, classes, choices, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.choice(choices, (n, classes)).astype(dtype), rng.integers(0, classes, n)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
@pytest.mark.parametrize("classes", [1, 3, 10, 50])
def test_ties_are_broken_as_by_a_stable_sort(classes, dtype):
    logits, labels = random_batch(classes, 500, classes, [0, 1, 2], dtype)
    accuracy = TopKAccuracy((1, 2, 5, 10))
    accuracy.update(logits, labels)
    assert shares(accuracy) == pytest.approx({k: by_sorting(logits, labels, k) for k in (1, 2, 5, 10)}, abs=1e-12)


def test_agrees_with_sklearn_without_ties():
    rng = np.random.default_rng(1)
    logits = rng.permutation(1000 * 20).reshape(1000, 20).astype(np.float32)
    labels = rng.integers(0, 20, 1000)
    accuracy = TopKAccuracy((1, 3, 5))
    accuracy.update(logits, labels)
    for k, value in shares(accuracy).items():
        assert value == pytest.approx(top_k_accuracy_score(labels, logits, k=k, labels=range(20)), abs=1e-12)


def test_by_hand():
    accuracy = TopKAccuracy((1, 2))
    accuracy.update([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3], [0.3, 0.3, 0.3], [1, 2, 3]], [1, 0, 2, 1])
    # ranks of the labels: 0, 0 (tie, first), 2 (tie, last), 1
    assert accuracy.correct.tolist() == [2, 3] and accuracy.total == 4
    assert shares(accuracy) == {1: 0.5, 2: 0.75}


def test_uneven_batches_make_one():
    logits, labels = random_batch(3, 103, 9, [0, 1, 2, 3])
    whole, parts = TopKAccuracy(), TopKAccuracy()
    whole.update(logits, labels)
    for batch in (slice(0, 1), slice(1, 1), slice(1, 64), slice(64, 102), slice(102, 103)):
        parts.update(logits[batch], labels[batch])
    assert shares(parts) == shares(whole)
    assert (parts.correct.tolist(), parts.total) == (whole.correct.tolist(), 103)


def test_fewer_classes_than_k():
    accuracy = TopKAccuracy((1, 5))
    accuracy.update([[0, 1, 2], [2, 1, 0]], [0, 0])
    assert shares(accuracy) == {1: 0.5, 5: 1.0}


def test_nothing_counted_yet():
    accuracy = TopKAccuracy()
    accuracy.update(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    assert accuracy.total == 0 and accuracy.correct.tolist() == [0, 0] and accuracy.shown() == "-"


def test_nan_is_refused_and_not_counted():
    accuracy = TopKAccuracy()
    accuracy.update([[0.0, 1.0]], [1])
    with pytest.raises(UserError, match="NaN or infinity"):
        accuracy.update([[0.0, 1.0], [float("nan"), 0.0]], [1, 1])
    assert accuracy.total == 1 and accuracy.correct.tolist() == [1, 1]


@pytest.mark.parametrize(
    "logits, labels",
    [
        ([[0, 1]], [2]),
        ([[0, 1]], [-1]),
        ([[0, 1]], [0, 1]),
        ([[0, 1]], [[0]]),
        ([0, 1], [0, 1]),
        ([[[0, 1]]], [0]),
        (np.zeros((2, 0)), [0, 0]),
    ],
)
def test_shapes_and_labels_that_do_not_fit(logits, labels):
    accuracy = TopKAccuracy()
    with pytest.raises(ValueError):
        accuracy.update(logits, labels)
    assert accuracy.total == 0


@pytest.mark.parametrize("ks", [(), (0,), (1, -1)])
def test_bad_ks(ks):
    with pytest.raises(ValueError):
        TopKAccuracy(ks)


def test_throughput_is_images_over_wall_time():
    before = time.perf_counter()
    meter = Throughput()
    begun = time.perf_counter()
    meter.update(30)
    meter.update(70)
    time.sleep(0.05)
    done = time.perf_counter()
    rate = meter.rate()
    assert 100 / (time.perf_counter() - before) <= rate <= 100 / (done - begun)
    meter.reset()
    assert meter.rate() == 0


def test_progress_in_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr(Progress, "LINE_SECONDS", 0)
    with Progress("epoch 3/9", 200, done=40) as progress:
        progress.update(32, loss="0.50", top1="12.00%")
        progress.update(8)
    out, err = capsys.readouterr()
    number = r"\d+\.\d images/s"
    assert re.fullmatch(
        rf"epoch 3/9: 72/200 images, {number}, loss 0\.50, top1 12\.00%\nepoch 3/9: 80/200 images, {number}\n", out
    )
    assert err == ""


def test_progress_says_nothing_until_it_is_time_or_if_not_wanted(monkeypatch, capsys):
    with Progress("soon", 2) as progress:
        progress.update(1)
    monkeypatch.setattr(Progress, "LINE_SECONDS", 0)
    with Progress("hidden", 2, show=False) as progress:
        progress.update(1)
    assert capsys.readouterr() == ("", "")


ON_TERMINAL = """
import sys, time
from utils.metrics import Progress
with Progress("epoch 1", 64, done=16, show=sys.argv[1] == "show") as progress:
    for _ in range(3):
        time.sleep(0.12)  # tqdm draws every 0.1 s
        progress.update(16, loss="0.25")
"""


@pytest.mark.parametrize("show, columns", [(True, 120), (True, 0), (False, 120)])
def test_progress_on_a_terminal_is_a_bar(show, columns):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    command = [sys.executable, "-c", ON_TERMINAL, "show" if show else "hide"]
    with subprocess.Popen(command, cwd=ROOT, stdout=end, stderr=subprocess.PIPE, text=True) as process:
        os.close(end)
        screen = b""
        try:
            while part := os.read(terminal, 4096):
                screen += part
        except OSError:  # how Linux says that the other end is closed
            pass
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    os.close(terminal)
    if show:
        last = re.sub(r"\r\s*$", "", screen.decode()).split("\r")[-1]
        assert re.search(r"epoch 1: 100%\|.*\| 64/64 \[.*img/s, loss=0\.25\]", last), screen
        assert screen.count(b"\n") == 0 and re.search(rb"\r +\r$", screen)  # drawn in place, removed at the end
    else:
        assert screen == b""


def test_results_are_json(tmp_path):
    results = {"top1": 71.25, "route": {"224": 10}, "name": "café", "none": None, "list": [1, 2]}
    path = tmp_path / "new" / "results.json"
    write_results(path, results)
    assert json.loads(path.read_text()) == results and path.read_text().endswith("}\n")
    write_results(path, {"top1": 1})
    assert json.loads(path.read_text()) == {"top1": 1} and os.listdir(path.parent) == ["results.json"]


@pytest.mark.parametrize("value, error", [(float("nan"), ValueError), (INF, ValueError), ({1}, TypeError)])
def test_results_that_are_no_json_leave_the_old_file(tmp_path, value, error):
    path = tmp_path / "results.json"
    write_results(path, {"old": 1})
    with pytest.raises(error):
        write_results(path, {"new": 1, "bad": value})
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["results.json"]


def test_rows_are_csv(tmp_path):
    path = tmp_path / "new" / "metrics.csv"
    rows = [{"path": 'a, "b"\nc.png', "label": 3}, {"path": "caf\udce9.png", "label": None}, {"label": 0.1, "top1": 5}]
    write_rows(path, rows)
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        read = list(csv.DictReader(file))
    assert read == [
        {"path": 'a, "b"\nc.png', "label": "3", "top1": ""},
        {"path": "caf\udce9.png", "label": "", "top1": ""},
        {"path": "", "label": "0.1", "top1": "5"},
    ]
    assert path.read_bytes().startswith(b"path,label,top1\n") and b"\r" not in path.read_bytes()


def test_no_rows(tmp_path):
    write_rows(tmp_path / "none.csv", [])
    assert (tmp_path / "none.csv").read_text().strip() == ""


class Unprintable:
    def __str__(self):
        raise RuntimeError("in the middle")


def test_rows_that_fail_in_the_middle_leave_the_old_file(tmp_path):
    path = tmp_path / "metrics.csv"
    write_rows(path, [{"a": 1}])
    with pytest.raises(RuntimeError, match="in the middle"):
        write_rows(path, [{"a": 2}] * 1000 + [{"a": Unprintable()}])
    assert path.read_text() == "a\n1\n" and os.listdir(tmp_path) == ["metrics.csv"]
