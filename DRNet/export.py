"""Export DRNet: one file for the predictor, one for the classifier at each resolution, and a manifest in JSON."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import UserError, run, whole_file
from utils.device import set_device
from utils.metrics import write_results

# isort: split
import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Tensor
from src.dataset import MEAN, STD
from src.drnet import Architecture, DRNet, load_networks, shortcut_bn_of
from src.model_utils.config import architecture_settings, load_config

# The exported graph may fuse operators that the live network runs one by one.
MAX_DIFFERENCE = 1e-4


def main() -> None:
    args = load_config("export", __doc__)
    device = set_device(args.device_target, args.device_id)
    if args.file_format == "AIR" and device != "Ascend":
        raise UserError("AIR files can be exported on Ascend only; use --file_format MINDIR here")
    if args.file_format == "AIR" and not args.batch_size:
        raise UserError("an AIR file has a fixed batch size; set --batch_size to 1 or more")
    sizes = architecture_settings(args)
    architecture = Architecture(**sizes, shortcut_bn=shortcut_bn_of(args.classifier_ckpt, sizes))
    drnet = DRNet(architecture)
    load_networks(drnet, args.classifier_ckpt, args.predictor_ckpt)
    predictor_gmacs, gmacs = drnet.gmacs()

    shape = [args.batch_size or None, 3, args.image_size, args.image_size]
    output = Path(args.output_dir)
    files = {"predictor": export(drnet.predict, shape, output / "drnet_predictor", args.file_format)}
    for resolution, cell in zip(architecture.resolutions, drnet.classify):
        name = output / f"drnet_classifier_{resolution}"
        files[f"classifier_{resolution}"] = export(cell, shape, name, args.file_format)
    write_results(
        output / "drnet.json",
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
    print(f"wrote {output}/drnet.json")


def export(cell: nn.Cell, shape: list[int | None], path: Path, file_format: str) -> str:
    """Write `cell` as `path` with the ending of `file_format`; returns the file's name.

    A MINDIR file is loaded again and its output compared with the live cell's before it gets its name.

    Raises:
        UserError: the loaded file computes something else.
    """
    name = path.with_suffix(f".{file_format.lower()}")
    images = np.random.default_rng(0).standard_normal((shape[0] or 2, *shape[1:])).astype(np.float32)
    with whole_file(name) as temporary, tempfile.TemporaryDirectory() as folder:
        # MindSpore refuses file names with spaces and the like, so it is given a bare one.
        here = os.getcwd()
        os.chdir(folder)
        try:
            ms.export(cell, Tensor(shape=shape, dtype=ms.float32), file_name=name.name, file_format=file_format)
            if file_format == "MINDIR":
                loaded = nn.GraphCell(ms.load(name.name))(Tensor(images)).asnumpy()
        finally:
            os.chdir(here)
        if file_format == "MINDIR":
            live = cell(Tensor(images)).asnumpy()
            difference = float(np.abs(live - loaded).max()) if live.shape == loaded.shape else float("inf")
            if not difference <= MAX_DIFFERENCE:
                raise UserError(
                    f"the exported {name.name} computes something else (by {difference:.2g}); nothing written"
                )
            print(f"{name}: differs from the live network by at most {difference:.1e}", flush=True)
        shutil.copyfile(Path(folder) / name.name, temporary)
    return name.name


if __name__ == "__main__":
    run(main)
