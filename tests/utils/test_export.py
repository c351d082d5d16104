"""Exported files: proved, moved to their places together, and bound to the manifest that tells what they are."""

import hashlib
import json
import os
import string

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, nn

from utils.cli import UserError
from utils.export import export, load_mindir, read_manifest, whole_export

SHAPE = [2, 3]
MANIFEST = {
    "model": "Small",
    "format": "MINDIR",
    "input": {"shape": SHAPE},
    "preprocess": {"resize": [5, 5]},
    "num_classes": 2,
    "class_names": ["a", "b"],
}


DEEP = json.loads("[" * 800 + "]" * 800)


def told_by(manifest: dict) -> dict:
    return {"resize_size": manifest["preprocess"]["resize"][0]}


def dense(value: float) -> nn.Cell:
    return nn.Dense(3, 2, Tensor(np.full((2, 3), value, np.float32)), "zeros").set_train(False)


def write(folder, networks: dict[str, nn.Cell]) -> dict:
    """The files as an export.py writes them; returns what each is told to be."""
    ms.set_context(mode=ms.GRAPH_MODE)
    with whole_export(folder / "small.json") as place:
        files = {name: export(cell, SHAPE, place / name, "MINDIR") for name, cell in networks.items()}
        (place / "small.json").write_text(json.dumps(MANIFEST | files["small"]))
    return files


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    write(folder, {"small": dense(1)})
    return folder / "small.mindir"


@pytest.fixture
def pair(tmp_path, exported):
    """A copy of the MINDIR file, and what writes another manifest beside it; read back, that must be refused."""
    path = tmp_path / "small.mindir"
    path.write_bytes(exported.read_bytes())
    whole = json.loads(exported.with_suffix(".json").read_text())

    def refused(change: dict | None = None, text: str = "") -> str:
        path.with_suffix(".json").write_text(text or json.dumps(whole | change))
        with pytest.raises(UserError) as caught:
            read_manifest(path, ["Small"], told_by)
        return str(caught.value)

    return path, refused


def test_a_manifest_tells_of_the_file_beside_it(exported):
    told, batch_size = read_manifest(exported, ["Other", "Small"], told_by)
    assert told == {"num_classes": 2, "classes": ["a", "b"], "resize_size": 5} and batch_size == 2
    assert sorted(os.listdir(exported.parent)) == ["small.json", "small.mindir"]
    manifest = json.loads(exported.with_suffix(".json").read_text())
    assert manifest["sha256"] == hashlib.sha256(exported.read_bytes()).hexdigest()
    np.testing.assert_array_equal(load_mindir(exported)(Tensor(np.ones(SHAPE, np.float32))).asnumpy(), [[3, 3]] * 2)


def test_another_file_beside_the_manifest_is_noticed(pair):
    path, refused = pair
    whole = path.read_bytes()
    for other in (whole[:-1], whole[:20] + bytes([whole[20] ^ 1]) + whole[21:], b""):
        path.write_bytes(other)
        assert "is damaged or not the file that" in refused({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "resnest50"}, "is of resnest50, not of Small; give an export of this folder"),
        *(({"model": value}, "is not a manifest") for value in (["Small"], {}, None, 1)),
        *(({"format": value}, "is not a manifest") for value in (["MINDIR"], "ONNX", None)),
        ({"format": "AIR"}, "is of a later export, to AIR"),
        ({"sha256": 1}, "is damaged or not the file"),
        *(({"input": {"shape": shape}}, "is not a manifest") for shape in ([-1], ["many"], [None], [1.5], [True], [])),
        *(({"class_names": names}, "is not a manifest") for names in (["a"], "ab", [1, 2], [["a"], "b"], {"a": 1}, 3)),
        *(({"preprocess": value}, "is not a manifest") for value in ([], {}, {"resize": 5}, {"resize": []}, None)),
        *(({key: DEEP}, "is not a manifest") for key in ("model", "format", "input", "class_names", "preprocess")),
        ({"input": {"shape": [DEEP]}}, "is not a manifest"),
    ],
    ids=str,
)
def test_manifests_of_another_kind(pair, change, message):
    _, refused = pair
    assert message in refused(change)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 900, "[]", "3", "null", "{", "NaN", '"\\ud800"', "9" * 5000])
def test_manifests_that_are_none(pair, text):
    _, refused = pair
    assert "export the network again" in refused(text=text)


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path):
    write(tmp_path, {"small": dense(1), "z": dense(1)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"^z\.mindir would compute numbers that are not finite; export other weights$"):
        write(tmp_path, {"small": dense(2), "z": dense(np.inf)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_manifest_lies_beside_the_files_of_another_export(tmp_path):
    """Whatever stops it between two files: here a folder that stands in the way of the last one but the manifest."""
    write(tmp_path, {"small": dense(1)})
    (tmp_path / "z.mindir").mkdir()
    with pytest.raises(UserError, match="cannot write to"):
        write(tmp_path, {"small": dense(2), "z": dense(2)})
    assert sorted(os.listdir(tmp_path)) == ["small.mindir", "z.mindir"]
    with pytest.raises(UserError, match=r"no file .*small\.json; export\.py writes"):
        read_manifest(tmp_path / "small.mindir", ["Small"], told_by)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*MANIFEST, "shape"]), inner),
)


@pytest.mark.full
@settings(max_examples=2000, deadline=1000)
@given(content=st.binary() | VALUES | st.dictionaries(st.sampled_from([*MANIFEST, "sha256"]), VALUES))
def test_any_manifest_is_read_or_refused_in_one_line(exported, tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "small.mindir").write_bytes(exported.read_bytes())
    if isinstance(content, dict):
        content = json.loads(exported.with_suffix(".json").read_text()) | content
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "small.json").write_bytes(text)
    try:
        told, batch_size = read_manifest(folder / "small.mindir", ["Small"], told_by)
    except UserError as error:
        assert "; " in str(error)
    else:
        names = told["classes"]
        assert batch_size >= 0 and (names is None or all(isinstance(name, str) for name in names))
