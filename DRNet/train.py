"""Train DRNet: `--stage pretrain` the classifier on all resolutions, then `--stage finetune` it with the predictor."""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import run
from utils.device import Devices, join_devices
from utils.images import Loader
from utils.training import Training, begin, open_images, told_by_state

# isort: split
import mindspore as ms
from src.dataset import evaluation_loader, training_batches, training_loader
from src.drnet import DRNet, architecture_of, load_classifier, load_predictor, record_of, save_networks
from src.evaluation import dynamic_route, evaluate, fixed_route
from src.model_utils.config import check_sizes, load_config
from src.trainer import TrainOneStep, check_budget, learning_rates, make_optimizer, step_noise

# An epoch whose mean cost exceeds the budget by more than this share is best only if no other epoch keeps to it.
TOLERANCE = 0.05


def main() -> int:
    args = load_config("train", __doc__)
    if (status := begin(args, __file__)) is not None:
        return status
    start, told = args.resume or args.classifier_ckpt, {}
    if args.resume is not None:
        told = told_by_state(args.resume, ("resolutions", "num_classes", "shortcut_bn", "layers"))
    elif args.classifier_ckpt is not None:
        told = record_of(args.classifier_ckpt)
    train_folder, val_folder = open_images(args, start, told, args.finetune, ("predictor_size",))
    check_sizes(args)
    # The reading processes come before anything that starts threads.
    with (
        training_loader(train_folder, args) as train_loader,
        evaluation_loader(val_folder, args, args.device_num) as val_loader,
    ):
        return train(args, join_devices(args), train_loader, val_loader)


def start_networks(args: argparse.Namespace, devices: Devices) -> DRNet:
    """The networks with the weights to start from."""
    drnet = DRNet(architecture_of(args))
    if args.resume is None and args.classifier_ckpt is not None:
        left_out = load_classifier(drnet, args.classifier_ckpt, args.finetune)
        if left_out:
            devices.say(f"not loaded from {args.classifier_ckpt}, trained from nothing: {', '.join(left_out)}")
    if args.resume is None and args.stage == "finetune" and args.predictor_ckpt is not None:
        load_predictor(drnet, args.predictor_ckpt)
    return drnet


def train(args: argparse.Namespace, devices: Devices, train_loader: Loader, val_loader: Loader) -> int:
    """Train on the images of the loaders and write everything to `output_dir`; returns the exit status."""
    # ----- networks -----
    ms.set_seed(args.seed)
    with_predictor = args.stage == "finetune"
    drnet = start_networks(args, devices)
    predictor_gmacs, gmacs = drnet.gmacs()

    # ----- optimizers and step -----
    images = args.batch_size * devices.count
    steps = len(train_loader.folder) // images
    schedule = (args.warmup_epochs, args.lr_step, args.lr_gamma)
    rates = learning_rates(args.lr, args.lr_scheduler, args.epochs, steps, *schedule)
    networks = {drnet.classifier: 1.0} | ({drnet.predictor: args.predictor_lr_ratio} if with_predictor else {})
    optimizers = [
        make_optimizer(args.optimizer, network, rates * ratio, args.momentum, args.weight_decay)
        for network, ratio in networks.items()
    ]
    budget = (args.alpha, args.eta) if with_predictor and args.alpha is not None else None
    if budget is not None:
        check_budget(args.alpha, gmacs)
    temperature = args.temperature if with_predictor else None
    train_step = TrainOneStep(drnet, optimizers, args.batch_size, devices, temperature, budget)

    # ----- where to start -----
    best = ("classifier_net.ckpt", "predictor_net.ckpt")[: len(networks)]
    training = Training(args, devices, (train_loader, val_loader), images, [drnet], optimizers, best)
    route = dynamic_route(drnet, args.batch_size) if with_predictor else fixed_route(drnet, range(len(gmacs)))
    record = {"classes": val_loader.folder.classes, "resize_size": args.resize_size}
    keep = partial(save_networks, drnet, training.output, record, with_predictor)
    costs = ", ".join(f"{cost:.3f} at {size}" for size, cost in zip(args.resolutions, gmacs))
    devices.say(f"GMACs: {costs}; predictor {predictor_gmacs:.3f}")
    devices.say(f"{steps} steps an epoch; the first step compiles, which takes a minute or two", flush=True)

    # ----- epochs -----
    for epoch in training.epochs():
        drnet.set_train(True)
        batches = training_batches(train_loader, args, epoch, training.step, devices.rank, devices.count)
        with training.steps(batches) as left:
            for step, (views, labels, unreadable) in left:
                training.corrupt(unreadable)
                noise = step_noise(args.batch_size, len(gmacs), args.seed, epoch, step, devices)
                result = train_step(views, labels, noise, training.interrupt.asked)
                sums = {"passes": int(result.chosen.sum()), "correct": int(result.correct.sum())}
                training.add(result.interrupt, loss=result.loss, gmacs=float(result.chosen @ gmacs) / images, **sums)
        row, line = training.row(rates[(epoch + 1) * steps - 1])
        row["train_top1"] = training.totals["correct"] / max(training.totals["passes"], 1)
        row["train_gmacs"] = training.mean("gmacs") if with_predictor else None
        line += f", training top-1 {row['train_top1']:.2%}"
        if training.evaluates():
            tested = evaluate(
                drnet, val_loader, route, args.batch_size, training.interrupt, devices, training.corrupt_val
            )
            cost = tested.mean_gmacs(gmacs)
            row |= tested.figures(args.resolutions) | {"mean_gmacs": cost + predictor_gmacs if with_predictor else None}
            line += f"; validation top-1 {tested.top():.2%} ({tested.shares(args.resolutions)})"
            line += f", {row['mean_gmacs']:.3f} GMACs" if with_predictor else ""
            within = budget is None or cost <= args.alpha * (1 + TOLERANCE)
            figures = {"top1": tested.top(), "top5": tested.top(1), "within_budget": within}
            line += training.keep_best(figures, keep, by=("within_budget", "top1"))
        training.tell(row, line)
    return training.finish(stage=args.stage)


if __name__ == "__main__":
    run(main)
