"""Whether a function of images moves with its input, or stays: equivariance and invariance, measured (row A11)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from rich.table import Table

from jaxcnn.errors import InputError
from jaxcnn.layers.upsample import upsample_bilinear
from jaxcnn.types import Array

Function = Callable[[Array], Array]
"""(b, h, w, c) -> (b, h', w', c') or (b, c'); of a module, `functools.partial(module.apply, variables)`."""


@dataclass(frozen=True)
class Transformation:
    """T, as it acts on images (`of_input`) and on what a function makes of them (`of_output`, None: not defined)."""

    name: str
    of_input: Function
    of_output: Function | None


@dataclass(frozen=True)
class Comparison:
    """A function f under a transformation T, by the errors of `equivariance` and `invariance`.

    None where an error is not defined: T does not act on the output, or changes its size.
    """

    function: str
    transformation: str
    equivariance: float | None
    invariance: float | None


def translation(rows: int, columns: int, *, stride: int = 1) -> Transformation:
    """Down and to the right by so many pixels; what leaves the image comes in on the other side.

    The output of a function with `stride` moves by that many times less; by a shift that `stride` does not divide it
    does not move by whole elements, and the action on it is not defined.

    Raises:
        InputError: a stride below 1.
    """
    if stride < 1:
        raise InputError(f"stride {stride}: expected at least 1")

    def moved(by: int) -> Function:
        return lambda x: jnp.roll(x, (rows // by, columns // by), (1, 2))

    whole = rows % stride == 0 and columns % stride == 0
    return Transformation(f"translation by ({rows}, {columns})", moved(1), moved(stride) if whole else None)


def rotation(quarters: int = 1) -> Transformation:
    """By `quarters` of a turn, counter-clockwise: exact, without interpolation."""

    def turned(x: Array) -> Array:
        return jnp.rot90(x, quarters, axes=(1, 2))

    return Transformation(f"rotation by {90 * quarters} degrees", turned, turned)


def scaling(factor: int = 2) -> Transformation:
    """Enlarged `factor` times, bilinearly."""

    def enlarged(x: Array) -> Array:
        return upsample_bilinear(x, factor=factor)

    return Transformation(f"scaling by {factor}", enlarged, enlarged)


def wrapped(function: Function, *, margin: int) -> Function:
    """`function` of the image continued periodically by `margin` pixels on every side.

    With convolutions that have no padding and a receptive field of 2 margin + 1 and stride 1, (b, h, w, c) goes to
    (b, h, w, c'), and translation has no border.
    """
    return lambda x: function(jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="wrap"))


def equivariance(function: Function, x: Array, transformation: Transformation, *, crop: int = 0) -> float:
    """||T(f(x)) - f(T(x))|| / ||f(T(x))|| for images x (b, h, w, c): 0 for an equivariant f.

    `crop` elements are cut off every border of the outputs, where padding and what came in from the other side tell.
    On outputs without positions (b, c') T acts as the identity, so that their error is that of invariance.

    Raises:
        InputError: x is no batch of images; `crop` below 0, or nothing is left after it; T is not defined on f(x),
            or T(f(x)) and f(T(x)) differ in size, as for convolutions without padding under scaling.
    """
    error = _compare(function, x, transformation, crop)[0]
    if error is None:
        raise InputError(f"{transformation.name} has no action on the output whose size is that of f(T(x)): "
                         "give a shift that the stride divides, and pad convolutions")  # fmt: skip
    return error


def invariance(function: Function, x: Array, transformation: Transformation, *, crop: int = 0) -> float:
    """||f(x) - f(T(x))|| / ||f(T(x))|| for images x (b, h, w, c): 0 for an invariant f; `crop` as in `equivariance`.

    Raises:
        InputError: x is no batch of images; `crop` below 0, or nothing is left after it; f(x) and f(T(x)) differ in
            size.
    """
    error = _compare(function, x, transformation, crop)[1]
    if error is None:
        raise InputError(f"{transformation.name} changes the size of the output: invariance needs one size")
    return error


def compare(
    functions: Mapping[str, Function], x: Array, transformations: Sequence[Transformation], *, crop: int = 0
) -> list[Comparison]:
    """Every function under every transformation, for images x (b, h, w, c).

    Translations carry the stride of the functions: compare functions of one stride at a time.

    Raises:
        InputError: x is no batch of images; `crop` below 0, or nothing is left after it.
    """
    return [
        Comparison(name, transformation.name, *_compare(function, x, transformation, crop))
        for name, function in functions.items()
        for transformation in transformations
    ]


def table(comparisons: Sequence[Comparison]) -> Table:
    """For people: one line per function and transformation."""
    shown = Table(caption="relative errors: 0 is equivariant, or invariant")
    for name in ("function", "transformation"):
        shown.add_column(name, overflow="fold")
    for name in ("equivariance", "invariance"):
        shown.add_column(name, justify="right")
    for row in comparisons:
        errors = ("" if error is None else f"{error:.3g}" for error in (row.equivariance, row.invariance))
        shown.add_row(row.function, row.transformation, *errors)
    return shown


def _compare(function: Function, x: Array, transformation: Transformation, crop: int) -> tuple[float | None, ...]:
    """The errors of equivariance and of invariance."""
    if x.ndim != 4 or not x.size:
        raise InputError(f"expected images (b, h, w, c), got shape {x.shape}")
    plain, moved = function(x), function(transformation.of_input(x))
    action = transformation.of_output if plain.ndim == 4 else lambda y: y
    carried = None if action is None else action(plain)
    return _error(carried, moved, crop), _error(plain, moved, crop)


def _error(expected: Array | None, found: Array, crop: int) -> float | None:
    if expected is None or expected.shape != found.shape:
        return None
    if found.ndim == 4 and crop:
        if not 0 < 2 * crop < min(found.shape[1:3]):
            raise InputError(f"crop {crop} of an output {found.shape}: expected at least 0, and that something is left")
        expected, found = (y[:, crop:-crop, crop:-crop] for y in (expected, found))
    difference, size = jnp.linalg.norm((expected - found).ravel()), jnp.linalg.norm(found.ravel())
    return float(difference / jnp.where(size > 0, size, 1))
