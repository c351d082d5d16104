"""Run by test_commands.py: commands that fail before MindSpore computes anything, one after the other in one process.

python bad_rows.py FILE: a JSON list of [script, flags]. Prints a JSON list of [exit status, what is on stderr].
"""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "DDRNet"), str(ROOT)]

from utils.cli import run


def outcome(script: str, flags: list[str]) -> tuple[int, str]:
    """Exit status of the command, and what it wrote on stderr."""
    sys.argv = [f"{script}.py", *flags]
    error = io.TextIOWrapper(io.BytesIO(), write_through=True)
    status = None
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
        try:
            run(importlib.import_module(script).main)
        except SystemExit as end:
            status = end.code
    return status, error.buffer.getvalue().decode()


if __name__ == "__main__":
    print(json.dumps([outcome(*row) for row in json.loads(Path(sys.argv[1]).read_text())]))
