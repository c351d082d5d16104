"""Evaluate a ResNeSt: top-1 and top-5 accuracy over all validation images."""

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import Interrupt, check_writable, run
from utils.config import take_settings
from utils.device import join_devices
from utils.export import load_mindir, read_manifest
from utils.images import CorruptImages, ImageFolder, check_classes, open_split
from utils.launcher import distribute
from utils.metrics import write_results, write_rows

# isort: split
from src.checkpoints import BACKBONES, load, record_of
from src.config import load_config, set_sizes
from src.dataset import evaluation_loader
from src.evaluation import Evaluation, evaluate


def main() -> int:
    args = load_config("eval", __doc__)
    if (status := distribute(args, __file__)) is not None:
        return status
    exported, batch_size = args.ckpt_path.endswith(".mindir"), 0
    if exported:
        told, batch_size = read_manifest(Path(args.ckpt_path), BACKBONES, told_by)
    else:
        told = record_of(args.ckpt_path)
    take_settings(args, args.ckpt_path, told)
    set_sizes(args)
    folder = open_split(args.data_path, "val", args.num_classes, "give a checkpoint of {} classes")
    check_classes(args.ckpt_path, told.get("classes"), folder)
    args.batch_size = batch_size or min(args.batch_size, len(folder))
    check_writable(args.output_dir)
    if args.predictions is not None:
        check_writable(Path(args.predictions).parent)
    with evaluation_loader(folder, args, args.device_num, args.preprocess) as loader:
        # The device comes after the loader has forked its processes.
        devices = join_devices(args)
        if exported:
            network = load_mindir(args.ckpt_path)
        else:
            network = BACKBONES[args.backbone].constructor(num_classes=args.num_classes, fused=True)
            load(network, args.ckpt_path)
        devices.say(f"{len(folder)} images, {devices}; compiling", flush=True)
        corrupt = CorruptImages(folder, args.strict)
        result = evaluate(network, loader, args.batch_size, Interrupt(), devices, corrupt)
    if devices.rank == 0:
        report(args, folder, result)
    return 0


def told_by(manifest: dict) -> dict:
    """The settings in the manifest of an exported ResNeSt."""
    size, resize = manifest["input"]["shape"][2], manifest["preprocess"]["resize"][0]
    return {"backbone": manifest["model"], "image_size": size, "resize_size": resize}


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
