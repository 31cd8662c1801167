"""Baselines on the embedded digits, their parts against formulas, and what they refuse (row M1)."""

import builtins
import math

import numpy as np
import pytest

from jaxcnn import baselines
from jaxcnn.baselines import BASELINES, BagOfWords, FisherVectors, Linear, NearestNeighbours, descriptors
from jaxcnn.data.sources import load
from jaxcnn.errors import InputError

SMALL = {"bag_of_words": {"words": 40, "sampled": 2000}, "fisher": {"modes": 4, "components": 8, "sampled": 2000}}


@pytest.fixture(scope="module")
def tiny():
    return load("digits", image_size=(8, 8))


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def small(name):
    if name in SMALL:
        pytest.importorskip("skimage")
    return BASELINES[name](**SMALL.get(name, {}))


# All of them


@pytest.mark.parametrize(("baseline", "floor"), [(Linear(), 0.94), (NearestNeighbours(), 0.97)])
def test_accuracy_on_the_digits(tiny, baseline, floor):
    """As they come, of 8 x 8 pixels."""
    fitted = baseline.fit(tiny.train.images, tiny.train.labels)
    found = fitted.evaluate(tiny.test.images, tiny.test.labels, batch_size=100)
    scores = fitted.scores(tiny.test.images)
    assert scores.shape == (359, 10)
    assert found["accuracy"] > floor
    assert found["count"] == 359
    assert found["correct"] == (scores.argmax(1) == tiny.test.labels).sum()
    assert ("loss" in found) == isinstance(baseline, Linear)
    if "loss" in found:
        np.testing.assert_allclose(np.exp(scores).sum(1), 1, rtol=1e-5)
        expected = -scores[np.arange(359), tiny.test.labels].mean()
        assert found["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "floor"), [("bag_of_words", 0.85), ("fisher", 0.93)])
def test_accuracy_of_local_descriptors(tiny, name, floor):
    """Of 400 images, with small codebooks."""
    pytest.importorskip("skimage")
    settings = {"bag_of_words": {"words": 60}, "fisher": {"modes": 8}}[name]
    fitted = BASELINES[name](step=1, sampled=5000, **settings).fit(tiny.train.images[:400], tiny.train.labels[:400])
    found = fitted.evaluate(tiny.test.images[:150], tiny.test.labels[:150])
    assert found["accuracy"] > floor
    assert "loss" not in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "floor"), [("linear", 0.96), ("knn", 0.975), ("bag_of_words", 0.96), ("fisher", 0.975)]
)
def test_accuracy_at_28_pixels(name, floor):
    if name in SMALL:
        pytest.importorskip("skimage")
    digits = load("digits")
    fitted = BASELINES[name]().fit(digits.train.images, digits.train.labels)
    assert fitted.evaluate(digits.test.images, digits.test.labels)["accuracy"] > floor


