"""Train DDRNet-23 on ImageNet or on your own classes."""

import argparse
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.checkpoint import save_checkpoint
from utils.cli import run
from utils.device import Devices, join_devices
from utils.images import Loader
from utils.training import Training, begin, open_images, told_by_state

# isort: split
import mindspore as ms
from src.configs.settings import load_config
from src.data.data_utils.moxing_adapter import fetch_data, upload_results, uploading
from src.data.imagenet import TrainingBatches, evaluation_loader, training_loader
from src.models.ddrnet import DDRNet23
from src.tools.callback import StepRecord, plot
from src.tools.criterion import SoftTargetCrossEntropy
from src.tools.evaluation import evaluate
from src.tools.get_misc import get_network, load_network, record_of, set_precision
from src.tools.optimizer import make_optimizer
from src.tools.schedulers import learning_rates
from src.trainers.train_one_step import LossScale, TrainOneStep, drop_path

BEST = "ddrnet23.ckpt"


def main() -> int:
    args = load_config("train", __doc__)
    if (status := begin(args, __file__)) is not None:
        return status
    start, told = args.resume or args.pretrained, {}
    if args.resume is not None:
        told = told_by_state(args.resume, ("num_classes",))
    elif args.pretrained is not None:
        told = record_of(args.pretrained)
    if args.run_modelarts:
        args.data_url = str(fetch_data(args.data_url))
    where = {"data_path": args.data_url, "batches": args.accumulation_step}
    folders = open_images(args, start, told, args.finetune, ("crop_pct",), **where)
    # The reading processes come before anything that starts threads.
    with (
        training_loader(folders[0], args) as train_loader,
        evaluation_loader(folders[1], args, args.device_num) as val_loader,
    ):
        devices = join_devices(args)
        with uploading(args, devices.rank):
            return train(args, devices, train_loader, val_loader)


def start_network(args: argparse.Namespace, devices: Devices) -> DDRNet23:
    """The network with the weights to start from."""
    network = get_network(args, args.drop_path_rate)
    set_precision(network, args, devices.target)
    if args.pretrained is not None and args.resume is None:
        left_out = load_network(network, args.pretrained, args.finetune)
        if left_out:
            devices.say(f"not loaded from {args.pretrained}, trained from nothing: {', '.join(left_out)}")
    return network


def train(args: argparse.Namespace, devices: Devices, train_loader: Loader, val_loader: Loader) -> int:
    """Train on the images of the loaders and write everything to `output_dir`; returns the exit status."""
    # ----- network, loss, optimizer -----
    ms.set_seed(args.seed)
    network = start_network(args, devices)
    batches = TrainingBatches(train_loader, args, devices.rank, devices.count, ms.Tensor)
    images = args.batch_size * args.accumulation_step * devices.count
    schedule = (args.base_lr, args.warmup_lr, args.min_lr, args.warmup_length, args.epochs, batches.steps)
    rates = learning_rates(args.lr_scheduler, *schedule, args.lr_adjust, args.lr_gamma, images)
    moments = (args.weight_decay, args.momentum, args.use_nesterov, args.beta, args.decay)
    optimizer = make_optimizer(args.optimizer, network.trainable_params(), float(rates[0]), *moments)
    loss_scale = LossScale(args.loss_scale, args.is_dynamic_loss_scale)
    clip = args.clip_global_norm_value if args.clip_global_norm else None
    train_step = TrainOneStep(network, SoftTargetCrossEntropy(), optimizer, loss_scale, clip, devices)

    # ----- where to start -----
    kept = {"loss_scale": vars(loss_scale)}
    training = Training(args, devices, (train_loader, val_loader), images, [network], [optimizer], [BEST], kept=kept)
    record = None
    if devices.rank == 0:
        record = StepRecord(training.output / "steps.csv", args.resume, training.epoch, training.step, batches.steps)
        training.beside = record.write
    told = {name: getattr(args, name) for name in ("num_classes", "image_size", "crop_pct")}
    told["classes"] = val_loader.folder.classes
    keep = partial(save_checkpoint, list(network.get_parameters()), training.output / BEST, told)
    precision = f"learning rate {rates.max():.4g}, {args.amp_level}"
    devices.say(f"{batches.steps} steps an epoch, {precision}; the first step compiles", flush=True)
    if args.auto_augment and args.color_jitter:
        devices.say("auto_augment is on, so color_jitter is not applied")

    # ----- epochs -----
    for epoch in training.epochs():
        network.set_train(True)
        with record or nullcontext(), training.steps(batches.epoch(epoch, training.step)) as left:
            for step, parts in left:
                training.corrupt([row for _, _, unreadable in parts for row in unreadable])
                keeps = drop_path(network, args, epoch, step, devices)
                lr = rates[epoch * batches.steps + step]
                ready = [(views, targets, keep) for (views, targets, _), keep in zip(parts, keeps)]
                result = train_step(ready, lr, training.interrupt.asked)
                if record is not None:
                    record.add(epoch + 1, step + 1, lr, result)
                training.add(result.interrupt, {"lr": f"{lr:.2g}"}, loss=result.loss)
        row, line = training.row(rates[(epoch + 1) * batches.steps - 1])
        row["overflow_steps"] = loss_scale.overflows
        if training.evaluates():
            tested = evaluate(network, val_loader, args.batch_size, training.interrupt, devices, training.corrupt_val)
            figures = {"loss": tested.mean_loss(), "top1": tested.top(), "top5": tested.top(1)}
            row |= {"val_loss": figures["loss"], "top1": figures["top1"], "top5": figures["top5"]}
            line += "; validation loss {loss:.4f}, top-1 {top1:.2%}, top-5 {top5:.2%}".format_map(figures)
            line += training.keep_best(figures, keep)
        if loss_scale.overflows:
            line += f"; {loss_scale.overflows} steps skipped so far for overflow"
        training.tell(row, line)
        if args.run_modelarts and devices.rank == 0 and (epoch + 1) % args.save_every == 0:
            upload_results(args.output_dir, args.train_url, last=False)
    if record is not None:
        plot(training.output / "training.png", record, training.rows, batches.steps)
    return training.finish(overflow_steps=loss_scale.overflows)


if __name__ == "__main__":
    run(main)
