"""Every kind of checkpoint, and one line for every file that does not fit."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import src.resnet as resnet
from dynamicquant import tiny
from golden.recipe import images, value
from mindspore import Tensor
from own_files import of_others
from src.checkpoints import describe, load, save
from src.resnet import Architecture

from utils.checkpoint import save_checkpoint
from utils.cli import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
CONTROLLER = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
SMALL = {"num_classes": 7, "image_size": 32}


WHOLE = {name: getattr(resnet, name) for name in tiny.SIZES}


@pytest.fixture(scope="module", autouse=True)
def small():
    """The network of tiny.py, with nothing compiled."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in tiny.SIZES.items():
            patch.setattr(resnet, name, size)
        yield
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture
def whole(monkeypatch):
    """The real ResNet-18."""
    for name, size in WHOLE.items():
        monkeypatch.setattr(resnet, name, size)


def values(network) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy().copy() for parameter in network.get_parameters()}


def write(path: Path, arrays: dict[str, np.ndarray], record: Mapping = {}) -> Path:
    save_checkpoint([ms.Parameter(Tensor(array), name=name) for name, array in arrays.items()], path, record)
    return path


def told(architecture: Architecture, resize_size: int, **others) -> dict:
    """All that a checkpoint should tell."""
    return asdict(architecture) | {"resize_size": resize_size, **others}


def listed(name: str) -> dict[str, np.ndarray]:
    """The recipe's values under the names of a published checkpoint."""
    return {name: value(name, shape) for name, shape in json.loads((GOLDEN / f"{name}.json").read_text())}


def own(path: Path, architecture: Architecture, resize_size: int = 36, classes: str = "abcdefg") -> Path:
    """A checkpoint of this project with the recipe's weights."""
    network = architecture.network()
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(value(parameter.name, parameter.shape)))
    save(network, path, architecture, {"resize_size": resize_size, "classes": list(classes)})
    return path


def loaded(architecture: Architecture, path: Path, **options) -> tuple[dict[str, np.ndarray], set[str]]:
    """The parameters after loading, and those that were left out. What the network then has must be the file's."""
    network = architecture.network()
    before = values(network)
    left_out = set(load(network, architecture, path, **options))
    after = values(network)
    for name, array in after.items():
        wanted = before[name] if name in left_out else value(name, array.shape)
        np.testing.assert_array_equal(array, wanted, err_msg=name)
    return after, left_out


def refused(architecture: Architecture, path: Path, **options) -> str:
    """The message of the UserError, which is one line; the network must be as before."""
    network = architecture.network()
    before = values(network)
    with pytest.raises(UserError) as caught:
        load(network, architecture, path, **options)
    assert all(np.array_equal(array, before[name]) for name, array in values(network).items())
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        "float": own(folder / "float.ckpt", Architecture("none", **SMALL)),
        "image": own(folder / "image.ckpt", Architecture(**SMALL)),
        "pact": own(folder / "pact.ckpt", Architecture("pact", **SMALL)),
        "layer": own(folder / "layer.ckpt", Architecture(granularity="layer", **SMALL)),
        "large": own(folder / "large.ckpt", Architecture(num_classes=7, image_size=56), 64),
    }


def test_the_published_checkpoint_loads_and_is_described(whole, tmp_path):
    path = write(tmp_path / "published.ckpt", listed("dynamicquant_parameters"))
    architecture = Architecture("dorefa", 4, 3, "image", 1000, 224)
    assert describe(path) == (architecture, told(architecture, 256))
    assert loaded(architecture, path)[1] == set()


def test_own_checkpoints_come_back_with_what_they_are_of(files):
    for name, architecture in {
        "float": Architecture("none", **SMALL),
        "pact": Architecture("pact", **SMALL),
        "layer": Architecture(granularity="layer", **SMALL),
    }.items():
        assert describe(files[name]) == (architecture, told(architecture, 36, classes=list("abcdefg")))
        assert loaded(architecture, files[name])[1] == set()


def test_the_record_is_json_beside_the_parameters(files):
    record = json.loads(ms.load_checkpoint(str(files["pact"]))["record"])
    network = {"quant": "pact", "target_bits": 4, "num_bits": 3, "granularity": "image"}
    assert record == {**network, **SMALL, "resize_size": 36, "classes": list("abcdefg")}


