"""Every kind of checkpoint into both forms, and one line for every file that does not fit."""

import json
import pickle
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from golden.recipe import images, value
from mindspore import Tensor, nn
from src.checkpoints import (
    BACKBONES,
    DEPTHS,
    HEAD,
    Facts,
    describe,
    facts_of,
    fill,
    from_layers,
    from_torch,
    layer_names,
    load,
    save,
)
from src.resnest import fuse

from utils.checkpoint import save_checkpoint
from utils.cli import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
LAYERS = {"resnest50": 88, "resnest101": 173, "resnest200": 338, "resnest269": 453}


def torch_state(backbone: str, classes: int = 1000) -> dict[str, np.ndarray]:
    """The recipe's weights under the names of the authors' network, for `classes` classes."""
    rows = json.loads((GOLDEN / f"{backbone}_torch.json").read_text())
    return {name: value(name, [classes, *shape[1:]] if name in HEAD else shape) for name, shape in rows}


def mindconverter_rows(backbone: str) -> list[dict]:
    return json.loads((GOLDEN / f"{backbone}_mindconverter_layers.json").read_text())


def network(backbone: str = "resnest50", classes: int = 1000, fused: bool = False):
    return BACKBONES[backbone].constructor(num_classes=classes, fused=fused).set_train(False)


def values(cell: nn.Cell) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy().copy() for parameter in cell.get_parameters()}


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    save_checkpoint([ms.Parameter(Tensor(array), name=name) for name, array in arrays.items()], path)
    return path


def logits(cell: nn.Cell) -> np.ndarray:
    return cell(Tensor(images(2, 64, 0))).asnumpy()


def refused(cell, path, **options) -> str:
    """The message of the UserError, which is one line; the network must be as before."""
    before = values(cell)
    with pytest.raises(UserError) as caught:
        load(cell, path, **options)
    assert all(np.array_equal(array, before[name]) for name, array in values(cell).items())
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module", autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="module")
def parameters():
    return from_torch(torch_state("resnest50"))


@pytest.fixture(scope="module")
def expected(parameters):
    cell = network()
    fill(cell, parameters)
    return logits(cell)


@pytest.fixture(scope="module")
def files(parameters, tmp_path_factory):
    """ResNeSt-50 with the recipe's weights as this project and as MindConverter store it.

    "mindconverter" is in order of execution, "converted" in the order in which MindConverter 1.7.0 was seen to write:
    the shortcut's convolution behind the first one of its block.
    """
    folder = tmp_path_factory.mktemp("files")
    fused = fuse(parameters)
    rows = mindconverter_rows("resnest50")
    theirs = {row["torch"]: row["mindconverter"] for row in rows}
    converted = sorted(theirs, key=lambda name: list(theirs).index(name.replace("downsample.1", "conv1")))

    def stored(names) -> dict[str, np.ndarray]:
        return {f"{theirs[n]}.{word}": fused[f"{n}.{word}"] for n in names for word in ("weight", "bias")}

    return {
        "unfused": write(folder / "unfused.ckpt", parameters),
        "fused": write(folder / "fused.ckpt", fused),
        "mindconverter": write(folder / "mindconverter.ckpt", stored(theirs)),
        "converted": write(folder / "converted.ckpt", stored(converted)),
    }


@pytest.mark.parametrize("backbone", BACKBONES)
def test_layers_are_named_in_the_order_of_the_published_checkpoints(backbone):
    rows = mindconverter_rows(backbone)
    cell = network(backbone, fused=True)
    assert layer_names(cell) == [row["torch"] for row in rows]
    assert len(rows) == LAYERS[backbone] == DEPTHS[backbone]
    shapes = {name: list(array.shape) for name, array in values(cell).items()}
    assert [shapes[f"{row['torch']}.weight"] for row in rows] == [row["weight"] for row in rows]


def test_layers_are_named_in_the_order_in_which_they_run():
    cell = network(fused=True)
    ran = []
    names = {id(layer): name for name, layer in cell.cells_and_names()}
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: ran.append(names[id(layer)]))
        for _, layer in cell.cells_and_names()
        if isinstance(layer, nn.Conv2d | nn.Dense)
    ]
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        logits(cell)
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
        for hook in hooks:
            hook.remove()
    assert layer_names(cell) == ran