@pytest.mark.parametrize("name", BASELINES)
def test_the_same_seed_gives_the_same_scores(name, tiny):
    images, labels = tiny.train.images[:120], tiny.train.labels[:120]
    first, second = (small(name).fit(images, labels).scores(tiny.test.images[:20]) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_missing_classes_and_constant_images(name, channels):
    """Labels 1 and 3 of 5 classes; one image of each is constant."""
    baseline, images, labels = small(name), pixels(40, 12, 10, channels), np.arange(40) % 2 * 2 + 1
    images[:2] = 7
    images[labels == 3] //= 4
    fitted = baseline.fit(images, labels, num_classes=5)
    scores = fitted.scores(images)
    assert scores.dtype == np.float32
    assert np.isfinite(scores[:, [1, 3]]).all()
    assert np.isneginf(scores[:, [0, 2, 4]]).all()
    assert fitted.evaluate(images, labels)["accuracy"] > 0.5
    absent = fitted.evaluate(images, np.zeros(40, int))
    assert absent["correct"] == 0
    assert absent.get("loss", math.inf) == math.inf


@pytest.mark.parametrize("name", BASELINES)
def test_what_cannot_be_used_is_refused(name):
    baseline, images, labels = small(name), pixels(40, 9, 9, 1), np.arange(40) % 2
    for wrong in (images[0], images[:0], images.astype(np.float32)):
        with pytest.raises(InputError, match="expected \\(b, h, w, c\\)"):
            baseline.fit(wrong, labels)
    for wrong in (labels[:5], labels - 1, labels * 1.0):
        with pytest.raises(InputError, match="integers from 0"):
            baseline.fit(images, wrong)
    with pytest.raises(InputError, match="only class 0"):
        baseline.fit(images, labels * 0)
    with pytest.raises(InputError, match="num_classes 1"):
        baseline.fit(images, labels, num_classes=1)
    fitted = baseline.fit(images, labels)
    with pytest.raises(InputError, match="trained on"):
        fitted.scores(pixels(2, 10, 9, 1))
    with pytest.raises(InputError, match="give fit num_classes"):
        fitted.evaluate(images, labels + 1)


# Linear and neighbours


def test_the_linear_classifier_is_at_its_optimum():
    """The gradient of the objective, in NumPy, is 0 there; the intercept bears no penalty."""
    images, labels = pixels(60, 3, 3, 1), np.arange(60) % 3
    fitted = Linear(inverse_decay=0.5).fit(images, labels)
    x, w = images.reshape(60, 9) / 255, fitted.classifier.coef_
    errors = np.exp(fitted.scores(images)) - np.eye(3)[labels]
    np.testing.assert_allclose(errors.T @ x + w / 0.5, 0, atol=1e-2)
    np.testing.assert_allclose(errors.sum(0), 0, atol=1e-2)


def test_neighbours_vote():
    images, labels = pixels(30, 4, 4, 1), np.arange(30) % 3
    fitted, tests = NearestNeighbours(5).fit(images, labels), pixels(6, 4, 4, 1, seed=1)
    distances = np.square(tests[:, None].astype(float) - images[None]).sum((2, 3, 4))
    nearest = labels[np.argsort(distances, 1)[:, :5]]
    np.testing.assert_allclose(fitted.scores(tests), np.eye(3)[nearest].mean(1), rtol=1e-6)
    with pytest.raises(InputError, match="neighbours 31"):
        NearestNeighbours(31).fit(images, labels)
    with pytest.raises(InputError, match="inverse_decay 0"):
        Linear(inverse_decay=0).fit(images, labels)


# Descriptors and their codebooks


def test_descriptors_at_three_scales():
    pytest.importorskip("skimage")
    assert descriptors(pixels(8, 8, 1)).shape == (9 + 4 + 1, 136)
    assert descriptors(pixels(28, 28, 1)).shape == (11**2 + 7**2 + 4**2, 136)
    assert descriptors(pixels(32, 32, 3)).shape == (12**2 + 8**2 + 4**2, 136)
    assert descriptors(pixels(20, 30, 1), radii=(5,), step=1).shape == (10 * 20, 136)
    found = descriptors(pixels(16, 16, 3))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_descriptors_do_not_depend_on_brightness_contrast_and_place():
    pytest.importorskip("skimage")
    image = pixels(16, 16, 1) // 4
    np.testing.assert_allclose(descriptors(3 * image + 20), descriptors(image), atol=1e-5)
    np.testing.assert_allclose(descriptors(np.repeat(image, 3, 2)), descriptors(image), atol=1e-5)
    np.testing.assert_allclose(descriptors(np.full((16, 16, 1), 9, np.uint8)), 136**-0.5, rtol=1e-5)
    # Where an object on plain ground stands makes no difference, but by the grid's step.
    ground = np.zeros((2, 40, 40, 1), np.uint8)
    ground[0, 12:18, 12:18], ground[1, 16:22, 18:24] = pixels(6, 6, 1), pixels(6, 6, 1)
    first, second = (np.sort(descriptors(one, radii=(2,), step=1).round(4), 0) for one in ground)
    np.testing.assert_allclose(first, second, atol=1e-3)


def test_descriptors_refuse_what_does_not_fit():
    pytest.importorskip("skimage")
    with pytest.raises(InputError, match="2 channels"):
        descriptors(pixels(9, 9, 2))
    with pytest.raises(InputError, match="at least 8 pixels"):
        descriptors(pixels(7, 9, 1))
    for wrong in ({"radii": (4, 5)}, {"radii": (0,)}, {"step": 0}):
        with pytest.raises(InputError, match="patches of 2 r"):
            descriptors(pixels(10, 10, 1), **wrong)


def test_a_bag_of_words_is_a_histogram():
    pytest.importorskip("skimage")
    assert baselines.histogram(np.array([2, 0, 2, 2]), 4).tolist() == [0.25, 0, 0.75, 0]
    images, labels = pixels(20, 8, 8, 1), np.arange(20) % 2
    encoded = BagOfWords(words=10, power=1).fit(images, labels).encode(images)
    assert encoded.shape == (20, 10)
    np.testing.assert_allclose(encoded.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(encoded * 14, np.round(encoded * 14), atol=1e-5)  # of 14 descriptors


def test_fewer_descriptors_than_words():
    pytest.importorskip("skimage")
    images, labels = pixels(4, 8, 8, 1), np.arange(4) % 2
    assert BagOfWords(words=50).fit(images, labels).encode(images).shape == (4, 50)
    with pytest.raises(InputError, match="57 words from 56 different descriptors"):
        BagOfWords(words=57).fit(images, labels)
    with pytest.raises(InputError, match="4 modes from 1 different"):
        FisherVectors(modes=4).fit(images * 0, labels)
    with pytest.raises(InputError, match="words 0"):
        BagOfWords(words=0).fit(images, labels)


def test_a_fisher_vector_is_its_formula():
    """Equations 6 and 7 of Perronnin et al. 2010, by loops."""
    pytest.importorskip("skimage")
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(0)
    x = rng.normal(size=(25, 3))
    mixture = GaussianMixture(2, covariance_type="diag", random_state=0).fit(rng.normal(size=(200, 3)) * [1, 2, 3])
    weights, means, stds = mixture.weights_, mixture.means_, np.sqrt(mixture.covariances_)
    first, second = np.zeros((2, 3)), np.zeros((2, 3))
    for point in x:
        u = (point - means) / stds
        densities = weights * np.exp(-np.square(u).sum(1) / 2) / stds.prod(1)
        posterior = (densities / densities.sum())[:, None]
        first += posterior * u / (25 * np.sqrt(weights[:, None]))
        second += posterior * (u**2 - 1) / (25 * np.sqrt(2 * weights[:, None]))
    expected = np.concatenate([first.ravel(), -second.ravel()])
    expected = np.sign(expected) * np.abs(expected) ** 0.5
    found = baselines.fisher(x, mixture)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-6)
    np.testing.assert_allclose(baselines.fisher(np.concatenate([x, x[::-1]]), mixture), found, rtol=1e-6)


def test_scikit_image_is_named_where_it_is_missing(monkeypatch):
    found = builtins.__import__

    def without(name, *rest):
        if name.startswith("skimage"):
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="jaxcnn\\[baselines\\]"):
        descriptors(pixels(9, 9, 1))
