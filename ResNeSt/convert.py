"""Convert the authors' PyTorch weights with MindConverter, and prove that the result computes the same.

The way is PyTorch -> ONNX -> MindConverter -> the fused form of this folder's network. --onnx FILE starts in the
middle; --direct goes straight from the first to the last and gives the same checkpoint.
"""

import argparse
import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.checkpoint import check_values, read_checkpoint
from utils.cli import Parser, UserError, run, whole_file
from utils.device import set_device
from utils.download import download
from utils.torch_file import read_torch_file

# isort: split
import numpy as np
from mindspore import Tensor
from src.checkpoints import BACKBONES, DEPTHS, describe, fill, from_layers, load, save, title
from src.resnest import ResNeSt

# Where the authors' weights are; the eight digits in a file's name begin its SHA-256.
RELEASE = "https://github.com/zhanghang1989/ResNeSt/releases/download/weights_step1"
AUTHORS_SHA256 = {
    "resnest50": "528c19ca",
    "resnest101": "22405ba7",
    "resnest200": "75117900",
    "resnest269": "0cc87c48",
}
# Of the largest logit. float32 arithmetic in another order moves the logits by some 1e-6 of it, a wrong layer by about
# as much as itself; this is far from both.
MAX_DIFFERENCE = 1e-3
OPSET = 11  # the one that MindConverter 1.7.0 was written for
OPERATORS = {
    *("Add", "AveragePool", "Constant", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "Identity", "MaxPool", "Mul"),
    *("Relu", "Reshape", "Softmax", "Split", "Transpose"),
}
LAYERS = ("Conv", "Gemm")  # those with weights
# MindConverter was written for NumPy before 1.24, which had other names for Python's own types.
MINDCONVERTER = """
import builtins, numpy
for name in ("bool", "complex", "float", "int", "object", "str"):
    vars(numpy).setdefault(name, getattr(builtins, name))
from mindconverter.cli import cli_entry
cli_entry()
"""
TAIL = 20  # lines of MindConverter's own to show when it fails
Layers = list[tuple[np.ndarray, np.ndarray]]  # weight and bias, in execution order


def main() -> None:
    args = arguments()
    require(args)
    if args.download:
        download(args.checkpoint_url, args.torch_ckpt, args.checkpoint_sha256)
    elif not args.onnx and not args.torch_ckpt.is_file():
        raise UserError(f"no file {args.torch_ckpt}; put the authors' weights there or add --download")
    set_device("CPU")  # other devices may multiply in half precision, and the proof is about float32
    constructor, size, _ = BACKBONES[args.backbone]
    logits = {}
    # The name is taken first, so that a place that cannot be written is noticed before the work, not after it.
    with whole_file(args.ckpt_path) as checkpoint, tempfile.TemporaryDirectory(prefix="convert_") as folder:
        folder = Path(folder)
        if not args.onnx:
            with step(f"PyTorch: {args.torch_ckpt}") as done:
                state = read_torch_file(args.torch_ckpt)
                fused = constructor(num_classes=describe(args.torch_ckpt)[2], fused=True)
                load(fused, args.torch_ckpt)  # refuses what is not the weights of this very network
                network = torch_network(args.backbone, state)
                images = sample(size)
                logits["PyTorch"] = run_torch(network, images)
                done(f"{len(state)} tensors")
        if not args.direct:
            with step(f"ONNX: {args.onnx or 'exported'}") as done:
                file = args.onnx or export_onnx(network, size, folder / "exported.onnx")
                model, size = read_onnx(file, size)
                rename(model, file)
                check_depth(model, file, args.backbone)
                images = sample(size)
                logits["ONNX"] = run_onnx(model, file, images)
                done(f"{len(model.graph.node)} nodes, images of {size} pixels")
            with step(f"MindConverter {version('mindconverter')}") as done:
                layers = mindconverter(model, size, folder)
                done(f"{len(layers)} layers")
            fused = fused_network(layers, args.backbone, file)
        with step("MindSpore") as done:
            save(fused, checkpoint)
            written = constructor(num_classes=fused.num_classes, fused=True)
            load(written, checkpoint)
            logits["MindSpore"] = written.set_train(False)(Tensor(images)).asnumpy()
            done("checkpoint written, read and run")
        prove(logits)
    print(f"{args.ckpt_path}: {args.backbone}, {fused.num_classes} classes, BNs folded into the convolutions")


