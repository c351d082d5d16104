"""Export a quantized ResNet-18: a file for the front part, one for the back part at each bit-width, and a manifest."""

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import UserError, run
from utils.config import take_settings
from utils.device import set_device
from utils.export import check_format, export, whole_export
from utils.metrics import write_results

# isort: split
import mindspore.nn as nn
from src.checkpoints import describe, load
from src.config import check_crop, load_config
from src.dataset import MEAN, STD
from src.inference import Back, Front
from src.quant import StoredConv2d
from src.resnet import FLOAT, WIDTHS, Architecture, load_fixed

NAME = "resnet18_dq"
# Beginnings of the names of a part's parameters.
PARAMETERS = {Front: ("conv1.", "bn1.", "layer1.", "fc1.", "fc2."), Back: ("layer2.", "layer3.", "layer4.", "fc.")}


def main() -> None:
    args = load_config("export", __doc__)
    architecture, told = describe(args.ckpt_path)
    if architecture.quant == FLOAT:
        raise UserError(f"{args.ckpt_path} is a float ResNet-18; train a quantized one with train.py --stage quantize")
    if architecture.decisions > 1:
        raise UserError(
            f"{args.ckpt_path} chooses the bits of every layer by itself, so it has no back part of one bit-width to "
            "export; train with --granularity image"
        )
    told["resize_size"] = args.resize_size or told["resize_size"]  # the one thing that may be another than in training
    take_settings(args, args.ckpt_path, told)
    check_crop(architecture.image_size, args.resize_size)
    device = set_device(args.device_target, args.device_id)
    check_format(args.file_format, device, args.batch_size)
    network = architecture.network()
    load(network, architecture, args.ckpt_path)

    size = architecture.image_size
    images = [args.batch_size or None, 3, size, size]
    features = [args.batch_size or None, WIDTHS[0], size // 4, size // 4]

    manifest = Path(args.output_dir) / f"{NAME}.json"

    def write(folder: Path, part: type[nn.Cell], name: str, shape: list[int | None], bits: int) -> dict:
        """Write one part and return what the manifest tells of it."""
        stored, live = architecture.fixed(bits, StoredConv2d), architecture.fixed(bits)
        load_fixed(stored, network)
        load_fixed(live, network)
        file = export(part(stored), shape, folder / f"{NAME}_{name}", args.file_format, part(live))
        values = sum(p.size for p in network.get_parameters() if p.name.startswith(PARAMETERS[part]))
        return file | {"bytes": (folder / file["file"]).stat().st_size, "float32_bytes": 4 * values}

    with whole_export(manifest) as folder:
        front = write(folder, Front, "front", images, architecture.target_bits)
        backs = [{"bits": bits} | write(folder, Back, f"{bits}bits", features, bits) for bits in architecture.bits]
        write_results(folder / manifest.name, describe_files(args, architecture, told.get("classes"), front, backs))
    print("part       bytes of file  as float32    share")
    for part in (front, *backs):
        name = f"{part['bits']} bits" if "bits" in part else "front"
        print(f"{name:8} {part['bytes']:15,} {part['float32_bytes']:11,} {part['bytes'] / part['float32_bytes']:8.1%}")
    print(f"wrote {manifest}")


def describe_files(
    args: argparse.Namespace, architecture: Architecture, classes: list[str] | None, front: dict, backs: list[dict]
) -> dict:
    """The manifest of the exported files."""
    size = architecture.image_size
    shape = [args.batch_size, WIDTHS[0], size // 4, size // 4]
    outputs = [{"name": "features", "shape": shape, "dtype": "float32"}]
    if architecture.decisions:
        outputs.append({"name": "scores", "shape": [args.batch_size, 1, len(architecture.bits)], "dtype": "float32"})
    return {
        "model": "DynamicQuant ResNet-18",
        "format": args.file_format,
        "input": {"name": "images", "shape": [args.batch_size, 3, size, size], "dtype": "float32", "layout": "NCHW"},
        "preprocess": {
            "color": "RGB",
            "resize_shorter_side": args.resize_size,
            "interpolation": "bicubic, antialiased",
            "center_crop": size,
            "divide_by": 255,
            "mean": MEAN.tolist(),
            "std": STD.tolist(),
        },
        "num_classes": architecture.num_classes,
        "class_names": classes,
        "quantizer": architecture.quant,
        "target_bits": architecture.target_bits,
        "front": front | {"outputs": outputs},
        "backs": [back | {"output": [args.batch_size, architecture.num_classes]} for back in backs],
        "usage": "The front takes images; the largest of its scores is the position in `backs` of the file that "
        "turns its features into logits (with one file there are no scores). A 0 in a shape means any number.",
    }


if __name__ == "__main__":
    run(main)