@pytest.fixture(scope="module")
def torch_file(tmp_path_factory):
    """A ResNet-18 in PyTorch with the recipe's weights, and its state_dict as torchvision's would be saved."""
    torch = pytest.importorskip("torch")
    from dynamicquant.torch_resnet import ResNet18

    network = ResNet18(7).eval()
    state = {
        name: torch.tensor(value(name, tensor.shape)) if tensor.is_floating_point() else torch.tensor(3)
        for name, tensor in network.state_dict().items()
    }
    network.load_state_dict(state)
    path = tmp_path_factory.mktemp("torch") / "resnet18-f37072fd.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_a_torch_file_gives_the_float_network_the_logits_of_pytorch(whole, torch_file):
    import torch

    reference, path = torch_file
    assert describe(path) == (Architecture("none", num_classes=7), told(Architecture("none", num_classes=7), 256))
    architecture = Architecture("none", **SMALL)
    network = architecture.network().set_train(False)
    assert load(network, architecture, path) == []
    batch = images(3, 32, 0)
    with torch.no_grad():
        wanted = reference(torch.tensor(batch)).numpy()
    np.testing.assert_allclose(network(Tensor(batch)).asnumpy(), wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_torch_file_starts_a_quantized_network(whole, torch_file):
    architecture = Architecture("pact", **SMALL)
    network = architecture.network()
    left_out = load(network, architecture, torch_file[1])
    assert set(CONTROLLER) < set(left_out) and sum(name.endswith(".alpha") for name in left_out) == 19
    assert len(left_out) == 19 + len(CONTROLLER)
    state = {name: tensor.numpy() for name, tensor in torch_file[0].state_dict().items()}
    after = values(network)
    np.testing.assert_array_equal(after["layer3.0.downsample.0.weight"], state["layer3.0.downsample.0.weight"])
    np.testing.assert_array_equal(after["layer4.1.bn2.gamma"], state["layer4.1.bn2.weight"])
    np.testing.assert_array_equal(after["bn1.moving_variance"], state["bn1.running_var"])


@pytest.mark.parametrize("quant", ["dorefa", "pact"])
def test_a_float_network_starts_a_quantized_one(files, quant):
    """The controller and PACT's maxima keep what they begin with."""
    architecture = Architecture(quant, **SMALL)
    maxima = {name for name in values(architecture.network()) if name.endswith(".alpha")}
    assert len(maxima) == (11 if quant == "pact" else 0)
    assert loaded(architecture, files["float"])[1] == {*CONTROLLER, *maxima}


def test_other_decisions_other_bits_and_other_sizes_get_a_new_controller(files):
    for architecture, name in (
        (Architecture(granularity="layer", **SMALL), "image"),
        (Architecture(**SMALL), "layer"),
        (Architecture(target_bits=5, **SMALL), "image"),
        (Architecture(num_bits=5, **SMALL), "image"),
        (Architecture(**SMALL), "large"),
    ):
        assert loaded(architecture, files[name])[1] == set(CONTROLLER), (architecture, name)
    assert loaded(Architecture(num_bits=1, **SMALL), files["image"])[1] == set()
    # 32 and 40 pixels have the same windows.
    assert loaded(Architecture(num_classes=7, image_size=40), files["image"])[1] == set()


def test_finetuning_starts_with_a_new_classifier(files):
    five = {"num_classes": 5, "image_size": 32}
    for name, quant in (("float", "none"), ("image", "dorefa")):
        assert loaded(Architecture(quant, **five), files[name], finetune=True)[1] == {"fc.weight", "fc.bias"}
    left_out = loaded(Architecture(**five), files["float"], finetune=True)[1]
    assert left_out == {"fc.weight", "fc.bias", *CONTROLLER}
    message = refused(Architecture(**five), files["float"])
    assert "has 7 classes, the network 5; set --num_classes 7, or --finetune" in message


def test_files_of_another_quantizer_are_refused(files):
    assert "set --quant pact" in refused(Architecture(**SMALL), files["pact"])
    assert "set --quant dorefa" in refused(Architecture("pact", **SMALL), files["image"])
    assert "start from a float checkpoint" in refused(Architecture("none", **SMALL), files["image"])


def test_missing_surplus_and_misshapen_parameters_are_named(files, tmp_path):
    architecture = Architecture(**SMALL)
    whole = values(architecture.network())
    for change, wanted in (
        (lambda a: a.pop("layer3.0.bn1.gamma"), "1 parameters missing: layer3.0.bn1.gamma"),
        (lambda a: a.pop("fc2.weight"), "1 parameters missing: fc2.weight"),
        (lambda a: [a.pop(f"layer2.0.bn{n}.{w}") for n in (1, 2) for w in ("gamma", "beta")], "4 parameters missing"),
        (lambda a: a.update(head=np.ones(3, np.float32)), "1 parameters surplus: head"),
        (lambda a: a.update({"layer1.0.conv1.bias": np.ones(64, np.float32)}), "surplus: layer1.0.conv1.bias"),
        (lambda a: a.update({"bn1.beta": np.ones(32, np.float32)}), "bn1.beta is (32,) in the file and (64,)"),
    ):
        arrays = dict(whole)
        change(arrays)
        assert wanted in refused(architecture, write(tmp_path / "wrong.ckpt", arrays))


@pytest.mark.parametrize("name", ["fc.bias", "fc.weight", "fc1.weight", "fc2.bias"])
def test_single_numbers_in_the_place_of_a_layer(name, tmp_path):
    arrays = values(Architecture(**SMALL).network()) | {name: np.array(1, np.float32)}
    with pytest.raises(UserError):
        load(Architecture(**SMALL).network(), Architecture(**SMALL), write(tmp_path / "odd.ckpt", arrays))


def test_a_controller_that_nobody_described_is_refused(tmp_path):
    arrays = values(Architecture(num_bits=5, num_classes=7).network())
    message = refused(Architecture(num_bits=5, num_classes=7), write(tmp_path / "five.ckpt", arrays))
    assert "its controller of 4096 inputs and 5 outputs is not the published one" in message


def test_a_file_that_tells_of_an_unknown_network_is_refused(files, tmp_path):
    record = json.loads(ms.load_checkpoint(str(files["image"]))["record"])
    arrays = values(Architecture(**SMALL).network())
    lacking = {key: value for key, value in record.items() if key != "granularity"}
    wrong = {"num_bits": 2, "target_bits": "four", "image_size": 32.0, "granularity": ["image"]}
    for changed in (lacking, record | {"quant": "lsq"}, *(record | {key: wrong[key]} for key in wrong)):
        path = write(tmp_path / "odd.ckpt", arrays, changed)
        with pytest.raises(UserError, match="tells of a network that this version does not know"):
            describe(path)


def test_files_of_other_networks_are_named(tmp_path):
    published = [name for name, _ in json.loads((GOLDEN / "dynamicquant_parameters.json").read_text())]
    others = {"a deeper ResNet": [*published, "layer1.0.conv3.weight"], "another network": ["x"]}
    for kind, names in others.items():
        path = write(tmp_path / "other.ckpt", {name: np.ones(3, np.float32) for name in names})
        with pytest.raises(UserError) as caught:
            describe(path)
        assert f"{path} looks like {kind}, not a whole ResNet-18; give the file of one" in str(caught.value)
    for kind, path in of_others("DynamicQuant", tmp_path):
        with pytest.raises(UserError) as caught:
            describe(path)
        assert f"{path} looks like {kind}" in str(caught.value)


def test_damaged_and_missing_files_are_refused(files, tmp_path):
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(files["image"].read_bytes()[:100000])
    flipped = bytearray(files["image"].read_bytes())
    flipped[len(flipped) // 2] ^= 16
    (tmp_path / "flipped.ckpt").write_bytes(flipped)
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "no.txt").write_bytes(b"text")
    for name, wanted in (
        ("cut.ckpt", "truncated"),
        ("flipped.ckpt", "damaged"),
        ("cut.pth", "truncated"),
        ("no.txt", "of another kind"),
        ("none.ckpt", "no checkpoint at"),
    ):
        with pytest.raises(UserError, match=wanted):
            describe(tmp_path / name)
