"""Folders, labels, the order of training, and the processes that read images."""

import codecs
import io
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
import warnings

import cv2
import numpy as np
import psutil
import pytest
from conftest import ROOT, one_line_error, run_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from utils.cli import UserError
from utils.images import ImageFolder, Loader, Unreadable, epoch_rows, open_image, open_split, rgb


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


def files(root, *names):
    """Empty files, which are images or not by their names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


ACCENT = "caf\u00e9"  # one letter, which macOS writes as two in names of folders


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffb\ncafé\na\n".encode(),
        "b\r\ncafé\r\na\r\n".encode("utf-8-sig"),
        "b\rcafé\ra".encode(),
        "b\ncafé\na".encode("utf-16"),
        codecs.BOM_UTF16_BE + "b\r\n\r\n café \r\na".encode("utf-16-be"),
        unicodedata.normalize("NFD", "b\ncafé\na").encode(),
    ],
)
def test_class_lists_as_other_systems_write_them(tmp_path, content):
    for form in ("NFC", "NFD"):
        files(tmp_path / form, "val/a/1.jpg", "val/b/1.jpg", f"val/{unicodedata.normalize(form, ACCENT)}/1.jpg")
        (tmp_path / form / "classes.txt").write_bytes(content)
        folder = open_split(tmp_path / form, "val", 3)
        assert folder.classes == ["b", ACCENT, "a"] and folder.labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (
            "n01440764 tench, Tinca tinca\nn01443537 goldfish\n",
            "n01440764 tench, Tinca tinca'; leave the folder's name",
        ),
        ("0 n01440764\n1 n01443537\n", "there is '0 n01440764'; leave the folder's name alone in it"),
        ("{0: 'n01440764',\n 1: 'n01443537'}", "leave the folder's name alone in it, and the lines in label order"),
        ("tench\ncrane\ncrane\n", "such as 'tench', are names of class folders in label order: add it or"),
        ("n01440764\nn01443537\nn01440764\n", "lists n01440764 twice"),
        ("n01440764\0\n", "lists no classes as text"),
        ("\n\n", "lists no classes as text"),
        (b"n01440764\n\xe9", "is not UTF-8 text"),
        (codecs.BOM_UTF16_LE + b"n\0\x00", "is not UTF-8 text"),
    ],
)
def test_class_lists_of_another_form_get_advice_that_helps(tmp_path, content, advice):
    files(tmp_path, "val/n01440764/1.jpg", "val/n01443537/1.jpg")
    (tmp_path / "classes.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(advice)):
        open_split(tmp_path, "val", 2)


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (
            ["val/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000002.JPEG"],
            "sort its 2 images into {}/val/<class>/",
        ),
        (["train/a/1.jpg", "validation/a/1.jpg"], "has no val/; rename the folder of those images to val, or set"),
        (["training/a/1.jpg", "testing/a/1.jpg"], "{0}/testing/a; move them up into {0}/testing, or, if their folders"),
        (["ILSVRC/Data/CLS-LOC/train/a/1.jpg"], "set --data_path to {}/ILSVRC/Data/CLS-LOC, which has train/"),
        (["ILSVRC/Annotations/x.xml", "ILSVRC/Data/CLS-LOC/val/1.jpg"], "set --data_path to {}/ILSVRC/Data/CLS-LOC"),
        (["val/a/images/1.jpg"], "{0}/val/a/images; move them up into {0}/val/a, or"),
        (
            ["val/images/1.jpg", "val/annotations.txt"],
            "has one class folder only, images; sort the images of 2 classes",
        ),
        (["val/n01440764.tar", "val/n01443537.tar"], "unpack n01440764.tar and what else is packed there"),
        (["ILSVRC2012_img_val.tar"], "unpack ILSVRC2012_img_val.tar"),
        (["val/a/1.jpg", "val/b/b.zip"], "unpack b.zip"),
        (["val/a/1.jpg", "val/b/1.tif"], "belong into {}/val/<class>/: fill it or remove it"),
        (["val/a/1.jpg", "val/b/._1.jpg"], "b holds no images; "),
    ],
)
def test_folders_as_data_sets_come_get_advice_that_helps(tmp_path, names, advice):
    files(tmp_path, *names)
    with pytest.raises(UserError, match=re.escape(advice.format(tmp_path))):
        open_split(tmp_path, "val", 2)


def test_what_is_left_out_or_empty_is_said_once(tmp_path, capsys):
    names = ("a/1.jpg", "a/2.TIFF", "a/3.tiff", "a/notes", "a/._1.jpg", "a/.DS_Store", "b/1.PNG", "1.jpg", "x.csv")
    files(tmp_path / "val", *names)
    (tmp_path / "val" / "c").mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    folder = open_split(tmp_path, "val", 3)
    assert [path.name for path in folder.paths] == ["1.jpg", "1.PNG"]
    assert capsys.readouterr().err == ""  # it may yet end with an error, which is one line
    for _ in range(2):
        folder.say()
    empty, left = capsys.readouterr().err.splitlines()
    assert empty == f"warning: class folder {tmp_path}/val/c holds no images"
    assert left.startswith(
        f"warning: 4 files of {tmp_path}/val are left out, not being .jpg, .jpeg, .png, .bmp, .webp "
    )
    assert sorted(left.split(": ")[-1].split(", ")) == ["1 in no class folder", "1 without ending", "2 .tiff"]
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(UserError, match="c holds no images"):  # its labels would be others without it
        open_split(tmp_path, "val", 3)


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        ([str(k) for k in range(11)], "10 before 2"),
        (["class9", "class10"], "class10 before class9"),
        (["Zebra", "apple"], "Zebra before apple"),
        ([str(k) for k in range(10)], None),
        (["n01440764", "n01443537", "n02085620"], None),
        (["007", "010"], None),
    ],
)
def test_a_surprising_order_is_said_and_kept(tmp_path, capsys, names, pair):
    files(tmp_path / "val", *(f"{name}/1.jpg" for name in names))
    folder = open_split(tmp_path, "val", None)
    folder.say()
    assert folder.classes == sorted(names)
    err = capsys.readouterr().err
    assert (f"{pair}; where a model counts otherwise, list them in its order in {tmp_path}/classes.txt" in err) == bool(
        pair
    )
    (tmp_path / "classes.txt").write_text("\n".join(names))
    folder = open_split(tmp_path, "val", None)
    folder.say()
    assert folder.classes == names and capsys.readouterr().err == ""


# ----- what image files show -----

GREYS = np.tile(np.arange(0, 256, 5, dtype=np.uint8), (8, 1))
COLOURS = np.stack([GREYS, GREYS[:, ::-1], GREYS // 2], 2)
PALETTE = Image.fromarray(COLOURS).quantize(16)
SEEN = {  # an image, what it is written as, what is to be seen, and what is said of it
    "1": (Image.fromarray(GREYS > 99), "PNG", 255 * (GREYS > 99), None),
    "L": (Image.fromarray(GREYS), "PNG", GREYS, None),
    "I;16": (Image.fromarray(GREYS.astype(np.uint16) * 256 + 255), "PNG", GREYS, "16 bits, of which the upper 8"),
    "RGB": (Image.fromarray(COLOURS), "BMP", COLOURS, None),
    "P": (PALETTE, "PNG", np.asarray(PALETTE.convert("RGB")), None),
    "P with transparency": (PALETTE, "PNG transparency", np.asarray(PALETTE.convert("RGB")), "transparent in places"),
    "LA": (Image.fromarray(np.stack([GREYS, GREYS], 2), "LA"), "PNG", GREYS, "transparent in places"),
    "RGBA": (Image.fromarray(np.dstack([COLOURS, GREYS])), "PNG", COLOURS, "transparent in places"),
    "opaque RGBA": (Image.fromarray(np.dstack([COLOURS, 0 * GREYS + 255])), "PNG", COLOURS, None),
    "animation": (Image.fromarray(COLOURS), "PNG append_images", COLOURS, "of its 2 pictures the first is used"),
}


@pytest.mark.parametrize("kind", SEEN)
def test_what_an_image_shows_is_read_or_something_is_said(tmp_path, kind):
    image, how, wanted, said = SEEN[kind]
    options = {"transparency": bytes(range(16)), "append_images": [PALETTE.convert("RGB")]}
    chosen = {name: value for name, value in options.items() if name in how}
    image.save(tmp_path / "x.jpg", how.split()[0], save_all="append_images" in chosen, **chosen)
    with warnings.catch_warnings(record=True) as caught, open_image(tmp_path / "x.jpg") as file:
        warnings.simplefilter("always")
        pixels = np.asarray(rgb(file))
    np.testing.assert_array_equal(
        pixels, np.broadcast_to(wanted if wanted.ndim == 3 else wanted[..., None], pixels.shape)
    )
    texts = [str(warning.message) for warning in caught]
    assert [said in text for text in texts] == [True] if said else texts == []


@pytest.mark.parametrize(
    "kind", ["TIFF", "GIF", "SPIDER", "AVIF", "PCX", "BLP", "fifo", "folder", "loop", "long", "none"]
)
def test_only_the_listed_formats_are_opened(tmp_path, kind):
    """Damaged, too, some of the others raise what nobody expects of an image; a FIFO would block."""
    path = tmp_path / "x.jpg"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "long":
        Image.new("L", (70_000, 1)).save(path, "PNG")
    elif kind != "none":
        image = Image.new("P" if kind == "BLP" else "F" if kind == "SPIDER" else "RGB", (64, 64))
        content = io.BytesIO()  # not the file: SPIDER would take .jpg for its own ever after
        image.save(content, kind)
        path.write_bytes(content.getvalue()[:-30])
    with pytest.raises(Unreadable):
        open_image(path)


def test_remarks_of_libraries_have_the_name_of_a_file(folder, capfd):
    """libjpeg's, which OpenCV lets through, and Pillow's: each text once. Nothing else is written."""
    content = folder.paths[3].read_bytes()
    for row in (3, 4):
        folder.paths[row].write_bytes(content[:-40] + b"\xff\xd9")
    Image.new("1", (9500, 9500)).save(folder.paths[7], "PNG")

    def look(path, row, epoch):
        cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), 1) if row < 7 else open_image(path)
        return np.zeros((3, 4, 4), np.float32)

    with Loader(folder, look, (3, 4, 4), 5, 2) as loader:
        assert sum(len(batch.rows) for _ in range(2) for batch in loader.batches(range(9))) == 18
    jpeg, pixels = capfd.readouterr().err.splitlines()
    assert jpeg.startswith(f"warning: {folder.paths[3]}: Corrupt JPEG data")
    assert pixels.startswith(f"warning: {folder.paths[7]}: Image size (90250000 pixels) exceeds")


FAKE = 'raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")'


@pytest.mark.parametrize("words", [["DDRNet/train.py"], ["utils/sample_imagenet.py", "--output", "x"]])
def test_opencv_without_libgl_is_one_line(tmp_path, words):
    (tmp_path / "cv2.py").write_text(FAKE)
    result = run_process(ROOT / words[0], *words[1:], cwd=tmp_path, PYTHONPATH=str(tmp_path))
    error = one_line_error(result)
    assert (
        "libGL.so.1" in error and "apt-get install libgl1 libglib2.0-0, or pip install opencv-python-headless" in error
    )
    assert not (tmp_path / "x").exists()


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


# ----- any bytes -----


def written(kind, **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(COLOURS).save(content, kind, **options)
    return content.getvalue()


WHOLE = [written("JPEG"), written("JPEG", progressive=True), written("PNG"), written("BMP"), written("WEBP")]
WHOLE += [written("WEBP", lossless=True), written("PNG", save_all=True, append_images=[Image.fromarray(COLOURS[::-1])])]


@st.composite
def damaged(draw, whole):
    """Some bytes, most often those of one of the `whole` with some changed, cut off or put in."""
    content = bytearray(draw(st.one_of(*3 * [st.sampled_from(whole)], st.binary(max_size=300))))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content)))
        more = draw(
            st.one_of(st.binary(max_size=8), st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xd8\xff"]))
        )
        change = draw(st.sampled_from(["flip", "over", "in", "cut"]))
        if change == "flip" and place < len(content):
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del content[place:]
        else:
            content[place : place + (len(more) if change == "over" else 0)] = more
    return bytes(content)


ANY_NUMBER = settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.full
@ANY_NUMBER
@given(content=damaged(WHOLE))
def test_any_bytes_are_an_image_or_unreadable(tmp_path_factory, content):
    """Within a second; as one of a folder, they cost one line."""
    path = tmp_path_factory.getbasetemp() / "any.jpg"
    path.write_bytes(content)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with open_image(path) as image:
                pixels = np.asarray(rgb(image))
                assert pixels.dtype == np.uint8 and pixels.shape == (*image.size[::-1], 3)
        except Unreadable:
            pass
    assert time.process_time() - start < 1


LISTS = [
    content.encode(code) for code in ("utf-8", "utf-8-sig", "utf-16") for content in ("a\nb\nc\n", "a 0\r\nb 1\r\n")
]


@pytest.mark.full
@ANY_NUMBER
@given(content=damaged(LISTS))
def test_any_bytes_are_a_class_list_or_one_line(tmp_path_factory, content):
    root = files(tmp_path_factory.getbasetemp() / "any", "val/a/1.jpg", "val/b/1.jpg")
    (root / "classes.txt").write_bytes(content)
    start = time.process_time()
    try:
        folder = open_split(root, "val", None)
        assert [folder.classes[label] for label in folder.labels] == ["a", "b"]
    except UserError as error:
        assert str(root / "classes.txt") in str(error) and len(str(error)) < 1000
    assert time.process_time() - start < 1
