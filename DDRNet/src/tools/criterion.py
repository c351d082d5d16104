"""Loss functions."""

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops


class SoftTargetCrossEntropy(nn.Cell):
    """Mean over the batch of -sum(targets * log softmax(logits)), in float32 whatever the logits' type.

    Inputs: logits (N, K); targets float32 (N, K), rows that sum to 1 (smoothed labels, or mixed by Mixup or CutMix).
    Output: float32 ().
    """

    def construct(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.astype(ms.float32)
        return -(targets * ops.log_softmax(logits, -1)).sum(-1).mean()
