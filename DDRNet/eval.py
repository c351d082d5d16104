"""Evaluate DDRNet-23: loss, top-1 and top-5 accuracy over all validation images."""

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import Interrupt, check_writable, run
from utils.config import take_settings
from utils.device import join_devices
from utils.download import download
from utils.export import load_mindir, read_manifest
from utils.images import CorruptImages, ImageFolder, check_classes, open_split
from utils.launcher import distribute, is_worker
from utils.metrics import write_results, write_rows

# isort: split
from src.configs.settings import load_config
from src.data.imagenet import evaluation_loader
from src.tools.evaluation import Evaluation, evaluate
from src.tools.get_misc import get_network, load_network, record_of, set_precision


def main() -> int:
    args = load_config("eval", __doc__)
    if args.download and not is_worker():
        download(args.checkpoint_url, Path(args.pretrained), args.checkpoint_sha256)
    if (status := distribute(args, __file__)) is not None:
        return status
    exported, batch_size = args.pretrained.endswith(".mindir"), 0
    if exported:
        told, batch_size = read_manifest(Path(args.pretrained), [args.arch], told_by)
    else:
        told = record_of(args.pretrained)
    take_settings(args, args.pretrained, told)
    folder = open_split(args.data_url, "val", args.num_classes, "give a checkpoint of {} classes")
    check_classes(args.pretrained, told.get("classes"), folder)
    args.batch_size = batch_size or min(args.batch_size, len(folder))
    check_writable(args.output_dir)
    if args.predictions is not None:
        check_writable(Path(args.predictions).parent)
    with evaluation_loader(folder, args, args.device_num) as loader:
        # The device comes after the loader has forked its processes.
        devices = join_devices(args)
        if exported:
            network = load_mindir(args.pretrained)
        else:
            network = get_network(args)
            load_network(network, args.pretrained)
            set_precision(network, args, devices.target)
        devices.say(f"{len(folder)} images, {devices}; compiling", flush=True)
        corrupt = CorruptImages(folder, args.strict)
        result = evaluate(network, loader, args.batch_size, Interrupt(), devices, corrupt)
    if devices.rank == 0:
        report(args, folder, result)
    return 0


def told_by(manifest: dict) -> dict:
    """The settings in the manifest of an exported DDRNet."""
    return {"image_size": manifest["input"]["shape"][2], "crop_pct": manifest["preprocess"]["crop_pct"]}


def report(args: argparse.Namespace, folder: ImageFolder, result: Evaluation) -> None:
    """Print the result line and write the files."""
    summary = {"Loss": result.mean_loss(), "Top1-Acc": result.top(), "Top5-Acc": result.top(1)}
    print(f"result: { {key: round(value, 5) for key, value in summary.items()} } ckpt= {args.pretrained}")
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
            **summary,
            "images": result.images,
            "left_out": result.corrupt,
            "images_per_s": result.images_per_s,
            "checkpoint": args.pretrained,
        },
    )


if __name__ == "__main__":
    run(main)
