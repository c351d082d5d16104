"""Train a ResNet-18: `--stage float`, then `--stage quantize` with bit-widths chosen for each image, or fixed ones."""

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
from src.checkpoints import describe, load, save
from src.config import architecture_of, complete, load_config
from src.dataset import EvalTransform, controller_images, evaluation_loader, training_batches, training_loader
from src.evaluation import evaluate
from src.inference import Predictor
from src.resnet import FLOAT, Architecture, ResNet
from src.trainer import DynamicLoss, TrainOneStep, dropout, even_controller, learning_rates, make_optimizer, step_noise

QUANTIZER = ("quant", "target_bits", "num_bits", "granularity")


def main() -> int:
    args = load_config("train", __doc__)
    if (status := begin(args, __file__)) is not None:
        return status
    start, told = args.resume or args.ckpt_path, {}
    if args.resume is not None:
        told = told_by_state(args.resume, ("num_classes", *QUANTIZER))
    elif args.ckpt_path is not None:
        _, told = describe(args.ckpt_path)
    # From a float network, or for the same classes, one may train for any bits.
    same_bits = args.resume is not None or (args.finetune and told["quant"] != FLOAT)
    train_folder, val_folder = open_images(args, start, told, args.finetune, () if same_bits else QUANTIZER)
    complete(args)
    # The reading processes come before anything that starts threads.
    with (
        training_loader(train_folder, args) as train_loader,
        evaluation_loader(val_folder, args, args.device_num) as val_loader,
    ):
        return train(args, join_devices(args), train_loader, val_loader)


def start_network(args: argparse.Namespace, devices: Devices, architecture: Architecture) -> tuple[ResNet, int]:
    """The network with the weights to start from, and the epochs in which its bits are drawn evenly."""
    network = architecture.network()
    if args.stage == "quantize":
        # Else `layer1` would learn at its own rate what the controller is to learn at a lower one.
        network.controller_gradient = min(args.controller_lr_ratio, 1.0)
    even_epochs = args.even_epochs if architecture.decisions else 0
    if args.ckpt_path is not None and args.resume is None:
        left_out = load(network, architecture, args.ckpt_path, args.finetune)
        if left_out:
            devices.say(f"not loaded from {args.ckpt_path}, trained from nothing: {', '.join(left_out)}")
        if "fc2.weight" not in left_out:
            even_epochs = 0  # the controller has learnt already
    if even_epochs:
        even_controller(network)
    return network, even_epochs


def train(args: argparse.Namespace, devices: Devices, train_loader: Loader, val_loader: Loader) -> int:
    """Train on the images of the loaders and write everything to `output_dir`; returns the exit status."""
    # ----- network, loss, optimizer -----
    ms.set_seed(args.seed)
    architecture = architecture_of(args)
    network, even_epochs = start_network(args, devices, architecture)
    images = args.batch_size * devices.count
    steps = len(train_loader.folder) // images
    rates = learning_rates(args.lr, args.lr_steps, args.lr_gamma, args.warmup_epochs, args.epochs, steps)
    optimizer = make_optimizer(network, float(rates[0]), args.momentum, args.weight_decay)
    dynamic = architecture.decisions > 0
    budget = (args.bit_budget, args.penalty, args.temperature) if dynamic else ()
    loss = DynamicLoss(network, architecture.bits, *budget, devices=devices.count)
    train_step = TrainOneStep(loss, optimizer, devices)

    # ----- where to start -----
    best = "resnet18.ckpt" if args.stage == "float" else "resnet18_dq.ckpt"
    loaders, kept = (train_loader, val_loader), {"even_epochs": even_epochs}
    training = Training(args, devices, loaders, images, [network], [optimizer], [best], kept=kept)
    even_epochs = training.kept["even_epochs"]
    predictor = Predictor(architecture, args.batch_size)
    record = {"resize_size": args.resize_size, "classes": val_loader.folder.classes}
    keep = partial(save, network, training.output / best, architecture, record)
    devices.say(f"{steps} steps an epoch; the first step compiles, which takes up to a minute", flush=True)

    # ----- epochs -----
    for epoch in training.epochs():
        network.set_train(True)
        if even_epochs and epoch == even_epochs and training.step == 0:
            transform = EvalTransform(args.image_size, args.resize_size)
            start = controller_images(train_loader.folder, transform)
            training.interrupt.hold_while(partial(train_step.start_controller, start, args.seed))
        train_step.controller_lr_ratio = args.controller_lr_ratio if dynamic and epoch >= even_epochs else 0.0
        batches = training_batches(train_loader, args, epoch, training.step, devices.rank, devices.count)
        with training.steps(batches) as left:
            for step, (views, labels, unreadable) in left:
                training.corrupt(unreadable)
                of_step = (args.batch_size, args.seed, epoch, step, devices.rank, devices.count)
                noise, mask = step_noise(architecture, *of_step), dropout(network, args.dropout, *of_step)
                lr = rates[epoch * steps + step]
                result = train_step(views, labels, noise, mask, lr, training.interrupt.asked)
                bits = {"bits": f"{result.bits:.2f}"} if dynamic else {}
                training.add(result.interrupt, {"lr": f"{lr:.2g}"} | bits, loss=result.loss, bits=result.bits)
        row, line = training.row(rates[(epoch + 1) * steps - 1])
        row |= {"train_bits": training.mean("bits")} if dynamic else {}
        line += f", {row['train_bits']:.2f} bits" if dynamic else ""
        if epoch >= even_epochs and training.evaluates():
            predictor.load(network)
            tested = evaluate(predictor, val_loader, training.interrupt, devices, training.corrupt_val)
            row |= tested.figures(architecture)
            line += f"; validation loss {row['val_loss']:.4f}, top-1 {row['top1']:.2%}, top-5 {row['top5']:.2%}"
            line += f", {row['bits']:.2f} bits" if dynamic else ""
            figures = tested.best_figures(architecture, args.bit_budget if dynamic else None)
            line += training.keep_best(figures, keep, by=("within_budget", "top1"))
        training.tell(row, line)
    return training.finish(stage=args.stage)


if __name__ == "__main__":
    run(main)
