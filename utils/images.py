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
import re
import signal
import sys
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.cli import UserError, read_file

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # alone are decoded, whatever the ending
ARCHIVES = (".tar", ".tgz", ".gz", ".zip", ".7z", ".rar")
# Resizing takes memory for the longest side, or for how many times the other one it is; a JPEG can have no longer side.
LARGEST_SIDE, MOST_STRETCHED = 65535, 64
MOST_PROCESSES = 8  # reading processes for each core
SLOTS = 3  # batches in memory: the one in use and two read ahead
ABSENT = "{0} has no {1}/; rename the folder of those images to {1}, or set --data_path to a root that has it"
View = Callable[[Path, int, int], np.ndarray]


class Unreadable(OSError):
    """A file cannot be read as an image; the message, if any, says why."""


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Make whatever Pillow or OpenCV, which alone are called within, raise about a file `Unreadable`."""
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def open_image(path: Path) -> Image.Image:
    """The image file `path`, opened by Pillow, not yet decoded; Unreadable if it is none of `FORMATS` or too large."""
    with decoding():
        if path.exists() and not path.is_file():
            raise Unreadable("it is no regular file")  # and might block
        try:
            image = Image.open(path, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise Unreadable from error  # there is no more to say
        if max(image.size) > LARGEST_SIDE:
            image.close()
            raise Unreadable(f"a side of it has {max(image.size)} pixels, more than {LARGEST_SIDE}")
    return image


def rgb(image: Image.Image) -> Image.Image:
    """The opened `image` decoded as 8-bit RGB; Unreadable if that fails, and a warning if a part of it is not shown.

    As Pillow converts it: colours under transparency are taken as if they were not, EXIF does not rotate. But of greys
    of 16 bits, which Pillow clips at 255, the upper 8 bits are taken, as it does for colours of 16 bits.
    """
    with decoding():
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a JPEG and, say, its depths
            warnings.warn(f"of its {image.n_frames} pictures the first is used", stacklevel=2)
        if image.mode.startswith("I"):
            warnings.warn("its greys have 16 bits, of which the upper 8 are used", stacklevel=2)
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("LA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema()[0] < 255:
                warnings.warn("it is transparent in places, which are read as if they were not", stacklevel=2)
        return image.convert("RGB")


def middle(image: Image.Image) -> Image.Image:
    """The image without those ends of a very long one that a square from its centre does not show."""
    width, height = image.size
    most = MOST_STRETCHED * min(image.size)
    left, top = (max(0, side - most) // 2 for side in image.size)
    return image.crop((left, top, width - left, height - top)) if left or top else image


class ImagePaths(Sequence):
    """Paths of images, kept as one block of bytes: millions of objects would be copied into every reading process."""

    def __init__(self, root: Path, names: list[bytes]):
        self.root = root
        self.names = np.array(names, bytes)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> Path:
        return self.root / os.fsdecode(self.names[row])


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """UserError if a folder or a file cannot be read."""
    try:
        yield
    except OSError as error:
        remedy = "change its permissions, or set --data_path to another place"
        raise UserError(f"cannot read {error.filename}: {error.strerror}; {remedy}") from error


class ImageFolder:
    """The images of one split: `<root>/<class>/<image>`; UserError if it is not in this form or cannot be read.

    A class's label is its position among the sorted class folders or, if the file `classes.txt` stands in the folder or
    beside it, its line there: so a sample of a data set keeps the labels of the whole. Hidden files are no images.

    Attributes:
        paths: the image files, by class, then by name.
        labels: int32 (len(paths),).
        classes: class names in label order.
        remarks: what there is to say when its images are used, for `say`.
        reasons: why images could not be read, by row. told: what has been said of one image, and is not to be of more.
    """

    @readable()
    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"no folder {root}; set --data_path to an ImageNet root (with train/ and val/) or a split")
        self.remarks: list[str] = []
        self.reasons: dict[int, str] = {}
        self.told: set[str] = set()
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise UserError(f"{root} has no class folders; {layout_advice(root, root)}")
        listing = next((path for path in (root / "classes.txt", root.parent / "classes.txt") if path.is_file()), None)
        self.classes = read_classes(listing) if listing else [composed(folder.name) for folder in folders]
        number = {name: label for label, name in enumerate(self.classes)}
        paths: list[bytes] = []
        labels: list[int] = []
        loose = set(os.listdir(root)).difference(folder.name for folder in folders)
        others = Counter("in no class folder" for name in loose if is_image(name))
        for folder in folders:
            if composed(folder.name) not in number:
                raise UserError(f"class folder {folder} is not in {listing}; {listing_advice(folder, self.classes)}")
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
            images = [name for name in names if is_image(name)]
            if not images and listing:
                self.remarks.append(f"class folder {folder} holds no images")
            elif not images:
                raise UserError(f"class folder {folder} holds no images; {layout_advice(root, folder)}")
            others.update(os.path.splitext(name)[1].lower() or "without ending" for name in names if not is_image(name))
            paths += [os.fsencode(os.path.join(folder.name, name)) for name in images]
            labels += [number[composed(folder.name)]] * len(images)
        if twice := [name for name, count in Counter(self.classes).items() if count > 1]:
            raise UserError(f"{listing or root} lists {twice[0][:80]} twice; every class has one line")
        if not paths:
            raise UserError(f"no class folder in {root} holds images; {layout_advice(root, folders[0])}")
        if others:
            kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
            total = f"{others.total()} files of {root} are left out"
            self.remarks.append(f"{total}, not being {', '.join(SUFFIXES)} in a class: {kinds}")
        if not listing:
            self.remarks += surprising_order(root, self.classes)
        self.paths = ImagePaths(root, paths)
        self.labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def say(self) -> None:
        """Warn, once, of what may surprise about the folder."""
        while self.remarks:
            warn(self.remarks.pop(0))


def warn(text: str) -> None:
    """A line on stderr."""
    print(f"warning: {' '.join(text.split())}", file=sys.stderr, flush=True)


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def composed(name: str) -> str:
    """A class name with its accents as most systems write them; macOS writes them as letters of their own."""
    return unicodedata.normalize("NFC", name)


def read_classes(listing: Path) -> list[str]:
    """The class names in a file, one a line; UTF-16 needs its byte order mark. UserError if it is no such text."""
    content = read_file(listing, "write one class name a line there, or remove it")
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = composed(content.decode("utf-16" if utf16 else "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{listing} is not UTF-8 text; write one class name a line") from error
    names = [line.strip() for line in re.split("[\r\n]", text) if line.strip()]
    if not names or "\0" in text:
        raise UserError(f"{listing} lists no classes as text; write one class name a line, or remove it")
    return names


def listing_advice(folder: Path, classes: Sequence[str]) -> str:
    """What to do if a class folder is missing in the list of `classes`."""
    name = re.escape(composed(folder.name))
    if beside := next((line for line in classes if re.search(rf"(?<!\w){name}(?!\w)", line)), None):
        return f"its line there is {beside[:80]!r}; leave the folder's name alone in it, and the lines in label order"
    return f"its lines, such as {classes[0][:80]!r}, are names of class folders in label order: add it or move it away"


def surprising_order(root: Path, names: Sequence[str]) -> list[str]:
    """A remark if people would put these sorted `names` into another order: 2 before 10, apple before Zebra."""

    def natural(name: str) -> list:
        return [int(part) if k % 2 else part.casefold() for k, part in enumerate(re.split(r"(\d+)", name))]

    for one, other in pairwise(names):
        if natural(one) > natural(other):
            order = f"the class folders of {root} are labelled in the order of their characters, {one} before {other}"
            return [f"{order}; where a model counts otherwise, list them in its order in {root.parent}/classes.txt"]
    return []


def layout_advice(root: Path, folder: Path) -> str:
    """What to do about `folder`, the split `root` or a class folder in it, which does not hold what belongs there."""
    for pattern in ("*/", "*/*/", "*/*/*/"):
        for found in (*root.glob(f"{pattern}train"), *root.glob(f"{pattern}val")):
            return f"set --data_path to {found.parent}, which has {found.name}/"
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if archives := [name for name in names if name.lower().endswith(ARCHIVES)]:
        return f"unpack {archives[0]} and what else is packed there, each class's images into {root}/<class>/"
    if images := sum(map(is_image, names)):
        sort = f"sort its {images} images into {root}/<class>/ by their labels (ImageNet's val: with valprep.sh)"
        return f"{sort}, or, if it is a class itself, set --data_path to {root.parent}"
    for place, _, files in os.walk(folder):
        if any(map(is_image, files)):
            move = f"the images lie deeper, as in {place}; move them up into {folder}"
            return f"{move}, or, if their folders are the classes, set --data_path to {folder}"
    what = f"images ({', '.join(SUFFIXES)}) belong into {root}/<class>/"
    return what if folder == root else f"{what}: fill it or remove it (and check the labels)"


class CorruptImages:
    """Called with the rows of images that cannot be read: names each once, or stops there if `strict`."""

    def __init__(self, folder: ImageFolder, strict: bool):
        self.folder, self.strict = folder, strict
        self.rows: set[int] = set()

    def __call__(self, rows: Sequence[int]) -> None:
        for row in rows:
            reason = self.folder.reasons.get(row)
            fault = f"{self.folder.paths[row]} cannot be read as an image{f' ({reason})' if reason else ''}"
            if self.strict:
                raise UserError(f"{fault}; replace it, or leave out --strict")
            if row not in self.rows:
                warn(f"{fault}; going on without it")
            self.rows.add(row)


@readable()
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
        raise UserError(ABSENT.format(root, split))
    images = ImageFolder(root)
    count = len(images.classes)
    if count == 1 and num_classes not in (None, 1):
        only = f"{root} has one class folder only, {images.classes[0]}"
        raise UserError(f"{only}; sort the images of {num_classes} classes into a folder for each, {root}/<class>/")
    if num_classes not in (None, count):
        part = "if it is a part of a larger data set, list all class names in a file classes.txt beside it"
        raise UserError(f"{root} has {count} classes, not {num_classes}; {remedy.format(count)}, or, {part}")
    return images


@readable()
def open_root(data_path: str | Path, num_classes: int, remedy: str) -> tuple[ImageFolder, ImageFolder]:
    """The training and the validation images of a root, as `open_split`; UserError, too, if their classes differ."""
    for split in ("train", "val"):
        if not (Path(data_path) / split).is_dir():
            raise UserError(ABSENT.format(data_path, split))
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
        self.folder.say()
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
        images, bad = self.memory[slot, : len(rows)], []
        for place, text, lost in (remark for task in tasks for remark in task.result()):
            if lost:
                bad.append(place)
                self.folder.reasons[int(rows[place])] = text
            elif text not in self.folder.told:
                self.folder.told.add(text)
                warn(f"{self.folder.paths[rows[place]]}: {text} (said of the first such image only)")
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
    os.dup2(os.memfd_create("stderr"), 2)  # where libjpeg and libpng write, which do not know the file's name


def _written() -> list[str]:
    """The lines on this reading process's stderr since the last call."""
    text = os.pread(2, os.lseek(2, 0, os.SEEK_CUR), 0).decode(errors="replace")
    os.lseek(2, 0, os.SEEK_SET)
    return text.splitlines()


def _read(slot: int, start: int, rows: np.ndarray, epoch: int) -> list[tuple[int, str, bool]]:
    """Fill places `start`, … of the slot with the images `rows`.

    Returns what there is to say of some: the place, the text, and whether it is why the image cannot be read.
    """
    paths, view, memory = _reading
    remarks = []
    for place, row in enumerate(rows.tolist(), start):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            for kind in (UserWarning, RuntimeWarning):
                warnings.simplefilter("always", kind)
            try:
                memory[slot, place] = view(paths[row], row, epoch)
            except OSError as error:
                remarks.append((place, str(error), True))
        texts = [str(warning.message) for warning in caught] + _written()
        remarks += [(place, text, False) for text in texts]
    return remarks
