"""Export DRNet: one file for the predictor, one for the classifier at each resolution, and a manifest in JSON."""

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import run
from utils.config import take_settings
from utils.device import set_device
from utils.export import check_format, export, whole_export
from utils.metrics import write_results

# isort: split
from src.dataset import MEAN, STD
from src.drnet import DRNet, architecture_of, load_classifier, load_predictor, record_of
from src.model_utils.config import check_sizes, load_config


def main() -> None:
    args = load_config("export", __doc__)
    told = record_of(args.classifier_ckpt)
    take_settings(args, args.classifier_ckpt, told)
    check_sizes(args)
    device = set_device(args.device_target, args.device_id)
    check_format(args.file_format, device, args.batch_size)
    drnet = DRNet(architecture_of(args, told))
    load_classifier(drnet, args.classifier_ckpt)
    load_predictor(drnet, args.predictor_ckpt)
    predictor_gmacs, gmacs = drnet.gmacs()

    shape = [args.batch_size or None, 3, args.image_size, args.image_size]
    manifest = Path(args.output_dir) / "drnet.json"
    with whole_export(manifest) as folder:
        predictor = export(drnet.predict, shape, folder / "drnet_predictor", args.file_format)
        predictor |= {"output": [args.batch_size, len(args.resolutions)], "gmacs": predictor_gmacs}
        classifiers = []
        for resolution, cell, cost in zip(args.resolutions, drnet.classify, gmacs):
            file = export(cell, shape, folder / f"drnet_classifier_{resolution}", args.file_format)
            file |= {"output": [args.batch_size, args.num_classes], "gmacs": cost}
            classifiers.append({"resolution": resolution} | file)
        write_results(folder / manifest.name, describe_files(args, predictor, classifiers, told.get("classes")))
    print(f"wrote {manifest}")


def describe_files(
    args: argparse.Namespace, predictor: dict, classifiers: list[dict], classes: list[str] | None
) -> dict:
    """The manifest of the exported files."""
    shape = [args.batch_size, 3, args.image_size, args.image_size]
    return {
        "model": "DRNet",
        "format": args.file_format,
        "input": {"name": "images", "shape": shape, "dtype": "float32", "layout": "NCHW"},
        "preprocess": {
            "color": "RGB",
            "resize_shorter_side": args.resize_size,
            "interpolation": "bilinear, antialiased",
            "center_crop": args.image_size,
            "divide_by": 255,
            "mean": MEAN.tolist(),
            "std": STD.tolist(),
        },
        "num_classes": args.num_classes,
        "class_names": classes,
        "predictor": predictor,
        "classifiers": classifiers,
        "usage": "Every file takes the same images and resizes them itself. The predictor's largest output is the "
        "position in `classifiers` of the file to classify the image with. A 0 in a shape means any number. "
        "class_names is null where the checkpoint does not tell them.",
    }


if __name__ == "__main__":
    run(main)
