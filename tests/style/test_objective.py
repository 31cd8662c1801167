"""E_total of row S over a tiny VGG: its terms, weights, blends and masks, and its gradient by the pixels."""

from dataclasses import replace

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


def pictures(seed, *, count=2, size=SIZE):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(count, *size, 3)))


@pytest.fixture(scope="module")
def tiny():
    with jax.enable_x64(True):
        return tiny_vgg((1, 1, 1), dtype=np.float64)


@jax.jit
def features_of(network, x):
    return network.features(x, OBJECTIVE.layers)


@jax.jit
def style_moments(network, x):
    return {name: moments(one) for name, one in network.features(x, [name for name, _ in STYLE]).items()}


def styles():
    return [pictures(10 + i, count=1, size=(40, 33)) for i in range(2)]


def targets_of(network, *, masks=None):
    """One content image, and two styles of another size that count for 1/3 and 2/3."""
    found = [style_moments(network, style) for style in styles()]
    style = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *found)
    shares = np.array([[1.0, 2.0]]) / 3
    return Targets(features_of(network, pictures(1, count=1)), style, jnp.asarray(shares), masks)


value_and_grad = jax.jit(lambda objective, *arguments: objective.value_and_grad(*arguments), static_argnums=0)


def terms_of(*arguments):
    return value_and_grad(*arguments)[0]


def close(a, b, rtol=1e-10, **options):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, **options), a, b)


def test_terms_are_the_weighted_losses_and_the_total_their_sum(tiny, float64):
    """Of several styles the sum of their distances by share, not the distance from their mean."""
    targets, x = targets_of(tiny), pictures(2)
    terms, features = terms_of(OBJECTIVE, tiny, targets, x), features_of(tiny, x)
    for name, weight in CONTENT:
        close(terms[f"content/{name}"], weight * content_loss(features[name], targets.content[name]))
    found = style_moments(tiny, x)
    for name, weight in STYLE:
        alone = [gram_loss(found[name], style_moments(tiny, style)[name])[:, 0] for style in styles()]
        close(terms[f"style/{name}"], weight * (alone[0] + 2 * alone[1]) / 3)
    close(terms["tv"], 0.7 * total_variation(x))
    for kind in ("content", "style"):
        close(terms[kind], sum(terms[name] for name in terms if name.startswith(f"{kind}/")))
    close(terms["total"], terms["content"] + terms["style"] + terms["tv"])
    assert set(terms) == set(OBJECTIVE.names)
    assert all(term.shape == (2,) and (term > 0).all() for term in terms.values())
    assert OBJECTIVE.layers == ("relu2_1", "relu3_1", "relu1_1")


def test_weights_are_factors(tiny, float64):
    targets, x = targets_of(tiny), pictures(2)
    once = terms_of(OBJECTIVE, tiny, targets, x)
    heavier = Objective((CONTENT[0], ("relu3_1", 1.0)), (("relu1_1", 0.9), *STYLE[1:]), tv=7.0)
    factors = {"content/relu3_1": 2, "style/relu1_1": 3, "tv": 10}
    terms = terms_of(heavier, tiny, targets, x)
    for name in ("content/relu2_1", "style/relu2_1", "style/relu3_1", *factors):
        close(terms[name], factors.get(name, 1) * once[name])


def test_wasserstein_s_distance_takes_gram_s_place(tiny, float64):
    """Each picture has shares of its own."""
    x, shares = pictures(2), jnp.asarray([[0.2, 0.8], [1.0, 0.0]])
    targets = targets_of(tiny)._replace(shares=shares)
    terms = terms_of(replace(OBJECTIVE, style_loss="wasserstein"), tiny, targets, x)
    distances = jax.jit(wasserstein_loss)(style_moments(tiny, x)["relu3_1"], targets.style["relu3_1"])
    close(terms["style/relu3_1"], 5 * (distances * shares).sum(1))


def test_terms_without_content_or_style_are_0(tiny, float64):
    targets, x = targets_of(tiny), pictures(2)
    expected = terms_of(OBJECTIVE, tiny, targets, x)
    terms = terms_of(Objective((), STYLE), tiny, targets, x)
    close(terms["total"], expected["style"])
    assert set(terms) == {"total", "content", "style", "tv", "style/relu1_1", "style/relu2_1", "style/relu3_1"}
    assert not terms["content"].any()
    assert not terms["tv"].any()
    only = Objective((), (), tv=2.0)
    terms, gradient = value_and_grad(only, tiny, Targets({}, {}, jnp.ones((1, 1)), None), x)
    close(terms["total"], 2 * total_variation(x))
    close(gradient, jax.grad(lambda x: 2 * total_variation(x).sum())(x))


