"""Image folders in ImageNet layout, and processes that read them ahead of the device.

Does not import MindSpore, so that reading processes stay small.
"""

import contextlib
import ctypes
import gc
import math
import mmap
import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from utils.cli import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
MOST_PROCESSES = 8  # reading processes for each core
SLOTS = 3  # batches in memory: the one in use and two read ahead
# What decoding a file that is no image raises.
UNREADABLE = (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError)
View = Callable[[Path, int, int], np.ndarray]


class ImagePaths(Sequence):
    """Paths of images, kept as one block of bytes: millions of objects would be copied into every reading process."""

    def __init__(self, root: Path, names: list[bytes]):
        self.root = root
        self.names = np.array(names, bytes)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> Path:
        return self.root / os.fsdecode(self.names[row])


class ImageFolder:
    """The images of one split: `<root>/<class>/<image>`; UserError if it is not in this form or cannot be read.

    A class's label is its position among the sorted class folders or, if the file `classes.txt` stands in the folder or
    beside it, its line there: so a sample of a data set keeps the labels of the whole.

    Attributes:
        paths: the image files, by class, then by name.
        labels: int32 (len(paths),).
        classes: class names in label order.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"no folder {root}; set --data_path to an ImageNet root (with train/ and val/) or a split")
        try:
            self._list(root)
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}; change its permissions") from error

    def _list(self, root: Path) -> None:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise UserError(f"{root} has no class folders; images belong into {root}/<class>/")
        listing = next((path for path in (root / "classes.txt", root.parent / "classes.txt") if path.is_file()), None)
        self.classes = [folder.name for folder in folders]
        if listing:
            try:
                lines = listing.read_text(encoding="utf-8").split("\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{listing} is not UTF-8 text; write one class name a line") from error
            self.classes = [line.strip() for line in lines if line.strip()]
        if twice := [name for name, count in Counter(self.classes).items() if count > 1]:
            raise UserError(f"{listing} lists {twice[0]} twice; every class has one line")
        number = {name: label for label, name in enumerate(self.classes)}
        paths: list[bytes] = []
        labels: list[int] = []
        for folder in folders:
            if folder.name not in number:
                raise UserError(f"class folder {folder} is not in {listing}; add it there or move the folder away")
            images = sorted(name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in SUFFIXES)
            if not images:
                raise UserError(f"class folder {folder} holds no images; fill it or remove it (and check the labels)")
            paths += [os.fsencode(os.path.join(folder.name, name)) for name in images]
            labels += [number[folder.name]] * len(images)
        self.paths = ImagePaths(root, paths)
        self.labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self.paths)


class CorruptImages:
    """Called with the rows of images that cannot be read: names each once, or stops there if `strict`."""

    def __init__(self, folder: ImageFolder, strict: bool):
        self.folder, self.strict = folder, strict
        self.rows: set[int] = set()

    def __call__(self, rows: Sequence[int]) -> None:
        for row in rows:
            path = self.folder.paths[row]
            if self.strict:
                raise UserError(f"{path} cannot be read as an image; replace it, or leave out --strict")
            if row not in self.rows:
                print(f"warning: {path} cannot be read as an image; going on without it", file=sys.stderr, flush=True)
            self.rows.add(row)


def open_split(
    data_path: str | Path, split: str, num_classes: int | None, remedy: str = "set --num_classes {}"
) -> ImageFolder:
    """The images of `split` ("train" or "val") under the root `data_path`, or of `data_path` if it is a split itself.

    UserError as `ImageFolder`, or if there are not `num_classes` classes (None: any number); `remedy` then says what to
    do, in which `{}` stands for the number that there is.
    """
    root = Path(data_path)
    if (root / split).is_dir():
        root = root / split
    elif (root / "train").is_dir() or (root / "val").is_dir():
        raise UserError(f"{root} has no {split}/; add it, or set --data_path to the folder of the class folders")
    images = ImageFolder(root)
    count = len(images.classes)
    if num_classes not in (None, count):
        part = "if it is a part of a larger data set, list all class names in a file classes.txt beside it"
        raise UserError(f"{root} has {count} classes, not {num_classes}; {remedy.format(count)}, or, {part}")
    return images


def open_root(data_path: str | Path, num_classes: int, remedy: str) -> tuple[ImageFolder, ImageFolder]:
    """The training and the validation images of a root, as `open_split`; UserError, too, if their classes differ."""
    for split in ("train", "val"):
        if not (Path(data_path) / split).is_dir():
            raise UserError(f"{data_path} has no {split}/; set --data_path to a root that has train/ and val/")
    train, val = (open_split(data_path, split, num_classes, remedy) for split in ("train", "val"))
    same = f"make their class folders the same, or list all class names in {data_path}/classes.txt"
    check_classes(f"{data_path}/train", train.classes, val, same, f"{data_path}/val")
    return train, val


def check_classes(
    path: str,
    names: Sequence[str] | None,
    folder: ImageFolder,
    remedy: str = "evaluate it on its own classes, listed in label order in a file classes.txt beside the split if "
    "some of them are missing",
    images: str = "the images",
) -> None:
    """UserError with this `remedy` if the class `names` that `path` tells, if any, are not those of the `images`."""
    for label, (one, other) in enumerate(zip(names or [], folder.classes)):
        if one != other:
            raise UserError(f"label {label} is {one} in {path} and {other} in {images}; {remedy}")


@dataclass(frozen=True)
class Batch:
    """images float32 (n, 3, S, S), labels int32 (n,), rows int (n,): positions in the `ImageFolder`; n may be 0.

    `corrupt` lists the rows whose files cannot be read; they are in none of the arrays.
    """

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    corrupt: list[int]


def filled(batch: Batch, batch_size: int, folder: ImageFolder) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a `batch`: others take the places of those that cannot be read; UserError if none can be."""
    if not len(batch.rows):
        path = folder.paths[batch.corrupt[0]]
        raise UserError(f"no image of a whole batch can be read, the first is {path}; is the data set damaged?")
    places = np.resize(np.arange(len(batch.rows)), batch_size)
    return batch.images[places], batch.labels[places]


