"""The hccl tools, run as a user runs them: subprocesses, real files, a shell script in the place of hccn_tool."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from utils.cli import UserError
from utils.hccl_tools.rank_table import devices_of, read_table

FOLDER = ROOT / "utils" / "hccl_tools"
IP = "192.168.1.7"


@pytest.fixture
def env(tmp_path):
    """An environment whose PATH holds nothing but the (at first empty) folder bin."""
    (tmp_path / "bin").mkdir()
    return {"PATH": str(tmp_path / "bin"), "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def out(tmp_path):
    """The current folder of the commands."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def conf(tmp_path):
    """An hccn.conf of sixteen devices."""
    path = tmp_path / "hccn.conf"
    lines = [f"address_{n}=192.168.100.{100 + n}\nnetmask_{n}=255.255.255.0\n" for n in range(16)]
    path.write_text("# a comment\n" + "".join(lines))
    return path


@pytest.fixture
def hccl(env, out):
    """Run one of the two scripts in the folder `out`."""

    def call(script, *args):
        command = [sys.executable, str(FOLDER / f"{script}.py"), *map(str, args)]
        return subprocess.run(command, cwd=out, env=env, capture_output=True, text=True)

    return call


@pytest.fixture
def refuse(hccl, out):
    """Run a script that must fail: status 2, one line that holds all `words`, nothing written."""

    def call(words, script, *args):
        before = sorted(out.rglob("*"))
        result = hccl(script, *args)
        assert (result.returncode, result.stdout) == (2, ""), result
        assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
        assert [word for word in words if word not in result.stderr] == [], result.stderr
        assert sorted(out.rglob("*")) == before
        return result.stderr

    return call


def tool(env, body):
    """Put a shell script named hccn_tool on PATH."""
    path = Path(env["PATH"]) / "hccn_tool"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def table(ip, devices, first_rank=0):
    """A rank table written out by hand for (device, address) pairs."""
    return {
        "version": "1.0",
        "server_count": "1",
        "server_list": [
            {
                "server_id": ip,
                "device": [
                    {"device_id": str(device), "device_ip": address, "rank_id": str(rank)}
                    for rank, (device, address) in enumerate(devices, first_rank)
                ],
                "host_nic_ip": "reserve",
            }
        ],
        "status": "completed",
    }


def written(result, out, name):
    """The JSON that a successful run wrote as its only file."""
    assert (result.returncode, result.stderr, result.stdout) == (0, "", f"wrote {name}\n"), result
    assert [path.name for path in out.iterdir()] == [name]
    return json.loads((out / name).read_text())


def test_one_device_literally(hccl, out, conf):
    args = ["--device_num", "[6,7)", "--server_ip", IP, "--hccn_conf", conf]
    assert written(hccl("hccl_tools", *args), out, "hccl_1p_6_192.168.1.7.json") == {
        "version": "1.0",
        "server_count": "1",
        "server_list": [
            {
                "server_id": "192.168.1.7",
                "device": [{"device_id": "6", "device_ip": "192.168.100.106", "rank_id": "0"}],
                "host_nic_ip": "reserve",
            }
        ],
        "status": "completed",
    }


@pytest.mark.parametrize(
    ("flags", "devices", "name"),
    [
        ([], range(8), "8p_01234567"),
        (["--device_num", " [ 0 , 8 ) "], range(8), "8p_01234567"),
        (["--device_num", "[4,8)"], [4, 5, 6, 7], "4p_4567"),
        (["--device_num", "[0,4)", "--visible_devices", "4,5,6,7"], [4, 5, 6, 7], "4p_4567"),
        (["--device_num", "[1,3)", "--visible_devices", "3, 2, 1, 0"], [2, 1], "2p_21"),
        (["--visible_devices", "7,6,5,4,3,2,1,0"], [7, 6, 5, 4, 3, 2, 1, 0], "8p_76543210"),
        (["--device_num", "[8,12)"], [8, 9, 10, 11], "4p_8-9-10-11"),
        (["--device_num", "[8,10)"], [8, 9], "2p_89"),
        (["--device_num", "[8,16)"], range(8, 16), "8p_8-9-10-11-12-13-14-15"),
        (["--device_num", "[0,16)"], range(16), "16p_0-1-2-3-4-5-6-7-8-9-10-11-12-13-14-15"),
    ],
)
def test_ranges(hccl, out, conf, flags, devices, name):
    result = hccl("hccl_tools", *flags, "--server_ip", IP, "--hccn_conf", conf)
    expected = table(IP, [(device, f"192.168.100.{100 + device}") for device in devices])
    assert written(result, out, f"hccl_{name}_{IP}.json") == expected


