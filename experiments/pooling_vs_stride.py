"""Max-pooling against strided convolution and other ways to halve a map, at equal size.

    python experiments/pooling_vs_stride.py --data-dir DIR

Claim     a convolution with stride replaces max-pooling without loss of accuracy and with fewer operations; all
          subsampling breaks shift invariance, and a blur before it brings much of it back
Source    Springenberg et al. 2015, "Striving for Simplicity" (CIFAR-10: 9.08 % error with strided convolutions, 9.74 %
          with max-pooling, at equal size); Zhang 2019, "Making Convolutional Networks Shift-Invariant Again"
Data      Fashion-MNIST at 16 pixels (--full: CIFAR-10), standardised, no augmentation
Recipe    three stages of two 3x3 convolutions with ReLU (16, 32 and 64 maps) and two halvings, the mean over the map,
          one dense layer; every way has the same parameters. The second convolution of a stage has stride 2, or stride
          1 and is followed by: the maximum or the mean of 2x2; the maximum of 2x2 at every place and a blur of
          (1, 2, 1)/4 a side with stride 2; that blur alone. Images are continued periodically, and shifts are
          periodic, so that borders play no part. SGD with momentum 0.9 and a cosine schedule, batch 64; each way has
          the one of three rates with the least training loss at the end, found with a seed of its own. Shifts: the
          share of 1,000 test images whose predicted class stays, down and to the right, and the relative change of the
          mean over the map by 1 pixel
Cost      5 minutes
Expected  no clear gap in accuracy between maximum and stride; all ways unchanged by shifts of 4 pixels, which the
          halvings divide; at 1 to 3 pixels stride changes most predictions, maximum fewer, means and blurs fewest
Measured  after 600 steps with 72,442 parameters: stride: accuracy 82.1 +- 1.3 %, unchanged by 1 pixel 69.7 % (66.2 to
          75.0), features move by 0.5, 1.51 million multiply-adds; maximum: accuracy 81.2 +- 2.4 %, unchanged by 1 pixel
          85.4 % (79.7 to 90.2), features move by 0.3, 2.40 million multiply-adds; mean: accuracy 78.5 +- 1.0 %,
          unchanged by 1 pixel 90.4 % (87.8 to 93.2), features move by 0.19, 2.40 million multiply-adds; maximum, blur:
          accuracy 76.6 +- 1.2 %, unchanged by 1 pixel 96.2 % (95.2 to 97.0), features move by 0.05, 2.41 million
          multiply-adds; blur: accuracy 76.4 +- 1.5 %, unchanged by 1 pixel 93.9 % (88.5 to 97.2), features move by 0.1,
          2.41 million multiply-adds; by 4 pixels at least 100.0 % are unchanged (n = 5 seeds, 95 % intervals and
          ranges)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn import analysis
from jaxcnn.analysis.equivariance import invariance, translation
from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.figures import Bench, run_figure
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import avg_pool, global_avg_pool, max_pool, weighted_avg_pool
from jaxcnn.plots import band, bands, dots
from jaxcnn.seeds import SeedsResult
from jaxcnn.spread import spread
from jaxcnn.types import Array

WAYS = ("stride", "maximum", "mean", "maximum, blur", "blur")
SHIFTS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Settings:
    ways: tuple[str, ...] = WAYS
    data: str = "fashion_mnist"
    image_size: tuple[int, int] | None = (16, 16)
    width: int = 16
    """Maps of the first stage; each later one has twice as many."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    steps: int = 600
    shifted: int = 1000
    """Test images that are shifted."""
    seeds: int = 5


def periodic(x: Array, low: int, high: int) -> Array:
    """(b, h, w, c) continued by so many pixels above and to the left, below and to the right."""
    return jnp.pad(x, ((0, 0), (low, high), (low, high), (0, 0)), mode="wrap")


def blur(x: Array) -> Array:
    """(b, h, w, c) -> (b, h/2, w/2, c): the mean of 3x3 with weights (1, 2, 1) a side."""
    return weighted_avg_pool(periodic(x, 1, 0), window=3, strides=2, sigma=(2 * np.log(2)) ** -0.5)


def halved(x: Array, way: str) -> Array:
    """(b, h, w, c) -> (b, h/2, w/2, c); with stride, which the convolution had, x itself."""
    if way == "stride":
        return x
    if way == "mean":
        return avg_pool(x, window=2)
    if way == "maximum":
        return max_pool(x, window=2)
    return blur(max_pool(periodic(x, 0, 1), window=2, strides=1) if way == "maximum, blur" else x)


class Net(nn.Module):
    """(b, h, w, c) -> logits (b, 10), for sides that 4 divides."""

    way: str
    width: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for stage in range(3):
            for i in (1, 2):
                last = i == 2 and stage < 2
                stride = 2 if last and self.way == "stride" else 1
                conv = Conv(self.width * 2**stage, 3, strides=stride, padding=0, name=f"conv{stage + 1}_{i}")
                x = nn.relu(conv(periodic(x, 1, 1)))
                x = halved(x, self.way) if last else x
        return nn.Dense(10, name="dense")(Lambda(global_avg_pool, name="mean")(x))


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    timings: dict[str, float] = {}
    return {
        "seeds": list(range(settings.seeds)),
        "steps": settings.steps,
        "ways": {way: _way(settings, bench, way, timings) for way in settings.ways},
        "timings": timings,
    }


