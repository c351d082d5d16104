"""Merge the rank tables of single Ascend servers into one table for all of them.

    python utils/hccl_tools/merge_hccl.py hccl_8p_01234567_192.168.1.7.json hccl_8p_01234567_192.168.1.8.json

The ranks are numbered anew: in the order of the files, and within a file in the order of its own ranks.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import Parser, UserError, run
from utils.hccl_tools.hccl_tools import ipv4, rank_table, write_table

KINDS = {dict: "an object", list: "a list", str: "a string"}


def field(owner: dict, key: str, kind: type, where: str) -> dict | list | str:
    """Return `owner[key]`, which must be of the given kind and not empty; `where` names the owner in the error.

    Raises:
        UserError: the entry is missing, of another kind or empty.
    """
    if key not in owner:
        raise UserError(f"{where} is not as in a rank table: {key!r} is missing; make it with hccl_tools.py")
    if not isinstance(owner[key], kind) or not owner[key]:
        raise UserError(f"{where} is not as in a rank table: {key!r} must be {KINDS[kind]} that is not empty")
    return owner[key]


def number(device: dict, key: str, where: str) -> int:
    """Return the device number or rank under `key`, a string of digits.

    Raises:
        UserError: it is missing or no such string.
    """
    text = field(device, key, str, where)
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f'{where} is not as in a rank table: {key!r} is {text!r}, not a number such as "0"')
    return int(text)


def read_server(path: Path) -> dict:
    """Return the only server of a rank table, its devices sorted by rank.

    Raises:
        UserError: the file cannot be read, is not the rank table of a single server, or uses a device number or a
            rank twice.
    """
    try:
        table = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it with hccl_tools.py") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); make it again with hccl_tools.py") from error
    table = field({"JSON": table}, "JSON", dict, str(path))
    for key, expected in (("version", "1.0"), ("status", "completed")):
        if field(table, key, str, str(path)) != expected:
            raise UserError(f"{path} has {key} {table[key]!r}; only rank tables with {expected!r} can be merged")
    servers = field(table, "server_list", list, str(path))
    if len(servers) != 1 or field(table, "server_count", str, str(path)) != "1":
        raise UserError(f"{path} has more than one server in server_list or server_count; give single-server tables")

    server = field({"server": servers[0]}, "server", dict, str(path))
    field(server, "server_id", str, f"the server in {path}")
    devices = field(server, "device", list, f"the server in {path}")
    for position, device in enumerate(devices):
        where = f"entry {position} of 'device' in {path}"
        field({"device": device}, "device", dict, where)
        device["device_ip"] = ipv4(field(device, "device_ip", str, where), f"'device_ip' of {where}")
    for key in ("device_id", "rank_id"):
        numbers = [number(device, key, f"entry {i} of 'device' in {path}") for i, device in enumerate(devices)]
        for value in numbers:
            if numbers.count(value) > 1:
                raise UserError(f"{path} has {key} {value} twice; make it again with hccl_tools.py")
    devices.sort(key=lambda device: int(device["rank_id"]))
    return server


def main() -> None:
    """Read the flags, check the tables against each other and write the merged one."""
    parser = Parser(description="Merge rank tables of single Ascend servers into one.")
    parser.add_argument("files", metavar="FILE", nargs="*", help="two or more tables, in the order of the new ranks")
    parser.add_argument("--output_dir", default=".", help="folder for the merged table (default: the current folder)")
    args = parser.parse_args()
    if len(args.files) < 2:
        raise UserError(f"{len(args.files)} rank tables given; merging needs two or more")

    servers = []
    server_files: dict[str, str] = {}
    address_files: dict[str, str] = {}
    ranks = 0
    for file in args.files:
        server = read_server(Path(file))
        name = server["server_id"]
        if name in server_files:
            raise UserError(f"server {name} stands twice, in {server_files[name]} and {file}; give each server once")
        server_files[name] = file
        for device in server["device"]:
            address = device["device_ip"]
            if address in address_files:
                raise UserError(
                    f"device_ip {address} stands twice, in {address_files[address]} and {file}; correct one of them"
                )
            address_files[address] = file
            device["rank_id"] = str(ranks)
            ranks += 1
        servers.append(server)
    write_table(rank_table(servers), Path(args.output_dir) / f"hccl_{len(servers)}s_{ranks}p.json")


if __name__ == "__main__":
    run(main)
