"""What is measured is what NumPy finds, what is predicted is what theory says, for any module (rows A1, A2)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.analysis import signal_report
from jaxcnn.analysis.moments import Moments, iterate, moment_map
from jaxcnn.analysis.signal import probe
from jaxcnn.errors import InputError
from jaxcnn.layers.init import initializer
from jaxcnn.layers.norm import BatchNorm
from jaxcnn.models import create

RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def mlp(depth, act, width=512):
    return create("mlp", depth=depth, width=width, act=act, num_classes=width)


class Own(nn.Module):
    """Ten lines of somebody's own, with nothing of ours in them."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), padding=1)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        y = nn.tanh(nn.Dense(16)(x))
        x = (x + y).reshape(len(x), -1)
        return {"logits": nn.Dense(5)(x), "norm": jnp.square(x).sum(1)}


def test_moments_and_gradients_are_those_of_numpy():
    module = mlp(2, "tanh", width=8)
    x = noise(6, 1, 1, 8)
    variables = module.init(jax.random.key(3), jnp.asarray(x), train=True)
    found = probe(module, x, variables=variables)
    w = [np.float64(variables["params"][f"dense{i}"]["kernel"]) for i in (1, 2, 3)]
    z1 = np.float64(x).reshape(6, 8) @ w[0]
    a1 = np.tanh(z1)
    z2 = a1 @ w[1]
    a2 = np.tanh(z2)
    values = [z1, a1, z2, a2, a2 @ w[2]]
    g5 = found.layers[-1].gradient_sample.reshape(6, 8).astype(np.float64)
    g4 = g5 @ w[2].T
    g3 = g4 * (1 - a2**2)
    g2 = g3 @ w[1].T
    gradients = [g2 * (1 - a1**2), g2, g3, g4, g5]
    assert [layer.name for layer in found.layers] == ["dense1", "MLP", "dense2", "MLP", "dense3"]
    assert [layer.kind for layer in found.layers] == ["Dense", "tanh", "Dense", "tanh", "Dense"]
    for layer, value, gradient in zip(found.layers, values, gradients, strict=True):
        assert layer.shape == (8,)
        assert layer.mean == pytest.approx(value.mean(), rel=1e-4, abs=1e-6)
        assert layer.variance == pytest.approx(value.var(), rel=1e-4)
        assert layer.second_moment == pytest.approx(np.square(value).mean(), rel=1e-4)
        assert layer.gradient == pytest.approx(np.square(gradient).mean(), rel=1e-4)
        np.testing.assert_allclose(layer.sample, value.ravel(), rtol=1e-4, atol=1e-6)
    slopes = 1 - a1**2
    assert found.layers[1].saturated == pytest.approx((slopes < 0.05 * slopes.max()).mean())
    assert found.layers[1].dead == 0
    assert found.layers[0].saturated is None


@pytest.mark.parametrize(("act", "gain"), [("identity", 1.0), ("relu", 2.0), ("tanh", 1.0), ("selu", 1.0)])
def test_the_prediction_is_the_moment_map(act, gain):
    """Forward, of the activations, for a batch whose examples are alike."""
    init = "kaiming_normal" if gain == 2 else "lecun_normal"
    x = noise(16, 1, 1, 512)
    found = probe(mlp(4, act), x, init=init)
    values = [layer for layer in found.layers if layer.kind != "Dense" or act == "identity"][:4]
    path = iterate(moment_map(act, gain=gain), Moments(0.0, float(np.square(x).mean())), steps=4)[1:]
    for layer, expected in zip(values, path, strict=True):
        assert layer.predicted == pytest.approx(expected.second, rel=0.02)


def ratios(values):
    values = np.array(values)
    return values[1:] / values[:-1]


@pytest.mark.slow
@pytest.mark.parametrize("act", ["identity", "relu", "tanh", "selu"])
def test_prediction_and_measurement_agree_layer_by_layer(act):
    """Means of 20 seeds, within 10 % from layer to layer, forward and backward."""
    init = "kaiming_normal" if act == "relu" else "lecun_normal"
    layers = probe(mlp(10, act), noise(16, 1, 1, 512), init=init, seeds=20).layers
    np.testing.assert_allclose(
        ratios([np.mean(one.second_moments) for one in layers]), ratios([one.predicted for one in layers]), rtol=0.1
    )
    np.testing.assert_allclose(
        ratios([np.mean(one.gradients) for one in layers]), ratios([one.predicted_gradient for one in layers]), rtol=0.1
    )


