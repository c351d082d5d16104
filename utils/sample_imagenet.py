"""Write a small dataset in ImageNet layout: scikit-learn's handwritten digits, or a cut from a real ImageNet tree.

    python utils/sample_imagenet.py --output data/digits
    python utils/sample_imagenet.py --output data/sample --source /datasets/imagenet --classes 10 --images 20

The result has `train/<class>/*.JPEG`, `val/<class>/*.JPEG` and `classes.txt`: one class folder name per line in label
order. A cut keeps the complete class list of its source there, because the label a checkpoint was trained with is the
position in that list, not among the folders of the cut.
"""

import argparse
import importlib
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import Parser, UserError, run

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "val")
EXTENSIONS = (".jpeg", ".jpg", ".png")
DIGITS_IN_VAL = 360
Files = dict[str, Callable[[], bytes]]  # relative path of an image, and what gives its bytes


def positive(text: str) -> int:
    """Whole number of at least 1; argparse reports the error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; flags that would do nothing are refused with UserError."""
    parser = Parser(description="Write a small dataset in ImageNet layout.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; new or empty (no default)")
    parser.add_argument("--source", type=Path, help="ImageNet root with train/ and/or val/ (default: the digits)")
    parser.add_argument("--classes", type=positive, help="number of classes (default: all digits; needed by --source)")
    parser.add_argument(
        "--images",
        "--images_per_class",
        type=positive,
        action="append",
        help="images per class in each split (default: all digits; needed by --source)",
    )
    parser.add_argument("--size", type=int, help="side of a digit image in pixels, 8 to 1024 (default: 32)")
    parser.add_argument("--seed", type=int, help="decides what is chosen from --source (default: 0)")
    parser.add_argument(
        "--exist_ok", action="store_true", help="succeed if --output already holds this very sample (default: an error)"
    )
    args = parser.parse_args()
    if len(set(args.images or [None])) > 1:
        parser.error("--images and --images_per_class are one setting and differ")
    args.images = args.images[0] if args.images else None
    if args.source and not (args.classes and args.images):
        parser.error("--source needs --classes and --images")
    if args.source and args.size is not None:
        parser.error("--size is for the digits only: files of --source are copied as they are")
    if not args.source and args.seed is not None:
        parser.error("--seed is for --source only: the choice of digits is fixed")
    args.size = 32 if args.size is None else args.size
    args.seed = args.seed or 0
    if not 8 <= args.size <= 1024:
        parser.error(f"--size must be 8 to 1024, not {args.size}")
    return args


def required(name: str) -> ModuleType:
    """Import the module `name` when it is needed, so that --help stays quick."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"cannot import {name} ({error}); run: pip install -r requirements.txt") from error


def check_enough(files: list, count: int | None, where: str) -> None:
    """Raise UserError if `where` has fewer than `count` files."""
    if count and len(files) < count:
        raise UserError(f"{where} has {len(files)} images, {count} asked for; ask for fewer or complete it")


def enlarge(scan: "np.ndarray", size: int) -> bytes:
    """JPEG (size, size) of a scan (8, 8) float64 with values 0 to 16: bright strokes on black.

    It has three equal channels, so that a reader that never converts to RGB also gets RGB.
    """
    import cv2

    grey = cv2.resize(scan * (255 / 16), (size, size), interpolation=cv2.INTER_CUBIC)
    grey = grey.round().clip(0, 255).astype("uint8")
    return cv2.imencode(".jpg", cv2.merge([grey] * 3), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def choose_digits(classes: int | None, images: int | None, size: int) -> tuple[Files, list[str]]:
    """Choose from the digits, always the same way.

    Returns:
        the files of the sample and the class names in label order.

    Raises:
        UserError: fewer classes or images than asked for, or scikit-learn or OpenCV is missing.
    """
    required("cv2")
    digits = required("sklearn.datasets").load_digits()
    names = [str(name) for name in digits.target_names]
    if classes and classes > len(names):
        raise UserError(f"there are {len(names)} digits, {classes} classes asked for; ask for at most {len(names)}")
    split = required("sklearn.model_selection").train_test_split(
        range(len(digits.target)), test_size=DIGITS_IN_VAL, stratify=digits.target, random_state=0
    )
    chosen = {}
    for folder, indices in zip(SPLITS, split, strict=True):
        for label, name in enumerate(names[:classes]):
            members = sorted(index for index in indices if digits.target[index] == label)
            check_enough(members, images, f"{folder}/{name}")
            for index in members[:images]:
                chosen[f"{folder}/{name}/digit_{index:04d}.JPEG"] = partial(enlarge, digits.images[index], size)
    return chosen, names[:classes]


def list_folder(folder: Path, directories: bool) -> list[str]:
    """Sorted names of the class folders, or else of the images, in `folder`; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and (entry.is_dir() if directories else entry.name.lower().endswith(EXTENSIONS) and entry.is_file())
        )


