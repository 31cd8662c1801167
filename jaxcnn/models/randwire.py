"""Randomly wired networks: Xie, Kirillov, Girshick and He 2019, "Exploring Randomly Wired Neural Networks for Image
Recognition", section 3 and table 1.

A generator draws an undirected random graph; an edge (i, j) with i < j carries data from node i to node j. Rows of
table 1 (C channels, N nodes; each halves the image):

    row         small                          regular
    conv1       3x3 convolution, C / 2         3x3 convolution, C / 2
    conv2       3x3 convolution, C             random graph, N / 2 nodes, C
    conv3       random graph, N nodes, C       random graph, N nodes, 2C
    conv4       random graph, N nodes, 2C      random graph, N nodes, 4C
    conv5       random graph, N nodes, 4C      random graph, N nodes, 8C
    classifier  1x1 convolution to 1280, global average pooling, dense

Convolutions are the triplet ReLU, convolution, BatchNorm, but for conv1, which has no ReLU in front. Taken literally
for the last one too: nothing nonlinear stands between it and the classes. No convolution has a bias.

Choices where the paper is silent: the weights of a sum start at 0, so its gates at 1/2; a node with one input has no
weight, which BatchNorm would cancel; C / 2 is rounded down; conv2 of the small regime is a plain convolution, which
gives the published operations (a separable one would be 75 M short). The paper drops edges at random in the regular
regime's training; here it has the classifier's dropout alone.

Over 400 seeds of WS(4, 0.75), mean and standard deviation: C = 78 small: 5.62 +- 0.08 M parameters and 579 +- 6 M
multiply-adds (paper: 5.6 M, 583 M); C = 109 regular: 32.1 +- 0.6 M and 3.98 +- 0.05 G (31.9 M, 4.0 G); C = 154
regular: 61.9 +- 1.3 M and 7.84 +- 0.11 G (61.5 M, 7.9 G). BA(5) always has 5 nodes at a stage's input, and so
5,677,900 parameters at C = 78.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from jaxcnn.errors import InputError, unknown
from jaxcnn.layers.act import activation
from jaxcnn.layers.blocks import family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import global_avg_pool
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array

Edges = tuple[tuple[int, int], ...]
"""Pairs (i, j) of nodes, i < j, in increasing order."""


def edges(
    generator: str,
    *,
    nodes: int = 32,
    seed: int = 0,
    stage: int = 0,
    links: int | None = None,
    probability: float | None = None,
) -> Edges:
    """The random graph that a stage is wired by, as edges in the direction of the data.

    `generator`:

    - "ws" (Watts and Strogatz): a ring in which each node is joined to its `links` nearest; then, clockwise, each
      edge to the i-th next node is moved with `probability` to a random other node, for i = 1, ..., links / 2.
    - "er" (Erdos and Renyi): each pair of nodes is joined with `probability`.
    - "ba" (Barabasi and Albert): `links` nodes without edges; each further node is joined to `links` different ones,
      chosen in proportion to their degree (the first one to all).

    The draw is a function of (seed, stage) and the other arguments alone; `stage` tells the graphs of one network
    apart (its row in table 1).

    Raises:
        InputError: unknown generator; a parameter missing, out of range or of another generator; a graph that is not
            connected: with "er" and probability 0.2, 3 % of those of 32 nodes and nearly half of those of 16.
    """
    if generator not in GENERATORS:
        raise unknown("generator", generator, GENERATORS)
    given = {"links": links, "probability": probability}
    needed = GENERATORS[generator].parameters
    if any((given[name] is not None) != (name in needed) for name in given):
        raise InputError(f"generator {generator!r} takes {' and '.join(needed)} alone, got {given}")
    _check_ranges(generator, nodes, seed, links, probability)
    parameters = {name: given[name] for name in needed}
    joined = GENERATORS[generator].draw(np.random.default_rng((seed, stage)), nodes, **parameters)
    if not _connected(joined):
        raise InputError(
            f"the graph of {nodes} nodes from generator {generator!r}, {parameters}, seed {seed}, stage {stage} "
            "is not connected: choose another seed, or more edges by a larger probability or more links"
        )
    return tuple((int(i), int(j)) for i, j in np.argwhere(np.triu(joined, 1)))


def _check_ranges(generator: str, nodes: int, seed: int, links: int | None, probability: float | None) -> None:
    if seed < 0:
        raise InputError(f"seed {seed}: expected an integer of at least 0")
    if nodes < 2:
        raise InputError(f"{nodes} nodes: a random graph needs at least 2")
    if probability is not None and not 0 <= probability <= 1:
        raise InputError(f"probability {probability}: expected a number from 0 to 1")
    if links is not None and not 1 <= links < nodes:
        raise InputError(f"links {links}: expected an integer from 1 to {nodes - 1}, less than the {nodes} nodes")
    if generator == "ws" and links is not None and links % 2:
        raise InputError(f"links {links}: generator 'ws' needs an even number, half of them to either side")


# The generators give (n, n) symmetric matrices, true where nodes are joined; the diagonal means nothing. They draw
# by `random` alone, whose stream is the least likely to change with NumPy: a checkpoint is tied to its wiring.


def _pick(rng: np.random.Generator, weights: np.ndarray) -> int:
    """An index, with probability in proportion to its weight (integers or booleans)."""
    heights = np.cumsum(weights)
    return int(np.searchsorted(heights, int(rng.random() * heights[-1]), side="right"))


def _watts_strogatz(rng: np.random.Generator, nodes: int, links: int, probability: float) -> np.ndarray:
    joined = np.eye(nodes, dtype=bool)
    steps = range(1, links // 2 + 1)
    for i in steps:
        for v in range(nodes):
            joined[v, (v + i) % nodes] = joined[(v + i) % nodes, v] = True
    for i in steps:
        for v in range(nodes):
            if rng.random() < probability and not joined[v].all():
                new, old = _pick(rng, ~joined[v]), (v + i) % nodes
                joined[v, old] = joined[old, v] = False
                joined[v, new] = joined[new, v] = True
    return joined


def _erdos_renyi(rng: np.random.Generator, nodes: int, probability: float) -> np.ndarray:
    upper = np.triu(rng.random((nodes, nodes)) < probability, 1)
    return upper | upper.T


def _barabasi_albert(rng: np.random.Generator, nodes: int, links: int) -> np.ndarray:
    joined = np.zeros((nodes, nodes), bool)
    joined[links, :links] = joined[:links, links] = True
    for v in range(links + 1, nodes):
        degrees = joined.sum(0)
        for _ in range(links):
            u = _pick(rng, degrees)
            degrees[u] = 0
            joined[v, u] = joined[u, v] = True
    return joined


def _connected(joined: np.ndarray) -> bool:
    reached = np.arange(len(joined)) == 0
    for _ in range(len(joined) - 1):
        reached = reached | joined[reached].any(0)
    return bool(reached.all())


class Generator(NamedTuple):
    """How a graph is drawn, and the arguments of `edges` that it takes."""

    draw: Callable[..., np.ndarray]
    parameters: tuple[str, ...]


GENERATORS = {
    "ws": Generator(_watts_strogatz, ("links", "probability")),
    "er": Generator(_erdos_renyi, ("probability",)),
    "ba": Generator(_barabasi_albert, ("links",)),
}


class Node(nn.Module):
    """Inputs (b, *spatial, c) -> (b, *spatial / stride, features): their sum, ReLU, separable 3x3 convolution, norm.

    The sum is weighted by sigmoid(weight), which is positive, with one learnt weight for each input. The convolution
    is a depthwise one, which has the stride, and a pointwise one with nothing in between.
    """

    features: int
    stride: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, inputs: Sequence[Array], *, train: bool) -> Array:
        x = inputs[0]
        if len(inputs) > 1:
            weight = self.param("weight", nn.initializers.zeros, (len(inputs),))
            gates = nn.sigmoid(weight).astype(x.dtype)
            x = sum((gates[i] * y for i, y in enumerate(inputs[1:], 1)), gates[0] * x)
        channels = x.shape[-1]
        x = self.conv(channels, 3, strides=self.stride, padding=1, groups=channels, name="depthwise")(self.act(x))
        x = self.conv(self.features, 1, padding=0, name="pointwise")(x)
        return self.norm(name="bn")(x, train=train)


class RandomGraph(nn.Module):
    """A stage: (b, *spatial, c) -> (b, *ceil(spatial / 2), features), nodes node0, node1, ... joined by `edges`.

    Nodes without predecessor all take the stage's input, with stride 2; nodes without successor are averaged.
    """

    edges: Edges
    nodes: int
    features: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        node = partial(Node, self.features, conv=self.conv, norm=self.norm, act=self.act)
        outputs: list[Array] = []
        for j in range(self.nodes):
            incoming = [outputs[i] for i, k in self.edges if k == j]
            stride = 1 if incoming else 2
            outputs.append(node(stride=stride, name=f"node{j}")(incoming or [x], train=train))
        sources = {i for i, _ in self.edges}
        last = [y for j, y in enumerate(outputs) if j not in sources]
        return sum(last[1:], last[0]) / len(last)


class RandWire(nn.Module):
    """(b, 224, 224, 3) -> logits (b, num_classes); images of any size work.

    The graphs are those of `edges` for `generator`, `nodes`, `seed`, `links` and `probability`: WS(K, P) of the
    paper is links=K, probability=P; ER(P) is links=None, probability=P; BA(M) is links=M, probability=None. stage3
    is row conv3 of table 1 and wired by `edges(..., stage=3)`, and so on; stage2, in the regular regime, has half
    the nodes. Another `seed` is another network, so the best of n wirings is the best of n seeds.

    Raises:
        InputError: as `edges`, or an unknown regime.
    """

    generator: str = "ws"
    links: int | None = 4
    probability: float | None = 0.75
    nodes: int = 32
    seed: int = 0
    regime: str = "small"
    num_classes: int = 1000
    width: int = 78
    norm: str = "batch"
    statistics: str | int = "global"
    epsilon: float = 1e-5
    act: str = "relu"
    kernel_init: str = "kaiming_normal"
    dropout: float = 0.0
    dimensions: int = 2
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        check_input(x, dimensions=self.dimensions)
        stages = self._stages()
        conv = partial(Conv, use_bias=False, kernel_init=initializer(self.kernel_init), dtype=self.dtype)
        normalise = family_norm(
            self.norm, statistics=self.statistics, width=self.width // 2, epsilon=self.epsilon, dtype=self.dtype
        )
        act = activation(self.act)
        x = conv(self.width // 2, 3, strides=2, padding=1, name="conv1")(x)
        x = normalise(name="bn1")(x, train=train)
        if self.regime == "small":
            x = conv(self.width, 3, strides=2, padding=1, name="conv2")(act(x))
            x = normalise(name="bn2")(x, train=train)
        for i, (graph, nodes, features) in stages.items():
            stage = RandomGraph(graph, nodes, features, conv=conv, norm=normalise, act=act, name=f"stage{i}")
            x = stage(x, train=train)
        x = conv(1280, 1, padding=0, name="conv6")(act(x))
        x = normalise(name="bn6")(x, train=train)
        x = Lambda(global_avg_pool, name="pool")(x)
        x = Dropout(self.dropout, name="dropout")(x, train=train)
        return nn.Dense(self.num_classes, kernel_init=initializer("lecun_normal"), dtype=self.dtype, name="fc")(x)

    def _stages(self) -> dict[int, tuple[Edges, int, int]]:
        """{row of table 1: (edges, nodes, features)}."""
        if self.regime not in ("small", "regular"):
            raise unknown("regime", self.regime, ("small", "regular"))
        if self.width < 2:
            raise InputError(f"width {self.width}: expected at least 2, because the first convolution has half of it")
        draw = partial(edges, self.generator, seed=self.seed, links=self.links, probability=self.probability)
        first = 3 if self.regime == "small" else 2
        rows = {}
        for i in range(first, 6):
            nodes = self.nodes if i > 2 else self.nodes // 2
            rows[i] = draw(nodes=nodes, stage=i), nodes, self.width * 2 ** (i - first)
        return rows


_PAPER = "Xie et al. 2019"

VARIANTS = {
    "randwire_ws": Entry(RandWire, (224, 224, 3), _PAPER),
    # Seed 1 is the first whose graphs are connected in both regimes.
    "randwire_er": Entry(
        RandWire, (224, 224, 3), _PAPER, {"generator": "er", "links": None, "probability": 0.2, "seed": 1}
    ),
    "randwire_ba": Entry(RandWire, (224, 224, 3), _PAPER, {"generator": "ba", "links": 5, "probability": None}),
}
