"""Where the public weights of the index lie on this machine, and the one call that downloads them."""

import os
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from jaxcnn import pretrained
from jaxcnn.download import Progress, Remote, download
from jaxcnn.errors import InputError
from jaxcnn.pretrained import Pretrained
from jaxcnn.pretrained.index import INDEX, find
from jaxcnn.pretrained.read import PICKLES


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


def held(name: str) -> Path:
    """The file to read the weights `name`, one of `INDEX`, from: checked, and nothing is downloaded.

    Of weights that were published as a pickle it is what their user has converted, beside it.

    Raises:
      InputError: unknown name; not fetched yet, or no longer what was fetched.
    """
    path = path_of(name)
    if path.suffix in PICKLES and (converted := path.with_suffix(".safetensors")).exists():
        return converted
    if not path.exists():
        raise InputError(f"the weights {name} are not at {path}: run jaxcnn weights fetch {name}")
    return fetch(name)


def load(
    weights: str,
    *,
    model: str | None = None,
    layout: str | None = None,
    preprocessing: str | None = None,
    **overrides: Any,
) -> Pretrained:
    """`pretrained.load` of the file `weights` for `model`, or of the weights NAME.TAG of `INDEX`, as it describes them.

    Raises:
      InputError: no model named for a file, or another than the index's; what `held` and `pretrained.load` raise.
    """
    options: dict[str, Any] = {"layout": layout, "preprocessing": preprocessing}
    if weights not in INDEX:
        if model is None:
            raise InputError(f"--weights {weights}: also give --model, one of `jaxcnn list`")
        return pretrained.load(model, weights, **options, **overrides)
    entry = find(weights)
    if model not in (None, entry.model):
        raise InputError(f"the weights {weights} are those of {entry.model}, not of {model}")
    options["layout"] = layout or entry.layout
    loaded = pretrained.load(entry.model, held(weights), **options, **{**entry.overrides, **overrides})
    return loaded if preprocessing else replace(loaded, preprocessing=entry.preprocessing)
