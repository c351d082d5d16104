"""The authors' weights to this project's checkpoint, with the real MindConverter, from ONNX and directly."""

import hashlib
import importlib.util
import json
import re
import sys

import convert
import numpy as np
import pytest
from conftest import ROOT, one_line_error, run_script
from golden.recipe import images, value
from mindspore import Tensor
from src.checkpoints import describe, load, record_of
from src.resnest50 import resnest50

from utils.checkpoint import arrays, read_checkpoint
from utils.cli import UserError
from utils.torch_file import read_torch_file

GOLDEN = ROOT / "tests" / "golden"
SCRIPT = ROOT / "ResNeSt" / "convert.py"
TOOLS = ["torch", "resnest", "onnx", "onnxruntime", "onnxoptimizer", "mindconverter"]
MISSING = [name for name in TOOLS if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed; make convert-env")


def torch_save(path, arrays):
    import torch

    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    return path


def without(*names):
    """Words that run convert.py in a Python that lacks these packages."""
    lines = [
        "import runpy, sys",
        f"sys.modules.update(dict.fromkeys({names}))",
        f"sys.argv[0], sys.path[0] = {str(SCRIPT)!r}, {str(SCRIPT.parent)!r}",
        "runpy.run_path(sys.argv[0], run_name='__main__')",
    ]
    return ["-c", "\n".join(lines)]


def parameters(path):
    return arrays(read_checkpoint(path))


def assert_equal(one, other):
    one, other = parameters(one), parameters(other)
    assert list(one) == list(other) and len(one) == 176
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-6, atol=1e-6, err_msg=name)


def differences(output):
    """What a conversion printed: whose logits differ from whose by how much, and how much is allowed."""
    line = r"logits of (\w+) differ from (\w+)'s by at most (\S+); (\S+) is allowed"
    return {(a, b): (float(found), float(allowed)) for a, b, found, allowed in re.findall(line, output)}


