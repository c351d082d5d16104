"""Every kind of checkpoint into both forms, and one line for every file that does not fit."""

import json
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT
from golden.recipe import images, value
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters
from own_files import of_others
from src.checkpoints import (
    BACKBONES,
    DEPTHS,
    HEAD,
    describe,
    fill,
    from_layers,
    from_torch,
    layer_names,
    load,
    record_of,
    save,
)
from src.resnest import fuse

sys.path.insert(0, str(ROOT / "tests" / "resnest"))
from resnest14 import small_network  # noqa: F401

from utils.checkpoint import save_checkpoint
from utils.cli import UserError

GOLDEN = ROOT / "tests" / "golden"
LAYERS = {"resnest50": 88, "resnest101": 173, "resnest200": 338, "resnest269": 453}


def golden(backbone: str, what: str, name: Callable) -> list:
    """The rows of a golden file; for resnest14 those of ResNeSt-50 that are not of its further blocks."""
    rows = json.loads((GOLDEN / f"{backbone.replace('14', '50')}_{what}.json").read_text())
    return [row for row in rows if backbone != "resnest14" or not re.match(r"layer\d\.[1-9]", name(row))]


def torch_state(backbone: str, classes: int = 1000) -> dict[str, np.ndarray]:
    """The recipe's weights under the names of the authors' network, for `classes` classes."""
    rows = golden(backbone, "torch", lambda row: row[0])
    return {name: value(name, [classes, *shape[1:]] if name in HEAD else shape) for name, shape in rows}


def mindconverter_rows(backbone: str) -> list[dict]:
    return golden(backbone, "mindconverter_layers", lambda row: row["torch"])


def network(backbone: str = "resnest14", classes: int = 1000, fused: bool = False):
    return BACKBONES[backbone].constructor(num_classes=classes, fused=fused).set_train(False)


def values(cell: nn.Cell) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy().copy() for parameter in cell.get_parameters()}


def write(path: Path, arrays: dict[str, np.ndarray], record: Mapping = {}) -> Path:
    save_checkpoint([ms.Parameter(Tensor(array), name=name) for name, array in arrays.items()], path, record)
    return path


def parameters_of(path: Path) -> list[tuple[str, ms.Parameter]]:
    return [(name, value) for name, value in ms.load_checkpoint(str(path)).items() if isinstance(value, ms.Parameter)]


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
def graph_mode(small_network):  # noqa: F811
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="module", params=["resnest14", pytest.param("resnest50", marks=pytest.mark.full)])
def backbone(request):
    return request.param


@pytest.fixture(scope="module")
def parameters(backbone):
    return from_torch(torch_state(backbone))


@pytest.fixture(scope="module")
def cells(backbone):
    """One with BNs and one without, each of which compiles once."""
    return [network(backbone, fused=fused) for fused in (False, True)]


@pytest.fixture(scope="module")
def expected(cells, parameters):
    fill(cells[0], parameters)
    return logits(cells[0])


def clear(cell: nn.Cell) -> None:
    fill(cell, {name: np.zeros_like(array) for name, array in values(cell).items()})


@pytest.fixture(scope="module")
def files(backbone, parameters, tmp_path_factory):
    """The network with the recipe's weights as this project and as MindConverter store it.

    "mindconverter" is in order of execution, "converted" in the order in which MindConverter 1.7.0 was seen to write:
    the shortcut's convolution behind the first one of its block.
    """
    folder = tmp_path_factory.mktemp("files")
    fused = fuse(parameters)
    rows = mindconverter_rows(backbone)
    theirs = {row["torch"]: row["mindconverter"] for row in rows}
    converted = sorted(theirs, key=lambda name: list(theirs).index(name.replace("downsample.1", "conv1")))

    def stored(names) -> dict[str, np.ndarray]:
        return {f"{theirs[n]}.{word}": fused[f"{n}.{word}"] for n in names for word in ("weight", "bias")}

    return {
        "unfused": write(folder / "unfused.ckpt", parameters, {"backbone": backbone}),
        "fused": write(folder / "fused.ckpt", fused, {"backbone": backbone}),
        "mindconverter": write(folder / "mindconverter.ckpt", stored(theirs)),
        "converted": write(folder / "converted.ckpt", stored(converted)),
    }


