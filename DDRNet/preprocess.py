"""Write the labels of the images that the Ascend 310 program is to classify, as JSON: {name without ending: label}.

A class's label is its position among the sorted class folders or in `classes.txt`. `postprocess.py` reads the file.
"""

import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import Parser, UserError, run, whole_file
from utils.images import ImageFolder


def image_labels(data_path: str | Path) -> dict[str, int]:
    """Label of every image of `val` under the root `data_path`, or of `data_path` if it is a split itself.

    The keys are file names without their endings, which the result files are named after.

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
                f"{paths[path.stem]} and {path} would have one result file, {path.stem}_0.bin; rename one of them"
            )
        paths[path.stem] = path
    return dict(zip(paths, folder.labels.tolist()))


def main() -> None:
    """Read the flags and write the file."""
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
    labels = image_labels(data_paths.pop())
    with whole_file(args.output) as temporary:
        temporary.write_text(json.dumps(labels, indent=0) + "\n")
    print(f"{args.output}: labels of {len(labels)} images")


if __name__ == "__main__":
    run(main)
