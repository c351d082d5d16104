"""Train a ResNet-18: `--stage float`, then `--stage quantize` with bit-widths chosen for each image, or fixed ones."""

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
from src.checkpoints import Description, describe, load
from src.config import SETTINGS, architecture_of, load_config
from src.dataset import EvalTransform, controller_images, evaluation_loader, training_batches, training_loader
from src.trainer import (
    DynamicLoss,
    EvaluateAndKeepBest,
    TrainOneStep,
    even_controller,
    learning_rates,
    load_state,
    make_optimizer,
    read_state,
    save_state,
    step_noise,
)

NEW_HEAD = "add --finetune to start with a new classifier"
# May differ between an interrupted run and the one that resumes it.
FREE = {"data_path", "device_target", "device_id", "num_workers", "rank_table_file", "output_dir", "resume", "strict"}
FREE |= {"ckpt_path", "finetune", "eval_every"}


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
    sizes = (args.image_size, args.resize_size, args.batch_size, args.num_workers, args.device_num)
    with ExitStack() as stack:
        train_loader = stack.enter_context(training_loader(train_folder, args, args.device_num))
        val_loader = stack.enter_context(evaluation_loader(val_folder, *sizes))
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
    architecture = architecture_of(args)
    network = architecture.network()
    if args.stage == "quantize":
        # Else `layer1` would learn at its own rate what the controller is to learn at a lower one.
        network.controller_gradient = min(args.controller_lr_ratio, 1.0)
    dynamic = architecture.decisions > 0
    even_epochs = args.even_epochs if dynamic else 0
    if args.resume is None and args.ckpt_path is not None:
        if not args.finetune:
            check_classes(args.ckpt_path, describe(args.ckpt_path).classes, train_loader.folder, NEW_HEAD)
        left_out = load(network, architecture, args.ckpt_path, args.finetune)
        if left_out:
            say(f"not loaded from {args.ckpt_path}, trained from nothing: {', '.join(left_out)}")
        if "fc2.weight" not in left_out:
            even_epochs = 0  # the controller has learnt already
    if even_epochs:
        even_controller(network)
    steps = len(train_loader.folder) // (args.batch_size * devices)
    rates = learning_rates(args.lr, args.lr_steps, args.lr_gamma, args.warmup_epochs, args.epochs, steps)
    optimizer = make_optimizer(network, float(rates[0]), args.momentum, args.weight_decay)
    network.set_train(True)
    budget = (args.bit_budget, args.penalty, args.temperature) if dynamic else ()
    train_step = TrainOneStep(DynamicLoss(network, architecture.bits, *budget, devices=devices), optimizer, devices)
    say(f"{device} x {devices}, {len(train_loader.folder)} training and {len(val_loader.folder)} validation images")
    say(f"{steps} steps an epoch; the first step compiles, which takes up to a minute", flush=True)

    # ----- where to start -----
    settings = {
        key: getattr(args, key) for key, setting in SETTINGS.items() if args.stage in setting.users and key not in FREE
    }
    settings |= {"stage": args.stage, "device_num": devices, "images": len(train_loader.folder)}
    going_on = f"go on with --resume {output / 'resume.ckpt'}"
    state_file = output / "resume.ckpt"
    best_file = output / ("resnet18.ckpt" if args.stage == "float" else "resnet18_dq.ckpt")
    position = {"epoch": 0, "step": 0, "loss": 0.0, "bits": 0.0, "rows": [], "best": None, "even_epochs": even_epochs}
    if args.resume is not None:
        position = load_state(args.resume, network, optimizer, settings)
        say(f"going on after step {position['step']} of epoch {position['epoch'] + 1}")
        if rank == 0 and position["best"] is not None:
            copy_best(Path(args.resume).with_name(best_file.name), best_file)
    rows, even_epochs = position["rows"], position["even_epochs"]
    interrupt = Interrupt()
    evaluate = EvaluateAndKeepBest(
        network,
        Description(architecture, args.resize_size, tuple(val_loader.folder.classes)),
        val_loader,
        args.batch_size,
        best_file,
        args.bit_budget if dynamic else None,
        position["best"],
        rank,
        devices,
        args.strict,
        interrupt,
    )

    def save(epoch: int, step: int, loss: float, bits: float) -> None:
        train_step.synchronise()
        here = {"epoch": epoch, "step": step, "loss": loss, "bits": bits, "rows": rows, "best": evaluate.best}
        here["even_epochs"] = even_epochs
        if rank == 0:
            save_state(state_file, network, optimizer, settings, here)
        interrupt.hint = going_on

    # ----- epochs -----
    corrupt = CorruptImages(train_loader.folder, args.strict)
    images = args.batch_size * devices
    for epoch in range(position["epoch"], args.epochs):
        first, loss, bits = 0, 0.0, 0.0
        if epoch == position["epoch"]:
            first, loss, bits = position["step"], position["loss"], position["bits"]
        if even_epochs and epoch == even_epochs and first == 0:
            transform = EvalTransform(args.image_size, args.resize_size)
            with interrupt.held():
                train_step.start_controller(controller_images(train_loader.folder, transform), args.seed)
        if dynamic:
            train_step.controller_lr_ratio = 0.0 if epoch < even_epochs else args.controller_lr_ratio
        meter = Throughput()
        batches = training_batches(train_loader, args, epoch, first, rank, devices)
        bar = Progress(f"epoch {epoch + 1}/{args.epochs}", steps * images, first * images, show=rank == 0)
        with bar as progress, interrupt.held():
            for step, (views, labels, unreadable) in enumerate(batches, first):
                for row in unreadable:
                    corrupt(row)
                noise = step_noise(architecture, args.batch_size, args.seed, epoch, step, rank, devices)
                lr = rates[epoch * steps + step]
                result = train_step(views, labels, noise, lr, interrupt.asked)
                loss, bits = loss + result.loss, bits + result.bits
                if step == first:
                    meter.reset()  # the first step compiles
                else:
                    meter.update(images)
                shown = {"loss": f"{loss / (step + 1):.4f}"} | ({"bits": f"{bits / (step + 1):.2f}"} if dynamic else {})
                progress.update(images, **shown)
                if result.interrupt or (devices == 1 and interrupt.asked):
                    save(epoch, step + 1, loss, bits)
                    say(f"\nstopped after step {step + 1} of epoch {epoch + 1}; {going_on}")
                    return 130

        with interrupt.held():
            save(epoch, steps, loss, bits)
        if train_step.over_devices.of([interrupt.asked])[0]:  # too late for the last step to see
            say(f"\nstopped after epoch {epoch + 1}; {going_on}")
            return 130
        row = {"epoch": epoch + 1, "lr": float(rates[(epoch + 1) * steps - 1]), "loss": loss / steps}
        row |= {"train_images_per_s": meter.rate() if meter.images else None}
        line = f"epoch {epoch + 1}/{args.epochs}: loss {row['loss']:.4f}"
        if dynamic:
            row["train_bits"] = bits / steps
            line += f", {row['train_bits']:.2f} bits"
        if epoch >= even_epochs and ((epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs):
            tested = evaluate(epoch + 1)
            row |= {"val_loss": tested.mean_loss(), "top1": tested.top(), "top5": tested.top(1)}
            line += f"; validation loss {tested.mean_loss():.4f}, top-1 {tested.top():.2%}, top-5 {tested.top(1):.2%}"
            if architecture.bits:
                row["bit_gflops"] = tested.bit_flops(architecture, architecture.bits)
            if dynamic:
                row["bits"] = tested.mean_bits(architecture.bits)
                row |= dict(zip((f"chosen_{width}" for width in architecture.bits), tested.chosen.sum(0).tolist()))
                line += f", {row['bits']:.2f} bits"
            if evaluate.best["epoch"] == epoch + 1:
                line += ", best so far"
        rows = [*rows, row]
        say(line, flush=True)
        if rank == 0:
            write_rows(output / "metrics.csv", rows)

    # ----- results -----
    best = evaluate.best
    if rank == 0:
        write_results(output / "results.json", {"stage": args.stage, "best": best})
    left_out = np.count_nonzero(train_step.over_devices.of(corrupt.seen()))  # several devices may have met the same
    if left_out:
        say(f"{left_out} training images could not be read; others took their places")
    say(f"best: epoch {best['epoch']}, top-1 {best['top1']:.2%}; {best_file}")
    return 0


if __name__ == "__main__":
    run(main)