def test_output_dir_and_replacement(hccl, out, conf):
    args = ["--server_ip", IP, "--hccn_conf", conf, "--output_dir", "new folder/deep"]
    path = out / "new folder" / "deep" / f"hccl_8p_01234567_{IP}.json"
    for _ in range(2):
        assert hccl("hccl_tools", *args).stdout == f"wrote {path.relative_to(out)}\n"
        assert list(path.parent.iterdir()) == [path]
        path.write_text(path.read_text() + "old")
    hccl("hccl_tools", *args)
    assert json.loads(path.read_text())["server_count"] == "1"


def test_help_names_every_flag(hccl):
    result = hccl("hccl_tools", "--help")
    assert result.returncode == 0
    for word in ("--device_num", "--visible_devices", "--server_ip", "--hccn_conf", "--output_dir", "/etc/hccn.conf"):
        assert word in result.stdout


def test_hccn_tool(hccl, out, env, conf):
    tool(env, '[ "$1 $3 $4" = "-i -ip -g" ] && echo "ipaddr:10.20.30.4$2" && echo "netmask:255.255.255.0"')
    result = hccl("hccl_tools", "--device_num", "[5,7)", "--server_ip", IP)
    expected = table(IP, [(5, "10.20.30.45"), (6, "10.20.30.46")])
    assert written(result, out, f"hccl_2p_56_{IP}.json") == expected
    result = hccl("hccl_tools", "--device_num", "[5,7)", "--server_ip", IP, "--hccn_conf", conf)
    expected = table(IP, [(5, "192.168.100.105"), (6, "192.168.100.106")])
    assert written(result, out, f"hccl_2p_56_{IP}.json") == expected, "a file that is asked for comes first"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("echo 'dsmi is down\nfor now' >&2; exit 3", ["failed with status 3", "dsmi is down for now", "device 4"]),
        ("exit 1", ["failed with status 1", "printed nothing"]),
        ("echo netmask:255.255.255.0", ["no address of device 4", "no ipaddr line"]),
        ("echo ipaddr:10.20.30", ["device 4", "hccn_tool", "'10.20.30'"]),
        ("echo ipaddr:0.0.0.0", ["device 4", "0.0.0.0"]),
        ("echo ipaddr:10.20.30.4", ["devices 4 and 5", "10.20.30.4"]),
    ],
)
def test_hccn_tool_fails(refuse, env, body, words):
    tool(env, body)
    refuse(["hccn_tool", *words], "hccl_tools", "--device_num", "[4,8)", "--server_ip", IP)


def test_hccn_tool_cannot_run(refuse, env):
    tool(env, "").write_text("#!/no/such/shell\n")
    refuse(["hccn_tool", "device 0", "cannot be run"], "hccl_tools", "--server_ip", IP)


