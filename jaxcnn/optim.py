"""Learning-rate schedules as fractions of a run, any Optax optimiser by name, and averages of weights."""

import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcnn.alrao import alrao
from jaxcnn.errors import InputError, unknown
from jaxcnn.tree import path_pattern
from jaxcnn.types import Array, PyTree

# --- schedules ---------------------------------------------------------------------------------------------


def constant(learning_rate: float, steps: int) -> optax.Schedule:
    """The same rate at every step."""
    return lambda step: jnp.full(jnp.shape(step), learning_rate, _float())


def staircase(
    learning_rate: float, steps: int, *, boundaries: Sequence[float] | float | str = (0.5, 0.75), factor: float = 0.1
) -> optax.Schedule:
    """Multiplied by `factor` at each of `boundaries` (He et al. 2016: at 32k and 48k of 64k steps).

    On the command line they are written with commas: 0.5,0.75.
    """
    if isinstance(boundaries, str):
        boundaries = [_parsed(part) for part in boundaries.split(",")]
    elif isinstance(boundaries, int | float):
        boundaries = [boundaries]
    boundaries = [_number("a boundary", boundary, high=1) for boundary in boundaries]
    if any(first >= second for first, second in itertools.pairwise(boundaries)):
        raise InputError(f"boundaries {tuple(boundaries)}: expected increasing fractions of the run")
    factor = _number("factor", factor)
    starts = [round(boundary * steps) for boundary in boundaries]
    rates = [learning_rate * factor**i for i in range(len(starts) + 1)]

    def schedule(step: Any) -> Array:
        return jnp.asarray(rates, _float())[_points_passed(starts, step)]

    return schedule


def cosine(learning_rate: float, steps: int, *, final: float = 0.0) -> optax.Schedule:
    """Half a cosine, from the rate to the fraction `final` of it at the end (Loshchilov & Hutter 2017)."""
    final = _number("final", final, high=1)

    def schedule(step: Any) -> Array:
        time = jnp.clip(jnp.asarray(step, _float()) / steps, 0, 1)
        share = (1 + jnp.cos(jnp.pi * time)) / 2
        return learning_rate * (share + final * (1 - share))

    return schedule


def cyclic(learning_rate: float, steps: int, *, cycles: int = 1, low: float = 0.1) -> optax.Schedule:
    """`cycles` equal triangles, from the fraction `low` of the rate to the rate and back (Smith 2017)."""
    low = _number("low", low, high=1)
    if isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 1:
        raise InputError(f"cycles is {cycles!r}: expected a whole number of at least 1")
    ends = (low * learning_rate, learning_rate)
    return _linear_between([(round(i * steps / (2 * cycles)), ends[i % 2]) for i in range(2 * cycles + 1)])


def triangle(
    learning_rate: float, steps: int, *, start: float = 0.2, peak: float = 0.23, end: float = 0.07
) -> optax.Schedule:
    """One cycle: from the fraction `start` of the rate to the rate at `peak` of the run, then to `end` of it.

    The defaults are airbench's (Jordan 2024); a one-cycle policy is any of these with `end` near 0.
    """
    start, end = _number("start", start, high=1), _number("end", end, high=1)
    top = round(_number("peak", peak, high=1) * steps)
    return _linear_between([(0, start * learning_rate), (top, learning_rate), (steps, end * learning_rate)])


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": constant,
    "steps": staircase,
    "cosine": cosine,
    "cyclic": cyclic,
    "triangle": triangle,
}


def make_schedule(
    name: str, *, learning_rate: float, steps: int, warmup: float = 0.0, **options: Any
) -> optax.Schedule:
    """The schedule `name` of SCHEDULES over a run of `steps`: a function of the step, traced or not.

    `learning_rate` is the highest rate. Points in time are fractions of the run, rounded to whole steps, and
    the rate there is exact; from `steps` on it stays at its end. For the first w = round(warmup * steps)
    steps the rate is also multiplied by (step + 1) / (w + 1), which moves no later point (Goyal et al. 2017
    start from a chosen rate instead). `options` are those of the schedule's own function.
    Raises InputError for an unknown name or option and for values outside their ranges.
    """
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    learning_rate = _number("learning_rate", learning_rate)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"a schedule over {steps!r} steps: expected a whole number of at least 1")
    accepted = list(inspect.signature(SCHEDULES[name]).parameters)[2:]
    _check_options(f"schedule {name!r}", options, accepted)
    schedule = SCHEDULES[name](learning_rate, steps, **options)
    warmup_steps = round(_number("warmup", warmup, high=1) * steps)
    if not warmup_steps:
        return schedule

    def warmed_up(step: Any) -> Array:
        share = jnp.minimum(jnp.asarray(step + 1, _float()) / (warmup_steps + 1), 1)
        return jnp.multiply(schedule(step), share)

    return warmed_up


