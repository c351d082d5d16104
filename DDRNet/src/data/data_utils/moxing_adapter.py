"""Copies between Huawei Cloud's object storage (OBS) and a ModelArts server, through the package `moxing`.

`moxing` exists on ModelArts only; it is imported when something is to be copied.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from utils.cli import UserError

REMOTE = ("obs://", "s3://")


def _file():
    """The module `moxing.file`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import moxing
    except ImportError as error:
        raise UserError(
            "--run_modelarts works on Huawei Cloud ModelArts only, where the package moxing is installed "
            f"({error}); leave it out elsewhere"
        ) from error
    return moxing.file


def _copy(source: str | Path, target: str | Path) -> None:
    file = _file()
    try:
        file.copy_parallel(str(source), str(target))
    except Exception as error:  # moxing's own classes, which differ between its versions
        raise UserError(
            f"cannot copy {source} to {target}: {error}; check the path and the job's access to OBS"
        ) from error


def sync_data(remote: str, local: str | Path) -> None:
    """Make the folder `local` a copy of the OBS folder `remote`, unless it is there already.

    Of all the processes of a server the first one copies; the others wait for it. The folder gets its name when it is
    whole, so an interrupted copy is made anew.

    Raises:
        UserError: moxing is not installed or cannot copy, or there is nothing to copy.
    """
    local = Path(local)
    part = local.with_name(f"{local.name}.part")
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        # The kernel gives the lock back when its holder ends, however it ends.
        with local.with_name(f"{local.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if local.is_dir():
                return
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            print(f"copying {remote} to {local}", flush=True)
            _copy(remote, part)
            if not any(part.iterdir()):
                raise UserError(f"{remote} has nothing in it; set --data_url to the OBS folder of the data set")
            part.rename(local)
    except OSError as error:
        raise UserError(f"cannot write {local}: {error.strerror or error}; make room there") from error


def upload(local: str | Path, remote: str) -> None:
    """Copy the folder `local` to the OBS folder `remote`.

    Raises:
        UserError: moxing is not installed or cannot copy.
    """
    _copy(local, remote)


def fetch_data(data_url: str, cache: str | Path | None = None) -> Path:
    """Where the data at `data_url` lie on this server; an `obs://` or `s3://` folder is copied there first, once.

    Every process of the job may call this. It fails at once where the results could not be uploaded later.

    Args:
        cache: folder for the copies; None is ModelArts' local disk /cache, or the folder for temporary files.

    Raises:
        UserError: as `sync_data`.
    """
    _file()
    if not data_url.startswith(REMOTE):
        return Path(data_url)
    if cache is None:
        cache = "/cache" if os.access("/cache", os.W_OK) else tempfile.gettempdir()
    # Two URLs may end in one name.
    name = f"{data_url.rstrip('/').rsplit('/', 1)[-1]}-{hashlib.sha256(data_url.encode()).hexdigest()[:12]}"
    sync_data(data_url, Path(cache) / name)
    return Path(cache) / name


def upload_results(output_dir: str | Path, train_url: str, last: bool = True) -> None:
    """Copy everything a run has written to the OBS folder `train_url`; to be called by one process of the job.

    Raises:
        UserError: as `upload`, but only for the `last` time; before that a warning says that it did not work.
    """
    try:
        upload(output_dir, train_url)
    except UserError as error:
        if last:
            raise
        print(f"warning: {' '.join(str(error).split())}; going on, and trying again later", file=sys.stderr, flush=True)
    else:
        print(f"copied {output_dir} to {train_url}", flush=True)


@contextlib.contextmanager
def uploading(args: argparse.Namespace, rank: int) -> Iterator[None]:
    """A block whose results the process of rank 0 copies when it ends, even if it is stopped or fails.

    Raises:
        UserError: as `upload`.
    """
    try:
        yield
    finally:
        if args.run_modelarts and rank == 0:
            upload_results(args.output_dir, args.train_url)