def arguments() -> argparse.Namespace:
    """Read the command line; flags that would do nothing are refused with UserError."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, required=True, help="network of the weights (no default)")
    parser.add_argument(
        "--torch_ckpt",
        type=Path,
        metavar="FILE",
        help="the authors' .pth (default: under the name they gave it, such as resnest50-528c19ca.pth)",
    )
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="start from this ONNX file instead (default: none)")
    parser.add_argument(
        "--direct", action="store_true", help="map the weights without ONNX and MindConverter (default: with them)"
    )
    parser.add_argument("--ckpt_path", type=Path, metavar="FILE", help="checkpoint to write (default: BACKBONE.ckpt)")
    parser.add_argument(
        "--download", action="store_true", help="get the authors' file first, checked (default: it is there)"
    )
    parser.add_argument("--checkpoint_url", metavar="URL", help="where from (default: the authors' release)")
    parser.add_argument(
        "--checkpoint_sha256",
        metavar="HEX",
        help="SHA-256 of that file, or its first 8 digits or more (default: the authors')",
    )
    args = parser.parse_args()
    if args.onnx and (args.torch_ckpt or args.download or args.direct):
        parser.error("--onnx takes the place of --torch_ckpt, --download and --direct; leave them out")
    if not args.download and (args.checkpoint_url or args.checkpoint_sha256):
        parser.error("--checkpoint_url and --checkpoint_sha256 are for --download")
    if bool(args.checkpoint_url) != bool(args.checkpoint_sha256):
        parser.error("--checkpoint_url and --checkpoint_sha256 go together")
    name = f"{args.backbone}-{AUTHORS_SHA256[args.backbone]}.pth"
    args.torch_ckpt = args.torch_ckpt or Path(name)
    args.checkpoint_url = args.checkpoint_url or f"{RELEASE}/{name}"
    args.checkpoint_sha256 = args.checkpoint_sha256 or AUTHORS_SHA256[args.backbone]
    args.ckpt_path = args.ckpt_path or Path(f"{args.backbone}.ckpt")
    if args.ckpt_path.suffix != ".ckpt":
        parser.error(f"--ckpt_path must end in .ckpt, which MindSpore wants; {args.ckpt_path} does not")
    return args


def require(args: argparse.Namespace) -> None:
    """Whether the packages that this conversion needs are installed.

    Raises:
        UserError: some are not; it names them all.
    """
    names = ["torch"]  # MindConverter imports it too
    if not args.onnx:
        names.append("resnest")
    if not args.direct:
        names += ["onnx", "onnxruntime", "onnxoptimizer", "networkx", "pasta", "yapf", "mindconverter"]
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        python = ".".join(map(str, sys.version_info[:2]))
        raise UserError(
            f"{', '.join(missing)} not installed in the Python {python} that runs this; run make convert-env in the "
            "folder above and use .venv/bin/python (tested on Python 3.11)"
        )


@contextlib.contextmanager
def step(label: str) -> Iterator:
    """Print `label`, then the outcome that the block gives to the function it is handed, and the seconds."""
    start, outcome = time.perf_counter(), []
    print(f"{label}: ", end="", flush=True)
    try:
        yield outcome.append
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{outcome[0]}, {time.perf_counter() - start:.1f} s", flush=True)


def sample(size: int) -> np.ndarray:
    """The input of the proof, (1, 3, size, size) float32, normalised as an image would be."""
    return np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)


def torch_network(backbone: str, state: dict[str, np.ndarray]):
    """The authors' network with the weights `state`, in evaluation mode."""
    import torch
    from resnest.torch import resnest

    network = getattr(resnest, backbone)(num_classes=len(state["fc.bias"]))
    # The count of batches that a BN has seen is in some files and not in others; nothing is computed from it.
    network.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=False)
    return network.eval()