A2 = [
    ("tanh", "lecun_normal", (0.04, 0.08)),
    ("relu", "lecun_normal", (2e-16, 3e-15)),
    ("relu", "kaiming_normal", (0.25, 2.0)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("act", "init", "expected"), A2)
def test_the_100_layer_experiment(act, init, expected):
    """Of one example, over 20 seeds: the geometric mean of root mean squares, behind the 100th layer."""
    last = probe(mlp(100, act), noise(1, 1, 1, 512), init=init, seeds=20).layers[-2]
    assert expected[0] < last.rms < expected[1]


@pytest.mark.slow
def test_the_100_layer_experiment_without_activations():
    overflow = probe(mlp(100, "identity"), noise(4, 1, 1, 512), init=initializer("normal", std=1.0))
    first = next(i for i, layer in enumerate(overflow.layers, 1) if not math.isfinite(layer.second_moment))
    assert first in (28, 29)
    assert "overflows at dense" in overflow.verdict
    underflow = probe(mlp(100, "identity"), noise(4, 1, 1, 512), init=initializer("normal", std=0.01))
    assert underflow.layers[-1].second_moment == 0
    assert "0 from dense" in underflow.verdict


def test_a_net_that_loses_its_signal_is_told_what_to_use():
    found = probe(mlp(8, "relu", width=32), noise(8, 1, 1, 32), init="standard")
    assert "falls by a factor of" in found.verdict
    assert "over 9 layers: use kaiming_normal" in found.verdict
    assert "steady" in probe(mlp(3, "relu", width=64), noise(8, 1, 1, 64)).verdict


class Padded(nn.Module):
    padding: str

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.Conv(64, (3, 3), padding=self.padding, kernel_init=initializer("lecun_normal"))(x)
        return x


def test_zero_padding_loses_variance_at_the_border():
    """Row A2: a factor of 0.92 a layer at 8x8; 22 of the 24 taps of each axis see the image."""
    layers = probe(Padded("SAME"), noise(8, 8, 8, 64)).layers
    assert math.sqrt(layers[0].predicted) == pytest.approx(22 / 24, rel=0.01)
    for layer in layers:
        assert layer.rms == pytest.approx(math.sqrt(layer.predicted), rel=0.03)
    assert layers[2].rms == pytest.approx(0.92**3, rel=0.06)
    circular = probe(Padded("CIRCULAR"), noise(8, 8, 8, 64)).layers
    assert [layer.predicted for layer in circular] == pytest.approx([1, 1, 1], rel=0.02)
    assert [layer.rms for layer in circular] == pytest.approx([1, 1, 1], rel=0.05)


def test_somebodys_own_module_with_several_outputs():
    found = probe(Own(), noise(8, 8, 8, 3), seeds=2)
    assert [(layer.name, layer.kind, layer.shape) for layer in found.layers] == [
        ("Conv_0", "Conv", (8, 8, 16)),
        ("Own", "relu, max_pool", (4, 4, 16)),
        ("Dense_0", "Dense", (4, 4, 16)),
        ("Own", "tanh, add", (256,)),
        ("Dense_1", "Dense", (5,)),
        ("Own", "square, sum", ()),
    ]
    assert all(math.isfinite(layer.gradient) and layer.gradient > 0 for layer in found.layers)
    for layer in found.layers[:-1]:
        assert layer.second_moment == pytest.approx(layer.predicted, rel=0.4)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(BatchNorm(name="bn1")(nn.Conv(16, (3, 3), name="conv1")(x), train=train))
        return nn.BatchNorm(use_running_average=not train, name="bn2")(nn.Dense(16, name="fc")(x.mean((1, 2))))


def test_normalisation_acts_as_in_training_unless_told_otherwise():
    """Ours and Flax's; the second moment of a normalised value is 1, also in the prediction."""
    x = 30 * noise(32, 4, 4, 3)
    norms = [layer for layer in probe(Normalised(), x).layers if layer.name in ("bn1", "bn2")]
    assert [layer.kind for layer in norms] == ["BatchNorm", "BatchNorm"]
    assert [layer.second_moment for layer in norms] == pytest.approx([1, 1], rel=1e-2)
    assert [layer.predicted for layer in norms] == pytest.approx([1, 1], rel=1e-2)
    evaluated = [layer for layer in probe(Normalised(), x, train=False).layers if layer.name == "bn1"]
    assert evaluated[0].second_moment > 100


def test_dead_units_are_counted():
    module = mlp(1, "relu", width=16)
    x = noise(32, 1, 1, 16)
    variables = module.init(jax.random.key(0), jnp.asarray(x), train=True)
    bias = jnp.where(jnp.arange(16) < 4, -100.0, 0.0)
    params = {**variables["params"], "dense1": {**variables["params"]["dense1"], "bias": bias}}
    relu = probe(module, x, variables={"params": params}).layers[1]
    assert relu.dead == 0.25
    assert 0.5 < relu.saturated < 0.75


def test_the_table_and_the_picture(tmp_path):
    found = probe(mlp(2, "relu", width=8), noise(4, 1, 1, 8))
    assert signal_report.table(found).row_count == 5
    signal_report.plot(found, tmp_path / "a.png", title="mlp")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    infinite = probe(mlp(6, "identity", width=32), 1e33 * noise(4, 1, 1, 32), init=initializer("normal", std=10.0))
    signal_report.plot(infinite, tmp_path / "b.png")
    assert "inf" in {row["second_moment"] for row in infinite.to_json()["layers"]}


def test_what_cannot_be_probed():
    module, x = mlp(1, "relu", width=4), noise(4, 1, 1, 4)
    with pytest.raises(InputError, match=r"\(4,\): expected a batch"):
        probe(module, noise(4))
    with pytest.raises(InputError, match="seeds 0"):
        probe(module, x, seeds=0)
    with pytest.raises(InputError, match="1 where variables are given"):
        probe(module, x, seeds=2, variables=module.init(jax.random.key(0), jnp.asarray(x), train=True))
    with pytest.raises(InputError, match="not those of this module"):
        probe(module, x, variables=mlp(1, "relu", width=5).init(jax.random.key(0), jnp.asarray(x), train=True))
    with pytest.raises(InputError, match="did you mean 'lecun_normal'"):
        probe(module, x, init="lecun_norml")