def _way(settings: Settings, bench: Bench, way: str, timings: dict[str, float]) -> dict[str, Any]:
    train = partial(_train, settings, bench, way)
    rate, losses = bench.best_rate(train, settings.rates, seed=settings.seeds)
    found = train(rate, range(settings.seeds))
    timings[way] = found.seconds / (settings.steps * settings.seeds)
    images = jnp.asarray(bench.prepared(_experiment(settings, rate=rate)).test.images[: settings.shifted])
    net = Net(way, settings.width)
    counted = analysis.summary(net, input=images.shape[1:])
    run = jax.jit(partial(_run, net))
    seen = [partial(run, variables) for variables in found.each()]
    return {
        "parameters": counted.parameters,
        "macs": counted.macs,
        "flops": counted.flops,
        "rate": rate,
        "trial_loss": losses,
        "loss": found.curve("loss")[1][-1],
        "accuracy": 100 * found.test["accuracy"],
        "unchanged": band(SHIFTS, np.transpose([unchanged(one, images) for one in seen])),
        "feature_change": [feature_change(one, images) for one in seen],
    }


def _run(net: nn.Module, variables: Any, images: Array) -> tuple[Array, Array]:
    """Logits (b, k) and what they are made of, the means over the map (b, c)."""
    found: Any = net.apply(
        variables,
        images,
        train=False,
        capture_intermediates=lambda module, _: module.name == "mean",
        mutable=["intermediates"],
    )
    logits, inside = found
    return logits, inside["intermediates"]["mean"]["__call__"][0]


def unchanged(run: Callable[[Array], tuple[Array, Array]], images: Array) -> list[float]:
    """For each of `SHIFTS` the share of images (b, h, w, c), in per cent, whose class stays, over both directions."""
    plain = run(images)[0].argmax(-1)
    moved = [[run(jnp.roll(images, by, axis))[0].argmax(-1) for axis in (1, 2)] for by in SHIFTS]
    return [100 * float(np.mean([one == plain for one in pair])) for pair in moved]


def feature_change(run: Callable[[Array], tuple[Array, Array]], images: Array) -> float:
    """The relative change of the mean over the map by a shift of 1 pixel, the mean of both directions."""
    shifts = [translation(*by) for by in ((1, 0), (0, 1))]
    return float(np.mean([invariance(lambda x: run(x)[1], images, shift) for shift in shifts]))


def _experiment(settings: Settings, *, rate: float) -> Experiment:
    return Experiment(
        name="pooling",
        model=Model("vanilla_cnn"),
        data=Data(settings.data, batch_size=64, image_size=settings.image_size),
        optim=Optim("sgd", learning_rate=rate, schedule="cosine", options={"momentum": 0.9}),
        train=Train(steps=settings.steps, log_every=max(1, settings.steps // 10)),
    )


def _train(settings: Settings, bench: Bench, way: str, rate: float, seeds: Sequence[int]) -> SeedsResult:
    return bench.train(
        _experiment(settings, rate=rate), seeds=seeds, module=Net(way, settings.width), test=5000, quiet=True
    )


def say(result: dict[str, Any]) -> str:
    ways, parts = result["ways"], []
    for way, case in ways.items():
        accuracy, change = spread(case["accuracy"]), np.mean(np.array(case["feature_change"], float))
        stays = case["unchanged"]
        parts.append(
            f"{way}: accuracy {accuracy:.1f} %, unchanged by 1 pixel"
            f" {stays['mean'][0]:.1f} % ({stays['low'][0]:.1f} to {stays['high'][0]:.1f}), features move by"
            f" {change:.2g}, {case['macs'] / 1e6:.2f} million multiply-adds"
        )
    numbers = {case["parameters"] for case in ways.values()}
    fours = min(case["unchanged"]["low"][-1] for case in ways.values())
    return (
        f"after {result['steps']} steps with {' or '.join(f'{number:,}' for number in numbers)} parameters:"
        f" {'; '.join(parts)}; by {SHIFTS[-1]} pixels at least {fours:.1f} % are unchanged (n ="
        f" {len(result['seeds'])} seeds, 95 % intervals and ranges)"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    ways = result["ways"]
    names = [f"{way.replace(', ', ',' + chr(10))}\n{case['macs'] / 1e6:.1f} M" for way, case in ways.items()]
    dots(left, dict(zip(names, (case["accuracy"] for case in ways.values()), strict=True)))
    left.set(xlabel="multiply-adds an image", ylabel="test accuracy (%)")
    left.tick_params(axis="x", labelsize=8)
    parameters = next(iter(ways.values()))["parameters"]
    left.set_title(f"{parameters:,} parameters, {result['steps']} steps", fontsize=10)
    bands(right, {way: case["unchanged"] for way, case in ways.items()}, marker="o", markersize=4)
    right.set(xlabel="shift (pixels)", ylabel="predictions unchanged (%)", ylim=(None, 101))
    right.set_xticks(SHIFTS)
    right.set_title("test images shifted", fontsize=10)
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3)
    figure.suptitle(f"How to halve a map: each of {len(result['seeds'])} seeds, and the mean", fontsize=11)


FULL = {"data": "cifar10", "image_size": None, "width": 96, "steps": 8000}

if __name__ == "__main__":
    small = {"ways": ("stride", "maximum, blur"), "width": 4, "rates": (0.03,), "steps": 4, "shifted": 50, "seeds": 1}
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke=small, full=FULL)
