"""What the inputs of a layer do to learning: gradients of one sign, and the shape of the loss (row A14).

The shares of saturated and of dead units, of fresh weights or of those that a learning rate led to, are in
`signal.probe`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.errors import InputError
from jaxcnn.files import replacing
from jaxcnn.models.table import call_options
from jaxcnn.plots import BLACK, ORANGE
from jaxcnn.tree import flatten
from jaxcnn.types import Array, ArrayLike, PyTree

ARRIVED, MOST = 0.01, 10_000
"""Distance from the target, of the one at the start, at which descent ends; and steps after which it does anyway."""


class OneSigned(NamedTuple):
    """Of the weights `name` ("dense1/kernel"), with `inputs` to each unit: the `share` of the gradients by one unit's
    weights for one example whose components have one sign, among the `counted` ones that are not all 0."""

    name: str
    inputs: int
    share: float
    counted: int


def zigzag(module: nn.Module, x: ArrayLike, *, variables: PyTree | None = None, seed: int = 0) -> list[OneSigned]:
    """How many units have a weight gradient of one sign, per layer, for x (b, ...) and N(0, 1) gradients by outputs.

    The gradient by a dense unit's weights is its delta times its inputs: where those are all positive (after a sigmoid
    or ReLU; pixels in 0..1) all weights rise together or fall together, and descent in any other direction zigzags:
    share 1. Of n independent zero-centred inputs the share is 2^(1 - n). A convolution adds up positions, whose deltas
    may differ in sign. Components that are 0 go with either sign. Layers are all parameters of two axes or more, the
    last being that of the units; `variables` None are fresh ones from `seed`.

    Raises:
        InputError: no examples, or no such parameters.
    """
    x = jnp.asarray(x)
    if x.ndim < 2 or not len(x):
        raise InputError(f"an input of shape {x.shape}: expected a batch of examples, (b, ...)")
    keywords = call_options(module, train=False)
    if variables is None:
        variables = module.init(jax.random.key(seed), x[:1], **keywords)
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    @jax.jit
    def signs(params: PyTree, x: Array, key: Array) -> dict[str, Array]:
        def projected(params: PyTree) -> Array:
            outputs = jax.tree.leaves(module.apply({"params": params, **rest}, x, **keywords))
            real = [one for one in outputs if jnp.issubdtype(one.dtype, jnp.floating)]
            return jnp.stack([jnp.vdot(jax.random.normal(key, one.shape, one.dtype), one) for one in real]).sum()

        found = {}
        for name, gradient in flatten(jax.grad(projected)(params)).items():
            if gradient.ndim > 1:
                units = gradient.reshape(-1, gradient.shape[-1])
                some, same = (units != 0).any(0), (units >= 0).all(0) | (units <= 0).all(0)
                found[name] = jnp.stack([(some & same).sum(), some.sum(), len(units)])
        return found

    keys = jax.random.split(jax.random.key(seed), len(x))
    examples = [signs(variables.get("params", {}), x[i : i + 1], keys[i]) for i in range(len(x))]
    totals = {name: np.sum([one[name] for one in examples], 0) for name in examples[0]}
    if not totals:
        raise InputError(f"{type(module).__name__} has no parameters of two axes or more, so no weights of units")
    return [
        OneSigned(name, int(inputs) // len(x), float(same / max(some, 1)), int(some))
        for name, (same, some, inputs) in totals.items()
    ]


class Curvature(NamedTuple):
    """Of H = X^T X / n, the Hessian of a linear unit's mean (x w - y)^2 / 2: `eigenvalues` (d,) rising, their ratio
    `condition`, and `largest_rate` 2 / lambda_max, from which on gradient descent diverges."""

    eigenvalues: np.ndarray
    condition: float
    largest_rate: float


def curvature(x: ArrayLike) -> Curvature:
    """For inputs x (n, d); the condition is infinite where they do not span the space."""
    table = _table(x)
    values = np.linalg.eigvalsh(table.T @ table / len(table))
    least, most = float(values[0]), float(values[-1])
    spans = least > most * len(values) * np.finfo(np.float64).eps
    return Curvature(values, most / least if spans else np.inf, 2 / most if most > 0 else np.inf)


def prepared(x: ArrayLike) -> dict[str, np.ndarray]:
    """x (n, d) "raw", "centred" (column means 0) and "standardised" (also standard deviations 1; constants stay 0)."""
    table = _table(x)
    centred = table - table.mean(0)
    spread = centred.std(0)
    return {"raw": table, "centred": centred, "standardised": centred / np.where(spread > 0, spread, 1)}


@dataclass(frozen=True, eq=False)
class Descent:
    """The path `weights` (t + 1, d) of gradient descent for inputs x (n, d) to the unit's own weights `target` (d,);
    `arrived`: whether it came as near as `ARRIVED` says."""

    x: np.ndarray
    target: np.ndarray
    weights: np.ndarray
    arrived: bool

    @property
    def steps(self) -> int:
        return len(self.weights) - 1


def descend(x: ArrayLike, *, target: Sequence[float], learning_rate: float, batch: int | None = None) -> Descent:
    """Gradient descent of the mean (x w - y)^2 / 2 from w = 0, with y = x `target`, in float64.

    Each step takes the next `batch` examples of x (n, d) in turn (None: all). It ends where |w - target| is `ARRIVED`
    of |target|, where it has diverged, or after `MOST` steps.

    Raises:
        InputError: shapes that do not fit; a `batch` that does not divide n; a learning rate outside (0, inf).
    """
    table, goal = _table(x), np.asarray(target, np.float64)
    batches = _batches(table, len(table) if batch is None else batch)
    if goal.shape != table.shape[1:] or not goal.any():
        raise InputError(f"target {goal.tolist()}: expected {table.shape[1]} weights, not all 0")
    if not 0 < learning_rate < np.inf:
        raise InputError(f"learning_rate {learning_rate}: expected a positive number; inputs that are all 0 have none")
    path = [np.zeros_like(goal)]
    length, error = np.linalg.norm(goal), 1.0
    while ARRIVED < error < 1e6 and len(path) <= MOST:
        rows = batches[(len(path) - 1) % len(batches)]
        path.append(path[-1] - learning_rate * rows.T @ (rows @ (path[-1] - goal)) / len(rows))
        error = float(np.linalg.norm(path[-1] - goal) / length)
    return Descent(table, goal, np.stack(path), error <= ARRIVED)


def descents(
    x: ArrayLike, *, target: Sequence[float] = (1, -1), batch: int | None = None, share: float = 0.9
) -> dict[str, Descent]:
    """`descend` on x (n, d) "raw", "centred" and "standardised", each at a `share` of its own largest stable rate.

    With a `batch`, that of the steepest one. At batch 1, where x is all positive, a step raises both of two weights or
    lowers both, and to the weights (1, -1) it is a zigzag; `share` 0.5 then goes past no example's solution.
    """
    found = {}
    for name, table in prepared(x).items():
        size = len(table) if batch is None else batch
        stable = min(curvature(rows).largest_rate for rows in _batches(table, size))
        found[name] = descend(table, target=target, learning_rate=share * stable, batch=batch)
    return found


def plot_descents(descents: Mapping[str, Descent], path: Path, *, title: str) -> None:
    """Contours of the loss over two weights (`InputError` for more) and each path on them, as a PNG."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    if any(one.x.shape[1] != 2 for one in descents.values()):
        raise InputError("a picture of the loss needs inputs (n, 2)")
    figure = Figure(figsize=(5 * len(descents) + 0.5, 5.2), layout="constrained")
    figure.suptitle(title)
    for panel, (name, one) in zip(figure.subplots(1, len(descents), squeeze=False)[0], descents.items(), strict=True):
        low, high = one.weights.min(0).clip(max=one.target), one.weights.max(0).clip(min=one.target)
        margin = 0.35 * (high - low).max()
        middle, half = (low + high) / 2, (high - low).max() / 2 + margin
        first, second = (np.linspace(m - half, m + half, 160) for m in middle)
        grid = np.stack(np.meshgrid(first, second), -1) - one.target
        loss = np.einsum("ijk,kl,ijl->ij", grid, one.x.T @ one.x / len(one.x), grid) / 2
        levels = np.geomspace(loss.max() / 1e4, loss.max(), 13)
        panel.contour(first, second, loss, levels=levels, norm=LogNorm(), cmap="cividis", linewidths=0.9)
        panel.plot(*one.weights.T, "o-", color=ORANGE, markersize=2.5, linewidth=1, label="descent")
        panel.plot(*one.target, "*", color=BLACK, markersize=13, label="minimum")
        ended = f"{one.steps} steps" if one.arrived else f"not there after {one.steps} steps"
        panel.set(xlabel="weight 1", ylabel="weight 2", aspect="equal")
        panel.set_title(f"{name}\ncondition {curvature(one.x).condition:.3g}: {ended}", fontsize=11)
        panel.legend(fontsize=9, title="loss: x 2.2 a contour", title_fontsize=9)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _batches(table: np.ndarray, size: int) -> np.ndarray:
    if size < 1 or len(table) % size:
        raise InputError(f"batch {size}: expected a number that divides the {len(table)} examples")
    return table.reshape(-1, size, table.shape[1])


def _table(x: ArrayLike) -> np.ndarray:
    table = np.asarray(x, np.float64)
    if table.ndim != 2 or 0 in table.shape or not np.isfinite(table).all():
        raise InputError(f"inputs {table.shape}: expected (n, d) finite numbers, neither of them 0")
    return table