def linear_network(path, layers, operator=None, side=64, bias=True):
    """An ONNX chain of 1x1 convolutions of 3 channels, with `operator` at its end."""
    from onnx import TensorProto, helper, numpy_helper, save

    weight = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(3, np.float32), "b")]
    inputs = ["w", "b"] if bias else ["w"]
    nodes = [helper.make_node("Conv", [f"x{k}", *inputs], [f"x{k + 1}"]) for k in range(layers)]
    if operator:
        nodes.append(helper.make_node(operator, [f"x{layers}"], ["end"]))
    shape = [1, 3, side, side]
    first, last = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x0", nodes[-1].output[0])
    )
    graph = helper.make_graph(nodes, "chain", [first], [last], tensors)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), str(path))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a space in its name and small.pth, the weights of a network that was never trained.

    They are of 10 classes, in half precision, with the counters that PyTorch's newer BNs have.
    """
    import torch
    from resnest.torch import resnest

    place = tmp_path_factory.mktemp("convert") / "a place"
    place.mkdir()
    torch.manual_seed(0)
    torch.save(resnest.resnest50(num_classes=10).half().state_dict(), place / "small.pth")
    return place


@pytest.fixture
def authors(place):
    """The recipe's weights, as the authors' are stored."""
    rows = json.loads((GOLDEN / "resnest50_torch.json").read_text())
    return torch_save(place / "authors.pth", {name: value(name, shape) for name, shape in rows})


@pytest.fixture(scope="module")
def small_onnx(place):
    """The network of small.pth for images of 64 pixels."""
    network = convert.torch_network("resnest50", read_torch_file(place / "small.pth"))
    return convert.export_onnx(network, 64, place / "small.onnx")


def test_directly(place):
    """Proved, without ONNX and MindConverter; the checkpoint tells what it is of."""
    words = ["--backbone", "resnest50", "--torch_ckpt", "small.pth", "--direct", "--ckpt_path", "direct.ckpt"]
    result = run_script(*without(*TOOLS[2:]), *words, cwd=place)
    assert result.returncode == 0 and not result.stderr, result.stdout + result.stderr
    ((pair, (difference, allowed)),) = differences(result.stdout).items()
    assert pair == ("MindSpore", "PyTorch") and difference < allowed < 1e-2
    assert describe(place / "direct.ckpt") == ("fused", "resnest50", 10)
    assert record_of(place / "direct.ckpt") == {"backbone": "resnest50", "num_classes": 10}


@pytest.mark.full
def test_whole_way_downloaded_proved_and_equal_to_the_direct_one(place, authors):
    digest = hashlib.sha256(authors.read_bytes()).hexdigest()
    download = ["--download", "--checkpoint_url", authors.as_uri(), "--checkpoint_sha256", digest[:8]]
    result = run_script(
        SCRIPT, "--backbone", "resnest50", *download, "--torch_ckpt", "got.pth", "--ckpt_path", "whole.ckpt", cwd=place
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "MINDCONVERTER" not in result.stdout and not result.stderr
    for line in ("PyTorch: got.pth: 405 tensors", "ONNX: exported: .*224 pixels", "MindConverter 1.7.0: 88 layers"):
        assert re.search(rf"^{line}, \d+\.\d s$", result.stdout, re.M), result.stdout
    found = differences(result.stdout)
    assert list(found) == [("ONNX", "PyTorch"), ("MindSpore", "PyTorch")]
    assert all(difference < 1e-5 and 1e-4 < allowed < 1e-2 for difference, allowed in found.values())

    expected = json.loads((GOLDEN / "resnest50.json").read_text())
    network = resnest50(fused=True).set_train(False)
    load(network, place / "whole.ckpt")
    logits = network(Tensor(images(1, 224, 0))).asnumpy()
    np.testing.assert_allclose(logits[:, :10], expected["first10"], atol=1e-5)

    words = ["--backbone", "resnest50", "--torch_ckpt", "authors.pth", "--direct", "--ckpt_path", "direct.ckpt"]
    direct = run_script(*without(*TOOLS[2:]), *words, cwd=place)
    assert direct.returncode == 0, direct.stdout + direct.stderr
    assert list(differences(direct.stdout)) == [("MindSpore", "PyTorch")]
    assert_equal(place / "whole.ckpt", place / "direct.ckpt")
    assert not list(place.glob(".*")), "something was left behind"


@pytest.mark.full
def test_from_onnx_without_the_authors_network(place, small_onnx):
    words = ["--backbone", "resnest50", "--ckpt_path"]
    result = run_script(*without("resnest"), *words, "onnx.ckpt", "--onnx", small_onnx, cwd=place)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(differences(result.stdout)) == [("MindSpore", "ONNX")]
    assert "onnx.ckpt: resnest50, 10 classes" in result.stdout
    direct = run_script(SCRIPT, *words, "direct10.ckpt", "--torch_ckpt", "small.pth", "--direct", cwd=place)
    assert direct.returncode == 0, direct.stderr
    assert_equal(place / "onnx.ckpt", place / "direct10.ckpt")


@pytest.mark.full
def test_weights_that_are_equal_stay_apart(small_onnx):
    """Exporters store equal weights once, as the biases of a network that has never been trained."""
    model, size = convert.read_onnx(small_onnx, 224)
    assert size == 64 and any(node.op_type == "Identity" for node in model.graph.node)
    before = convert.run_onnx(model, small_onnx, convert.sample(64))
    convert.rename(model, small_onnx)
    assert np.array_equal(convert.run_onnx(model, small_onnx, convert.sample(64)), before)
    names = {tensor.name for tensor in model.graph.initializer}
    assert {f"{layer}.{word}" for layer in range(88) for word in ("weight", "bias")} <= names
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert all(re.fullmatch(rf"{node.op_type}_\d+", node.name) for node in model.graph.node)


@pytest.mark.full
def test_mindconverter_that_fails_shows_its_last_lines(tmp_path, capsys):
    import onnx

    model = onnx.load(str(linear_network(tmp_path / "odd.onnx", 3, "Sinh")))
    convert.rename(model, tmp_path / "odd.onnx")
    with pytest.raises(UserError, match="MindConverter failed"):
        convert.mindconverter(model, 64, tmp_path)
    shown = capsys.readouterr().out
    assert "NodeTypeNotSupport" in shown and re.search(r"^onnx::Sinh, 1, (?!Supported)", shown, re.M), shown


def test_networks_that_are_no_resnest50(tmp_path):
    def refused(*words, **options):
        file = linear_network(tmp_path / "chain.onnx", *words, **options)
        with pytest.raises(UserError) as caught:
            model, _ = convert.read_onnx(file, 224)
            convert.rename(model, file)
            convert.check_depth(model, file, "resnest50")
        return str(caught.value)

    assert "operators that ResNeSt does not have: Sigmoid" in refused(88, "Sigmoid")
    assert "has 17 layers, so it is no ResNeSt (a ResNeSt-50 has 88)" in refused(17)
    assert "is of a ResNeSt-101, not of a ResNeSt-50; set --backbone resnest101" in refused(173)
    assert "lacks a constant weight or bias" in refused(88, bias=False)
    assert "side divisible by 32" in refused(88, side=48)
    file = linear_network(tmp_path / "chain.onnx", 88)
    model, _ = convert.read_onnx(file, 224)
    convert.rename(model, file)
    with pytest.raises(UserError, match=r"ONNX Runtime cannot run .*chain\.onnx"):
        convert.run_onnx(model, file, convert.sample(32))
    layers = [(np.zeros((3, 3, 1, 1), np.float32), np.zeros(3, np.float32))] * 88
    with pytest.raises(UserError, match=r"chain.onnx: layer 1 of 88 does not fit a ResNeSt-50"):
        convert.fused_network(layers, "resnest50", file)


def test_proof_refuses_what_differs():
    right = np.array([[2.0, -4.0, 1.0]], np.float32)
    convert.prove({"PyTorch": right, "ONNX": right + 0.003})
    for wrong in (right + 0.005, right * np.nan, right[:, :2]):
        with pytest.raises(UserError, match="ONNX computes something else than PyTorch"):
            convert.prove({"PyTorch": right, "ONNX": wrong})


def test_authors_names_and_hashes_go_with_the_networks(monkeypatch):
    from resnest.torch import resnest

    for backbone, digits in convert.AUTHORS_SHA256.items():
        assert resnest.short_hash(backbone) == digits
        monkeypatch.setattr(sys, "argv", ["convert.py", "--backbone", backbone])
        args = convert.arguments()
        assert args.torch_ckpt.name == f"{backbone}-{digits}.pth" == args.checkpoint_url.rpartition("/")[2]
        assert args.checkpoint_sha256 == digits and args.ckpt_path.name == f"{backbone}.ckpt"


class Pickled:
    """What a .pth may not hold: an object whose reading calls a function."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file was run')",))


