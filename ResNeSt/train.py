"""Train a ResNeSt on your own classes or on ImageNet, from a checkpoint of any kind or from nothing."""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.checkpoint import copy_best
from utils.cli import Interrupt, UserError, check_writable, run
from utils.device import set_device
from utils.images import CorruptImages, Loader, check_classes, open_root
from utils.launcher import is_scheduler, is_worker, launch
from utils.metrics import Progress, Throughput, write_results, write_rows

# isort: split
import mindspore as ms
import numpy as np
from mindspore.communication import get_group_size, get_rank, init
from src.checkpoints import BACKBONES, describe, facts_of, load
from src.config import SETTINGS, load_config
from src.dataset import evaluation_loader, training_batches, training_loader
from src.trainer import (
    EvaluateAndKeepBest,
    SoftTargetCrossEntropy,
    TrainOneStep,
    dropout_mask,
    learning_rates,
    load_state,
    make_optimizer,
    read_state,
    save_state,
    zero_last_gamma,
)

NEW_HEAD = "add --finetune to start with a new classifier"
# May differ between an interrupted run and the one that resumes it.
FREE = {"data_path", "device_target", "device_id", "num_workers", "rank_table_file", "output_dir", "resume", "strict"}
FREE |= {"ckpt_path", "finetune", "last_gamma", "eval_every"}


def main() -> int:
    args = load_config("train", __doc__)
    output = Path(args.output_dir)
    if is_scheduler():
        init()
        return 0
    if args.device_num > 1 and not is_worker():
        if args.resume is not None:
            read_state(args.resume)  # what is wrong with it, before starting any device
        return launch(Path(__file__).resolve(), sys.argv[1:], args.device_num, output / "logs", args.rank_table_file)

    # ----- data: its reading processes come before anything that starts threads -----
    train_folder, val_folder = open_root(args.data_path, args.num_classes)
    global_batch = args.batch_size * args.device_num
    if len(train_folder) < global_batch:
        raise UserError(
            f"{len(train_folder)} training images do not fill one step of {global_batch}; set --batch_size lower"
        )
    check_writable(output)
    with ExitStack() as stack:
        train_loader = stack.enter_context(training_loader(train_folder, args, args.device_num))
        val_loader = stack.enter_context(evaluation_loader(val_folder, args, args.device_num))
        return train(args, output, train_loader, val_loader)


