"""Neocognitron: Fukushima 1980, with the cells of Fukushima 2013a and the learning of Fukushima 2013b.

2013a "Artificial vision by multi-layered neural networks: Neocognitron and its advances", Neural Networks 37;
2013b "Training multi-layered neural network neocognitron", Neural Networks 40 (add-if-silent, interpolating vectors);
2003 "Neocognitron for handwritten digit recognition", Neurocomputing 51; 2007 "Interpolating vectors for robust
pattern recognition", Neural Networks 20. Equations are named by what they compute, as their numbers differ between
these papers.

- Contrast (U_G): on-centre and off-centre cells, differences of Gaussians, half-wave rectified (2003).
- S cells: the similarity of the input to a reference above a threshold, times the size of the input: subtractive
  inhibition (2013a). Those of S1 have the references of straight edges in 16 directions, and are fixed.
- C cells: root mean square under a Gaussian at every second position (2013a).
- S2, S3: add-if-silent (2013a, 2013b), with a higher threshold for learning than for recognition (the dual thresholds
  of 2003).
- S4: labelled references, added where classification by interpolating vectors errs (2013b).

Where this differs from the papers: sizes suit 28x28 pixels in place of 65x65, and thresholds are chosen on parts of
the training split of the embedded digits; C cells have no inhibitory surround; S4 sees all of C3 from one position,
so there is no C4; images are continued at the border by their last pixel, so that the background's level does not
matter; the parameters are the references, from which the weights follow.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.errors import InputError
from jaxcnn.layers.conv import conv
from jaxcnn.layers.named import Lambda, located
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array, ArrayLike, PyTree

ORIENTATIONS = 16
_BATCH = 256
CENTRE, SURROUND = 1.5, 3.0
"""Standard deviations, in pixels, of the two Gaussians that contrast cells subtract."""


class Neocognitron(nn.Module):
    """(b, h, w, 1) -> the largest similarity, in 0..1, to the references of each class (b, num_classes).

    `grow` finds `planes`, the numbers of cell planes of S2, S3, ..., and `references`, the largest number of vectors
    of a class in S4 (what another class has fewer is 0, and silent); before that the references are random. S1 and
    each layer of `planes` have one entry in `thresholds` (of the similarity, while recognising), `windows` (the side
    of what an S cell sees) and `blurs` (of a C cell). An image and a x + b, a > 0, have the same result.
    """

    planes: tuple[int, ...] = (50, 162)
    references: int = 16
    num_classes: int = 10
    thresholds: tuple[float, ...] = (0.55, 0.5, 0.5)
    windows: tuple[int, ...] = (7, 3, 3)
    blurs: tuple[int, ...] = (5, 3, 3)
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        self._check(x)
        x = x.astype(self.dtype or x.dtype)
        for name, fn in self.fixed_layers().items():
            x = Lambda(fn, name=name)(x)
        for i, planes in enumerate(self.planes, 1):
            x = SCells(planes, window=self.windows[i], threshold=self.thresholds[i], name=f"s{i + 1}")(x)
            x = Lambda(partial(c_cells, window=self.blurs[i]), name=f"c{i + 1}")(x)
        return Classifier(self.num_classes, self.references, name=f"s{len(self.planes) + 2}")(x)

    @nn.nowrap
    def fixed_layers(self) -> dict[str, Callable[[Array], Array]]:
        """The layers before S2, which do not learn, by name."""
        edges = partial(s_cells, kernel=edge_references(self.windows[0]), threshold=self.thresholds[0])
        return {"contrast": contrast, "s1": edges, "c1": partial(c_cells, window=self.blurs[0])}

    @nn.nowrap
    def _check(self, x: Array) -> None:
        check_input(x)
        if x.shape[-1] != 1 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(
                f"the neocognitron sees grey images (b, h, w, 1) in floating point, got {x.dtype} {x.shape}: "
                "convert them, and average colours"
            )
        layers = len(self.planes) + 1
        if not len(self.thresholds) == len(self.windows) == len(self.blurs) == layers:
            raise InputError(
                f"thresholds {self.thresholds}, windows {self.windows}, blurs {self.blurs}: expected {layers} of each, "
                f"for S1 and the layers of planes {self.planes}"
            )
        if not all(0 <= t < 1 for t in self.thresholds):
            raise InputError(f"thresholds {self.thresholds}: similarities are compared with them, expected [0, 1)")
        if any(w < 1 or w % 2 == 0 for w in (*self.windows, *self.blurs)):
            raise InputError(f"windows {self.windows}, blurs {self.blurs}: expected odd sizes, which have a centre")
        if min(*self.planes, self.references, self.num_classes) < 1:
            raise InputError(f"planes {self.planes}, references {self.references}: expected at least 1 of each")


class SCells(nn.Module):
    """`s_cells` whose references are the parameter `kernel` (window, window, c, planes)."""

    planes: int
    window: int
    threshold: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.window, self.window, x.shape[-1], self.planes)
        with located(self):
            kernel = self.param("kernel", nn.initializers.uniform(1.0), shape)
            return s_cells(x, kernel, threshold=self.threshold)


class Classifier(nn.Module):
    """`class_similarity` to the parameter `kernel` (k, references, features): (b, h, w, c) -> (b, k)."""

    num_classes: int
    references: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        shape = (self.num_classes, self.references, x.shape[-1])
        with located(self):
            kernel = self.param("kernel", nn.initializers.uniform(1.0), shape)
        return class_similarity(x, kernel)


def gaussian(window: int) -> np.ndarray:
    """(window, window) weights c that fall from the centre with standard deviation window / 3, of sum 1."""
    r = np.arange(window) - (window - 1) / 2
    line = np.exp(-np.square(r) / (2 * (window / 3) ** 2))
    return np.outer(line, line) / line.sum() ** 2


def contrast(x: Array) -> Array:
    """(b, h, w, 1) -> (b, h, w, 2): on-centre and off-centre cells. A constant image gives 0."""
    margin = math.ceil(2 * SURROUND)
    r = np.arange(-margin, margin + 1)
    lines = (np.exp(-np.square(r) / (2 * sigma**2)) for sigma in (CENTRE, SURROUND))
    centre, surround = (np.outer(line, line) / line.sum() ** 2 for line in lines)
    kernel = jnp.asarray(centre - surround, x.dtype)[:, :, None, None]
    x = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="edge")
    response = conv(x, kernel)
    return nn.relu(jnp.concatenate([response, -response], axis=-1))


def edge_references(window: int) -> np.ndarray:
    """(window, window, 2, 16): the contrast cells' answers to straight edges through the centre of the window.

    At distance d from a step of 1 a Gaussian average is the normal distribution function of d / sigma, so on-centre
    cells answer the positive part of the difference of two, and off-centre cells the negative part. Edge n is
    bright on the side of the angle 2 pi n / 16, from the columns' direction towards the rows'.
    """
    r = np.arange(window) - (window - 1) / 2
    angles = 2 * np.pi * np.arange(ORIENTATIONS) / ORIENTATIONS
    d = r.reshape(-1, 1, 1) * np.sin(angles) + r.reshape(1, -1, 1) * np.cos(angles)
    erf = np.vectorize(math.erf)
    on = (erf(d / (CENTRE * math.sqrt(2))) - erf(d / (SURROUND * math.sqrt(2)))) / 2
    return np.maximum(np.stack([on, -on], axis=2), 0).astype(np.float32)


def _root(x: Array) -> Array:
    """The square root, with gradient 0 instead of infinity at 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def s_cells(x: Array, kernel: ArrayLike, *, threshold: float) -> Array:
    """Responses u = |x| max(0, s - threshold) / (1 - threshold): (b, h, w, c) -> (b, h, w, planes).

    s = (X, x) / (|X| |x|) is the similarity of the input x in the cell's window to its reference X, one of
    `kernel` (window, window, c, planes), with (X, x) = sum c X x under c = `gaussian(window)`. As in the paper
    it is excitation less inhibition, max(0, sum a x - threshold v) / (1 - threshold), with a = c X / |X| and
    v = sqrt(sum c x^2) = |x|. Beyond the border x is 0. A reference of 0 never answers.
    """
    weight = jnp.asarray(gaussian(kernel.shape[0]), x.dtype)[:, :, None, None]
    kernel = jnp.asarray(kernel, x.dtype)
    length = _root((weight * jnp.square(kernel)).sum((0, 1, 2), keepdims=True))
    a = weight * kernel / jnp.where(length > 0, length, 1)
    v = _root(conv(jnp.square(x).sum(-1, keepdims=True), weight, padding="SAME"))
    return nn.relu(conv(x, a, padding="SAME") - threshold * v) / (1 - threshold)