@pytest.mark.parametrize(
    "text", ["8", "0,8", "[0,8]", "(0,8)", "[0,8", "[a,b)", "[-1,4)", "[0,1.5)", "[0,100)", "", "-1"]
)
def test_malformed_range(refuse, conf, text):
    args = [f"--device_num={text}", "--server_ip", IP, "--hccn_conf", conf]
    refuse(["--device_num", repr(text), "half-open"], "hccl_tools", *args)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device_num", "[3,3)"], ["[3,3)", "is empty"]),
        (["--device_num", "[4,0)"], ["[4,0)", "is reversed"]),
        (["--device_num", "[0,3)", "--visible_devices", "0,1"], ["[0,3)", "beyond the 2 visible devices", "[0,2)"]),
        (["--visible_devices", "4,5,6,7"], ["[0,8)", "beyond the 4 visible devices"]),
        (["--visible_devices", ""], ["--visible_devices", "''"]),
        (["--visible_devices", "0,1,"], ["--visible_devices", "'0,1,'"]),
        (["--visible_devices", "0;1"], ["--visible_devices", "'0;1'"]),
        (["--visible_devices", "0,one"], ["--visible_devices", "'0,one'"]),
        (["--visible_devices", "0,1,01"], ["--visible_devices", "'0,1,01'", "twice"]),
        (["--server_ip", "192.168.1"], ["--server_ip", "'192.168.1'"]),
        (["--server_ip", "192.168.1.256"], ["--server_ip", "192.168.1.256"]),
        (["--server_ip", "fe80::1"], ["--server_ip", "fe80::1"]),
        (["--server_ip", ""], ["--server_ip", "''"]),
        (["--server_ip", "0.0.0.0"], ["--server_ip", "0.0.0.0"]),
        (["--server_ip", "224.0.0.1"], ["--server_ip", "224.0.0.1"]),
        (["--output_dir", __file__], [__file__]),
        (["--devices", "8"], ["--devices"]),
        (["--hccn_conf"], ["--hccn_conf"]),
    ],
)
def test_bad_flags(refuse, conf, flags, words):
    refuse(words, "hccl_tools", "--server_ip", IP, "--hccn_conf", conf, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--device_num", "[2,6)"],
        ["--device_num", "[0,7)"],
        ["--device_num", "[3,5)"],
        ["--device_num", "[0,2)", "--visible_devices", "0,4"],
        ["--device_num", "[6,10)"],
        ["--device_num", "[0,12)"],
        ["--device_num", "[4,12)"],
    ],
)
def test_groups_of_four(refuse, conf, flags):
    refuse(["groups of four"], "hccl_tools", "--server_ip", IP, "--hccn_conf", conf, *flags)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("address_0=10.0.0.1\n#address_1=10.0.0.2\naddress_10=10.0.0.3\n", ["no address of device 1"]),
        ("address_0=10.0.0.1\naddress_1=10.0.0\n", ["address of device 1", "'10.0.0'"]),
        ("address_0=10.0.0.1\naddress_1=\n", ["address of device 1", "''"]),
        ("address_0=10.0.0.1\naddress_1=10.0.0.2\naddress_1=10.0.0.3\n", ["several addresses of device 1"]),
        ("address_0=10.0.0.1\naddress_1=10.0.0.1\n", ["devices 0 and 1", "10.0.0.1"]),
        ("", ["no address of device 0"]),
        (None, ["address of device 0", "No such file"]),
    ],
)
def test_bad_conf(refuse, conf, text, words):
    conf.unlink()
    if text is not None:
        conf.write_text(text)
    args = ["--device_num", "[0,2)", "--server_ip", IP, "--hccn_conf", conf]
    refuse([str(conf), *words], "hccl_tools", *args)


@pytest.mark.skipif(Path("/etc/hccn.conf").exists(), reason="this machine has an /etc/hccn.conf")
def test_no_source_of_addresses(refuse):
    refuse(["device 0", "/etc/hccn.conf", "hccn_tool"], "hccl_tools", "--server_ip", IP)


def rename_host(env, tmp_path, name):
    """Give the interpreter that runs the script another host name; it is still resolved by the system."""
    (tmp_path / "sitecustomize.py").write_text(f"import socket\nsocket.gethostname = lambda: {name!r}\n")
    env["PYTHONPATH"] = str(tmp_path)


def test_own_address(hccl, out, env, conf, tmp_path):
    rename_host(env, tmp_path, "10.1.2.3")
    result = hccl("hccl_tools", "--device_num", "[0,1)", "--hccn_conf", conf)
    assert written(result, out, "hccl_1p_0_10.1.2.3.json") == table("10.1.2.3", [(0, "192.168.100.100")])


