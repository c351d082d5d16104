"""Merge the rank tables of single Ascend servers into one table for all of them.

    python utils/hccl_tools/merge_hccl.py hccl_8p_01234567_192.168.1.7.json hccl_8p_01234567_192.168.1.8.json

The ranks are numbered anew: in the order of the files, and within a file in the order of its own ranks.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import Parser, UserError, run
from utils.hccl_tools.rank_table import read_table, write_table


def main() -> None:
    """Read the flags, check the tables against each other and write the merged one."""
    parser = Parser(description="Merge rank tables of single Ascend servers into one.")
    parser.add_argument("files", metavar="FILE", nargs="*", help="two or more tables, in the order of the new ranks")
    parser.add_argument("--output_dir", default=".", help="folder for the merged table (default: the current folder)")
    args = parser.parse_args()
    if len(args.files) < 2:
        raise UserError(f"{len(args.files)} rank tables given; merging needs two or more")

    servers, devices = [], []
    files: dict[tuple[str, str], str] = {}  # of each server and device address
    for file in args.files:
        server, *more = read_table(file, addressed=True)
        if more:
            raise UserError(f"{file} has {len(more) + 1} servers; give single-server tables")
        for key, holder in [("server_id", server), *(("device_ip", device) for device in server["device"])]:
            name = (key, holder[key])
            if name in files:
                raise UserError(f"{key} {name[1]} stands twice, in {files[name]} and {file}; give each server once")
            files[name] = file
        servers.append(server)
        devices += server["device"]
    for rank, device in enumerate(devices):
        device["rank_id"] = str(rank)
    write_table(servers, Path(args.output_dir) / f"hccl_{len(servers)}s_{len(devices)}p.json")


if __name__ == "__main__":
    run(main)
