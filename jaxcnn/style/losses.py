"""What style transfer compares of two images: row S of Gatys, Ecker & Bethge 2016, equations 1 to 7, and two more.

Pure functions of features, an example a row. None of them averages where its equation sums, and none hides a weight.
"""

from functools import partial
from typing import NamedTuple

import jax
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
        return weighted.sum(1), jnp.einsum("bmc,bmd->bcd", weighted, flat, precision="highest")

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
    traces = sum(jnp.trace(covariance(of), axis1=-2, axis2=-1) for of in (found, target))
    return jnp.square(found.mean - target.mean).sum(-1) + traces - 2 * _fidelity(found, target)


@jax.custom_jvp
def _fidelity(found: Moments, target: Moments) -> Array:
    """tr (C'^(1/2) C C'^(1/2))^(1/2), as the sum of the singular values of C^(1/2) C'^(1/2).

    The eigenvalues of the product itself span the square of their range: in float32, equal Gaussians of 512 channels
    came out 10 to 30 % of their variance apart.
    """
    return jnp.linalg.svd(_matmul(_root(found), _root(target)), compute_uv=False).sum(-1)


@_fidelity.defjvp
def _fidelity_jvp(primals: tuple[Moments, Moments], tangents: tuple[Moments, Moments]) -> tuple[Array, Array]:
    """By C it is C'^(1/2) (C'^(1/2) C C'^(1/2))^(-1/2) C'^(1/2) / 2, and so by C': with C^(1/2) C'^(1/2) = U S V^T the
    power is V S^-1 V^T. Singular values that rounding alone keeps from 0 are left out: there is no derivative."""
    roots = tuple(map(_root, primals))
    u, s, vt = jnp.linalg.svd(_matmul(*roots))
    some = s > s[..., :1] * s.shape[-1] * jnp.finfo(s.dtype).eps
    inverse = jnp.where(some, 1 / jnp.where(some, s, 1), 0)[..., None]
    change = jnp.zeros_like(s[..., 0])
    for of, tangent, vectors, root in zip(primals, tangents, (vt, u.swapaxes(-1, -2)), roots[::-1], strict=True):
        half = _matmul(vectors, root)
        slope = _matmul(half.swapaxes(-1, -2), inverse * half) / 2
        change += (slope * jax.jvp(covariance, (of,), (tangent,))[1]).sum((-2, -1))
    return s.sum(-1), change


def covariance(of: Moments) -> Array:
    """(b, r, c, c), divisor M."""
    return of.gram - of.mean[..., :, None] * of.mean[..., None, :]


def _root(of: Moments) -> Array:
    """C^(1/2), without the eigenvalues that may be what rounding left of 0."""
    c = covariance(of)
    values, vectors = jnp.linalg.eigh((c + c.swapaxes(-1, -2)) / 2)
    rounding = jnp.finfo(c.dtype).eps * jnp.sqrt(jnp.square(of.gram).sum(-1).mean(-1, keepdims=True))
    values = jnp.where(values > rounding, values, 0)
    return _matmul(vectors * jnp.sqrt(values)[..., None, :], vectors.swapaxes(-1, -2))


_matmul = partial(jnp.matmul, precision="highest")


def total_variation(x: Array) -> Array:
    """Sum of squared differences of neighbours, down and across (Mahendran & Vedaldi 2015, beta 2); images -> (b,)."""
    down, across = x[:, 1:] - x[:, :-1], x[:, :, 1:] - x[:, :, :-1]
    return jnp.square(down).sum((1, 2, 3)) + jnp.square(across).sum((1, 2, 3))


STYLE_LOSSES = {"gram": gram_loss, "wasserstein": wasserstein_loss}
