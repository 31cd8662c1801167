"""Losses: pure functions that give one number per example, so that the trainer can mask and average them."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxcnn.errors import InputError
from jaxcnn.types import Array, ArrayLike, Batch

if TYPE_CHECKING:  # losses take what a model returns and import no model
    from jaxcnn.models.density import GaussianParameters, MixtureParameters

LossFn = Callable[[Any, Batch], Array]
"""`loss_fn(outputs, batch) -> (b,)`, with the model's outputs; the trainer applies `batch["mask"]`, takes the mean."""


def cross_entropy(logits: ArrayLike, labels: ArrayLike, *, label_smoothing: float = 0.0) -> Array:
    """-log f[c] of each example, with f = softmax(logits), in nats and at least float32: (b,).

    `logits` (b, ..., k) come with integer `labels` (b, ...) in [0, k), or with soft labels (b, ..., k)
    that sum to 1. The axes between b and k (pixels of a map) are averaged. `label_smoothing` a in [0, 1]
    mixes the target with the uniform distribution, (1 - a) target + a / k (Szegedy et al. 2016, eq. 7).
    An integer label outside [0, k) gives NaN. Raises InputError where the shapes do not belong together.
    """
    logits, labels = _at_least_float32(logits), jnp.asarray(labels)
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"label smoothing is {label_smoothing}: expected a number from 0 to 1")
    hard = jnp.issubdtype(labels.dtype, jnp.integer)
    expected = logits.shape[:-1] if hard else logits.shape
    if labels.shape != expected:
        kind = "integer" if hard else "soft"
        raise InputError(f"{kind} labels {labels.shape} for logits {logits.shape}: expected {expected}")
    log_p = jax.nn.log_softmax(logits)
    if hard:  # not by an index, whose gradient is a scatter: a GPU adds those in any order
        chosen = jax.lax.broadcasted_iota(jnp.int32, log_p.shape, log_p.ndim - 1) == labels[..., None]
        loss = jnp.where(chosen.any(-1), -jnp.where(chosen, log_p, 0).sum(-1), jnp.nan)
    else:
        loss = -(labels.astype(log_p.dtype) * log_p).sum(-1)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(-1)
    return _mean_per_example(loss)


def mse(outputs: ArrayLike, targets: ArrayLike) -> Array:
    """Mean squared error of each example over all its n elements, at least float32: (b, ...) twice -> (b,).

    With y ~ N(f(x), s^2 I) the negative log likelihood is n mse / (2 s^2) + n/2 log(2 pi s^2): for a fixed
    s, the same up to a constant factor and a constant term, so both have the same minimum.
    Raises InputError unless both shapes are equal.
    """
    outputs, targets = _at_least_float32(outputs), _at_least_float32(targets)
    if outputs.shape != targets.shape:
        raise InputError(f"targets {targets.shape} for outputs {outputs.shape}: the shapes must be equal")
    return _mean_per_example(jnp.square(outputs - targets.astype(outputs.dtype)))


def gaussian_nll(outputs: "GaussianParameters", targets: ArrayLike) -> Array:
    """-log p(y) of each example under independent normals, in nats and at least float32: (b,).

    -log p = sum_d log s_d + (y_d - m_d)^2 / (2 s_d^2) + log(2 pi) / 2, summed over the d dimensions of the target.
    `outputs` has `mean` (b, d) and `scale` (b, d), positive; `targets` (b, d). With a fixed s it is `mse` up to a
    factor and a term. Raises InputError unless the three shapes are equal.
    """
    mean, scale, y = (_at_least_float32(x) for x in (outputs.mean, outputs.scale, targets))
    if not mean.shape == scale.shape == y.shape or y.ndim != 2:
        raise InputError(
            f"targets {y.shape} for a mean {mean.shape} and a scale {scale.shape}: expected (b, d) three times"
        )
    y = y.astype(mean.dtype)
    return (jnp.log(scale) + jnp.square((y - mean) / scale) / 2 + math.log(2 * math.pi) / 2).sum(1)


