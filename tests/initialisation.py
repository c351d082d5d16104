"""How the convolutions of all published networks, and of their authors', start."""

import numpy as np
import pytest
from mindspore import nn


def check_fan_out(network: nn.Cell) -> None:
    """He et al., arXiv 1502.01852, section 2.2, by fan-out: normal with the deviation sqrt(2 / (channels * side²))."""
    weights = {p.name: p.asnumpy() for p in network.get_parameters() if p.ndim == 4}
    assert weights
    for name, weight in weights.items():
        deviation, count = np.sqrt(2 / (len(weight) * weight[0, 0].size)), weight.size
        assert weight.std() == pytest.approx(deviation, rel=5 / np.sqrt(2 * count)), name
        assert abs(weight.mean()) < 5 * deviation / np.sqrt(count), name
        assert count < 9000 or 3.3 < np.abs(weight).max() / deviation < 7, name  # of a normal one
