"""Randomly wired networks: the generators by what defines them, the networks against Xie et al. 2019, table 1."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.errors import InputError
from jaxcnn.layers.conv import Conv, conv
from jaxcnn.layers.norm import Identity
from jaxcnn.models import create
from jaxcnn.models.randwire import RandomGraph, edges
from jaxcnn.tree import flatten

PARAMETERS = {"ws": {"links": 4, "probability": 0.75}, "er": {"probability": 0.2}, "ba": {"links": 5}}
TINY = {"nodes": 3, "width": 6, "links": 2, "probability": 0.5, "num_classes": 3}


def shapes(name, size=(224, 224, 3), **overrides):
    module = create(name, **overrides)
    sample = jax.ShapeDtypeStruct((2, *size), jnp.float32)
    return jax.eval_shape(
        lambda x: module.init_with_output(
            jax.random.key(0),
            x,
            train=False,
            capture_intermediates=True,
            mutable=["params", "batch_stats", "intermediates"],
        ),
        sample,
    )


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def drawn(module, x):
    """Variables at random by NumPy, because compiling the initialisers of so many layers takes seconds."""
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def degrees(graph, nodes):
    """In- and out-degree of each node."""
    ends = np.array(graph)
    return np.bincount(ends[:, 1], minlength=nodes), np.bincount(ends[:, 0], minlength=nodes)


def rows(generator, width, regime, *, seed, **parameters):
    """(graph, nodes, channels in, channels out, pixels out at 224) of each random stage of table 1."""
    first = 3 if regime == "small" else 2
    channels = width if regime == "small" else width // 2
    for stage in range(first, 6):
        nodes, features = (16 if stage == 2 else 32), width * 2 ** (stage - first)
        graph = edges(generator, nodes=nodes, seed=seed, stage=stage, **parameters)
        yield graph, nodes, channels, features, (224 // 2**stage) ** 2
        channels = features


def arithmetic(generator, width, regime, *, seed=0, **parameters):
    """(parameters, multiply-adds) by the arithmetic of table 1."""
    half = width // 2
    total, macs = 27 * half + 2 * half, 27 * half * 112**2
    if regime == "small":
        total, macs = total + 9 * half * width + 2 * width, macs + 9 * half * width * 56**2
    for graph, nodes, channels, features, pixels in rows(generator, width, regime, seed=seed, **parameters):
        inputs, _ = degrees(graph, nodes)
        kernels = sum((9 + features) * (features if k else channels) for k in inputs)
        total += kernels + 2 * features * nodes + sum(k for k in inputs if k > 1)
        macs += kernels * pixels
    last = features
    return total + last * 1280 + 2 * 1280 + 1281 * 1000, macs + last * 1280 * 49 + 1280 * 1000


@pytest.mark.parametrize("generator", PARAMETERS)
@pytest.mark.parametrize("seed", range(1, 6))
def test_edges_point_forward_are_sorted_and_join_all_nodes(generator, seed):
    graph = edges(generator, seed=seed, stage=3, **PARAMETERS[generator])
    assert list(graph) == sorted(set(graph))
    assert all(0 <= i < j < 32 for i, j in graph)
    reached = {0}
    for _ in range(32):
        reached |= {v for edge in graph if reached & set(edge) for v in edge}
    assert reached == set(range(32))


def test_a_graph_depends_on_seed_and_stage_alone():
    draw = partial(edges, "ws", **PARAMETERS["ws"])
    assert draw(seed=3, stage=4) == draw(seed=3, stage=4)
    assert len({draw(seed=s, stage=t) for s in range(4) for t in range(4)}) == 16


def test_the_wirings_of_the_default_seed_never_change():
    """A checkpoint is worth nothing under other wirings: these must outlive releases of NumPy."""
    ws = ((0, 1), (0, 7), (1, 3), (2, 6), (3, 4), (4, 5), (5, 6), (6, 7))
    er = ((0, 1), (0, 2), (0, 3), (1, 3), (1, 5), (1, 7), (2, 4), (2, 5), (3, 7), (4, 7), (5, 6), (6, 7))
    ba = ((0, 2), (0, 3), (0, 4), (1, 2), (1, 4), (2, 3), (3, 5), (3, 6), (3, 7), (4, 5), (4, 6), (6, 7))
    assert edges("ws", nodes=8, links=2, probability=0.5) == ws
    assert edges("er", nodes=8, probability=0.4) == er
    assert edges("ba", nodes=8, links=2) == ba


def test_watts_strogatz_moves_edges_of_a_ring():
    ring = edges("ws", nodes=12, links=4, probability=0.0)
    assert set(ring) == {tuple(sorted((v, (v + i) % 12))) for v in range(12) for i in (1, 2)}
    for seed in range(20):
        graph = edges("ws", seed=seed, **PARAMETERS["ws"])
        assert len(graph) == 32 * 4 // 2  # edges are moved, none is made or lost
        assert np.sum(degrees(graph, 32), 0).min() >= 2  # a node keeps its own K / 2
    kept = [len(set(edges("ws", links=4, probability=p)) & set(edges("ws", links=4, probability=0.0)))
            for p in (0.1, 0.5, 0.9)]  # fmt: skip
    assert kept == sorted(kept, reverse=True)
    assert 64 > kept[0] > 50
    assert kept[2] < 20


def test_erdos_renyi_joins_each_pair_with_its_probability():
    assert len(edges("er", probability=1.0)) == 32 * 31 // 2
    joined = np.mean([len(edges("er", seed=s, probability=0.5)) for s in range(100)])
    standard_error = np.sqrt(496 * 0.25 / 100)
    assert abs(joined - 248) < 4 * standard_error


def test_barabasi_albert_adds_m_edges_a_node_and_prefers_high_degrees():
    for seed in range(40):
        graph = edges("ba", seed=seed, **PARAMETERS["ba"])
        inputs, _ = degrees(graph, 32)
        assert inputs.tolist() == [0] * 5 + [5] * 27
        assert set(graph) >= {(i, 5) for i in range(5)}
    # The first choice by degree: of nodes 0 and 1 (degree 1 each) and 2 (degree 2), two are drawn without return.
    missed = np.mean([(2, 3) not in edges("ba", nodes=4, seed=s, links=2) for s in range(2000)])
    expected = 2 / 4 * 1 / 3  # one of degree 1, then the other one
    assert abs(missed - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "generator", "overrides"),
    [
        ("randwire_ws", "ws", {}),
        ("randwire_er", "er", {"seed": 1}),
        ("randwire_ba", "ba", {}),
        ("randwire_ws", "ws", {"width": 109, "regime": "regular", "seed": 7}),
    ],
)
def test_parameters_are_those_of_table_1(name, generator, overrides):
    outputs, variables = shapes(name, **overrides)
    assert outputs.shape == (2, 1000)
    seed, width, regime = (overrides.get(k, v) for k, v in (("seed", 0), ("width", 78), ("regime", "small")))
    expected, _ = arithmetic(generator, width, regime, seed=seed, **PARAMETERS[generator])
    assert count(variables["params"]) == expected


def test_the_wiring_of_barabasi_and_albert_does_not_change_the_count():
    assert {arithmetic("ba", 78, "small", seed=s, links=5)[0] for s in range(5)} == {5_677_900}
    variables = shapes("randwire_ba", num_classes=10)[1]
    assert count(variables["params"]) == 5_677_900 - 990 * 1281
    assert count(variables["batch_stats"]) == 2 * (39 + 78 + 32 * 7 * 78 + 1280)


@pytest.mark.parametrize(
    ("width", "regime", "parameters", "macs"),
    [(78, "small", 5.6e6, 583e6), (109, "regular", 31.9e6, 4.0e9), (154, "regular", 61.5e6, 7.9e9)],
)
def test_published_parameters_and_operations_on_average_over_wirings(width, regime, parameters, macs):
    """Xie et al. 2019, the ImageNet tables, WS(4, 0.75)."""
    counts = [arithmetic("ws", width, regime, seed=s, **PARAMETERS["ws"]) for s in range(200)]
    np.testing.assert_allclose(np.mean(counts, 0), [parameters, macs], rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("regime", "channels"), [("small", (78, 156, 312)), ("regular", (78, 156, 312, 624))])
def test_each_row_of_table_1_halves_the_image(regime, channels):
    found = shapes("randwire_ws", regime=regime)[1]["intermediates"]
    assert found["conv1"]["__call__"][0].shape == (2, 112, 112, 39)
    assert ("conv2" in found) == (regime == "small")
    first = 6 - len(channels)
    for i, features in enumerate(channels, first):
        size = 224 // 2**i
        assert found[f"stage{i}"]["__call__"][0].shape == (2, size, size, features)
    assert found["conv6"]["__call__"][0].shape == (2, 7, 7, 1280)


def test_nodes_are_wired_as_the_edges_say():
    params = flatten(shapes("randwire_ws", seed=2)[1]["params"])
    graph = edges("ws", seed=2, stage=4, **PARAMETERS["ws"])
    inputs, _ = degrees(graph, 32)
    for j, k in enumerate(inputs):
        assert params[f"stage4/node{j}/depthwise/kernel"].shape == (3, 3, 1, 156 if k else 78)
        assert params[f"stage4/node{j}/pointwise/kernel"].shape == (1, 1, 156 if k else 78, 156)
        assert (f"stage4/node{j}/weight" in params) == (k > 1)
        if k > 1:
            assert params[f"stage4/node{j}/weight"].shape == (k,)


def test_other_sizes_have_the_same_parameters():
    at_224, at_65 = (shapes("randwire_ws", (size, size, 3))[1]["params"] for size in (224, 65))
    assert at_224 == at_65


def test_a_stage_is_weighted_sums_separable_convolutions_and_one_average():
    graph = ((0, 2), (1, 2), (0, 3))
    layer = partial(Conv, use_bias=False)
    stage = RandomGraph(graph, 4, 3, conv=layer, norm=Identity, act=jax.nn.relu)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 2))
    params = drawn(stage, x)["params"]

    def node(j, x, stride=1):
        p = params[f"node{j}"]
        x = conv(jax.nn.relu(x), p["depthwise"]["kernel"], strides=stride, padding=1, groups=x.shape[-1])
        return conv(x, p["pointwise"]["kernel"])

    first, second = node(0, x, stride=2), node(1, x, stride=2)
    a, b = 1 / (1 + np.exp(-params["node2"]["weight"]))
    expected = (node(2, a * first + b * second) + node(3, first)) / 2
    np.testing.assert_allclose(
        np.asarray(stage.apply({"params": params}, x, train=False)), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("size", [(17, 3), (9, 11, 3), (8, 9, 7, 3)])
def test_one_two_and_three_dimensions(size):
    outputs, _ = shapes("randwire_ws", size, dimensions=len(size) - 1, **TINY)
    assert outputs.shape == (2, 3)


@pytest.mark.slow
def test_training_moves_statistics_and_bfloat16_is_finite():
    module = create("randwire_ws", dtype=jnp.bfloat16, dropout=0.2, **TINY)
    x = jax.random.uniform(jax.random.key(0), (4, 16, 16, 3))
    variables = drawn(module, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def loss(params):
        state = {"params": params, "batch_stats": variables["batch_stats"]}
        out, moved = module.apply(state, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)})
        return out.astype(jnp.float32).mean(), moved

    gradient, moved = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    before = flatten(variables["batch_stats"])
    assert all((leaf != before[path]).any() for path, leaf in flatten(moved["batch_stats"]).items())


def test_without_batch_norm_there_are_no_statistics():
    assert "batch_stats" not in shapes("randwire_ws", norm="none", **TINY)[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: edges("wss", links=4), "unknown generator 'wss'"),
        (lambda: edges("ws", links=4), "'ws' takes links and probability alone"),
        (lambda: edges("er", links=4, probability=0.2), "'er' takes probability alone"),
        (lambda: edges("ws", links=3, probability=0.5), "links 3: .* an even number"),
        (lambda: edges("ba", links=32), "links 32: expected an integer from 1 to 31"),
        (lambda: edges("er", probability=1.2), r"probability 1\.2: expected a number from 0 to 1"),
        (lambda: edges("er", nodes=1, probability=0.2), "1 nodes"),
        (lambda: edges("er", seed=-1, probability=0.2), "seed -1"),
        (
            lambda: shapes("randwire_er", probability=0.02, seed=5),
            r"'er', \{'probability': 0\.02\}, seed 5, stage 3 is not connected: choose another seed",
        ),
        (lambda: shapes("randwire_ws", regime="large"), "unknown regime 'large'"),
        (lambda: shapes("randwire_ws", width=1), "width 1"),
        (lambda: shapes("randwire_ws", (224, 3)), "expected images"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
