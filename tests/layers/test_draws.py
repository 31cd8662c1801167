"""Initial kernels drawn together are those drawn one by one."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.layers import draws
from jaxcnn.layers.init import initializer
from jaxcnn.models import create


def init_of(module, shape):
    return lambda key: module.init(key, jnp.zeros(shape), train=False)


def test_the_numbers_are_the_same_to_the_bit():
    init = init_of(create("mlp", depth=3, width=4), (1, 2, 2, 1))
    key = jax.random.key(7)
    keys = draws.keys(init)(key)
    assert keys.shape == (4, 2)
    assert len(np.unique(keys, axis=0)) == len(keys)
    together = jax.jit(partial(draws.together, init))(key, keys)
    one_by_one = jax.jit(init)(key)
    jax.tree.map(np.testing.assert_array_equal, together, one_by_one)
    assert jax.tree.structure(together) == jax.tree.structure(one_by_one)


def test_initialisers_of_others_are_left_alone():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.Dense(5, name="flax")(x)
            return nn.Dense(5, kernel_init=initializer("xavier_uniform"), name="ours")(x)

    init, key = init_of(Net(), (1, 5)), jax.random.key(0)
    keys = draws.keys(init)(key)
    assert len(keys) == 1
    together = jax.jit(partial(draws.together, init))(key, keys)
    jax.tree.map(np.testing.assert_array_equal, together, jax.jit(init)(key))


def test_the_program_does_not_grow_with_the_depth():
    def size(depth):
        init = init_of(create("mlp", depth=depth, width=4), (1, 2, 2, 1))
        key = jax.random.key(0)
        text = jax.jit(partial(draws.together, init)).lower(key, draws.keys(init)(key)).as_text()
        return text.count("stablehlo.while")

    assert size(3) == size(8)
