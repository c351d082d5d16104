"""Choice of the device to run on, and the devices that share a run."""

import argparse
from collections.abc import Sequence

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Tensor, ops
from mindspore.communication import get_group_size, get_rank, init

from utils.cli import UserError
from utils.config import DEVICES
from utils.launcher import is_worker


class SumOverDevices(nn.Cell):
    """Sum over the devices of a float32 tensor."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.reduce = ops.AllReduce()

    def construct(self, x: Tensor) -> Tensor:
        return self.reduce(x)


class Devices:
    """The devices that share a run: `count` of the kind `target`, such as "CPU"; this process has number `rank`."""

    def __init__(self, target: str = "CPU", rank: int = 0, count: int = 1):
        self.target, self.rank, self.count = target, rank, count
        self._sum = SumOverDevices() if count > 1 else None

    def sum(self, numbers: Sequence[float] | np.ndarray) -> np.ndarray:
        """Each of `numbers` summed over all devices, float32 of the same shape."""
        numbers = np.asarray(numbers, np.float32)
        return numbers if self._sum is None else self._sum(Tensor(numbers)).asnumpy()

    def any(self, asked: bool) -> bool:
        """Whether it is so on some device."""
        return bool(self.sum([asked])[0])

    def say(self, *parts: object, **options) -> None:
        """Print, on the first device."""
        if self.rank == 0:
            print(*parts, **options)

    def __str__(self) -> str:
        return f"{self.target} x {self.count}"


ONE_DEVICE = Devices()


def join_devices(args: argparse.Namespace) -> Devices:
    """Take this process's device, as `set_device`, and join the other processes of the run if there are any."""
    if not is_worker():
        return Devices(set_device(args.device_target, args.device_id))
    target = set_device(args.device_target)
    init()
    return Devices(target, get_rank(), get_group_size())


def chosen(device_target: str) -> str:
    """The device that `device_target` means: of "auto" Ascend, else GPU, else CPU; UserError if it is not there."""
    available = [name for name in DEVICES[1:] if ms.hal.is_available(name)]
    if device_target == "auto":
        return next(name for name in ("Ascend", "GPU", "CPU") if name in available)
    if device_target not in available:
        fault = f"no {device_target} that MindSpore can use on this machine (there is {', '.join(available)})"
        raise UserError(f"{fault}; install its driver and runtime, or choose another --device_target")
    return device_target


def set_device(device_target: str, device_id: int | None = None) -> str:
    """Make the device `chosen` MindSpore's, in graph mode, and return its name; UserError if it is not there.

    Without `device_id` MindSpore gives each process of a run its own device.
    """
    device_target = chosen(device_target)
    if device_target == "CPU" or device_id is None:
        ms.set_device(device_target)
    else:
        count = ms.hal.device_count(device_target)
        if not 0 <= device_id < count:
            raise UserError(f"{device_target} {device_id} is not there; --device_id can be 0 to {count - 1}")
        ms.set_device(device_target, device_id)
    ms.set_context(mode=ms.GRAPH_MODE)
    return device_target
