"""The Ascend 310 program in Python: the same model, images, flags and result files, run by MindSpore instead of Lite.

For MINDIR files that are newer than the Lite release at hand, and to check one against the other. It takes images in
class folders only. run_infer_310.sh starts it with `--backend mindspore`.
"""

import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401  (before mindspore)

# isort: split
import argparse
import os

import numpy as np
from PIL import Image

from utils.cli import Interrupt, Parser, UserError, check_writable, run, whole_file
from utils.config import natural, side, whole
from utils.images import MOST_PROCESSES, CorruptImages, Loader, open_image, rgb
from utils.metrics import Progress, Throughput
from utils.result_files import ENDING, INCOMPLETE, named_images

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
# (3, 256): what each level of each channel becomes.
NORMALISED = ((np.arange(256)[:, None] / 255 - MEAN) / STD).T.astype(np.float32)
RESULTS, TIMES = "result_Files", "time_Result/test_perform_static.txt"
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def parse_arguments() -> argparse.Namespace:
    """Read the command line, whose flags are those of the C++ program."""
    parser = Parser(description="Logits of a MINDIR classifier for every image of a folder.", allow_abbrev=False)
    add = parser.add_argument
    add("--model_path", type=Path, required=True, help="MINDIR file (no default)")
    add("--dataset_path", type=Path, required=True, help="class folders of images, or a root with val/ (no default)")
    add("--device_target", default="Ascend", choices=("CPU", "GPU", "Ascend"), help="device (default: %(default)s)")
    add("--device_id", type=natural, default=0, help="number of the device (default: %(default)s)")
    add("--resize", type=side, default=256, help="side of the square to resize to (default: %(default)s)")
    add("--crop", type=side, default=224, help="side of its centre, which the model sees (default: %(default)s)")
    add("--interpolation", default="bilinear", choices=FILTERS, help="Pillow's filter (default: %(default)s)")
    add("--batch_size", type=whole(1, 2**12), default=1, help="images in a call of the model (default: %(default)s)")
    add("--num_threads", type=natural, default=os.cpu_count(), help="reading processes (default: %(default)s)")
    what = "threads of the model; 0: MindSpore's choice (default: 0)"
    add("--model_threads", type=whole(0, 2**12), default=0, help=what)
    add("--output_dir", type=Path, default=Path("."), help="gets result_Files/ and time_Result/ (default: .)")
    add("--resume", action="store_true", help="keep the results of an interrupted run (default: remove them)")
    args = parser.parse_args()
    if args.crop > args.resize:
        parser.error(f"--crop {args.crop} is larger than --resize {args.resize}")
    if args.num_threads > (most := MOST_PROCESSES * (os.cpu_count() or 1)):
        parser.error(f"--num_threads {args.num_threads} is too much for this machine; at most {most}")
    return args


def prepare(path: Path, resize: int, crop: int, interpolation: str) -> np.ndarray:
    """The centre of an image file's resized square, normalised, float32 (3, crop, crop); Unreadable if it is none."""
    with open_image(path) as image:
        square = rgb(image).resize((resize, resize), FILTERS[interpolation])
    edge = round((resize - crop) / 2)
    pixels = np.asarray(square)[edge : edge + crop, edge : edge + crop]
    return np.stack([table[pixels[..., channel]] for channel, table in enumerate(NORMALISED)])


class Network:
    """A MINDIR classifier: images float32 (N, 3, S, S), N up to the batch size, to logits float32 (N, `classes`).

    UserError if there is no such device or file, or its input or output is another.
    """

    def __init__(self, args: argparse.Namespace):
        import mindspore as ms  # so late that the reading processes do not have it
        from mindspore.train.mind_ir_pb2 import ModelProto

        from utils.device import set_device
        from utils.export import load_mindir

        if args.model_threads:
            ms.set_context(runtime_num_threads=args.model_threads)
        set_device(args.device_target, args.device_id)
        self.tensor = ms.Tensor
        self.cell = load_mindir(args.model_path)
        # A graph takes other shapes than it was exported for, and may compute something; the file says which was meant.
        model = ModelProto.FromString(args.model_path.read_bytes())
        inputs = [tensor for parameter in model.graph.input for tensor in parameter.tensor]
        exported = [list(tensor.dims) for tensor in inputs if tensor.data_type == tensor.FLOAT]
        wanted = [args.batch_size, 3, args.crop, args.crop]
        if len(inputs) != 1 or exported not in ([wanted], [[-1, *wanted[1:]]]):  # -1: any number
            fault = f"the input of {args.model_path} is {' and '.join(str(list(tensor.dims)) for tensor in inputs)}"
            make = f"--batch_size and --crop make it {wanted} of float32"
            raise UserError(f"{fault}, but {make}; set them as it was exported")
        self.batch = np.zeros(wanted, np.float32)
        logits = self(self.batch)
        if logits.ndim != 2 or len(logits) != args.batch_size:
            raise UserError(f"{args.model_path} returns {logits.shape}, not logits of {args.batch_size} images")
        self.classes = logits.shape[1]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.batch[: len(images)] = images
        return self.cell(self.tensor(self.batch)).asnumpy().astype(np.float32)[: len(images)]