def test_the_content_image_in_its_own_style_costs_nothing(tiny, float64):
    x = jnp.tile(pictures(1, count=1), (2, 1, 1, 1))
    own = jax.tree.map(lambda leaf: jnp.tile(leaf[:1], (1, 2, *(1 for _ in leaf.shape[2:]))), style_moments(tiny, x))
    targets = targets_of(tiny)
    terms = terms_of(replace(OBJECTIVE, tv=0.0), tiny, targets._replace(style=own), x)
    other = terms_of(replace(OBJECTIVE, tv=0.0), tiny, targets, pictures(2))
    assert (terms["total"] <= 1e-20 * other["total"]).all()


def test_each_picture_of_a_batch_has_its_own_styles(tiny, float64):
    """As five styles for one content in one program."""
    x, several = pictures(2), targets_of(tiny)
    each = several._replace(
        style=jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), several.style), shares=jnp.ones((2, 1))
    )
    together, gradient = value_and_grad(OBJECTIVE, tiny, each, x)
    for i in range(2):
        shares = jnp.eye(2)[i : i + 1]
        alone, own = value_and_grad(OBJECTIVE, tiny, several._replace(shares=shares), x)
        close({name: term[i] for name, term in together.items()}, {name: term[i] for name, term in alone.items()})
        close(gradient[i], own[i], rtol=1e-8, atol=1e-10 * float(jnp.abs(own).max()))


def test_masks_weigh_locations_by_their_share_of_the_region(tiny, float64):
    """Of ones they are no masks, and half a mask is the same region."""
    x, targets, masks = pictures(2), targets_of(tiny), pictures(3)[..., 0]
    of_masks = [
        terms_of(OBJECTIVE, tiny, targets._replace(masks=m), x) for m in (jnp.ones((2, *SIZE)), masks, masks / 2)
    ]
    close(of_masks[0], terms_of(OBJECTIVE, tiny, targets, x), rtol=1e-9)
    close(of_masks[1], of_masks[2])
    assert (np.abs(of_masks[1]["style"] / of_masks[0]["style"] - 1) > 1e-3).all()


def test_a_region_sees_its_part_of_the_picture_alone(tiny, float64):
    """relu1_1 sees a pixel around: the left style asks nothing of pixels beyond the middle and one more."""
    objective = Objective((), (("relu1_1", 1.0),))
    masks = jnp.zeros((2, *SIZE)).at[0, :, :16].set(1).at[1, :, 20:].set(1)
    left, right = (targets_of(tiny, masks=masks)._replace(shares=jnp.eye(2)[i : i + 1]) for i in range(2))
    x, y = pictures(2), pictures(3)
    pulls = [np.abs(value_and_grad(objective, tiny, each, x)[1]).sum((0, 1, 3)) for each in (left, right)]
    assert ((pulls[0] > 0) == (np.arange(SIZE[1]) < 17)).all()
    assert ((pulls[1] > 0) == (np.arange(SIZE[1]) >= 19)).all()
    close(*(terms_of(objective, tiny, left, each) for each in (x, x.at[:, :, 17:].set(y[:, :, 17:]))))


def test_masks_are_averaged_to_the_size_of_a_map():
    halves = jnp.zeros((1, 64, 64)).at[:, :, 32:].set(1)
    small = OBJECTIVE.masks(Targets({}, {}, jnp.ones((1, 1)), halves), jnp.zeros((1, 4, 4, 8)))
    assert small is not None
    assert small.shape == (1, 4, 4)
    np.testing.assert_allclose(small.mean(), 0.5, atol=1e-6)
    assert (np.diff(small[0, 0]) >= 0).all()
    np.testing.assert_allclose(small[0, :, 0], 0, atol=0.2)


@pytest.mark.parametrize(("loss", "pooling"), [("gram", "max"), ("wasserstein", "avg")])
def test_the_gradient_is_that_of_finite_differences(loss, pooling, float64):
    """Of all terms, with masks and two styles: along random directions, and by pixels."""
    network = tiny_vgg((1, 1, 1), dtype=np.float64, pooling=pooling)
    objective = Objective(CONTENT, STYLE, tv=50.0, style_loss=loss)
    targets, x = targets_of(network, masks=pictures(5)[..., 0]), pictures(2)[:1]
    gradient = np.asarray(value_and_grad(objective, network, targets, jnp.concatenate([x, x]))[1])[:1]
    rng, step = np.random.default_rng(0), 1e-7
    for direction in rng.choice([-1.0, 1.0], size=(4, *x.shape)):
        around = jnp.concatenate([x + step * direction, x - step * direction])
        after, before = terms_of(objective, network, targets, around)["total"]
        np.testing.assert_allclose((gradient * direction).sum(), (after - before) / (2 * step), rtol=1e-5)
    step = 1e-5
    for i in rng.choice(x.size, 20, replace=False):
        unit = np.zeros(x.size)
        unit[i] = step
        unit = unit.reshape(x.shape)
        after, before = terms_of(objective, network, targets, jnp.concatenate([x + unit, x - unit]))["total"]
        assert abs((after - before) / (2 * step) - gradient.ravel()[i]) <= 1e-5 * np.abs(gradient).max()
