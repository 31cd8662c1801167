"""From the arrays of a file to the variables of one of our networks: every one of both, or a readable difference."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxcnn import models
from jaxcnn.data.classes import class_names
from jaxcnn.errors import InputError, unknown
from jaxcnn.models.table import Entry
from jaxcnn.pretrained.layouts import Layout, of_family
from jaxcnn.pretrained.pixels import PREPROCESSINGS, Pixels
from jaxcnn.pretrained.read import Arrays, metadata, read
from jaxcnn.tree import flatten, path_pattern
from jaxcnn.types import PyTree

SHOWN = 12
"""Lines of a difference in an error."""

HEADS = ("fc8", "conv10", "head", "fc")
"""What the last layer of our networks is called."""
FIRST = "conv1_1"
"""The layer of VGG that has `width` channels."""


@dataclass(frozen=True)
class Pretrained:
    """What a weights file holds for one of our networks, `model`.

    `create(model, **overrides).apply(variables, preprocessing(images), train=False)` gives the source's logits.
    `classes`: the names of the logits, None where they are not known.
    """

    variables: dict[str, PyTree]
    overrides: dict[str, Any]
    preprocessing: Pixels
    classes: tuple[str, ...] | None
    layout: str
    model: str


def load(
    name: str,
    path: Path | str,
    *,
    layout: str | None = None,
    preprocessing: str | None = None,
    partial: str = "",
    **overrides: Any,
) -> Pretrained:
    """The weights of `path` for the model `name`, float32, on the host.

    The layout is the one that knows most of the file's names, the number of classes that of its last layer;
    `overrides` are further ones of `create`. What the images go through follows the layout, or `preprocessing`, one
    of `PREPROCESSINGS`. What the regular expression `partial` finds, in our paths or the file's names, may be missing,
    unexpected or of another shape, and is then left out of `variables`: a file without the head, or with another one.

    Raises:
      InputError: what `read` raises; unknown model, layout or preprocessing; a tensor that is missing, unexpected,
        of another shape or not finite: all of them, in one message; `partial` is no regular expression.
    """
    family = next((family for family, variants in models.FAMILIES.items() if name in variants), None)
    if family is None:
        raise unknown("model", name, models.MODELS)
    layouts = {each.name: each for each in of_family(family)}
    if layout is not None and layout not in layouts:
        raise unknown(f"layout for {name}", layout, layouts)
    arrays, notes = read(path), metadata(path)
    arrays = {_plain(key): array for key, array in arrays.items()}
    overrides = _tuples(json.loads(notes.get("overrides", "{}")) | overrides)
    candidates = [layouts[layout]] if layout else list(layouts.values())
    if Path(path).suffix == ".npz":  # NumPy users write PyTorch's names with either framework's axes
        candidates += [replace(each, transposed=False) for each in candidates if each.transposed]
    may_differ = path_pattern("partial", partial or "(?!)")
    fits = (_fit(name, each, arrays, overrides, may_differ) for each in candidates)
    best = min(fits, key=lambda fit: (len(fit.problems), -len(fit.flat)))
    if best.problems:
        more = [f"and {len(best.problems) - SHOWN} more"] if len(best.problems) > SHOWN else []
        lines = "\n  ".join([*best.problems[:SHOWN], *more])
        raise InputError(f"{path} does not hold the weights of {name} (layout {best.layout.name}):\n  {lines}")
    count = best.overrides.get("num_classes", getattr(models.create(name), "num_classes", None))
    classes = tuple(json.loads(notes["classes"])) if "classes" in notes else class_names(name, count)
    if "pixels" in notes and preprocessing is None:
        found = Pixels(**_tuples(json.loads(notes["pixels"])))
    else:
        found = pixels(preprocessing or best.layout.preprocessing, models.MODELS[name])
    return Pretrained(unflatten_dict(best.flat, sep="/"), best.overrides, found, classes, best.layout.name, name)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where our fields have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def pixels(name: str, entry: Entry) -> Pixels:
    """The preprocessing of that name; small networks take their own input size, uncropped."""
    if name not in PREPROCESSINGS:
        raise unknown("preprocessing", name, PREPROCESSINGS)
    found = PREPROCESSINGS[name]
    height, width = entry.input[:2]
    return found if min(height, width) >= 200 else replace(found, size=(height, width), crop=1.0)


@dataclass(frozen=True)
class _Fit:
    layout: Layout
    overrides: dict[str, Any]
    flat: dict[str, np.ndarray]
    problems: list[str]


def _fit(name: str, layout: Layout, arrays: Arrays, overrides: dict[str, Any], may_differ: re.Pattern[str]) -> _Fit:
    """The variables as `layout` has them, and what does not fit."""
    overrides = {**layout.overrides, **overrides}
    leaves, sources = _leaves(name, layout, overrides)
    head = next((module for module in HEADS if module in sources), None)
    for field, module, usual in (("num_classes", head, None), ("width", FIRST, 64)):
        bias = module and _key(layout, sources, module, "bias", arrays)
        if bias and field not in overrides and len(arrays[bias]) != usual:
            overrides[field] = len(arrays[bias])
            leaves, sources = _leaves(name, layout, overrides)
    flat, problems, used = {}, {}, set()
    for path, leaf in leaves.items():
        module, _, what = path.partition("/")[2].rpartition("/")
        key = _key(layout, sources, module, what, arrays)
        if key is None:
            source = layout.separator.join((sources.get(module, module), layout.leaves[what][0]))
            problems[path] = f"missing {source}, which is {path} {list(leaf.shape)}"
            continue
        used.add(key)
        value = arranged(arrays[key], leaf.shape, layout, module)
        if value is None:
            problems[path] = f"{key} {list(arrays[key].shape)} does not fit {path} {list(leaf.shape)}"
        elif not np.isfinite(value).all():
            problems[path] = f"{key} holds values that are not finite"
        else:
            flat[path] = value
    left = {key: array for key, array in arrays.items() if key not in used and not re.search(layout.extras, key)}
    problems |= {key: f"unexpected {key} {list(array.shape)}" for key, array in left.items()}
    return _Fit(layout, overrides, flat, [text for at, text in problems.items() if not may_differ.search(at)])


def _plain(key: str) -> str:
    """Without what wrappers put before names, and with the dots that torchvision's old DenseNets have too many of."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key.removeprefix("module."))


