"""Files of all models, told apart by the names of their parameters."""

import pytest
from own_files import own_files

from utils.kinds import KINDS, kind_of


@pytest.mark.parametrize(("kind", "names"), [file[1:] for file in own_files()], ids=lambda value: str(value)[:40])
def test_every_file_of_the_project_is_recognised(kind, names):
    assert kind_of(names) == kind


def test_every_kind_is_of_a_file_and_others_are_another_network():
    assert {kind for _, kind, _ in own_files()} | {"a deeper ResNet"} == set(KINDS)
    assert kind_of(["conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv3.weight", "fc.weight"]) == "a deeper ResNet"
    for names in ([], ["x"], ["features.0.weight", "features.0.bias"]):
        assert kind_of(names) == "another network"
