"""Evaluate a quantized ResNet-18: choose the bits for every image, classify it there, report accuracy and cost."""

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import Interrupt, UserError, check_writable, run
from utils.config import take_settings
from utils.device import join_devices
from utils.download import download
from utils.images import CorruptImages, ImageFolder, check_classes, open_split
from utils.metrics import write_results, write_rows

# isort: split
from src.checkpoints import describe, load
from src.config import check_crop, load_config
from src.dataset import evaluation_loader
from src.evaluation import Evaluation, evaluate
from src.inference import Predictor
from src.resnet import FLOAT, Architecture

COMPARED = (4, 8)  # fixed bits that the cost is compared with


def main() -> None:
    args = load_config("eval", __doc__)
    if args.download:
        download(args.ckpt_url, Path(args.ckpt_path))
    architecture, told = describe(args.ckpt_path)
    if architecture.quant == FLOAT:
        raise UserError(
            f"{args.ckpt_path} is a float ResNet-18: it has no controller to choose bits and was not trained for them; "
            "train one from it with train.py --stage quantize"
        )
    if args.sample_gumbel and not architecture.decisions:
        raise UserError(f"{args.ckpt_path} has fixed bits, there is nothing to sample; leave out --sample_gumbel")
    told["resize_size"] = args.resize_size or told["resize_size"]  # the one thing that may be another than in training
    take_settings(args, args.ckpt_path, told)
    args.image_size = architecture.image_size
    check_crop(args.image_size, args.resize_size)
    folder = open_split(args.data_path, "val", architecture.num_classes, "give a checkpoint of {} classes")
    check_classes(args.ckpt_path, told.get("classes"), folder)
    check_writable(args.output_dir)
    if args.predictions is not None:
        check_writable(Path(args.predictions).parent)
    args.batch_size = min(args.batch_size, len(folder))
    with evaluation_loader(folder, args) as loader:
        # The device comes after the loader has forked its processes.
        devices = join_devices(args)
        network = architecture.network()
        load(network, architecture, args.ckpt_path)
        sample_seed = args.seed if args.sample_gumbel else None
        predictor = Predictor(architecture, args.batch_size, args.force_bits, sample_seed)
        predictor.load(network)
        widths = " ".join(map(str, predictor.bits))
        print(f"{len(folder)} images, {devices.target}; compiling the network for bits {widths}", flush=True)
        result = evaluate(predictor, loader, Interrupt(), on_corrupt=CorruptImages(folder, args.strict))

    print(f"result: {{'acc': {result.top():.4f}}} ckpt= {args.ckpt_path}")
    print(table(result, architecture, predictor))
    if result.corrupt:
        print(f"{result.corrupt} of {len(folder)} images could not be read and were left out")
    if args.predictions is not None:
        write_predictions(Path(args.predictions), result, folder, predictor)
    write_results(Path(args.output_dir) / "results.json", summary(args, result, architecture, predictor))


def fixed_bit_flops(architecture: Architecture, bits: int) -> float:
    """Bit-FLOPs of an image, in 10^9, with all quantized layers at `bits`."""
    fixed, chosen = architecture.gmacs()
    return (fixed + float(chosen.sum())) * bits**2


def top1_at(result: Evaluation, predictor: Predictor, candidate: int) -> float | None:
    """Top-1 of the images at a candidate, a fraction; None where there are none, or where layers choose one by one."""
    images = int(result.chosen[0, candidate])
    return None if predictor.mixes or not images else float(result.correct_at[candidate]) / images


def table(result: Evaluation, architecture: Architecture, predictor: Predictor) -> str:
    """The report: share and accuracy of each bit-width, and the cost."""
    what = "decisions" if predictor.mixes else "images"
    lines = [f"bits {what:>10}    share   top-1"]
    chosen = result.chosen.sum(0) if predictor.mixes else result.chosen[0]
    for candidate, bits in enumerate(predictor.bits):
        top = top1_at(result, predictor, candidate)
        shown = "-" if top is None else f"{top:.4f}"
        lines.append(f"{bits:4} {chosen[candidate]:10} {chosen[candidate] / chosen.sum():8.1%} {shown:>7}")
    lines.append(f" all {chosen.sum():10} {1:8.1%} {result.top():7.4f}, top-5 {result.top(1):.4f}")
    cost = result.bit_flops(architecture, predictor.bits)
    compared = [f"{cost / fixed_bit_flops(architecture, bits):.1%} of fixed {bits} bits" for bits in COMPARED]
    lines.append(f"mean bits {result.mean_bits(predictor.bits):.3f}")
    lines.append(f"mean bit-FLOPs {cost:.3f} G: {', '.join(compared)}")
    lines.append(f"{result.images} images, {result.images_per_s:.1f} images/s")
    return "\n".join(lines)


def summary(args: argparse.Namespace, result: Evaluation, architecture: Architecture, predictor: Predictor) -> dict:
    """The report for `results.json`; accuracies as fractions."""
    return {
        "acc": result.top(),
        "top5": result.top(1),
        "loss": result.mean_loss(),
        "images": result.images,
        "left_out": result.corrupt,
        "mean_bits": result.mean_bits(predictor.bits),
        "mean_bit_gflops": result.bit_flops(architecture, predictor.bits),
        "fixed_bit_gflops": {bits: fixed_bit_flops(architecture, bits) for bits in COMPARED},
        "images_per_s": result.images_per_s,
        "bits": [
            {"bits": bits, "chosen": result.chosen[:, j].tolist(), "top1": top1_at(result, predictor, j)}
            for j, bits in enumerate(predictor.bits)
        ],
        "checkpoint": args.ckpt_path,
        "force_bits": args.force_bits,
        "sample_gumbel": args.sample_gumbel,
    }


def write_predictions(path: Path, result: Evaluation, folder: ImageFolder, predictor: Predictor) -> None:
    """path, label, prediction and chosen bits of every image that was read, in the order of the folder."""
    rows = []
    for name, label, predicted, decided in zip(folder.paths, folder.labels, result.predicted, result.decided):
        if predicted >= 0:
            bits = {} if predictor.mixes else {"bits": predictor.bits[decided]}
            rows.append({"path": name, "label": label, "prediction": predicted} | bits)
    write_rows(path, rows)


if __name__ == "__main__":
    run(main)
