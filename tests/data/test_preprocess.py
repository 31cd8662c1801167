"""Preprocessing: statistics against NumPy in float64, covariance, inverse, storage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcnn.data import preprocess
from jaxcnn.data.preprocess import PREPROCESSINGS, Preprocessing, fit, to_float
from jaxcnn.errors import InputError

FITTED = [kind for kind in PREPROCESSINGS if kind not in ("imagenet", "inception")]


def correlated_images(count: int = 400) -> np.ndarray:
    """Pixels that move together, as those of photographs do: (count, 4, 3, 2) uint8."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(24, 24)) + 2 * np.ones((24, 24)) / 24
    values = 128 + 12 * rng.normal(size=(count, 24)) @ mixing
    return np.clip(values, 0, 255).astype(np.uint8).reshape(count, 4, 3, 2)


IMAGES = correlated_images()
EXACT = IMAGES.astype(np.float64) / 255


def covariance(x) -> np.ndarray:
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    return np.cov(flat.T, bias=True)


def off_diagonal(matrix: np.ndarray) -> float:
    return float(np.abs(matrix - np.diag(np.diag(matrix))).max())


# Values.


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", EXACT),
        ("mean_image", EXACT - EXACT.mean(0)),
        ("channel_mean", EXACT - EXACT.mean((0, 1, 2))),
        ("standardize", (EXACT - EXACT.mean((0, 1, 2))) / EXACT.std((0, 1, 2))),
        ("scale", 2 * EXACT - 1),
    ],
)
def test_elementwise_kinds_are_their_formula(kind, expected, strict_dtypes):
    result = jax.jit(fit(kind, IMAGES))(to_float(IMAGES))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, atol=3e-6)


def test_a_worked_example():
    # two points (0, 0) and (2, 2) on the diagonal: variance 2 along it, 0 across it, mean (1, 1)
    points = np.array([[0.0, 0.0], [2.0, 2.0]])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(fit("pca", points)(points)[:, 0], [-2 * half, 2 * half], atol=1e-6)
    np.testing.assert_allclose(fit("pca", points)(points)[:, 1], 0, atol=1e-6)
    np.testing.assert_allclose(fit("whiten", points)(points), [[-1, 0], [1, 0]], atol=1e-5)
    np.testing.assert_allclose(fit("zca", points)(points), [[-half, -half], [half, half]], atol=1e-5)
    np.testing.assert_allclose(fit("standardize", points)(points), [[-1, -1], [1, 1]], atol=1e-6)


def test_principal_components_are_those_of_the_covariance():
    fitted = fit("pca", IMAGES)
    variance = np.linalg.eigvalsh(covariance(EXACT))[::-1]
    rotated = covariance(fitted(to_float(IMAGES)))
    np.testing.assert_allclose(np.diag(rotated), variance, rtol=1e-4)
    assert off_diagonal(rotated) < 1e-6
    axes = np.asarray(fitted.arrays["axes"], np.float64)
    np.testing.assert_allclose(axes.T @ axes, np.eye(24), atol=1e-6)


@pytest.mark.parametrize("kind", ["whiten", "zca"])
def test_whitening_leaves_the_identity_as_covariance(kind):
    result = covariance(fit(kind, IMAGES)(to_float(IMAGES)))
    np.testing.assert_allclose(result, np.eye(24), atol=2e-2)  # EPSILON shrinks the smallest variances
    assert off_diagonal(result) < (1e-4 if kind == "whiten" else 2e-2)


@pytest.mark.parametrize("kind", ["mean_image", "channel_mean", "standardize", "scale"])
def test_elementwise_normalisation_leaves_the_covariance_non_diagonal(kind):
    result = covariance(fit(kind, IMAGES)(to_float(IMAGES)))
    assert off_diagonal(result) > 0.1 * np.diag(result).max()


def test_zca_stays_closest_to_the_images():
    x = to_float(IMAGES)
    centred = np.asarray(fit("mean_image", IMAGES)(x)).ravel()
    similarity = {k: np.corrcoef(np.asarray(fit(k, IMAGES)(x)).ravel(), centred)[0, 1] for k in ("whiten", "zca")}
    assert similarity["zca"] > 0.5 > abs(similarity["whiten"])


# Inverse.


@pytest.mark.parametrize("kind", FITTED)
def test_invert_undoes_the_call_on_unseen_images(kind):
    fitted = fit(kind, IMAGES[:300])
    x = to_float(IMAGES[300:])
    np.testing.assert_allclose(fitted.invert(fitted(x)), x, atol=2e-5)


@pytest.mark.parametrize("kind", ["standardize", "whiten"])
@settings(max_examples=25, deadline=None)
@given(
    targets=hnp.arrays(np.float64, (12, 3), elements=st.floats(-1, 1, width=32)),
    scale=st.sampled_from([1e-4, 1.0, 1e5]),
    shift=st.floats(-3, 3),
)
def test_predictions_map_back_to_the_units_of_the_targets(kind, targets, scale, shift):
    targets = scale * (targets + shift)
    fitted = fit(kind, targets)
    back = fitted.invert(fitted(targets.astype(np.float32)))
    np.testing.assert_allclose(back, targets, atol=1e-4 * scale * 4)


# Statistics.