def train(args: argparse.Namespace, output: Path, train_loader: Loader, val_loader: Loader) -> int:
    """Train on the images of the loaders and write everything to `output`; returns the exit status."""
    # ----- device -----
    device = set_device(args.device_target, None if is_worker() else args.device_id)
    rank, devices = 0, 1
    if is_worker():
        init()
        rank, devices = get_rank(), get_group_size()
    say = print if rank == 0 else lambda *words, **options: None

    # ----- network, loss, optimizer -----
    ms.set_seed(args.seed)
    network = BACKBONES[args.backbone].constructor(num_classes=args.num_classes, dropout=args.dropout)
    if args.resume is None and args.ckpt_path is not None:
        if not args.finetune:
            check_classes(args.ckpt_path, facts_of(args.ckpt_path).classes, train_loader.folder, NEW_HEAD)
        left_out = load(network, args.ckpt_path, args.finetune)
        if describe(args.ckpt_path)[0] in ("fused", "mindconverter"):
            say(
                f"{args.ckpt_path} has its BNs folded, so they learn their statistics anew; weights with BNs (the "
                "authors' .pth, or a checkpoint of train.py) are a better start"
            )
        if left_out:
            say(f"not loaded from {args.ckpt_path}, trained from nothing: {', '.join(left_out)}")
    elif args.last_gamma:
        zero_last_gamma(network)
    steps = len(train_loader.folder) // (args.batch_size * devices)
    rates = learning_rates(args.lr, args.min_lr, args.warmup_epochs, args.epochs, steps)
    optimizer = make_optimizer(network.trainable_params(), float(rates[0]), args.momentum, args.weight_decay)
    network.set_train(True)
    train_step = TrainOneStep(network, SoftTargetCrossEntropy(), optimizer, devices)
    say(f"{device} x {devices}, {len(train_loader.folder)} training and {len(val_loader.folder)} validation images")
    say(f"{steps} steps an epoch, learning rate {rates.max():.4g}; the first step compiles", flush=True)

    # ----- where to start -----
    settings = {
        key: getattr(args, key) for key, setting in SETTINGS.items() if "train" in setting.users and key not in FREE
    }
    settings |= {"device_num": devices, "images": len(train_loader.folder)}
    going_on = f"go on with --resume {output / 'resume.ckpt'}"
    state_file, best_file = output / "resume.ckpt", output / f"{args.backbone}.ckpt"
    position = {"epoch": 0, "step": 0, "loss": 0.0, "rows": [], "best": None}
    if args.resume is not None:
        position = load_state(args.resume, network, optimizer, settings)
        say(f"going on after step {position['step']} of epoch {position['epoch'] + 1}")
        if rank == 0 and position["best"] is not None:
            copy_best(Path(args.resume).with_name(best_file.name), best_file)
    rows = position["rows"]
    interrupt = Interrupt()
    evaluate = EvaluateAndKeepBest(
        network,
        val_loader,
        args.batch_size,
        best_file,
        (args.image_size, args.resize_size),
        position["best"],
        rank,
        devices,
        args.strict,
        interrupt,
    )

    def save(epoch: int, step: int, loss: float) -> None:
        train_step.synchronise()
        here = {"epoch": epoch, "step": step, "loss": loss, "rows": rows, "best": evaluate.best}
        if rank == 0:
            save_state(state_file, network, optimizer, settings, here)
        interrupt.hint = going_on

    # ----- epochs -----
    corrupt = CorruptImages(train_loader.folder, args.strict)
    images = args.batch_size * devices
    for epoch in range(position["epoch"], args.epochs):
        first, loss = 0, 0.0
        if epoch == position["epoch"]:
            first, loss = position["step"], position["loss"]
        meter = Throughput()
        batches = training_batches(train_loader, args, epoch, first, rank, devices)
        bar = Progress(f"epoch {epoch + 1}/{args.epochs}", steps * images, first * images, show=rank == 0)
        with bar as progress, interrupt.held():
            for step, (views, targets, unreadable) in enumerate(batches, first):
                for row in unreadable:
                    corrupt(row)
                keep = dropout_mask(network, args.batch_size, args.seed, epoch, step, rank, devices)
                lr = rates[epoch * steps + step]
                result = train_step(views, targets, keep, lr, interrupt.asked)
                loss += result.loss
                if step == first:
                    meter.reset()  # the first step compiles
                else:
                    meter.update(images)
                progress.update(images, loss=f"{loss / (step + 1):.4f}", lr=f"{lr:.2g}")
                if result.interrupt or (devices == 1 and interrupt.asked):
                    save(epoch, step + 1, loss)
                    say(f"\nstopped after step {step + 1} of epoch {epoch + 1}; {going_on}")
                    return 130

        with interrupt.held():
            save(epoch, steps, loss)
        if train_step.over_devices.of([interrupt.asked])[0]:  # too late for the last step to see
            say(f"\nstopped after epoch {epoch + 1}; {going_on}")
            return 130
        row = {"epoch": epoch + 1, "lr": float(rates[(epoch + 1) * steps - 1]), "loss": loss / steps}
        row |= {"train_images_per_s": meter.rate() if meter.images else None}
        line = f"epoch {epoch + 1}/{args.epochs}: loss {row['loss']:.4f}"
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            tested = evaluate(epoch + 1)
            row |= {"val_loss": tested.mean_loss(), "top1": tested.top(), "top5": tested.top(1)}
            line += f"; validation loss {tested.mean_loss():.4f}, top-1 {tested.top():.2%}, top-5 {tested.top(1):.2%}"
            if evaluate.best["epoch"] == epoch + 1:
                line += ", best so far"
        rows = [*rows, row]
        say(line, flush=True)
        if rank == 0:
            write_rows(output / "metrics.csv", rows)

    # ----- results -----
    best = evaluate.best
    if rank == 0:
        write_results(output / "results.json", {"best": best})
    left_out = np.count_nonzero(train_step.over_devices.of(corrupt.seen()))  # several devices may have met the same
    if left_out:
        say(f"{left_out} training images could not be read; others took their places")
    say(f"best: epoch {best['epoch']}, top-1 {best['top1']:.2%}; {best_file}")
    return 0


if __name__ == "__main__":
    run(main)
