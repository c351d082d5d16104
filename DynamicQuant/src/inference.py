"""Inference: the controller chooses, and each image is computed once, at the bit-width chosen for it.

The front part is the stem, `layer1` and the controller; a back part is `layer2` to the classifier at one bit-width, its
weights quantized beforehand.
"""

from collections.abc import Iterator

import mindspore.nn as nn
import numpy as np
from mindspore import Tensor

from src.gumbelsoftmax import gumbel_noise
from src.resnet import FLOAT, WIDTHS, Architecture, ResNet, load_fixed


class Front(nn.Cell):
    """Images float32 (N, 3, S, S) to the output of `layer1`, float32 (N, 64, S / 4, S / 4).

    With a controller also its scores, float32 (N, D, R).
    """

    def __init__(self, network: ResNet):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features, scores = self.network.front(images)
        return features if scores is None else (features, scores)


class Back(nn.Cell):
    """Output of `layer1` to logits float32 (N, K); a network that computes all bit-widths also needs the choices."""

    def __init__(self, network: ResNet):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, features: Tensor, choices: Tensor | None = None) -> Tensor:
        return self.network.back(features, choices)


class Predictor:
    """Runs a trained network in batches of one size, so that each graph is compiled once.

    One decision an image: `backs` has a part for each bit-width, and images wait in queues until a batch of one
    bit-width is full. One decision a layer: there is one back part, which computes all bit-widths and mixes them. The
    float network and fixed bits have one back part and no choice.

    Args:
        architecture: of the network.
        batch_size: N of every batch.
        force_bits: run everything at these bits instead of what the controller chooses.
        sample_seed: sample the choices, the noise of each image drawn from this seed and its row, as the published
            evaluation does; None: the largest score is chosen.
    """

    def __init__(
        self, architecture: Architecture, batch_size: int, force_bits: int | None = None, sample_seed: int | None = None
    ):
        self.architecture = architecture
        self.batch_size = batch_size
        self.sample_seed = sample_seed
        self.decides = architecture.decisions > 0 and force_bits is None
        self.mixes = self.decides and architecture.granularity == "layer"
        self.bits = architecture.bits if force_bits is None else (force_bits,)
        if architecture.quant == FLOAT or self.mixes:
            self.networks = [architecture.network().set_train(False)]
        else:
            self.networks = [architecture.fixed(bits) for bits in self.bits]
        self.front = Front(self.networks[0])
        self.backs = [Back(network) for network in self.networks]
        size = architecture.image_size // 4
        shape = (batch_size, WIDTHS[0], size, size)
        self.queues = [np.empty(shape, np.float32) for _ in self.backs]
        self.rows: list[list[tuple[int, np.ndarray]]] = [[] for _ in self.backs]
        self.choices = np.zeros((batch_size, max(architecture.decisions, 1), max(len(self.bits), 1)), np.float32)

    def load(self, network: ResNet) -> "Predictor":
        """Take over the parameters of the network that is trained, quantizing its weights."""
        for own in self.networks:
            load_fixed(own, network)
        return self

    def compile(self) -> None:
        """Compile all graphs, so that it does not happen in between."""
        size = self.architecture.image_size
        self.front(Tensor(np.zeros((self.batch_size, 3, size, size), np.float32)))
        for group in range(len(self.backs)):
            self._run(group)

    def add(self, images: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Take up to N images float32 (n, 3, S, S); `rows`, int (n,), says which they are.

        Yields:
            rows (m,), decisions int (m, D) (positions in `bits`) and logits float32 (m, K) of the images that have been
            classified, in the order of a queue.
        """
        count = len(images)
        padding = np.zeros((self.batch_size - count, *images.shape[1:]), np.float32)
        out = self.front(Tensor(np.concatenate([images, padding])))
        features, scores = out if isinstance(out, tuple) else (out, None)
        features = features.asnumpy()
        decisions = np.zeros((count, self.choices.shape[1]), np.int8)
        if self.decides:
            decisions = self._decide(scores.asnumpy()[:count], rows)
        for position, (row, decision) in enumerate(zip(rows.tolist(), decisions)):
            group = 0 if self.mixes else decision[0]
            place = len(self.rows[group])
            self.queues[group][place] = features[position]
            if self.mixes:
                self.choices[place] = np.eye(len(self.bits))[decision]
            self.rows[group].append((row, decision))
            if place + 1 == self.batch_size:
                yield self._finish(group)

    def flush(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Classify what still waits; yields as `add`."""
        for group, waiting in enumerate(self.rows):
            if waiting:
                yield self._finish(group)

    def _decide(self, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if self.sample_seed is None:
            return scores.argmax(-1).astype(np.int8)
        noise = np.stack([gumbel_noise(scores.shape[1:], self.sample_seed, int(row)) for row in rows])
        return (scores + noise).argmax(-1).astype(np.int8)

    def _finish(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, decisions = (np.array(column) for column in zip(*self.rows[group]))
        self.rows[group] = []
        return rows, decisions, self._run(group)[: len(rows)]

    def _run(self, group: int) -> np.ndarray:
        words = [Tensor(self.queues[group])] + ([Tensor(self.choices)] if self.mixes else [])
        return self.backs[group](*words).asnumpy()
