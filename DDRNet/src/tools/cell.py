"""Mixed precision: which cells of a network compute in float16."""

import mindspore as ms
import mindspore.nn as nn


def cast_amp(network: nn.Cell, amp_level: str, keep_bn_fp32: bool) -> None:
    """Make cells of `network` compute in float16; the parameters stay float32.

    O0: none. O1: convolutions and dense layers. O2 and O3: all, but BN only if not `keep_bn_fp32`: that setting decides
    over the level, as in `mindspore.train.Model`, so that with it O3 is O2 and without it O2 is O3.

    Raises:
        ValueError: another level.
    """
    if amp_level not in ("O0", "O1", "O2", "O3"):
        raise ValueError(f"no amp_level {amp_level}")
    if amp_level == "O0":
        return
    if amp_level != "O1":
        network.to_float(ms.float16)
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.Conv2d | nn.Dense):
            cell.to_float(ms.float16)
        elif isinstance(cell, nn.BatchNorm2d) and (keep_bn_fp32 or amp_level == "O1"):
            cell.to_float(ms.float32)