def begin(args: argparse.Namespace, images: Path) -> None:
    """Remove an earlier run's results; with --resume keep them, or UserError if they are of other settings."""
    folder = args.output_dir / RESULTS
    old = [path for path in folder.iterdir() if path.name.endswith(ENDING)]
    model = args.model_path.stat()
    settings = (
        f"MindSpore on {args.device_target}, images of {images.resolve()}, model of {model.st_size} bytes and time "
        f"{model.st_mtime_ns}, resize {args.resize}, crop {args.crop}, {args.interpolation}"
    )
    kept = folder / ".settings"
    before = os.fsdecode(kept.read_bytes()) if kept.is_file() else "unknown"
    if args.resume and old and before != settings:
        fault = f"{folder} is of another run ({before}, now {settings})"
        raise UserError(f"{fault}; leave out --resume or set --output_dir to another place")
    if not args.resume:
        for path in (*old, args.output_dir / TIMES):
            path.unlink(missing_ok=True)
        if old:
            print(f"removed {len(old)} results of an earlier run from {folder}")
    with whole_file(kept) as temporary:
        temporary.write_bytes(os.fsencode(settings))


def infer() -> int:
    """The program; returns the exit status, INCOMPLETE if images could not be read."""
    args = parse_arguments()
    if not args.model_path.is_file():
        raise UserError(f"there is no model {args.model_path}; export.py makes one")
    names, folder = named_images(args.dataset_path)
    for path in (RESULTS, Path(TIMES).parent):
        check_writable(args.output_dir / path)
    results = [args.output_dir / RESULTS / f"{name}{ENDING}" for name in names]
    corrupt = CorruptImages(folder, strict=False)
    milliseconds = []

    def view(path: Path, row: int, epoch: int) -> np.ndarray:
        return prepare(path, args.resize, args.crop, args.interpolation)

    with Loader(folder, view, (3, args.crop, args.crop), args.batch_size, max(1, args.num_threads)) as loader:
        interrupt = Interrupt()
        interrupt.hint = "go on with --resume"
        network = interrupt.hold_while(lambda: Network(args))  # MindSpore would lose it while it compiles
        begin(args, folder.paths.root)
        size = network.classes * np.dtype(np.float32).itemsize
        rows = [row for row, path in enumerate(results) if not path.is_file() or path.stat().st_size != size]
        print(f"{len(rows)} of {len(folder)} images to do, {network.classes} classes, {args.device_target}", flush=True)
        meter = Throughput()
        with Progress("inference", len(rows)) as progress:
            for batch in loader.batches(rows):
                corrupt(batch.corrupt)
                if len(batch.rows):
                    start = time.perf_counter()
                    logits = network(batch.images)
                    milliseconds.append(1000 * (time.perf_counter() - start))
                    for row, values in zip(batch.rows.tolist(), logits):
                        with whole_file(results[row]) as temporary:
                            temporary.write_bytes(values.tobytes())
                    meter.update(len(batch.rows))
                progress.update(len(batch.rows) + len(batch.corrupt))
    print(f"{meter.images} images, {len(corrupt.rows)} skipped, {meter.rate():.1f} images/s")
    if milliseconds:
        with whole_file(args.output_dir / TIMES) as temporary:
            temporary.write_text(
                f"images: {meter.images}\nskipped: {len(corrupt.rows)}\nbatch_size: {args.batch_size}\n"
                f"inference of a batch, mean ms: {np.mean(milliseconds):.6g}\n"
                f"inference of a batch, p50 ms: {np.percentile(milliseconds, 50):.6g}\n"
                f"inference of a batch, p99 ms: {np.percentile(milliseconds, 99):.6g}\n"
                f"images/s end to end: {meter.rate():.6g}\n"
            )
    return INCOMPLETE if corrupt.rows else 0


if __name__ == "__main__":
    run(infer)
