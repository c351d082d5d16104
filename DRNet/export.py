"""Export DRNet: one file for the predictor, one for the classifier at each resolution, and a manifest in JSON."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import check_writable, run
from utils.device import set_device
from utils.export import check_format, export
from utils.metrics import write_results

# isort: split
from src.dataset import MEAN, STD
from src.drnet import Architecture, DRNet, load_networks, shortcut_bn_of
from src.model_utils.config import architecture_settings, load_config


def main() -> None:
    args = load_config("export", __doc__)
    device = set_device(args.device_target, args.device_id)
    check_format(args.file_format, device, args.batch_size)
    sizes = architecture_settings(args)
    architecture = Architecture(**sizes, shortcut_bn=shortcut_bn_of(args.classifier_ckpt, sizes))
    drnet = DRNet(architecture)
    load_networks(drnet, args.classifier_ckpt, args.predictor_ckpt)
    predictor_gmacs, gmacs = drnet.gmacs()

    shape = [args.batch_size or None, 3, args.image_size, args.image_size]
    output = Path(args.output_dir)
    manifest = output / "drnet.json"
    check_writable(output)
    manifest.unlink(missing_ok=True)  # there is one only where all files belong together
    files = {"predictor": export(drnet.predict, shape, output / "drnet_predictor", args.file_format)}
    for resolution, cell in zip(architecture.resolutions, drnet.classify):
        name = output / f"drnet_classifier_{resolution}"
        files[f"classifier_{resolution}"] = export(cell, shape, name, args.file_format)
    write_results(
        manifest,
        {
            "model": "DRNet",
            "format": args.file_format,
            "input": {"name": "images", "shape": [args.batch_size, *shape[1:]], "dtype": "float32", "layout": "NCHW"},
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
            "predictor": {
                "file": files["predictor"],
                "output": [args.batch_size, len(architecture.resolutions)],
                "gmacs": predictor_gmacs,
            },
            "classifiers": [
                {
                    "resolution": resolution,
                    "file": files[f"classifier_{resolution}"],
                    "output": [args.batch_size, args.num_classes],
                    "gmacs": cost,
                }
                for resolution, cost in zip(architecture.resolutions, gmacs)
            ],
            "usage": "Every file takes the same images and resizes them itself. The predictor's largest output is the "
            "position in `classifiers` of the file to classify the image with. A 0 in a shape means any number.",
        },
    )
    print(f"wrote {manifest}")


if __name__ == "__main__":
    run(main)
