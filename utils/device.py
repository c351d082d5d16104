"""Choice of the device to run on."""

import mindspore as ms

from utils.cli import UserError

DEVICES = ("auto", "CPU", "GPU", "Ascend")


def set_device(device_target: str, device_id: int | None = None) -> str:
    """Make `device_target` MindSpore's device, in graph mode; "auto" takes Ascend, else GPU, else CPU.

    Args:
        device_id: number of the device; None leaves it to MindSpore, which gives each worker its own.

    Returns:
        The name of the device taken.

    Raises:
        UserError: the device is not there.
    """
    available = [name for name in DEVICES[1:] if ms.hal.is_available(name)]
    if device_target == "auto":
        device_target = next(name for name in ("Ascend", "GPU", "CPU") if name in available)
    elif device_target not in available:
        raise UserError(
            f"no {device_target} that MindSpore can use on this machine (there is {', '.join(available)}); install its "
            "driver and runtime, or choose another --device_target"
        )
    if device_target == "CPU" or device_id is None:
        ms.set_device(device_target)
    else:
        count = ms.hal.device_count(device_target)
        if not 0 <= device_id < count:
            raise UserError(f"{device_target} {device_id} is not there; --device_id can be 0 to {count - 1}")
        ms.set_device(device_target, device_id)
    ms.set_context(mode=ms.GRAPH_MODE)
    return device_target
