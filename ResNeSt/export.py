"""Export a ResNeSt: a MINDIR or AIR file of its fused form, and a manifest in JSON beside it."""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import UserError, run
from utils.config import take_settings
from utils.device import set_device
from utils.export import check_format, export, whole_export
from utils.metrics import write_results

# isort: split
from src.checkpoints import BACKBONES, load, record_of
from src.config import load_config, set_sizes
from src.dataset import MEAN, STD


def main() -> None:
    args = load_config("export", __doc__)
    told = record_of(args.ckpt_path)
    take_settings(args, args.ckpt_path, told)
    set_sizes(args)
    path = output_path(args)
    device = set_device(args.device_target, args.device_id)
    check_format(args.file_format, device, args.batch_size)
    network = BACKBONES[args.backbone].constructor(num_classes=args.num_classes, fused=True)
    load(network, args.ckpt_path)
    network.set_train(False)
    shape = [args.batch_size or None, 3, args.image_size, args.image_size]
    manifest = path.with_suffix(".json")
    with whole_export(manifest) as folder:
        file = export(network, shape, folder / path.name, args.file_format)
        write_results(folder / manifest.name, describe_file(args, file, told.get("classes")))
    print(f"wrote {manifest}")


def describe_file(args: argparse.Namespace, file: dict, classes: list[str] | None) -> dict:
    """The manifest of the exported file."""
    shape = [args.batch_size, 3, args.image_size, args.image_size]
    return {
        "model": args.backbone,
        "format": args.file_format,
        **file,
        "input": {"name": "images", "shape": shape, "dtype": "float32", "layout": "NCHW"},
        "output": {"name": "logits", "shape": [args.batch_size, args.num_classes], "dtype": "float32"},
        "preprocess": {
            "color": "RGB",
            "resize": [args.resize_size, args.resize_size],
            "keep_aspect_ratio": False,
            "interpolation": "bilinear, antialiased",
            "center_crop": args.image_size,
            "divide_by": 255,
            "mean": MEAN.tolist(),
            "std": STD.tolist(),
        },
        "num_classes": args.num_classes,
        "class_names": classes,
        "usage": "A 0 in a shape means any number. class_names is null where the checkpoint does not tell them.",
    }


def output_path(args) -> Path:
    """Where the exported file goes; its ending is that of its format, whether or not `file_name` has one.

    Raises:
        UserError: a name that MindSpore does not write.
    """
    path = Path(args.output_dir) / (args.file_name or args.backbone)
    if not re.fullmatch(r"[\w@.:-]+", path.name, re.ASCII):
        raise UserError(f"--file_name {path.name!r} is no name for MindSpore; take letters, digits and @ _ - . : only")
    if path.suffix.lower() in (".mindir", ".air"):
        return path.with_suffix(f".{args.file_format.lower()}")
    return path.with_name(f"{path.name}.{args.file_format.lower()}")


if __name__ == "__main__":
    run(main)
