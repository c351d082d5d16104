"""Evaluate a ResNeSt: top-1 and top-5 accuracy over all validation images."""

import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import UserError, run
from utils.device import set_device
from utils.images import CorruptImages, ImageFolder, open_split
from utils.launcher import is_worker, launch
from utils.metrics import write_results, write_rows

# isort: split
import mindspore as ms
import mindspore.nn as nn
from mindspore.communication import get_group_size, get_rank, init
from src.checkpoints import BACKBONES, load
from src.config import load_config
from src.dataset import evaluation_loader
from src.evaluation import Evaluation, evaluate


def main() -> int:
    args = load_config("eval", __doc__)
    if args.device_num > 1 and not is_worker():
        logs = Path(args.output_dir) / "logs"
        return launch(Path(__file__).resolve(), sys.argv[1:], args.device_num, logs, args.rank_table_file)
    folder = open_split(args.data_path, "val", args.num_classes)
    args.batch_size = min(args.batch_size, len(folder))
    if args.ckpt_path.endswith(".mindir"):
        args.batch_size = mindir_batch_size(Path(args.ckpt_path), args) or args.batch_size
    with evaluation_loader(folder, args, args.device_num, args.preprocess) as loader:
        # The device comes after the loader has forked its processes.
        device = set_device(args.device_target, None if is_worker() else args.device_id)
        rank, devices = 0, 1
        if is_worker():
            init()
            rank, devices = get_rank(), get_group_size()
        if args.ckpt_path.endswith(".mindir"):
            network = nn.GraphCell(ms.load(args.ckpt_path))
        else:
            network = BACKBONES[args.backbone].constructor(num_classes=args.num_classes, fused=True)
            load(network, args.ckpt_path)
        if rank == 0:
            print(f"{len(folder)} images, {device} x {devices}; compiling", flush=True)
        result = evaluate(network, loader, args.batch_size, rank, devices, CorruptImages(folder, args.strict))
    if not result.images:
        raise UserError(f"none of the {len(folder)} images of {args.data_path} can be read")
    if rank == 0:
        report(args, folder, result)
    return 0


def mindir_batch_size(path: Path, args) -> int:
    """Batch size of the exported file `path`, 0 for any, from the manifest beside it.

    Raises:
        UserError: no such file, no manifest, or another backbone, image size or number of classes than in `args`.
    """
    manifest = path.with_suffix(".json")
    for file in (path, manifest):
        if not file.is_file():
            raise UserError(f"no file {file}; export.py writes a .mindir file and its .json side by side")
    try:
        content = json.loads(manifest.read_text())
        shape = content["input"]["shape"]
        found = {"backbone": content["model"], "image_size": shape[2], "num_classes": content["num_classes"]}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{manifest} is not a manifest of export.py; export the network again") from error
    for key, value in found.items():
        if value != getattr(args, key):
            raise UserError(f"{path} was exported with {key} {value}, not {getattr(args, key)}; set --{key} {value}")
    return shape[0]


def report(args, folder: ImageFolder, result: Evaluation) -> None:
    """Print the result lines and write the files."""
    for name, correct in zip(("top1", "top5"), result.correct):
        accuracy = 100 * correct / result.images
        print(f"after allreduce eval: {name}_correct={correct}, tot={result.images}, acc={accuracy:.2f}%")
    print(f"{result.images} images, {result.images_per_s:.1f} images/s")
    if result.corrupt:
        print(f"{result.corrupt} of {len(folder)} images could not be read and were left out")
    if args.predictions is not None:
        write_rows(
            args.predictions,
            [
                {"path": path, "label": label, "prediction": predicted}
                for path, label, predicted in zip(folder.paths, folder.labels, result.predicted)
                if predicted >= 0
            ],
        )
    write_results(
        Path(args.output_dir) / "results.json",
        {
            "top1_correct": int(result.correct[0]),
            "top5_correct": int(result.correct[1]),
            "top1": result.top(),
            "top5": result.top(1),
            "loss": result.mean_loss(),
            "images": result.images,
            "left_out": result.corrupt,
            "images_per_s": result.images_per_s,
            "backbone": args.backbone,
            "preprocess": args.preprocess,
            "checkpoint": args.ckpt_path,
        },
    )


if __name__ == "__main__":
    run(main)
