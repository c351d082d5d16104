"""Whatever stands in a file or on the command line: an answer or one line, within a second."""

import copy
import importlib
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, _activate
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from utils.cli import UserError, read_json
from utils.hccl_tools.hccl_tools import device_addresses, parse_range, parse_visible
from utils.hccl_tools.rank_table import address_of, devices_of, read_table
from utils.result_files import print_accuracy

pytestmark = pytest.mark.full

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def tries(count):
    return hypothesis_settings(max_examples=count, deadline=None, database=None, suppress_health_check=CHECKS)


def answer(call):
    """What `call` returns, or None after a UserError; anything else that it raises, or a second of work, is a fault."""
    start = time.process_time()
    try:
        return call()
    except UserError as error:
        assert str(error).strip()
    except SystemExit as end:  # --help
        assert end.code == 0
    finally:
        # Some 0.9 s are what PyYAML takes for the deepest nesting that Python allows.
        assert time.process_time() - start < 2


CONFIGS = {
    "drnet": "src.model_utils.config",
    "resnest": "src.config",
    "dynamicquant": "src.config",
    "ddrnet": "src.configs.settings",
}
USERS = ["eval", "export", "train", "pretrain", "finetune", "float", "quantize"]


@pytest.fixture(params=CONFIGS)
def model(request):
    """The module of a model's settings."""
    _activate(ROOT / "tests" / request.param / "any")
    yield importlib.import_module(CONFIGS[request.param])
    _activate(request.path)


anything = st.text(st.characters(), max_size=30)  # surrogates and all
numbers = st.integers() | st.floats() | st.sampled_from([2**31, 2**32, 2**63, 10**40, -1, 0])
scalars = st.none() | st.booleans() | numbers | anything | st.dates() | st.binary(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(USERS) | anything, inner, max_size=4),
    max_leaves=10,
)
syntax = st.text("[]{}&*!|>'\"%@`#,?:-<=~ \n\tab01.\\xuU\0\x85\ufeff", max_size=200)


def load(model, command, path, words=()):
    args = answer(lambda: model.load_config(command, "", ["--config_path", str(path), *words]))
    for key in args.given.keys() | model.SETTINGS.keys() & vars(args).keys() if args else []:
        value = getattr(args, key)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):  # may become a path
                assert item.lower() not in ("", "none") and b"\0" not in os.fsencode(item), (key, item)
            elif item is not None:
                assert math.isfinite(item) and (isinstance(item, float) or item < 2**32), (key, item)


commands = st.sampled_from(["eval", "export", "train"])


@tries(400)
@given(content=st.binary(max_size=300) | syntax.map(lambda text: text.encode()), command=commands)
def test_any_bytes_as_config(model, tmp_path, content, command):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    load(model, command, path)


@tries(400)
@given(data=st.data(), command=commands)
def test_any_values_of_real_keys(model, tmp_path, data, command):
    config = yaml.safe_load(model.CONFIG.read_text())
    keys = data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=4))
    config |= {key: data.draw(values) for key in keys}
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=data.draw(st.booleans())), errors="backslashreplace")
    words = ["--stage", data.draw(st.sampled_from(model.STAGES))] if hasattr(model, "STAGES") else []
    load(model, command, path, words if command == "train" else [])


@tries(400)
@given(data=st.data(), command=commands)
def test_any_syntax_in_the_place_of_a_value(model, tmp_path, data, command):
    lines = model.CONFIG.read_text().split("\n")
    place = data.draw(st.integers(0, len(lines) - 1))
    lines[place] = lines[place].split(":")[0] + ": " + data.draw(syntax)
    path = tmp_path / "a.yaml"
    path.write_text("\n".join(lines))
    load(model, command, path)


words = st.text(st.characters(exclude_characters="\0"), max_size=30) | numbers.map(str) | st.sampled_from(["none", ""])


@tries(400)
@given(data=st.data(), command=commands)
def test_any_command_line(model, data, command):
    flags = st.sampled_from(sorted(model.SETTINGS)).map("--{}".format)
    given_words = data.draw(st.lists(st.tuples(flags, st.lists(words, max_size=3)), max_size=4))
    load(model, command, model.CONFIG, [word for flag, more in given_words for word in (flag, *more)])


TABLE = {
    "version": "1.0",
    "server_count": "1",
    "server_list": [
        {"server_id": "10.0.0.1", "device": [{"device_id": "0", "device_ip": "10.1.0.1", "rank_id": "0"}] * 2}
    ],
    "status": "completed",
}
json_scalars = st.none() | st.booleans() | numbers | anything
json_values = st.recursive(
    json_scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(anything, inner, max_size=4),
    max_leaves=10,
)


def read_a_table(path):
    answer(lambda: read_table(path))
    answer(lambda: devices_of(path, 1))


