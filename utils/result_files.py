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

from utils.cli import Parser, UserError, read_file, read_json, whole_file
from utils.config import Store
from utils.images import ImageFolder, open_split
from utils.metrics import TopKAccuracy

ENDING = "_0.bin"
INCOMPLETE = 3  # exit status


def named_images(data_path: str | Path) -> tuple[list[str], ImageFolder]:
    """The images of `val` under the root `data_path`, or of `data_path` if it is a split itself, and the name of each.

    A name is the file name without its ending, which the result file is named after. UserError as `open_split`, or if
    two files differ in folder or ending only.
    """
    folder = open_split(data_path, "val", num_classes=None)
    paths: dict[str, Path] = {}
    for path in folder.paths:
        if path.stem in paths:
            fault = f"{paths[path.stem]} and {path} would have one result file, {path.stem}{ENDING}"
            raise UserError(f"{fault}; rename one of them")
        paths[path.stem] = path
    return list(paths), folder


def write_labels() -> None:
    """The command `preprocess.py`: read the flags and write the labels."""
    parser = Parser(description="Write the labels of the images that the Ascend 310 program is to classify, as JSON.")
    what = "ImageNet root with val/, or a single split (default: %(default)s)"
    parser.add_argument("--data_path", "--dataset_path", action=Store, default="./data/imagenet", help=what)
    parser.add_argument("--output", default="imagenet_label.json", help="file to write (default: %(default)s)")
    args = parser.parse_args()
    names, folder = named_images(args.data_path)
    labels = dict(zip(names, folder.labels.tolist()))
    with whole_file(args.output) as temporary:
        temporary.write_text(json.dumps(labels, indent=0) + "\n")
    print(f"{args.output}: labels of {len(labels)} images")


def read_logits(path: Path) -> np.ndarray:
    """The logits in a result file, float32 (K,); UserError if it cannot be read, is empty or cut, or not finite."""
    content = read_file(path, "run the inference again")
    if not content or len(content) % 4:
        raise UserError(f"{path} holds {len(content)} bytes, which are no float32 logits; run the inference again")
    logits = np.frombuffer(content, "<f4")
    if not np.isfinite(logits).all():
        raise UserError(f"{path} holds NaN or infinity; the model or its conversion is broken, export it again")
    return logits


def accuracy(labels: dict[str, int], results: dict[str, Path]) -> TopKAccuracy:
    """Top-1 and top-5 over the images that have both a label and a result.

    UserError as `read_logits`, or for results of different lengths, or a label that the network has no logit for.
    """
    metric = TopKAccuracy((1, 5))
    names = sorted(labels.keys() & results.keys())
    classes = 0
    for name in names:
        logits = read_logits(results[name])
        classes = classes or len(logits)
        if len(logits) != classes:
            fault = f"{results[name]} holds {len(logits)} logits, {results[names[0]]} {classes}"
            raise UserError(f"{fault}; they are of different models, run the inference again into an empty folder")
        if labels[name] >= classes:
            fault = f"image {name} has label {labels[name]}, but the model has {classes} classes, 0 to {classes - 1}"
            remedy = "use the data set that the model was trained on (classes.txt fixes the labels of a part of one)"
            raise UserError(f"{fault}; {remedy}")
        metric.update(logits[None], [labels[name]])
    return metric


def print_accuracy(line: Callable[[int, int, int], str]) -> int:
    """The command `postprocess.py`: read the flags and print the accuracies.

    `line` makes k, the images whose class is among the first k, and all images the line that tells it. Returns the exit
    status: INCOMPLETE if images and results are not the same.
    """
    parser = Parser(description="Top-1 and top-5 accuracy from the result files of the Ascend 310 program.")
    what = "folder with <image name>_0.bin (default: %(default)s)"
    parser.add_argument("--result_dir", default="result_Files", help=what)
    what = "labels that preprocess.py wrote (default: %(default)s)"
    parser.add_argument("--label_file", default="imagenet_label.json", help=what)
    args = parser.parse_args()

    labels = read_json(args.label_file, "make it with preprocess.py")
    if not isinstance(labels, dict) or not labels or not all(type(n) is int and n >= 0 for n in labels.values()):
        fault = f"{args.label_file} is not a list of image names with their labels"
        raise UserError(f"{fault}; make it again with preprocess.py")
    folder = Path(args.result_dir)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; run the inference first, or set --result_dir")
    results = {path.name.removesuffix(ENDING): path for path in folder.iterdir() if path.name.endswith(ENDING)}
    metric = accuracy(labels, results)
    if not metric.total:
        raise UserError(f"{folder} has no result for any of the {len(labels)} images; run the inference first")
    for k, correct in zip(metric.ks.tolist(), metric.correct.tolist()):
        print(line(k, correct, metric.total), flush=True)
    missing, surplus = sorted(labels.keys() - results.keys()), sorted(results.keys() - labels.keys())
    for names, fault in ((missing, f"of {len(labels)} images have no result"), (surplus, "results belong to no image")):
        few = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        if names:
            print(f"warning: {len(names)} {fault} and are not counted: {few}", file=sys.stderr)
    return INCOMPLETE if missing or surplus else 0
