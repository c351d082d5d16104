"""Write a small dataset in ImageNet layout: scikit-learn's handwritten digits, or a cut from a real ImageNet tree.

    python utils/sample_imagenet.py --output data/digits
    python utils/sample_imagenet.py --output data/digits_varied --vary
    python utils/sample_imagenet.py --output data/sample --source /datasets/imagenet --classes 10 --images 20

The result has `train/<class>/*.JPEG`, `val/<class>/*.JPEG` and `classes.txt`: one class folder name per line in label
order. A cut keeps the complete class list of its source there, because the label a checkpoint was trained with is the
position in that list, not among the folders of the cut.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from utils.cli import Parser, UserError, run
from utils.config import Store, number, positive, seed
from utils.images import ImageFolder

SPLITS = ("train", "val")
DIGITS_IN_VAL = 360
SCAN = 8  # pixels a side
DRAWINGS, BRIGHTEST = 3, 100  # of each scan, where sizes vary; the paper's greys
Files = dict[str, Callable[[], bytes]]  # relative path of an image, and what gives its bytes
side = number(int, lambda value: 8 <= value <= 1024, "a whole number from 8 to 1024")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; flags that would do nothing are refused with UserError."""
    parser = Parser(description="Write a small dataset in ImageNet layout.", allow_abbrev=False)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write; new or empty (no default)")
    add("--source", type=Path, help="ImageNet root with train/ and/or val/ (default: the digits)")
    add("--classes", type=positive, help="number of classes (default: all digits; needed by --source)")
    what = "images per class in each split (default: all digits; needed by --source)"
    add("--images", "--images_per_class", type=positive, action=Store, help=what)
    add("--size", type=side, help="side of a digit image in pixels, 8 to 1024 (default: 32)")
    what = f"draw each digit {DRAWINGS} times, {SCAN} to nearly --size pixels high, on grey (default: once, on black)"
    add("--vary", action="store_true", help=what)
    add("--seed", type=seed, help="decides what is chosen from --source (default: 0)")
    add("--exist_ok", action="store_true", help="succeed if --output already holds this very sample (default: error)")
    args = parser.parse_args()
    if args.source and not (args.classes and args.images):
        parser.error("--source needs --classes and --images")
    if args.source and (args.size is not None or args.vary):
        flag = "--size" if args.size is not None else "--vary"
        parser.error(f"{flag} is for the digits only: files of --source are copied as they are")
    if not args.source and args.seed is not None:
        parser.error("--seed is for --source only: the choice of digits is fixed")
    if args.vary and (args.size or 32) < 2 * SCAN:
        parser.error(f"--vary has no room for different sizes; give it a --size from {2 * SCAN}")
    return args


def check_enough(found: list, wanted: int | None, kind: str, where: str | Path) -> None:
    """Raise UserError if fewer classes or images (`kind`) were found in `where` than wanted; None: any number."""
    if wanted and len(found) < wanted:
        raise UserError(f"{where} has {len(found)} {kind}, {wanted} asked for; ask for at most {len(found)}")


