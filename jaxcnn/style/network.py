"""The frozen network: a VGG from a file, as far as the file goes; Gatys' normalised one; or one of random weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn import pretrained
from jaxcnn.analysis import summary
from jaxcnn.errors import InputError, unknown
from jaxcnn.features import feature_names, features
from jaxcnn.models import create
from jaxcnn.pretrained import store
from jaxcnn.pretrained.index import INDEX
from jaxcnn.pretrained.pixels import PREPROCESSINGS, Pixels
from jaxcnn.pretrained.read import read
from jaxcnn.types import Array, PyTree

CANDIDATES = ("vgg19", "vgg16", "vgg13", "vgg11", "vgg19_bn", "vgg16_bn", "vgg13_bn", "vgg11_bn")
"""What a file is tried as, until one fits; of two that begin alike, it does not matter which."""
RANDOM_NOTE = (
    "textures and colours come out, not what trained weights give; jaxcnn weights fetch vgg19.keras, then"
    " --weights vgg19.keras"
)
PAPER_CONTENT = "relu4_2"
PAPER_STYLE = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")


class Reach(NamedTuple):
    """How far features see, in pixels: `halo` beyond the `stride` that a feature of the deepest layer stands for, in
    whole strides; `strides` by layer."""

    stride: int
    halo: int
    strides: tuple[tuple[str, int], ...]

    def of(self, layer: str) -> int:
        return dict(self.strides)[layer]


@dataclass(frozen=True)
class Network:
    """A frozen VGG that takes RGB in 0..1; a pytree, so that compiled functions take it as an argument.

    `matrix` (3, 3) and `bias` (3,) make its input of a pixel: its order of channels, its scale, its mean. `layers` are
    the names that its weights reach, in order; `source` says where they come from.
    """

    variables: PyTree
    matrix: Array
    bias: Array
    module: nn.Module
    layers: tuple[str, ...]
    source: str

    def features(self, x: Array, names: Sequence[str]) -> dict[str, Array]:
        """Images (b, h, w, 3) to the named maps (b, h', w', c)."""
        pixels = jnp.einsum("bhwc,cd->bhwd", x, self.matrix.astype(x.dtype), precision="highest")
        pixels = pixels + self.bias.astype(x.dtype).reshape(1, 1, 1, -1)
        return features(self.module, self.variables, pixels, names=names) if names else {}

    def check(self, layers: Sequence[str], *, size: Sequence[int], what: str) -> None:
        """`InputError` where a layer has another name or no weights, or an image of `size` (h, w) is too small."""
        for name in layers:
            if name not in self.layers:
                raise unknown(f"layer of {self.source}", name, self.layers)
        if layers and min(size) < (stride := self.reach(layers).stride):
            deepest = max(layers, key=self.layers.index)
            raise InputError(
                f"{what} has {size[1]} x {size[0]} pixels, fewer than the stride of {deepest}, {stride}: nothing of it"
                f" would be left there; give a larger one, or layers that are less deep"
            )

    def reach(self, layers: Sequence[str]) -> Reach:
        return _reach(self.module, tuple(layers))


jax.tree_util.register_dataclass(
    Network, data_fields=["variables", "matrix", "bias"], meta_fields=["module", "layers", "source"]
)


@lru_cache(maxsize=16)
def _reach(module: Any, layers: tuple[str, ...]) -> Reach:
    """Kept: it traces the network."""
    rows = {row.name: row for row in summary(module.clone(padding_mode="zeros"), input=(224, 224, 3)).layers}
    strides = {name: _whole(rows[name].stride) for name in layers}
    stride = max(strides.values(), default=1)
    halo = max((_whole(rows[name].receptive_field) - strides[name] for name in layers), default=0) // 2
    return Reach(stride, -(-halo // stride) * stride, tuple(strides.items()))


def _whole(value: Any) -> int:
    return max(value) if isinstance(value, tuple) else int(value)


def load(weights: str | Path, *, model: str | None = None, pooling: str = "max") -> Network:
    """The VGG of a weights file, or of NAME.TAG of the index once it is fetched.

    The file may end at any layer: what it has must be whole from the first convolution on. `model` is found by trying
    where it is not given; `pooling` is "max", or "avg" as Gatys et al. prefer.

    Raises:
      InputError: no VGG's weights, or values that are not finite; what `pretrained.load` raises; another pooling.
    """
    path, models, overrides = Path(weights), (model,) if model else CANDIDATES, {}
    if str(weights) in INDEX:
        entry = INDEX[str(weights)]
        path, models, overrides = store.held(str(weights)), (entry.model,), entry.overrides
    for name in models:
        if name not in CANDIDATES:
            raise unknown("VGG", name, CANDIDATES)
    for key, array in read(path).items():
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise InputError(f"{path}: {key} holds values that are not finite")
    for name in models:
        if network := _as_far_as_it_goes(name, path, pooling, overrides):
            return replace(network, source=str(weights))
    pretrained.load(models[0], path, partial="^params/fc", **overrides)  # raises, and says what differs
    raise InputError(f"{path} lacks convolutions before its last one: it is no whole VGG")


def _as_far_as_it_goes(name: str, path: Path, pooling: str, overrides: Mapping[str, Any]) -> Network | None:
    """The network up to the last convolution that the file has; None where it does not fit."""
    try:
        loose = pretrained.load(name, path, partial=r"^\w+/(conv[1-5]|bn|fc)", **overrides)
    except InputError:
        return None
    module: Any = create(name, **{**loose.overrides, "pooling": pooling})
    convolutions = [f"conv{i}_{j}" for i, count in enumerate(module.convs, 1) for j in range(1, count + 1)]
    there = [layer for layer in convolutions if layer in loose.variables.get("params", {})]
    if not there:
        return None
    later = convolutions[convolutions.index(there[-1]) + 1 :]
    beyond = [*later, *(layer.replace("conv", "bn") for layer in later), "fc6", "fc7", "fc8"]
    try:
        loaded = pretrained.load(name, path, layout=loose.layout, partial=f"/({'|'.join(beyond)})/", **overrides)
    except InputError:
        return None
    variables = {
        collection: {layer: leaves for layer, leaves in tree.items() if layer not in beyond}
        for collection, tree in loaded.variables.items()
    }
    names = _names(module)
    names = names[: names.index(later[0])] if later else names
    matrix, bias = _affine(loaded.preprocessing)
    return Network(jax.tree.map(jnp.asarray, variables), matrix, bias, module, tuple(names), str(path))


def _names(module: Any) -> list[str]:
    """Of the layers before the dense ones; a BatchNorm that a network does not have is none."""
    names = feature_names(module, input=(224, 224, 3))
    return [name for name in names[: names.index("avgpool")] if module.norm != "none" or not name.startswith("bn")]


def _affine(pixels: Pixels) -> tuple[Array, Array]:
    """What `pixels` makes of RGB x in 0..1, as x @ matrix + bias."""
    bias = pixels(jnp.zeros((1, 1, 1, 3)))
    return (pixels(jnp.eye(3).reshape(1, 3, 1, 3)) - bias).reshape(3, 3), bias.reshape(3)


def random(*, width: int = 64, pooling: str = "max", seed: int = 0) -> Network:
    """A VGG-19 of random weights (He et al. 2015) for BGR in 0..255 less the mean, as Oxford's.

    Random filters see edges and colours, not objects: textures come out, not what trained weights give.
    """
    module = create("vgg19", width=width, hidden=1, num_classes=1, pooling=pooling)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes: Any = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), image)
    rng, params = np.random.default_rng(seed), {}  # NumPy: to compile JAX's draws of 16 layers takes 10 seconds
    for layer, leaves in shapes["params"].items():
        if layer.startswith("conv"):
            *window, features = leaves["kernel"].shape
            kernel = rng.standard_normal((*window, features), np.float32) * np.sqrt(np.float32(2 / np.prod(window)))
            params[layer] = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(features)}
    matrix, bias = _affine(PREPROCESSINGS["caffe"])
    return Network(
        {"params": params}, matrix, bias, module, tuple(_names(module)), f"VGG-19 of random weights (seed {seed})"
    )


def normalise(network: Network, images: Sequence[Array]) -> Network:
    """Gatys et al. 2016, section 2: every filter's mean activation over `images`, RGB in 0..1 (b, h, w, 3), becomes 1.

    A network of ReLU and pooling is positively homogeneous: dividing the weights and bias of filter i by its mean m_i,
    and multiplying what the next layer takes from it by m_i, changes no other value. Filters never active stay.
    The mean is over all locations of all images.

    Raises:
      InputError: a network with BatchNorm, or another activation than ReLU.
    """
    module: Any = network.module
    if module.norm != "none" or module.act != "relu":
        raise InputError(
            f"{network.source} has norm {module.norm} and act {module.act}: only plain ReLU networks scale"
        )
    relus = [name for name in network.layers if name.startswith("relu")]
    means = mean_activations(network, images, relus)
    params, before = {}, None
    for name in network.layers:
        if name in network.variables["params"]:
            kernel, bias = (network.variables["params"][name][leaf] for leaf in ("kernel", "bias"))
            mean = means.get(name.replace("conv", "relu"))
            if before is not None:
                kernel = kernel * before.reshape(1, 1, -1, 1)
            if mean is not None:
                kernel, bias, before = kernel / mean.reshape(1, 1, 1, -1), bias / mean, mean
            params[name] = {"kernel": kernel, "bias": bias}
    return replace(network, variables={"params": params}, source=f"{network.source}, normalised")


def mean_activations(network: Network, images: Sequence[Array], names: Sequence[str]) -> dict[str, Array]:
    """(c,) by layer: over all locations of all images, 1 where a filter is never active."""

    @jax.jit
    def sums(network: Network, x: Array) -> dict[str, tuple[Array, int]]:
        found = network.features(x, names)
        return {name: (one.sum((0, 1, 2)), one[..., 0].size) for name, one in found.items()}

    totals = [sums(network, image) for image in images]
    means = {name: sum(t[name][0] for t in totals) / sum(t[name][1] for t in totals) for name in names}
    return {name: jnp.where(mean > 0, mean, 1) for name, mean in means.items()}