@tries(500)
@given(st.binary(max_size=300) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_or_json_as_rank_table(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    read_a_table(path)


@tries(500)
@given(data=st.data())
def test_any_values_in_a_rank_table(tmp_path, data):
    table = copy.deepcopy(TABLE)
    owners = [table, table["server_list"][0], *table["server_list"][0]["device"]]
    for _ in range(data.draw(st.integers(1, 3))):
        owner = data.draw(st.sampled_from(owners))
        owner[data.draw(st.sampled_from(sorted(owner)))] = data.draw(json_values)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(table))
    read_a_table(path)


lines = st.tuples(
    st.sampled_from(["address_0", "address_1", "IPv6address_0", "netmask_0", "#", ""]),
    st.sampled_from(["=", " = ", ":", ""]),
    st.ip_addresses().map(str) | anything,
).map("".join)


@tries(500)
@given(st.binary(max_size=200) | st.lists(lines, max_size=6).map(lambda rows: "\n".join(rows).encode(errors="replace")))
def test_any_hccn_conf(tmp_path, content):
    path = tmp_path / "hccn.conf"
    path.write_bytes(content)
    answer(lambda: device_addresses([0, 1], str(path)))


@tries(500)
@given(anything | st.text("[0,8)", max_size=8) | st.ip_addresses().map(str))
def test_any_flag_of_the_hccl_tools(text):
    for read in (
        parse_range,
        parse_visible,
        lambda text: address_of(text, "it", "IPv4"),
        lambda t: address_of(t, "it"),
    ):
        answer(lambda read=read: read(text))


@pytest.fixture(scope="module")
def show():
    """DRNet's show.py as a module."""
    spec = importlib.util.spec_from_file_location("show", ROOT / "DRNet" / "show.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RESULTS = {
    "acc": 97.2,
    "images": 3,
    "mean_gmacs": 0.06,
    "resolutions": [
        {"resolution": 32, "images": 2, "gmacs": 0.08},
        {"resolution": 16, "images": 1, "gmacs": 0.03},
    ],
    "force_resolution": None,
}


@tries(500)
@given(data=st.data())
def test_any_results_for_the_picture(show, tmp_path, data):
    results = copy.deepcopy(RESULTS)
    owners = [results, *results["resolutions"]]
    for _ in range(data.draw(st.integers(0, 3))):
        owner = data.draw(st.sampled_from(owners))
        owner[data.draw(st.sampled_from(sorted(owner)))] = data.draw(json_values)
    content = json.dumps(results).encode() if data.draw(st.booleans()) else data.draw(st.binary(max_size=100))
    (tmp_path / "results.json").write_bytes(content)
    if found := answer(lambda: show.read_results(tmp_path)):
        assert "nan" not in show.compare(found, [{**found, "force_resolution": 32}])


@tries(500)
@given(
    st.binary(max_size=200)
    | st.lists(st.lists(words | st.sampled_from(["1", "32"]), max_size=5).map(",".join), max_size=5).map(
        lambda rows: "\n".join(["path,label,prediction,resolution", *rows]).encode(errors="replace")
    )
)
def test_any_predictions_for_the_picture(show, tmp_path, content):
    (tmp_path / "predictions.csv").write_bytes(content)
    for path, *_ in answer(lambda: show.read_predictions(tmp_path)) or []:
        answer(lambda path=path: show.read_image(path, 32))


@tries(500)
@given(
    labels=json_values | st.dictionaries(st.sampled_from("abc"), st.integers(-1, 9), max_size=3),
    files=st.dictionaries(st.sampled_from("abcd"), st.binary(max_size=40) | st.binary(min_size=16, max_size=16)),
)
def test_any_labels_and_logits(tmp_path, monkeypatch, capsys, labels, files):
    folder = tmp_path / "result_Files"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / f"{name}_0.bin").write_bytes(content)
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(labels))
    monkeypatch.setattr(sys, "argv", ["postprocess.py", "--result_dir", str(folder), "--label_file", str(path)])
    answer(lambda: print_accuracy(lambda k, correct, total: f"{k} {correct / total}"))
    assert "nan" not in capsys.readouterr().out


@tries(300)
@given(st.binary(max_size=200) | st.text("[]{}\"':,0123456789eE+-.\\utfalsn ", max_size=200).map(str.encode))
def test_any_bytes_as_json(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    answer(lambda: read_json(path, "make it again"))


@tries(300)
@given(
    st.binary(max_size=200)
    | st.lists(st.lists(numbers.map(str) | words, max_size=8).map(",".join), max_size=4).map(
        lambda rows: "\n".join(["epoch,step,lr,loss,grad_norm,loss_scale,overflow", *rows]).encode(errors="replace")
    )
)
def test_any_steps_of_a_training_before(request, tmp_path, content):
    _activate(ROOT / "tests" / "ddrnet" / "any")
    record = importlib.import_module("src.tools.callback").StepRecord
    (tmp_path / "steps.csv").write_bytes(content)
    answer(lambda: record(tmp_path / "new.csv", tmp_path / "resume.ckpt", 0, 1, 2))
    _activate(Path(request.path))
