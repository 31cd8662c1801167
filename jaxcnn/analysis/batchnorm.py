"""The statistics of BatchNorm against the data: set anew, compared, and folded away (rows A6, A7 and L5)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import lax
from jax.sharding import Mesh

from jaxcnn import parallel
from jaxcnn.analysis.fold import Comparison, Folded, compare, fold, largest_difference
from jaxcnn.analysis.norms import Network, check_variables, is_batch_norm, look, normalised, returned_dtype
from jaxcnn.analysis.program import Ref
from jaxcnn.data.loader import eval_batches
from jaxcnn.errors import InputError, unknown
from jaxcnn.models.table import call_options
from jaxcnn.tree import flatten
from jaxcnn.types import Array, ArrayLike, Batch, PyTree

__all__ = [
    "MODES", "Comparison", "Drift", "Folded", "Recalibrated", "Statistics", "compare", "drift", "fold",
    "largest_difference", "recalibrate",
]  # fmt: skip

MODES = ("exact", "one_pass")

PROGRAMS = 8
"""The passes of the exact mode share at most so many compiled programs, each up to the deepest norm of its passes."""

Batches = Callable[[], Iterable[Batch]]
Progress = Callable[[int, int], None]
"""(passes over the data that are done, all passes)."""


class Statistics(NamedTuple):
    """Mean and variance (divisor N) per channel, (c,) float64."""

    mean: np.ndarray
    var: np.ndarray


@dataclass(frozen=True)
class Recalibrated:
    """`variables` with the new statistics, which `statistics` has in float64 by the norm's path; `passes` went over
    `examples` each."""

    variables: dict[str, PyTree]
    mode: str
    statistics: dict[str, Statistics]
    examples: int
    passes: int


@dataclass(frozen=True)
class Drift:
    """A norm's moving statistics against the data's, in evaluation.

    `ratio`, `smallest`, `largest`: mean, minimum and maximum over channels of (data's variance + epsilon) / (moving
    variance + epsilon); 1 is no shift. `shift`, `largest_shift`: mean and maximum of |data's mean - moving mean| in
    standard deviations sqrt(data's variance + epsilon).
    """

    name: str
    ratio: float
    smallest: float
    largest: float
    shift: float
    largest_shift: float


def recalibrate(
    module: nn.Module,
    variables: Mapping[str, PyTree],
    batches: Batches | ArrayLike,
    *,
    mode: str = "exact",
    batch_size: int = 256,
    mesh: Mesh | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recalibrated:
    """Sets the running statistics of every BatchNorm that the network calls to those of the data.

    "exact": layer by layer. A pass over the data in evaluation mode gives the inputs' mean and variance of the norms
    whose upstream norms have their new statistics already; norms that do not depend on each other share a pass. So
    the result is what the network itself sees in evaluation, over all examples together, for any batch size and any
    number of devices, to the rounding of the network's own arithmetic: sums are float64.

    "one_pass", the usual precise BatchNorm (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3): one
    pass in training mode, in which every norm normalises by its batch's own statistics, whatever its `statistics`
    say, and dropout drops (by `seed`). The batches' means and variances are put together by the total variance,
    Var = E[Var_batch] + Var[E_batch], weighted by their examples. It depends on the batch size.

    `batches` returns, each time it is called, the same batches {"image": (b, h, w, c), "mask": (b,)}, as
    `jaxcnn.data.loader.eval_batches` does; without a mask all examples count. Examples with mask 0 count in no
    statistics of either mode, nor do they move what others are normalised by. Or it is an array (n, h, w, c), taken
    `batch_size` examples at a time and divided over the devices of `mesh` (all by default). Images are what the
    module takes: preprocessed, not augmented.

    Raises:
        InputError: unknown mode, no BatchNorm or no example; statistics that are not finite; a norm called several
            times, or not on the last axis; in the exact mode, one inside a loop of the user's (`nn.scan`).
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    read = _batches(batches, batch_size, mesh)
    network, norms = _network(module, variables, read, train=mode == "one_pass")
    groups = _groups(network, norms) if mode == "exact" else [norms]
    flat = dict(check_variables(network, variables))
    statistics: dict[str, Statistics] = {}
    examples, done = 0, 0
    for part in np.array_split(np.arange(len(groups)), min(PROGRAMS, len(groups))):
        paths = tuple(path for i in part for path in groups[i])
        step = _step(module, paths, train=mode == "one_pass")
        for i in part:
            found, examples = _over_data(step, flat, read(), groups[i], mesh, seed)
            for path, one in found.items():
                for name, value in one._asdict().items():
                    key = f"batch_stats/{path}/{name}"
                    flat[key] = jnp.asarray(value.astype(flat[key].dtype))
            statistics |= found
            done += 1
            if progress is not None:
                progress(done, len(groups))
    return Recalibrated(unflatten_dict(flat, sep="/"), mode, statistics, examples, len(groups))


def drift(
    module: nn.Module,
    variables: Mapping[str, PyTree],
    batches: Batches | ArrayLike,
    *,
    batch_size: int = 256,
    mesh: Mesh | None = None,
) -> tuple[Drift, ...]:
    """How far what each BatchNorm sees in evaluation is from what it has learnt in training, in the order of calls.

    Dropout before a norm makes the difference that Li et al. 2018 ("Understanding the Disharmony between Dropout and
    Batch Normalization by Variance Shift") call the variance shift: for inputs of mean 0 the ratio is the keep rate
    p, and 3 / (3 + beta^2) for uniform dropout. `batches`, `batch_size` and `mesh` are those of `recalibrate`.

    Raises:
        InputError: as `recalibrate`.
    """
    read = _batches(batches, batch_size, mesh)
    network, norms = _network(module, variables, read, train=False)
    flat = check_variables(network, variables)
    found, _ = _over_data(_step(module, norms, train=False), flat, read(), norms, mesh, 0)
    return tuple(_drift(path, one, flat, network.found[path].epsilon) for path, one in found.items())


def _drift(path: str, data: Statistics, flat: Mapping[str, Any], epsilon: float) -> Drift:
    mean, var = (np.asarray(flat[f"batch_stats/{path}/{name}"], np.float64) for name in ("mean", "var"))
    ratio = (data.var + epsilon) / (var + epsilon)
    shift = np.abs(data.mean - mean) / np.sqrt(data.var + epsilon)
    return Drift(path, *(float(x) for x in (ratio.mean(), ratio.min(), ratio.max(), shift.mean(), shift.max())))


def _batches(batches: Batches | ArrayLike, batch_size: int, mesh: Mesh | None) -> Batches:
    if callable(batches):
        return batches
    images = np.asarray(batches)
    if batch_size < 1 or images.ndim < 2 or not len(images):
        raise InputError(f"images {images.shape} in batches of {batch_size}: expected examples (n, h, w, c)")
    labels = np.zeros(len(images), np.int32)
    return eval_batches(images, labels, batch_size=batch_size, mesh=mesh or parallel.make_mesh())


def _network(
    module: nn.Module, variables: Mapping[str, PyTree], read: Batches, *, train: bool
) -> tuple[Network, list[str]]:
    """The network for examples like the first, and the norms that it calls, all of which can be measured."""
    first = next(iter(read()), None)
    if first is None:
        raise InputError("no batch of data: statistics need at least one example")
    images = first["image"]
    network = look(module, input=tuple(images.shape[1:]), dtype=images.dtype, train=train)
    check_variables(network, variables)
    norms = [path for path in network.norms if network.runs(path)]
    if not norms:
        raise InputError(f"{type(module).__name__} has no BatchNorm: nothing keeps running statistics")
    for path in norms:
        norm, calls = network.found[path], len(network.calls(path))
        if not norm.known:
            raise InputError(f"{path} is a {norm.kind}: expected the BatchNorm of jaxcnn.layers or flax.linen")
        if calls > 1:
            raise InputError(f"{path} is called {calls} times and keeps one set of statistics: give each call a norm")
    return network, norms


def _groups(network: Network, norms: Sequence[str]) -> list[list[str]]:
    """The norms in the order of passes: those of a group depend on norms of earlier groups alone."""
    for path in norms:
        if not network.calls(path):
            raise InputError(f"{path} is inside a loop, whose rounds share one program: use mode 'one_pass'")
    paths = {network.calls(path)[0].number: path for path in norms}
    above: dict[Ref, int] = {}
    passes: dict[str, int] = {}
    for step in network.program.steps:
        depth = max((above.get(ref, 0) for ref in step.inputs if isinstance(ref, Ref)), default=0)
        if step.call in paths:
            passes[paths[step.call]] = max(passes.get(paths[step.call], 0), depth)
        above.update(dict.fromkeys(step.outputs, depth + (step.returned in paths)))
    return [[path for path, n in passes.items() if n == depth] for depth in sorted(set(passes.values()))]


Step = Callable[[PyTree, Array, Any, Array], dict[str, tuple[Array, Array]]]
"""(variables, images, mask, key) -> {path: (mean, var)} of the batch, each as a sum of two float32 numbers (c, 2)."""


def _step(module: nn.Module, paths: Sequence[str], *, train: bool) -> Step:
    """What the norms see; the compiler leaves out what lies behind the last of `paths`."""
    options, exact = call_options(module, train=train), None if train else "highest"

    @jax.jit
    def step(variables: PyTree, x: Array, mask: Any, key: Array) -> dict[str, tuple[Array, Array]]:
        mutable = [collection for collection in variables if collection != "params"]
        with nn.intercept_methods(partial(_observe, mask, train)), jax.default_matmul_precision(exact):
            _, moved = module.apply(variables, x, rngs=key, mutable=mutable, **options)
        held = flatten(moved)
        return {path: (held[f"batch_stats/{path}/mean"], held[f"batch_stats/{path}/var"]) for path in paths}

    return step


def _observe(
    mask: Any, train: bool, call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """Has every norm leave the statistics of its input where it keeps its own, which loops and such hand on."""
    module: Any = context.module
    if context.method_name != "__call__" or not is_batch_norm(module):
        return call(*args, **kwargs)
    x = normalised(args, kwargs)
    if getattr(module, "axis", -1) not in (-1, (-1,), x.ndim - 1, (x.ndim - 1,)):
        raise InputError(f"{'/'.join(module.path)}: its statistics are over axis {module.axis}, expected the last one")
    mean, var = _moments(x, mask)
    y = _normalise(module, x, mean.sum(-1), var.sum(-1)) if train else call(*args, **kwargs)
    module.put_variable("batch_stats", "mean", mean)
    module.put_variable("batch_stats", "var", var)
    return y


def _normalise(module: Any, x: Array, mean: Array, var: Array) -> Array:
    """Training's normalisation, of all real examples together."""
    last = (1,) * (x.ndim - 1) + (-1,)
    gain = lax.rsqrt(var + module.epsilon) * module.get_variable("params", "scale", jnp.ones_like(var))
    bias = module.get_variable("params", "bias", jnp.zeros_like(mean))
    y = (x - mean.reshape(last)) * gain.reshape(last) + bias.reshape(last)
    return y.astype(returned_dtype(module, x))


def _moments(x: Array, mask: Any) -> tuple[Array, Array]:
    """Mean and variance over all but the last axis of x (b, ..., c), of the examples with mask (b,) 1.

    The sums are float64. In single precision a mean of ten standard deviations errs by more than 1e-6 of one. JAX has
    float64 inside this context only, so they leave it as two float32 numbers, (c, 2).
    """
    axes = tuple(range(x.ndim - 1))
    with jax.enable_x64(True):
        wide = lax.convert_element_type(x, np.float64)
        weight = lax.convert_element_type(mask, np.float64)
        count = lax.reduce_sum(weight, (0,)) * np.float64(np.prod(x.shape[1:-1], dtype=np.int64))
        weight = lax.broadcast_in_dim(weight, x.shape, (0,))
        mean = lax.reduce_sum(wide * weight, axes) / count
        off = wide - lax.broadcast_in_dim(mean, x.shape, (x.ndim - 1,))
        var = lax.reduce_sum(off * off * weight, axes) / count
        return _two_parts(mean), _two_parts(var)


def _two_parts(value: Array) -> Array:
    high = lax.convert_element_type(value, np.float32)
    low = lax.convert_element_type(value - lax.convert_element_type(high, np.float64), np.float32)
    return lax.concatenate([lax.expand_dims(part, (1,)) for part in (high, low)], 1)


def _over_data(
    step: Step, flat: Mapping[str, Any], batches: Iterable[Batch], paths: Sequence[str], mesh: Mesh | None, seed: int
) -> tuple[dict[str, Statistics], int]:
    """The statistics of what the norms at `paths` see over all batches, and the number of examples."""
    variables = unflatten_dict(dict(flat), sep="/")
    variables = jax.device_put(variables, parallel.replicated(mesh)) if mesh else jax.device_put(variables)
    total: dict[str, Statistics] = {}
    examples = 0
    for count, batch in _one_behind(step, variables, batches, paths, seed):
        if not count:
            continue
        examples += count
        for path, one in batch.items():
            total[path] = _together(total[path], one, count / examples) if path in total else one
    if not examples:
        raise InputError("no batch of data: statistics need at least one example")
    for path, one in total.items():
        if not all(np.isfinite(part).all() for part in one):
            raise InputError(f"{path}: the statistics are not finite; look for NaN in the images and the parameters")
    return total, examples


def _together(all_before: Statistics, new: Statistics, share: float) -> Statistics:
    """Var = E[Var] + Var[E] of two parts, of which the new one has this share of the examples."""
    off = new.mean - all_before.mean
    var = (1 - share) * all_before.var + share * new.var + share * (1 - share) * off**2
    return Statistics(all_before.mean + share * off, var)


def _one_behind(
    step: Step, variables: PyTree, batches: Iterable[Batch], paths: Sequence[str], seed: int
) -> Iterator[tuple[int, dict[str, Statistics]]]:
    """Of each batch its number of real examples and statistics, fetched while the device works on the next one."""
    waiting = None
    for index, batch in enumerate(batches):
        mask = batch.get("mask", np.ones(len(batch["image"]), np.float32))
        found = step(variables, batch["image"], mask, jax.random.fold_in(jax.random.key(seed), index))
        if waiting is not None:
            yield _fetched(*waiting)
        waiting = (mask, {path: found[path] for path in paths})
    if waiting is not None:
        yield _fetched(*waiting)


def _fetched(mask: Any, found: dict[str, tuple[Array, Array]]) -> tuple[int, dict[str, Statistics]]:
    whole = {
        path: Statistics(*(np.asarray(part, np.float64).sum(-1) for part in parts))
        for path, parts in jax.device_get(found).items()
    }
    return int(np.asarray(mask).sum()), whole