def run_torch(network, images: np.ndarray) -> np.ndarray:
    """Logits (1, classes) of the PyTorch network."""
    import torch

    with torch.no_grad():
        return network(torch.from_numpy(images)).numpy()


def export_onnx(network, size: int, file: Path) -> Path:
    """Write the PyTorch network for one image of `size` pixels to `file`, the BNs folded into the convolutions."""
    import torch

    with warnings.catch_warnings():
        # MindConverter knows the operators of the older exporter only, which PyTorch calls deprecated.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            torch.zeros(1, 3, size, size),
            str(file),
            opset_version=OPSET,
            dynamo=False,
            do_constant_folding=True,
            input_names=["input"],
            output_names=["output"],
        )
    return file


def read_onnx(path: Path, size: int):
    """The ONNX network in `path` and the side of its images in pixels: `size`, if the file leaves it open.

    Raises:
        UserError: it cannot be read, or is not a network of ResNeSt's operators from one image to its logits.
    """
    import onnx

    if not path.is_file():
        raise UserError(f"no file {path}; name an ONNX file")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
        weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    except Exception as error:  # protobuf's, onnx's and its checker's kinds, which have nothing in common
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as an ONNX file; it is truncated, damaged or "
            "of another kind, export it again"
        ) from error
    graph = model.graph
    strange = sorted({node.op_type for node in graph.node} - OPERATORS)
    if strange:
        raise UserError(
            f"{path} holds operators that ResNeSt does not have: {', '.join(strange)}; export the authors' network in "
            f"evaluation mode for one image with opset_version={OPSET} and dynamo=False"
        )
    check_values({name: value for name, value in weights.items() if value.dtype.kind not in "iu"}, path)
    # Old files list the weights among the inputs.
    inputs = [value for value in graph.input if value.name not in weights]
    sides = inputs[0].type.tensor_type.shape.dim if len(inputs) == 1 else []
    found = [side.dim_value for side in sides]  # 0: left open
    size = max(found[2:4], default=0) or size
    wanted = (1, 3, size, size)
    if len(found) != 4 or len(graph.output) != 1 or size % 32 or any(a not in (0, b) for a, b in zip(found, wanted)):
        raise UserError(
            f"{path} takes {found or f'{len(inputs)} inputs'} and gives {len(graph.output)} outputs; export a network "
            "that takes one image, (1, 3, side, side) with a side divisible by 32, and gives its logits"
        )
    for side, value in zip(sides, wanted):
        side.dim_value = value
    return model, size


def rename(model, path: Path) -> None:
    """Give the nodes and weights of an ONNX network the names that the conversion goes by; it computes the same.

    A node becomes <operator>_<number>, because MindConverter reads the operator out of the name. The weight and bias of
    the k-th layer in execution order become k.weight and k.bias; MindConverter's checkpoint has them in another order.

    Raises:
        UserError: a layer has no constant weight or no bias.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    # Exporters store equal weights once; Identity nodes stand for the others.
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in tensors:
            tensors[node.output[0]] = tensors[node.input[0]]
    layer = 0
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{number}"
        if node.op_type not in LAYERS:
            continue
        if len(node.input) != 3 or not set(node.input[1:]) <= set(tensors):
            raise UserError(
                f"{path}: layer {layer} ({node.op_type}) lacks a constant weight or bias, so this is no "
                "ResNeSt with its BNs folded; export the authors' network in evaluation mode"
            )
        for position, role in enumerate(("weight", "bias"), start=1):
            own = graph.initializer.add()
            own.CopyFrom(tensors[node.input[position]])
            own.name = node.input[position] = f"{layer}.{role}"
        layer += 1
    keep(graph.node, lambda node: node.op_type != "Identity" or node.output[0] not in tensors)
    used = {name for node in graph.node for name in node.input}
    keep(graph.initializer, lambda tensor: tensor.name in used)
    keep(graph.input, lambda value: value.name in used)


def keep(entries, wanted: Callable) -> None:
    """Remove the entries of a protobuf list that are not `wanted`."""
    kept = [entry for entry in entries if wanted(entry)]
    del entries[:]
    entries.extend(kept)


def check_depth(model, path: Path, backbone: str) -> None:
    """Whether an ONNX network has as many layers as `backbone`.

    Raises:
        UserError: it has not; says of which backbone it is, if of any.
    """
    layers = sum(node.op_type in LAYERS for node in model.graph.node)
    found = next((name for name, depth in DEPTHS.items() if depth == layers), None)
    if found is None:
        raise UserError(
            f"{path} has {layers} layers, so it is no ResNeSt (a {title(backbone)} has {DEPTHS[backbone]}); export the "
            "authors' network"
        )
    if found != backbone:
        raise UserError(f"{path} is of a {title(found)}, not of a {title(backbone)}; set --backbone {found}")


def run_onnx(model, path: Path, images: np.ndarray) -> np.ndarray:
    """Logits (1, classes) of the ONNX network that was in `path`.

    Raises:
        UserError: ONNX Runtime cannot run it.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: images})[0]
    except Exception as error:  # a class of its own for every status code
        raise UserError(f"ONNX Runtime cannot run {path}: {error}; export it again") from error


