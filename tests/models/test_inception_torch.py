"""Both Inception networks, layer by layer in PyTorch from the same weights: ceil-mode poolings, paddings, order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.models import create

torch = pytest.importorskip("torch")
F = torch.nn.functional


class Reference:
    """PyTorch's operations on the variables of one module; `conv` is convolution, normalisation and ReLU."""

    def __init__(self, variables, epsilon):
        self.params, self.stats = variables["params"], variables["batch_stats"]
        self.epsilon = epsilon

    def inside(self, name):
        return Reference({"params": self.params[name], "batch_stats": self.stats[name]}, self.epsilon)

    def conv(self, x, name, **options):
        kernel = torch.tensor(np.asarray(self.params[name]["kernel"]).transpose(3, 2, 0, 1))
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, **options)
        norm, stats = self.params[f"{name}_bn"], self.stats[f"{name}_bn"]
        arrays = (stats["mean"], stats["var"], norm["scale"], norm["bias"])
        return F.relu(F.batch_norm(x, *(torch.tensor(np.asarray(a)) for a in arrays), eps=self.epsilon))

    def stem(self, x):
        x = F.max_pool2d(self.conv(x, "conv1", stride=2), 3, 2, ceil_mode=True)
        x = self.conv(self.conv(x, "conv2_reduce"), "conv2")
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    def head(self, x):
        fc = {name: torch.tensor(np.asarray(leaf)) for name, leaf in self.params["fc"].items()}
        return x.mean((2, 3)) @ fc["kernel"] + fc["bias"]


def inception_v1(net, x, pool4):
    x = net.stem(x)
    for stage in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        block = net.inside(f"inception_{stage}")
        branches = [
            block.conv(x, "conv1x1"),
            block.conv(block.conv(x, "reduce3x3"), "conv3x3"),
            block.conv(block.conv(x, "reduce5x5"), "conv5x5"),
            block.conv(F.max_pool2d(x, 3, 1, padding=1, ceil_mode=True), "pool_proj"),
        ]
        x = torch.cat(branches, 1)
        if stage in ("3b", "4e"):
            x = F.max_pool2d(x, 3 if stage == "3b" else pool4, 2, ceil_mode=True)
    return net.head(x)


def bn_inception(net, x):
    x = net.stem(x)
    for stage in ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        block = net.inside(f"inception_{stage}")
        stride = 2 if stage in ("3c", "4e") else 1
        inner = block.conv(block.conv(x, "reduce_double3x3"), "double3x3_1")
        branches = [
            block.conv(block.conv(x, "reduce3x3"), "conv3x3", stride=stride),
            block.conv(inner, "double3x3_2", stride=stride),
        ]
        if stride == 2:
            branches.append(F.max_pool2d(x, 3, 2, ceil_mode=True))
        else:
            pooled = F.max_pool2d(x, 3, 1, padding=1) if stage == "5b" else F.avg_pool2d(x, 3, 1, padding=1)
            branches = [block.conv(x, "conv1x1"), *branches, block.conv(pooled, "pool_proj")]
        x = torch.cat(branches, 1)
    return net.head(x)


def random_variables(module, x):
    """Initial weights; scales, biases and statistics drawn too, so that a confusion among them shows."""
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            return jnp.float32(rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1])))
        return jnp.float32(rng.uniform(0.5, 1.5, leaf.shape) * (0.2 if kind in ("bias", "mean") else 1))

    return jax.tree.map_with_path(draw, shapes)


@pytest.mark.parametrize(
    ("name", "size", "overrides"),
    [
        ("inception_v1", (64, 97), {}),
        pytest.param("inception_v1", (64, 97), {"five": 5, "pool4": 3}, marks=pytest.mark.slow),
        ("bn_inception", (64, 96), {}),
    ],
)
def test_the_network_equals_pytorchs(name, size, overrides):
    module = create(name, width=8, num_classes=5, **overrides)
    x = jax.random.normal(jax.random.key(1), (2, *size, 3))
    variables = random_variables(module, x)
    net = Reference(variables, module.epsilon)
    images = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))
    if name == "inception_v1":
        expected = inception_v1(net, images, overrides.get("pool4", 2))
    else:
        expected = bn_inception(net, images)
    found = jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, x)
    scale = float(expected.abs().max())
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5 * scale)
    assert float(expected.std()) > 0.01 * scale
