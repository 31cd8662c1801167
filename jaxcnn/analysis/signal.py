"""How a signal and its gradient go through any network, beside what theory predicts (rows A1, A2, A14, A22).

Measured are the moments of every value that goes from layer to layer, and of the loss's gradient by it. Predicted is
the mean field of He et al. 2015 and Glorot & Bengio 2010: every sum of products with weights is taken as a Gaussian of
mean sum E(w) x and variance sum Var(w) x^2, and backward alike; everything else (activations, pooling, padding,
shortcuts, normalisation) is computed as it stands. So Var[z] = n Var[w] E[x^2] from layer to layer, and
E[x^2] is what the activation makes of that.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer

from jaxcnn.analysis.program import Place, Program, Ref, Rule, Step, places, program
from jaxcnn.analysis.trace import trace
from jaxcnn.errors import InputError
from jaxcnn.layers.init import initializer
from jaxcnn.models.table import call_options
from jaxcnn.types import Array, ArrayLike, PyTree

SATURATED = 0.05
"""Share of an activation's steepest slope below which it counts as saturated."""
SHOWN = 8192
"""Values of a layer that are kept for its histogram, at most."""
SORTED = 1 << 20
"""Elements up to which the prediction's Gaussian is made of exact quantiles; beyond, chance does as well."""
CHANCE = 4.0
"""Standard errors up to which a mean of weights is taken for 0."""
STEADY = 100.0
"""Factor of the root mean square over the whole network beyond which the verdict is that it falls or grows."""


