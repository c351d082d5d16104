"""The files around an Ascend 310 run: labels of its images as JSON, its result files, accuracy from both.

A result file is named after its image, `<name>_0.bin`, and holds the image's logits as float32. The labels' file
tells the class names, too, under a key that no file has as its name. The two commands here are a model's preprocess.py
and postprocess.py; the latter adds the words in which its document prints the accuracy. Does not import MindSpore.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.cli import Parser, UserError, read_file, read_json, whole_file
from utils.config import Store
from utils.images import ImageFolder, check_classes, open_split
from utils.metrics import TopKAccuracy

ENDING = "_0.bin"
CLASSES = "/classes"
INCOMPLETE = 3  # exit status


def named_images(data_path: str | Path, num_classes: int | None = None) -> tuple[list[str], ImageFolder]:
    """The images of `val` under the root `data_path`, or of `data_path` if it is a split itself, and the name of each.

    A name is the file name without its ending, which the result file is named after. UserError as `open_split`, or if
    two files differ in folder or ending only.
    """
    folder = open_split(data_path, "val", num_classes, "give a model of {} classes")
    paths: dict[str, Path] = {}
    for path in folder.paths:
        if path.stem in paths:
            fault = f"{paths[path.stem]} and {path} would have one result file, {path.stem}{ENDING}"
            raise UserError(f"{fault}; rename one of them")
        paths[path.stem] = path
    return list(paths), folder


def read_export(model: Path) -> tuple[int, list[str] | None, str]:
    """A MINDIR file's number of classes, their names if known, and flags of the program, by the manifest beside it.

    UserError if that is not of a model that the program can prepare images for.
    """
    file = model.with_suffix(".json")
    told = read_json(file, "export the network again")
    try:
        prepare, (batch_size, _, crop, _) = told["preprocess"], told["input"]["shape"]
        resize, interpolation = prepare["resize"][0], prepare["interpolation"].split(",")[0]
        sides, names = [resize, crop, batch_size, told["num_classes"]], told["class_names"]
        if not all(type(side) is int for side in sides) or interpolation not in ("bilinear", "bicubic"):
            raise ValueError
        if prepare["keep_aspect_ratio"] or not (names is None or all(isinstance(name, str) for name in names)):
            raise ValueError
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is no manifest of a model for this program; export the network again") from error
    flags = f"--resize {resize} --crop {crop} --interpolation {interpolation}"
    return told["num_classes"], names, f"{flags} --batch_size {batch_size}" if batch_size else flags


def write_labels() -> None:
    """The command `preprocess.py`: read the flags and write the labels."""
    parser = Parser(description="Write the labels of the images that the Ascend 310 program is to classify, as JSON.")
    what = "ImageNet root with val/, or a single split (default: %(default)s)"
    parser.add_argument("--data_path", "--dataset_path", action=Store, default="./data/imagenet", help=what)
    parser.add_argument("--output", default="imagenet_label.json", help="file to write (default: %(default)s)")
    what = "MINDIR file; if its manifest lies beside it, its classes have to be those of the images (no default)"
    parser.add_argument("--model_path", type=Path, help=what)
    args = parser.parse_args()
    count, classes, flags = None, None, None
    if args.model_path and args.model_path.with_suffix(".json").exists():
        count, classes, flags = read_export(args.model_path)
    names, folder = named_images(args.data_path, count)
    check_classes(str(args.model_path), classes, folder)
    folder.say()
    labels = dict(zip(names, folder.labels.tolist()))
    with whole_file(args.output) as temporary:
        temporary.write_text(json.dumps({CLASSES: folder.classes, **labels}, indent=0) + "\n")
    print(f"{args.output}: labels of {len(labels)} images")
    if flags:
        print(f"preparation: {flags}")


def read_logits(path: Path) -> np.ndarray:
    """The logits in a result file, float32 (K,); UserError if it cannot be read, is empty or cut, or not finite."""
    content = read_file(path, "run the inference again")
    if not content or len(content) % 4:
        raise UserError(f"{path} holds {len(content)} bytes, which are no float32 logits; run the inference again")
    logits = np.frombuffer(content, "<f4")
    if not np.isfinite(logits).all():
        raise UserError(f"{path} holds NaN or infinity; the model or its conversion is broken, export it again")
    return logits


def accuracy(labels: dict[str, int], results: dict[str, Path], told: int | None = None) -> TopKAccuracy:
    """Top-1 and top-5 over the images that have both a label and a result; `told`: classes that the labels are of.

    UserError as `read_logits`, or for results of different lengths, or a label that the network has no logit for, or
    if it has another number of logits than there are classes.
    """
    metric = TopKAccuracy((1, 5))
    names = sorted(labels.keys() & results.keys())
    classes = 0
    remedy = "use the data set that the model was trained on (classes.txt fixes the labels of a part of one)"
    for name in names:
        logits = read_logits(results[name])
        classes = classes or len(logits)
        if len(logits) != classes:
            fault = f"{results[name]} holds {len(logits)} logits, {results[names[0]]} {classes}"
            raise UserError(f"{fault}; they are of different models, run the inference again into an empty folder")
        if labels[name] >= classes:
            fault = f"image {name} has label {labels[name]}, but the model has {classes} classes, 0 to {classes - 1}"
            raise UserError(f"{fault}; {remedy}")
        metric.update(logits[None], [labels[name]])
    if names and told not in (None, classes):
        raise UserError(f"the images are of {told} classes, but the model has {classes}; {remedy}")
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
    names = labels.pop(CLASSES, None) if isinstance(labels, dict) else None
    told = len(names) if isinstance(names, list) else None
    if not isinstance(labels, dict) or not labels or not all(type(n) is int and n >= 0 for n in labels.values()):
        fault = f"{args.label_file} is not a list of image names with their labels"
        raise UserError(f"{fault}; make it again with preprocess.py")
    folder = Path(args.result_dir)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; run the inference first, or set --result_dir")
    results = {path.name.removesuffix(ENDING): path for path in folder.iterdir() if path.name.endswith(ENDING)}
    metric = accuracy(labels, results, told)
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
