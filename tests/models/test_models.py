"""Architectures against their published counts and equations, by shape inference wherever that is enough."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.errors import InputError
from jaxcnn.layers.blocks import pad_shortcut
from jaxcnn.models import MODELS, create
from jaxcnn.tree import flatten


def shapes(name, size=None, **overrides):
    module = create(name, **overrides)
    sample = jax.ShapeDtypeStruct((2, *(size or MODELS[name].input)), jnp.float32)
    return jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, train=False), sample)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# He et al. 2016, section 4.2 and the arithmetic of its table; torchvision for ResNet-18; LeCun et al. 1998 for LeNet-5.
COUNTS = {
    "linear": 7_850,
    "lenet5": 61_706,
    "lenet5_1998": 60_000,
    **{f"cifar_{kind}{depth}": n for kind in ("resnet", "plain") for depth, n in
       ((20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962))},
    "resnet18": 11_689_512,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_count(name):
    outputs, variables = shapes(name)
    assert count(variables["params"]) == COUNTS[name]
    assert outputs.shape == (2, 1000 if name == "resnet18" else 10)
    assert set(variables) == ({"params", "batch_stats"} if "resnet" in name or "plain" in name else {"params"})


def test_counts_under_overrides():
    assert count(shapes("lenet5", (32, 32, 1))[1]["params"]) == 61_706
    assert count(shapes("lenet5", padding=0)[1]["params"]) == 44_426
    assert count(shapes("cifar_resnet20", num_classes=100)[1]["params"]) == 275_572
    assert count(shapes("cifar_resnet20", shortcut="B")[1]["params"]) == 269_722 + 2_752
    assert count(shapes("resnet18", num_classes=10)[1]["params"]) == 11_689_512 - 990 * 513
    assert count(shapes("mlp", depth=0)[1]["params"]) == COUNTS["linear"]
    assert count(shapes("mlp", (2, 2, 1), depth=3, width=5, num_classes=3)[1]["params"]) == 25 + 30 + 30 + 18


def test_statistics_are_two_for_each_normalised_channel():
    variables = shapes("cifar_resnet20")[1]
    assert count(variables["batch_stats"]) == 2 * (7 * 16 + 6 * 32 + 6 * 64)


def test_projections_stand_where_the_shape_changes_and_nowhere_else():
    paths = [p for p in flatten(shapes("resnet18")[1]["params"]) if p.endswith("projection/kernel")]
    assert paths == [f"stage{s}/block1/projection/kernel" for s in (2, 3, 4)]
    assert not [p for p in flatten(shapes("cifar_resnet20")[1]["params"]) if "projection" in p]


def test_resnet18_halves_the_image_five_times():
    module = create("resnet18")
    outputs = jax.eval_shape(
        lambda x: module.init_with_output(
            jax.random.key(0),
            x,
            train=False,
            capture_intermediates=True,
            mutable=["params", "batch_stats", "intermediates"],
        ),
        jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),
    )[1]["intermediates"]
    assert outputs["conv1"]["__call__"][0].shape == (1, 112, 112, 64)
    sizes = [outputs[f"stage{i}"]["__call__"][0].shape[1:] for i in (1, 2, 3, 4)]
    assert sizes == [(56, 56, 64), (28, 28, 128), (14, 14, 256), (7, 7, 512)]


def test_a_residual_block_with_zero_weights_is_the_shortcut():
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    module = create("cifar_resnet20", depth=8, width=4, norm="none")
    variables = module.init(jax.random.key(1), x, train=False)
    params = jax.tree.map(jnp.zeros_like, variables["params"])
    params = {**params, "conv1": variables["params"]["conv1"], "fc": variables["params"]["fc"]}
    stem = jax.nn.relu(
        jax.lax.conv(x.transpose(0, 3, 1, 2), params["conv1"]["kernel"].transpose(3, 2, 0, 1), (1, 1), "SAME")
    )
    deep = pad_shortcut(pad_shortcut(stem.transpose(0, 2, 3, 1), channels=8, stride=2), channels=16, stride=2)
    expected = deep.mean((1, 2)) @ params["fc"]["kernel"] + params["fc"]["bias"][None]
    np.testing.assert_allclose(module.apply({"params": params}, x, train=False), expected, atol=1e-5)


def test_option_a_takes_every_second_pixel_and_pads_channels_on_both_sides():
    x = jnp.arange(2 * 5 * 5 * 2.0).reshape(2, 5, 5, 2)
    y = pad_shortcut(x, channels=6, stride=2)
    np.testing.assert_array_equal(y[..., 2:4], x[:, ::2, ::2])
    assert not y[..., :2].any()
    assert not y[..., 4:].any()


def test_an_mlp_without_activations_is_one_linear_map(float64):
    x = jax.random.normal(jax.random.key(0), (4, 2, 3, 1), jnp.float64)
    module = create("mlp", depth=1, width=7, act="identity", num_classes=3)
    params = module.init(jax.random.key(1), x, train=False)["params"]
    w1, w2 = params["dense1"]["kernel"], params["dense2"]["kernel"]
    expected = x.reshape(4, -1) @ (w1 @ w2) + (params["dense1"]["bias"] @ w2 + params["dense2"]["bias"])[None]
    np.testing.assert_allclose(module.apply({"params": params}, x, train=False), expected, rtol=1e-6)


def test_lenet5_of_1998_is_nearest_to_its_own_targets():
    from jaxcnn.models.lenet import _C3, _targets

    targets = _targets()
    assert targets.shape == (84, 10)
    assert set(np.unique(targets)) == {-1.0, 1.0}
    distances = ((targets[:, :, None] - targets[:, None, :]) ** 2).sum(0)
    assert (distances + 1000 * np.eye(10) > 20).all()  # no two digits look alike
    assert [len(maps) for maps in _C3] == [3] * 6 + [4] * 9 + [6]
    assert np.bincount(np.concatenate(_C3)).tolist() == [10] * 6  # table I: every map of S2 feeds ten of C3


@pytest.mark.parametrize(
    "name", ["linear", "mlp", pytest.param("lenet5", marks=pytest.mark.slow), "lenet5_1998", "cifar_resnet20"]
)
def test_forward_and_gradient_are_finite_in_bfloat16(name):
    overrides = {"width": 4, "depth": 8} if "cifar" in name else {}
    module = create(name, dtype=jnp.bfloat16, **overrides)
    x = jax.random.uniform(jax.random.key(0), (4, *MODELS[name].input), jnp.float32)
    variables = module.init(jax.random.key(1), x, train=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def loss(params):
        others = {k: v for k, v in variables.items() if k != "params"}
        out, _ = module.apply({"params": params, **others}, x, train=True, mutable=["batch_stats"])
        assert out.dtype == jnp.bfloat16
        return out.astype(jnp.float32).mean()

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create("resnet_18"), "did you mean 'resnet18'"),
        (lambda: create("lenet5", widht=3), "unknown override of model 'lenet5' 'widht'"),
        (lambda: create("resnet18", weights="w.h5"), r"pretrained\.load\('resnet18', path\), then create\('resnet18'"),
        (lambda: create("lenet5", num_classes=0), "0 classes"),
        (lambda: shapes("lenet5", (8, 8, 1), padding=0), "at least 16x16"),
        (lambda: shapes("lenet5_1998", num_classes=12), "12 classes"),
        (lambda: shapes("lenet5_1998", (28, 28, 3)), "28x28x1"),
        (lambda: shapes("cifar_resnet20", depth=21), "6n \\+ 2"),
        (lambda: shapes("cifar_resnet20", shortcut="C"), "unknown shortcut"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
