"""How a piecewise linear network folds its input space: the linear regions on a line and in a plane (row A14).

Montufar et al. 2014: of ReLU networks with so many units the deep ones can have the most regions.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.analysis.program import Program, Ref, Step, operation_name, program
from jaxcnn.analysis.rows import MOVES
from jaxcnn.analysis.trace import trace
from jaxcnn.errors import InputError
from jaxcnn.files import replacing
from jaxcnn.types import Array, ArrayLike, PyTree

SPLIT = 0.487
"""Where an interval is divided: not in the middle, so that no point lies on a kink at k / 2^n."""
CHUNK, SLOPES = 256, 1 << 25
"""Inputs whose patterns are computed at once, and slopes of them that these may have, at most."""
LINEAR = MOVES | {"add", "add_any", "concatenate", "neg", "pad", "reduce_sum", "reduce_window_sum", "sub"}
PRODUCTS = frozenset(("conv_general_dilated", "dot_general", "mul"))
"""Linear too, if one operand alone comes from the input."""


@dataclass(frozen=True, eq=False)
class Plane:
    """Regions met on a grid of points a + s (b - a) + t (c - a), `values` s and t (n,) each.

    `region` (n, n) numbers the region of a point, rows being t; `output` (n, n) is the network's first output there.
    """

    values: np.ndarray
    region: np.ndarray
    output: np.ndarray

    @property
    def regions(self) -> int:
        return int(self.region.max()) + 1


def borders_on_line(
    module: nn.Module, a: ArrayLike, b: ArrayLike, *, variables: PyTree, resolution: float = 2**-18
) -> np.ndarray:
    """Where a + t (b - a) goes from one linear region of a piecewise linear network to the next: (r - 1,) t's in 0..1
    between r regions, for two inputs of the shape of one example.

    A region is where the activation pattern stays: which side of its kink every ReLU (or leaky ReLU, |x|, maximum) is
    on; the function is linear there, and two regions may happen to share one map. Such a region is convex. So if both
    ends of an interval have one pattern, all between has it too, and else the interval is bisected: what is found is
    all there is, but for pieces shorter than `resolution` of the segment, where float32 cannot tell either.

    Raises:
        InputError: inputs of different shapes; `resolution` outside (0, 1); a network that is not piecewise linear.
    """
    start, end = _same_shape(a, b)
    if not 0 < resolution < 1:
        raise InputError(f"resolution {resolution}: expected a number between 0 and 1")
    folds = _Folds(module, variables, start)
    folds.check(start, end)

    def patterns(t: Sequence[float]) -> list[bytes]:
        return folds(start + np.reshape(t, (-1, *[1] * start.ndim)) * (end - start))[0]

    first, last = patterns([0.0, 1.0])
    pieces = [(0.0, first, 1.0, last)] if first != last else []
    found = []
    while pieces:
        middles = [low + SPLIT * (high - low) for low, _, high, _ in pieces]
        halves = []
        for (low, left, high, right), t, pattern in zip(pieces, middles, patterns(middles), strict=True):
            halves += [(low, left, t, pattern)] * (left != pattern) + [(t, pattern, high, right)] * (pattern != right)
        found += [(low + high) / 2 for low, _, high, _ in halves if high - low < resolution]
        pieces = [half for half in halves if half[2] - half[0] >= resolution]
    borders = [0.0]
    for t in sorted(found):  # an end that lies on a kink is no region, nor is what rounding makes of a double kink
        borders += [t] * (borders[-1] + 2 * resolution < t < 1 - resolution)
    return np.array(borders[1:])


def regions_in_plane(
    module: nn.Module,
    a: ArrayLike,
    b: ArrayLike,
    c: ArrayLike,
    *,
    variables: PyTree,
    points: int = 200,
    margin: float = 0.0,
) -> Plane:
    """The regions of `borders_on_line` in the plane through three inputs, on `points`^2 points of the parallelogram.

    s and t go from -`margin` to 1 + `margin`. A lower bound: regions between the points of the grid are not seen, and
    where every point has its own, a smaller parallelogram tells more.

    Raises:
        InputError: inputs of different shapes; fewer than 2 points; a network that is not piecewise linear.
    """
    origin, first, second = _same_shape(a, b, c)
    if points < 2 or margin < 0:
        raise InputError(f"points {points}, margin {margin}: expected at least 2, and 0")
    folds = _Folds(module, variables, origin)
    folds.check(first, second)
    values = np.linspace(-margin, 1 + margin, points)
    t, s = (grid.reshape(-1, *[1] * origin.ndim) for grid in np.meshgrid(values, values, indexing="ij"))
    patterns, outputs = folds(origin + s * (first - origin) + t * (second - origin))
    number = {pattern: i for i, pattern in enumerate(dict.fromkeys(patterns))}
    region = np.array([number[pattern] for pattern in patterns]).reshape(points, points)
    return Plane(values, region, outputs.reshape(points, points))


def plot_regions(plane: Plane, path: Path, *, title: str) -> None:
    """The borders of the regions over the network's first output, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    panel = figure.subplots()
    picture = panel.pcolormesh(plane.values, plane.values, plane.output, cmap="cividis", shading="nearest")
    border = np.zeros(plane.region.shape, bool)
    border[:, 1:] |= plane.region[:, 1:] != plane.region[:, :-1]
    border[1:] |= plane.region[1:] != plane.region[:-1]
    panel.pcolormesh(plane.values, plane.values, np.where(border, 1.0, np.nan), cmap="gray_r", vmin=0, vmax=1)
    panel.set(xlabel="s, along b - a", ylabel="t, along c - a", aspect="equal")
    panel.set_title(f"{title}\n{plane.regions} regions in a + s (b - a) + t (c - a)", fontsize=11)
    figure.colorbar(picture, ax=panel, label="first output")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