def mindconverter(model, size: int, folder: Path) -> Layers:
    """Convert an ONNX network with MindConverter, in a process and a folder of its own, and read what it made.

    Raises:
        UserError: it failed; the end of what it said is printed.
    """
    import onnx

    file, output = folder / "network.onnx", folder / "converted"
    onnx.save(model, str(file))
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in weights]
    words = ["--model_file", file, "--shape", f"1,3,{size},{size}", "--output", output, "--report", output]
    words += ["--input_nodes", *inputs, "--output_nodes", model.graph.output[0].name]
    result = subprocess.run(
        [sys.executable, "-c", MINDCONVERTER, *map(str, words)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    checkpoint, names = output / "network.ckpt", output / "weight_map_of_network.json"
    if result.returncode or not (checkpoint.is_file() and names.is_file()):
        said = result.stdout.rstrip().split("\n")[-TAIL:]
        report = output / "operator_scanning_report.csv"  # its lines refer to it, but it goes with the folder
        if report.is_file():
            said += [line for line in report.read_text().split("\n") if line and not line.endswith(", Supported")]
        print("", *said, sep="\n", flush=True)
        raise UserError(f"MindConverter failed with exit status {result.returncode}; its last lines are above")
    stored = read_checkpoint(checkpoint)
    rows = json.loads(names.read_text())["network"]
    name_of = {row["source_weight"]["name"]: row["converted_weight"]["name"] for row in rows}
    pairs = [(f"{k}.weight", f"{k}.bias") for k in range(sum(node.op_type in LAYERS for node in model.graph.node))]
    lost = [name for pair in pairs for name in pair if name not in name_of]
    if lost:
        raise UserError(f"MindConverter lost {len(lost)} weights, first {lost[0]}; export the ONNX file anew")
    return [tuple(stored[name_of[name]] for name in pair) for pair in pairs]


def fused_network(layers: Layers, backbone: str, path: Path) -> ResNeSt:
    """The fused network with the weights of `layers`, which came from `path`.

    Raises:
        UserError: they are not the layers of this backbone.
    """
    try:
        parameters = from_layers(layers, backbone)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    network = BACKBONES[backbone].constructor(num_classes=len(parameters["fc.bias"]), fused=True)
    fill(network, parameters)
    return network


def prove(logits: dict[str, np.ndarray]) -> None:
    """Print how far the logits that each of `logits` gave are from the first's.

    Raises:
        UserError: too far.
    """
    (first, right), *others = logits.items()
    allowed = MAX_DIFFERENCE * float(np.abs(right).max())
    for name, found in others:
        difference = float(np.abs(found - right).max()) if found.shape == right.shape else float("inf")
        print(f"logits of {name} differ from {first}'s by at most {difference:.1e}; {allowed:.1e} is allowed")
        if not difference <= allowed:
            raise UserError(f"{name} computes something else than {first} ({difference:.2g}); nothing written")


if __name__ == "__main__":
    run(main)
