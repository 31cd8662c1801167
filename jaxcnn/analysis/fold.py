"""BatchNorm folded into the convolution or dense layer before it, for any Flax module (rows A6 and L5)."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxcnn.analysis.norms import check_variables, layer_before, look, normalised, returned_dtype
from jaxcnn.errors import InputError
from jaxcnn.layers.window import as_written
from jaxcnn.models.table import call_options
from jaxcnn.types import Array, ArrayLike, PyTree


@dataclass(frozen=True)
class Folded:
    """`module.apply(variables, x, train=False)` gives the network's logits without the norms `folded`, whose
    parameters and statistics `variables` has no more; `kept` says of every other norm why it stays. Norms are named
    by their paths, "stage1/block2/bn1"."""

    module: nn.Module
    variables: dict[str, PyTree]
    folded: tuple[str, ...]
    kept: dict[str, str]


class Comparison(NamedTuple):
    """`difference`: the largest of an output, absolute; `relative`: over the largest absolute output; `speedup`: time
    of a call before over that after."""

    difference: float
    relative: float
    speedup: float


def fold(
    module: nn.Module, variables: Mapping[str, PyTree], *, input: tuple[int, ...] | None = None, x: Any = None
) -> Folded:
    """W' = gamma W / sqrt(v + eps) and b' = gamma (b - mu) / sqrt(v + eps) + beta, in float64 and then rounded.

    A norm is folded where all that it sees is what one convolution or dense layer returns, in one call, and nothing
    else sees that. Which that is, is read off the traced program for one example of shape `input`, (h, w, c) say, or
    for examples like those of `x` (b, h, w, c). The layer is any module with a `kernel` whose last axis is the
    features, that does nothing but that product and adding a `bias`; the norm is `jaxcnn.layers`' BatchNorm or Flax's.
    Norms without running statistics (layer, group, instance) are neither folded nor listed. A layer without bias gets
    one. Networks that are compiled as loops are written out if a norm in them is folded.

    Raises:
        InputError: neither or both of `input` and `x`; what `trace` raises; variables of another network.
    """
    if (input is None) == (x is None):
        raise InputError("fold: give either input, the shape (h, w, c) of one example, or examples x (b, h, w, c)")
    shape, dtype = (input, jnp.float32) if input is not None else (tuple(x.shape[1:]), x.dtype)
    network = look(module, input=shape, dtype=dtype)
    given = check_variables(network, variables)
    pairs: dict[str, str] = {}
    kept: dict[str, str] = {}
    for path in network.norms:
        layer, reason = layer_before(network, path)
        if layer is None:
            kept[path] = reason
        else:
            pairs[path] = layer
    flat = {key: given[key] for key in given if not _belongs(key, pairs)}
    for path, layer in pairs.items():
        flat.update(_folded(given, path, layer, network.found[path].epsilon))
    biased = tuple(layer for layer in pairs.values() if f"params/{layer}/bias" not in given)
    calls = _calls(module, variables, shape, dtype)
    plain = any(calls[path] != 1 for path in (*pairs, *pairs.values()))
    return Folded(_Folded(module, tuple(pairs), biased, plain), unflatten_dict(flat, sep="/"), tuple(pairs), kept)


def largest_difference(
    module: nn.Module, variables: Mapping[str, PyTree], folded: Folded, x: ArrayLike
) -> tuple[float, float]:
    """The largest |difference| of an output for x (b, h, w, c), and over the largest |output| of the network.

    Both are computed with products in full precision, so that it is folding's own, also on accelerators that would
    round the operands of float32 products.
    """
    with jax.default_matmul_precision("highest"):
        before, after = (jax.device_get(call(x)) for call in _compiled(module, variables, folded))
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    difference = max(float(np.abs(a - b).max()) for a, b in wide)
    return difference, difference / max(float(np.abs(a).max()) for a, _ in wide)


def compare(
    module: nn.Module, variables: Mapping[str, PyTree], folded: Folded, x: ArrayLike, *, calls: int = 7
) -> Comparison:
    """What folding changes for x (b, h, w, c): in the outputs, and in the time of a compiled call.

    The speed-up is the ratio of medians over `calls` of each, in turns, in the default precision.
    """
    difference, relative = largest_difference(module, variables, folded, x)
    both = _compiled(module, variables, folded)
    for call in both:
        jax.block_until_ready(call(x))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(calls):
        for call, taken in zip(both, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call(x))
            taken.append(time.perf_counter() - start)
    return Comparison(difference, relative, statistics.median(seconds[0]) / statistics.median(seconds[1]))


def _compiled(module: nn.Module, variables: PyTree, folded: Folded) -> list[Callable[[ArrayLike], Any]]:
    calls = []
    for net, held in ((module, variables), (folded.module, folded.variables)):
        options, held = call_options(net, train=False), jax.device_put(held)
        calls.append(_with(jax.jit(lambda v, x, net=net, options=options: net.apply(v, x, **options)), held))
    return calls


def _with(function: Callable[..., Any], held: PyTree) -> Callable[[ArrayLike], Any]:
    return lambda x: function(held, x)


class _Folded(nn.Module):
    """`module`, in which `norms` return what they are given and the layers `biased` have a bias more."""

    module: nn.Module
    norms: tuple[str, ...]
    biased: tuple[str, ...]
    plain: bool
    """Whether blocks that are compiled as a loop have to be written out, so that each has its path."""

    def setup(self) -> None:
        nn.share_scope(self, self.module)

    @property
    def num_classes(self) -> int | None:
        """The module's own."""
        return getattr(self.module, "num_classes", None)

    def __call__(self, x: Array, *, train: bool = False) -> Any:
        """What `module` returns in evaluation. `InputError` for `train`: the folded statistics cannot move."""
        if train:
            raise InputError("a folded network is for evaluation: train the network itself and fold it afterwards")
        norms, biased = set(self.norms), set(self.biased)

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            layer, path = context.module, "/".join(context.module.path)
            if context.method_name != "__call__" or path not in norms | biased:
                return call(*args, **kwargs)
            if path in norms:
                given = normalised(args, kwargs)
                return given.astype(returned_dtype(layer, given))
            y = call(*args, **kwargs)
            bias = jnp.asarray(layer.get_variable("params", "bias"), y.dtype)
            return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))

        with nn.intercept_methods(intercept):
            options = call_options(self.module, train=False)
            if not self.plain:
                return self.module(x, **options)
            with as_written():
                return self.module(x, **options)