class _Folds:
    """Which linear piece of a network an input lies on: the slopes of everything in it that can bend."""

    def __init__(self, module: nn.Module, variables: PyTree, example: np.ndarray) -> None:
        traced = trace(module, input=example.shape, dtype=jnp.float32, train=False)
        given = {name: variables.get(name) for name in traced.variables}
        if jax.tree.map(jnp.shape, given) != jax.tree.map(jnp.shape, traced.variables):
            raise InputError("variables: not those of this module at this input; give what module.init returned")
        self.program = program(traced)
        self.leaves = jax.tree.leaves(given)
        self.bending = _bending(self.program)
        slopes = jax.eval_shape(self._one, self.leaves, jnp.float32(example))[1]
        self.chunk = max(1, min(CHUNK, SLOPES // max(1, sum(one.size for one in slopes))))
        self._slopes = jax.jit(jax.vmap(self._one, in_axes=(None, 0)))

    def _one(self, leaves: Sequence[Array], x: Array) -> tuple[Array, list[Array]]:
        outputs, values = self.program.run(leaves, x[None])
        return jnp.ravel(outputs[0])[0], [_step_slopes(step, moved, values) for step, moved in self.bending]

    def __call__(self, x: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """The patterns of inputs (m, ...), equal where they lie on one piece, and the first outputs (m,)."""
        patterns, outputs = [], []
        for output, slopes in self._at(x):
            outputs.append(output)
            rows = np.concatenate([np.zeros((len(output), 1), np.float32), *slopes], 1)
            patterns += [hashlib.sha256(row).digest() for row in rows]
        return patterns, np.concatenate(outputs)

    def _at(self, x: np.ndarray) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        for begin in range(0, len(x), self.chunk):
            n = min(self.chunk, len(x) - begin)
            padded = np.float32(x[begin + np.arange(self.chunk) % n])
            yield jax.tree.map(lambda leaf, n=n: leaf[:n], jax.device_get(self._slopes(self.leaves, padded)))

    def check(self, a: np.ndarray, b: np.ndarray) -> None:
        """`InputError` where slopes change all along a segment: between all of several pairs of nearby points."""
        t = np.reshape([0.2, 0.201, 0.5, 0.501, 0.8, 0.801], (-1, *[1] * a.ndim))
        found = [slopes for _, slopes in self._at(a + t * (b - a))]
        for (step, _), *parts in zip(self.bending, *found, strict=True):
            slopes = np.concatenate(parts)
            if ((slopes[::2] != slopes[1::2]).mean(1) > 0.5).all():
                raise InputError(f"{operation_name(step.equation)} is not piecewise linear: it has no regions to count")


def _bending(program: Program) -> list[tuple[Step, list[int]]]:
    """The steps that are not linear in the input as they stand, with the operands that depend on it."""
    avals = program.avals()
    moving = program.depending([program.input])
    real = {ref for ref in moving if ref not in avals or jnp.issubdtype(avals[ref].dtype, jnp.floating)}
    found = []
    for step in program.steps:
        moved = [i for i, ref in enumerate(step.inputs) if isinstance(ref, Ref) and ref in real]
        name = step.equation.primitive.name
        linear = name in LINEAR or (name in PRODUCTS and len(moved) == 1)
        if moved and not linear and not real.isdisjoint(step.outputs):
            found.append((step, moved))
    return found


def _step_slopes(step: Step, moved: Sequence[int], values: Mapping[Ref, Any]) -> Array:
    """The step's derivative, transposed, of fixed random numbers, which tell one choice of a maximum from another."""
    operands = [values[ref] if isinstance(ref, Ref) else ref for ref in step.inputs]

    def compute(*given: Array) -> list[Array]:
        known = dict(zip(moved, given, strict=True))
        outputs = step.compute([known.get(i, operand) for i, operand in enumerate(operands)])
        return [one for one in outputs if jnp.issubdtype(one.dtype, jnp.floating)]

    outputs, back = jax.vjp(compute, *(operands[i] for i in moved))
    slopes = back([jax.random.uniform(jax.random.key(0), one.shape, one.dtype, 1, 2) for one in outputs])
    return jnp.concatenate([jnp.ravel(one) for one in slopes])


def _same_shape(*inputs: ArrayLike) -> list[np.ndarray]:
    arrays = [np.asarray(one, np.float64) for one in inputs]
    if len({one.shape for one in arrays}) > 1 or arrays[0].ndim < 1:
        raise InputError(f"inputs of shapes {[one.shape for one in arrays]}: expected that of one example for all")
    return arrays
