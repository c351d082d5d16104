"""Download one file: resumable, checked against its SHA-256, under its name only when whole."""

import hashlib
import http.client
import re
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

from tqdm import tqdm

from utils.cli import UserError, check_file

TIMEOUT = 30  # seconds without an answer


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with check_file(path, "move it away").open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def open_at(url: str, start: int):
    """Open `url` at byte `start`, or at 0 where the other side cannot resume.

    Returns the response, the offset of its first byte, and the size of the whole file in bytes (None: not told).
    """
    try:
        response = urlopen(Request(url, headers={"Range": f"bytes={start}-"} if start else {}), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return open_at(url, 0)
        raise
    length = response.headers["Content-Length"]
    total = int(length) if length else None
    if urlsplit(url).scheme == "file":
        start = start if start <= total else 0
        response.seek(start)
        return response, start, total
    if response.status != http.client.PARTIAL_CONTENT:
        return response, 0, total
    answer = re.fullmatch(rf"bytes {start}-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if start and answer:
        return response, start, int(answer[1])
    response.close()
    if not start:
        raise http.client.HTTPException("the server sent a part of the file without being asked")
    return open_at(url, 0)


def fetch(url: str, part: Path) -> None:
    """Complete `part` from `url`; after any failure what has arrived stays in it for the next call."""
    start = check_file(part, "move it away").stat().st_size if part.exists() else 0
    if urlsplit(url).scheme == "file":
        check_file(url2pathname(urlsplit(url).path), f"put the file by hand at {part.with_suffix('')}", url)
    response, start, total = open_at(url, start)
    with response:
        part.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, disable=None)
        with part.open("ab" if start else "wb") as file, bar:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    size = part.stat().st_size
    if total is not None and size != total:
        raise http.client.HTTPException(f"broke off after {size} of {total} bytes, which are kept")


def download(url: str, path: Path, sha256: str | None = None) -> str:
    """Download `url` to `path` by way of `<path>.part`, which a later call resumes if this one breaks off.

    `url` begins with http://, https:// or file://; `sha256` is the expected digest, 64 hexadecimal digits or the first
    8 or more of them, or None: it is printed instead. Returns the digest in lower case. UserError if the transfer
    fails, the hash is wrong or no hash, or `path` already is another file.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{8,64}", sha256):
        raise UserError(f"{sha256!r} is no SHA-256; give its 64 hexadecimal digits, or the first 8 or more of them")
    expected = (sha256 or "").lower()
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    by_hand = f"put the file by hand at {path}"
    try:
        if path.exists():
            found = file_sha256(path)
            if not found.startswith(expected):
                fault = f"{path} is another file: sha256 {found[:12]}, expected {expected[:12]}"
                raise UserError(f"{fault}; move it away or delete it")
            print(f"{path} is already there, nothing to download" + ("" if sha256 else f"; sha256 {found}"))
            return found
        if urlsplit(url).scheme not in ("http", "https", "file"):
            raise ValueError("only http://, https:// and file:// are understood")
        print(f"downloading {url} to {path}", flush=True)
        fetch(url, part)
        found = file_sha256(part)
        if not found.startswith(expected):
            part.unlink()
            fault = f"{url} has sha256 {found[:12]}, expected {expected[:12]}"
            raise UserError(f"{fault}; removed, download it again or {by_hand}")
        part.replace(path)
    except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:
        reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
        raise UserError(f"cannot download {url}: {reason}; try again or {by_hand}") from error
    if not sha256:
        print(f"sha256 {found}")
    return found
