"""What a file of weights is, by the names of its parameters."""

import re
from collections.abc import Collection

STATE = "a training state (resume.ckpt, for --resume)"
DRNET_CLASSIFIER, DRNET_PREDICTOR, DDRNET = "a DRNet classifier", "a DRNet predictor", "a DDRNet-23"
# Of each kind a name that no kind below has, as a regular expression.
KINDS = {
    STATE: r"learning_rate|classifier\..*|(accum|moments?\d?|lamb_[mv])\..*",
    DDRNET: r"compression3\.0\.weight",
    DRNET_CLASSIFIER: r".*\.bn_0\.\w+",
    "a ResNeSt": r"layer1\.0\.conv2\.(conv|fc1)\.weight",
    "a network of MindConverter, such as the published ResNeSt": r"module\d+_\d+\..*\.weight",
    "a deeper ResNet": r"layer1\.0\.conv3\.weight",
    "a quantized ResNet-18 (DynamicQuant)": r"fc2\.weight|.*\.quan_a\..*|.*\.scale",
    "a ResNet-18 (DynamicQuant, float or of fixed bits)": r"layer1\.1\.conv2\.weight",
    DRNET_PREDICTOR: r"end_point\.weight",
}


def kind_of(names: Collection[str]) -> str:
    """Which kind of file has parameters of these `names`, in words for a message."""
    fits = (kind for kind, pattern in KINDS.items() if any(re.fullmatch(pattern, name) for name in names))
    return next(fits, "another network")
