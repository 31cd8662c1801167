"""Where the public weights of the index lie on this machine, and the one call that downloads them."""

import os
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from jaxcnn.download import Progress, Remote, download
from jaxcnn.pretrained.index import find


def default_dir() -> Path:
    """`JAXCNN_WEIGHTS` where it is set, else `~/.cache/jaxcnn/weights`."""
    return Path(os.environ.get("JAXCNN_WEIGHTS") or "~/.cache/jaxcnn/weights").expanduser()


def path_of(name: str, weights_dir: Path | str | None = None) -> Path:
    """Where the weights `name`, one of `INDEX`, lie or would lie: NAME.TAG with the suffix of the original.

    Raises:
      InputError: unknown name.
    """
    suffix = PurePosixPath(urlsplit(find(name).url).path).suffix
    return Path(weights_dir if weights_dir is not None else default_dir()) / f"{name}{suffix}"


def fetch(name: str, weights_dir: Path | str | None = None, *, progress: Progress | None = None) -> Path:
    """Download the weights `name`, one of `INDEX`, unless they are there; check them in both cases.

    The digest is the index's; where it has none, that of the first download, in `FILE.sha256` beside the file.

    Raises:
      InputError: unknown name; what `jaxcnn.download.download` raises.
    """
    entry = find(name)
    remote = Remote(entry.url, size=entry.size, sha256=entry.sha256, md5=entry.md5)
    return download(remote, path_of(name, weights_dir), progress=progress)
