"""Train DDRNet-23 on ImageNet or on your own classes."""

import sys
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.checkpoint import copy_best
from utils.cli import Interrupt, UserError, check_writable, run
from utils.device import set_device
from utils.images import CorruptImages, check_classes, open_root
from utils.launcher import is_scheduler, is_worker, launch
from utils.metrics import Progress, Throughput, write_results, write_rows

# isort: split
import mindspore as ms
import numpy as np
from mindspore.communication import get_group_size, get_rank, init
from src.configs.settings import SETTINGS, load_config
from src.data.data_utils.moxing_adapter import fetch_data, upload_results
from src.data.imagenet import DROP_PATH, TrainingBatches, evaluation_loader, training_loader
from src.tools.callback import EvaluateAndKeepBest, StepRecord, plot
from src.tools.criterion import SoftTargetCrossEntropy
from src.tools.get_misc import classes_of, get_network, load_network, load_state, read_state, save_state, set_precision
from src.tools.optimizer import make_optimizer
from src.tools.schedulers import learning_rates
from src.trainers.train_one_step import LossScale, TrainOneStep

NEW_HEAD = "add --finetune to start with a new classifier"
# May differ between an interrupted run and the one that resumes it.
FREE = {"data_url", "device_target", "device_id", "num_parallel_workers", "rank_table_file", "output_dir", "resume"}
FREE |= {"strict", "pretrained", "finetune", "run_modelarts", "train_url", "eval_every"}


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
    if args.run_modelarts:
        args.data_url = str(fetch_data(args.data_url))
    train_folder, val_folder = open_root(args.data_url, args.num_classes)
    global_batch = args.batch_size * args.device_num * args.accumulation_step
    if len(train_folder) < global_batch:
        raise UserError(
            f"{len(train_folder)} training images do not fill one step of {global_batch}; set --batch_size lower"
        )
    check_writable(output)
    with ExitStack() as stack:
        train_loader = stack.enter_context(training_loader(train_folder, args, args.device_num))
        val_loader = stack.enter_context(evaluation_loader(val_folder, args, args.device_num))
        return train(args, output, train_loader, val_loader)


