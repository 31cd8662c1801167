"""Download files over https, checked by size and digest.

A file whose digest is not known beforehand is trusted once: its first download writes the SHA-256 to `FILE.sha256`
beside it, as `sha256sum` does, and every later download and use must match that.
"""

import hashlib
import http.client
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from jaxcnn import __version__
from jaxcnn.errors import InputError
from jaxcnn.files import replacing

TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 20
MAX_BYTES = 4 << 30
"""Most that is taken for a file whose size is not known beforehand, whatever the server announces."""
SCHEMES = ("https",)

Progress = Callable[[str, int, int], None]
"""Called with the file name, the bytes held so far and the bytes expected."""


@dataclass(frozen=True)
class Remote:
    """A file and what is known of it before it is fetched; `md5` for files whose authors publish no better digest."""

    url: str
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def download(remote: Remote, target: Path, *, progress: Progress | None = None) -> Path:
    """Fetch `remote` to `target`, unless the right file lies there.

    Bytes arrive in `target.partial`, which takes its final name only when size and digest are right; an interrupted
    download goes on from there at the next call (without a digest to tell, only where the server says by its ETag
    that the file is still the same).

    Raises:
      InputError: a file of another digest already there (it is left alone); no connection, or one that broke off or
        stalled (the partial file stays); a download of the wrong size or digest, or a redirect away from https
        (nothing stays); a file of unstated size, or of more than `MAX_BYTES`, where none is pinned; a disk error.
    """
    report = progress or (lambda name, held, expected: None)
    try:
        known = remote if remote.sha256 else replace(remote, sha256=_recorded(_record_of(target)))
        if target.exists():
            what = "the pinned original" if remote.sha256 else "the file downloaded first"
            sha256 = _check(known, target, f"{target} is not {what}", "move it away and fetch again")
        else:
            sha256 = _fetch(known, target, report, remedy=_remedy(remote, known, target))
        if known.sha256 is None:
            _record(target, sha256)
        if not target.exists():
            os.replace(_partial(target), target)
    except urllib.error.HTTPError as error:
        raise InputError(f"cannot download {remote.url}: HTTP {error.code} {error.reason}") from error
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
        ssl.SSLError,
    ) as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"cannot download {remote.url}: {reason}: run the same command again to go on") from error
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _remedy(remote: Remote, known: Remote, target: Path) -> str:
    if known.sha256 == remote.sha256:
        return "nothing was kept; try again"
    return (
        f"nothing was kept; try again, or, if the file was meant to change, delete {_record_of(target)}, which "
        "holds the digest of the first download"
    )


def _fetch(remote: Remote, target: Path, progress: Progress, *, remedy: str) -> str:
    """Complete the partial file of `target` and check it; its SHA-256."""
    partial = _partial(target)
    size = _complete(remote, target, progress)
    try:
        return _check(replace(remote, size=size), partial, f"download of {remote.url} is wrong", remedy)
    except InputError:
        partial.unlink()
        raise
    finally:
        _etag_of(target).unlink(missing_ok=True)


# Digests.


def _check(remote: Remote, path: Path, problem: str, remedy: str) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    wanted = (size if remote.size is None else remote.size, remote.sha256 or sha256)
    if (size, sha256) != wanted:
        raise InputError(
            f"{problem}: {size} bytes with SHA-256 {sha256}, expected {wanted[0]} bytes with {wanted[1]}: {remedy}"
        )
    if remote.md5:
        with open(path, "rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if md5 != remote.md5:
            raise InputError(f"{problem}: MD5 {md5}, expected {remote.md5}: {remedy}")
    return sha256


def _record_of(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def _record(target: Path, sha256: str) -> None:
    with replacing(_record_of(target)) as file:
        file.write(f"{sha256}  {target.name}\n".encode())


def _recorded(record: Path) -> str | None:
    if not record.exists():
        return None
    sha256 = record.read_bytes()[:64].decode("ascii", "replace")
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InputError(f"{record} starts with {sha256[:16]!r}, expected a SHA-256 digest: delete it and fetch again")
    return sha256


# The network.


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _etag_of(target: Path) -> Path:
    return target.with_name(target.name + ".partial.etag")


def _complete(remote: Remote, target: Path, progress: Progress) -> int:
    """Fill the partial file and return its size; at most one byte more than expected is taken from the server."""
    partial, etag_file = _partial(target), _etag_of(target)
    held = partial.stat().st_size if partial.exists() else 0
    if remote.size is not None:
        if held > remote.size:
            held = 0
        if held == remote.size:
            return held
    digest = remote.sha256 or remote.md5
    etag = _strong(etag_file.read_text("latin-1")) if etag_file.exists() and not digest else ""
    response, held = _continue(remote.url, held if digest or etag else 0, etag)
    with response:
        announced = _length(response)
        size = _bounded(remote.url, held, announced) if remote.size is None else remote.size
        promised = size if announced is None else held + announced
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab" if held else "wb") as file:
            if not digest:
                etag_file.write_text(_strong(response.headers.get("ETag", "")), "latin-1")
            progress(target.name, held, size)
            # read1: what has arrived is on the disk when the connection stalls
            while held <= size and (chunk := response.read1(min(CHUNK_BYTES, size + 1 - held))):
                file.write(chunk)
                held += len(chunk)
                if held >= size or held % CHUNK_BYTES < len(chunk):
                    progress(target.name, held, size)
            file.flush()
            os.fsync(file.fileno())
    if held < min(promised, size):
        raise ConnectionError(f"the connection broke off after {held} of {size} bytes")
    return size


def _length(response: http.client.HTTPResponse) -> int | None:
    announced = response.headers.get("Content-Length", "")
    return int(announced) if re.fullmatch("[0-9]{1,18}", announced) else None


def _strong(etag: str) -> str:
    """`etag` where it stands for the very bytes of a file, else nothing."""
    return etag if re.fullmatch(r'"[!#-~]+"', etag) else ""


def _bounded(url: str, held: int, announced: int | None) -> int:
    if announced is None:
        raise InputError(f"will not download {url}: the server does not say how long the file is")
    if held + announced > MAX_BYTES:
        raise InputError(f"will not download {url}: {held + announced} bytes, expected at most {MAX_BYTES}")
    return held + announced


def _continue(url: str, held: int, etag: str) -> tuple[http.client.HTTPResponse, int]:
    """The response and the byte of the file that it starts with: `held`, or 0 where the server cannot go on.

    With `etag` it goes on with that version of the file alone.
    """
    try:
        response = _open(url, held, etag)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not held:  # 416: there is nothing behind what is held
            raise
        error.close()
        return _open(url, 0, ""), 0
    if response.status != 206:
        return response, 0
    if etag and not _same_version(response, held, etag):
        response.close()
        return _open(url, 0, ""), 0
    return response, held


def _same_version(response: http.client.HTTPResponse, held: int, etag: str) -> bool:
    span = response.headers.get("Content-Range", "")
    return response.headers.get("ETag") == etag and span.startswith(f"bytes {held}-")


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        _require_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_scheme(url: str) -> None:
    if url.partition(":")[0].lower() not in SCHEMES:
        raise InputError(f"will not download from {url}: expected {' or '.join(SCHEMES)}")


def _open(url: str, start: int, etag: str) -> http.client.HTTPResponse:
    _require_scheme(url)
    headers = {"User-Agent": f"jaxcnn/{__version__}"}
    if start:
        headers |= {"Range": f"bytes={start}-"} | ({"If-Range": etag} if etag else {})
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_SECONDS)
