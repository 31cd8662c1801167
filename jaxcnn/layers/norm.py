"""Batch, layer, instance and group normalisation with one constructor and one call, so that they swap.

All compute y = scale (x - mean) / sqrt(var + epsilon) + bias per channel, and differ in what mean and
variance are taken over. Variances have divisor N and are taken in two passes: the one-pass form
E[x^2] - E[x]^2 loses everything for mean 1e4 and standard deviation 1. Statistics are float32 (float64 for
float64 inputs) whatever the compute dtype.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer

from jaxcnn.errors import InputError, unknown
from jaxcnn.layers.axis import data_axis_bound
from jaxcnn.types import DATA_AXIS, Array

Axes = tuple[int, ...]


def _mean(x: Array, axes: Axes, across: bool) -> Array:
    mean = x.mean(axes, keepdims=True)
    return lax.pmean(mean, DATA_AXIS) if across else mean


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _normalize(
    x: Array, scale: Array, bias: Array, axes: Axes, epsilon: float, across: bool
) -> tuple[Array, Array, Array]:
    """(y, mean, var) with statistics over `axes` (kept, of size 1), and over the devices if `across`."""
    mean = _mean(x, axes, across)
    var = _mean(jnp.square(x - mean), axes, across)
    return (x - mean) * (lax.rsqrt(var + epsilon) * scale) + bias, mean, var


@_normalize.defjvp
def _normalize_jvp(axes: Axes, epsilon: float, across: bool, primals, tangents):
    """The derivative in closed form. Its transpose takes two sums over the incoming gradient where automatic
    differentiation of the two passes takes four: up to 3.5 times faster on CPU, the same to rounding.

    d xhat = (dx - mean(dx) - xhat mean(xhat dx)) / sqrt(var + epsilon)
    """
    x, scale, bias = primals
    dx, dscale, dbias = tangents
    y, mean, var = _normalize(x, scale, bias, axes, epsilon, across)
    inverse = lax.rsqrt(var + epsilon)
    xhat = (x - mean) * inverse
    gain = inverse * scale
    dmean = _mean(dx, axes, across)
    slope = _mean(xhat * dx, axes, across)
    # The factors per channel are gathered first, so that the transpose sums dy and dy * xhat, once each.
    dy = gain * dx - gain * dmean + xhat * (dscale - gain * slope) + dbias
    return (y, mean, var), (dy, dmean, 2 * slope / inverse)


class Norm(nn.Module):
    """What all norms share; parameters `scale` and `bias` (c,).

    `dtype` is the output's (None: the input's); `param_dtype` the parameters'.
    """

    epsilon: float = 1e-5
    use_scale: bool = True
    use_bias: bool = True
    scale_init: Initializer = nn.initializers.ones
    bias_init: Initializer = nn.initializers.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def _affine(self, channels: int, dtype: Any) -> tuple[Array, Array]:
        scale, bias = jnp.ones(channels, dtype), jnp.zeros(channels, dtype)
        if self.use_scale:
            scale = self.param("scale", self.scale_init, (channels,), self.param_dtype).astype(dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (channels,), self.param_dtype).astype(dtype)
        return scale, bias

    def _per_example(self, x: Array, groups: int) -> Array:
        """Each example alone, over all positions and each of `groups` runs of neighbouring channels."""
        wide = _widen(x)
        shape = (groups, x.shape[-1] // groups)
        scale, bias = (p.reshape((1,) * (x.ndim - 1) + shape) for p in self._affine(x.shape[-1], wide.dtype))
        axes = (*range(1, x.ndim - 1), x.ndim)
        y, _, _ = _normalize(wide.reshape(*x.shape[:-1], *shape), scale, bias, axes, self.epsilon, False)
        return y.reshape(x.shape).astype(self.dtype or x.dtype)


def _widen(x: Array) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"a norm needs floating-point inputs, got {x.dtype}: convert the images first")
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


class BatchNorm(Norm):
    """Batch normalisation, Ioffe & Szegedy 2015, for (b, c) and (b, *spatial, c).

    `statistics` says which examples share a mean and a variance per channel in training:

    - "global": the whole batch, over all devices, under jit as under pmap or shard_map.
    - "device": each device's slice alone. Under jit, the slices of the mesh set by `jax.set_mesh`.
    - an integer n: ghost batches of n consecutive examples (Hoffer et al. 2017).
    - "frozen": none; the running statistics are used in training too, and stay as they are.

    The collection `batch_stats` holds the running `mean` and `var` (c,), moved in training by
    m <- momentum m + (1 - momentum) batch's (momentum 0.9 is PyTorch's 0.1); with several groups, by the
    mean over groups of their means and variances. `init` and evaluation leave them alone. PyTorch keeps the
    unbiased variance there (divisor N - 1), here it is the biased one, as in Flax.

    Raises:
        InputError: unknown `statistics`, or a batch that it does not divide.
    """

    statistics: Literal["global", "device", "frozen"] | int = "global"
    momentum: float = 0.9

    def __post_init__(self):
        modes = ("global", "device", "frozen")
        if isinstance(self.statistics, str) and self.statistics not in modes:
            raise unknown("BatchNorm statistics", self.statistics, modes)
        if isinstance(self.statistics, int) and self.statistics < 1:
            raise InputError(f"BatchNorm statistics={self.statistics}: a ghost batch has at least 1 example")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """(b, ..., c) -> (b, ..., c); batch statistics if `train`, else running ones."""
        wide, channels = _widen(x), x.shape[-1]
        scale, bias = self._affine(channels, wide.dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), wide.dtype)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), wide.dtype)
        if not train or self.statistics == "frozen":
            gain = lax.rsqrt(var.value.astype(wide.dtype) + self.epsilon) * scale
            last = (1,) * (x.ndim - 1) + (channels,)
            y = (wide - mean.value.astype(wide.dtype).reshape(last)) * gain.reshape(last) + bias.reshape(last)
            return y.astype(self.dtype or x.dtype)

        last = (1,) * x.ndim + (channels,)
        y, batch_mean, batch_var = _normalize(
            wide.reshape(self._groups(x.shape[0]), -1, *x.shape[1:]),
            scale.reshape(last),
            bias.reshape(last),
            tuple(range(1, x.ndim)),
            self.epsilon,
            self.statistics == "global" and data_axis_bound(),
        )
        if not self.is_initializing():
            self._move(mean, batch_mean)
            self._move(var, batch_var)
        return y.reshape(x.shape).astype(self.dtype or x.dtype)

    def _groups(self, examples: int) -> int:
        """How many groups of neighbouring examples have their own statistics, of those this trace sees."""
        if self.is_initializing():
            return 1
        if isinstance(self.statistics, int):
            if examples % self.statistics:
                raise InputError(
                    f"a batch of {examples} cannot be divided in ghost batches of {self.statistics}: "
                    "change the batch size or BatchNorm statistics"
                )
            return examples // self.statistics
        if self.statistics == "global" or data_axis_bound():
            return 1
        devices = jax.sharding.get_abstract_mesh().shape.get(DATA_AXIS, 1)
        if examples % devices:
            raise InputError(f"a batch of {examples} cannot be divided over {devices} devices")
        return devices

    def _move(self, running: nn.Variable, batch: Array) -> None:
        batch = batch.reshape(-1, batch.shape[-1]).mean(0).astype(running.value.dtype)
        if self.statistics != "global" and data_axis_bound():
            batch = lax.pmean(batch, DATA_AXIS)
        running.value = self.momentum * running.value + (1 - self.momentum) * batch


class LayerNorm(Norm):
    """Each example over all positions and channels, Ba et al. 2016; scale and bias per channel.

    PyTorch's `LayerNorm([c, h, w])` has one scale for every element instead.
    """

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """(b, ..., c) -> (b, ..., c); the same in training and evaluation."""
        del train
        return self._per_example(x, 1)


class InstanceNorm(Norm):
    """Each channel of each example over its positions, Ulyanov et al. 2016.

    Raises:
        InputError: an input without spatial axes, whose variance would be 0.
    """

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """(b, *spatial, c) -> (b, *spatial, c); the same in training and evaluation."""
        del train
        if x.ndim < 3:
            raise InputError(f"instance norm needs spatial axes, got shape {x.shape}: use layer or group norm")
        return self._per_example(x, x.shape[-1])


class GroupNorm(Norm):
    """Each example over all positions and each of `groups` runs of neighbouring channels, Wu & He 2018.

    Raises:
        InputError: `groups` does not divide the channels.
    """

    groups: int = 32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """(b, ..., c) -> (b, ..., c); the same in training and evaluation."""
        del train
        if self.groups < 1 or x.shape[-1] % self.groups:
            raise InputError(
                f"group norm: {x.shape[-1]} channels cannot be divided in {self.groups} groups; "
                "choose groups that divide them"
            )
        return self._per_example(x, self.groups)


class Identity(Norm):
    """No normalisation and no parameters; takes the same options, so that it swaps with the others."""

    def __call__(self, x: Array, *, train: bool) -> Array:
        """`x` itself."""
        del train
        return x


NORMS: dict[str, type[Norm]] = {
    "batch": BatchNorm,
    "layer": LayerNorm,
    "instance": InstanceNorm,
    "group": GroupNorm,
    "none": Identity,
}


def norm(name: str, **options) -> Callable[..., Norm]:
    """The class of that name in `NORMS` with `options` set.

    A model takes the result as its `norm` and writes `norm(name="bn1")(x, train=train)`.

    Raises:
        InputError: unknown name or option.
    """
    if name not in NORMS:
        raise unknown("norm", name, NORMS)
    known = inspect.signature(NORMS[name]).parameters
    for option in options:
        if option not in known:
            raise unknown(f"option of norm {name!r}", option, known)
    return partial(NORMS[name], **options)
