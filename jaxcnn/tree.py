"""Pytrees by path: what checkpoints, digests and differences are made of."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxcnn.errors import InputError
from jaxcnn.types import PyTree


def flatten(tree: PyTree) -> dict[str, Any]:
    """`{"params/conv1/kernel": leaf, ...}` in path order."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    return dict(sorted(named.items()))


def unflatten(like: PyTree, flat: Mapping[str, Any], *, what: str) -> PyTree:
    """The structure of `like` with the leaves of `flat`; `InputError` with the difference if they do not fit."""
    expected = flatten(like)
    problems = [f"missing {path} {expected[path].shape}" for path in expected if path not in flat]
    problems += [f"unexpected {path} {np.shape(flat[path])}" for path in flat if path not in expected]
    for path in expected.keys() & flat.keys():
        a, b = expected[path], flat[path]
        if a.shape != np.shape(b) or a.dtype != b.dtype:
            problems.append(f"{path}: expected {a.dtype}{list(a.shape)}, found {b.dtype}{list(np.shape(b))}")
    if problems:
        shown = "\n  ".join(sorted(problems)[:12])
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise InputError(f"the {what} do not fit this model and optimiser:\n  {shown}{more}")
    pairs, structure = jax.tree_util.tree_flatten_with_path(like)
    paths = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs)
    return jax.tree.unflatten(structure, [flat[path] for path in paths])


def path_pattern(what: str, text: str) -> re.Pattern[str]:
    """The regular expression `text` over paths; `InputError` that begins with `what` where it is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise InputError(f"{what} {text!r} is no regular expression: {error}") from error


def state_sha256(tree: PyTree) -> str:
    """SHA-256 over path, dtype, shape and bytes of every array, in path order."""
    digest = hashlib.sha256()
    for path, leaf in flatten(tree).items():
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
