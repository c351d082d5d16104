"""The files around an Ascend 310 run: labels of its images as JSON, its result files, accuracy from both.

A result file is named after its image, `<name>_0.bin`, and holds the image's logits as float32. The two commands here
are a model's preprocess.py and postprocess.py; the latter adds the words in which its document prints the accuracy.
Does not import MindSpore.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.cli import Parser, UserError, whole_file
from utils.images import ImageFolder
from utils.metrics import TopKAccuracy

ENDING = "_0.bin"
INCOMPLETE = 3  # exit status
BATCH = 1000


def named_images(data_path: str | Path) -> tuple[list[str], ImageFolder]:
    """The images of `val` under the root `data_path`, or of `data_path` if it is a split itself, and the name of each.

    A name is the file name without its ending, which the result file is named after.

    Raises:
        UserError: as `ImageFolder`; also if two files differ in folder or ending only, or the root has no val/.
    """
    root = Path(data_path)
    if (root / "val").is_dir():
        root = root / "val"
    elif (root / "train").is_dir():
        raise UserError(f"{root} has no val/; add it, or set --data_path to the folder that holds the class folders")
    folder = ImageFolder(root)
    paths: dict[str, Path] = {}
    for path in folder.paths:
        if path.stem in paths:
            raise UserError(
                f"{paths[path.stem]} and {path} would have one result file, {path.stem}{ENDING}; rename one of them"
            )
        paths[path.stem] = path
    return list(paths), folder


def write_labels() -> None:
    """The command `preprocess.py`: read the flags and write the labels."""
    parser = Parser(description="Write the labels of the images that the Ascend 310 program is to classify, as JSON.")
    parser.add_argument(
        *("--data_path", "--dataset_path"),
        action="append",
        help="ImageNet root with val/, or a single split (default: ./data/imagenet)",
    )
    parser.add_argument("--output", default="imagenet_label.json", help="file to write (default: %(default)s)")
    args = parser.parse_args()
    data_paths = set(args.data_path or ["./data/imagenet"])
    if len(data_paths) > 1:
        raise UserError("--data_path and --dataset_path are one setting with two values; give one of them")
    names, folder = named_images(data_paths.pop())
    labels = dict(zip(names, folder.labels.tolist()))
    with whole_file(args.output) as temporary:
        temporary.write_text(json.dumps(labels, indent=0) + "\n")
    print(f"{args.output}: labels of {len(labels)} images")


def read_labels(path: Path) -> dict[str, int]:
    """The content of a label file: image name to label.

    Raises:
        UserError: it cannot be read or is no such file.
    """
    try:
        labels = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it with preprocess.py") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); make it again with preprocess.py") from error
    if not isinstance(labels, dict) or not labels or not all(type(n) is int and n >= 0 for n in labels.values()):
        raise UserError(f"{path} is not a list of image names with their labels; make it again with preprocess.py")
    return labels


def read_logits(path: Path) -> np.ndarray:
    """The logits in a result file, float32 (K,).

    Raises:
        UserError: it cannot be read, is empty or cut, or holds a NaN.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; run the inference again") from error
    if not content or len(content) % 4:
        raise UserError(f"{path} holds {len(content)} bytes, which are no float32 logits; run the inference again")
    logits = np.frombuffer(content, "<f4")
    if np.isnan(logits).any():
        raise UserError(f"{path} holds NaN; the model or its conversion is broken, export it again")
    return logits


def accuracy(labels: dict[str, int], results: dict[str, Path]) -> TopKAccuracy:
    """Top-1 and top-5 over the images that have both a label and a result.

    Raises:
        UserError: as `read_logits`; also results of different lengths, or a label that the network has no logit for.
    """
    metric = TopKAccuracy((1, 5))
    names = sorted(labels.keys() & results.keys())
    first, classes = None, 0
    for start in range(0, len(names), BATCH):
        batch = names[start : start + BATCH]
        rows = []
        for name in batch:
            logits = read_logits(results[name])
            if first is None:
                first, classes = results[name], len(logits)
            if len(logits) != classes:
                raise UserError(
                    f"{results[name]} holds {len(logits)} logits, {first} {classes}; they are of different models, "
                    "run the inference again into an empty folder"
                )
            if labels[name] >= classes:
                raise UserError(
                    f"image {name} has label {labels[name]}, but the model has {classes} classes, 0 to {classes - 1}; "
                    "use the data set that the model was trained on (classes.txt fixes the labels of a part of one)"
                )
            rows.append(logits)
        metric.update(np.stack(rows), np.array([labels[name] for name in batch]))
    return metric


def warn(names: set[str], words: str) -> None:
    """Say how many `names` there are of what `words` say, and the first few; nothing if there are none."""
    if names:
        few = ", ".join(sorted(names)[:3])
        print(f"warning: {len(names)} {words}: {few}{', …' if len(names) > 3 else ''}", file=sys.stderr)


def print_accuracy(line: Callable[[int, int, int], str]) -> int:
    """The command `postprocess.py`: read the flags and print the accuracies.

    Args:
        line: (k, images whose class is among the first k, images) to the line that tells it.

    Returns:
        the exit status: INCOMPLETE if images and results are not the same.
    """
    parser = Parser(description="Top-1 and top-5 accuracy from the result files of the Ascend 310 program.")
    parser.add_argument(
        "--result_dir", default="result_Files", help="folder with <image name>_0.bin (default: %(default)s)"
    )
    parser.add_argument(
        "--label_file", default="imagenet_label.json", help="labels that preprocess.py wrote (default: %(default)s)"
    )
    args = parser.parse_args()

    labels = read_labels(Path(args.label_file))
    folder = Path(args.result_dir)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; run the inference first, or set --result_dir")
    results = {path.name.removesuffix(ENDING): path for path in folder.iterdir() if path.name.endswith(ENDING)}
    metric = accuracy(labels, results)
    if not metric.total:
        raise UserError(f"{folder} has no result for any of the {len(labels)} images; run the inference first")
    for k, correct in zip(metric.ks.tolist(), metric.correct.tolist()):
        print(line(k, correct, metric.total), flush=True)
    missing, surplus = labels.keys() - results.keys(), results.keys() - labels.keys()
    warn(missing, f"of {len(labels)} images have no result and are not counted")
    warn(surplus, "results belong to no image and are not counted")
    return INCOMPLETE if missing or surplus else 0
