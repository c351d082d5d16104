"""A DRNet whose classifier has one block a stage: it has every part of the real one and compiles in seconds."""

import numpy as np
from golden.recipe import value
from mindspore import Tensor
from src.classifier import ResNet
from src.drnet import CLASSIFIER, Architecture, Classify, DRNet

from utils.images import Batch


def tiny_drnet(resolutions=(32, 24, 16), num_classes=7, predictor_size=16, image_size=32) -> DRNet:
    """Filled from the recipe, so that its answers vary with the image."""
    architecture = Architecture(resolutions, predictor_size, image_size, num_classes, "per_resolution")
    drnet = DRNet(architecture)
    drnet.classifier = ResNet((1, 1, 1, 1), num_classes, len(resolutions), "per_resolution")
    drnet.classifier.update_parameters_name(CLASSIFIER)
    drnet.classify = [Classify(drnet.classifier, architecture, index) for index in range(len(resolutions))]
    for network in (drnet.predictor, drnet.classifier):
        for parameter in network.get_parameters():
            parameter.set_data(Tensor(value(parameter.name, parameter.shape)))
    drnet.set_train(False)
    return drnet


def random_batches(count: int, sizes, size: int = 32, classes: int = 7, seed: int = 0):
    """`count` random images in batches of `sizes` (repeated as needed), as the data pipeline yields them."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((count, 3, size, size)).astype(np.float32)
    images += 2 * rng.standard_normal((count, 3, 1, 1)).astype(np.float32)
    labels = rng.integers(0, classes, count).astype(np.int32)
    first, k = 0, 0
    while first < count:
        last = min(count, first + sizes[k % len(sizes)])
        rows = np.arange(first, last)
        yield Batch(images[rows], labels[rows], rows, [])
        first, k = last, k + 1
