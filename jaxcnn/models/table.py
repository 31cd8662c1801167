"""What the families share: a row of the table, and the check of what comes in."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn

from jaxcnn.errors import InputError
from jaxcnn.types import Array


@dataclass(frozen=True)
class Entry:
    """A row of the table: the module and the fields that make the variant, its usual input (h, w, c), its source."""

    module: type[nn.Module]
    input: tuple[int, ...]
    paper: str
    fields: Mapping[str, Any] = field(default_factory=dict)


def check_input(x: Array, *, dimensions: int = 2) -> None:
    """`InputError` unless x is a batch of images (b, *spatial, c) with so many spatial axes, none of them empty."""
    axes = {1: "(b, w, c)", 2: "(b, h, w, c)", 3: "(b, d, h, w, c)"}
    if dimensions not in axes:
        raise InputError(f"dimensions={dimensions}: expected 1, 2 or 3")
    if x.ndim != dimensions + 2 or 0 in x.shape[1:]:
        raise InputError(f"expected images {axes[dimensions]}, got shape {x.shape}; one image needs a batch axis of 1")


def call_options(module: nn.Module, *, train: bool) -> dict[str, Any]:
    """{"train": train} for a module whose call takes `train`, as all here do; nothing for others, such as a user's."""
    return {"train": train} if "train" in inspect.signature(module.__call__).parameters else {}
