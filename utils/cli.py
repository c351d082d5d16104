"""Command-line manners of every script: one-line errors, exit status 2, Ctrl-C with 130, files written whole."""

import argparse
import contextlib
import errno
import json
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn


class UserError(Exception):
    """Something the user can put right; the message says what is wrong and what to do, in one line."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and leave: with status 0 or what it returns, 2 after a UserError, 130 after Ctrl-C or SIGTERM.

    A path that the system refuses (too long, a loop of links, without permission, …) counts as a UserError.
    """
    # With PYTHONUNBUFFERED Python writes a line and its end separately; the scripts' logs take both outputs, and would
    # have one's line inside another's.
    for output in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        output.reconfigure(line_buffering=True, write_through=False, errors="backslashreplace")
    # Once a graph has run, MindSpore answers Ctrl-C itself: it sends its process a SIGTERM.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except OSError as error:
        if error.filename is None:
            raise
        shown = f"{error.filename}"[:200]
        print(f"error: cannot use {shown!r}: {error.strerror}; give another path, or permission", file=sys.stderr)
        status = 2
    except KeyboardInterrupt as interrupt:
        print("; ".join(["interrupted", *interrupt.args]), file=sys.stderr)
        status = 130
    sys.exit(status or 0)


def check_file(path: str | Path, remedy: str, name: str | None = None) -> Path:
    """`path`, called `name` in messages; UserError with this `remedy` if no regular file can be read there.

    Others are not opened at all: a FIFO would block for ever, a device never end.
    """
    try:
        if stat.S_IFMT(os.stat(path).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"cannot read {name or path}: it is no regular file; {remedy}")
        with open(path, "rb"):  # refuses a folder, too
            return Path(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"cannot read {name or path}: {getattr(error, 'strerror', error)}; {remedy}") from error


def read_file(path: str | Path, remedy: str, name: str | None = None) -> bytes:
    """The content of a regular file, called `name` in messages; UserError with this `remedy` if it cannot be read."""
    try:
        return check_file(path, remedy, name).read_bytes()
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", "it is larger than the memory")
        raise UserError(f"cannot read {name or path}: {reason}; {remedy}") from error


def read_json(path: str | Path, remedy: str, name: str | None = None):
    """The content of a JSON file, as `read_file`; UserError, too, if it is not valid."""
    content = read_file(path, remedy, name)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name or path} is not valid JSON ({error}); {remedy}") from error


class Interrupt:
    """Ctrl-C and SIGTERM: within `held()` the first is noted for the end of the step, otherwise they end the run.

    `asked` says whether one has been noted, `hint` how to go on, in the message with which the run then ends.
    """

    def __init__(self):
        self.asked, self.holding, self.hint = False, False, ""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, frame) -> None:
        if not self.holding or self.asked:
            raise KeyboardInterrupt(*filter(None, [self.hint]))
        self.asked = True

    @contextlib.contextmanager
    def held(self):
        self.holding = True
        try:
            yield
        finally:
            self.holding = False

    def hold_while(self, work: Callable[[], Any]) -> Any:
        """The result of `work`, done held; the run ends after it if that has been asked for meanwhile."""
        with self.held():
            result = work()
        if self.asked:
            raise KeyboardInterrupt(*filter(None, [self.hint]))
        return result


def check_writable(folder: str | Path) -> None:
    """Make the folder if need be; UserError if no file can be written there, before long work is done."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another place") from error


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, renamed if the block succeeds, else removed; UserError if not writable."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # such as /dev/null, which the system would let us replace
            raise OSError(errno.EEXIST, "Something else than a regular file is there")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    os.close(handle)
    temporary = Path(temporary)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; make room or choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)
