"""Every kind of file that the project reads or writes, by the names of its parameters."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np

GOLDEN = Path(__file__).parent / "golden"
STATE = "a training state (resume.ckpt, for --resume)"
DYNAMIC = "a quantized ResNet-18 (DynamicQuant)"


def listed(name: str) -> list[str]:
    return [name for name, _ in json.loads((GOLDEN / f"{name}.json").read_text())]


def own_files() -> list[tuple[str, str, list[str]]]:
    """Model, kind in words, and names of each."""
    classifier, predictor, ddrnet = map(listed, ("drnet_classifier", "drnet_predictor", "ddrnet23_parameters"))
    published, torch = listed("dynamicquant_parameters"), listed("resnest50_torch")
    dynamic = [name for name in published if not name.endswith((".scale", "conv1.bias", "conv2.bias"))]
    plain = [name for name in dynamic if not name.startswith(("fc1.", "fc2."))]
    resnest = [name.replace("running_mean", "moving_mean").replace("running_var", "moving_variance") for name in torch]
    rows = json.loads((GOLDEN / "resnest50_mindconverter_layers.json").read_text())
    converted = [f"{row['mindconverter']}.{leaf}" for row in rows for leaf in ("weight", "bias")]
    files = [
        ("DRNet", "a DRNet classifier", classifier),
        ("DRNet", "a DRNet predictor", predictor),
        ("DRNet", STATE, [f"classifier.{part}{name}" for name in classifier for part in ("", "optimizer.moments.")]),
        ("DDRNet", "a DDRNet-23", ddrnet),
        ("ResNeSt", "a ResNeSt", resnest),
        ("ResNeSt", "a ResNeSt", torch),
        ("ResNeSt", "a network of MindConverter, such as the published ResNeSt", converted),
        ("DynamicQuant", DYNAMIC, published),
        ("DynamicQuant", DYNAMIC, dynamic),
        ("DynamicQuant", DYNAMIC, [*plain, "layer1.0.conv1.quan_a.alpha"]),
        ("DynamicQuant", "a ResNet-18 (DynamicQuant, float or of fixed bits)", plain),
    ]
    for model, names in (("DDRNet", ddrnet), ("ResNeSt", resnest), ("DynamicQuant", dynamic)):
        files.append((model, STATE, ["learning_rate", *names, *(f"accum.{name}" for name in names)]))
    return files


def of_others(model: str, folder: Path) -> list[tuple[str, Path]]:
    """Kind and place of the files, written into `folder`, that are none of this model's."""
    files = []
    for number, (owner, kind, names) in enumerate(own_files()):
        if owner != model and "running_mean" not in "".join(names):  # that one would be a .pth
            rows = [{"name": name, "data": ms.Tensor(np.ones(3, np.float32))} for name in names]
            ms.save_checkpoint(rows, str(folder / f"{number}.ckpt"))
            files.append((kind, folder / f"{number}.ckpt"))
    assert len(files) > 6
    return files
