"""Losses: pure functions that give one number per example, so that the trainer can mask and average them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcnn.errors import InputError
from jaxcnn.types import Array, ArrayLike, Batch

LossFn = Callable[[Array, Batch], Array]
"""`loss_fn(outputs, batch) -> (b,)`; the trainer applies `batch["mask"]` and takes the mean."""


def cross_entropy(logits: ArrayLike, labels: ArrayLike, *, label_smoothing: float = 0.0) -> Array:
    """-log f[c] of each example, with f = softmax(logits), in nats and at least float32: (b,).

    `logits` (b, ..., k) come with integer `labels` (b, ...) in [0, k), or with soft labels (b, ..., k)
    that sum to 1. The axes between b and k (pixels of a map) are averaged. `label_smoothing` a in [0, 1]
    mixes the target with the uniform distribution, (1 - a) target + a / k (Szegedy et al. 2016, eq. 7).
    An integer label of k or more gives NaN. Raises InputError where the shapes do not belong together.
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
    if hard:
        loss = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
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


def classification(label_smoothing: float = 0.0) -> LossFn:
    """The cross-entropy of a model's logits and `batch["label"]`, as the trainer calls it."""

    def loss_fn(outputs: Array, batch: Batch) -> Array:
        return cross_entropy(outputs, batch["label"], label_smoothing=label_smoothing)

    return loss_fn


def _at_least_float32(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _mean_per_example(loss: Array) -> Array:
    return loss.reshape(loss.shape[0], -1).mean(1)