@pytest.mark.parametrize("name", BACKBONES)
def test_layers_are_named_in_the_order_of_the_published_checkpoints(name):
    rows = mindconverter_rows(name)
    with no_init_parameters():
        cell = network(name, fused=True)
    assert layer_names(cell) == [row["torch"] for row in rows]
    assert len(rows) == LAYERS[name] == DEPTHS[name]
    shapes = {parameter.name: list(parameter.shape) for parameter in cell.get_parameters()}
    assert [shapes[f"{row['torch']}.weight"] for row in rows] == [row["weight"] for row in rows]


def test_layers_are_named_in_the_order_in_which_they_run(backbone):
    cell = network(backbone, fused=True)
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


@pytest.mark.parametrize(
    "name", ["resnest14", *(pytest.param(f"resnest{depth}", marks=pytest.mark.full) for depth in (50, 101))]
)
def test_the_layer_of_a_shortcut_may_stand_anywhere_in_their_block(name):
    fused = fuse(from_torch(torch_state(name)))
    layers = layer_names(network(name, fused=True))

    def pairs(order):
        return [(fused[f"{layer}.weight"], fused[f"{layer}.bias"]) for layer in order]

    for behind in ("conv1", "conv2.conv", "conv2.fc1", "conv2.fc2", "conv3"):
        if name != "resnest101" and behind == "conv2.fc2":
            continue  # there the shortcut of the first block looks like its conv3, and they would be taken so
        order = sorted(layers, key=lambda layer: layers.index(layer.replace("downsample.1", behind)))
        got = from_layers(pairs(order), name)
        assert list(got) == list(fused)
        assert all(np.array_equal(array, fused[key]) for key, array in got.items())


def test_every_kind_loads_into_both_forms(backbone, files, cells, expected, tmp_path):
    """Also one with the names of another MindConverter."""
    stored = ms.load_checkpoint(str(files["mindconverter"]))
    renamed = {f"m{i // 2:04}.x.{name.rpartition('.')[2]}": p.asnumpy() for i, (name, p) in enumerate(stored.items())}
    for kind, file in {**files, "renamed": write(tmp_path / "renamed.ckpt", renamed)}.items():
        for cell in cells if kind != "renamed" else cells[1:]:
            clear(cell)
            assert load(cell, file) == []
            np.testing.assert_allclose(logits(cell), expected, atol=1e-5, err_msg=kind)
        wanted = "mindconverter" if kind in ("converted", "renamed") else kind
        assert describe(file) == (wanted, backbone, 1000)


def test_the_way_through_a_file_is_exact(backbone, tmp_path):
    """Of the parameters, and of the record: what is always known of a network, and what it was saved with."""
    known = {"backbone": backbone, "num_classes": 3}
    for fused in (False, True):
        cell = network(backbone, classes=3, fused=fused)
        told = {"classes": ["ant", "bee", "cat"], "image_size": 64, "resize_size": 96}
        save(cell, tmp_path / "own.ckpt", told)
        again = network(backbone, classes=3, fused=fused)
        assert load(again, tmp_path / "own.ckpt") == []
        assert all(np.array_equal(a, b) for a, b in zip(values(cell).values(), values(again).values(), strict=True))
        assert record_of(tmp_path / "own.ckpt") == known | told
        assert describe(tmp_path / "own.ckpt") == ("fused" if fused else "unfused", backbone, 3)
    save(cell, tmp_path / "nameless.ckpt")
    assert record_of(tmp_path / "nameless.ckpt") == known


@pytest.mark.parametrize("kind", ["unfused", "converted"])
def test_another_number_of_classes_and_a_new_head(kind, backbone, files, parameters):
    cell = network(backbone, classes=7)
    message = refused(cell, files[kind])
    assert "has 1000 classes, the network 7" in message and "--finetune" in message and "--num_classes 1000" in message
    head = {name: values(cell)[name] for name in HEAD}
    assert load(cell, files[kind], finetune=True) == list(HEAD)
    after = values(cell)
    assert all(np.array_equal(after[name], array) for name, array in head.items())
    if kind == "unfused":
        assert all(np.array_equal(after[name], array) for name, array in parameters.items() if name not in HEAD)