def mixture_nll(outputs: "MixtureParameters", targets: ArrayLike) -> Array:
    """-log p(y) of each example under a mixture of spherical normals, in nats and at least float32: (b,).

    p = sum_k w_k N(y; m_k, s_k^2 I), w = softmax(logits) (Bishop 1994, equations 22 and 23), summed in logarithms.
    `outputs` has `logits` (b, k), `means` (b, k, d) and `scales` (b, k), positive; `targets` (b, d).
    Raises InputError where the shapes do not belong together.
    """
    logits, means, scales, y = (_at_least_float32(x) for x in (outputs.logits, outputs.means, outputs.scales, targets))
    if not (logits.shape == scales.shape == means.shape[:2] and y.shape == means.shape[::2]):
        raise InputError(
            f"targets {y.shape} for logits {logits.shape}, means {means.shape} and scales {scales.shape}: "
            "expected (b, d), (b, k), (b, k, d) and (b, k)"
        )
    y = y.astype(means.dtype)
    squares = jnp.square((y[:, None] - means) / scales[:, :, None]).sum(2)
    log_densities = -squares / 2 - y.shape[1] * (jnp.log(scales) + math.log(2 * math.pi) / 2)
    return -jax.nn.logsumexp(jax.nn.log_softmax(logits) + log_densities, axis=1)


def classification(label_smoothing: float = 0.0, *, auxiliary: float = 0.3) -> LossFn:
    """The cross-entropy of a model's logits and `batch["label"]`, as the trainer calls it.

    Of a model with auxiliary heads, whose outputs in training are a tuple (logits, aux1, ...), each head adds
    `auxiliary` times its own (Szegedy et al. 2015, section 5).
    """

    def loss_fn(outputs: Array | tuple[Array, ...], batch: Batch) -> Array:
        def loss(logits: Array) -> Array:
            return cross_entropy(logits, batch["label"], label_smoothing=label_smoothing)

        main, *heads = outputs if isinstance(outputs, tuple) else (outputs,)
        return loss(main) + auxiliary * sum(map(loss, heads)) if heads else loss(main)

    return loss_fn


def segmentation(*, class_weights: Sequence[float] | None = None) -> LossFn:
    """The weighted cross-entropy of every pixel, as the trainer calls it: outputs (b, h, w, k) -> (b,).

    The mean over the pixels of w(x) (-log p), the pixel's label being `batch["label"]` (b, h, w) and
    p = softmax(logits): equation 1 of Ronneberger et al. 2015, divided by the number of pixels. w is `batch["weight"]`
    (b, h, w), 1 where the batch has none, times the label's entry of `class_weights`, where given. A pixel of weight
    0 does not count. Of logits larger than the labels `central` is judged. Raises InputError where the shapes do not
    belong together.
    """

    def loss_fn(outputs: Array, batch: Batch) -> Array:
        labels = jnp.asarray(batch["label"])
        logits = central(outputs, labels)
        classes = logits.shape[-1]
        loss = cross_entropy(logits.reshape(-1, classes), labels.reshape(-1)).reshape(labels.shape)
        if class_weights is not None:
            if len(class_weights) != classes:
                raise InputError(f"{len(class_weights)} class weights for {classes} classes: give one for each")
            loss *= jnp.asarray(class_weights, loss.dtype)[labels]
        if "weight" in batch:
            if batch["weight"].shape != labels.shape:
                raise InputError(f"weights {batch['weight'].shape} for labels {labels.shape}: the shapes must be equal")
            loss *= batch["weight"].astype(loss.dtype)
        return _mean_per_example(loss)

    return loss_fn


def central(maps: Array, labels: Array) -> Array:
    """The middle of maps (b, h', w', k) at the size of `labels` (b, h, w), as a tile with context needs it.

    Raises InputError unless the maps are of that size, or larger by an even number of pixels along each axis.
    """
    if maps.ndim != 4 or labels.ndim != 3 or maps.shape[0] != labels.shape[0]:
        raise InputError(f"maps {maps.shape} with labels {labels.shape}: expected (b, h', w', k) and (b, h, w)")
    margins = [have - want for have, want in zip(maps.shape[1:3], labels.shape[1:], strict=True)]
    if any(margin < 0 or margin % 2 for margin in margins):
        raise InputError(
            f"maps {maps.shape} with labels {labels.shape}: maps must be of the labels' size or larger by an even "
            "number of pixels; give the image more context, or labels of another size"
        )
    rows, columns = (slice(m // 2, m // 2 + size) for m, size in zip(margins, labels.shape[1:], strict=True))
    return maps[:, rows, columns]


def gaussian() -> LossFn:
    """`gaussian_nll` of a model's parameters and `batch["label"]` (b, d), as the trainer calls it."""
    return lambda outputs, batch: gaussian_nll(outputs, batch["label"])


def mixture() -> LossFn:
    """`mixture_nll` of a model's parameters and `batch["label"]` (b, d), as the trainer calls it."""
    return lambda outputs, batch: mixture_nll(outputs, batch["label"])


def _at_least_float32(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _mean_per_example(loss: Array) -> Array:
    return loss.reshape(loss.shape[0], -1).mean(1)
