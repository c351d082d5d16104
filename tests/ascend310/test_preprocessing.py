"""What the C++ program feeds to its model, against Pillow, the evaluations of the models, and the Python program."""

import sys

import numpy as np
import pytest
from conftest import ROOT, run_script
from PIL import Image

sys.path.insert(0, str(ROOT / "tests" / "ascend310"))
import samples
from lite import tensors

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
SIZES = [(1, 1), (1, 300), (300, 1), (2, 3), (31, 17), (255, 257), (256, 256), (640, 480), (375, 500), (300, 301)]
SIZES += [(2000, 40), (40, 2000)]
CMYK_LEVELS = 2  # by which OpenCV's conversion of CMYK differs from Pillow's at most, before the resampling rounds


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize, crop", [(256, 224), (257, 224), (255, 224), (416, 416), (40, 7)])
def test_the_resampler_equals_pillow(tmp_path, interpolation, resize, crop):
    """Noise of many shapes, with levels at both ends so that bicubic overshoots; every bit."""
    rng = np.random.default_rng(0)
    paths, wanted = [], []
    for width, height in SIZES:
        pixels = rng.choice(np.array([0, 0, 255, 255, 77, 180], np.uint8), (height, width, 3))
        paths.append(tmp_path / f"{width} {height}.png")
        Image.fromarray(pixels).save(paths[-1])
        square = Image.fromarray(pixels).resize((resize, resize), Image.Resampling[interpolation.upper()])
        edge = round((resize - crop) / 2)
        centre = np.asarray(square.crop((edge, edge, edge + crop, edge + crop)))
        wanted.append(((centre / 255 - MEAN) / STD).astype(np.float32).transpose(2, 0, 1))
    np.testing.assert_array_equal(tensors(paths, resize, crop, interpolation, tmp_path / "out"), np.stack(wanted))


EVALUATION = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}]
import numpy as np
from src.{module} import EvalTransform
transform = EvalTransform({arguments})
paths = Path(sys.argv[1]).read_text().splitlines()
np.save(sys.argv[2], np.stack([transform(Path(path)) for path in paths]))
"""
PYTHON_PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}]
import numpy as np
from utils.infer_310 import prepare
paths = Path(sys.argv[1]).read_text().splitlines()
np.save(sys.argv[2], np.stack([prepare(Path(path), {resize}, {crop}, {interpolation!r}) for path in paths]))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return samples.make(tmp_path_factory.mktemp("images"), 240)


@pytest.mark.parametrize(
    "model, module, arguments, resize, crop, interpolation",
    [
        ("ResNeSt", "dataset", "224, 256", 256, 224, "bilinear"),
        ("ResNeSt", "dataset", "320, 320", 320, 320, "bilinear"),
        ("DDRNet", "data.transforms", "224, 0.875", 256, 224, "bicubic"),
    ],
)
def test_the_three_ways_to_a_tensor(images, tmp_path, model, module, arguments, resize, crop, interpolation):
    """The program's tensors are those of the model's eval.py and of the Python program, but for CMYK."""
    (tmp_path / "paths").write_text("\n".join(map(str, images)))
    settings = dict(root=str(ROOT), module=module, arguments=arguments, resize=resize, crop=crop)
    ways = {"C++": tensors(images, resize, crop, interpolation, tmp_path / "out")}
    for name, code in (("eval.py", EVALUATION), ("Python program", PYTHON_PROGRAM)):
        code = code.format(**settings, interpolation=interpolation)
        result = run_script("-c", code, tmp_path / "paths", tmp_path / "out.npy", cwd=ROOT / model)
        assert result.returncode == 0, result.stderr
        ways[name] = np.load(tmp_path / "out.npy")
    np.testing.assert_array_equal(ways["Python program"], ways["eval.py"])
    cmyk = np.array(["cmyk" in path.name for path in images])
    difference = np.abs(ways["C++"] - ways["eval.py"])
    for name, part in (("CMYK", difference[cmyk]), ("all others", difference[~cmyk])):
        print(f"{model} {crop}: {len(part)} images, {name}: at most {part.max():.3g}, in the mean {part.mean():.3g}")
    assert len(images) >= 200 and cmyk.sum() >= 10
    assert difference[~cmyk].max() == 0
    # bicubic weights overshoot, and both passes round
    assert difference[cmyk].max() <= 2 * CMYK_LEVELS / 255 / STD.min()
    assert difference[cmyk].mean() <= 0.5 / 255 / STD.min()


def test_cmyk(tmp_path):
    """The conversion by itself: all inks at random, sharp and smooth, nothing to resize."""
    rng = np.random.default_rng(0)
    paths, wanted = [], []
    for size in (4, 16, 256):
        inks = rng.integers(0, 256, (size, size, 4), dtype=np.uint8)
        paths.append(tmp_path / f"{size}.JPEG")
        Image.fromarray(inks, "CMYK").resize((256, 256), Image.Resampling.BICUBIC).save(paths[-1], quality=95)
        with Image.open(paths[-1]) as image:
            wanted.append(np.asarray(image.convert("RGB"), np.float64))
    found = tensors(paths, 256, 256, "bilinear", tmp_path / "out").transpose(0, 2, 3, 1)
    levels = np.abs(((found * STD + MEAN) * 255).round() - np.stack(wanted))
    print(f"CMYK: {levels.size // 3} pixels, at most {levels.max():.0f} levels, in the mean {levels.mean():.2f}")
    assert levels.max() <= CMYK_LEVELS and levels.mean() <= 1