@pytest.mark.parametrize("kind", ["unfused", "fused", "mindconverter"])
@pytest.mark.parametrize("other", ["resnest101", "resnest269"])
def test_another_backbone_is_named(kind, other, tmp_path):
    """What it is of the names and the number of layers tell, without the weights."""
    arrays = {}
    for row in mindconverter_rows(other):
        layer, first_or_last = row["mindconverter" if kind == "mindconverter" else "torch"], len(row["weight"]) == 2
        first_or_last = first_or_last or not arrays
        arrays[f"{layer}.weight"] = np.zeros(row["weight"] if first_or_last else 1, np.float32)
        arrays[f"{layer}.bias"] = np.zeros(1, np.float32)
    if kind == "unfused":
        arrays["bn1.gamma"] = np.zeros(1, np.float32)
    path = write(tmp_path / "other.ckpt", arrays, {"backbone": other} if kind != "mindconverter" else {})
    assert describe(path) == (kind, other, 1000)
    title = other.replace("resnest", "ResNeSt-")
    assert f"is of a {title}, not of a ResNeSt-14; set --backbone {other}" in refused(network(), path)


@pytest.mark.full
def test_the_others_refuse_resnest50(tmp_path):
    save(network("resnest50"), tmp_path / "50.ckpt")
    save(network("resnest50", fused=True), tmp_path / "fused.ckpt")
    for name in ("50.ckpt", "fused.ckpt"):
        message = refused(network("resnest101"), tmp_path / name)
        assert "is of a ResNeSt-50, not of a ResNeSt-101; set --backbone resnest50" in message


def test_missing_surplus_and_misshapen_parameters(backbone, parameters, tmp_path):
    cell = network(backbone)
    names = list(parameters)
    path, record = tmp_path / "spoilt.ckpt", {"backbone": backbone}
    write(path, {name: array for name, array in parameters.items() if name not in names[20:25]}, record)
    message = refused(cell, path)
    assert "5 parameters missing: " in message and names[20] in message and ", …" in message
    write(path, parameters | {"layer1.0.extra.weight": np.zeros(3, np.float32)}, record)
    assert "1 parameters surplus: layer1.0.extra.weight" in refused(cell, path)
    write(path, parameters | {"layer2.0.conv3.weight": np.zeros((512, 64, 1, 1), np.float32)}, record)
    assert "layer2.0.conv3.weight is (512, 64, 1, 1) in the file and (512, 128, 1, 1)" in refused(cell, path)


@pytest.mark.parametrize(
    "record", [{}, {"backbone": 50}, {"backbone": "resnet50"}, {"backbone": ["resnest50"]}], ids=str
)
@pytest.mark.parametrize("kind", ["unfused", "fused"])
def test_parameters_alone_do_not_say_how_poolings_pad(kind, record, backbone, files, cells, tmp_path):
    """mindcv's files have the same names and shapes, and other paddings."""
    path, texts = tmp_path / "theirs.ckpt", {"record": json.dumps(record)} if record else None
    rows = [{"name": name, "data": value} for name, value in parameters_of(files[kind])]
    ms.save_checkpoint(rows, str(path), append_dict=texts)
    for read in (describe, record_of, partial(load, cells[0]), partial(load, cells[1], finetune=True)):
        with pytest.raises(
            UserError, match=r"no record that it is one of this folder's; .* convert the authors' \.pth"
        ):
            read(path)
    # As README.md says it.
    ms.save_checkpoint(rows, str(path), append_dict={"record": f'{{"backbone": "{backbone}"}}'})
    assert load(cells[0], path) == [] and record_of(path) == {"backbone": backbone, "num_classes": 1000}


def test_what_the_parameters_show_counts_whatever_the_record_tells(backbone, files, tmp_path):
    told = {"backbone": "resnest101", "num_classes": 7, "image_size": 64}
    path = write(tmp_path / "odd.ckpt", {name: p.asnumpy() for name, p in parameters_of(files["unfused"])}, told)
    assert record_of(path) == {"backbone": backbone, "num_classes": 1000, "image_size": 64}


