"""Folders, labels, the order of training, and the processes that read images."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import ROOT
from PIL import Image

from utils.cli import UserError
from utils.images import ImageFolder, Loader, epoch_rows, open_split


@pytest.fixture
def folder(tmp_path):
    """Three classes of 5, 4 and 3 small images of varied shapes; the pixels are noise."""
    rng = np.random.default_rng(0)
    for name, count in (("a", 5), ("b", 4), ("c", 3)):
        (tmp_path / "val" / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 255, (40 + k, 52 - k, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{k}.JPEG")
    return ImageFolder(tmp_path / "val")


def test_labels_and_order(folder):
    assert folder.classes == ["a", "b", "c"]
    assert [path.parent.name for path in folder.paths] == ["a"] * 5 + ["b"] * 4 + ["c"] * 3
    assert folder.labels.tolist() == [0] * 5 + [1] * 4 + [2] * 3


def test_classes_txt_keeps_the_labels_of_the_whole_data_set(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("0\na\nb\nb2\nc\n")
    labels = open_split(tmp_path, "val", 5).labels
    assert sorted(set(labels.tolist())) == [1, 2, 4]
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"c is not in .*classes\.txt"):
        open_split(tmp_path, "val", 2)


def test_a_split_itself_may_be_given(folder, tmp_path):
    assert len(open_split(tmp_path / "val", "val", 3)) == len(open_split(tmp_path, "val", 3)) == 12


def test_bad_folders(folder, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        open_split(tmp_path / "nowhere", "val", 3)
    with pytest.raises(UserError, match="has no train/"):
        open_split(tmp_path, "train", 3)
    with pytest.raises(UserError, match="set --num_classes 3"):
        open_split(tmp_path, "val", 1000)
    (tmp_path / "val" / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no images"):
        open_split(tmp_path, "val", 4)
    with pytest.raises(UserError, match="no class folders"):
        open_split(tmp_path / "val" / "a", "val", 3)


def view(path, row, epoch):
    """The image's top left corner, with row and epoch in two of its values."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), np.float32)[:4, :4].transpose(2, 0, 1).copy()
    pixels[0, 0, :2] = row, epoch
    return pixels


def read(folder, rows, batch_size, num_workers, epoch=0):
    with Loader(folder, view, (3, 4, 4), batch_size, num_workers) as loader:
        return [(batch.images.copy(), batch.labels, batch.rows, batch.corrupt) for batch in loader.batches(rows, epoch)]


@pytest.mark.parametrize(("batch_size", "num_workers"), [(5, 1), (4, 3), (50, 2), (1, 2)])
def test_the_loader_gives_what_the_view_gives_in_order(folder, batch_size, num_workers):
    rows = [11, 3, 3, 0, 7, 5, 1, 2, 10, 9, 4, 8, 6]
    images, labels, got, corrupt = zip(*read(folder, rows, batch_size, num_workers, epoch=6))
    wanted = np.stack([view(folder.paths[row], row, 6) for row in rows])
    np.testing.assert_array_equal(np.concatenate(images), wanted)
    assert np.concatenate(got).tolist() == rows
    assert np.concatenate(labels).tolist() == folder.labels[rows].tolist()
    assert {len(part) for part in got[:-1]} <= {batch_size} and not any(corrupt)


def test_the_loader_can_be_left_and_used_again(folder):
    with Loader(folder, view, (3, 4, 4), 2, 2) as loader:
        for _ in range(3):
            assert next(loader.batches(range(12))).rows.tolist() == [0, 1]
        assert [batch.images[0, 0, 0].tolist()[:2] for batch in loader.batches([4, 5], 9)] == [[4, 9]]
        assert list(loader.batches([])) == []


def test_the_loader_reports_corrupt_files_and_leaves_them_out(folder):
    folder.paths[3].write_bytes(folder.paths[3].read_bytes()[:100])
    folder.paths[7].write_bytes(b"")
    batches = read(folder, range(12), 5, 2)
    assert [row for batch in batches for row in batch[3]] == [3, 7]
    assert np.concatenate([batch[2] for batch in batches]).tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert [batch[0][0, 0, 0, 0] for batch in batches] == [0, 5, 10]


def test_a_killed_reading_process_is_one_clear_error(folder):
    with (
        Loader(folder, lambda *_: os.kill(os.getpid(), signal.SIGKILL), (3, 4, 4), 2, 2) as loader,
        pytest.raises(UserError, match="set --num_workers lower"),
    ):
        list(loader.batches(range(12)))


READS_FOR_EVER = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from utils.images import ImageFolder, Loader
loader = Loader(ImageFolder(Path({folder!r})), lambda *_: time.sleep(1000), (3, 4, 4), 2, 2)
batches = loader.batches(range(4))
print("ready", flush=True)
next(batches)
"""


def test_reading_processes_end_with_a_killed_parent(folder):
    code = READS_FOR_EVER.format(root=str(ROOT), folder=str(folder.paths[0].parents[1]))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_step_takes_the_same_rows_for_any_number_of_ranks():
    one = epoch_rows(103, 8, seed=3, epoch=2)
    assert len(one) == len(set(one)) == 96 and one != sorted(one)
    two = [epoch_rows(103, 4, 3, 2, rank=rank, ranks=2) for rank in (0, 1)]
    for step in range(12):
        assert one[8 * step : 8 * step + 8] == two[0][4 * step : 4 * step + 4] + two[1][4 * step : 4 * step + 4]
    assert epoch_rows(103, 8, 3, 2, first_step=5) == one[40:]
    assert epoch_rows(103, 8, 3, 1) != one and epoch_rows(103, 8, 4, 2) != one
