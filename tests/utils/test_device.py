"""Device choice in fresh processes, since the framework takes its device and reads its environment once."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

VARIABLES = ("GLOG_v", "ONEDNN_MAX_CPU_ISA")


def call(code: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


CHOOSE = """
from utils.cli import run
from utils.device import set_device
import mindspore as ms
def main():
    name = set_device({arguments})
    there = [device for device in ("Ascend", "GPU", "CPU") if ms.hal.is_available(device)]
    total = ms.ops.ReduceSum()(ms.Tensor([1.0, 2.0]))
    print(name, ms.get_context("device_target"), ms.get_context("mode") == ms.GRAPH_MODE, float(total), *there)
run(main)
"""


def test_auto_takes_the_best_that_is_there():
    result = call(CHOOSE.format(arguments="'auto'"))
    name, used, graph_mode, total, *there = result.stdout.split()
    assert name == used == there[0] and (graph_mode, total) == ("True", "3.0")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("arguments", ["'CPU'", "'CPU', 0", "'CPU', 5"])
def test_cpu_whatever_the_number(arguments):
    result = call(CHOOSE.format(arguments=arguments))
    assert result.stdout.startswith("CPU CPU True 3.0") and (result.returncode, result.stderr) == (0, "")


def test_devices_that_are_not_there():
    """One process tries all, to save time: every name that is no device here, and device numbers out of range."""
    result = call(
        """
from utils.cli import UserError
from utils.device import set_device
import mindspore as ms
for device in ("Ascend", "GPU", "TPU"):
    numbers = (None, 0, 3)
    if device != "TPU" and ms.hal.is_available(device):
        numbers = (-1, ms.hal.device_count(device))
    for number in numbers:
        try:
            print("taken", set_device(device, number))
        except UserError as error:
            print(device, error)
"""
    )
    lines = result.stdout.splitlines()
    assert (result.returncode, result.stderr) == (0, "") and 7 <= len(lines) <= 9
    for line in lines:
        device, message = line.split(" ", 1)
        assert device in message and "--device_" in message and "taken" not in line


def test_refusal_is_one_line():
    result = call(CHOOSE.format(arguments="'TPU'"))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: no TPU that MindSpore can use on this machine (there is ")
    assert result.stderr.count("\n") == 1


def test_importing_utils_sets_the_environment_unless_the_user_has():
    show = f"import os, utils; print(*map(os.environ.get, {VARIABLES}))"
    assert call(show).stdout == "3 AVX2\n"
    assert call(show, GLOG_v="1", ONEDNN_MAX_CPU_ISA="DEFAULT").stdout == "1 DEFAULT\n"
    assert call("import sys, utils; print('mindspore' in sys.modules)").stdout == "False\n"
