"""Predictor and classifier against the published networks: parameter names, shapes and outputs."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from golden.recipe import images, value
from initialisation import check_fan_out
from mindspore import Tensor
from own_files import of_others
from src.classifier import ResNet, resnet50
from src.drnet import Architecture, DRNet, count_gmacs, record_of
from src.layers import Resize
from src.predictor import predictor

from utils.cli import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "drnet.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)


def filled(network):
    """The network with the weights that the golden outputs were computed with."""
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(value(parameter.name, parameter.shape)))
    return network.set_train(False)


@pytest.mark.parametrize(("name", "network"), [("predictor", predictor), ("classifier", resnet50)])
def test_parameters_are_those_of_the_published_checkpoint(name, network):
    published = json.loads((GOLDEN / f"drnet_{name}.json").read_text())
    assert [[parameter.name, list(parameter.shape)] for parameter in network().get_parameters()] == published


@pytest.mark.parametrize("network", [predictor, lambda: ResNet((1, 1, 1, 1), 7, 2, "published")])
def test_convolutions_start_as_published(network):
    check_fan_out(network())


def test_resize_is_the_published_one():
    resized = Resize(128)(Tensor(images(2, 224))).asnumpy()
    assert resized.shape == (2, 3, 128, 128)
    np.testing.assert_allclose(resized[0, 0, :2, :6], EXPECTED["resized_128_probe"], atol=1e-5)


def test_predictor_outputs_the_published_scores():
    scores = filled(predictor())(Resize(128)(Tensor(images(2, 224)))).asnumpy()
    np.testing.assert_allclose(scores, EXPECTED["predictor_scores"], atol=1e-4)


def test_classifier_outputs_the_published_logits_at_every_resolution():
    network = filled(resnet50())
    for index, size in enumerate((224, 168, 112)):
        x = Tensor(images(2, 224))
        logits = network(x if size == 224 else Resize(size)(x), index).asnumpy()
        np.testing.assert_allclose(logits[:, :10], EXPECTED[f"classifier_{size}_first10"], atol=1e-4)
        assert logits.argmax(1).tolist() == EXPECTED[f"classifier_{size}_argmax"]
        np.testing.assert_allclose(np.linalg.norm(logits, axis=1), EXPECTED[f"classifier_{size}_norm"], rtol=1e-5)


def test_shortcut_bn_follows_the_setting():
    """With every set but the shortcuts' equal, the resolution matters only if the shortcuts have their own sets."""
    outputs = {}
    for setting in ("published", "per_resolution"):
        network = ResNet((1, 1, 1, 1), 7, 2, setting)
        for parameter in network.get_parameters():
            name = parameter.name if "down_sample_layer" in parameter.name else parameter.name.replace("bn_1", "bn_0")
            parameter.set_data(Tensor(value(name, parameter.shape)))
        network.set_train(False)
        outputs[setting] = [network(Tensor(images(1, 32)), index).asnumpy() for index in (0, 1)]
    np.testing.assert_array_equal(*outputs["published"])
    np.testing.assert_allclose(outputs["published"][0], outputs["per_resolution"][0], atol=1e-6)
    assert np.abs(outputs["per_resolution"][0] - outputs["per_resolution"][1]).max() > 1e-2
    with pytest.raises(ValueError, match="shortcut_bn"):
        ResNet((1, 1, 1, 1), shortcut_bn="own")


def resnet50_gmacs(size, num_classes=1000):
    """ResNet-50 by hand: output side of each convolution times its weights, from the published shapes."""
    stage_side = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
    macs = 0
    for name, shape in json.loads((GOLDEN / "drnet_classifier.json").read_text()):
        stage, block, layer = [*name.split("."), "", ""][:3]
        if name == "conv1.weight":
            side = -(-size // 2)
        elif "conv" in layer or "down_sample_layer.0" in name:
            stride = stage_side[stage]
            if layer == "conv1" and block == "0" and stage != "layer1":
                stride //= 2  # the stride is that of the block's second convolution
            side = -(-size // stride)
        elif name == "end_point.weight":
            side = 1
        else:
            continue
        macs += int(np.prod(shape)) * side**2
    return macs / 1e9


def test_gmacs_are_the_counted_ones():
    """GMACs that the paper gives, or that were counted for the published networks by other means."""
    drnet = DRNet(Architecture((224, 168, 112), 128, 224, 1000, "published"))
    cost, classifier = drnet.gmacs()
    assert cost == pytest.approx(0.290, abs=5e-4)
    assert classifier[0] == pytest.approx(4.1, abs=0.05)
    assert classifier == pytest.approx([resnet50_gmacs(size) for size in (224, 168, 112)], rel=1e-12)
    small = DRNet(Architecture((32, 24, 16), 16, 32, 10, "published"))
    cost, classifier = small.gmacs()
    assert [round(c, 3) for c in (cost, *classifier)] == [0.007, 0.083, 0.066, 0.032]
    assert [round(count_gmacs(predictor(), size), 3) for size in (32, 24)] == [0.018, 0.013]
    assert ms.get_context("mode") == ms.GRAPH_MODE


def test_other_classes_candidates_and_sizes():
    drnet = DRNet(Architecture((96, 64, 48, 32), 40, 96, 7, "per_resolution", (1, 1, 1, 1)))
    x = Tensor(images(3, 96))
    assert drnet.predict(x).shape == (3, 4)
    assert drnet.classify[3](x).shape == (3, 7)


def test_files_of_the_other_models_are_named(tmp_path):
    for kind, path in of_others("DRNet", tmp_path):
        with pytest.raises(UserError) as caught:
            record_of(path)
        assert f"{path} looks like {kind}; give the file of a DRNet classifier" in str(caught.value)