def _calls(module: nn.Module, variables: PyTree, input: tuple[int, ...], dtype: Any) -> Counter[str]:
    """How often each path is called where nothing is written out."""
    calls: Counter[str] = Counter()

    def count(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__":
            calls["/".join(context.module.path)] += 1
        return call(*args, **kwargs)

    options = call_options(module, train=False)
    with nn.intercept_methods(count):
        example = jax.ShapeDtypeStruct((1, *input), dtype)
        mutable = [collection for collection in variables if collection != "params"]
        jax.eval_shape(
            lambda v, x: module.apply(v, x, rngs=jax.random.key(0), mutable=mutable, **options), variables, example
        )
    return calls


def _belongs(key: str, norms: Mapping[str, str]) -> bool:
    return key.partition("/")[2].rpartition("/")[0] in norms


def _folded(flat: Mapping[str, Any], norm: str, layer: str, epsilon: float) -> dict[str, Array]:
    """The layer's new kernel and bias."""

    def wide(path: str, otherwise: float = 0.0) -> np.ndarray:
        return np.asarray(flat.get(path, otherwise), np.float64)

    gain = wide(f"params/{norm}/scale", 1.0) / np.sqrt(wide(f"batch_stats/{norm}/var") + epsilon)
    shift = wide(f"params/{layer}/bias") - wide(f"batch_stats/{norm}/mean")
    kernel = flat[f"params/{layer}/kernel"]
    gains = gain.reshape((1,) * (kernel.ndim - 1) + (-1,))
    made = {"kernel": wide(f"params/{layer}/kernel") * gains, "bias": shift * gain + wide(f"params/{norm}/bias")}
    return {f"params/{layer}/{name}": jnp.asarray(value.astype(kernel.dtype)) for name, value in made.items()}
