"""Evaluate DDRNet-23: loss, top-1 and top-5 accuracy over all validation images."""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import Interrupt, UserError, check_writable, run
from utils.device import set_device
from utils.download import download
from utils.export import load_mindir
from utils.images import CorruptImages, ImageFolder, check_classes, open_split
from utils.launcher import is_scheduler, is_worker, launch
from utils.metrics import write_results, write_rows

# isort: split
import mindspore as ms
import numpy as np
from mindspore.communication import get_group_size, get_rank, init
from src.configs.settings import load_config
from src.data.imagenet import evaluation_loader
from src.data.transforms import resize_side
from src.tools.callback import over_devices
from src.tools.evaluation import Evaluation, evaluate
from src.tools.get_misc import classes_of, get_network, load_network, set_precision
from src.trainers.train_one_step import SumOverDevices


def main() -> int:
    args = load_config("eval", __doc__)
    if is_scheduler():
        init()
        return 0
    if args.download and not is_worker():
        download(args.checkpoint_url, Path(args.pretrained), args.checkpoint_sha256)
    if args.device_num > 1 and not is_worker():
        logs = Path(args.output_dir) / "logs"
        return launch(Path(__file__).resolve(), sys.argv[1:], args.device_num, logs, args.rank_table_file)
    folder = open_split(args.data_url, "val", args.num_classes)
    args.batch_size = min(args.batch_size, len(folder))
    if args.pretrained.endswith(".mindir"):
        manifest = read_manifest(Path(args.pretrained), args)
        args.batch_size = manifest["input"]["shape"][0] or args.batch_size
        check_classes(args.pretrained, manifest["class_names"], folder)
    check_writable(args.output_dir)
    if args.predictions is not None:
        check_writable(Path(args.predictions).parent)
    with evaluation_loader(folder, args, args.device_num) as loader:
        # The device comes after the loader has forked its processes.
        device = set_device(args.device_target, None if is_worker() else args.device_id)
        rank, devices = 0, 1
        if is_worker():
            init()
            rank, devices = get_rank(), get_group_size()
        if args.pretrained.endswith(".mindir"):
            network = load_mindir(args.pretrained)
        else:
            network = get_network(args)
            load_network(network, args.pretrained)
            check_classes(args.pretrained, classes_of(args.pretrained), folder)
            set_precision(network, args, device)
        if rank == 0:
            print(f"{len(folder)} images, {device} x {devices}; compiling", flush=True)
        corrupt = CorruptImages(folder, args.strict)
        result = evaluate(network, loader, args.batch_size, rank, devices, Interrupt(), corrupt)
    if devices > 1:
        reduce = SumOverDevices(devices)

        def over(numbers) -> np.ndarray:
            return reduce(ms.Tensor(np.array(numbers, np.float32))).asnumpy()

        predicted = over(result.predicted + 1).astype(np.int32) - 1  # -1 where another device read the image
        rate, left_out = over([result.images_per_s, len(result.corrupt)])
        result = replace(over_devices(result, over), predicted=predicted, images_per_s=float(rate))
    else:
        left_out = len(result.corrupt)
    if not result.images:
        raise UserError(f"none of the {len(folder)} images of {args.data_url} can be read")
    if rank == 0:
        report(args, folder, result, int(left_out))
    return 0


def read_manifest(path: Path, args) -> dict:
    """The manifest beside the exported file `path`.

    Raises:
        UserError: one of the files is missing, or the network was exported with other settings.
    """
    file = path.with_suffix(".json")
    for needed in (path, file):
        if not needed.is_file():
            raise UserError(f"no file {needed}; export.py writes a .mindir file and its .json side by side")
    try:
        manifest = json.loads(file.read_bytes())
        size, steps = manifest["input"]["shape"][2], manifest["preprocess"]
        found = {"image_size": size, "num_classes": manifest["num_classes"], "resize": steps["resize"][0]}
        manifest["class_names"], manifest["input"]["shape"][0]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{file} is not a manifest of export.py; export the network again") from error
    wanted = {"image_size": args.image_size, "num_classes": args.num_classes}
    wanted["resize"] = resize_side(args.image_size, args.crop_pct)
    for key in found:
        if found[key] != wanted[key]:
            flag = "--crop_pct" if key == "resize" else f"--{key}"
            raise UserError(f"{path} was exported for {key} {found[key]}, not {wanted[key]}; set {flag} accordingly")
    return manifest


def report(args, folder: ImageFolder, result: Evaluation, left_out: int) -> None:
    """Print the result line and write the files."""
    summary = {"Loss": result.mean_loss(), "Top1-Acc": result.top(), "Top5-Acc": result.top(1)}
    print(f"result: { {key: round(value, 5) for key, value in summary.items()} } ckpt= {args.pretrained}")
    print(f"{result.images} images, {result.images_per_s:.1f} images/s")
    if left_out:
        print(f"{left_out} of {len(folder)} images could not be read and were left out")
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
            "left_out": left_out,
            "images_per_s": result.images_per_s,
            "checkpoint": args.pretrained,
        },
    )


if __name__ == "__main__":
    run(main)
