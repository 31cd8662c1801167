"""Losses against closed forms, SciPy and PyTorch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxcnn.errors import InputError
from jaxcnn.losses import classification, cross_entropy, mse
from jaxcnn.metrics import accuracy


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32) * 4


LABELS = np.array([0, 4, 2, 2, 1, 3])


@pytest.mark.usefixtures("strict_dtypes")
def test_cross_entropy_is_minus_log_of_the_softmax_at_the_label(logits):
    expected = -np.log(special.softmax(logits.astype(np.float64), -1))[np.arange(6), LABELS]
    np.testing.assert_allclose(cross_entropy(logits, LABELS), expected, rtol=1e-5)


def test_uniform_logits_give_log_k_whatever_the_label():
    np.testing.assert_allclose(cross_entropy(np.zeros((3, 7)), np.array([0, 3, 6])), np.log(7), rtol=1e-6)


def test_one_hot_soft_labels_equal_integer_labels(logits):
    soft = np.eye(5, dtype=np.float32)[LABELS]
    np.testing.assert_allclose(cross_entropy(logits, soft), cross_entropy(logits, LABELS), rtol=1e-6)


@pytest.mark.usefixtures("strict_dtypes")
def test_label_smoothing_is_the_cross_entropy_of_the_mixed_target(logits):
    mixed = 0.9 * np.eye(5, dtype=np.float32)[LABELS] + np.float32(0.1 / 5)
    np.testing.assert_allclose(
        cross_entropy(logits, LABELS, label_smoothing=0.1), cross_entropy(logits, mixed), rtol=1e-5
    )
    soft = np.eye(5, dtype=np.float32)[LABELS]
    np.testing.assert_allclose(
        cross_entropy(logits, soft, label_smoothing=0.1), cross_entropy(logits, mixed), rtol=1e-5
    )


def test_gradient_is_softmax_minus_target(logits):
    gradient = jax.grad(lambda x: cross_entropy(x, LABELS).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, special.softmax(logits, -1) - np.eye(5)[LABELS], atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_equals_pytorch(logits, smoothing):
    torch = pytest.importorskip("torch")
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(LABELS), reduction="none", label_smoothing=smoothing
    )
    np.testing.assert_allclose(cross_entropy(logits, LABELS, label_smoothing=smoothing), expected.numpy(), rtol=1e-5)


def test_a_map_of_logits_is_averaged_over_its_pixels():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.integers(0, 5, (2, 3, 4))
    each = cross_entropy(logits.reshape(-1, 5), labels.reshape(-1)).reshape(2, -1)
    np.testing.assert_allclose(cross_entropy(logits, labels), each.mean(1), rtol=1e-6)


def test_bfloat16_logits_are_reduced_in_float32_and_float64_stays(logits, float64):
    assert cross_entropy(jnp.asarray(logits, jnp.bfloat16), LABELS).dtype == jnp.float32
    assert cross_entropy(logits.astype(np.float64), LABELS).dtype == jnp.float64
    assert mse(jnp.ones((2, 3), jnp.bfloat16), np.zeros((2, 3))).dtype == jnp.float32


def test_large_logits_do_not_overflow():
    np.testing.assert_allclose(cross_entropy(np.float32([[1e4, 0.0]]), np.array([1])), [1e4])


def test_a_label_outside_the_classes_is_not_a_number():
    assert np.isnan(cross_entropy(np.zeros((2, 3)), np.array([3, -1]))).all()


def test_mse_is_the_gaussian_negative_log_likelihood_up_to_constants():
    rng = np.random.default_rng(2)
    outputs, targets, sigma = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), 0.7
    nll = -stats.norm.logpdf(targets, loc=outputs, scale=sigma).sum(1)
    from_mse = 6 * np.asarray(mse(outputs, targets)) / (2 * sigma**2) + 3 * np.log(2 * np.pi * sigma**2)
    np.testing.assert_allclose(from_mse, nll, rtol=1e-5)


def test_classification_reads_the_label_of_the_batch(logits):
    loss = classification(label_smoothing=0.1)(logits, {"label": LABELS, "image": None})
    np.testing.assert_array_equal(loss, cross_entropy(logits, LABELS, label_smoothing=0.1))


def test_shapes_that_do_not_belong_together_are_refused(logits):
    with pytest.raises(InputError, match=r"integer labels \(5,\).*expected \(6,\)"):
        cross_entropy(logits, LABELS[:5])
    with pytest.raises(InputError, match="soft labels"):
        cross_entropy(logits, LABELS.astype(np.float32))
    with pytest.raises(InputError, match=r"label smoothing is 1\.5"):
        cross_entropy(logits, LABELS, label_smoothing=1.5)
    with pytest.raises(InputError, match="must be equal"):
        mse(np.zeros((2, 1)), np.zeros(2))


def test_auxiliary_heads_add_their_share_and_metrics_read_the_main_logits():
    class Outputs(NamedTuple):
        logits: jax.Array
        aux1: jax.Array
        aux2: jax.Array

    main, aux1, aux2 = jax.random.normal(jax.random.key(0), (3, 4, 5))
    batch = {"image": jnp.zeros((4, 1)), "label": jnp.arange(4)}
    expected = sum(
        weight * cross_entropy(logits, batch["label"]) for weight, logits in ((1, main), (0.3, aux1), (0.3, aux2))
    )
    outputs = Outputs(main, aux1, aux2)
    np.testing.assert_allclose(classification()(outputs, batch), expected, rtol=1e-6)
    assert accuracy(outputs, batch) == accuracy(main, batch)
