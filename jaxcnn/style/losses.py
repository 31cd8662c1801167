"""What style transfer compares of two images: row S of Gatys, Ecker & Bethge 2016, equations 1 to 7, and two more.

Pure functions of features, an example a row. None of them averages where its equation sums, and none hides a weight.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxcnn.types import Array


class Moments(NamedTuple):
    """Of features at M locations, per example and region: `mean` (b, r, c) = 1/M sum F and `gram` (b, r, c, c) =
    1/M sum F F^T. `gram` is the Gram matrix G of the paper over its number of locations; the second moment, not the
    covariance."""

    mean: Array
    gram: Array


def weighted_sums(features: Array, weights: Array | None) -> Moments:
    """Sums of w F and w F F^T over the locations of features (b, h, w, c), for each map of `weights` (r, h, w).

    Without weights, every location counts 1 in one region. What tiles of an image give adds up to what it gives.
    """
    b, _, _, c = features.shape
    flat = features.reshape(b, -1, c)

    def sums(weighted: Array) -> tuple[Array, Array]:
        return weighted.sum(1), jnp.einsum("bmc,bmd->bcd", weighted, flat)

    if weights is None:
        pairs = [sums(flat)]
    else:
        pairs = [sums(flat * one.reshape(1, -1, 1).astype(flat.dtype)) for one in weights]
    return Moments(jnp.stack([mean for mean, _ in pairs], 1), jnp.stack([gram for _, gram in pairs], 1))


def moments(features: Array, weights: Array | None = None) -> Moments:
    """The moments of features (b, h, w, c), each region's weighted by its map of `weights` (r, h, w) over its sum."""
    total = jnp.full(1, features.shape[1] * features.shape[2]) if weights is None else weights.sum((1, 2))
    return normalised(weighted_sums(features, weights), total)


def normalised(sums: Moments, total: Array) -> Moments:
    """Sums over the `total` (r,) weight of each region."""
    total = total.astype(sums.mean.dtype)
    return Moments(sums.mean / total.reshape(1, -1, 1), sums.gram / total.reshape(1, -1, 1, 1))


def content_loss(features: Array, target: Array, weights: Array | None = None) -> Array:
    """1/2 sum (F - P)^2 over locations and channels, equation 1; (b, h, w, c), twice, -> (b,).

    The sum grows with the number of locations, and with the square of the features' scale. `weights` (h, w).
    """
    squares = jnp.square(features - target)
    if weights is not None:
        squares = squares * weights.astype(squares.dtype).reshape(1, *weights.shape, 1)
    return 0.5 * squares.sum((1, 2, 3))


def gram_loss(found: Moments, target: Moments) -> Array:
    """1 / (4 N^2) sum (G/M - A/M')^2 over the N x N entries, equation 4; -> (b, r).

    Each Gram matrix is over its own number of locations: with as many on both sides that is the equation's
    1 / (4 N^2 M^2) sum (G - A)^2. It grows with the fourth power of the features' scale.
    """
    channels = found.gram.shape[-1]
    return jnp.square(found.gram - target.gram).sum((-2, -1)) / (4 * channels**2)


def wasserstein_loss(found: Moments, target: Moments) -> Array:
    """The squared Wasserstein-2 distance of the Gaussians with these means and covariances; -> (b, r).

    |m - m'|^2 + tr(C + C' - 2 (C'^(1/2) C C'^(1/2))^(1/2)) (Dowson & Landau 1982; as a style loss Li et al. 2017's
    moments, and Kotovenko et al. 2021). It grows with the square of the features' scale, as the content loss does.
    """
    c, c_target = covariance(found), covariance(target)
    root = _root(c_target)
    values = jnp.linalg.eigvalsh(_symmetric(root @ c @ root))
    cross = _sqrt(values).sum(-1)
    traces = jnp.trace(c, axis1=-2, axis2=-1) + jnp.trace(c_target, axis1=-2, axis2=-1)
    return jnp.square(found.mean - target.mean).sum(-1) + traces - 2 * cross


def covariance(of: Moments) -> Array:
    """(b, r, c, c), divisor M."""
    return of.gram - of.mean[..., :, None] * of.mean[..., None, :]


def _symmetric(x: Array) -> Array:
    return (x + x.swapaxes(-1, -2)) / 2


def _root(c: Array) -> Array:
    values, vectors = jnp.linalg.eigh(_symmetric(c))
    return (vectors * _sqrt(values)[..., None, :]) @ vectors.swapaxes(-1, -2)


def _sqrt(values: Array) -> Array:
    """Of ascending eigenvalues; those that rounding alone keeps from 0 count, and are differentiated, as 0."""
    least = values[..., -1:] * values.shape[-1] * jnp.finfo(values.dtype).eps
    some = values > least
    return jnp.where(some, jnp.sqrt(jnp.where(some, values, 1)), 0)


def total_variation(x: Array) -> Array:
    """Sum of squared differences of neighbours, down and across (Mahendran & Vedaldi 2015, beta 2); images -> (b,)."""
    down, across = x[:, 1:] - x[:, :-1], x[:, :, 1:] - x[:, :, :-1]
    return jnp.square(down).sum((1, 2, 3)) + jnp.square(across).sum((1, 2, 3))


STYLE_LOSSES = {"gram": gram_loss, "wasserstein": wasserstein_loss}