@pytest.mark.parametrize("name", ["localhost", "127.0.1.1", "no such host", "a..b", "x" * 64, "0.0.0.0"])
def test_no_own_address(refuse, env, conf, tmp_path, name):
    rename_host(env, tmp_path, name)
    refuse(["host name", repr(name)], "hccl_tools", "--hccn_conf", conf)


@pytest.fixture
def tables(tmp_path):
    """Two tables as files; `change` may alter their content first."""

    def write(change=lambda a, b: None):
        a = table("192.168.1.7", [(0, "10.0.0.1"), (1, "10.0.0.2")])
        b = table("192.168.1.8", [(4, "10.0.0.5")])
        change(a, b)
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, content in zip(paths, (a, b), strict=True):
            path.write_text(json.dumps(content))
        return paths

    return write


def test_merge_literally(hccl, out, tables):
    a, b = tables()
    assert written(hccl("merge_hccl", b, a), out, "hccl_2s_3p.json") == {
        "version": "1.0",
        "server_count": "2",
        "server_list": [
            {
                "server_id": "192.168.1.8",
                "device": [{"device_id": "4", "device_ip": "10.0.0.5", "rank_id": "0"}],
                "host_nic_ip": "reserve",
            },
            {
                "server_id": "192.168.1.7",
                "device": [
                    {"device_id": "0", "device_ip": "10.0.0.1", "rank_id": "1"},
                    {"device_id": "1", "device_ip": "10.0.0.2", "rank_id": "2"},
                ],
                "host_nic_ip": "reserve",
            },
        ],
        "status": "completed",
    }


def test_merge_keeps_the_order_of_ranks_in_a_file(hccl, out, tables):
    a, b = tables(lambda a, b: a["server_list"][0]["device"].reverse())
    merged = written(hccl("merge_hccl", a, b), out, "hccl_2s_3p.json")
    devices = [(d["device_id"], d["rank_id"]) for server in merged["server_list"] for d in server["device"]]
    assert devices == [("0", "0"), ("1", "1"), ("4", "2")]


def test_generate_and_merge_three_servers(hccl, out, tmp_path):
    names, servers = [], []
    for n in (1, 2, 3):
        conf = tmp_path / f"hccn{n}.conf"
        conf.write_text("".join(f"address_{d}=10.0.{n}.{d}\n" for d in range(8)))
        ip = f"192.168.1.{n}"
        assert hccl("hccl_tools", "--server_ip", ip, "--hccn_conf", conf).returncode == 0
        names.append(f"hccl_8p_01234567_{ip}.json")
        servers += table(ip, [(d, f"10.0.{n}.{d}") for d in range(8)], first_rank=8 * (n - 1))["server_list"]
    result = hccl("merge_hccl", *names, "--output_dir", "merged")
    assert result.stdout == f"wrote {os.path.join('merged', 'hccl_3s_24p.json')}\n"
    merged = json.loads((out / "merged" / "hccl_3s_24p.json").read_text())
    assert merged == {"version": "1.0", "server_count": "3", "server_list": servers, "status": "completed"}
    path = out / "merged" / "hccl_3s_24p.json"  # ranks from 10 on are numbers, not text
    assert [devices_of(path, 8, 3, server) for server in range(3)] == 3 * [list(range(8))]