def draw(scan: np.ndarray, side: int, paper: int, size: int) -> bytes:
    """JPEG (size, size, 3) of a scan (8, 8) float64 with values 0 to 16: bright strokes on darker `paper`, as RGB.

    The digit is `side` pixels high and wide, in the middle.
    """
    from utils.opencv import cv2

    grey = np.full((size, size), paper, np.uint8)
    start = (size - side) // 2
    digit = cv2.resize(paper + scan * ((255 - paper) / 16), (side, side), interpolation=cv2.INTER_CUBIC)
    grey[start : start + side, start : start + side] = digit.round().clip(0, 255)
    return cv2.imencode(".jpg", cv2.merge([grey] * 3), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def drawings(row: int, size: int) -> list[tuple[int, int]]:
    """Side in pixels and grey of the paper for each drawing of scan `row` where they vary: small, middle and large."""
    bounds = np.linspace(SCAN, size - size // 16 + 1, DRAWINGS + 1).round().astype(int)
    chance = np.random.default_rng(row)
    sides = chance.integers(bounds[:-1], bounds[1:]).tolist()
    return list(zip(sides, chance.integers(0, BRIGHTEST, DRAWINGS).tolist()))


def choose_digits(classes: int | None, images: int | None, size: int, vary: bool) -> tuple[Files, list[str]]:
    """A choice from the digits, always the same, and its class names in label order; UserError if they are too few."""
    from sklearn.datasets import load_digits  # so late because it takes a second
    from sklearn.model_selection import train_test_split

    import utils.opencv  # noqa: F401  (so that it is missed before anything is written)

    digits = load_digits()
    names = [str(name) for name in digits.target_names]
    check_enough(names, classes, "classes", "scikit-learn's set of digits")
    rows = range(len(digits.target))
    halves = train_test_split(rows, test_size=DIGITS_IN_VAL, stratify=digits.target, random_state=0)
    chosen = {}
    for split, half in zip(SPLITS, halves):
        for label, name in enumerate(names[:classes]):
            members = sorted(row for row in half if digits.target[row] == label)
            check_enough(members, images, "images", f"{split}/{name}")
            for row in members[:images]:
                scan = f"{split}/{name}/digit_{row:04d}"
                for side, paper in drawings(row, size) if vary else [(size, 0)]:
                    path = f"{scan}_{side}px.JPEG" if vary else f"{scan}.JPEG"
                    chosen[path] = partial(draw, digits.images[row], side, paper, size)
    return chosen, names[:classes]


def choose_source(source: Path, classes: int, images: int, seed: int) -> tuple[Files, list[str]]:
    """A choice from an ImageNet tree, drawn with `seed`, and all class names in label order; UserError if too few."""
    folders = {split: ImageFolder(source / split) for split in SPLITS if (source / split).is_dir()}
    if not folders:
        raise UserError(f"--source {source} has neither train/ nor val/; give the folder that holds them")
    present = [{folder.classes[label] for label in set(folder.labels.tolist())} for folder in folders.values()]
    if odd := sorted(present[0] ^ present[-1]):
        raise UserError(f"train/ and val/ of {source} hold different classes, such as {odd[0]}; complete them")
    names = sorted(present[0])
    check_enough(names, classes, "classes", source)
    chance = random.Random(seed)
    drawn = sorted(chance.sample(names, classes))
    chosen = {}
    for split, folder in folders.items():
        for name in drawn:
            members = np.flatnonzero(folder.labels == folder.classes.index(name)).tolist()
            check_enough(members, images, "images", source / split / name)
            for row in sorted(chance.sample(members, images)):
                path = folder.paths[row]
                chosen[path.relative_to(source).as_posix()] = path.read_bytes
    return chosen, folder.classes


def holds(output: Path, files: Files) -> bool:
    """Whether `output` holds this very sample: same folders, same files, same bytes."""
    patterns = ["classes.txt", *SPLITS, *(f"{split}/**/*" for split in SPLITS)]
    present = {path.relative_to(output) for pattern in patterns for path in output.glob(pattern)}
    wanted = {path for name in files for path in (Path(name), *Path(name).parents)} - {Path()}
    return present == wanted and all((output / name).read_bytes() == read() for name, read in files.items())


def write(output: Path, files: Files) -> None:
    """Write the sample into a temporary folder beside `output` and rename it, so that `output` is whole or absent."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        temporary = Path(folder, output.name)
        for name, read in tqdm(files.items(), unit="file", disable=None, leave=False):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(read())
        temporary.replace(output)


def sample(args: argparse.Namespace) -> None:
    """Choose, then write; or find the same sample in place."""
    output = args.output
    filled = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    if filled and not args.exist_ok:
        raise UserError(f"--output {output} exists and is not empty; choose another folder or remove it")
    if args.source:
        if any(output.resolve().is_relative_to((args.source / split).resolve()) for split in SPLITS):
            raise UserError(f"--output {output} is inside {args.source}; choose a folder elsewhere")
        files, names = choose_source(args.source, args.classes, args.images, args.seed or 0)
    else:
        files, names = choose_digits(args.classes, args.images, args.size or 32, args.vary)
    counts = {split: Counter(Path(name).parent for name in files if name.startswith(f"{split}/")) for split in SPLITS}
    shown = [f"{split} {count.total()} images of {len(count)} classes" for split, count in counts.items() if count]
    classes_txt = "".join(f"{name}\n" for name in names).encode()
    files["classes.txt"] = lambda: classes_txt
    if not filled:
        print(f"writing {len(files) - 1} images", flush=True)
        write(output, files)
    elif not holds(output, files):
        raise UserError(f"--output {output} holds something other than this sample; choose another or remove it")
    print(f"{', '.join(shown)}: {'already in' if filled else 'written to'} {output}")


def main() -> None:
    """Read the command line and make the sample."""
    args = parse_arguments()
    try:
        sample(args)
    except ImportError as error:
        raise UserError(f"cannot make the digits ({error}); run: pip install -r requirements.txt") from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"cannot make {args.output}: {error.strerror}{where}; nothing was written") from error
    except UnicodeError as error:
        raise UserError(f"class names of {args.source} must be UTF-8 text; rename those folders") from error


if __name__ == "__main__":
    run(main)
