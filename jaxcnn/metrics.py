"""Metrics: `fn(outputs, batch) -> Total(sum, count)`; totals are added on the host and divided once."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.errors import InputError
from jaxcnn.losses import central
from jaxcnn.types import Array, Batch


class Total(NamedTuple):
    """float32 scalars: the sum of a value over the real examples of a batch, and their number."""

    sum: Array
    count: Array


Metric = Callable[[Any, Batch], Total]


def top_k(k: int) -> Metric:
    """The share of examples whose label is among the k largest of n logits (b, ..., n); labels as in Batch.

    Equal logits rank by index, the lower first. A row with a NaN, or a label outside the row, is never
    correct; where k >= n every other one is. Soft labels stand for their largest entry. Axes between b and n
    (pixels) are averaged. `batch["mask"]` (b,) leaves out examples at 0. Of a model with auxiliary heads, whose
    outputs in training are a tuple, `outputs.logits` count. Raises InputError unless k >= 1.
    """
    if k < 1:
        raise InputError(f"top-{k} accuracy: expected k of at least 1")

    def metric(outputs: Any, batch: Batch) -> Total:
        outputs = getattr(outputs, "logits", outputs)
        correct = (_rank(outputs, _class_indices(batch["label"])) < k).astype(jnp.float32)
        mask = _mask(outputs, batch)
        return Total(jnp.sum(correct.reshape(correct.shape[0], -1).mean(1) * mask), jnp.sum(mask))

    return metric


def accuracy(outputs: Any, batch: Batch) -> Total:
    """The share of examples whose label has the largest logit: `top_k(1)`."""
    return top_k(1)(outputs, batch)


def pixel_error(outputs: Array, batch: Batch) -> Total:
    """The share of pixels whose label has not the largest logit: outputs (b, h, w, k), labels (b, h, w).

    A mean over the examples, whose maps all have one size. Of larger maps `losses.central` is judged; ties, NaN and
    `batch["mask"]` as in `top_k`.
    """
    right = accuracy(central(outputs, batch["label"]), batch)
    return Total(right.count - right.sum, right.count)


def iou(k: int) -> Metric:
    """Intersection over union of the pixels labelled and those predicted k: outputs (b, h, w, n), labels (b, h, w).

    The total is Total(intersection, union), in pixels, so that their sums over a whole split are divided once: an
    image without the class weighs nothing. A batch's pixels are counted exactly up to 2^24. Of larger maps
    `losses.central` is judged; ties as in `top_k`, and NaN predicts nothing. `batch["mask"]` (b,) leaves out examples.
    """

    def metric(outputs: Array, batch: Batch) -> Total:
        logits, labels = central(outputs, batch["label"]), batch["label"]
        predicted = (jnp.argmax(logits, -1) == k) & ~jnp.isnan(logits).any(-1)
        counted = (_mask(logits, batch) > 0).reshape(-1, 1, 1)
        both = predicted & (labels == k) & counted
        either = (predicted | (labels == k)) & counted
        return Total(both.sum(dtype=jnp.float32), either.sum(dtype=jnp.float32))

    return metric


CLASSIFICATION: dict[str, Metric] = {"accuracy": accuracy, "top5": top_k(5)}
SEGMENTATION: dict[str, Metric] = {"pixel_error": pixel_error, "iou": iou(1)}
"""Of two classes, 1 being what is looked for; for others, a table with `iou` of theirs."""


def confusion(outputs: Array, batch: Batch, k: int) -> Array:
    """How often each class was taken for each: logits (b, k) -> int32 (k, k), rows true, columns predicted.

    Ties as in `top_k`; examples masked out, and rows with a NaN, which predict nothing, are not counted.
    Raises InputError unless the logits have k classes.
    """
    if outputs.ndim != 2 or outputs.shape[1] != k:
        raise InputError(f"confusion of {k} classes from outputs {outputs.shape}: expected (b, {k})")
    counted = (_mask(outputs, batch) > 0) & ~jnp.isnan(outputs).any(-1)
    cells = _class_indices(batch["label"]), jnp.argmax(outputs, -1)
    return jnp.zeros((k, k), jnp.int32).at[cells].add(counted.astype(jnp.int32))


class Totals:
    """Sums and counts of named metrics over many batches, kept on the host: counts as int, sums as float64.

    Sums of 0 and 1 therefore stay exact, whatever the size of the batches.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, totals: Mapping[str, Total]) -> None:
        """Add one batch, of the device (for which this waits) or of the host; or several, in order, of arrays (n,)."""
        for name, total in totals.items():
            sums, counts = np.asarray(total.sum, np.float64), np.asarray(total.count, np.float64)
            self.sums[name] = self.sums.get(name, 0.0) + float(sums.sum())
            self.counts[name] = self.counts.get(name, 0) + int(counts.sum())

    def means(self) -> dict[str, float]:
        """sum / count of each metric. Raises InputError where no example was counted."""
        empty = [name for name, count in self.counts.items() if count == 0]
        if empty or not self.counts:
            raise InputError(f"no example counted for {', '.join(empty) or 'any metric'}: is the data empty?")
        return {name: self.sums[name] / count for name, count in self.counts.items()}

    def result(self) -> dict[str, float]:
        """An evaluation's result: the means, `count`, an int, and with an accuracy `correct`, an int."""
        result: dict[str, float] = self.means()
        result["count"] = self.counts["loss"]
        if "accuracy" in self.sums:
            result["correct"] = round(self.sums["accuracy"])
        return result


def _rank(logits: Array, labels: Array) -> Array:
    """How many classes come before the true one: (b, ..., k), (b, ...) -> int32; enormous for a bad row."""
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    labels = labels[..., None].astype(jnp.int32)
    true_logit = jnp.max(jnp.where(index == labels, logits, -jnp.inf), -1, keepdims=True)
    before = (logits > true_logit) | ((logits == true_logit) & (index < labels))
    bad = jnp.isnan(logits).any(-1) | ~(index == labels).any(-1)
    return jnp.where(bad, jnp.iinfo(jnp.int32).max, before.sum(-1, dtype=jnp.int32))


def _class_indices(labels: Array) -> Array:
    labels = jnp.asarray(labels)
    return labels if jnp.issubdtype(labels.dtype, jnp.integer) else jnp.argmax(labels, -1)


def _mask(outputs: Array, batch: Batch) -> Array:
    mask = batch.get("mask")
    return jnp.ones(outputs.shape[:1], jnp.float32) if mask is None else jnp.asarray(mask).astype(jnp.float32)
