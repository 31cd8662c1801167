"""The neocognitron: its cells against the papers' equations, its growth by what add-if-silent promises."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcnn.data import sources
from jaxcnn.errors import InputError
from jaxcnn.models.neocognitron import (
    ORIENTATIONS,
    VARIANTS,
    Neocognitron,
    add_if_silent,
    c_cells,
    class_similarity,
    contrast,
    edge_references,
    gaussian,
    grow,
    s_cells,
)
from jaxcnn.tree import flatten

SMALL = partial(Neocognitron, planes=(5, 6), references=3, num_classes=4)


@pytest.fixture(scope="module")
def digits():
    """100 of the embedded digits: 10 of each class."""
    split = sources.load("digits").train
    return split.take(np.concatenate([np.flatnonzero(split.labels == k)[:10] for k in range(10)]))


@pytest.fixture(scope="module")
def grown(digits):
    return grow(Neocognitron(), digits.images, digits.labels)


@partial(jax.jit, static_argnums=0)
def classify(module, variables, x):
    return module.apply(variables, x, train=False)


similarity = jax.jit(class_similarity)


def random(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, shape).astype(np.float32)


def similarities(x, kernel):
    """(h, w, planes) and (h, w): s and |x| of the paper for one pattern, position by position."""
    window = kernel.shape[0]
    c = gaussian(window)[:, :, None]
    padded = np.pad(x, ((window // 2,) * 2, (window // 2,) * 2, (0, 0)))
    s, size = np.zeros((*x.shape[:2], kernel.shape[-1])), np.zeros(x.shape[:2])
    lengths = np.sqrt((c[..., None] * kernel**2).sum((0, 1, 2)))
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            seen = padded[i : i + window, j : j + window]
            size[i, j] = np.sqrt((c * seen**2).sum())
            s[i, j] = np.einsum("hwc,hwc,hwck->k", np.broadcast_to(c, seen.shape), seen, kernel) / lengths
            s[i, j] /= max(size[i, j], 1e-30)
    return s, size


def test_an_s_cell_answers_by_the_cosine_of_its_input_and_its_reference():
    x, kernel = random(2, 6, 5, 3), random(3, 3, 3, 4, seed=1)
    out = jax.jit(partial(s_cells, threshold=0.7))(x, kernel)
    for n in range(2):
        s, size = similarities(x[n], kernel)
        assert (s > 0.7).any()
        assert (s < 0.7).any()
        np.testing.assert_allclose(out[n], size[..., None] * np.maximum(0, s - 0.7) / 0.3, atol=1e-5)


def test_an_s_cell_is_largest_for_its_own_reference_whatever_the_scale():
    kernel = random(5, 5, 2, 3)
    own = jnp.asarray(kernel.transpose(3, 0, 1, 2)) * jnp.array([1, 10, 0.1]).reshape(3, 1, 1, 1)
    centre = s_cells(own, kernel, threshold=0.4)[:, 2, 2]
    size = jnp.sqrt((gaussian(5)[None, :, :, None].astype(np.float32) * own**2).sum((1, 2, 3)))
    np.testing.assert_allclose(jnp.diagonal(centre) / size, 1, rtol=1e-5)
    assert (centre / size[:, None] < 1 - 1e-3).sum() == 6


def test_a_silent_input_or_reference_gives_silence():
    assert not s_cells(jnp.zeros((1, 4, 4, 2)), random(3, 3, 2, 3), threshold=0.0).any()
    assert not s_cells(jnp.ones((1, 4, 4, 2)), np.zeros((3, 3, 2, 3), np.float32), threshold=0.0).any()


def test_contrast_cells_see_no_constant_and_their_two_planes_exclude_each_other():
    image = jnp.asarray(random(1, 20, 20, 1))
    out = contrast(image)
    assert out.shape == (1, 20, 20, 2)
    assert (out >= 0).all()
    assert not (out[..., 0] * out[..., 1]).any()
    np.testing.assert_allclose(contrast(jnp.full((1, 9, 9, 1), 7.0)), 0, atol=1e-5)
    np.testing.assert_allclose(contrast(-image)[..., 0], out[..., 1], atol=1e-5)


def test_the_s1_cell_of_an_edge_answers_it_most():
    angles = 2 * np.pi * np.arange(ORIENTATIONS).reshape(-1, 1, 1) / ORIENTATIONS
    r = np.arange(41) - 20
    edges = np.clip(r.reshape(1, -1, 1) * np.sin(angles) + r.reshape(1, 1, -1) * np.cos(angles) + 0.5, 0, 1)
    out = s_cells(contrast(jnp.asarray(edges, jnp.float32)[..., None]), edge_references(7), threshold=0.5)
    np.testing.assert_array_equal(out[:, 20, 20].argmax(-1), np.arange(ORIENTATIONS))


def test_c_cells_are_the_root_mean_square_under_the_window():
    x = random(2, 7, 8, 3)
    out = c_cells(jnp.asarray(x), window=3)
    assert out.shape == (2, 4, 4, 3)
    expected = np.sqrt(np.einsum("ij,bijc->bc", gaussian(3), x[:, 1:4, 3:6] ** 2))
    np.testing.assert_allclose(out[:, 1, 2], expected, rtol=1e-5)
    assert gaussian(3).sum() == pytest.approx(1)


def test_c_cells_tolerate_a_shift_that_s_cells_do_not(digits):
    module = Neocognitron()
    layers = module.fixed_layers()
    image = jnp.asarray(digits.images[::20], jnp.float32)

    def change(a, b):
        return np.linalg.norm(a - b) / np.linalg.norm(a)

    @jax.jit
    def responses(x):
        s = layers["s1"](contrast(x))
        return s, layers["c1"](s)

    (s, c), (moved_s, moved_c) = responses(image), responses(jnp.roll(image, 1, axis=2))
    assert change(c, moved_c) < 0.7 * change(s, moved_s)


def test_interpolation_finds_the_best_mixture_of_two_references():
    x, references = random(3, 6), random(2, 4, 6, seed=1)
    references[1, 3] = 0  # an unused place
    scores = np.asarray(similarity(jnp.asarray(x), jnp.asarray(references)))
    p = np.linspace(0, 1, 2001)[:, None]
    unit = references / np.maximum(np.linalg.norm(references, axis=-1, keepdims=True), 1e-9)
    for b in range(3):
        for k in range(2):
            mixtures = [p * unit[k, i] + (1 - p) * unit[k, j] for i in range(4) for j in range(4)]
            mixtures = np.concatenate(mixtures)
            sizes = np.linalg.norm(mixtures, axis=1)
            best = (mixtures @ x[b] / np.maximum(sizes, 1e-9)).max() / np.linalg.norm(x[b])
            assert scores[b, k] == pytest.approx(best, abs=1e-4)


def test_references_are_recognised_with_similarity_1():
    references = random(3, 5, 8)
    scores = similarity(jnp.asarray(7 * references[:, 2]), jnp.asarray(references))
    np.testing.assert_allclose(np.diagonal(scores), 1, atol=1e-4)
    assert not similarity(jnp.zeros((1, 8)), jnp.asarray(references)).any()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 3]), st.floats(0.5, 0.95))
def test_after_learning_no_active_position_is_silent(seed, window, threshold):
    x = np.maximum(random(4, 5, 6, 3, seed=seed) - 0.5, 0)
    kernel = add_if_silent(x, window=window, threshold=threshold)
    assert kernel.shape[:3] == (window, window, 3)
    for pattern in x:
        s, size = similarities(pattern, kernel)
        assert (s.max(-1)[size > 0.201 * size.max()] > threshold - 1e-6).all()


def test_a_pattern_adds_planes_until_it_is_known_and_none_when_seen_again():
    x = np.zeros((1, 3, 3, 2), np.float32)
    x[0, 1, 1] = 3, 4
    once = add_if_silent(x, window=1, threshold=0.9)
    np.testing.assert_allclose(once, np.array([0.6, 0.8]).reshape(1, 1, 2, 1), rtol=1e-6)  # tuned in one shot
    again = add_if_silent(np.concatenate([x, 5 * x, x]), window=1, threshold=0.9)
    np.testing.assert_array_equal(again, once)
    other = np.zeros_like(x)
    other[0, 0, 0] = 4, -3
    assert add_if_silent(np.concatenate([x, other]), window=1, threshold=0.9).shape[-1] == 2


def test_connections_stay_as_they_were_when_further_patterns_come():
    x = random(12, 4, 4, 3)
    first, both = (add_if_silent(part, window=3, threshold=0.9) for part in (x[:3], x))
    assert first.shape[-1] < both.shape[-1]
    np.testing.assert_array_equal(both[..., : first.shape[-1]], first)


def test_a_higher_threshold_while_learning_means_more_planes():
    x = random(10, 4, 4, 3)
    counts = [add_if_silent(x, window=3, threshold=t).shape[-1] for t in (0.8, 0.9, 0.95)]
    assert counts == sorted(set(counts))


def test_growth_is_a_function_of_data_and_seed(digits):
    module = Neocognitron(planes=(1,), thresholds=(0.5, 0.5), windows=(7, 3), blurs=(5, 3))
    few = digits.images[::4], digits.labels[::4]
    one, same, other = (grow(module, *few, learning_thresholds=(0.6,), seed=seed) for seed in (0, 0, 1))
    assert one.module == same.module
    jax.tree.map(np.testing.assert_array_equal, one.variables, same.variables)
    first = [result.variables["params"]["s2"]["kernel"][..., 0] for result in (one, other)]
    assert not np.array_equal(*first)


def test_what_is_grown_is_a_plain_module_that_knows_its_patterns(digits, grown):
    planes, references = grown.module.planes, grown.module.references
    shapes = {path: leaf.shape for path, leaf in flatten(grown.variables).items()}
    assert shapes == {
        "params/s2/kernel": (3, 3, ORIENTATIONS, planes[0]),
        "params/s3/kernel": (3, 3, planes[0], planes[1]),
        "params/s4/kernel": (10, references, 16 * planes[1]),
    }
    scores = classify(grown.module, grown.variables, jnp.asarray(digits.images, jnp.float32))
    assert (scores.argmax(1) == digits.labels).all()  # S4 learns until it errs no more
    assert scores.min() >= 0
    assert scores.max() <= 1.001
    brighter = classify(grown.module, grown.variables, jnp.asarray(digits.images, jnp.float32) * 3 - 100)
    np.testing.assert_allclose(brighter, scores, atol=1e-3)


def test_ten_digits_of_each_class_are_enough_for_70_percent(grown):
    test = sources.load("digits").test
    scores = classify(grown.module, grown.variables, jnp.asarray(test.images[:100], jnp.float32))
    assert (scores.argmax(1) == test.labels[:100]).mean() > 0.7


@pytest.mark.slow
def test_at_least_90_percent_on_the_embedded_digits():
    data = sources.load("digits")
    module, variables = grow(Neocognitron(), data.train.images, data.train.labels)
    scores = classify(module, variables, jnp.asarray(data.test.images, jnp.float32))
    assert (scores.argmax(1) == data.test.labels).mean() > 0.95


def test_growth_reports_and_any_number_of_layers_grows(digits):
    lines = []
    module = Neocognitron(planes=(1,), thresholds=(0.5, 0.5), windows=(7, 3), blurs=(5, 3))
    result = grow(module, digits.images[::4], digits.labels[::4], learning_thresholds=(0.6,), report=lines.append)
    assert set(result.variables["params"]) == {"s2", "s3"}
    assert lines[0] == f"s2: {result.module.planes[0]} planes"
    assert lines[-1].startswith("s3: ")
    assert lines[-1].endswith(" 0 of them new")


def test_forward_and_gradient_are_finite_in_bfloat16():
    module = SMALL(dtype=jnp.bfloat16)
    x = jnp.zeros((2, 12, 12, 1)).at[0, 3:9, 4:7].set(1.0)  # one image is blank
    shapes = jax.eval_shape(partial(module.init, train=False), jax.random.key(0), x)
    assert set(shapes) == {"params"}
    variables = jax.tree.map(lambda leaf: jnp.asarray(random(*leaf.shape), leaf.dtype), shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def loss(params, x):
        out = jnp.asarray(module.apply({"params": params}, x, train=True))
        assert out.shape == (2, 4)
        assert out.dtype == jnp.bfloat16
        return out.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss))(variables["params"], x)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert jnp.abs(gradient["s2"]["kernel"]).max() > 0


@pytest.mark.parametrize("size", [28, 33])
def test_shapes_by_inference(size):
    module = SMALL()
    sample = jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
    out, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, train=False), sample)
    assert out.shape == (2, 4)
    side = -(-size // 8)
    assert flatten(variables)["params/s4/kernel"].shape == (4, 3, side * side * 6)


def test_the_table_has_it_with_its_own_classes():
    entry = VARIANTS["neocognitron"]
    assert entry.module is Neocognitron
    sample = jax.ShapeDtypeStruct((1, *entry.input), jnp.float32)
    module = entry.module(**entry.fields)
    assert jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, train=False)[0], sample).shape == (
        1,
        10,
    )


@pytest.mark.slow
def test_bad_input(digits, grown):
    module = Neocognitron()
    images, labels = digits.images[:20], digits.labels[:20]

    def init(shape=(1, 28, 28, 1), dtype=jnp.float32, **fields):
        sample = jax.ShapeDtypeStruct(shape, dtype)
        jax.eval_shape(lambda x: Neocognitron(**fields).init(jax.random.key(0), x, train=False), sample)

    blank = np.zeros((2, 28, 28, 1))
    cases = [
        (lambda: init((1, 28, 28, 3)), "grey images"),
        (lambda: init((28, 28, 1)), "expected images"),
        (lambda: init(dtype=jnp.uint8), "floating point"),
        (lambda: init(thresholds=(0.5, 0.5)), "expected 3 of each"),
        (lambda: init(thresholds=(0.5, 0.5, 1.0)), "expected \\[0, 1\\)"),
        (lambda: init(windows=(7, 4, 3)), "odd"),
        (lambda: init(planes=(0, 3)), "at least 1"),
        (lambda: init(references=0), "at least 1"),
        (lambda: grown.module.apply(grown.variables, jnp.zeros((1, 40, 40, 1)), train=False), "s4: .* another shape"),
        (lambda: grow(module, images[..., 0], labels), "expected images"),
        (lambda: grow(module, np.repeat(images, 3, -1), labels), "grey images"),
        (lambda: grow(module, np.full_like(images, np.nan, np.float32), labels), "NaN"),
        (lambda: grow(module, images, labels[:3]), "one integer for each"),
        (lambda: grow(module, images, labels + 0.5), "one integer for each"),
        (lambda: grow(module, images[:0], labels[:0]), "one integer for each"),
        (lambda: grow(module, images, labels + 10), "expected 0 to 9"),
        (lambda: grow(module, images, labels, learning_thresholds=(0.5,)), "expected 2 numbers"),
        (lambda: grow(module, images, labels, learning_thresholds=(0.5, 1.5)), "expected 2 numbers"),
        (lambda: grow(module, images, labels, rounds=0), "at least 1"),
        (lambda: grow(module, images, labels, max_planes=3), "3 cell planes after"),
        (lambda: grow(module, blank, np.array([0, 1])), "nothing is active"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
