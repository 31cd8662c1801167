"""The same vertical edges by a dense layer and by a convolution.

    python experiments/dense_vs_conv.py

Claim     a dense layer that computes the vertical edges of an image of 224x224 needs over 2.5e9 weights and 5e9 FLOP, a
          convolution 2 weights and 149,856 operations
Source    Goodfellow, Bengio & Courville 2016, Deep Learning, section 9.2
Recipe    counts are exact; for images small enough both are computed and compared, on batches of N(0, 1), and timed:
          compiled, the median over runs of one batch; the dense layer's weights are the convolution's matrix
Cost      seconds
Expected  dense: H W H (W - 1) weights, twice as many FLOP; convolution: 3 H (W - 1) operations, counted as two products
          and a sum; both give the same edges
Measured  224x224: dense 2,506,391,552 weights and 5,012,783,104 FLOP, convolution 2 weights and 149,856 operations;
          edges on 5 sizes up to 64x64 differ by at most 0 (n = 5 batches of N(0, 1)); one batch of 16 at 64x64: 5.3 ms
          dense, 0.46 ms convolution, and at 8x8 0.014 and 0.028 ms; also 3,072 weights for a unit on CIFAR-10;
          3,145,728 weights for a unit on 1024x1024x3; 1,000,000,000 weights for 1,000 units on 1000x1000; 76 weights
          for a 5x5x3 filter, with bias
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from jaxcnn.analysis import arithmetic, filters
from jaxcnn.figures import Bench, run_figure
from jaxcnn.layers.conv import conv
from jaxcnn.plots import BLUE, ORANGE


@dataclass(frozen=True)
class Settings:
    computed: tuple[int, ...] = (8, 16, 32, 48, 64)
    """Sides of the images on which both are computed."""
    batch: int = 16
    runs: int = 50
    seeds: int = 5


COUNTED = (8, 16, 32, 64, 128, 224, 512, 1024)


def counts(side: int) -> dict[str, int]:
    dense = arithmetic.dense((side, side, 1), (side, side - 1, 1))
    window = arithmetic.convolution((side, side, 1), kernel_size=(1, 2))
    return {
        "dense_weights": dense.weights,
        "dense_flops": dense.flops,
        "convolution_weights": window.weights,
        "convolution_operations": window.operations,
    }


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    kernel, difference, timings = filters.vertical_edges()[..., None, None], {}, {}
    for side in settings.computed:
        sparse: Any = filters.matrix(kernel, size=(side, side))
        weights = jnp.asarray(sparse.toarray().T)
        batches = [
            jax.random.normal(jax.random.key(seed), (settings.batch, side, side, 1)) for seed in range(settings.seeds)
        ]
        by_conv = jax.jit(lambda x: conv(x, jnp.asarray(kernel)))
        by_dense = jax.jit(lambda x, weights: x.reshape(len(x), -1) @ weights)
        difference[side] = [float(abs(by_conv(x).reshape(len(x), -1) - by_dense(x, weights)).max()) for x in batches]
        timings[side] = {
            "dense": seconds(by_dense, batches[0], weights, runs=settings.runs),
            "convolution": seconds(by_conv, batches[0], runs=settings.runs),
        }
    others = {
        "a unit on CIFAR-10": arithmetic.dense((32, 32, 3), (1,)).weights,
        "a unit on 1024x1024x3": arithmetic.dense((1024, 1024, 3), (1,)).weights,
        "1,000 units on 1000x1000": arithmetic.dense((1000, 1000, 1), (1000,)).weights,
        "a 5x5x3 filter, with bias": arithmetic.convolution((32, 32, 3), kernel_size=5, use_bias=True).parameters,
    }
    return {
        "seeds": list(range(settings.seeds)),
        "batch": settings.batch,
        "counts": {side: counts(side) for side in COUNTED},
        "others": others,
        "difference": difference,
        "timings": timings,
    }


def seconds(function: Callable[..., Any], *args: Any, runs: int) -> float:
    jax.block_until_ready(function(*args))
    found = []
    for _ in range(runs):
        begun = time.perf_counter()
        jax.block_until_ready(function(*args))
        found.append(time.perf_counter() - begun)
    return median(found)


def say(result: dict[str, Any]) -> str:
    at, others = result["counts"]["224"], result["others"]
    (small, fast), *_, (side, timed) = result["timings"].items()
    off = max(max(values) for values in result["difference"].values())
    return (
        f"224x224: dense {at['dense_weights']:,} weights and {at['dense_flops']:,} FLOP, convolution"
        f" {at['convolution_weights']} weights and {at['convolution_operations']:,} operations; edges on"
        f" {len(result['difference'])} sizes up to {side}x{side} differ by at most {off:.1g} (n ="
        f" {len(result['seeds'])} batches of N(0, 1)); one batch of {result['batch']} at {side}x{side}:"
        f" {1e3 * timed['dense']:.2g} ms dense, {1e3 * timed['convolution']:.2g} ms convolution, and at"
        f" {small}x{small} {1e3 * fast['dense']:.2g} and {1e3 * fast['convolution']:.2g} ms; also"
        f" {'; '.join(f'{weights:,} weights for {name}' for name, weights in others.items())}"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    sides = [int(side) for side in result["counts"]]
    for key, colour, line, label in (
        ("dense_flops", ORANGE, "--", "dense: FLOP"),
        ("dense_weights", ORANGE, "-", "dense: weights"),
        ("convolution_operations", BLUE, "--", "convolution: operations"),
        ("convolution_weights", BLUE, "-", "convolution: weights"),
    ):
        values = [one[key] for one in result["counts"].values()]
        left.plot(sides, values, color=colour, linestyle=line, marker="o", markersize=4, label=label)
    left.axvline(224, color="0.5", linewidth=1)
    left.text(230, 20, "224", fontsize=9, color="0.3")
    left.set(xscale="log", yscale="log", xlabel="side of the image (pixels)", ylabel="weights, or operations an image")
    left.set_xticks([8, 32, 128, 512], ["8", "32", "128", "512"])
    left.minorticks_off()
    left.legend(fontsize=8)
    left.set_title("Vertical edges: exact counts", fontsize=11)
    timed = {int(side): one for side, one in result["timings"].items()}
    for name, colour, line in (("dense", ORANGE, "-"), ("convolution", BLUE, "--")):
        values = [1e3 * one[name] for one in timed.values()]
        right.plot(list(timed), values, color=colour, linestyle=line, marker="o", markersize=4, label=name)
    right.set(xscale="log", yscale="log", xlabel="side of the image (pixels)", ylabel="time (ms)")
    right.set_xticks(list(timed), [str(side) for side in timed])
    right.minorticks_off()
    right.legend(fontsize=8)
    right.set_title(f"One batch of {result['batch']}, computed", fontsize=11)
    for axes in (left, right):
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke={"computed": (8, 16), "runs": 3, "seeds": 2})
