"""Convolutions move with the image, but do not turn or grow with it; pooling makes some of it stand still.

    python experiments/equivariance.py

Claim     convolution is equivariant to translation, T(f(x)) = f(T(x)), up to rounding, and neither to rotation (unless
          its kernels are symmetric) nor to scaling; a dense layer is to none; pooling adds invariance to shifts that
          are small beside its window, global pooling to all shifts, but to no rotation
Source    Goodfellow, Bengio & Courville 2016, Deep Learning, sections 9.2 and 9.3
Data      patches of 32x32 pixels of a grey photograph that comes with scikit-learn, continued periodically
Recipe    three 3x3 convolutions with ReLU, 8 channels, Kaiming weights, untrained; symmetric: each 3x3 kernel is the
          mean of its four rotations; dense: 1,024 to 1,024 units; error: ||T(f(x)) - f(T(x))|| / ||f(T(x))||
Cost      seconds
Expected  1e-6 or less for convolutions under translation, and for symmetric ones under rotation; above 0.1 elsewhere
Measured  n = 5 seeds, mean error and range; translation: convolutions 0 (0 to 0), dense 1.2 (1.2 to 1.2); rotation:
          convolutions 0.73 (0.53 to 0.92), symmetric ones 1.4e-07 (1.3e-07 to 1.5e-07); scaling: convolutions 0.52
          (0.35 to 0.79); change of the output by a shift of 1 pixel: 0.59 (no pooling), 0.35 (max pooling 2x2), 0.21
          (max pooling 4x4), 0.16 (max pooling 8x8), 6.5e-08 (global average); of the global average by a rotation:
          0.075
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.analysis.equivariance import Function, equivariance, invariance, rotation, scaling, translation, wrapped
from jaxcnn.figures import Bench, run_figure
from jaxcnn.layers.conv import conv
from jaxcnn.layers.init import initializer
from jaxcnn.layers.pool import max_pool
from jaxcnn.plots import COLOURS, band, bands
from jaxcnn.style.pictures import luminance, photograph, to_array
from jaxcnn.types import Array


@dataclass(frozen=True)
class Settings:
    patches: int = 16
    seeds: int = 5


SIDE = 32
SHIFTS = tuple(range(9))
POOLS = {"no pooling": 1, "max pooling 2x2": 2, "max pooling 4x4": 4, "max pooling 8x8": 8}


def patches(n: int, seed: int) -> Array:
    """(n, SIDE, SIDE, 1) of the photograph, each of mean 0."""
    picture = np.asarray(luminance(to_array(photograph("china.jpg"))))[0, ..., :1]
    rng = np.random.default_rng(seed)
    corners = zip(*(rng.integers(0, size - SIDE, n) for size in picture.shape[:2]), strict=True)
    found = np.stack([picture[row : row + SIDE, column : column + SIDE] for row, column in corners])
    return jnp.asarray(found - found.mean((1, 2), keepdims=True))


def convolutions(key: Array, *, symmetric: bool) -> Function:
    """(b, h, w, 1) -> (b, h, w, 8), without a border."""
    draw = initializer("kaiming_normal")
    kernels = [draw(jax.random.fold_in(key, i), (3, 3, inputs, 8)) for i, inputs in enumerate((1, 8, 8))]
    if symmetric:
        kernels = [jnp.stack([jnp.rot90(kernel, turn) for turn in range(4)]).mean(0) for kernel in kernels]

    def net(x: Array) -> Array:
        for kernel in kernels:
            x = jax.nn.relu(conv(x, kernel))
        return x

    return wrapped(net, margin=len(kernels))


def dense(key: Array) -> Function:
    """(b, SIDE, SIDE, 1) -> the same shape."""
    weights = initializer("kaiming_normal")(key, (SIDE**2, SIDE**2))
    return lambda x: jax.nn.relu(x.reshape(len(x), -1) @ weights).reshape(x.shape)


def pooled(function: Function, size: int) -> Function:
    return lambda x: max_pool(function(x), window=size) if size > 1 else function(x)


def averaged(function: Function) -> Function:
    return lambda x: function(x).mean((1, 2))


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    seeds = range(settings.seeds)
    makers: dict[str, Callable[[Array], Function]] = {
        "convolutions": partial(convolutions, symmetric=False),
        "symmetric convolutions": partial(convolutions, symmetric=True),
        "dense": dense,
    }
    transformations = {"translation": translation(5, 3), "rotation": rotation(), "scaling": scaling()}
    errors: dict[str, Any] = {name: {kind: [] for kind in transformations} for name in makers}
    shifted: dict[str, Any] = {name: [] for name in (*POOLS, "global average")}
    turned = []
    for seed in seeds:
        x, key = patches(settings.patches, seed), jax.random.key(seed)
        for name, maker in makers.items():
            for kind, transformation in transformations.items():
                if (name, kind) != ("dense", "scaling"):  # it takes images of one size
                    errors[name][kind].append(equivariance(maker(key), x, transformation))
        net = convolutions(key, symmetric=False)
        functions = {name: pooled(net, size) for name, size in POOLS.items()} | {"global average": averaged(net)}
        for name, function in functions.items():
            shifted[name].append([invariance(function, x, translation(0, shift)) for shift in SHIFTS])
        turned.append(invariance(functions["global average"], x, rotation()))
    return {
        "seeds": list(seeds),
        "errors": errors,
        "shifted": {name: band(SHIFTS, np.transpose(values)) for name, values in shifted.items()},
        "global_average_turned": turned,
    }


def say(result: dict[str, Any]) -> str:
    errors, shifted = result["errors"], {name: curve["mean"] for name, curve in result["shifted"].items()}

    def of(name: str, kind: str) -> str:
        values = errors[name][kind]
        return f"{np.mean(values):.2g} ({min(values):.2g} to {max(values):.2g})"

    pools = ", ".join(f"{np.mean(curve[1]):.2g} ({name})" for name, curve in shifted.items())
    return (
        f"n = {len(result['seeds'])} seeds, mean error and range; translation: convolutions"
        f" {of('convolutions', 'translation')}, dense {of('dense', 'translation')}; rotation: convolutions"
        f" {of('convolutions', 'rotation')}, symmetric ones {of('symmetric convolutions', 'rotation')}; scaling:"
        f" convolutions {of('convolutions', 'scaling')}; change of the output by a shift of 1 pixel: {pools}; of the"
        f" global average by a rotation: {np.mean(result['global_average_turned']):.2g}"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    kinds = list(result["errors"]["convolutions"])
    for i, (name, errors) in enumerate(result["errors"].items()):
        for at, kind in enumerate(kinds):
            values = np.maximum(np.array(errors[kind], float), 1e-8)
            places = at + 0.25 * (i - 1) + np.linspace(-0.07, 0.07, max(1, len(values)))[: len(values)]
            label = name if at == 0 else None
            left.plot(places, values, "os^"[i], color=COLOURS[i], markersize=5, label=label)
    left.text(2.2, 1e-4, "dense:\none size\nonly", fontsize=8, ha="center", color=COLOURS[2])
    left.set(yscale="log", ylim=(4e-9, 10), xlim=(-0.5, 2.5), xlabel="T", ylabel="relative error of equivariance")
    left.set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1], ["0", "1e-6", "1e-4", "0.01", "1"])
    left.set_xticks(range(len(kinds)), kinds)
    left.grid(axis="y", alpha=0.3)
    left.set_title(f"Equivariance, {len(result['seeds'])} seeds", fontsize=11)
    bands(right, result["shifted"], marker="o", markersize=3)
    right.set(xlabel="shift (pixels)", ylabel="relative change of the output", ylim=(-0.03, None))
    right.set_title("Invariance: what pooling adds", fontsize=11)
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=3, columnspacing=1)
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1)


if __name__ == "__main__":
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke={"patches": 2, "seeds": 2})