def _linear_between(points: Sequence[tuple[int, float]]) -> optax.Schedule:
    """Straight lines between (step, rate) points, exact at each; where two share a step, the later holds."""
    ends, rates = zip(*points, strict=True)

    def schedule(step: Any) -> Array:
        step = jnp.clip(jnp.asarray(step, int), ends[0], ends[-1])
        segment = _points_passed(ends[1:-1], step)
        left, right = jnp.asarray(ends)[segment], jnp.asarray(ends)[segment + 1]
        time = (step - left).astype(_float()) / jnp.maximum(right - left, 1).astype(_float())
        first, last = jnp.asarray(rates, _float())[segment], jnp.asarray(rates, _float())[segment + 1]
        return first * (1 - time) + last * time  # unlike first + time * (last - first), exact at both ends

    return schedule


def _points_passed(points: Sequence[int], step: Any) -> Array:
    """How many of the increasing `points` in time the step has reached."""
    reached = jnp.asarray(step, int)[..., None] >= jnp.asarray(points, int)
    return reached.sum(-1)


def _float() -> jnp.dtype:
    """float32, or float64 where it is enabled."""
    return jnp.result_type(float)


# --- optimisers --------------------------------------------------------------------------------------------


@functools.cache
def optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Optimisers by name: the public functions of Optax of a learning rate that are whole optimisers, and Alrao."""
    functions = [*inspect.getmembers(optax, inspect.isfunction), ("alrao", alrao)]
    return {
        name: function
        for name, function in functions
        if not name.startswith(("_", "scale_by_")) and "learning_rate" in inspect.signature(function).parameters
    }


def make_optimizer(
    name: str,
    *,
    schedule: optax.Schedule,
    weight_decay: float = 0.0,
    decay_mask: str = r"kernel$",
    clip_norm: float | None = None,
    freeze: str = "",
    rates: Mapping[str, float] | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    """The optimiser `name` of `optimizers()`, with clipping before it and weight decay by parameter path.

    Weight decay applies to floating-point parameters in whose path, joined by "/", the regular expression
    `decay_mask` is found. Optimisers with a masked decay of their own (adamw, lamb, lion, lars, ...) get it,
    in the meaning it has there, and never Optax's default; for all others (sgd, adam, rmsprop, ...) it is L2,
    weight_decay * w added to the gradient, as in PyTorch. For plain SGD that is w <- (1 - tau) w with tau =
    rate * weight_decay; with momentum or Adam the two differ (Loshchilov & Hutter 2019).
    `clip_norm` bounds the global norm of the gradient, before decay. `options` go to the optimiser as they are.

    Parameters in whose path `freeze` is found never move and have no state; the norm that is clipped is that of the
    others. `rates` maps regular expressions to factors of the learning rate (of the whole update, decay included):
    the first one that is found in a parameter's path counts, and others have 1.

    Raises InputError for an unknown optimiser or option, values outside their ranges, optimisers that take
    no schedule or need more than gradients and parameters (lbfgs); at `init`, for a positive decay whose
    mask finds nothing, and for other expressions that do, or a `freeze` that leaves nothing to train.
    """
    made = _whole_optimizer(name, schedule, weight_decay, decay_mask, clip_norm, options)
    if freeze:
        labels = functools.partial(_moving_or_frozen, pattern=path_pattern("freeze", freeze))
        made = optax.partition({"moving": made, "frozen": optax.set_to_zero()}, labels)
    return optax.chain(made, _scaled(rates)) if rates else made


def _whole_optimizer(
    name: str,
    schedule: optax.Schedule,
    weight_decay: float,
    decay_mask: str,
    clip_norm: float | None,
    options: Mapping[str, Any],
) -> optax.GradientTransformation:
    """Clipping, decay and the optimiser, for all parameters alike."""
    if name not in optimizers():
        raise unknown("optimizer", name, optimizers())
    weight_decay = _number("weight_decay", weight_decay)
    factory = optimizers()[name]
    parameters = list(inspect.signature(factory).parameters)
    decay_names = [parameter for parameter in parameters if parameter in _DECAY_NAMES]
    _check_options(f"optimizer {name!r}", options, [p for p in parameters if p not in ("learning_rate", *decay_names)])
    _check_usable(name, factory, options)
    mask = functools.partial(_decayed, pattern=path_pattern("decay mask", decay_mask), required=weight_decay > 0)
    if clip_norm is not None and _number("clip_norm", clip_norm) == 0:
        raise InputError("clip_norm is 0, which stops all learning: expected a positive number, or None")
    clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    if len(decay_names) == 2:
        decay, own_mask = decay_names
        return optax.chain(*clip, factory(schedule, **{decay: weight_decay, own_mask: mask}, **options))
    if decay_names and weight_decay > 0:
        raise InputError(f"optimizer {name!r} decays all parameters alike and takes no mask: use weight_decay=0")
    l2 = [optax.add_decayed_weights(weight_decay, mask)] if weight_decay > 0 else []
    return optax.chain(*clip, *l2, factory(schedule, **options))


_DECAY_NAMES = ("weight_decay", "weight_decay_rate", "mask", "weight_decay_mask")
"""What Optax calls a decay and its mask; every constructor that has both names the decay first."""


def _check_usable(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """One abstract update: finds before training what a signature does not tell."""

    def update(parameters: PyTree) -> PyTree:
        transformation = factory(optax.constant_schedule(0.1), **options)
        return transformation.update(parameters, transformation.init(parameters), parameters)[0]

    try:
        jax.eval_shape(update, {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)})
    except InputError:
        raise
    except Exception as error:  # each optimiser fails in its own way
        raise InputError(
            f"optimizer {name!r} with options {dict(options)} failed on a trial update: {error}; expected one "
            "that takes a learning-rate schedule and needs only gradients and parameters, and valid options"
        ) from error


def _decayed(parameters: PyTree, *, pattern: re.Pattern[str], required: bool) -> PyTree:
    """True for each parameter to decay. Raises InputError if there is none although one is `required`."""
    found = jax.tree.map(
        lambda found, leaf: found and bool(jnp.issubdtype(leaf.dtype, jnp.inexact)),
        _found(parameters, pattern),
        parameters,
    )
    if required:
        _check_found(found, f"weight decay on {pattern.pattern!r}", "change the mask or set weight_decay=0")
    return found


def _moving_or_frozen(parameters: PyTree, *, pattern: re.Pattern[str]) -> PyTree:
    """The label of each parameter for `optax.partition`."""
    found = _found(parameters, pattern)
    _check_found(found, f"freeze {pattern.pattern!r}", "change the expression or leave it out")
    if all(jax.tree.leaves(found)):
        raise InputError(f"freeze {pattern.pattern!r} finds every parameter: nothing is left to train")
    return jax.tree.map(lambda frozen: "frozen" if frozen else "moving", found)


def _scaled(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by the factor of the first expression that its path holds."""
    factors = [(path_pattern("rates", text), _number(f"the rate of {text!r}", rate)) for text, rate in rates.items()]

    def init(params: PyTree) -> optax.EmptyState:
        for pattern, _ in factors:
            _check_found(_found(params, pattern), f"rates {pattern.pattern!r}", "change the expression")
        return optax.EmptyState()

    def scale(path: Any, leaf: Array) -> Array:
        return leaf * next((factor for pattern, factor in factors if pattern.search(_name(path))), 1.0)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(init, update)


