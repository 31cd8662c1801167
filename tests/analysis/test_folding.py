"""Linear regions of piecewise linear networks, against closed forms (row A14)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxcnn.analysis import folding
from jaxcnn.analysis.folding import borders_on_line
from jaxcnn.errors import InputError
from jaxcnn.layers.norm import BatchNorm

RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def size(path):
    with Image.open(path) as picture:
        return picture.size


class Hidden(nn.Module):
    """One hidden layer, with weights that are given."""

    kernel: tuple
    bias: tuple
    act: str = "relu"

    @nn.compact
    def __call__(self, x):
        kernel, bias = (jnp.asarray(one, jnp.float32) for one in (self.kernel, self.bias))
        x = nn.Dense(len(self.bias), kernel_init=lambda *_: kernel, bias_init=lambda *_: bias)(x)
        return nn.Dense(1)(getattr(nn, self.act)(x))


class Sawtooth(nn.Module):
    """The tent map 2 relu(x) - 4 relu(x - 1/2) of 0..1, `depth` times over (Telgarsky 2015)."""

    depth: int

    @nn.compact
    def __call__(self, x):
        fold, ones, thresholds = jnp.array([[2.0], [-4.0]]), jnp.ones((1, 2)), jnp.array([0.0, -0.5])
        for i in range(self.depth):
            kernel = fold @ ones if i else ones
            x = nn.relu(nn.Dense(2, kernel_init=lambda *_, k=kernel: k, bias_init=lambda *_: thresholds)(x))
        return nn.Dense(1, kernel_init=lambda *_: fold)(x)


class Own(nn.Module):
    """Convolution, normalisation, pooling, a leaky ReLU and a shortcut."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(BatchNorm(name="bn")(nn.Conv(4, (3, 3))(x), train=train))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = x + nn.leaky_relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(jnp.abs(x.mean((1, 2))))


def variables_of(module, *shape, **keywords):
    return module.init(jax.random.key(0), jnp.zeros((1, *shape)), **keywords)


def test_one_hidden_layer_has_a_region_more_than_units():
    kinks = np.sort(RNG.uniform(-1, 1, 12))
    signs = RNG.choice([-1.0, 1.0], 12)
    for act, most in (("relu", 13), ("leaky_relu", 13), ("tanh", None)):
        module = Hidden((tuple(signs),), tuple(-signs * kinks), act)
        variables = variables_of(module, 1)
        if most is None:
            with pytest.raises(InputError, match="tanh is not piecewise linear"):
                borders_on_line(module, [-1.0], [1.0], variables=variables)
            continue
        found = borders_on_line(module, [-1.0], [1.0], variables=variables)
        assert len(found) + 1 == most
        np.testing.assert_allclose(2 * found - 1, kinks, atol=2e-5)
        half = borders_on_line(module, [0.0], [1.0], variables=variables)
        assert len(half) == (kinks > 0).sum()


@pytest.mark.parametrize("depth", [1, 2, 5, 8])
def test_a_sawtooth_has_2_to_the_depth(depth):
    module = Sawtooth(depth)
    found = borders_on_line(module, [0.0], [1.0], variables=variables_of(module, 1))
    np.testing.assert_allclose(found, np.arange(1, 2**depth) / 2**depth, atol=1e-5)


def test_a_coarse_resolution_merges_what_is_closer():
    kinks = tuple(np.linspace(-0.9, 0.95, 75))
    module = Hidden(((1.0,) * 75,), tuple(-k for k in kinks))
    found = [
        borders_on_line(module, np.float32([-1]), np.float32([1]), variables=variables_of(module, 1), resolution=r)
        for r in (1e-4, 0.02)
    ]
    assert len(found[0]) == 75
    assert 10 < len(found[1]) <= 25
    assert np.diff(found[1]).min() > 0.04


def test_borders_in_any_network_are_where_its_derivative_jumps():
    module = Own()
    variables = variables_of(module, 6, 6, 2, train=False)
    a, b = noise(6, 6, 2), noise(6, 6, 2)
    borders = borders_on_line(module, a, b, variables=variables)
    assert len(borders) > 10

    def outputs(t):
        return module.apply(variables, a + t[:, None, None, None] * (b - a), train=False)

    ends = np.concatenate([[0], borders, [1]])
    wide = np.flatnonzero(np.diff(ends) > 1e-2)
    low, high = ends[wide], ends[wide + 1]
    points = np.float32([low + (high - low) * share for share in (0.1, 0.5, 0.9)])
    first, middle, last = (np.asarray(outputs(t)) for t in points)
    np.testing.assert_allclose(middle, (first + last) / 2, atol=2e-6)
    # A fine grid sees no region that is not there, and all that are wider than its step.
    folds = folding._Folds(module, variables, np.float64(a))
    grid = np.linspace(0, 1, 512)
    patterns, _ = folds(a + grid.reshape(-1, 1, 1, 1) * np.float64(b - a))
    assert len(set(patterns)) <= len(borders) + 1
    assert len(set(patterns)) >= (np.diff(ends) > 1 / 511).sum()


def test_lines_in_a_plane(tmp_path):
    """n lines in general position cut a plane into 1 + n + n (n - 1) / 2 regions, if they cross inside."""
    angles = np.pi * np.arange(5) / 5
    kernel = tuple(map(tuple, np.stack([np.cos(angles), np.sin(angles)])))
    module = Hidden(kernel, (0.1, -0.1, 0.05, 0.12, -0.06))
    plane = folding.regions_in_plane(
        module, [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], variables=variables_of(module, 2), points=300
    )
    assert plane.regions == 1 + 5 + 10
    assert plane.region.shape == plane.output.shape == (300, 300)
    path = tmp_path / "regions.png"
    folding.plot_regions(plane, path, title="One hidden layer of 5 ReLUs")
    assert size(path) == (700, 600)


def test_dimensions_of_inputs_and_variables_must_fit():
    module = Hidden(((1.0,),), (0.0,))
    variables = variables_of(module, 1)
    with pytest.raises(InputError, match="that of one example"):
        borders_on_line(module, [0.0], [0.0, 1.0], variables=variables)
    with pytest.raises(InputError, match="not those of this module"):
        borders_on_line(module, [0.0], [1.0], variables={})
    with pytest.raises(InputError, match="resolution 0"):
        borders_on_line(module, [0.0], [1.0], variables=variables, resolution=0)
    with pytest.raises(InputError, match="points 1"):
        folding.regions_in_plane(module, [0.0], [1.0], [2.0], variables=variables, points=1)