@pytest.mark.parametrize("backbone", ["resnest50", "resnest101"])
def test_the_layer_of_a_shortcut_may_stand_anywhere_in_their_block(backbone):
    fused = fuse(from_torch(torch_state(backbone)))
    names = layer_names(network(backbone, fused=True))

    def pairs(order):
        return [(fused[f"{name}.weight"], fused[f"{name}.bias"]) for name in order]

    for behind in ("conv1", "conv2.conv", "conv2.fc1", "conv2.fc2", "conv3"):
        if (backbone, behind) == ("resnest50", "conv2.fc2"):
            continue  # there the shortcut of the first block looks like its conv3, and they would be taken so
        order = sorted(names, key=lambda name: names.index(name.replace("downsample.1", behind)))
        got = from_layers(pairs(order), backbone)
        assert list(got) == list(fused)
        assert all(np.array_equal(array, fused[name]) for name, array in got.items())


@pytest.mark.parametrize("kind", ["unfused", "fused", "mindconverter", "converted"])
@pytest.mark.parametrize("fused", [False, True])
def test_every_kind_loads_into_both_forms(kind, fused, files, expected):
    cell = network(fused=fused)
    assert load(cell, files[kind]) == []
    np.testing.assert_allclose(logits(cell), expected, atol=1e-5)
    wanted = "mindconverter" if kind == "converted" else kind
    assert describe(files[kind]) == (wanted, "resnest50", 1000)


def test_names_of_another_mindconverter_release(files, expected, tmp_path):
    stored = ms.load_checkpoint(str(files["mindconverter"]))
    renamed = {f"m{i // 2:04}.x.{name.rpartition('.')[2]}": p.asnumpy() for i, (name, p) in enumerate(stored.items())}
    cell = network(fused=True)
    load(cell, write(tmp_path / "renamed.ckpt", renamed))
    np.testing.assert_allclose(logits(cell), expected, atol=1e-5)


def test_the_way_through_a_file_is_exact(parameters, tmp_path):
    for fused in (False, True):
        cell = network(classes=3, fused=fused)
        told = Facts(["ant", "bee", "cat"], (64, 96))
        save(cell, tmp_path / "own.ckpt", told)
        again = network(classes=3, fused=fused)
        assert load(again, tmp_path / "own.ckpt") == []
        assert all(np.array_equal(array, values(again)[name]) for name, array in values(cell).items())
        assert facts_of(tmp_path / "own.ckpt") == told
        assert describe(tmp_path / "own.ckpt") == ("fused" if fused else "unfused", "resnest50", 3)
    save(cell, tmp_path / "nameless.ckpt")
    assert facts_of(tmp_path / "nameless.ckpt") == Facts()


@pytest.mark.parametrize("kind", ["unfused", "converted"])
def test_another_number_of_classes_and_a_new_head(kind, files, parameters):
    cell = network(classes=7)
    message = refused(cell, files[kind])
    assert "has 1000 classes, the network 7" in message and "--finetune" in message and "--num_classes 1000" in message
    head = {name: values(cell)[name] for name in HEAD}
    assert load(cell, files[kind], finetune=True) == list(HEAD)
    after = values(cell)
    assert all(np.array_equal(after[name], array) for name, array in head.items())
    if kind == "unfused":
        assert all(np.array_equal(after[name], array) for name, array in parameters.items() if name not in HEAD)


@pytest.mark.parametrize("kind", ["unfused", "fused", "mindconverter"])
def test_another_backbone_is_named(kind, files, tmp_path):
    message = refused(network("resnest101"), files[kind])
    assert "is of a ResNeSt-50, not of a ResNeSt-101; set --backbone resnest50" in message
    backbone = "resnest269" if kind == "mindconverter" else "resnest101"
    if kind == "mindconverter":
        arrays = {}
        for row in mindconverter_rows(backbone):
            arrays[f"{row['mindconverter']}.weight"] = np.zeros(row["weight"], np.float32)
            arrays[f"{row['mindconverter']}.bias"] = np.zeros(row["weight"][0], np.float32)
    else:
        arrays = values(network(backbone, fused=kind == "fused"))
    path = write(tmp_path / "other.ckpt", arrays)
    assert describe(path) == (kind, backbone, 1000)
    assert f"set --backbone {backbone}" in refused(network(), path)


def test_missing_surplus_and_misshapen_parameters(parameters, tmp_path):
    cell = network()
    names = list(parameters)
    path = tmp_path / "spoilt.ckpt"
    write(path, {name: array for name, array in parameters.items() if name not in names[20:25]})
    message = refused(cell, path)
    assert "5 parameters missing: " in message and names[20] in message and ", …" in message
    write(path, parameters | {"layer1.0.extra.weight": np.zeros(3, np.float32)})
    assert "1 parameters surplus: layer1.0.extra.weight" in refused(cell, path)
    write(path, parameters | {"layer2.1.conv3.weight": np.zeros((512, 64, 1, 1), np.float32)})
    assert "layer2.1.conv3.weight is (512, 64, 1, 1) in the file and (512, 128, 1, 1)" in refused(cell, path)


