"""E_total of row S over a tiny VGG: its terms, weights, blends and masks, and its gradient by the pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vgg import tiny as tiny_vgg

from jaxcnn.style.losses import content_loss, gram_loss, moments, total_variation, wasserstein_loss
from jaxcnn.style.objective import Objective, Targets

SIZE = (32, 30)
CONTENT = (("relu2_1", 2.0), ("relu3_1", 0.5))
STYLE = (("relu1_1", 0.3), ("relu2_1", 3.0), ("relu3_1", 5.0))
OBJECTIVE = Objective(CONTENT, STYLE, tv=0.7)


def pictures(seed, *, count=1, size=SIZE):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(count, *size, 3)))


@pytest.fixture(scope="module")
def tiny():
    with jax.enable_x64(True):
        return tiny_vgg((1, 1, 1), dtype=np.float64)


@pytest.fixture(scope="module")
def average():
    with jax.enable_x64(True):
        return tiny_vgg((1, 1, 1), dtype=np.float64, pooling="avg")


@jax.jit
def features_of(network, x):
    return network.features(x, OBJECTIVE.layers)


@jax.jit
def style_moments(network, x):
    return {name: moments(one) for name, one in network.features(x, [name for name, _ in STYLE]).items()}


def styles(count):
    return [pictures(10 + i, size=(40, 33)) for i in range(count)]


def targets_of(network, *, count=1, masks=None):
    """One content image, and styles of another size that count for 1, 2, ... shares."""
    found = [style_moments(network, style) for style in styles(count)]
    style = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *found)
    content = features_of(network, pictures(1))
    shares = np.arange(1.0, count + 1)[None]
    return Targets(content, style, jnp.asarray(shares / shares.sum()), masks)


terms_of = jax.jit(lambda objective, *arguments: objective(*arguments), static_argnums=0)
value_and_grad = jax.jit(lambda objective, *arguments: objective.value_and_grad(*arguments), static_argnums=0)


def gradient_of(*arguments):
    return value_and_grad(*arguments)[1]


def close(a, b, rtol=1e-10, **options):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, **options), a, b)


def test_terms_are_the_weighted_losses_and_the_total_their_sum(tiny, float64):
    targets, x = targets_of(tiny), pictures(2, count=2)
    terms = terms_of(OBJECTIVE, tiny, targets, x)
    features = features_of(tiny, x)
    for name, weight in CONTENT:
        close(terms[f"content/{name}"], weight * content_loss(features[name], targets.content[name]))
    for name, weight in STYLE:
        close(terms[f"style/{name}"], weight * gram_loss(moments(features[name]), targets.style[name])[:, 0])
    close(terms["tv"], 0.7 * total_variation(x))
    for kind in ("content", "style"):
        close(terms[kind], sum(terms[name] for name in terms if name.startswith(f"{kind}/")))
    close(terms["total"], terms["content"] + terms["style"] + terms["tv"])
    assert set(terms) == set(OBJECTIVE.names)
    assert all(term.shape == (2,) and (term > 0).all() for term in terms.values())
    assert OBJECTIVE.layers == ("relu2_1", "relu3_1", "relu1_1")


def test_terms_without_content_style_or_variation_are_0(tiny, float64):
    targets, x = targets_of(tiny), pictures(2)
    all_terms = terms_of(OBJECTIVE, tiny, targets, x)
    for objective, kind in ((Objective(CONTENT, ()), "content"), (Objective((), STYLE), "style")):
        terms = terms_of(objective, tiny, targets, x)
        close(terms["total"], all_terms[kind])
        assert set(terms) == {"total", "content", "style", "tv", *(n for n in all_terms if n.startswith(f"{kind}/"))}
        assert sum(float(terms[name][0]) for name in ("content", "style", "tv") if name != kind) == 0
    only = Objective((), (), tv=2.0)
    terms, gradient = value_and_grad(only, tiny, Targets({}, {}, jnp.ones((1, 1)), None), x)
    close(terms["total"], 2 * total_variation(x))
    close(gradient, jax.grad(lambda x: 2 * total_variation(x).sum())(x))


def test_the_content_image_in_its_own_style_costs_nothing(tiny, float64):
    x = pictures(1)
    targets = targets_of(tiny)._replace(style=style_moments(tiny, x))
    terms = terms_of(Objective(CONTENT, STYLE), tiny, targets, x)
    full = terms_of(Objective(CONTENT, STYLE), tiny, targets, pictures(2))
    assert terms["total"] <= 1e-20 * full["total"]


@pytest.mark.parametrize(("name", "loss"), [("gram", gram_loss), ("wasserstein", wasserstein_loss)])
def test_several_styles_count_by_their_shares(name, loss, tiny, float64):
    """The sum of their distances, not the distance from the mean of their moments; each picture has shares."""
    objective = Objective((), STYLE, style_loss=name)
    x, targets = pictures(2, count=2), targets_of(tiny, count=3)
    shares = jnp.asarray([[1 / 6, 2 / 6, 3 / 6], [0.2, 0, 0.8]])
    terms, found = terms_of(objective, tiny, targets._replace(shares=shares), x), style_moments(tiny, x)
    for layer, weight in STYLE:
        alone = [jax.jit(loss)(found[layer], style_moments(tiny, style)[layer])[:, 0] for style in styles(3)]
        close(terms[f"style/{layer}"], weight * (np.stack(alone, 1) * shares).sum(1))


def test_each_picture_of_a_batch_has_its_own_targets(tiny, float64):
    """Five styles for one content in one program."""
    x, several = pictures(2, count=2), targets_of(tiny, count=2)
    each = several._replace(
        style=jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), several.style), shares=jnp.ones((2, 1))
    )
    together, gradient = value_and_grad(OBJECTIVE, tiny, each, x)
    for i in range(2):
        style = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], each.style)
        alone, own = value_and_grad(OBJECTIVE, tiny, each._replace(style=style, shares=jnp.ones((1, 1))), x[i : i + 1])
        close(jax.tree.map(lambda term, i=i: term[i : i + 1], together), alone)
        close(gradient[i : i + 1], own, rtol=1e-8, atol=1e-10 * float(jnp.abs(own).max()))


def test_masks_of_ones_are_no_masks(tiny, float64):
    x, targets = pictures(2), targets_of(tiny, count=2)
    masks = jnp.ones((2, *SIZE))
    close(terms_of(OBJECTIVE, tiny, targets._replace(masks=masks), x), terms_of(OBJECTIVE, tiny, targets, x), rtol=1e-9)


def test_a_mask_and_its_double_are_the_same_region(tiny, float64):
    x, targets = pictures(2), targets_of(tiny)
    mask = pictures(3)[..., 0]
    once, halved = (terms_of(OBJECTIVE, tiny, targets._replace(masks=m), x) for m in (mask, mask / 2))
    close(once, halved)


def test_a_region_sees_its_part_of_the_picture_alone(tiny, float64):
    """relu1_1 sees a pixel around: the left style asks nothing of pixels beyond the middle and one more."""
    objective = Objective((), (("relu1_1", 1.0),))
    masks = jnp.zeros((2, *SIZE)).at[0, :, :16].set(1).at[1, :, 20:].set(1)
    targets = targets_of(tiny, count=2, masks=masks)
    x, y = pictures(2), pictures(3)
    gradient = {}
    for side, shares in (("left", [[1.0, 0.0]]), ("right", [[0.0, 1.0]])):
        own = targets._replace(shares=jnp.asarray(shares))
        gradient[side] = np.abs(gradient_of(objective, tiny, own, x)).sum((0, 1, 3))
    assert (gradient["left"][:17] > 0).all()
    assert (gradient["left"][17:] == 0).all()
    assert (gradient["right"][19:] > 0).all()
    assert (gradient["right"][:19] == 0).all()
    left = targets._replace(shares=jnp.asarray([[1.0, 0.0]]))
    close(*(terms_of(objective, tiny, left, each) for each in (x, x.at[:, :, 17:].set(y[:, :, 17:]))))


def test_masks_are_averaged_to_the_size_of_a_map():
    halves = jnp.zeros((1, 64, 64)).at[:, :, 32:].set(1)
    targets = Targets({}, {}, jnp.ones((1, 1)), halves)
    small = OBJECTIVE.masks(targets, jnp.zeros((1, 4, 4, 8)))
    assert small is not None
    assert small.shape == (1, 4, 4)
    np.testing.assert_allclose(small.mean(), 0.5, atol=1e-6)
    assert (np.diff(small[0, 0]) >= 0).all()
    np.testing.assert_allclose(small[0, :, 0], 0, atol=0.2)


@pytest.mark.parametrize(("loss", "pooling"), [("gram", "max"), ("wasserstein", "avg")])
def test_the_gradient_is_that_of_finite_differences(pooling, loss, tiny, average, float64):
    """Of the whole, along random directions, with masks and two styles."""
    network = tiny if pooling == "max" else average
    objective = Objective(CONTENT, STYLE, tv=50.0, style_loss=loss)
    masks = pictures(5, count=2)[..., 0]
    targets, x = targets_of(network, count=2, masks=masks), pictures(2)
    gradient = gradient_of(objective, network, targets, x)
    step = 1e-7
    for seed in range(4):
        direction = jnp.asarray(np.random.default_rng(seed).choice([-1.0, 1.0], size=x.shape))
        after, before = (terms_of(objective, network, targets, x + s * direction)["total"] for s in (step, -step))
        expected = (after - before) / (2 * step)
        np.testing.assert_allclose((gradient * direction).sum(), expected[0], rtol=1e-5)


def test_every_pixel_s_gradient_is_that_of_finite_differences(average, float64):
    """One at a time; some few beside a kink of a ReLU may differ."""
    targets, x = targets_of(average), pictures(2)
    gradient = np.asarray(gradient_of(OBJECTIVE, average, targets, x)).ravel()
    rng, step = np.random.default_rng(0), 1e-5
    chosen = rng.choice(gradient.size, 40, replace=False)
    for i in chosen:
        unit = jnp.zeros(x.size).at[i].set(step).reshape(x.shape)
        after, before = (terms_of(OBJECTIVE, average, targets, x + s * unit)["total"] for s in (1, -1))
        assert abs((after - before)[0] / (2 * step) - gradient[i]) <= 1e-5 * np.abs(gradient).max()