@dataclass(frozen=True)
class Layer:
    """What goes from one layer to the next, and the loss's gradient by it, over all examples, positions and units.

    `name` is the module's path and `kind` its class, or the operations of a container ("add, relu"). Second moments
    E[x^2] are geometric means over seeds, with each seed's in `second_moments`; `mean` and `variance` are arithmetic
    ones. `predicted` and `predicted_gradient` are the mean field's second moments.

    `saturated`: the share of elements at which an activation's slope is below `SATURATED` of its steepest, `dead`: the
    share of units (channels) whose slope is 0 for every example; None where the layer is no activation.

    `sample` and `gradient_sample` hold up to `SHOWN` values of the last seed, evenly spread, for histograms.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    mean: float
    variance: float
    second_moment: float
    second_moments: tuple[float, ...]
    predicted: float
    gradient: float
    gradients: tuple[float, ...]
    predicted_gradient: float
    saturated: float | None
    dead: float | None
    sample: np.ndarray
    gradient_sample: np.ndarray

    @property
    def std(self) -> float:
        return math.sqrt(self.variance)

    @property
    def rms(self) -> float:
        """Root of the second moment."""
        return math.sqrt(self.second_moment)


@dataclass(frozen=True)
class Signal:
    """`layers` in order, the network's output last; `weighted` of them are sums of products with weights."""

    layers: tuple[Layer, ...]
    weighted: int
    seeds: int

    @property
    def verdict(self) -> str:
        """One line: whether the signal and its gradient arrive, and else what to do."""
        return _verdict(self)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, without the samples; what is not finite is a string."""
        rows = [
            {key: _plain(value) for key, value in dataclasses.asdict(layer).items() if not key.endswith("sample")}
            for layer in self.layers
        ]
        return {"verdict": self.verdict, "seeds": self.seeds, "layers": rows}


def probe(
    module: nn.Module,
    x: ArrayLike,
    *,
    variables: PyTree | None = None,
    init: str | Initializer | None = None,
    seed: int = 0,
    seeds: int = 1,
    train: bool = True,
) -> Signal:
    """The signal of `x` (b, ...) through any Flax module, and back from a gradient of N(0, 1) by its outputs.

    `variables`, or fresh ones for each of `seeds` from `seed` on. `init`, a name of `jaxcnn.layers.init` or an
    initialiser, draws every leaf called "kernel" anew. As in training, the statistics of normalisation are the batch's
    and dropout acts, unless `train` is False; a module that does not take `train` is called as it is.

    Raises:
      InputError: no examples; seeds of given variables; an unknown initialiser; a module that does not take `x`.
    """
    x = jnp.asarray(x)
    if x.ndim < 2 or not len(x):
        raise InputError(f"an input of shape {x.shape}: expected a batch of examples, (b, ...)")
    if seeds < 1 or (variables is not None and seeds > 1):
        raise InputError(f"seeds {seeds}: expected at least 1, and 1 where variables are given")
    traced = trace(module, input=x.shape[1:], dtype=x.dtype, batch=len(x), train=train)
    written = program(traced)
    found = places(traced, written)
    if not found:
        raise InputError(f"{type(module).__name__} has no layer that depends on its input")
    draw = initializer(init) if isinstance(init, str) else init
    rounds = []
    for number in range(seed, seed + seeds):
        begun = _fresh(module, x, number, train) if variables is None else variables
        begun = begun if draw is None else _redrawn(begun, draw, number)
        _check(begun, traced.variables)
        leaves = jax.tree.leaves({name: begun[name] for name in traced.variables})
        rounds.append(_probe(written, found, leaves, x, number))
    layers = [_layer(place, [one[i] for one in rounds]) for i, place in enumerate(found)]
    moving = written.depending([written.input])
    return Signal(tuple(layers), sum(_weights(step, moving) is not None for step in written.steps), seeds)


def _fresh(module: nn.Module, x: Array, seed: int, train: bool) -> PyTree:
    """Not compiled as a whole, for the same reason as `_probe`."""
    return module.init(jax.random.key(seed), x[:1], **call_options(module, train=train))


def _redrawn(variables: PyTree, draw: Initializer, seed: int) -> PyTree:
    leaves, tree = jax.tree_util.tree_flatten_with_path(variables)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [
        draw(key, leaf.shape, leaf.dtype) if getattr(path[-1], "key", None) == "kernel" else leaf
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, new)


def _check(variables: PyTree, expected: PyTree) -> None:
    if not isinstance(variables, dict) or any(
        jax.tree.map(jnp.shape, variables.get(name)) != jax.tree.map(jnp.shape, tree) for name, tree in expected.items()
    ):
        raise InputError("variables: not those of this module at this input; give what module.init returned")


class _Moments(NamedTuple):
    """Of a value times `unit`^2, which brings the largest magnitude to 1: float32 might not hold the squares of others,
    nor the inverse of that magnitude."""

    unit: Array
    mean: Array
    variance: Array

    def total(self) -> tuple[float, float, float]:
        """Mean, variance and second moment in float64; the latter two infinite where a value was not finite."""
        if not (self.unit > 0 and math.isfinite(self.variance)):
            return math.nan, math.inf, math.inf
        scale = float(self.unit) ** -2
        mean, variance = scale * float(self.mean), scale**2 * float(self.variance)
        return mean, variance, variance + mean**2


class _Measured(NamedTuple):
    value: _Moments
    gradient: _Moments
    saturated: np.ndarray
    dead: np.ndarray
    sample: np.ndarray
    gradient_sample: np.ndarray
    predicted: _Moments
    predicted_gradient: _Moments


def _probe(
    program: Program, found: Sequence[Place], variables: Sequence[Array], x: Array, seed: int
) -> list[_Measured]:
    """Equation by equation, so that layers which are alike are compiled once; as a whole, 100 would take minutes."""
    values, gradients = _there_and_back(program, found, variables, x, seed, lambda step, operands: None)
    measured = []
    for place in found:
        value, gradient = values[place.ref], gradients[place.ref]
        here = (_moments(value), _moments(gradient), *_inactive(place, values), _sample(value), _sample(gradient))
        measured.append(jax.device_get(here))
    del values, gradients  # all activations, of which there are about to be as many again
    field = partial(_mean_field, program.depending([program.input]), seed)
    values, gradients = _there_and_back(program, found, variables, x, seed, field)
    predicted = [jax.device_get((_moments(values[one.ref]), _moments(gradients[one.ref]))) for one in found]
    return [_Measured(*one, *theory) for one, theory in zip(measured, predicted, strict=True)]


def _there_and_back(
    program: Program, found: Sequence[Place], variables: Sequence[Array], x: Array, seed: int, rule: Rule
) -> tuple[dict[Ref, Array], dict[Ref, Array]]:
    """All values, and the gradients by those at the places, of N(0, 1) by the outputs."""
    avals = program.avals()
    taps = {place.ref: jnp.zeros(avals[place.ref].shape, avals[place.ref].dtype) for place in found}

    def forward(taps: dict[Ref, Array]) -> tuple[list[Array], dict[Ref, Any]]:
        outputs, values = program.run(variables, x, taps=taps, rule=rule)
        return [one for one in outputs if jnp.issubdtype(jnp.result_type(one), jnp.floating)], values

    outputs, back, values = jax.vjp(forward, taps, has_aux=True)
    rng = np.random.default_rng(seed)
    (gradients,) = back([jnp.asarray(rng.standard_normal(one.shape), one.dtype) for one in outputs])
    return values, gradients


def _weights(step: Step, moving: set[Ref]) -> int | None:
    """Which operand of a product with what comes from the input does not come from there; None for other steps."""
    if step.equation.primitive.name not in ("conv_general_dilated", "dot_general"):
        return None
    fixed = [i for i, ref in enumerate(step.inputs) if ref not in moving]
    return fixed[0] if len(fixed) == 1 else None


def _mean_field(moving: set[Ref], seed: int, step: Step, operands: Sequence[Array]) -> Array | None:
    """A Gaussian of the mean and variance that the product has over independent weights, forward and backward."""
    which = _weights(step, moving)
    if which is None:
        return None
    weights, x = operands[which].astype(jnp.float32), operands[1 - which]
    mean, variance = weights.mean(), weights.var()
    mean = jnp.where(jnp.abs(mean) > CHANCE * jnp.sqrt(variance / weights.size), mean, 0)
    rng = np.random.default_rng((seed, step.outputs[0].number))

    def product(weight: Array, x: Array) -> Array:
        """With all weights alike."""
        same = jnp.full(weights.shape, weight, x.dtype)
        return step.compute([same, x] if which == 0 else [x, same])[0]

    def gaussian(linear: Callable[[Array, Array], Array], x: Array) -> Array:
        centre, spread = linear(mean, x), linear(variance, jnp.square(x))
        return centre + jnp.sqrt(jnp.maximum(spread, 0)) * jnp.asarray(_noise(rng, spread.shape), spread.dtype)

    def transposed(weight: Array, dz: Array) -> Array:
        return jax.linear_transpose(partial(product, weight), x)(dz)[0]

    @jax.custom_vjp
    def draw(x: Array) -> Array:
        return gaussian(product, x)

    draw.defvjp(lambda x: (draw(x), None), lambda _, dz: (gaussian(transposed, dz),))
    return draw(x)


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """N(0, 1), (b, ...); in small arrays its quantiles for each example, so that little is left to chance."""
    each = math.prod(shape[1:])
    if each == 1 or math.prod(shape) > SORTED:
        return rng.standard_normal(shape, np.float32)
    from scipy.special import ndtri

    quantiles = ndtri((np.arange(each) + 0.5) / each)
    quantiles /= np.sqrt(np.square(quantiles).mean())
    return rng.permuted(np.tile(quantiles, (shape[0], 1)), axis=1).reshape(shape)


def _inactive(place: Place, values: dict[Ref, Array]) -> tuple[Array, Array]:
    """Shares of saturated elements and of dead units; NaN where the place is no activation."""
    nothing = jnp.full((), jnp.nan)
    if not place.elementwise:
        return nothing, nothing
    root = values[place.roots[0]]

    def activation(x: Array) -> Array:
        known: dict[Any, Any] = {place.roots[0]: x}
        for step in place.steps:
            operands = [known[ref] if isinstance(ref, Ref) else ref for ref in step.inputs]
            known.update(zip(step.outputs, step.compute(operands), strict=True))
        return known[place.ref]

    value, slopes = jax.jvp(activation, (root,), (jnp.ones_like(root),))
    if value.size != root.size:
        return nothing, nothing
    slopes = jnp.abs(slopes.astype(jnp.float32))
    units = slopes.reshape(-1, slopes.shape[-1])
    return (slopes < SATURATED * slopes.max()).mean(), (units == 0).all(0).mean()


@jax.jit
def _moments(x: Array) -> _Moments:
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max()
    unit = jax.lax.rsqrt(jnp.where(largest > 0, largest, 1))
    x = x * unit * unit
    return _Moments(unit, x.mean(), x.var())


def _sample(x: Array) -> Array:
    flat = x.reshape(-1).astype(jnp.float32)
    return flat[:: max(1, -(-flat.size // SHOWN))]


def _layer(place: Place, rounds: Sequence[_Measured]) -> Layer:
    means, variances, values = zip(*(one.value.total() for one in rounds), strict=True)
    gradients, predicted, predicted_gradients = (
        [getattr(one, name).total()[2] for one in rounds] for name in ("gradient", "predicted", "predicted_gradient")
    )
    saturated, dead = (float(np.mean([getattr(one, name) for one in rounds])) for name in ("saturated", "dead"))
    return Layer(
        name=place.name,
        kind=place.kind,
        shape=place.shape[1:],
        mean=float(np.mean(means)),
        variance=float(np.mean(variances)),
        second_moment=_geometric(values),
        second_moments=values,
        predicted=_geometric(predicted),
        gradient=_geometric(gradients),
        gradients=tuple(gradients),
        predicted_gradient=_geometric(predicted_gradients),
        saturated=None if math.isnan(saturated) else saturated,
        dead=None if math.isnan(dead) else dead,
        sample=rounds[-1].sample,
        gradient_sample=rounds[-1].gradient_sample,
    )


def _geometric(values: Sequence[float]) -> float:
    if 0 in values:
        return 0.0
    with np.errstate(over="ignore"):
        return float(np.exp(np.mean(np.log(values))))


def _verdict(signal: Signal) -> str:
    layers, last = signal.layers, signal.layers[-1]
    advice = f"use {_suited(' '.join(layer.kind for layer in layers))}, or normalisation"
    for layer in layers:
        if not math.isfinite(layer.second_moment):
            return f"the signal overflows at {layer.name}: {advice}"
        if layer.second_moment == 0:
            return f"the signal is 0 from {layer.name} on: {advice}"
    for what, begin, end in (
        ("signal", layers[0].second_moment, last.second_moment),
        ("gradient", last.gradient, layers[0].gradient),
    ):
        if not math.isfinite(end) or end == 0:
            return f"the gradient {'overflows' if end else 'is 0'} at {layers[0].name}: {advice}"
        factor = math.sqrt(end / begin)
        if not 1 / STEADY < factor < STEADY:
            way = "falls" if factor < 1 else "grows"
            return f"the {what} {way} by a factor of {factor:.0e} over {signal.weighted} layers: {advice}"
    forward = math.sqrt(last.second_moment / layers[0].second_moment)
    backward = math.sqrt(layers[0].gradient / last.gradient)
    return (
        f"steady: over {signal.weighted} layers the signal changes by a factor of {forward:.2g}, the gradient by"
        f" {backward:.2g} (root mean squares)"
    )


def _suited(kinds: str) -> str:
    """The initialiser for those activations."""
    if "selu" in kinds:
        return "lecun_normal"
    if any(name in kinds for name in ("relu", "elu", "gelu", "max")):
        return "kaiming_normal"
    return "xavier_normal" if any(name in kinds for name in ("tanh", "logistic", "sigmoid")) else "lecun_normal"


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