def device(content, **entries):
    """Change the last device of a table."""
    content["server_list"][0]["device"][-1].update(entries)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, b: b.pop("version"), ["b.json", "'version' is missing"]),
        (lambda a, b: b.pop("server_count"), ["b.json", "'server_count' is missing"]),
        (lambda a, b: b.pop("server_list"), ["b.json", "'server_list' is missing"]),
        (lambda a, b: b.pop("status"), ["b.json", "'status' is missing"]),
        (lambda a, b: b["server_list"][0].pop("server_id"), ["b.json", "'server_id' is missing"]),
        (lambda a, b: b["server_list"][0].pop("device"), ["b.json", "'device' is missing"]),
        (lambda a, b: b["server_list"][0]["device"][0].pop("device_id"), ["b.json", "'device_id' is missing"]),
        (lambda a, b: b["server_list"][0]["device"][0].pop("device_ip"), ["b.json", "'device_ip' is missing"]),
        (lambda a, b: b["server_list"][0]["device"][0].pop("rank_id"), ["b.json", "'rank_id' is missing"]),
        (lambda a, b: b.update(version="1.2"), ["b.json", "version '1.2'"]),
        (lambda a, b: b.update(status="initializing"), ["b.json", "status 'initializing'"]),
        (lambda a, b: b.update(server_list={}), ["b.json", "'server_list' must be a list"]),
        (lambda a, b: b.update(server_list=[]), ["b.json", "'server_list' must be a list"]),
        (lambda a, b: b.update(server_list=["x"]), ["b.json", "'server' must be an object"]),
        (
            lambda a, b: b.update(server_list=b["server_list"] * 2),
            ["b.json", "server_count '1' for 2", "single-server"],
        ),
        (lambda a, b: b.update(server_count="2"), ["b.json", "server_count '2' for 1", "single-server"]),
        (lambda a, b: b.update(server_count=1), ["b.json", "'server_count' must be a string"]),
        (lambda a, b: b["server_list"][0].update(device=[3]), ["b.json", "'device' must be an object"]),
        (lambda a, b: device(b, device_id=4), ["b.json", "'device_id' must be a string"]),
        (lambda a, b: device(b, device_id="four"), ["b.json", "'device_id'", "'four'"]),
        (lambda a, b: device(b, rank_id="-1"), ["b.json", "'rank_id'", "'-1'"]),
        (lambda a, b: device(b, device_ip="10.0.0"), ["b.json", "'device_ip'", "'10.0.0'"]),
        (lambda a, b: device(b, rank_id="1"), ["b.json", "lists the ranks 1, not 0 to 0"]),
        (lambda a, b: device(b, rank_id="00"), ["b.json", "'rank_id'", "'00'"]),
        (lambda a, b: device(a, device_id="0"), ["a.json", "device_id 0 twice"]),
        (lambda a, b: device(a, rank_id="0"), ["a.json", "rank_id 0 twice"]),
        (lambda a, b: device(a, device_ip="10.0.0.1"), ["a.json", "10.0.0.1", "twice"]),
        (lambda a, b: device(b, device_ip="10.0.0.1"), ["a.json", "b.json", "10.0.0.1", "twice"]),
        (lambda a, b: b["server_list"][0].update(server_id="192.168.1.7"), ["a.json", "b.json", "192.168.1.7"]),
    ],
)
def test_tables_that_cannot_be_merged(refuse, tables, change, words):
    refuse(words, "merge_hccl", *tables(change))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["not valid JSON"]),
        (b'{"version": "1.0",', ["not valid JSON"]),
        (b"\xff\xfe\xfa", ["not valid JSON"]),
        (b"[" * 100_000, ["not valid JSON"]),
        (b"[1]", ["must be an object"]),
        (b"{}", ["must be an object"]),
        (b"null", ["must be an object"]),
        (b'{"name": "x"}', ["'version' is missing"]),
        (None, ["No such file"]),
    ],
)
def test_files_that_are_no_tables(refuse, tables, content, words):
    a, b = tables()
    b.unlink()
    if content is not None:
        b.write_bytes(content)
    refuse(["b.json", *words], "merge_hccl", a, b)


def test_merge_needs_two_different_files(refuse, tables, tmp_path):
    a, b = tables()
    refuse(["two or more"], "merge_hccl")
    refuse(["two or more"], "merge_hccl", a)
    refuse(["192.168.1.7", "twice"], "merge_hccl", a, a)
    refuse([str(tmp_path)], "merge_hccl", a, tmp_path)
    refuse(["cannot write"], "merge_hccl", a, b, "--output_dir", a)
    refuse(["--force"], "merge_hccl", a, b, "--force")


