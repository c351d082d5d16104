"""A DRNet whose classifier has one block a stage: it has every part of the real one and compiles in seconds."""

import numpy as np
from golden.recipe import value
from mindspore import Tensor
from src.drnet import Architecture, DRNet


def tiny_drnet(resolutions=(32, 24, 16), num_classes=7, predictor_size=16, image_size=32) -> DRNet:
    """Filled from the recipe, so that its answers vary with the image."""
    layers = (1, 1, 1, 1)
    drnet = DRNet(Architecture(resolutions, predictor_size, image_size, num_classes, "per_resolution", layers))
    for network in (drnet.predictor, drnet.classifier):
        for parameter in network.get_parameters():
            parameter.set_data(Tensor(value(parameter.name, parameter.shape)))
    return drnet


def random_images(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """float32 (count, 3, size, size), each with its own mean colour."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((count, 3, size, size)).astype(np.float32)
    return images + 2 * rng.standard_normal((count, 3, 1, 1)).astype(np.float32)


def spread_choices(drnet: DRNet, images: np.ndarray) -> None:
    """Centre the predictor's scores of `images`, so that every resolution is chosen for some of them."""
    bias = drnet.predictor.end_point.bias
    bias.set_data(Tensor(bias.asnumpy() - drnet.predict(Tensor(images)).asnumpy().mean(0)))