def c_cells(x: Array, *, window: int) -> Array:
    """(b, h, w, c) -> (b, ceil(h / 2), ceil(w / 2), c): root mean square of each plane under `gaussian(window)`."""
    planes = x.shape[-1]
    weight = jnp.tile(jnp.asarray(gaussian(window), x.dtype)[:, :, None, None], (1, 1, 1, planes))
    return _root(conv(jnp.square(x), weight, strides=2, padding=window // 2, groups=planes))


def class_similarity(x: Array, references: Array) -> Array:
    """The similarity of x (b, features) to the nearest interpolating vector of each class (b, k).

    Interpolating vectors lie between any two of the references (k, r, features) of a class. 0 for x = 0.
    """
    x = _unit(x)
    references = _unit(references.astype(x.dtype))
    s = jnp.einsum("bf,krf->bkr", x, references)
    return interpolate(s, jnp.einsum("kif,kjf->kij", references, references))


def _unit(x: Array) -> Array:
    length = _root(jnp.square(x).sum(-1, keepdims=True))
    return x / jnp.where(length > 0, length, 1)


def interpolate(s: Array, mutual: Array) -> Array:
    """From the similarities to the references (b, k, r) and among them (k, r, r) the best of each class (b, k).

    The best p X_i + q X_j with p, q > 0 has s^2 = (s_i^2 + s_j^2 - 2 s_i s_j s_ij) / (1 - s_ij^2), if
    s_i > s_j s_ij and s_j > s_i s_ij (2007); else X_i or X_j alone is better.
    """
    i, j, ij = s[..., :, None], s[..., None, :], mutual[None]
    between = (i > j * ij) & (j > i * ij) & (ij < 0.999)
    square = (jnp.square(i) + jnp.square(j) - 2 * i * j * ij) / jnp.where(between, 1 - jnp.square(ij), 1)
    pairs = _root(jnp.where(between, square, 0))
    return jnp.maximum(s.max(-1), pairs.max((-1, -2)))


class Grown(NamedTuple):
    """A module whose `planes` and `references` are as grown, and `{"params": ...}` for it."""

    module: Neocognitron
    variables: PyTree


def grow(
    module: Neocognitron,
    images: ArrayLike,
    labels: ArrayLike,
    *,
    seed: int = 0,
    learning_thresholds: Sequence[float] = (0.6, 0.6),
    rounds: int = 10,
    max_planes: int = 1000,
    report: Callable[[str], None] | None = None,
) -> Grown:
    """Learns from images (n, h, w, 1) of any scale and labels (n,), layer after layer; `seed` gives the order.

    `module` gives windows, recognition thresholds and the number of learning layers, len(module.planes); each has
    one of `learning_thresholds`, which had better not be below the one for recognition. Every learning layer sees
    all patterns once, in an order of its own; S4 at most `rounds` times, until it makes no error on them.
    `report` gets a line of progress now and then.

    Raises:
        InputError: images, labels or fields that do not fit; a layer that wants more than `max_planes`.
    """
    images, labels = _checked(module, images, labels, learning_thresholds)
    if rounds < 1 or max_planes < 1:
        raise InputError(f"rounds {rounds}, max_planes {max_planes}: expected at least 1 of each")
    x = images
    for fn in module.fixed_layers().values():
        x = _batched(fn, x)
    kernels = []
    for i, threshold in enumerate(learning_thresholds, 1):
        tell = partial(_tell, report, f"s{i + 1}")
        options = {"window": module.windows[i], "threshold": threshold, "max_planes": max_planes, "report": tell}
        kernel = add_if_silent(x[_order(len(x), seed, i)], **options)
        kernels.append(kernel)
        x = _batched(partial(s_cells, threshold=module.thresholds[i]), x, kernel)
        x = _batched(partial(c_cells, window=module.blurs[i]), x)
    orders = [_order(len(x), seed, len(kernels) + 1, turn) for turn in range(rounds)]
    tell = partial(_tell, report, f"s{len(kernels) + 2}")
    references = _references(x.reshape(len(x), -1), labels, module.num_classes, orders=orders, report=tell)
    grown = module.clone(planes=tuple(k.shape[-1] for k in kernels), references=references.shape[1])
    params = {f"s{i}": {"kernel": jnp.asarray(kernel)} for i, kernel in enumerate([*kernels, references], 2)}
    return Grown(grown, {"params": params})


def _checked(
    module: Neocognitron, images: ArrayLike, labels: ArrayLike, thresholds: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.asarray(images, np.float32), np.asarray(labels)
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
        raise InputError(
            f"labels of {labels.dtype} {labels.shape} for {len(images)} images: expected one integer for each"
        )
    jax.eval_shape(partial(module.init, train=False), jax.random.key(0), images)
    if not np.isfinite(images).all():
        raise InputError("images hold NaN or infinity: remove those examples")
    if labels.min() < 0 or labels.max() >= module.num_classes:
        raise InputError(
            f"labels from {labels.min()} to {labels.max()}: expected 0 to {module.num_classes - 1}; set num_classes"
        )
    if len(thresholds) != len(module.planes) or not all(0 <= t < 1 for t in thresholds):
        raise InputError(
            f"learning thresholds {tuple(thresholds)}: expected {len(module.planes)} numbers in [0, 1), one for each "
            f"layer of planes {module.planes}"
        )
    return images, labels


def _tell(report: Callable[[str], None] | None, name: str, line: str) -> None:
    if report:
        report(f"{name}: {line}")


def _order(n: int, seed: int, *purpose: int) -> np.ndarray:
    """A permutation (n,) from the raw PCG64 stream, which NumPy promises never to change."""
    return np.argsort(np.random.PCG64([seed, *purpose]).random_raw(n), kind="stable")


def _batched(fn: Callable[..., Array], x: np.ndarray, *others: ArrayLike) -> np.ndarray:
    """`fn` of x (n, ...) and of `others`, some images at a time."""
    fn = jax.jit(fn)
    return np.concatenate([np.asarray(fn(x[i : i + _BATCH], *others)) for i in range(0, len(x), _BATCH)])


def _views(pattern: np.ndarray, window: int) -> np.ndarray:
    """What S cells at each position of (h, w, c) see, 0 beyond the border: (h * w, window * window, c)."""
    h, w, c = pattern.shape
    margin = (window // 2, window // 2)
    views = np.lib.stride_tricks.sliding_window_view(
        np.pad(pattern, (margin, margin, (0, 0))), (window, window), (0, 1)
    )
    return views.transpose(0, 1, 3, 4, 2).reshape(h * w, window * window, c)


def add_if_silent(
    x: ArrayLike,
    *,
    window: int,
    threshold: float,
    activity: float = 0.2,
    max_planes: int = 1000,
    report: Callable[[str], None] | None = None,
) -> np.ndarray:
    """The references (window, window, c, planes) that S cells learn from x (n, h, w, c), in the order of x.

    While a pattern has positions where every S cell is silent (similarity at most `threshold`) although its inputs
    are not, a cell plane is added. Its reference is the input at such a position, the one with the largest |x|,
    scaled to |X| = 1; it then stays as it is. Inputs count as silent below `activity` times the largest |x| of the
    pattern: the paper does not say how weak is silent, and every trace would become a plane.

    Raises:
        InputError: more than `max_planes`, or none because nothing in x is active.
    """
    n, c = len(x), x.shape[-1]
    root = np.sqrt(gaussian(window)).astype(np.float32).reshape(-1, 1)
    units = np.zeros((max_planes, window * window * c), np.float32)  # weighted, so that products are similarities
    planes = 0
    for count, pattern in enumerate(np.asarray(x, np.float32)):
        seen = (_views(pattern, window) * root).reshape(-1, window * window * c)
        size = np.linalg.norm(seen, axis=1)
        active = size > activity * size.max()
        seen /= np.maximum(size, np.finfo(np.float32).tiny)[:, None]
        best = (seen @ units[:planes].T).max(1, initial=-1)
        while (silent := active & (best <= threshold)).any():
            if planes == max_planes:
                raise InputError(
                    f"{max_planes} cell planes after {count} of {n} patterns, and more are silent: lower the learning "
                    f"threshold {threshold}, or raise max_planes"
                )
            units[planes] = seen[np.argmax(np.where(silent, size, -1))]
            best = np.maximum(best, seen @ units[planes])
            planes += 1
        if report and (count + 1) % 1000 == 0:
            report(f"{planes} planes after {count + 1:,} of {n:,} patterns")
    if planes == 0:
        raise InputError(
            f"nothing is active in {n} patterns: blank images, or thresholds of the layers before too high"
        )
    if report:
        report(f"{planes} planes")
    kernel = units[:planes].reshape(planes, window * window, c) / root
    return kernel.reshape(planes, window, window, c).transpose(1, 2, 3, 0)


def _references(
    x: np.ndarray, labels: np.ndarray, classes: int, *, orders: Sequence[np.ndarray], report: Callable[[str], None]
) -> np.ndarray:
    """The references (k, r, features) of S4: vectors x (n, features) that came when they were not classified right."""
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    kernel, mutual = np.zeros((classes, 8, x.shape[1]), np.float32), np.zeros((classes, 8, 8), np.float32)
    counts = np.zeros(classes, int)
    similarity = jax.jit(interpolate)
    for turn, order in enumerate(orders, 1):
        before = counts.sum()
        for i in order:
            scores = np.asarray(similarity((kernel @ x[i])[None], mutual))[0]
            label = labels[i]
            if not x[i].any() or (scores.argmax() == label and scores[label] > 0):
                continue
            if (r := int(counts[label])) == kernel.shape[1]:  # twice the room, so that few shapes are compiled
                kernel = np.pad(kernel, ((0, 0), (0, r), (0, 0)))
                mutual = np.pad(mutual, ((0, 0), (0, r), (0, r)))
            kernel[label, r] = x[i]
            mutual[label, r] = mutual[label, :, r] = kernel[label] @ x[i]
            counts[label] += 1
        report(f"{counts.sum()} references after round {turn}, {counts.sum() - before} of them new")
        if counts.sum() == before:
            break
    return kernel[:, : counts.max()]


VARIANTS = {"neocognitron": Entry(Neocognitron, (28, 28, 1), "Fukushima 1980, 2013")}