def evaluation_rows(folder: ImageFolder, rank: int = 0, devices: int = 1) -> range:
    """The rows that one of several devices evaluates: each row is one device's."""
    return range(rank, len(folder), devices)


def reading_processes(num_workers: int, devices: int = 1) -> int:
    """Reading processes of one device: `num_workers`, or its share of the cores if that is 0.

    UserError if those of all devices are more than the cores can serve.
    """
    cores = len(os.sched_getaffinity(0))
    if num_workers * devices > (most := MOST_PROCESSES * cores):
        fault = f"{num_workers * devices} reading processes are too many for {cores} cores"
        raise UserError(f"{fault}; set --num_workers to {max(1, most // devices)} or less")
    return num_workers or max(1, cores // devices)


def epoch_rows(
    count: int, batch_size: int, seed: int, epoch: int, first_step: int = 0, rank: int = 0, ranks: int = 1
) -> list[int]:
    """The rows of `count` images that process `rank` of `ranks` trains on in `epoch`, from step `first_step` on.

    The order is drawn from (seed, epoch); an incomplete last batch is left out. Step k takes the same
    `batch_size * ranks` rows for any number of processes, of which process `rank` gets the `rank`-th part.
    """
    order = np.random.default_rng([seed, epoch, 0]).permutation(count)
    steps = count // (batch_size * ranks)
    return order[: steps * batch_size * ranks].reshape(steps, ranks, batch_size)[first_step:, rank].ravel().tolist()


# In a reading process: the paths, the view and the memory of its loader.
_reading: tuple = ()


class Loader(contextlib.AbstractContextManager):
    """Reads the images of a folder in processes of its own, two batches ahead. A context manager.

    The processes are forked at once, so make it before MindSpore has started its threads. They write into memory that
    they share with this process, and end with it, however it ends; Ctrl-C is left to this process. (MindSpore's own
    pipeline would take over the process's signals, and Ctrl-C would end a training without saving it.)

    `view` makes (path, row, epoch) float32 of `shape`, (3, S, S); whatever it draws it must draw from these three.
    UserError if the processes, or the memory for the batches, are not to be had.
    """

    def __init__(self, folder: ImageFolder, view: View, shape: tuple[int, int, int], batch_size: int, num_workers: int):
        self.folder = folder
        size = (SLOTS, batch_size, *shape)
        try:
            memory = mmap.mmap(-1, math.prod(size) * np.dtype(np.float32).itemsize)
        except (OSError, OverflowError) as error:
            raise UserError(f"no memory for batches of {batch_size} images; set --batch_size lower") from error
        self.memory = np.frombuffer(memory, np.float32).reshape(size)
        # Several tasks a process and batch, so that a slow image does not hold up the others for long.
        self.task = max(1, min(16, batch_size // (2 * num_workers)))
        start = (folder.paths, view, self.memory, os.getpid())
        self.pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("fork"), _start_reading, start)
        before = multiprocessing.active_children()
        gc.freeze()  # a collection in a child would write into all pages that it shares
        try:
            self.pool.submit(os.getpid).result()  # the first task forks them all
        except OSError as error:
            for process in set(multiprocessing.active_children()) - set(before):
                process.kill()
            raise UserError(f"cannot start {num_workers} reading processes: {error}; lower --num_workers") from error
        finally:
            gc.unfreeze()
        self.processes = [process for process in multiprocessing.active_children() if process not in before]

    def __exit__(self, kind, *exception) -> None:
        if kind is not None:
            self.kill()
        self.pool.shutdown(cancel_futures=True)

    def kill(self) -> None:
        """End the processes at once, even if they hang in a read, so that nothing waits for them."""
        for process in self.processes:
            process.kill()

    def batches(self, rows: Sequence[int], epoch: int = 0) -> Iterator[Batch]:
        """The images `rows` in this order, the last batch short. A batch holds until the next one is asked for.

        UserError if a reading process was killed.
        """
        started = self._started(rows, epoch)
        ahead: deque = deque()
        try:
            ahead.extend(islice(started, SLOTS - 1))
            while ahead:
                ahead.extend(islice(started, 1))
                yield self._batch(*ahead.popleft())
        except BrokenProcessPool as error:
            raise UserError("a reading process was killed; if memory is short, set --num_workers lower") from error
        except (Exception, KeyboardInterrupt):
            self.kill()  # else the line below would wait for processes that may hang
            raise
        finally:
            # Nothing may write into the memory any more when the next call starts.
            wait([task for *_, tasks in ahead for task in tasks if not task.cancel()])

    def _started(self, rows: Sequence[int], epoch: int) -> Iterator[tuple[int, np.ndarray, list[Future]]]:
        """Starts to read one batch after the other: its slot in the memory, its rows, and the tasks that fill it."""
        batch_size = self.memory.shape[1]
        for number, first in enumerate(range(0, len(rows), batch_size)):
            part, slot = np.asarray(rows[first : first + batch_size]), number % SLOTS
            starts = range(0, len(part), self.task)
            tasks = [self.pool.submit(_read, slot, start, part[start : start + self.task], epoch) for start in starts]
            yield slot, part, tasks

    def _batch(self, slot: int, rows: np.ndarray, tasks: list[Future]) -> Batch:
        bad = [position for task in tasks for position in task.result()]
        images = self.memory[slot, : len(rows)]
        if not bad:
            return Batch(images, self.folder.labels[rows], rows, [])
        good = np.setdiff1d(np.arange(len(rows)), bad)
        return Batch(images[good], self.folder.labels[rows[good]], rows[good], rows[bad].tolist())


def _start_reading(paths: ImagePaths, view: View, memory: np.ndarray, parent: int) -> None:
    """First thing in a reading process."""
    global _reading
    _reading = (paths, view, memory)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
    if os.getppid() != parent:
        os._exit(1)  # it has gone already
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)  # the processes are the parallelism


def _read(slot: int, start: int, rows: np.ndarray, epoch: int) -> list[int]:
    """Fill places `start`, … of the slot with the images `rows`; returns the places whose images cannot be read."""
    paths, view, memory = _reading
    bad = []
    for place, row in enumerate(rows.tolist(), start):
        try:
            memory[slot, place] = view(paths[row], row, epoch)
        except UNREADABLE:
            bad.append(place)
    return bad
