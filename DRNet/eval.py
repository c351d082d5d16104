"""Evaluate DRNet: predict a resolution for every image, classify it there, report accuracy and cost."""

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import Interrupt, check_writable, run
from utils.config import take_settings
from utils.device import join_devices
from utils.download import download
from utils.images import CorruptImages, ImageFolder, check_classes, open_split
from utils.metrics import write_results, write_rows

# isort: split
from src.dataset import evaluation_loader
from src.drnet import DRNet, architecture_of, load_classifier, load_predictor, record_of
from src.evaluation import Evaluation, dynamic_route, evaluate, fixed_route
from src.model_utils.config import check_sizes, load_config


def main() -> None:
    args = load_config("eval", __doc__)
    if args.download:
        download(args.classifier_url, Path(args.classifier_ckpt), args.classifier_sha256)
        download(args.predictor_url, Path(args.predictor_ckpt), args.predictor_sha256)
    told = record_of(args.classifier_ckpt)
    take_settings(args, args.classifier_ckpt, told)
    check_sizes(args)
    folder = open_split(args.data_path, "val", args.num_classes, "give a checkpoint of {} classes")
    check_classes(args.classifier_ckpt, told.get("classes"), folder)
    check_writable(args.output_dir)
    if args.predictions is not None:
        check_writable(Path(args.predictions).parent)
    args.batch_size = min(args.batch_size, len(folder))
    with evaluation_loader(folder, args) as loader:
        # The device comes after the loader has forked its processes.
        devices = join_devices(args)
        drnet = DRNet(architecture_of(args, told))
        load_classifier(drnet, args.classifier_ckpt)
        predictor_gmacs, gmacs = drnet.gmacs()
        if args.force_resolution is None:
            load_predictor(drnet, args.predictor_ckpt)
            route = dynamic_route(drnet, args.batch_size, args.seed if args.sample_gumbel else None)
        else:
            route = fixed_route(drnet, [args.resolutions.index(args.force_resolution)])
            predictor_gmacs = 0.0
        print(f"{len(folder)} images, {devices.target}; compiling {len(route.candidates)} resolutions", flush=True)
        corrupt = CorruptImages(folder, args.strict)
        result = evaluate(drnet, loader, route, args.batch_size, Interrupt(), on_corrupt=corrupt)

    print(f"result: {{'acc': {round(100 * result.top(), 3)}}} ckpt= {args.classifier_ckpt} {args.predictor_ckpt}")
    print(table(result, args.resolutions, gmacs, predictor_gmacs))
    if result.corrupt:
        print(f"{result.corrupt} of {len(folder)} images could not be read and were left out")
    if args.predictions is not None:
        write_predictions(Path(args.predictions), result, folder, args.resolutions)
    write_results(Path(args.output_dir) / "results.json", summary(args, result, gmacs, predictor_gmacs))


def table(result: Evaluation, resolutions: list[int], gmacs: list[float], predictor_gmacs: float) -> str:
    """The report: images, accuracy and cost of each resolution and of all."""
    total = int(result.images.sum())
    lines = ["resolution   images    share   top-1 %   top-5 %    GMACs"]
    for candidate, resolution in enumerate(resolutions):
        images = int(result.images[candidate])
        tops = [result.top_of(candidate, column) for column in (0, 1)]
        accuracy = " ".join(f"{'-':>9}" if top is None else f"{100 * top:9.3f}" for top in tops)
        lines.append(f"{resolution:10} {images:8} {images / total:8.1%} {accuracy} {gmacs[candidate]:8.3f}")
    mean = result.mean_gmacs(gmacs) + predictor_gmacs
    lines.append(f"{'all':>10} {total:8} {1:8.1%} {100 * result.top():9.3f} {100 * result.top(1):9.3f} {mean:8.3f}")
    lines.append(
        f"mean GMACs {mean:.3f} (predictor {predictor_gmacs:.3f} included), {resolutions[0]} only {gmacs[0]:.3f}: "
        f"{mean / gmacs[0]:.1%}"
    )
    lines.append(f"{result.images_per_s:.1f} images/s")
    return "\n".join(lines)


def summary(args: argparse.Namespace, result: Evaluation, gmacs: list[float], predictor_gmacs: float) -> dict:
    """The report for `results.json`; acc and top5 in percent, as published, the others as fractions."""
    return {
        "acc": round(100 * result.top(), 3),
        "top5": round(100 * result.top(1), 3),
        "images": int(result.images.sum()),
        "left_out": result.corrupt,
        "mean_gmacs": result.mean_gmacs(gmacs) + predictor_gmacs,
        "predictor_gmacs": predictor_gmacs,
        "images_per_s": result.images_per_s,
        "resolutions": [
            {
                "resolution": resolution,
                "images": int(result.images[j]),
                "top1": result.top_of(j),
                "top5": result.top_of(j, 1),
                "gmacs": gmacs[j],
            }
            for j, resolution in enumerate(args.resolutions)
        ],
        "classifier_ckpt": args.classifier_ckpt,
        "predictor_ckpt": args.predictor_ckpt,
        "force_resolution": args.force_resolution,
        "sample_gumbel": args.sample_gumbel,
    }


def write_predictions(path: Path, result: Evaluation, folder: ImageFolder, resolutions: list[int]) -> None:
    """path, label, prediction and chosen resolution of every image that was read, in the order of the folder."""
    write_rows(
        path,
        [
            {"path": name, "label": label, "prediction": predicted, "resolution": resolutions[chosen]}
            for name, label, predicted, chosen in zip(folder.paths, folder.labels, result.predicted, result.chosen)
            if chosen >= 0
        ],
    )


if __name__ == "__main__":
    run(main)
