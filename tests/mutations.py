"""Whether `make test` notices defects: puts forty of them, one at a time, into a copy of the repository and tests it.

    python tests/mutations.py                      all of them, which takes an hour or more
    python tests/mutations.py --only 3 17 DRNet/   numbers, and texts that stand in a file's name or a description
    python tests/mutations.py --list

A defect is caught if a test fails, of the half that `make test` runs and in the files that the table names. The copy
has the tracked files as they are in the working tree, and the running environment as its .venv. Before anything is
changed, each old text must occur once, and the tests must pass. Exit status: 0 if nine in ten are caught, 2 otherwise.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.cli import Parser, UserError, run

SECONDS = 1200  # after which tests that hang count as failed
# Of each defect: the file, or a pattern of files that are to stay the same; what it breaks; the tests in question,
# under tests/; then the old and the new text.
TABLE = """
utils/metrics.py: of equal logits the class with the larger number comes first: utils/test_metrics.py
- earlier = np.arange(logits.shape[1]) < labels[:, None]
+ earlier = np.arange(logits.shape[1]) > labels[:, None]
utils/metrics.py: a CSV file is written in place, not whole or not at all: utils/test_metrics.py
- with whole_file(path) as temporary, temporary.open("w", newline="", errors="surrogateescape") as file:
+ with Path(path).open("w", newline="", errors="surrogateescape") as file:
utils/checkpoint.py: surplus parameters of a checkpoint are no error: utils/test_checkpoint.py
- if missing or surplus:
+ if missing:
utils/training.py: the worst epoch is kept instead of the best: utils/test_training.py
- in by] < [self.best[name]
+ in by] > [self.best[name]
utils/training.py: a resumed training begins its epoch anew: utils/test_training.py
- for name in ("epoch", "step", "totals", "rows", "best"):
+ for name in ("epoch", "totals", "rows", "best"):
utils/images.py: every epoch has the same order of images: utils/test_images.py
- np.random.default_rng([seed, epoch, 0])
+ np.random.default_rng([seed, 0])
utils/launcher.py: Ctrl-C ends a run on several devices with status 0: utils/test_launcher.py
- return 130 if asked else 0
+ return 0
utils/download.py: a download that starts over is appended to the part that is there: utils/test_download.py
- part.open("ab" if start else "wb")
+ part.open("ab")
utils/hccl_tools/rank_table.py: ranks from 10 on are sorted as text: utils/test_hccl_tools.py
- server["device"].sort(key=lambda device: int(device["rank_id"]))
+ server["device"].sort(key=lambda device: device["rank_id"])
utils/config.py: a training may be resumed with another seed: utils/test_config.py drnet/test_commands.py
- Setting("seed of every random draw", seed, reading)
+ Setting("seed of every random draw", seed, reading, free=True)
utils/sample_imagenet.py: --seed does not change what is chosen: utils/test_sample_imagenet.py
- chance = random.Random(seed)
+ chance = random.Random(0)
DRNet/src/classifier.py: shortcuts use BN set 0 although each resolution has its own: drnet/test_networks.py
- shortcut_set = 0 if self.shared_shortcut_bn else index
+ shortcut_set = 0
DRNet/src/trainer.py: the predictor's BN statistics advance twice a step: drnet/test_trainer.py
- self.restore()
+ pass
DRNet/src/trainer.py: every step of an epoch has the same Gumbel noise: drnet/test_trainer.py
- candidates), seed, epoch, GUMBEL, step)
+ candidates), seed, epoch, GUMBEL)
DRNet/src/trainer.py: the budget's gradient is that of the sum over the images, not of the mean: drnet/test_trainer.py
- eta * self.gmacs / spread / chosen.sum()
+ eta * self.gmacs / spread
DRNet/src/dataset.py: the centre crop rounds down where it should round half to even: drnet/test_dataset.py
- left, top = (round((side - image_size) / 2) for side in size)
+ left, top = ((side - image_size) // 2 for side in size)
DRNet/src/evaluation.py: images that do not fill a batch are never classified: drnet/test_evaluation.py
- note(queues.flush())
+ pass
DRNet/train.py: an epoch over the budget may be kept as the best: drnet/test_commands.py
- training.keep_best(figures, keep, by=("within_budget", "top1"))
+ training.keep_best(figures, keep)
ResNeSt/src/resnest.py: the attention weights of the two splits are swapped: resnest/test_networks.py
- a1 = ops.sigmoid(z1 - z2)
+ a1 = ops.sigmoid(z2 - z1)
ResNeSt/src/resnest.py: a bias in front of a BN is folded without its scale: resnest/test_networks.py
- bias = (bias - mean) * scale + beta
+ bias = bias - mean * scale + beta
ResNeSt/src/dataset.py: label smoothing spreads over one class too few: resnest/test_dataset.py
- targets = np.full((len(labels), num_classes), smoothing / num_classes, np.float32)
+ targets = np.full((len(labels), num_classes), smoothing / (num_classes - 1), np.float32)
ResNeSt/src/trainer.py: the warm-up is a step behind: resnest/test_trainer.py
- lr * (step + 1) / max(warmup, 1)
+ lr * step / max(warmup, 1)
ResNeSt/src/evaluation.py: evaluation leaves the BNs in training: resnest/test_commands.py
- network.set_train(False)
+ pass
ResNeSt/train.py: every epoch has the learning rates of the first: resnest/test_commands.py
- lr = rates[epoch * steps + step]
+ lr = rates[step]
DynamicQuant/src/quant.py: stored weights are rounded down: dynamicquant/test_networks.py
- codes = ops.round(weight_positions(weight) * levels(bits))
+ codes = ops.floor(weight_positions(weight) * levels(bits))
DynamicQuant/src/quant.py: PACT's maximum also gets the gradient of the scaling: dynamicquant/test_networks.py
- alpha = ops.stop_gradient(self.maximum())
+ alpha = self.maximum()
DynamicQuant/src/resnet.py: both convolutions of a block take the first one's decision: dynamicquant/test_networks.py
- number if number == FIRST else number + 1
+ number
DynamicQuant/src/evaluation.py: layers at the target bits cost too little: dynamicquant/test_commands.py
- return fixed * architecture.target_bits**2
+ return fixed * architecture.target_bits
DynamicQuant/src/trainer.py: controller and network have each other's learning rate: dynamicquant/test_trainer.py
- zip(self.rates, (1.0, self.controller_lr_ratio))
+ zip(self.rates, (self.controller_lr_ratio, 1.0))
DynamicQuant/src/trainer.py: mean bits below the budget are rewarded: dynamicquant/test_trainer.py
- self.penalty * ops.relu(mean - self.budget)
+ self.penalty * (mean - self.budget)
DynamicQuant/train.py: a resumed training forgets whether its bits are drawn evenly: dynamicquant/test_training.py
- even_epochs = training.kept["even_epochs"]
+ pass
DynamicQuant/train.py: the weights at the start are evaluated, not those of the epoch: dynamicquant/test_training.py
- predictor.load(network)
+ pass
DDRNet/src/models/ddrnet.py: no ReLU before the last exchange between the branches: ddrnet/test_networks.py
- self.upsample(self.compression4(self.relu(low)), high)
+ self.upsample(self.compression4(low), high)
DDRNet/src/data/augment/mixup.py: in mode pair the partners have different draws: ddrnet/test_mixup.py
- plan = plan + plan[::-1]
+ plan = plan + plan
DDRNet/src/data/imagenet.py: Mixup ends an epoch late: ddrnet/test_mixup.py ddrnet/test_keys.py
- 0 < args.mixup_off_epoch <= epoch
+ 0 < args.mixup_off_epoch < epoch
DDRNet/src/data/transforms.py: evaluation rounds the side to resize to, where it should cut off: ddrnet/test_augment.py
- return int(image_size / crop_pct)
+ return round(image_size / crop_pct)
DDRNet/src/trainers/train_one_step.py: small gradients are enlarged to the norm to clip to: ddrnet/test_trainer.py
- min(1.0, self.clip / max(norm, 1e-12))
+ self.clip / max(norm, 1e-12)
DDRNet/train.py: a resumed training starts with the first loss scale again: ddrnet/test_commands.py
- kept = {"loss_scale": vars(loss_scale)}
+ kept = {"loss_scale": dict(vars(loss_scale))}
*/ascend310_infer/src/preprocess.cc: the centre crop rounds down: ascend310/test_preprocessing.py
- static_cast<int>(std::nearbyint((resize_ - crop_) / 2.0))
+ static_cast<int>((resize_ - crop_) / 2.0)
*/ascend310_infer/src/results.cc: results that were cut short count as done: ascend310/test_program.py
- return fs::file_size(File(name), error) == classes * sizeof(float) && !error;
+ return fs::exists(File(name), error);
"""


class Mutation(NamedTuple):
    """One defect, as the table tells it."""

    files: str
    breaks: str
    tests: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.files}: {self.breaks}"

    def texts(self, copy: Path) -> dict[Path, str]:
        """The files to change, with their content; UserError if the old text is not exactly once in each."""
        texts = {file: file.read_text() for file in copy.glob(self.files)}
        counts = [text.count(self.old) for text in texts.values()]
        if set(counts) != {1}:
            raise UserError(f"{self.old!r} is {counts} times in {self.files}, not once; correct the table")
        return texts


def mutations() -> dict[int, Mutation]:
    lines = TABLE.strip().split("\n")
    entries = enumerate(zip(lines[::3], lines[1::3], lines[2::3]), 1)
    return {number: Mutation(*head.split(": "), old[2:], new[2:]) for number, (head, old, new) in entries}


def copy_repository(copy: Path) -> None:
    """The tracked files, and an environment of links to this one; what the tests build is kept in that of the copy."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    kept = Path(sys.prefix, "ascend310")
    (copy / ".venv" / kept.name).mkdir(parents=True)
    for entry in (*Path(sys.prefix).iterdir(), *(kept.iterdir() if kept.is_dir() else ())):
        if entry != kept and entry.suffix != ".lock":
            (copy / ".venv" / entry.relative_to(sys.prefix)).symlink_to(entry)


def first_failure(tests: str, copy: Path) -> str:
    """Run tests in the copy; returns the name of the first that fails, or "" if all pass."""
    # Byte code would be that of before where a file changes within a second and keeps its size.
    words = ["env", "PYTHONDONTWRITEBYTECODE=1", "timeout", "--foreground", "--kill-after=9", str(SECONDS)]
    words += [str(copy / ".venv/bin/python"), "-m", "pytest", "-q", "-x", "-m", "not full", "-p", "no:cacheprovider"]
    words += [f"tests/{name}" for name in tests.split()]
    result = subprocess.run(words, cwd=copy, capture_output=True, text=True)
    if result.returncode not in (0, 1, 2, 124):  # all passed, one failed, one cannot be read, time is over
        raise UserError(f"pytest {tests} ends with {result.returncode}: {result.stdout[-500:]}")
    lines = [line for line in result.stdout.split("\n") if line.startswith(("FAILED ", "ERROR "))]
    return "" if result.returncode == 0 else [*(line.split()[1] for line in lines), "a test that does not end"][0]


def try_all(chosen: dict[int, Mutation], copy: Path) -> dict[int, tuple[float, str]]:
    """The seconds of each mutation's tests, and the first that failed or ""; UserError if they fail without it."""
    before, outcomes, passed = {number: mutation.texts(copy) for number, mutation in chosen.items()}, {}, set()
    for number, mutation in chosen.items():
        if mutation.tests not in passed and (failed := first_failure(mutation.tests, copy)):
            raise UserError(f"{failed} fails without any change; correct that first")
        passed.add(mutation.tests)
        for file, text in before[number].items():
            file.write_text(text.replace(mutation.old, mutation.new))
        start = time.perf_counter()
        failed = first_failure(mutation.tests, copy)
        outcomes[number] = (time.perf_counter() - start, failed)
        for file, text in before[number].items():
            file.write_text(text)
        print(f"{number:2} {mutation.breaks}: {failed or 'NOT CAUGHT'}", flush=True)
    return outcomes


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NUMBER|TEXT", help="which ones (default: all)")
    parser.add_argument("--list", action="store_true", help="print the table and run nothing (default: run)")
    args = parser.parse_args()
    chosen = mutations()
    if args.only is not None:
        numbers = {int(word) for word in args.only if word.isdigit()}
        texts = [word for word in args.only if not word.isdigit()]
        chosen = {n: m for n, m in chosen.items() if n in numbers or any(text in str(m) for text in texts)}
    if args.list or not chosen:
        print(*(f"{number:2} {mutation}; {mutation.tests}" for number, mutation in chosen.items()), sep="\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutations_") as folder:
        copy_repository(Path(folder))
        outcomes = try_all(chosen, Path(folder))
    print("\n   seconds caught")
    for number, (seconds, failed) in outcomes.items():
        print(f"{number:2} {seconds:7.1f} {'yes' if failed else 'NO':6} {chosen[number]}")
    caught = sum(bool(failed) for _, failed in outcomes.values())
    print(f"{caught} of {len(chosen)} caught, {sum(seconds for seconds, _ in outcomes.values()) / 60:.1f} minutes")
    return 0 if caught >= 0.9 * len(chosen) else 2


if __name__ == "__main__":
    run(main)
