"""Rank tables (hccl configuration JSON): reading and checking them, for one or several servers, and writing them."""

import ipaddress
import json
import os
import re
from collections import Counter
from pathlib import Path

from utils.cli import UserError, read_json, whole_file

KINDS = {dict: "an object", list: "a list", str: "a string"}
AGAIN = "make it again with utils/hccl_tools/hccl_tools.py"


def address_of(text: str, what: str, kinds: str = "IPv4 or IPv6") -> str:
    """Return `text` if it is an address of one machine, else raise UserError; `what` names it in the error."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        address = None
    if address is None or f"IPv{address.version}" not in kinds or "%" in text:
        raise UserError(f"{what} is {text[:60]!r}, not an {kinds} address such as 192.168.1.7")
    if address.is_unspecified or address.is_multicast:
        raise UserError(f"{what} is {text}, which is not the address of one machine")
    return str(address)


def _field(owner: dict, key: str, kind: type, where: str) -> dict | list | str:
    """Return `owner[key]`, of the given kind and not empty, else raise UserError; `where` names the owner in it."""
    if key not in owner:
        raise UserError(f"{where} is not as in a rank table: {key!r} is missing; {AGAIN}")
    if not isinstance(owner[key], kind) or not owner[key]:
        raise UserError(f"{where} is not as in a rank table: {key!r} must be {KINDS[kind]} that is not empty; {AGAIN}")
    return owner[key]


def _unique(owners: list[dict], what: str, path: str | Path) -> None:
    """Raise UserError if a value of the entry `what` stands twice."""
    if twice := [value for value, count in Counter(owner[what] for owner in owners).items() if count > 1]:
        raise UserError(f"{path} has {what} {twice[0]} twice; {AGAIN}")


def read_table(path: str | Path, addressed: bool = False) -> list[dict]:
    """Return the servers of a rank table in the order of their ranks, the devices of each in that order, too.

    UserError if the file cannot be read or is no complete rank table of version 1.0: an entry is missing or of another
    form, something stands twice, or the ranks are not 0, 1, 2, ..., server by server. The devices of a single server
    need no address, unless they are to be `addressed`.
    """
    table = read_json(path, AGAIN, f"the rank table {path}")
    _field({"JSON": table}, "JSON", dict, str(path))
    for key, expected in (("version", "1.0"), ("status", "completed")):
        if _field(table, key, str, str(path)) != expected:
            raise UserError(f"the rank table {path} has {key} {table[key]!r}, not {expected!r}; {AGAIN}")
    servers = _field(table, "server_list", list, str(path))
    if (count := _field(table, "server_count", str, str(path))) != str(len(servers)):
        raise UserError(f"{path} has server_count {count!r} for {len(servers)}; merge its single-server tables again")
    for position, server in enumerate(servers):
        where = f"server {position} in {path}"
        _field({"server": server}, "server", dict, where)
        _field(server, "server_id", str, where)
        for number, device in enumerate(_field(server, "device", list, where)):
            where = f"entry {number} of 'device' of server {position} in {path}"
            _field({"device": device}, "device", dict, where)
            if addressed or len(servers) > 1 or device.get("device_ip"):
                text = _field(device, "device_ip", str, where)
                device["device_ip"] = address_of(text, f"'device_ip' of {where}")
            for key in ("device_id", "rank_id"):
                if not re.fullmatch("0|[1-9][0-9]{0,8}", _field(device, key, str, where)):
                    raise UserError(f'{where} has {key!r} {device[key]!r}, not a number such as "0"; {AGAIN}')
        _unique(server["device"], "device_id", path)
        server["device"].sort(key=lambda device: int(device["rank_id"]))
    servers.sort(key=lambda server: int(server["device"][0]["rank_id"]))
    devices = [device for server in servers for device in server["device"]]
    with_address = [device for device in devices if device.get("device_ip")]
    for owners, key in ((servers, "server_id"), (with_address, "device_ip"), (devices, "rank_id")):
        _unique(owners, key, path)
    ranks = [device["rank_id"] for device in devices]
    if ranks != [str(rank) for rank in range(len(ranks))]:
        raise UserError(f"{path} lists the ranks {', '.join(ranks)}, not 0 to {len(ranks) - 1} in turn; {AGAIN}")
    return servers


def devices_of(path: str | Path, devices: int, servers: int = 1, server: int = 0) -> list[int]:
    """Return the devices of one of `servers` servers with `devices` each; UserError if the table is of others."""
    table = read_table(path)
    if len(table) != servers:
        raise UserError(f"{path} lists {len(table)} servers for {servers}; set --server_num, or use another table")
    for name, found in ((one["server_id"], len(one["device"])) for one in table):
        if found != devices:
            raise UserError(f"{path} lists {found} devices for {devices}; set --device_num {found}, or correct {name}")
    return [int(device["device_id"]) for device in table[server]["device"]]


def variables_for(path: str | Path | None, devices: int, servers: int = 1, server: int = 0) -> dict[str, str]:
    """Return the environment in which a worker with DEVICE_ID n uses its server's n-th device in the table, if any.

    UserError as `devices_of`, or if ASCEND_RT_VISIBLE_DEVICES is set to other devices.
    """
    if path is None:
        return {}
    listed = devices_of(path, devices, servers, server)
    wanted, now = ",".join(map(str, listed)), os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "").replace(" ", "")
    if now and now.split(",")[:devices] != wanted.split(","):
        raise UserError(f"ASCEND_RT_VISIBLE_DEVICES is {now}, but {path} lists the devices {wanted}; unset it")
    own = {} if now or listed == list(range(devices)) else {"ASCEND_RT_VISIBLE_DEVICES": wanted}
    return {"RANK_TABLE_FILE": str(Path(path).resolve()), **own}


def write_table(servers: list[dict], path: Path) -> None:
    """Write the rank table of these servers, whole or not at all, and say where; UserError if it cannot be written."""
    table = {"version": "1.0", "server_count": str(len(servers)), "server_list": servers, "status": "completed"}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(table, indent=4) + "\n", encoding="utf-8")
    print(f"wrote {path}")
