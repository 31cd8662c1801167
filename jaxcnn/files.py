"""Files: those that are written whole or not at all, and those of the user that define something."""

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxcnn.errors import InputError


@contextlib.contextmanager
def replacing(path: Path, *, before: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """A file to write to that takes the name `path` at the end, once it is on the disk; none remains of a failure.

    `before` is called between the two.
    """
    temporary = path.with_name(f"{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        before()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any, *, before: Callable[[], None] = lambda: None) -> None:
    """Ends with the closing brace: a file cut short by a single byte is no JSON any more."""
    with replacing(path, before=before) as file:
        file.write(json.dumps(values, indent=1).encode())


def json_sha256(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON types, whatever the order of the keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_file(path: Path) -> dict[str, Any]:
    """The names that a Python file of the user's defines; `InputError` where there is none."""
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise InputError(f"{path} does not exist or is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses, and so Flax modules, look their file up there
    spec.loader.exec_module(module)
    return vars(module)
