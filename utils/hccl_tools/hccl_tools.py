"""Write the rank table (hccl configuration JSON) of one Ascend server.

    python utils/hccl_tools/hccl_tools.py --device_num "[0,8)"

It tells every process of a distributed job which device has which rank and which network address; `merge_hccl.py` joins
the tables of several servers into one.
"""

import ipaddress
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import Parser, UserError, read_file, run
from utils.hccl_tools.rank_table import address_of, write_table

HCCN_CONF = "/etc/hccn.conf"
SERVER_SIZE = 8
GROUP_SIZE = 4


def host_ip() -> str:
    """Return the IPv4 address of this host's own name; UserError if it has none that other servers can reach."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except (OSError, UnicodeError) as error:
        raise UserError(f"host name {name!r} has no IP address; give the address with --server_ip") from error
    if ipaddress.IPv4Address(address).is_loopback:
        raise UserError(f"host name {name!r} means the loopback address {address}; give --server_ip")
    return address_of(address, f"the address of host name {name!r}", "IPv4")


def parse_range(text: str) -> range:
    """Return the device numbers of a half-open range such as "[0,8)"; UserError if it is none, empty or reversed."""
    match = re.fullmatch(r"\s*\[\s*([0-9]{1,2})\s*,\s*([0-9]{1,2})\s*\)\s*", text)
    if not match:
        raise UserError(f'--device_num {text!r} is not a half-open range such as "[0,8)"')
    first, last = map(int, match.groups())
    if first >= last:
        fault = "is empty" if first == last else "is reversed"
        raise UserError(f'--device_num {text!r} {fault}; "[0,4)" means devices 0, 1, 2 and 3')
    return range(first, last)


def parse_visible(text: str) -> list[int]:
    """Return the device numbers of a comma list such as "4,5,6,7"; UserError if it is none or names one twice."""
    if not re.fullmatch(r"\s*[0-9]{1,2}\s*(,\s*[0-9]{1,2}\s*)*", text):
        raise UserError(f'--visible_devices {text!r} is not a comma list of device numbers such as "4,5,6,7"')
    devices = [int(part) for part in text.split(",")]
    if len(set(devices)) < len(devices):
        raise UserError(f"--visible_devices {text!r} names a device twice; name each device once")
    return devices


def check_groups(devices: list[int]) -> None:
    """Refuse, with a UserError, physical devices that cannot work together.

    An Ascend 910 server connects devices 0-3 and 4-7 as two separate groups, and wider servers continue the pattern
    (8-11 and 12-15, ...). So the devices must lie in one group of four, or be made of complete eights.
    """
    groups = {device // GROUP_SIZE for device in devices}
    eights = {device // SERVER_SIZE for device in devices}
    if len(groups) > 1 and len(devices) < len(eights) * SERVER_SIZE:
        fault = f"devices {','.join(map(str, devices))} cross the border between groups of four (0-3, 4-7, 8-11, ...)"
        raise UserError(f"{fault}; choose devices of one group, or all eight (0-7, 8-15, ...)")


def tool_address(tool: str, device: int) -> str:
    """Return the address of a physical device as the program `hccn_tool` reports it; UserError if it does not."""
    command = [tool, "-i", str(device), "-ip", "-g"]
    shown = f"{' '.join(command)} (address of device {device})"
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise UserError(f"{shown} cannot be run: {error.strerror}; repair it or give --hccn_conf") from error
    if result.returncode:
        said = (result.stderr + result.stdout).strip() or "it printed nothing"
        raise UserError(f"{shown} failed with status {result.returncode}: {said}; repair it or give --hccn_conf")
    match = re.search(r"^\s*ipaddr\s*:\s*(\S+)", result.stdout, re.MULTILINE)
    if not match:
        raise UserError(f"no address of device {device}: {shown} printed no ipaddr line; configure the device first")
    return match[1]


def conf_address(path: Path, device: int) -> str:
    """Return a physical device's address, UserError if not one, from lines such as `address_0=192.168.100.101`.

    `IPv6address_0=…` counts where there is no such line, as for Ascend's own software.
    """
    remedy = "put hccn_tool on PATH or name the file with --hccn_conf"
    text = read_file(path, remedy, f"{path} for the address of device {device}").decode(errors="replace")
    lines = rf"^[ \t]*{{}}address_{device}[ \t]*=[ \t]*(.*?)[ \t\r]*$"
    found = set(re.findall(lines.format(""), text, re.M) or re.findall(lines.format("IPv6"), text, re.M))
    if len(found) != 1:
        fault = "several addresses" if found else "no address"
        raise UserError(f"{fault} of device {device} in {path}; it must have one line address_{device}=<IP address>")
    return found.pop()


def device_addresses(devices: list[int], hccn_conf: str | None) -> list[str]:
    """Return the IP addresses of physical devices; UserError if one is missing, malformed or used twice.

    They come from the file `hccn_conf` if it is given, else from `hccn_tool` if it is on PATH, else from HCCN_CONF.
    """
    tool = shutil.which("hccn_tool") if hccn_conf is None else None
    conf = Path(HCCN_CONF if hccn_conf is None else hccn_conf)
    owners: dict[str, int] = {}
    for device in devices:
        text = tool_address(tool, device) if tool else conf_address(conf, device)
        address = address_of(text, f"the address of device {device} in {tool or conf}")
        if address in owners:
            raise UserError(f"devices {owners[address]} and {device} have the same address {address} in {tool or conf}")
        owners[address] = device
    return list(owners)


def main() -> None:
    """Read the flags and write the table."""
    parser = Parser(description="Write the rank table (hccl configuration JSON) of one Ascend server.")
    parser.add_argument("--device_num", default="[0,8)", help='half-open range of device numbers (default: "[0,8)")')
    what = 'physical devices behind device numbers 0, 1, 2, ..., such as "4,5,6,7" (default: each number is itself)'
    parser.add_argument("--visible_devices", help=what)
    parser.add_argument("--server_ip", help="IPv4 address of this server (default: that of the host name)")
    what = f"file with the device addresses (default: ask hccn_tool if on PATH, else {HCCN_CONF})"
    parser.add_argument("--hccn_conf", help=what)
    parser.add_argument("--output_dir", default=".", help="folder for the table (default: the current folder)")
    args = parser.parse_args()

    chosen = parse_range(args.device_num)
    everything = list(range(max(SERVER_SIZE, chosen.stop)))
    visible = everything if args.visible_devices is None else parse_visible(args.visible_devices)
    if chosen.stop > len(visible):
        fault = f"--device_num {args.device_num!r} goes beyond the {len(visible)} visible devices"
        raise UserError(f'{fault} "{args.visible_devices}"; the largest range is "[0,{len(visible)})"')
    devices = [visible[number] for number in chosen]
    check_groups(devices)
    server_ip = host_ip() if args.server_ip is None else address_of(args.server_ip, "--server_ip", "IPv4")
    addresses = device_addresses(devices, args.hccn_conf)
    entries = [
        {"device_id": str(device), "device_ip": address, "rank_id": str(rank)}
        for rank, (device, address) in enumerate(zip(devices, addresses, strict=True))
    ]
    # One digit each needs no separator; with two-digit numbers "8-9-10-11" stays readable in one way only.
    separator = "-" if max(devices) > 9 else ""
    name = f"hccl_{len(devices)}p_{separator.join(map(str, devices))}_{server_ip}.json"
    server = {"server_id": server_ip, "device": entries, "host_nic_ip": "reserve"}
    write_table([server], Path(args.output_dir) / name)


if __name__ == "__main__":
    run(main)
