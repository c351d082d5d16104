"""A network with one block a stage and few channels: it has every part of the real one and compiles in seconds."""

import numpy as np
import src.resnet as resnet
from golden.recipe import value
from mindspore import Tensor

# layer1 keeps its 64 channels, which is what the controller and the back parts take.
SIZES = {"WIDTHS": (64, 8, 12, 16), "BLOCKS": 1, "DECISIONS": 6}
# So wide at its end that most of a file are its weights.
WIDER = (64, 8, 12, 128)
CLASSES = 5


def architecture(quant: str = "dorefa", granularity: str = "image", num_bits: int = 3) -> resnet.Architecture:
    return resnet.Architecture(quant, 4, num_bits, granularity, CLASSES, 32)


def network(of: resnet.Architecture) -> resnet.ResNet:
    """Filled from the recipe; to be made while `SIZES` replace the constants of `src.resnet`.

    PACT's maxima are such that some activations are clipped, and the scores are close to each other.
    """
    made = of.network()
    assert made.layer4[-1].conv2.weight.shape == (16, 16, 3, 3)
    for parameter in made.get_parameters():
        array = value(parameter.name, parameter.shape)
        if parameter.name.endswith(".alpha"):
            array = array + np.float32(0.7)
        elif parameter.name == "fc2.weight":
            array = array / 10
        parameter.set_data(Tensor(array))
    return made.set_train(True)
