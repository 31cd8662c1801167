"""Download the original files over https, pinned by size and SHA-256."""

import hashlib
import http.client
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from jaxcnn import __version__
from jaxcnn.errors import InputError, unknown

TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 20
SCHEMES = ("https",)

Progress = Callable[[str, int, int], None]
"""Called with the file name, the bytes held so far and the bytes expected."""


@dataclass(frozen=True)
class Remote:
    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Original:
    """The files of a data set as its authors publish them."""

    files: tuple[Remote, ...]
    licence: str
    citation: str


def _mnist_files(base: str, pins: dict[str, tuple[int, str]]) -> tuple[Remote, ...]:
    return tuple(Remote(f"{base}/{name}-ubyte.gz", size, sha256) for name, (size, sha256) in pins.items())


FILES: dict[str, Original] = {
    "mnist": Original(
        files=_mnist_files(
            "https://storage.googleapis.com/cvdf-datasets/mnist",
            {
                "train-images-idx3": (
                    9_912_422,
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                ),
                "train-labels-idx1": (
                    28_881,
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                ),
                "t10k-images-idx3": (
                    1_648_877,
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                ),
                "t10k-labels-idx1": (
                    4_542,
                    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                ),
            },
        ),
        licence="CC BY-SA 3.0",
        citation="Y. LeCun, L. Bottou, Y. Bengio, P. Haffner. Gradient-based learning applied to document "
        "recognition. Proceedings of the IEEE 86(11), 1998.",
    ),
    "fashion_mnist": Original(
        files=_mnist_files(
            "https://fashion-mnist.s3.eu-central-1.amazonaws.com",
            {
                "train-images-idx3": (
                    26_421_880,
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                ),
                "train-labels-idx1": (
                    29_515,
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                ),
                "t10k-images-idx3": (
                    4_422_102,
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                ),
                "t10k-labels-idx1": (
                    5_148,
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
            },
        ),
        licence="MIT",
        citation="H. Xiao, K. Rasul, R. Vollgraf. Fashion-MNIST: a novel image dataset for benchmarking "
        "machine learning algorithms. arXiv:1708.07747, 2017.",
    ),
    "cifar10": Original(
        files=(
            Remote(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                170_052_171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        licence="none stated by its authors",
        citation="A. Krizhevsky. Learning multiple layers of features from tiny images. Technical report, "
        "University of Toronto, 2009.",
    ),
    "cifar100": Original(
        files=(
            Remote(
                "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                168_513_733,
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ),
        ),
        licence="none stated by its authors",
        citation="A. Krizhevsky. Learning multiple layers of features from tiny images. Technical report, "
        "University of Toronto, 2009.",
    ),
}


def fetch(name: str, data_dir: Path | str, *, progress: Progress | None = None) -> list[Path]:
    """Download the originals of `name`, one of `FILES`, to `data_dir/name`; return their paths.

    A file that is there with the pinned digest is not fetched again. Bytes arrive in `FILE.partial`,
    which takes its final name only when size and digest are right; an interrupted download goes on
    from there at the next call.

    Raises:
      InputError: unknown name; a file of another digest already there (it is left alone); no
        connection, or one that broke off (the partial file stays); a download of the wrong size or
        digest, or a redirect away from https (nothing stays).
    """
    if name not in FILES:
        raise unknown("data set to fetch", name, FILES)
    folder = Path(data_dir) / name
    report = progress or (lambda name, held, expected: None)
    return [_fetch_file(remote, folder / remote.name, report) for remote in FILES[name].files]


def _fetch_file(remote: Remote, target: Path, progress: Progress) -> Path:
    try:
        if target.exists():
            _require_pinned(remote, target, f"{target} is not the pinned original", "move it away and fetch again")
            return target
        partial = target.with_name(target.name + ".partial")
        _download(remote, partial, progress)
        try:
            _require_pinned(remote, partial, f"download of {remote.url} is wrong", "nothing was kept; try again")
        except InputError:
            partial.unlink()
            raise
        os.replace(partial, target)
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


def _require_pinned(remote: Remote, path: Path, problem: str, remedy: str) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if (size, sha256) != (remote.size, remote.sha256):
        raise InputError(
            f"{problem}: {size} bytes with SHA-256 {sha256}, expected {remote.size} bytes with "
            f"{remote.sha256}: {remedy}"
        )


def _download(remote: Remote, partial: Path, progress: Progress) -> None:
    """Complete `partial`; at most one byte more than expected is taken from the server."""
    held = partial.stat().st_size if partial.exists() else 0
    if held > remote.size:
        held = 0
    if held == remote.size:
        return
    with _open(remote.url, held) as response:
        if response.status != 206:  # no range served: from the start
            held = 0
        promised = held + int(response.headers.get("Content-Length", remote.size - held))
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab" if held else "wb") as file:
            progress(remote.name, held, remote.size)
            while held <= remote.size and (chunk := response.read(min(CHUNK_BYTES, remote.size + 1 - held))):
                file.write(chunk)
                held += len(chunk)
                progress(remote.name, held, remote.size)
            file.flush()
            os.fsync(file.fileno())
    if held < min(promised, remote.size):
        raise ConnectionError(f"the connection broke off after {held} of {remote.size} bytes")


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


def _open(url: str, start: int) -> http.client.HTTPResponse:
    _require_scheme(url)
    headers = {"User-Agent": f"jaxcnn/{__version__}"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_SECONDS)