@pytest.fixture(scope="module")
def bad(place):
    """A folder of files that cannot be converted."""
    import onnx
    import torch

    bad = place / "bad"
    bad.mkdir()
    torch.save({"conv1.0.weight": Pickled()}, bad / "code.pth")
    whole = (place / "small.pth").read_bytes()
    (bad / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    rows = json.loads((GOLDEN / "resnest101_torch.json").read_text())
    torch_save(bad / "resnest101.pth", {name: np.zeros(1, np.float32) for name, _ in rows})
    linear_network(bad / "sigmoid.onnx", 88, "Sigmoid")
    linear_network(bad / "resnest101.onnx", 173)
    torch.save({"layer1.0.conv2.conv.weight": torch.zeros(()), "fc.weight": torch.zeros(())}, bad / "headless.pth")
    model = onnx.load(str(linear_network(bad / "nan.onnx", 88)))
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
    model.graph.initializer[0].raw_data = np.full_like(weight, np.nan).tobytes()
    onnx.save(model, str(bad / "nan.onnx"))
    (bad / "truncated.onnx").write_bytes(linear_network(bad / "chain.onnx", 88).read_bytes()[:1000])
    return bad


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--torch_ckpt", "bad/code.pth"], "bad/code.pth holds pickled code"),
        (["--torch_ckpt", "bad/truncated.pth"], "cannot be read as a PyTorch file; it is truncated"),
        (["--torch_ckpt", "bad/resnest101.pth"], "is of a ResNeSt-101, not of a ResNeSt-50; set --backbone resnest101"),
        (["--torch_ckpt", "bad/headless.pth"], "has no fc.weight, so the number of classes is unknown"),
        ([], "no file resnest50-528c19ca.pth; put the authors' weights there or add --download"),
        (["--onnx", "bad/truncated.onnx"], "cannot be read as an ONNX file"),
        (["--onnx", "bad/nan.onnx"], "holds values that are not finite, with which nothing can be computed"),
        (["--onnx", "bad/nothing.onnx"], "no file bad/nothing.onnx"),
        (
            ["--onnx", "bad/sigmoid.onnx"],
            "holds operators that ResNeSt does not have: Sigmoid; export the authors'",
        ),
        (["--onnx", "bad/resnest101.onnx"], "is of a ResNeSt-101, not of a ResNeSt-50; set --backbone resnest101"),
        (["--onnx", "bad/chain.onnx", "--direct"], "--onnx takes the place of"),
        (["--torch_ckpt", "small.pth", "--ckpt_path", "bad/chain.onnx/x.ckpt"], "cannot write bad/chain.onnx/x.ckpt"),
        (["--torch_ckpt", "small.pth", "--ckpt_path", "bad/x.pth"], "must end in .ckpt"),
        (["--torch_ckpt", "small.pth", "--checkpoint_url", "file:///x"], "are for --download"),
        (["--torch_ckpt", "small.pth", "--download"], "small.pth is another file: sha256"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(words, message, place, bad):
    before = sorted(place.rglob("*"))
    result = run_script(
        SCRIPT,
        "--backbone",
        "resnest50",
        *words,
        *([] if "--ckpt_path" in words else ["--ckpt_path", "bad/out.ckpt"]),
        cwd=place,
    )
    assert message in one_line_error(result)
    assert sorted(place.rglob("*")) == before


def test_missing_packages_are_named_with_the_make_target(place):
    words = ["--backbone", "resnest50", "--torch_ckpt", "small.pth"]
    result = run_script(*without("torch", "mindconverter"), *words, cwd=place)
    assert "torch, mindconverter not installed" in one_line_error(result) and "make convert-env" in result.stderr


@pytest.mark.full
def test_from_the_authors_file_to_an_exported_network_that_predicts_the_same(tmp_path):
    """Conversion with MindConverter, evaluation, export: on every image PyTorch's class and logits."""
    import csv

    import mindspore as ms
    import torch
    from mindspore import nn
    from PIL import Image
    from resnest.torch import resnest

    rows = json.loads((GOLDEN / "resnest50_torch.json").read_text())
    shapes = {name: (10, *shape[1:]) if name.startswith("fc.") else shape for name, shape in rows}
    weights = {name: value(name, shape) for name, shape in shapes.items()}
    weights["fc.bias"] = np.zeros(10, np.float32)
    torch_save(tmp_path / "authors.pth", weights)
    sample = ["--output", tmp_path / "digits", "--images", "4", "--size", "64"]
    assert run_script(ROOT / "utils/sample_imagenet.py", *sample, cwd=tmp_path).returncode == 0
    config = ["--config_path", ROOT / "ResNeSt/config/resnest_sample_config.yaml", "--device_target", "CPU"]
    data = ["--data_path", tmp_path / "digits", "--output_dir", tmp_path / "eval"]
    converted = ["--torch_ckpt", "authors.pth", "--ckpt_path", "converted.ckpt"]
    steps = (
        ["convert.py", "--backbone", "resnest50", *converted],
        ["eval.py", *config, *data, "--ckpt_path", "converted.ckpt", "--predictions", "live.csv"],
        ["export.py", *config, "--ckpt_path", "converted.ckpt", "--output_dir", "exported"],
        ["eval.py", *config, *data, "--ckpt_path", "exported/resnest50.mindir", "--predictions", "exported.csv"],
    )
    for script, *words in steps:
        result = run_script(ROOT / "ResNeSt" / script, *words, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "live.csv").read_text() == (tmp_path / "exported.csv").read_text()

    authors = resnest.resnest50(num_classes=10)
    authors.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    authors.eval()
    exported = nn.GraphCell(ms.load(str(tmp_path / "exported/resnest50.mindir")))
    with (tmp_path / "exported.csv").open(newline="") as file:
        predictions = list(csv.DictReader(file))
    assert len(predictions) == 40
    for row in predictions:
        pixels = np.asarray(Image.open(row["path"]).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
        x = (pixels.astype(np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        x = x.transpose(2, 0, 1)[None].astype(np.float32)
        with torch.no_grad():
            wanted = authors(torch.from_numpy(x)).numpy()[0]
        found = exported(Tensor(x)).asnumpy()[0]
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
        assert int(row["prediction"]) == wanted.argmax()