def train(args, output, train_loader, val_loader) -> int:
    # ----- device -----
    device = set_device(args.device_target, None if is_worker() else args.device_id)
    rank, devices = 0, 1
    if is_worker():
        init()
        rank, devices = get_rank(), get_group_size()
    say = print if rank == 0 else lambda *words, **options: None

    # ----- network, loss, optimizer -----
    ms.set_seed(args.seed)
    network = get_network(args, args.drop_path_rate)
    set_precision(network, args, device)
    if args.pretrained is not None and args.resume is None:
        if not args.finetune:
            check_classes(args.pretrained, classes_of(args.pretrained), train_loader.folder, NEW_HEAD)
        left_out = load_network(network, args.pretrained, args.finetune)
        if left_out:
            say(f"not loaded from {args.pretrained}, trained from nothing: {', '.join(left_out)}")
    batches = TrainingBatches(train_loader, args, rank, devices, ms.Tensor)
    steps = batches.steps
    rates = learning_rates(
        args.lr_scheduler,
        args.base_lr * args.batch_size * devices * args.accumulation_step / 256,
        args.warmup_lr,
        args.min_lr,
        args.warmup_length,
        args.epochs,
        steps,
        args.lr_adjust,
        args.lr_gamma,
    )
    optimizer = make_optimizer(
        args.optimizer,
        network.trainable_params(),
        float(rates[0]),
        args.weight_decay,
        args.momentum,
        args.use_nesterov,
        args.beta,
        args.decay,
    )
    network.set_train(True)
    loss_scale = LossScale(args.loss_scale, args.is_dynamic_loss_scale)
    clip = args.clip_global_norm_value if args.clip_global_norm else None
    train_step = TrainOneStep(network, SoftTargetCrossEntropy(), optimizer, loss_scale, clip, devices)
    say(f"{device} x {devices}, {len(train_loader.folder)} training and {len(val_loader.folder)} validation images")
    say(
        f"{steps} steps an epoch, learning rate {rates.max():.4g}, {args.amp_level}; the first step compiles",
        flush=True,
    )
    if args.auto_augment and args.color_jitter:
        say("auto_augment is on, so color_jitter is not applied")

    # ----- where to start -----
    settings = {
        key: getattr(args, key) for key, setting in SETTINGS.items() if "train" in setting.users and key not in FREE
    }
    settings |= {"device_num": devices, "images": len(train_loader.folder)}
    state_file = output / "resume.ckpt"
    going_on = f"go on with --resume {state_file}"
    position = {"epoch": 0, "step": 0, "loss": 0.0, "rows": [], "best": None, "loss_scale": asdict(loss_scale)}
    before = None
    if args.resume is not None:
        position = load_state(args.resume, network, optimizer, settings)
        train_step.loss_scale = loss_scale = LossScale(**position["loss_scale"])
        before = Path(args.resume).parent / "steps.csv"
        say(f"going on after step {position['step']} of epoch {position['epoch'] + 1}")
    rows = position["rows"]
    best_file = output / "ddrnet23.ckpt"
    record = None
    if rank == 0:
        last = (position["epoch"] + 1, position["step"])
        record = StepRecord(output / "steps.csv", before, position["epoch"] * steps + position["step"], last)
        if position["best"] is not None:
            copy_best(Path(args.resume).with_name(best_file.name), best_file)

    interrupt = Interrupt()
    evaluate = EvaluateAndKeepBest(
        network,
        train_step,
        val_loader,
        args.batch_size,
        best_file,
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
            save_state(state_file, network, optimizer, settings, {**here, "loss_scale": asdict(loss_scale)})
            record.write()
        interrupt.hint = going_on

    # ----- epochs -----
    corrupt = CorruptImages(train_loader.folder, args.strict)
    images = args.batch_size * args.accumulation_step * devices
    for epoch in range(position["epoch"], args.epochs):
        first, loss = 0, 0.0
        if epoch == position["epoch"]:
            first, loss = position["step"], position["loss"]
        meter = Throughput()
        bar = Progress(f"epoch {epoch + 1}/{args.epochs}", steps * images, first * images, show=rank == 0)
        with record or nullcontext(), bar as progress, interrupt.held():
            for step, parts in enumerate(batches.epoch(epoch, first), first):
                for row in (row for _, _, unreadable in parts for row in unreadable):
                    corrupt(row)
                keeps = drop_path(network, args, epoch, step, rank, devices)
                lr = rates[epoch * steps + step]
                ready = [(image, target, keep) for (image, target, _), keep in zip(parts, keeps)]
                result = train_step(ready, lr, interrupt.asked)
                loss += result.loss
                if rank == 0:
                    record.add(epoch + 1, step + 1, lr, result.loss, result.norm, result.loss_scale, result.overflow)
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
        if train_step.sum_over_devices([interrupt.asked])[0]:  # too late for the last step to see
            say(f"\nstopped after epoch {epoch + 1}; {going_on}")
            return 130
        row = {"epoch": epoch + 1, "lr": float(rates[(epoch + 1) * steps - 1]), "loss": loss / steps}
        row |= {"overflow_steps": loss_scale.overflows, "train_images_per_s": meter.rate() if meter.images else None}
        line = f"epoch {epoch + 1}/{args.epochs}: loss {row['loss']:.4f}"
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            tested = evaluate(epoch + 1)
            row |= {"val_loss": tested.mean_loss(), "top1": tested.top(), "top5": tested.top(1)}
            line += f"; validation loss {tested.mean_loss():.4f}, top-1 {tested.top():.2%}, top-5 {tested.top(1):.2%}"
            if evaluate.best["epoch"] == epoch + 1:
                line += ", best so far"
        if loss_scale.overflows:
            line += f"; {loss_scale.overflows} steps skipped so far for overflow"
        rows = [*rows, row]
        say(line, flush=True)
        if rank == 0:
            write_rows(output / "metrics.csv", rows)

    # ----- results -----
    if rank == 0:
        write_results(output / "results.json", {"best": evaluate.best, "overflow_steps": loss_scale.overflows})
        plot(output / "training.png", record, rows, steps)
    if args.run_modelarts and rank == 0:
        upload_results(output, args.train_url)
    left_out = np.count_nonzero(train_step.sum_over_devices(corrupt.seen()))  # several devices may have met the same
    if left_out:
        where = f" (their names: {output}/logs)" if devices > 1 else ""
        say(f"{left_out} training images could not be read; others took their places{where}")
    best = evaluate.best
    say(f"best: epoch {best['epoch']}, top-1 {best['top1']:.2%}; {best_file}")
    return 0


def drop_path(network, args, epoch: int, step: int, rank: int, devices: int) -> list[np.ndarray | None]:
    """What the residuals are multiplied by, (N, 14) for each batch of a step; the draws are of the whole step."""
    if not args.drop_path_rate:
        return [None] * args.accumulation_step
    rng = np.random.default_rng([args.seed, epoch, DROP_PATH, step])
    keep = network.sample_keep(args.batch_size * args.accumulation_step * devices, rng)
    return list(keep.reshape(devices, args.accumulation_step, args.batch_size, -1)[rank])


if __name__ == "__main__":
    run(main)
