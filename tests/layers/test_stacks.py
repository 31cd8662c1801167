"""Stacked trees against jnp.stack and indexing, and the form that keeps compilation short."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.layers import stacks


def trees(n, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 3, 2, 4), "scale": (4,), "temperature": ()}
    return [{name: jnp.asarray(rng.normal(size=s), dtype) for name, s in shapes.items()} for _ in range(n)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stack_is_jnp_stack_and_unstack_its_inverse(dtype):
    held = trees(5, dtype)
    tree = jax.jit(stacks.stack)(held)
    jax.tree.map(np.testing.assert_array_equal, tree, jax.tree.map(lambda *leaves: jnp.stack(leaves), *held))
    back = jax.jit(stacks.unstack, static_argnums=1)(tree, 5)
    jax.tree.map(np.testing.assert_array_equal, back, held)
    assert stacks.unstack({}, 2) == [{}, {}]


def loss(stack):
    def of(held, x):
        tree = stack(held)

        def one(x, each):
            return jnp.tanh(x @ each["kernel"][0, 0].T @ each["kernel"][1, 1]) * each["scale"][None], each[
                "temperature"
            ]

        x, ys = jax.lax.scan(one, x, tree)
        return (x**2).sum() + (ys**2).sum()

    return of


def plain(held):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *held)


def test_gradients_are_those_of_jnp_stack_also_mapped_of_second_order_and_not_a_number():
    held, x = trees(6), jnp.ones((2, 4))

    def second(f):
        return jax.grad(lambda held, x: jax.grad(f)(held, x)[0]["scale"].sum())

    for wrap in (jax.grad, lambda f: jax.vmap(jax.grad(f), (None, 0)), second):
        xs = jnp.stack([x, 2 * x]) if wrap not in (jax.grad, second) else x
        ours, theirs = (jax.jit(wrap(loss(each)))(held, xs) for each in (stacks.stack, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    lost = jax.jit(jax.grad(loss(stacks.stack)))(held, x * jnp.nan)
    np.testing.assert_array_equal([each["temperature"] for each in lost], [2 * each["temperature"] for each in held])
    assert all(jnp.isnan(each["scale"]).all() for each in lost)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form for CPU")
def test_the_number_of_different_kernels_does_not_grow_with_the_number_of_trees():
    def kernels(n):
        step = jax.jit(
            lambda held, x: jax.tree.map(lambda a, b: a - 0.1 * b, held, jax.grad(loss(stacks.stack))(held, x))
        )
        text = step.lower(trees(n), jnp.ones((2, 4))).compile().as_text()
        bodies = re.findall(r"\n%\S+ \([^\n]*\{\n(.*?)\n\}", text[: text.index("ENTRY")], re.DOTALL)
        plain = (re.sub(r"metadata=\{[^}]*\}|\.\d+", "", body).replace(f"[{n}", "[n") for body in bodies)
        return len({re.sub(r"constant\(\d+\)", "constant", body) for body in plain})

    assert kernels(24) <= kernels(12) + 2
