"""Metrics against NumPy; totals that do not depend on how the data were cut into batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcnn.errors import InputError
from jaxcnn.metrics import CLASSIFICATION, Total, Totals, accuracy, confusion, top_k


def value(total):
    return float(total.sum), float(total.count)


jitted_accuracy = jax.jit(accuracy)


@pytest.mark.usefixtures("strict_dtypes")
def test_accuracy_counts_and_honours_the_mask():
    logits = jnp.asarray([[2.0, 1], [0, 1], [5, 1], [0, 9]])
    labels = jnp.asarray([0, 0, 0, 1])
    total = accuracy(logits, {"label": labels})
    assert value(total) == (3, 4)
    assert total.sum.dtype == total.count.dtype == jnp.float32
    for dtype in (bool, np.float32, np.int32):
        mask = jnp.asarray([1, 1, 0, 0]).astype(dtype)
        assert value(accuracy(logits, {"label": labels, "mask": mask})) == (1, 2)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_top_k_equals_a_stable_sort(seed, k):
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 3, (9, 4)).astype(np.float32)  # many ties
    labels = rng.integers(0, 4, 9)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert value(top_k(k)(jnp.asarray(logits), {"label": labels})) == ((order == labels[:, None]).sum(), 9)


def test_equal_logits_count_only_for_the_lowest_index():
    logits = jnp.zeros((4, 4))
    assert value(accuracy(logits, {"label": jnp.arange(4)})) == (1, 4)
    assert value(top_k(3)(logits, {"label": jnp.arange(4)})) == (3, 4)


def test_top_5_of_few_classes_is_every_example():
    assert value(CLASSIFICATION["top5"](jnp.ones((2, 3)), {"label": jnp.array([0, 2])})) == (2, 2)


@pytest.mark.parametrize("metric", [accuracy, top_k(5)])
@pytest.mark.parametrize("row", [[np.nan, 0, 0], [0, np.nan, 9], [np.nan] * 3])
def test_a_row_with_a_nan_is_never_correct(metric, row):
    for label in range(3):
        assert value(metric(jnp.asarray([row], jnp.float32), {"label": jnp.array([label])})) == (0, 1)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_is_never_correct(label):
    for logits in ([[0.0, 1, 2]], [[-np.inf] * 3]):
        assert value(top_k(3)(jnp.asarray(logits), {"label": jnp.array([label])})) == (0, 1)


def test_soft_labels_stand_for_their_largest_entry():
    soft = jnp.asarray([[0.3, 0.7], [0.6, 0.4]])
    assert value(accuracy(jnp.asarray([[0.0, 1], [0, 1]]), {"label": soft})) == (1, 2)


def test_pixels_are_averaged_within_an_example():
    logits = np.broadcast_to(np.eye(3, dtype=np.float32)[1], (2, 2, 2, 3))
    labels = jnp.asarray([[[1, 1], [1, 0]], [[1, 1], [1, 1]]])
    assert value(jitted_accuracy(logits, {"label": labels})) == (1.75, 2)


def test_accuracy_is_the_same_under_jit_on_a_sharded_batch():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(32, 5)).astype(np.float32), rng.integers(0, 5, 32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put((logits, labels), jax.NamedSharding(mesh, jax.P("data")))
    sharded = jitted_accuracy(placed[0], {"label": placed[1]})
    assert value(sharded) == value(accuracy(jnp.asarray(logits), {"label": labels}))


def test_confusion_has_true_classes_in_rows_and_agrees_with_accuracy():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(50, 4)).astype(np.float32), rng.integers(0, 4, 50)
    mask = rng.random(50) < 0.7
    expected = np.zeros((4, 4), int)
    np.add.at(expected, (labels[mask], logits.argmax(1)[mask]), 1)
    batch = {"label": jnp.asarray(labels), "mask": jnp.asarray(mask)}
    counts = confusion(jnp.asarray(logits), batch, 4)
    np.testing.assert_array_equal(counts, expected)
    assert (int(counts.trace()), int(counts.sum())) == value(accuracy(jnp.asarray(logits), batch))


def test_confusion_leaves_out_rows_that_predict_nothing():
    logits = jnp.asarray([[np.nan, 1.0], [0, 1]])
    np.testing.assert_array_equal(confusion(logits, {"label": jnp.array([0, 1])}, 2), [[0, 0], [0, 1]])
    with pytest.raises(InputError, match="confusion of 3 classes"):
        confusion(logits, {"label": jnp.array([0, 1])}, 3)


@pytest.mark.parametrize("size", [1000, 128, 7])
def test_padded_batches_of_any_size_give_the_same_totals(size):
    rng = np.random.default_rng(2)
    correct = rng.random(2003) < 0.9
    totals = Totals()
    for start in range(0, len(correct), size):
        part = correct[start : start + size]
        padding = size - len(part)
        logits = np.pad(np.stack([part, ~part], 1).astype(np.float32), ((0, padding), (0, 0)))
        mask = np.arange(size) < len(part)
        batch = {"label": np.zeros(size, int), "mask": mask}
        totals.add({"accuracy": jitted_accuracy(logits, batch)})
    assert totals.sums["accuracy"] == correct.sum()
    assert totals.counts["accuracy"] == 2003
    assert isinstance(totals.counts["accuracy"], int)
    assert totals.means() == {"accuracy": correct.mean()}


def test_totals_stay_exact_beyond_float32():
    totals = Totals()
    for _ in range(3):
        totals.add({"hits": Total(np.float32(2**24), np.float32(2**24))})
    totals.add({"hits": Total(np.float32(1), np.float32(1))})
    assert totals.counts["hits"] == totals.sums["hits"] == 3 * 2**24 + 1


def test_nothing_counted_is_an_error():
    with pytest.raises(InputError, match="no example counted"):
        Totals().means()
    totals = Totals()
    totals.add({"accuracy": Total(np.float32(0), np.float32(0))})
    with pytest.raises(InputError, match="no example counted for accuracy"):
        totals.means()
    with pytest.raises(InputError, match="top-0"):
        top_k(0)
