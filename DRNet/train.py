"""Train DRNet: `--stage pretrain` the classifier on all resolutions, then `--stage finetune` it with the predictor."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import Interrupt, UserError, run
from utils.device import set_device
from utils.images import CorruptImages, open_root
from utils.launcher import is_worker, launch
from utils.metrics import Progress, Throughput, write_results, write_rows

# isort: split
import mindspore as ms
import numpy as np
from mindspore.communication import get_group_size, get_rank, init
from src.dataset import Augmentation, evaluation_batches, training_batches
from src.drnet import Architecture, DRNet, load_networks, save_networks, shortcut_bn_of
from src.evaluation import Evaluation, dynamic_route, evaluate, fixed_route
from src.gumbelmodule import gumbel_noise
from src.model_utils.config import architecture_settings, load_config
from src.trainer import StepResult, Trainer, learning_rates, load_state, make_optimizer, read_state, save_state

# May differ between an interrupted run and the one that resumes it.
FREE = (
    "config_path",
    "given",
    "data_path",
    "device_target",
    "device_id",
    "num_workers",
    "output_dir",
    "resume",
    "strict",
)
FREE += ("classifier_ckpt", "predictor_ckpt", "new_head")
# An epoch whose mean cost exceeds the budget by more than this share is best only if no other epoch keeps to it.
TOLERANCE = 0.05


def main() -> int:
    args = load_config("train", __doc__)
    output = Path(args.output_dir)
    if args.device_num > 1 and not is_worker():
        return launch(Path(__file__).resolve(), sys.argv[1:], args.device_num, output / "logs")

    # ----- data and device -----
    finetune = args.stage == "finetune"
    train_folder, val_folder = open_root(args.data_path, args.num_classes)
    rank, devices = 0, 1
    if is_worker():
        device = set_device(args.device_target)
        init()
        rank, devices = get_rank(), get_group_size()
    else:
        device = set_device(args.device_target, args.device_id)
    steps = len(train_folder) // (args.batch_size * devices)
    if not steps:
        raise UserError(f"{len(train_folder)} training images do not fill one batch; set --batch_size lower")
    workers = args.num_workers or max(1, os.cpu_count() // devices)
    say = print if rank == 0 else lambda *words, **options: None

    # ----- networks -----
    ms.set_seed(args.seed)
    sizes = architecture_settings(args)
    shortcut_bn = args.shortcut_bn
    if args.resume is not None:
        shortcut_bn = read_state(args.resume)["settings"]["shortcut_bn"]
    elif args.classifier_ckpt is not None:
        kept = {key: value for key, value in sizes.items() if not (args.new_head and key == "num_classes")}
        shortcut_bn = shortcut_bn_of(args.classifier_ckpt, kept)
    elif finetune:
        raise UserError("fine-tuning starts from a pre-trained classifier; give it with --classifier_ckpt")
    drnet = DRNet(Architecture(**sizes, shortcut_bn=shortcut_bn))
    if args.resume is None:
        left_out = load_networks(drnet, args.classifier_ckpt, args.predictor_ckpt if finetune else None, args.new_head)
        if left_out:
            say(f"not loaded from {args.classifier_ckpt}, trained from nothing: {', '.join(left_out)}")

    # ----- optimizer and step -----
    rates = learning_rates(
        args.lr, args.lr_scheduler, args.epochs, steps, args.warmup_epochs, args.lr_step, args.lr_gamma
    )
    trained = {drnet.classifier: 1.0}
    if finetune:
        trained[drnet.predictor] = args.predictor_lr_ratio
    optimizers = [
        make_optimizer(args.optimizer, network, rates * ratio, args.momentum, args.weight_decay)
        for network, ratio in trained.items()
    ]
    budget = (args.alpha, args.eta) if finetune and args.alpha is not None else None
    trainer = Trainer(drnet, optimizers, args.batch_size, devices, args.temperature if finetune else None, budget)
    predictor_gmacs, gmacs = drnet.gmacs()
    augment = Augmentation(tuple(args.crop_scale), tuple(args.crop_ratio), args.flip)
    say(f"{device} x {devices}, {len(train_folder)} training and {len(val_folder)} validation images")
    say("GMACs: " + ", ".join(f"{cost:.3f} at {size}" for size, cost in zip(args.resolutions, gmacs)), end="")
    say(f"; predictor {predictor_gmacs:.3f}")
    say("compiling the training graphs in the first step, which takes a minute or two", flush=True)

    # ----- where to start -----
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    settings |= {"shortcut_bn": shortcut_bn, "images": len(train_folder)}
    if args.device_num > 1 or devices > 1:
        settings["device_num"] = devices
    state_file = output / "resume.ckpt"
    position = {"epoch": 0, "step": 0, "totals": Totals().__dict__, "rows": [], "best": None}
    if args.resume is not None:
        position = load_state(args.resume, drnet, optimizers, settings)
        say(f"going on after step {position['step']} of epoch {position['epoch'] + 1}")
    rows, best = position["rows"], position["best"]

    # ----- epochs -----
    interrupt = Interrupt()
    going_on = f"go on with --resume {state_file}"
    corrupt = CorruptImages(train_folder, args.strict)
    for epoch in range(position["epoch"], args.epochs):
        first, totals = 0, Totals()
        if epoch == position["epoch"]:
            first, totals = position["step"], Totals(**position["totals"])
        batches = training_batches(
            train_folder, args.image_size, augment, args.batch_size, workers, args.seed, epoch, first, rank, devices
        )
        meter = Throughput()
        images = args.batch_size * devices
        bar = Progress(f"epoch {epoch + 1}/{args.epochs}", steps * images, first * images, show=rank == 0)
        with bar as progress, interrupt.held():
            for step, batch in enumerate(batches, first):
                for row in batch.corrupt:
                    corrupt(row)
                noise = gumbel_noise((devices, args.batch_size, len(gmacs)), args.seed, epoch, 2, step)[rank]
                result = trainer.step(batch.images, batch.labels, noise[: len(batch.labels)], interrupt.asked)
                totals.add(result, gmacs)
                if step == first:
                    meter.reset()  # the first step compiles
                else:
                    meter.update(images)
                progress.update(images, loss=f"{totals.loss / totals.steps:.4f}", top1=f"{totals.top1():.2f}%")
                if result.interrupt or (devices == 1 and interrupt.asked):
                    trainer.synchronise()
                    here = {"epoch": epoch, "step": step + 1, "totals": totals.__dict__, "rows": rows, "best": best}
                    if rank == 0:
                        save_state(state_file, drnet, optimizers, settings, here)
                    say(f"\nstopped after step {step + 1} of epoch {epoch + 1}; {going_on}")
                    return 130

        with interrupt.held():
            trainer.synchronise()
            here = {"epoch": epoch, "step": steps, "totals": totals.__dict__, "rows": rows, "best": best}
            if rank == 0:
                save_state(state_file, drnet, optimizers, settings, here)
            interrupt.hint = going_on
        if trainer.sum_over_devices([interrupt.asked])[0]:  # too late for the last step to see
            say(f"\nstopped after epoch {epoch + 1}; {going_on}")
            return 130
        row = {
            "epoch": epoch + 1,
            "lr": float(rates[(epoch + 1) * steps - 1]),
            "loss": totals.loss / totals.steps,
            "train_top1": totals.top1(),
            "train_gmacs": totals.gmacs / totals.images if finetune else None,
            "train_images_per_s": meter.rate(),
        }
        line = f"epoch {epoch + 1}/{args.epochs}: loss {row['loss']:.4f}, training top-1 {row['train_top1']:.2f} %"
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            route = dynamic_route(drnet, args.batch_size) if finetune else fixed_route(drnet, range(len(gmacs)))
            evaluation = evaluate(
                drnet,
                evaluation_batches(
                    val_folder, args.image_size, args.resize_size, args.batch_size, workers, rank, devices
                ),
                len(val_folder),
                route,
                args.batch_size,
                on_corrupt=CorruptImages(val_folder, args.strict),
                expected=len(range(rank, len(val_folder), devices)),
                show=rank == 0,
            )
            evaluation = over_devices(evaluation, trainer)
            drnet.set_train(True)
            cost = evaluation.mean_gmacs(gmacs)
            row |= {"top1": evaluation.top(), "top5": evaluation.top(1)}
            row |= {f"top1_{size}": evaluation.top_of(j) for j, size in enumerate(args.resolutions)}
            row |= {f"images_{size}": int(evaluation.images[j]) for j, size in enumerate(args.resolutions)}
            row |= {"mean_gmacs": cost + predictor_gmacs if finetune else None}
            each = ", ".join(
                f"{size}: {row[f'images_{size}']}"
                + (f" x {top:.2f} %" if (top := row[f"top1_{size}"]) is not None else "")
                for size in args.resolutions
            )
            line += f"; validation top-1 {row['top1']:.2f} % ({each})"
            if finetune:
                line += f", {row['mean_gmacs']:.3f} GMACs"
            within = budget is None or cost <= args.alpha * (1 + TOLERANCE)
            if best is None or (within, row["top1"]) >= (best["within_budget"], best["top1"]):
                best = {"epoch": epoch + 1, "top1": row["top1"], "within_budget": within}
                if rank == 0:
                    save_networks(drnet, output)
                line += ", best so far"
        rows = [*rows, row]
        say(line, flush=True)
        if rank == 0:
            write_rows(output / "metrics.csv", rows)

    if rank == 0:
        write_results(output / "results.json", {"stage": args.stage, "best": best, "left_out": len(corrupt.rows)})
    if corrupt.rows:
        say(f"{len(corrupt.rows)} training images could not be read and were left out")
    say(f"best: epoch {best['epoch']}, top-1 {best['top1']:.2f} %; {output}/classifier_net.ckpt", end="")
    say(f" {output}/predictor_net.ckpt" if finetune else "")
    return 0


@dataclass
class Totals:
    """Running sums over the steps of an epoch."""

    steps: int = 0
    images: int = 0
    passes: int = 0
    correct: int = 0
    loss: float = 0.0
    gmacs: float = 0.0

    def add(self, result: StepResult, gmacs: list[float]) -> None:
        self.steps += 1
        self.images += result.images
        self.passes += int(result.chosen.sum())
        self.correct += int(result.correct.sum())
        self.loss += result.loss
        self.gmacs += float(np.dot(result.chosen, gmacs))

    def top1(self) -> float:
        """Top-1 in percent over all passes through the classifier."""
        return 100 * self.correct / max(self.passes, 1)


def over_devices(evaluation: Evaluation, trainer: Trainer) -> Evaluation:
    """`evaluation` with the counts of all devices."""
    counts = np.concatenate([evaluation.correct, evaluation.images[:, None]], axis=1)
    counts = trainer.sum_over_devices(counts.ravel()).reshape(counts.shape).astype(np.int64)
    return replace(evaluation, correct=counts[:, :2], images=counts[:, 2])


if __name__ == "__main__":
    run(main)
