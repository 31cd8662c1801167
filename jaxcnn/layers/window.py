"""What convolution and pooling share: windows, strides and padding per axis, and the size that comes out."""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Literal

import numpy as np

from jaxcnn.errors import InputError

Padding = int | Sequence[int] | Sequence[tuple[int, int]] | Literal["VALID", "SAME"]
"""An integer for both sides of every axis, one integer or pair (before, after) per axis, "VALID": none, or, for
convolutions of stride 1, "SAME": as much as keeps the size."""

Pairs = tuple[tuple[int, int], ...]

_as_written: ContextVar[bool] = ContextVar("as_written", default=False)


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Inside, every layer is traced as the one operation that it is, in place of an equal faster form.

    So a convolution is one `conv_general_dilated` and a maximum over windows one `reduce_window_max`, and blocks
    run one after the other. For whoever reads the jaxpr (operation counts, receptive fields), names what lies
    inside (features) or follows NaNs through a network. Holds for what is traced inside: a function that was
    jitted and called before keeps its trace.
    """
    token = _as_written.set(True)
    try:
        yield
    finally:
        _as_written.reset(token)


def traced_as_written() -> bool:
    """Whether this trace is inside `as_written`."""
    return _as_written.get()


def output_size(
    size: int, *, kernel: int, stride: int = 1, padding: int | tuple[int, int] = 0, dilation: int = 1
) -> int:
    """floor((size + low + high - dilation (kernel - 1) - 1) / stride) + 1, for one axis.

    `padding` is the zeros on both sides, or (low, high). At most 0 where the kernel is larger than the input.
    """
    low, high = (padding, padding) if isinstance(padding, int) else padding
    return (size + low + high - dilation * (kernel - 1) - 1) // stride + 1


def per_axis(what: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """`value` for each of `rank` axes; `what` begins the error: "pooling window".

    Raises:
        InputError: not a positive integer, nor `rank` of them.
    """
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank or min(values) < 1:
        raise InputError(f"{what} {value!r}: expected a positive integer or {rank} of them")
    return values


def pairs(what: str, padding: Padding, rank: int) -> Pairs:
    """`padding` as (before, after) for each of `rank` axes; `what` begins the error: "pooling padding".

    Raises:
        InputError: anything but "VALID", integers of at least 0 or pairs of them ("SAME" is the caller's).
    """
    if padding == "VALID":
        return ((0, 0),) * rank
    values = (padding,) * rank if isinstance(padding, int) else padding
    both = [np.ravel(v).tolist() * (2 if np.ndim(v) == 0 else 1) for v in values]
    whole = all(type(v) is int and v >= 0 for pair in both for v in pair)
    if isinstance(padding, str) or len(both) != rank or any(len(pair) != 2 for pair in both) or not whole:
        raise InputError(
            f"{what} {padding!r}: expected 'VALID', an integer of at least 0, "
            f"or {rank} such integers or pairs (before, after)"
        )
    return tuple((low, high) for low, high in both)
