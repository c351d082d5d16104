"""Export DDRNet-23: a MINDIR or AIR file, and a manifest in JSON beside it."""

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
from src.configs.settings import load_config
from src.data.transforms import MEAN, STD, resize_side
from src.tools.get_misc import get_network, load_network, record_of


def main() -> None:
    args = load_config("export", __doc__)
    told = record_of(args.pretrained)
    take_settings(args, args.pretrained, told)
    device = set_device(args.device_target, args.device_id)
    check_format(args.file_format, device, args.batch_size)
    network = get_network(args)
    load_network(network, args.pretrained)
    network.set_train(False)
    path = Path(args.output_dir) / "ddrnet23"
    shape = [args.batch_size or None, 3, args.image_size, args.image_size]
    manifest = path.with_suffix(".json")
    with whole_export(manifest) as folder:
        file = export(network, shape, folder / path.name, args.file_format)
        write_results(folder / manifest.name, describe_file(args, file, told.get("classes")))
    print(f"wrote {manifest}")


def describe_file(args: argparse.Namespace, file: dict, classes: list[str] | None) -> dict:
    """The manifest of the exported file."""
    side, shape = resize_side(args.image_size, args.crop_pct), [args.batch_size, 3, args.image_size, args.image_size]
    return {
        "model": args.arch,
        "format": args.file_format,
        **file,
        "input": {"name": "images", "shape": shape, "dtype": "float32", "layout": "NCHW"},
        "output": {"name": "logits", "shape": [args.batch_size, args.num_classes], "dtype": "float32"},
        "preprocess": {
            "color": "RGB",
            "resize": [side, side],
            "keep_aspect_ratio": False,
            "interpolation": "bicubic, antialiased",
            "center_crop": args.image_size,
            "crop_pct": args.crop_pct,
            "divide_by": 255,
            "mean": [float(value) for value in MEAN],
            "std": [float(value) for value in STD],
        },
        "num_classes": args.num_classes,
        "class_names": classes,
        "usage": "A 0 in a shape means any number. class_names is null where the checkpoint does not tell them.",
    }


if __name__ == "__main__":
    run(main)
