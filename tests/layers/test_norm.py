"""Norms against Flax, PyTorch and closed forms; BatchNorm's statistics on one device, eight, jit and pmap."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcnn.errors import InputError
from jaxcnn.layers.norm import NORMS, BatchNorm, GroupNorm, InstanceNorm, LayerNorm, norm
from jaxcnn.types import DATA_AXIS

SHAPES = [(16, 6), (8, 5, 6), (8, 4, 5, 6), (4, 3, 4, 2, 6)]


def sample(shape, dtype=np.float32):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=shape) * rng.uniform(0.5, 2, shape[-1:]) + 3, dtype)


def weights_of(shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


def trained_variables(module, x):
    """Variables with scale, bias and running statistics away from their first values."""
    variables = jax.eval_shape(partial(module.init, train=True), jax.random.key(0), x)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype), variables)


def step(apply, variables, x):
    """(y, new collections), and the gradients of a weighted sum with respect to params and x."""

    def loss(params, x):
        y, new = apply({**variables, "params": params}, x)
        return jnp.sum(y * weights_of(y.shape, y.dtype)), (y, new)

    grads, (y, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
    return y, new, grads


jitted_step = jax.jit(step, static_argnums=0)


def ours(module):
    return partial(module.apply, train=True, mutable=["batch_stats"])


def assert_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, **tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_is_that_of_flax(shape):
    x = sample(shape)
    flax = nn.BatchNorm(momentum=0.9, epsilon=1e-5, use_fast_variance=False)
    module = BatchNorm()
    variables = trained_variables(module, x)
    flax_apply = partial(flax.apply, use_running_average=False, mutable=["batch_stats"])
    reference = jitted_step(flax_apply, variables, x)
    assert_close(jitted_step(ours(module), variables, x), reference, rtol=2e-5, atol=2e-5)
    assert_close(
        module.apply(variables, x, train=False),
        flax.apply(variables, x, use_running_average=True),
        rtol=1e-6,
    )


@pytest.mark.parametrize("shape", [(16, 6), (8, 4, 5, 6)])
def test_batch_norm_is_that_of_torch_over_steps(shape, float64):
    torch = pytest.importorskip("torch")
    module = BatchNorm(param_dtype=jnp.float64)
    train = ours(module)
    variables = trained_variables(module, sample(shape, np.float64))
    reference = (torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d)(6).double()
    unbias = np.prod(shape[:-1]) / (np.prod(shape[:-1]) - 1)
    with torch.no_grad():
        reference.weight.copy_(torch.tensor(variables["params"]["scale"]))
        reference.bias.copy_(torch.tensor(variables["params"]["bias"]))
        reference.running_mean.copy_(torch.tensor(variables["batch_stats"]["mean"]))
        reference.running_var.copy_(torch.tensor(variables["batch_stats"]["var"]) * unbias)
    for i in range(3):
        x = sample(shape, np.float64) * (i + 1) + i
        t = torch.tensor(np.moveaxis(np.asarray(x), -1, 1), requires_grad=True)
        y, new, (dparams, dx) = jitted_step(train, variables, x)
        variables = {**variables, **new}
        out = reference(t)
        reference.zero_grad()
        out.backward(torch.tensor(np.moveaxis(np.asarray(weights_of(shape, np.float64)), -1, 1)))
        np.testing.assert_allclose(np.moveaxis(np.asarray(y), -1, 1), out.detach(), atol=1e-12)
        np.testing.assert_allclose(np.moveaxis(np.asarray(dx), -1, 1), t.grad, atol=1e-12)
        np.testing.assert_allclose(dparams["scale"], reference.weight.grad, atol=1e-11)
        np.testing.assert_allclose(dparams["bias"], reference.bias.grad, atol=1e-11)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], reference.running_mean, rtol=1e-12)
    np.testing.assert_allclose(variables["batch_stats"]["var"] * unbias, reference.running_var, rtol=1e-12)
    y = module.apply(variables, x, train=False)
    # Only the divisor of the running variance differs in evaluation: give PyTorch the biased one.
    reference.running_var /= unbias
    np.testing.assert_allclose(np.moveaxis(np.asarray(y), -1, 1), reference.eval()(t).detach(), atol=1e-12)


def test_a_large_mean_does_not_swallow_the_variance():
    x = jnp.asarray(np.random.default_rng(0).normal(1e4, 1, (64, 8, 8, 3)), jnp.float32)
    module = BatchNorm(momentum=0.0)
    y, new = module.apply(module.init(jax.random.key(0), x, train=True), x, train=True, mutable=["batch_stats"])
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(new["batch_stats"]["mean"], exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["var"], exact.var((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(np.var(y, axis=(0, 1, 2)), 1, rtol=1e-3)


def test_statistics_move_in_training_only():
    x = sample((8, 4, 4, 3))
    module = BatchNorm()
    for train in (True, False):
        variables = module.init(jax.random.key(0), x, train=train)
        assert_close(variables["batch_stats"], {"mean": np.zeros(3), "var": np.ones(3)})
    _, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
    mean, var = np.mean(x, (0, 1, 2)), np.var(x, (0, 1, 2))
    assert_close(new["batch_stats"], {"mean": 0.1 * mean, "var": 0.9 + 0.1 * var}, rtol=1e-5)
    _, same = module.apply(variables, x, train=False, mutable=["batch_stats"])
    assert_close(same["batch_stats"], variables["batch_stats"], rtol=0)


def test_frozen_statistics_are_used_and_kept_in_training():
    x = sample((8, 4, 4, 3))
    module = BatchNorm(statistics="frozen")
    variables = trained_variables(module, x)
    y, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, BatchNorm().apply(variables, x, train=False))
    assert_close(new["batch_stats"], variables["batch_stats"], rtol=0)
    p, s = jax.tree.map(np.asarray, (variables["params"], variables["batch_stats"]))
    expected = p["scale"] * (np.asarray(x) - s["mean"]) / np.sqrt(s["var"] + 1e-5) + p["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_ghost_batches_are_normalised_alone_and_their_statistics_averaged():
    x = sample((12, 3, 3, 5))
    module = BatchNorm(statistics=4)
    variables = trained_variables(module, x)
    y, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
    parts = [ours(BatchNorm())(variables, x[i : i + 4]) for i in (0, 4, 8)]
    np.testing.assert_allclose(y, np.concatenate([part for part, _ in parts]), rtol=1e-5, atol=1e-5)
    mean_of = jax.tree.map(lambda *s: np.mean(s, 0), *(collection for _, collection in parts))
    assert_close(new, mean_of, rtol=1e-5)


def mesh_of_eight():
    return jax.make_mesh((8,), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def per_device_step(module, variables, x):
    """The step inside pmap, its per-device gradients summed: the loss is a sum over the whole batch."""

    def local(variables, x, weights):
        def loss(params, x):
            y, new = ours(module)({**variables, "params": params}, x)
            return jnp.sum(y * weights), (y, new)

        (dparams, dx), (y, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
        return y, new, (jax.lax.psum(dparams, DATA_AXIS), dx)

    split = (8, x.shape[0] // 8, *x.shape[1:])
    weights = weights_of(x.shape, x.dtype).reshape(split)
    y, new, (dparams, dx) = jax.pmap(local, axis_name=DATA_AXIS, in_axes=(None, 0, 0))(
        variables, x.reshape(split), weights
    )
    for leaf in jax.tree.leaves(new):
        assert (leaf == leaf[:1]).all()  # running statistics stay replicated
    first = partial(jax.tree.map, lambda leaf: leaf[0])
    return y.reshape(x.shape), first(new), (first(dparams), dx.reshape(x.shape))


@pytest.mark.parametrize("statistics", ["global", "device", 2])
def test_one_device_eight_and_pmap_agree(statistics, float64):
    x = sample((32, 4, 3, 6), np.float64)
    module = BatchNorm(statistics=statistics, param_dtype=jnp.float64)
    variables = trained_variables(module, x)
    alone = BatchNorm(statistics=4 if statistics == "device" else statistics, param_dtype=jnp.float64)
    expected = jitted_step(ours(alone), variables, x)
    mesh = mesh_of_eight()
    with jax.set_mesh(mesh):
        sharded = jitted_step(
            ours(module),
            jax.device_put(variables, NamedSharding(mesh, P())),
            jax.device_put(x, NamedSharding(mesh, P(DATA_AXIS))),
        )
    assert sharded[0].sharding.spec == P(DATA_AXIS)
    assert_close(sharded, expected, rtol=1e-12, atol=1e-12)
    assert_close(per_device_step(module, variables, x), expected, rtol=1e-12, atol=1e-12)


def test_shard_map_agrees(float64):
    x = sample((32, 4, 3, 6), np.float64)
    module = BatchNorm(param_dtype=jnp.float64)
    variables = trained_variables(module, x)
    expected = jitted_step(ours(module), variables, x)
    weights = weights_of(x.shape, x.dtype)

    def loss(params, x):
        def local(params, x, weights):
            y, new = ours(module)({**variables, "params": params}, x)
            return jax.lax.psum(jnp.sum(y * weights), DATA_AXIS), new

        batch = P(DATA_AXIS)
        return jax.shard_map(local, in_specs=(P(), batch, batch), out_specs=P())(params, x, weights)

    with jax.set_mesh(mesh_of_eight()):
        grads, new = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], x)
    assert_close((new, grads), expected[1:], rtol=1e-12, atol=1e-12)


def test_device_statistics_without_a_mesh_are_global():
    x = sample((8, 4, 4, 3))
    variables = trained_variables(BatchNorm(), x)
    assert_close(ours(BatchNorm(statistics="device"))(variables, x), ours(BatchNorm())(variables, x), rtol=1e-6)


def test_the_closed_form_derivative_holds_to_second_order(float64):
    x = sample((5, 3), np.float64)
    module = BatchNorm(param_dtype=jnp.float64)
    variables = trained_variables(module, x)
    old = jax.tree.map(lambda leaf: leaf[None], variables["batch_stats"])

    def closed(params, x):
        return ours(module)({**variables, "params": params}, x)

    def automatic(params, x):
        p = jax.tree.map(lambda leaf: leaf[None], params)
        mean, var = x.mean(0, keepdims=True), x.var(0, keepdims=True)
        new = {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * var}
        return p["scale"] * (x - mean) / jnp.sqrt(var + 1e-5) + p["bias"], new

    def hessian(f):
        def scalar(params, x):
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(f(params, x)))

        return jax.jit(jax.jacfwd(jax.jacrev(scalar, argnums=(0, 1)), argnums=(0, 1)))(variables["params"], x)

    assert_close(hessian(closed), hessian(automatic), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NORMS)
def test_half_precision_computes_statistics_in_float32(name, strict_dtypes):
    x = sample((8, 4, 4, 8))
    module = norm(name, **({"groups": 2} if name == "group" else {}))()
    variables = module.init(jax.random.key(0), x, train=True)
    half, new = module.apply(variables, x.astype(jnp.bfloat16), train=True, mutable=["batch_stats"])
    assert half.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((variables, new)))
    full, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.05)
    assert module.clone(dtype=jnp.bfloat16).apply(variables, x, train=False).dtype == (
        x.dtype if name == "none" else jnp.bfloat16
    )


def test_statistics_follow_float64_inputs(float64):
    variables = BatchNorm().init(jax.random.key(0), sample((4, 3), np.float64), train=True)
    assert variables["batch_stats"]["var"].dtype == jnp.float64
    assert variables["params"]["scale"].dtype == jnp.float32


@pytest.mark.parametrize("shape", SHAPES[1::2])
def test_per_example_norms_are_those_of_flax(shape):
    x = sample(shape)
    every = tuple(range(1, x.ndim))
    pairs = [
        (LayerNorm(), nn.LayerNorm(epsilon=1e-5, reduction_axes=every, use_fast_variance=False)),
        (InstanceNorm(), nn.InstanceNorm(epsilon=1e-5, use_fast_variance=False)),
        (GroupNorm(groups=3), nn.GroupNorm(3, epsilon=1e-5, use_fast_variance=False)),
    ]
    for module, flax in pairs:
        variables = trained_variables(module, x)
        reference = jitted_step(partial(flax.apply, mutable=["batch_stats"]), variables, x)
        assert_close(jitted_step(ours(module), variables, x), reference, rtol=5e-5, atol=5e-5)


def test_group_norm_is_that_of_torch(float64):
    torch = pytest.importorskip("torch")
    x = sample((4, 5, 3, 6), np.float64)
    module = GroupNorm(groups=2, param_dtype=jnp.float64)
    variables = trained_variables(module, x)
    p = {name: torch.tensor(value) for name, value in variables["params"].items()}
    reference = torch.nn.functional.group_norm(
        torch.tensor(np.moveaxis(np.asarray(x), -1, 1)), 2, p["scale"], p["bias"]
    )
    y = module.apply(variables, x, train=True)
    np.testing.assert_allclose(np.moveaxis(np.asarray(y), -1, 1), reference, atol=1e-12)


class Block(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x, *, train):
        return self.norm(name="bn1", use_bias=False, scale_init=nn.initializers.zeros)(x, train=train)


@pytest.mark.parametrize("name", NORMS)
def test_norms_swap_in_a_model_and_see_shapes_only(name):
    block = Block(norm(name, epsilon=1e-3, dtype=jnp.float32))
    x = jnp.zeros((2, 4, 4, 32))
    variables = jax.eval_shape(partial(block.init, train=True), jax.random.key(0), x)
    expected = {"bn1": {"scale": (32,)}} if name != "none" else {}
    assert jax.tree.map(jnp.shape, variables.get("params", {})) == expected


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: norm("bacth"), "did you mean 'batch'"),
        (lambda: norm("layer", statistics="device"), "unknown option of norm 'layer'"),
        (lambda: BatchNorm(statistics="globl"), "did you mean 'global'"),
        (lambda: BatchNorm(statistics=0), "at least 1 example"),
        (lambda: run(BatchNorm(statistics=3)), "ghost batches of 3"),
        (lambda: run(GroupNorm()), "6 channels cannot be divided in 32 groups"),
        (lambda: run(InstanceNorm(), jnp.zeros((4, 6))), "needs spatial axes"),
        (lambda: run(BatchNorm(), jnp.zeros((4, 6), jnp.uint8)), "needs floating-point inputs, got uint8"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(InputError, match=message):
        act()


def run(module, x=None):
    x = jnp.zeros((4, 2, 2, 6)) if x is None else x
    return ours(module)(module.init(jax.random.key(0), x, train=True), x)


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    with jax.set_mesh(mesh_of_eight()), pytest.raises(InputError, match="4 cannot be divided over 8 devices"):
        run(BatchNorm(statistics="device"))
