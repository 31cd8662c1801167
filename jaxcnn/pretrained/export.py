"""Our weights for others: safetensors under our own names, and a model card beside them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jaxcnn import __version__
from jaxcnn.errors import InputError
from jaxcnn.files import replacing
from jaxcnn.pretrained.pixels import Pixels
from jaxcnn.tree import flatten, state_sha256
from jaxcnn.types import PyTree


def export(
    path: Path | str,
    variables: PyTree,
    *,
    model: str,
    overrides: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    pixels: Pixels | None = None,
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Writes the variables to `path` (`.safetensors`), and what they are to NAME.md beside it; returns the latter.

    The keys are our paths, such as `params/conv1/kernel` (h, w, in, out). The file also carries model, overrides,
    class names and preprocessing, so that `jaxcnn.pretrained.load(model, path)` gives the same bits and asks nothing.
    `facts` are lines of the card: source, licence, accuracy, ...

    Raises:
      InputError: another suffix, or a path that exists.
    """
    from safetensors.numpy import save

    path = Path(path)
    card = path.with_suffix(".md")
    if path.suffix != ".safetensors":
        raise InputError(f"{path} has suffix {path.suffix!r}: expected .safetensors")
    for target in (path, card):
        if target.exists():
            raise InputError(f"{target} exists: move it away, or give another name")
    arrays = {key: np.ascontiguousarray(value) for key, value in flatten(variables).items()}
    notes = {"format": "jaxcnn", "version": __version__, "model": model, "overrides": json.dumps(dict(overrides))}
    if classes is not None:
        notes["classes"] = json.dumps(list(classes))
    if pixels is not None:
        notes["pixels"] = json.dumps(asdict(pixels))
    with replacing(path) as file:
        file.write(save(arrays, notes))
    trained = sum(value.size for key, value in arrays.items() if key.startswith("params/"))
    rows = {
        "model": f"`{model}` of jaxcnn {__version__}",
        "overrides": ", ".join(f"{key}={value}" for key, value in overrides.items()) or "none",
        "parameters": f"{trained:,} trained, {sum(value.size for value in arrays.values()) - trained:,} statistics",
        "classes": "not named"
        if classes is None
        else f"{len(classes)}: {', '.join(classes[:10])}" + (", ..." if len(classes) > 10 else ""),
        "preprocessing": "not a fixed arithmetic on pixels: see the run" if pixels is None else str(pixels),
        "SHA-256 of the arrays": state_sha256(variables),
        **(facts or {}),
    }
    lines = [f"# {path.stem}", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    use = f'loaded = jaxcnn.pretrained.load("{model}", "{path.name}")'
    lines += ["", "```python", use, f'create("{model}", **loaded.overrides).apply(loaded.variables, x, train=False)']
    with replacing(card) as file:
        file.write("\n".join([*lines, "```", ""]).encode())
    return card
