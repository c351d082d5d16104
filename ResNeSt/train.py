"""Train a ResNeSt on your own classes or on ImageNet, from a checkpoint of any kind or from nothing."""

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import run
from utils.device import Devices, join_devices
from utils.images import Loader
from utils.training import Training, begin, open_images, told_by_state

# isort: split
import mindspore as ms
from src.checkpoints import BACKBONES, describe, load, record_of, save
from src.config import load_config, set_sizes
from src.dataset import evaluation_loader, training_batches, training_loader
from src.evaluation import evaluate
from src.trainer import (
    SoftTargetCrossEntropy,
    TrainOneStep,
    dropout_mask,
    learning_rates,
    make_optimizer,
    zero_last_gamma,
)


def main() -> int:
    args = load_config("train", __doc__)
    if (status := begin(args, __file__)) is not None:
        return status
    start, told = args.resume or args.ckpt_path, {}
    if args.resume is not None:
        told = told_by_state(args.resume, ("backbone", "num_classes", "image_size", "resize_size"))
    elif args.ckpt_path is not None:
        told = record_of(args.ckpt_path)
    train_folder, val_folder = open_images(args, start, told, args.finetune)
    for size in ("image_size", "resize_size"):  # one may well train for another size than the checkpoint's
        if getattr(args, size) is None or (args.resume is not None and size not in args.given):
            setattr(args, size, told.get(size))
    set_sizes(args, warn=False)
    # The reading processes come before anything that starts threads.
    with (
        training_loader(train_folder, args) as train_loader,
        evaluation_loader(val_folder, args, args.device_num) as val_loader,
    ):
        return train(args, join_devices(args), train_loader, val_loader)


def train(args: argparse.Namespace, devices: Devices, train_loader: Loader, val_loader: Loader) -> int:
    """Train on the images of the loaders and write everything to `output_dir`; returns the exit status."""
    # ----- network, loss, optimizer -----
    ms.set_seed(args.seed)
    network = BACKBONES[args.backbone].constructor(num_classes=args.num_classes, dropout=args.dropout)
    if args.resume is None and args.ckpt_path is not None:
        left_out = load(network, args.ckpt_path, args.finetune)
        if describe(args.ckpt_path)[0] in ("fused", "mindconverter"):
            devices.say(
                f"{args.ckpt_path} has its BNs folded, so they learn their statistics anew; weights with BNs (the "
                "authors' .pth, or a checkpoint of train.py) are a better start"
            )
        if left_out:
            devices.say(f"not loaded from {args.ckpt_path}, trained from nothing: {', '.join(left_out)}")
    elif args.last_gamma:
        zero_last_gamma(network)
    images = args.batch_size * devices.count
    steps = len(train_loader.folder) // images
    rates = learning_rates(args.lr, args.min_lr, args.warmup_epochs, args.epochs, steps)
    optimizer = make_optimizer(network.trainable_params(), float(rates[0]), args.momentum, args.weight_decay)
    train_step = TrainOneStep(network, SoftTargetCrossEntropy(), optimizer, devices)

    # ----- where to start -----
    best = f"{args.backbone}.ckpt"
    training = Training(args, devices, (train_loader, val_loader), images, [network], [optimizer], [best])
    record = {name: getattr(args, name) for name in ("image_size", "resize_size")}
    record["classes"] = val_loader.folder.classes
    devices.say(f"{steps} steps an epoch, learning rate {rates.max():.4g}; the first step compiles", flush=True)

    # ----- epochs -----
    for epoch in training.epochs():
        network.set_train(True)
        batches = training_batches(train_loader, args, epoch, training.step, devices.rank, devices.count)
        with training.steps(batches) as left:
            for step, (views, targets, unreadable) in left:
                training.corrupt(unreadable)
                keep = dropout_mask(network, args.batch_size, args.seed, epoch, step, devices.rank, devices.count)
                lr = rates[epoch * steps + step]
                result = train_step(views, targets, keep, lr, training.interrupt.asked)
                training.add(result.interrupt, {"lr": f"{lr:.2g}"}, loss=result.loss)
        row, line = training.row(rates[(epoch + 1) * steps - 1])
        if training.evaluates():
            tested = evaluate(network, val_loader, args.batch_size, training.interrupt, devices, training.corrupt_val)
            loss, top1, top5 = tested.mean_loss(), tested.top(), tested.top(1)
            row |= {"val_loss": loss, "top1": top1, "top5": top5}
            line += f"; validation loss {loss:.4f}, top-1 {top1:.2%}, top-5 {top5:.2%}"
            figures = {"top1": top1, "top5": top5, "loss": loss}
            line += training.keep_best(figures, lambda: save(network, training.output / best, record))
        training.tell(row, line)
    return training.finish()


if __name__ == "__main__":
    run(main)