def _found(parameters: PyTree, pattern: re.Pattern[str]) -> PyTree:
    """For each parameter, whether the pattern is found in its path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: pattern.search(_name(path)) is not None, parameters)


def _check_found(found: PyTree, what: str, remedy: str) -> None:
    if not any(jax.tree.leaves(found)):
        paths, _ = jax.tree_util.tree_flatten_with_path(found)
        names = ", ".join(_name(path) for path, _ in paths[:5])
        raise InputError(f"{what} finds no parameter among {names}, ...: {remedy}")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


# --- averages of weights -----------------------------------------------------------------------------------


def ema_start(value: PyTree) -> PyTree:
    """The average before the second value: a copy of the first, floating-point leaves at least float32."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, _wide(leaf)), value)


def ema(average: PyTree, value: PyTree, decay: float) -> PyTree:
    """decay * average + (1 - decay) * value for each leaf; for parameters and BatchNorm statistics alike.

    `average` comes from `ema_start`, of the first value, or of zeros if `debias` is to follow. It is kept in
    at least float32: in bfloat16 it stops moving long before it arrives. Integers are taken from `value`.
    Raises InputError unless 0 <= decay <= 1.
    """
    decay = _number("decay", decay, high=1)

    def update(average: Array, value: Array) -> Array:
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            return value
        return decay * average + (1 - decay) * value.astype(average.dtype)

    return jax.tree.map(update, average, value)


def debias(average: PyTree, decay: float, step: Any) -> PyTree:
    """average / (1 - decay**step): the mean of `step` >= 1 values, for an average started at zeros (Adam's).

    It equals the average started at the first value for step 1 and weighs the first value less after.
    Raises InputError unless 0 < decay < 1.
    """
    if not 0 < decay < 1:
        raise InputError(f"decay is {decay!r}: expected a number between 0 and 1")
    # 1 - decay**step would cancel in float32 for a decay near 1.
    weight = -jnp.expm1(jnp.asarray(step, _float()) * math.log(decay))

    def correct(leaf: Array) -> Array:
        return leaf / weight.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree.map(correct, average)


def _wide(leaf: Array) -> jnp.dtype:
    """float32 for the narrow floating-point types, else the type it has."""
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if narrow else leaf.dtype


# --- checks ------------------------------------------------------------------------------------------------


def _parsed(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{text!r} is not a number") from None


def _number(name: str, value: Any, *, low: float = 0, high: float = math.inf) -> float:
    """`value`, if it is a finite number from `low` to `high`. Raises InputError otherwise."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        limit = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise InputError(f"{name} is {value!r}: expected a finite number {limit}")
    return float(value)


def _check_options(owner: str, options: Mapping[str, Any], accepted: Sequence[str]) -> None:
    for option in options:
        if option not in accepted:
            raise unknown(f"option of {owner}", option, accepted or ["(it has none)"])