def test_merged_tables_are_not_merged_again(hccl, refuse, tables, out, tmp_path):
    a, b = tables()
    merged = json.dumps(written(hccl("merge_hccl", a, b), out, "hccl_2s_3p.json"))
    (tmp_path / "merged.json").write_text(merged)
    refuse(["merged.json has 2 servers", "single-server"], "merge_hccl", tmp_path / "merged.json", b)


def merged_table(tmp_path, change=lambda servers: None):
    """A table of two servers written out by hand, as a file."""
    servers = [
        table("192.168.1.7", [(0, "10.0.0.1"), (1, "10.0.0.2")])["server_list"][0],
        table("192.168.1.8", [(5, "10.0.0.5"), (4, "10.0.0.6")], first_rank=2)["server_list"][0],
    ]
    change(servers)
    whole = table("", []) | {"server_count": "2", "server_list": servers}
    (tmp_path / "merged.json").write_text(json.dumps(whole))
    return tmp_path / "merged.json"


def test_devices_of_a_server(tmp_path):
    path = merged_table(tmp_path, lambda servers: [servers.reverse(), servers[0]["device"].reverse()])
    assert [devices_of(path, 2, 2, server) for server in (0, 1)] == [[0, 1], [5, 4]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda servers: servers[1].update(server_id="192.168.1.7"), "server_id 192.168.1.7 twice"),
        (lambda servers: servers[1]["device"][0].update(device_ip="10.0.0.1"), "device_ip 10.0.0.1 twice"),
        (lambda servers: servers[1]["device"][0].update(device_id="4"), "device_id 4 twice"),
        (lambda servers: servers[1]["device"][0].update(rank_id="1"), "rank_id 1 twice"),
        (lambda servers: servers[1]["device"][0].update(rank_id="4"), "lists the ranks 0, 1, 3, 4, not 0 to 3 in turn"),
        (
            lambda servers: [servers[n]["device"][i].update(rank_id=r) for n, i, r in ((0, 1, "2"), (1, 0, "1"))],
            "lists the ranks 0, 2, 1, 3, not 0 to 3 in turn",
        ),
        (lambda servers: servers[1]["device"][1].pop("device_ip"), "entry 1 of 'device' of server 1 in .* is missing"),
    ],
)
def test_tables_of_two_servers_that_are_wrong(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        read_table(merged_table(tmp_path, change))


@pytest.mark.parametrize("absent", [{}, {"device_ip": ""}])
def test_one_server_needs_no_addresses_and_several_do(refuse, tables, absent):
    """Table 1 of Ascend's description for A2: device_ip is IPv4 or IPv6, and must be there with several servers."""

    def change(a, b):
        del a["server_list"][0]["device"][1]["device_ip"]
        device(a, **absent)

    a, b = tables(change)
    assert devices_of(a, 2) == [0, 1]
    refuse(["a.json", "'device_ip'"], "merge_hccl", a, b)


def test_ipv6(hccl, refuse, out, conf, tables):
    """The name of the line is that of Ascend's own software, which prefers IPv4, too."""
    conf.write_text("IPv6address_0=121::101\r\nIPv6netmask_0=112\nIPv6address_1=121::102\naddress_1=10.0.0.2\n")
    args = ["--device_num", "[0,2)", "--server_ip", IP, "--hccn_conf", conf]
    expected = table(IP, [(0, "121::101"), (1, "10.0.0.2")])
    assert written(hccl("hccl_tools", *args), out, f"hccl_2p_01_{IP}.json") == expected
    a, b = tables(lambda a, b: (device(a, device_ip="121:0::102"), device(b, device_ip="121::102")))
    assert read_table(a)[0]["device"][1]["device_ip"] == "121::102"
    refuse(["a.json", "b.json", "121::102", "twice"], "merge_hccl", a, b)
    refuse(["b.json", "'fe80::1%eth0'"], "merge_hccl", *tables(lambda a, b: device(b, device_ip="fe80::1%eth0")))


def test_name_taken_by_a_folder(refuse, out, tables):
    (out / "hccl_2s_3p.json").mkdir()
    refuse(["cannot write hccl_2s_3p.json"], "merge_hccl", *tables())