def choose_source(source: Path, classes: int, images: int, seed: int) -> tuple[Files, list[str]]:
    """Choose `classes` classes of an ImageNet tree and `images` of each in every split, the same for the same seed.

    Returns:
        the files of the sample and all class names of the source in label order: the lines of its classes.txt if it
        is a sample itself, else its sorted class folders.

    Raises:
        UserError: no such tree, or fewer classes or images than asked for.
    """
    splits = [split for split in SPLITS if (source / split).is_dir()]
    if not splits:
        raise UserError(f"--source {source} has neither train/ nor val/; give the folder that holds them")
    folders = {split: list_folder(source / split, directories=True) for split in splits}
    present = folders[splits[0]]
    for split in splits:
        if not folders[split]:
            raise UserError(f"{source / split} has no class folders; sort its images into one folder per class")
        if odd := sorted(set(present) ^ set(folders[split])):
            raise UserError(f"train/ and val/ of {source} hold different classes, such as {odd[0]}; complete them")
    if len(present) < classes:
        raise UserError(f"{source} has {len(present)} classes, {classes} asked for; ask for at most {len(present)}")
    listed = source / "classes.txt"
    names = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else present
    if odd := sorted(set(present) - set(names)):
        raise UserError(f"{listed} does not list the class folder {odd[0]}; correct or remove that file")

    draw = random.Random(seed)
    drawn = sorted(draw.sample(present, classes))
    chosen = {}
    for folder in (Path(split, name) for split in splits for name in drawn):
        members = list_folder(source / folder, directories=False)
        check_enough(members, images, str(source / folder))
        for name in sorted(draw.sample(members, images)):
            chosen[(folder / name).as_posix()] = (source / folder / name).read_bytes
    return chosen, names


def holds(output: Path, chosen: Files, classes_txt: bytes) -> bool:
    """Whether `output` holds this very sample: same folders, same files, same bytes."""
    wanted = set(chosen) | {str(parent) for path in chosen for parent in list(Path(path).parents)[:-1]}
    present = {path.relative_to(output).as_posix() for split in SPLITS for path in output.glob(f"{split}/**/*")}
    present |= {split for split in SPLITS if (output / split).is_dir()}
    listed = output / "classes.txt"
    return (
        present == wanted
        and listed.is_file()
        and listed.read_bytes() == classes_txt
        and all((output / path).read_bytes() == read() for path, read in chosen.items())
    )


def write(output: Path, chosen: Files, classes_txt: bytes) -> None:
    """Write the sample into a temporary folder beside `output` and rename it, so that `output` is whole or absent."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        for path, read in required("tqdm").tqdm(chosen.items(), unit="image", disable=None, leave=False):
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).write_bytes(read())
        (temporary / "classes.txt").write_bytes(classes_txt)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def summary(chosen: Files) -> str:
    """How many images of how many classes each split has."""
    parts = []
    for split in SPLITS:
        files = [path for path in chosen if path.startswith(f"{split}/")]
        if files:
            parts.append(f"{split} {len(files)} images of {len({path.split('/')[1] for path in files})} classes")
    return ", ".join(parts)


def sample(args: argparse.Namespace) -> None:
    """Choose, then write; or find the same sample in place."""
    filled = args.output.exists() and not (args.output.is_dir() and not any(args.output.iterdir()))
    if filled and not (args.exist_ok and args.output.is_dir()):
        raise UserError(f"--output {args.output} exists and is not empty; choose another folder or remove it")
    if args.source:
        if any(args.output.resolve().is_relative_to((args.source / split).resolve()) for split in SPLITS):
            raise UserError(f"--output {args.output} is inside {args.source}; choose a folder elsewhere")
        chosen, names = choose_source(args.source, args.classes, args.images, args.seed)
    else:
        chosen, names = choose_digits(args.classes, args.images, args.size)
    classes_txt = "".join(f"{name}\n" for name in names).encode()
    if not filled:
        print(f"writing {len(chosen)} images", flush=True)
        write(args.output, chosen, classes_txt)
        print(f"{summary(chosen)}: written to {args.output}")
    elif holds(args.output, chosen, classes_txt):
        print(f"{summary(chosen)}: already in {args.output}")
    else:
        raise UserError(f"--output {args.output} holds something other than this sample; choose another or remove it")


def main() -> None:
    args = parse_arguments()
    try:
        sample(args)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"cannot make {args.output}: {error.strerror}{where}; nothing was written") from error
    except UnicodeError as error:
        raise UserError(f"class names and classes.txt of {args.source} must be UTF-8 text; correct them") from error


if __name__ == "__main__":
    run(main)
