"""Evaluate a ResNeSt: top-1 and top-5 accuracy over all validation images."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import Interrupt, UserError, check_writable, run
from utils.device import set_device
from utils.export import load_mindir
from utils.images import CorruptImages, ImageFolder, check_classes, open_split
from utils.launcher import is_scheduler, is_worker, launch
from utils.metrics import write_results, write_rows

# isort: split
from mindspore.communication import get_group_size, get_rank, init
from src.checkpoints import BACKBONES, Facts, facts_of, load
from src.config import load_config, set_sizes
from src.dataset import evaluation_loader
from src.evaluation import Evaluation, evaluate


def main() -> int:
    args = load_config("eval", __doc__)
    if is_scheduler():
        init()
        return 0
    if args.device_num > 1 and not is_worker():
        logs = Path(args.output_dir) / "logs"
        return launch(Path(__file__).resolve(), sys.argv[1:], args.device_num, logs, args.rank_table_file)
    folder = open_split(args.data_path, "val", args.num_classes)
    args.batch_size = min(args.batch_size, len(folder))
    exported = args.ckpt_path.endswith(".mindir")
    if exported:
        facts, batch_size = read_manifest(Path(args.ckpt_path), args)
        args.batch_size = batch_size or args.batch_size
    else:
        facts = facts_of(args.ckpt_path)
    set_sizes(args, facts.sizes)
    check_classes(args.ckpt_path, facts.classes, folder)
    check_writable(args.output_dir)
    if args.predictions is not None:
        check_writable(Path(args.predictions).parent)
    with evaluation_loader(folder, args, args.device_num, args.preprocess) as loader:
        # The device comes after the loader has forked its processes.
        device = set_device(args.device_target, None if is_worker() else args.device_id)
        rank, devices = 0, 1
        if is_worker():
            init()
            rank, devices = get_rank(), get_group_size()
        if exported:
            network = load_mindir(args.ckpt_path)
        else:
            network = BACKBONES[args.backbone].constructor(num_classes=args.num_classes, fused=True)
            load(network, args.ckpt_path)
        if rank == 0:
            print(f"{len(folder)} images, {device} x {devices}; compiling", flush=True)
        corrupt = CorruptImages(folder, args.strict)
        result = evaluate(network, loader, args.batch_size, rank, devices, Interrupt(), corrupt)
    if not result.images:
        raise UserError(f"none of the {len(folder)} images of {args.data_path} can be read")
    if rank == 0:
        report(args, folder, result)
    return 0


def read_manifest(path: Path, args: argparse.Namespace) -> tuple[Facts, int]:
    """What the manifest beside the exported file `path` tells.

    Returns:
        the facts, and the batch size, 0 for any.

    Raises:
        UserError: one of the files is missing, or the network was exported with other settings.
    """
    file = path.with_suffix(".json")
    for needed in (path, file):
        if not needed.is_file():
            raise UserError(f"no file {needed}; export.py writes a .mindir file and its .json side by side")
    try:
        manifest = json.loads(file.read_bytes())
        found = {
            "backbone": manifest["model"],
            "image_size": manifest["input"]["shape"][2],
            "resize_size": manifest["preprocess"]["resize"][0],
            "num_classes": manifest["num_classes"],
        }
        facts = Facts(manifest["class_names"], (found["image_size"], found["resize_size"]))
        kind, batch_size = manifest["format"], manifest["input"]["shape"][0]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{file} is not a manifest of export.py; export the network again") from error
    if kind != "MINDIR":
        raise UserError(f"{file} is of a later export, to {kind}; export {path.name} again, with its own --file_name")
    for key, value in found.items():
        if getattr(args, key) not in (None, value):
            raise UserError(f"{path} was exported with {key} {value}, not {getattr(args, key)}; set --{key} {value}")
    return facts, batch_size


def report(args: argparse.Namespace, folder: ImageFolder, result: Evaluation) -> None:
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