@pytest.mark.parametrize("kind", ["unfused", "fused", "torch"])
@pytest.mark.parametrize(("blocks", "depth"), [((2, 2, 2, 2), 26), ((1, 1, 1, 2), 17), ((3, 4, 6, 2), 47)])
def test_other_depths_are_called_what_they_are(kind, blocks, depth, tmp_path):
    names = [f"layer{stage}.{block}.conv2.conv.weight" for stage, n in enumerate(blocks, 1) for block in range(n)]
    names += {"unfused": ["bn1.gamma"], "torch": ["bn1.running_mean"]}.get(kind, [])
    path, numbers = tmp_path / "other.ckpt", " ".join(map(str, blocks))
    if kind == "torch":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.zeros(1) for name in names}, path)
    else:
        write(path, {name: np.zeros(1, np.float32) for name in names})
    message = refused(network(), path)
    assert (
        f"is of a ResNeSt-{depth}, with {numbers} blocks in its stages; give the whole file of a ResNeSt-50, "
        in message
    )


def test_mindconverter_files_that_are_not_whole(backbone, files, tmp_path):
    stored = {name: p.asnumpy() for name, p in ms.load_checkpoint(str(files["mindconverter"])).items()}
    names = list(stored)
    path = tmp_path / "spoilt.ckpt"
    cell, depth = network(backbone, fused=True), DEPTHS[backbone]
    write(path, {name: stored[name] for name in names if names.index(name) not in (20, 21)})
    assert f"{depth - 1} layers instead of the {depth} of a ResNeSt-{backbone[-2:]}" in refused(cell, path)
    write(path, {name: stored[name] for name in [*names[:20], *names[30:-2], *names[20:30], *names[-2:]]})
    assert f"does not fit a ResNeSt-{backbone[-2:]} in execution order" in refused(cell, path)
    write(path, {name: array for name, array in stored.items() if name != names[21]})
    assert "of another shape" in refused(cell, path)


def test_files_of_the_other_models_are_named(tmp_path):
    for kind, path in of_others("ResNeSt", tmp_path):
        with pytest.raises(UserError) as caught:
            describe(path)
        assert f"{path} looks like {kind}, not a ResNeSt; give the file of a ResNeSt" in str(caught.value)


@pytest.mark.parametrize("names", [["a.weight", "a.bias"], ["a.gamma"]])
def test_files_of_others_are_another_network(names, tmp_path):
    path = write(tmp_path / "other.ckpt", {name: np.zeros(3, np.float32) for name in names})
    assert "looks like another network" in refused(network(), path)


def test_files_that_cannot_be_read(backbone, files, tmp_path):
    cell = network(backbone)
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


def test_the_authors_file(backbone, cells, expected, tmp_path):
    torch = pytest.importorskip("torch")
    state = {}
    for name, array in torch_state(backbone).items():
        # As state_dict(keep_vars=True) has them.
        state[name] = torch.nn.Parameter(torch.from_numpy(array), requires_grad="running" not in name)
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    for legacy in (True, False):  # both ways in which PyTorch has stored files
        path = tmp_path / f"{backbone}_{legacy}.pth"
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        assert describe(path) == ("torch", backbone, 1000)
        for cell in cells:
            clear(cell)
            assert load(cell, path) == []
            np.testing.assert_allclose(logits(cell), expected, atol=1e-5)
        cut = tmp_path / "cut.pth"
        for size in (0, 2, 5000, path.stat().st_size // 2, path.stat().st_size - 100):
            cut.write_bytes(path.read_bytes()[:size])
            assert "truncated" in refused(cell, cut)
    assert record_of(path) == {"backbone": backbone, "num_classes": 1000}


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
    weights, cell = {"conv1.0.weight": torch.zeros(32, 3, 3, 3), "more": Code()}, network()
    for legacy in (True, False):
        torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
        assert "holds pickled code" in refused(cell, path)
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(Code(), protocol))
        assert "holds pickled code" in refused(cell, path)
    torch.save([torch.zeros(3)], path)
    assert "holds no tensors by name" in refused(cell, path)
    torch.save({"epoch": 3, "state_dict": {"conv1.0.weight": torch.zeros(3)}}, path)
    assert "holds no tensors by name" in refused(cell, path)
    assert "code was run" not in capsys.readouterr().out