def _leaves(name: str, layout: Layout, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The shapes of a network's variables by path, and what `layout` calls its modules."""
    network = models.create(name, **overrides)
    leaves = _shapes(name, network)
    modules = list(dict.fromkeys(path.partition("/")[2].rpartition("/")[0] for path in leaves))
    return leaves, layout.names(modules, network)


@lru_cache(maxsize=16)
def _shapes(name: str, network: Any) -> dict[str, Any]:
    """By path; kept, as several layouts ask for those of the same network."""
    sample = jax.ShapeDtypeStruct((1, *models.MODELS[name].input), jnp.float32)
    return flatten(jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), sample))


def _key(layout: Layout, sources: Mapping[str, str], module: str, leaf: str, arrays: Arrays) -> str | None:
    """What the file calls that leaf; our own files may have its collection before it."""
    source = sources.get(module)
    if source is None or leaf not in layout.leaves:
        return None
    names = [layout.separator.join((source, each.format(module=source))) for each in layout.leaves[leaf]]
    collections = ("", "params/", "batch_stats/") if layout.name == "jaxcnn" else ("",)
    return next((key for name in names for c in collections if (key := c + name) in arrays), None)


def arranged(value: np.ndarray, shape: tuple[int, ...], layout: Layout, module: str) -> np.ndarray | None:
    """The array as our leaf of `shape` has it, float32, or None where it cannot be.

    PyTorch's kernels (out, in, *window) become (*window, in, out), and the input of a dense layer after a map goes
    from the order c, h, w to ours, h, w, c. A dense layer that the source writes as a convolution over the whole map,
    and the reverse, is the same array in another shape; so is Keras's depthwise kernel (*window, c, 1).
    """
    value = np.asarray(value, np.float32)
    if layout.transposed and value.ndim >= 2:
        if value.ndim == 2 and module in layout.flatten:
            height, width = layout.flatten[module]
            if value.shape[1] % (height * width):
                return None
            value = value.reshape(len(value), -1, height, width)
        value = np.transpose(value, (*range(2, value.ndim), 1, 0))
    dense = {value.ndim, len(shape)} == {2, 4} and value.shape[-1] == shape[-1] and value.size == np.prod(shape)
    depthwise = value.ndim == 4 and value.shape == (*shape[:2], shape[-1], 1) and shape[2] == 1
    if dense or depthwise:
        value = value.reshape(shape)
    return value if value.shape == shape else None