def test_mindconverter_files_that_are_not_whole(files, tmp_path):
    stored = {name: p.asnumpy() for name, p in ms.load_checkpoint(str(files["mindconverter"])).items()}
    names = list(stored)
    path = tmp_path / "spoilt.ckpt"
    write(path, {name: stored[name] for name in names if names.index(name) not in (20, 21)})
    assert "87 layers instead of the 88 of a ResNeSt-50" in refused(network(fused=True), path)
    order = [*names[:40], *names[60:], *names[40:60]]
    write(path, {name: stored[name] for name in order if names.index(name) < 174} | {n: stored[n] for n in names[174:]})
    assert "does not fit a ResNeSt-50 in execution order" in refused(network(fused=True), path)
    write(path, {name: array for name, array in stored.items() if name != names[21]})
    assert "of another shape" in refused(network(fused=True), path)


@pytest.mark.parametrize(
    "names, words",
    [
        (["compression3.0.weight"], "a DDRNet-23"),
        (["layer1.0.bn_0.gamma"], "a DRNet"),
        (["conv1.scale"], "a DynamicQuant network"),
        (["moments.conv1.0.weight", "conv1.0.weight"], "a training state"),
        (["a.weight", "a.bias"], "another network"),
        (["a.gamma"], "another network"),
    ],
)
def test_other_networks_are_named(names, words, tmp_path):
    path = write(tmp_path / "other.ckpt", {name: np.zeros(3, np.float32) for name in names})
    assert f"looks like {words}" in refused(network(), path)


def test_files_that_cannot_be_read(files, tmp_path):
    cell = network()
    assert "no checkpoint at" in refused(cell, tmp_path / "none.ckpt")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(files["unfused"].read_bytes()[:1000000])
    assert "truncated" in refused(cell, cut)
    with pytest.raises(UserError, match="truncated"):
        describe(cut)


def test_without_torch_the_make_target_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("authors.pth", "authors.ckpt"):  # recognised by what is in it
        path = tmp_path / name
        path.write_bytes(b"PK\x03\x04")
        assert "make convert-env" in refused(network(), path)


class Code:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return print, ("code was run",)


def test_the_authors_file(expected, tmp_path):
    torch = pytest.importorskip("torch")
    state = {}
    for name, array in torch_state("resnest50").items():
        # As state_dict(keep_vars=True) has them.
        state[name] = torch.nn.Parameter(torch.from_numpy(array), requires_grad="running" not in name)
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    cells = {fused: network(fused=fused) for fused in (False, True)}
    for legacy in (True, False):  # both ways in which PyTorch has stored files
        path = tmp_path / f"resnest50_{legacy}.pth"
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        assert describe(path) == ("torch", "resnest50", 1000)
        for cell in cells.values():
            fill(cell, {name: 0 * array for name, array in values(cell).items()})
            assert load(cell, path) == []
            np.testing.assert_allclose(logits(cell), expected, atol=1e-5)
        cut = tmp_path / "cut.pth"
        for size in (0, 2, 5000, path.stat().st_size // 2, path.stat().st_size - 100):
            cut.write_bytes(path.read_bytes()[:size])
            assert "truncated" in refused(cell, cut)
    assert "set --backbone resnest50" in refused(network("resnest101"), path)
    assert facts_of(path) == Facts()


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "mine.pth"
    path.write_bytes(b"PK")

    def refuse(self, *words):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the superuser may read everything
    assert "Permission denied; give a file that you may read" in refused(network(), path)


def test_pickled_code_is_not_run(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    path = tmp_path / "code.pth"
    weights = {"conv1.0.weight": torch.zeros(32, 3, 3, 3), "more": Code()}
    for legacy in (True, False):
        torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
        assert "holds pickled code" in refused(network(), path)
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(Code(), protocol))
        assert "holds pickled code" in refused(network(), path)
    torch.save([torch.zeros(3)], path)
    assert "holds no tensors by name" in refused(network(), path)
    torch.save({"epoch": 3, "state_dict": {"conv1.0.weight": torch.zeros(3)}}, path)
    assert "holds no tensors by name" in refused(network(), path)
    assert "code was run" not in capsys.readouterr().out