def test_channel_mean_is_known_for_every_kind():
    for kind in FITTED:
        np.testing.assert_allclose(fit(kind, IMAGES).channel_mean, EXACT.mean((0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize("kind", FITTED)
def test_the_size_of_the_chunks_plays_no_part(kind, monkeypatch):
    whole = fit(kind, IMAGES).arrays
    monkeypatch.setattr(preprocess, "CHUNK_BYTES", 8 * 24 * 7)  # 7 images, which do not divide 400
    for name, array in fit(kind, IMAGES).arrays.items():
        np.testing.assert_allclose(array, whole[name], atol=1e-6, err_msg=name)


def test_sums_do_not_lose_a_large_mean():
    values = 1e4 + np.random.default_rng(0).normal(size=(5000, 1))
    fitted = fit("standardize", values)
    np.testing.assert_allclose(fitted.arrays["std"], values.std(), rtol=1e-6)


def test_uint8_and_its_float_images_give_the_same_statistics():
    for name, array in fit("standardize", IMAGES).arrays.items():
        np.testing.assert_allclose(array, fit("standardize", np.asarray(to_float(IMAGES))).arrays[name], rtol=1e-6)


@pytest.mark.parametrize("kind", FITTED)
def test_constant_pixels_stay_finite(kind):
    images = IMAGES.copy()
    images[..., 1] = 40
    fitted = fit(kind, images)
    assert np.isfinite(fitted(to_float(images))).all()
    assert np.isfinite(fitted(to_float(IMAGES))).all()
    constant = np.full((5, 2, 2, 1), 0.1, np.float32)
    np.testing.assert_allclose(fit(kind, constant).invert(fit(kind, constant)(constant)), constant, atol=1e-6)


def test_a_constant_channel_is_centred_and_not_scaled():
    fitted = fit("standardize", np.full((1000, 3, 3, 1), 0.1, np.float32))
    np.testing.assert_array_equal(fitted.arrays["std"], 1)
    np.testing.assert_allclose(fitted(np.full((1, 3, 3, 1), 0.6, np.float32)), 0.5, atol=1e-6)


# Use.


def test_it_can_be_an_argument_of_a_jitted_function():
    fitted = fit("zca", IMAGES)
    x = to_float(IMAGES)
    result = jax.jit(lambda fitted, x: fitted(x))(fitted, x)
    np.testing.assert_allclose(result, fitted(x), atol=1e-5)


def test_float64_stays_float64(float64):
    assert fit("standardize", IMAGES)(jnp.asarray(EXACT)).dtype == jnp.float64


def test_to_float():
    np.testing.assert_allclose(to_float(np.array([0, 51, 255], np.uint8)), [0, 0.2, 1], rtol=1e-6)
    assert to_float(np.ones(3, np.uint8)).dtype == jnp.float32
    halves = jnp.full(3, 0.5, jnp.bfloat16)
    assert to_float(halves).dtype == jnp.bfloat16
    with pytest.raises(InputError, match="int32, expected floating point"):
        to_float(np.ones(3, np.int32))


@pytest.mark.parametrize("kind", FITTED)
def test_what_was_saved_is_loaded_to_the_bit(kind, tmp_path):
    fitted = fit(kind, IMAGES)
    fitted.save(tmp_path / "preprocessing.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessing.npz"]
    again = preprocess.load(tmp_path / "preprocessing.npz")
    assert again.kind == kind
    assert again.arrays.keys() == fitted.arrays.keys()
    for name, array in fitted.arrays.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(again.arrays[name], array)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "preprocessing.npz"
    fit("scale", IMAGES).save(path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        fit("none", IMAGES).save(path)
    assert preprocess.load(path).kind == "scale"
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "preprocessing.npz"
    with pytest.raises(InputError, match="cannot read preprocessing"):
        preprocess.load(path)
    fit("zca", IMAGES).save(path)
    content = path.read_bytes()
    for damaged in (b"", content[:200], content[: len(content) // 2], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot read preprocessing"):
            preprocess.load(path)
    Preprocessing("scail", {}).save(path)
    with pytest.raises(InputError, match="did you mean 'scale'"):
        preprocess.load(path)


@pytest.mark.parametrize(
    ("kind", "images", "message"),
    [
        ("standardise", IMAGES, "did you mean 'standardize'"),
        ("none", IMAGES[:0], r"shape \(0, 4, 3, 2\)"),
        ("none", np.array([[[[np.nan]]]]), "NaN or infinite"),
        ("zca", np.zeros((2, 100, 100, 1), np.uint8), "10000 values per example is too large, at most 8192"),
    ],
)
def test_fit_refuses_what_it_cannot_use(kind, images, message):
    with pytest.raises(InputError, match=message):
        fit(kind, images)


def test_a_batch_of_another_shape_or_type_is_refused():
    with pytest.raises(InputError, match=r"fitted on \(\.\.\., 4, 3, 2\), got \(5, 4, 4, 2\)"):
        fit("mean_image", IMAGES)(jnp.zeros((5, 4, 4, 2)))
    with pytest.raises(InputError, match="uint8, expected floating point: call to_float first"):
        fit("scale", IMAGES)(IMAGES)
    assert fit("standardize", IMAGES)(jnp.zeros((5, 9, 9, 2))).shape == (5, 9, 9, 2)
