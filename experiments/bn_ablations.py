"""What BatchNorm is made of: scale and shift, place, the batch in the output, the scale of the weights, statistics.

    python experiments/bn_ablations.py --data-dir DIR

Claim     with BatchNorm the inputs of a deep sigmoid stay where they are over training, and without it they wander; an
          image's output depends on the batch it is in, less in larger ones; BN(aWx) = BN(Wx), and the gradient by aW
          is 1/a of that by W. Which of gamma and beta are learnt, and whether the norm comes before or after the ReLU,
          is a matter of accuracy, as are the statistics of the test
Source    Ioffe & Szegedy 2015, "Batch Normalization", sections 3.1 to 3.3 and 4.1, figure 1
Data      Fashion-MNIST, reduced to 14 x 14 pixels; MNIST for the sigmoids, as in the paper; standardised
Recipe    accuracies: four 3x3 convolutions (16, 32, 32, 32), SGD with momentum 0.9, rate 0.05 with a cosine schedule
          for all, batch 64. Statistics of the test: running averages, those of the test images taken layer by layer,
          or each test batch's own. Spread: standard deviation of a logit over the batches of random training images
          that the image is in, over its deviation between images; 8 test images, 16 batches. Sigmoids: three layers
          of 100, batch 60, SGD at rate 0.1; wandering: standard deviation over the second to tenth tenth of training
          of the median of a unit's input to the last sigmoid, over its distance from the 15th to the 85th percentile,
          median over units
Cost      5 minutes
Expected  less wandering with BatchNorm; spread falling as 1/sqrt(batch); outputs equal and gradients times a equal
          within rounding and epsilon
Measured  test accuracy (%): γ and β learnt 86.8 +- 0.2, β learnt, γ = 1 86.5 +- 0.2, γ learnt, β = 0 86.7 +- 0.2, γ =
          1, β = 0 86.3 +- 0.2, after the ReLU 87.1 +- 0.4, no norm 83.7 +- 0.9, test: of the test set 86.9 +- 0.3,
          test: of a batch of 256 86.8 +- 0.3, test: of a batch of 64 86.5 +- 0.3, test: of a batch of 16 85.2 +- 0.4,
          test: of a batch of 4 77.9 +- 1.0; an image's output varies by 58.0 % in batches of 4 and 6.8 % of 256 (power
          -0.51); weights times 0.1 to 100 change outputs by at most 5.9e-04 and the gradient times a is 0.9991 to
          1.0017 of the old one; wandering of sigmoid inputs 0.05 +- 0.00 without and 0.04 +- 0.00 with BatchNorm (n = 5
          seeds, 95 % intervals)
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcnn.analysis.batchnorm import recalibrate
from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.data import order
from jaxcnn.figures import Bench, run_figure
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.norm import BatchNorm
from jaxcnn.layers.pool import global_avg_pool, max_pool
from jaxcnn.losses import cross_entropy
from jaxcnn.plots import BLACK, BLUE, COLOURS, ORANGE, band, bands
from jaxcnn.spread import spread
from jaxcnn.train import rng
from jaxcnn.types import Array, PyTree

WIDTHS = (16, 32, 32, 32)
IMAGES, DRAWS = 8, 16
FACTORS = (0.1, 10.0, 100.0)
PERCENTILES = (15, 50, 85)
MOMENTS = 100
"""Of training, at which the sigmoids' inputs are looked at."""


class Net(nn.Module):
    """(b, 14, 14, 1) -> logits (b, num_classes); `place` of the norm: "before" or "after" the ReLU, or "none"."""

    scale: bool = True
    bias: bool = True
    place: str = "before"
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for i, width in enumerate(WIDTHS, 1):
            x = Conv(width, 3, padding=1, use_bias=self.place != "before", name=f"conv{i}")(x)
            norm = BatchNorm(use_scale=self.scale, use_bias=self.bias, name=f"bn{i}")
            if self.place == "before":
                x = norm(x, train=train)
            x = nn.relu(x)
            if self.place == "after":
                x = norm(x, train=train)
            if i in (1, 3):
                x = max_pool(x, window=2)
        return nn.Dense(self.num_classes, name="fc")(global_avg_pool(x))


BASE = "γ and β learnt"
VARIANTS = {
    BASE: Net(),
    "β learnt, γ = 1": Net(scale=False),
    "γ learnt, β = 0": Net(bias=False),
    "γ = 1, β = 0": Net(scale=False, bias=False),
    "after the ReLU": Net(place="after"),
    "no norm": Net(place="none"),
}


@dataclass(frozen=True)
class Settings:
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Nets whose accuracy is measured; the one with γ and β learnt serves all else and must be there."""
    steps: int = 800
    """Of the convolutional nets."""
    batches: tuple[int, ...] = (4, 16, 64, 256)
    """Sizes of the batches whose own statistics serve in the test."""
    sigmoid_steps: int = 6000
    seeds: int = 5


class Sigmoids(nn.Module):
    """(b, h, w, c) -> logits (b, 10) and the inputs of the last sigmoid (b, 100)."""

    norm: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
        x = last = x.reshape(x.shape[0], -1)
        for _ in range(3):
            last = nn.Dense(100, use_bias=not self.norm)(x)
            last = BatchNorm()(last, train=train) if self.norm else last
            x = nn.sigmoid(last)
        return nn.Dense(10)(x), last


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    experiment = Experiment(
        name="ablations",
        model=Model("vanilla_cnn"),
        data=Data("fashion_mnist", batch_size=64, image_size=(14, 14)),
        optim=Optim("sgd", learning_rate=0.05, schedule="cosine", options={"momentum": 0.9}),
        train=Train(steps=settings.steps, log_every=settings.steps),
    )
    seeds = range(settings.seeds)
    runs = {name: bench.train(experiment, seeds=seeds, module=VARIANTS[name], quiet=True) for name in settings.variants}
    data = bench.prepared(experiment)
    images, test, labels = data.train.images, data.test.images, data.test.labels
    spreads, statistics, invariance = [], [], []
    for seed, variables in enumerate(runs[BASE].each()):
        spreads.append([_spread(variables, test[:IMAGES], images, size, seed) for size in settings.batches])
        statistics.append(_test_accuracies(variables, test, labels, settings.batches))
        invariance.append([_scaled(variables, test[:256], labels[:256], factor) for factor in FACTORS])
    wander, unit = {}, {}
    for name, norm in (("without", False), ("with BatchNorm", True)):
        inputs = [_inputs(settings, bench, norm=norm, seed=seed) for seed in seeds]
        wander[name] = [_wander(one) for one in inputs]
        unit[name] = inputs[0][:, :, 0]
    return {
        "seeds": list(seeds),
        "variants": {name: 100 * run.test["accuracy"] for name, run in runs.items()},
        "statistics": {key: [100 * one[key] for one in statistics] for key in statistics[0]},
        "batches": settings.batches,
        "spread": np.transpose(spreads),  # (batches, seeds)
        "output": np.array(invariance)[..., 0],  # (seeds, factors)
        "gradient": np.array(invariance)[..., 1],
        "unit": unit,  # (moments, percentiles) of seed 0
        "unit_steps": _moments(settings),
        "wander": wander,
    }


@jax.jit
def _by_batch(variables: PyTree, x: Array) -> Array:
    """Logits (b, k) by the statistics of the batch."""
    logits, _ = VARIANTS[BASE].apply(variables, x, train=True, mutable=["batch_stats"])
    return logits


@jax.jit
def _by_running(variables: PyTree, x: Array) -> Any:
    return VARIANTS[BASE].apply(variables, x, train=False)


def _spread(variables: PyTree, chosen: np.ndarray, others: np.ndarray, size: int, seed: int) -> float:
    draw = np.random.default_rng(seed)
    logits = np.empty((len(chosen), DRAWS, 10))
    for i, image in enumerate(chosen):
        for j in range(DRAWS):
            batch = others[draw.integers(len(others), size=size)]
            batch[0] = image
            logits[i, j] = _by_batch(variables, batch)[0]
    return float(np.sqrt(logits.var(1).mean() / logits.mean(1).var(0).mean()))


def _test_accuracies(
    variables: PyTree, test: np.ndarray, labels: np.ndarray, sizes: tuple[int, ...]
) -> dict[str, float]:
    """By the kind of statistics; of the batches' own with all full batches, in the order of the test split."""
    again = recalibrate(VARIANTS[BASE], variables, test, mode="exact").variables
    found = {"test: of the test set": float((np.argmax(_by_running(again, test), -1) == labels).mean())}
    for size in reversed(sizes):
        right = [
            np.argmax(_by_batch(variables, test[i : i + size]), -1) == labels[i : i + size]
            for i in range(0, len(test) - size + 1, size)
        ]
        found[f"test: of a batch of {size}"] = float(np.mean(right))
    return found


def _scaled(variables: PyTree, images: np.ndarray, labels: np.ndarray, factor: float) -> tuple[float, float]:
    """All convolutions times a: the largest change of a logit over the largest logit, and a |gradient| over before."""

    def loss(params: PyTree) -> tuple[Array, Array]:
        logits = _by_batch({**variables, "params": params}, images)
        return cross_entropy(logits, labels).mean(), logits

    def kernels(tree: PyTree) -> np.ndarray:
        return np.concatenate([np.ravel(leaf["kernel"]) for name, leaf in tree.items() if name.startswith("conv")])

    params = variables["params"]
    more = {name: jax.tree.map(lambda x: factor * x, leaf) if "conv" in name else leaf for name, leaf in params.items()}
    (_, before), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    (_, after), scaled = jax.value_and_grad(loss, has_aux=True)(more)
    change = float(np.abs(np.subtract(before, after)).max() / np.abs(before).max())
    return change, float(factor * np.linalg.norm(kernels(scaled)) / np.linalg.norm(kernels(gradient)))


def _moments(settings: Settings) -> np.ndarray:
    """Steps at which the sigmoids' inputs are taken."""
    every = max(1, settings.sigmoid_steps // MOMENTS)
    return np.arange(every, settings.sigmoid_steps + 1, every)


def _inputs(settings: Settings, bench: Bench, *, norm: bool, seed: int) -> np.ndarray:
    """Percentiles of the inputs of the last sigmoid over 1,000 test images, (moments, percentiles, units)."""
    experiment = Experiment(model=Model("mlp"), data=Data("mnist"), train=Train(steps=settings.sigmoid_steps))
    data = bench.prepared(experiment)
    images, labels, test = map(jnp.asarray, (data.train.images, data.train.labels, data.test.images[:1000]))
    net, optimizer = Sigmoids(norm), optax.sgd(0.1)
    at = _moments(settings)
    rows = [order.indices(i, examples=len(images), batch_size=60, seed=seed) for i in range(at[-1])]

    def step(state: Any, chosen: Array) -> tuple[Any, None]:
        variables, moved = state

        def loss(params: PyTree) -> tuple[Array, PyTree]:
            (logits, _), rest = net.apply(
                {**variables, "params": params}, images[chosen], train=True, mutable=["batch_stats"]
            )
            return cross_entropy(logits, labels[chosen]).mean(), rest

        gradient, rest = jax.grad(loss, has_aux=True)(variables["params"])
        updates, moved = optimizer.update(gradient, moved)
        return ({**variables, **rest, "params": optax.apply_updates(variables["params"], updates)}, moved), None

    def interval(state: Any, chosen: Array) -> tuple[Any, Array]:
        state, _ = jax.lax.scan(step, state, chosen)
        outputs: Any = net.apply(state[0], test, train=False)
        return state, jnp.percentile(outputs[1], jnp.array(PERCENTILES), axis=0)

    start = net.init(rng.stream(seed, "init"), images[:1], train=False)
    chosen = jnp.asarray(np.reshape(rows, (len(at), -1, 60)))
    run = jax.jit(lambda state: jax.lax.scan(interval, state, chosen)[1])
    return np.asarray(run((start, optimizer.init(start["params"]))))


def _wander(inputs: np.ndarray) -> float:
    """Of (moments, percentiles, units)."""
    late = inputs[len(inputs) // 10 :]
    return float(np.median(late[:, 1].std(0) / (late[:, 2] - late[:, 0]).mean(0)))


def say(result: dict[str, Any]) -> str:
    def text(values: Any, digits: int = 1) -> str:
        return f"{spread(values):.{digits}f}"

    accuracies = {**result["variants"], **result["statistics"]}
    spreads, batches = [np.mean(values) for values in result["spread"]], result["batches"]
    slope = np.polyfit(np.log(batches), np.log(spreads), 1)[0]
    gradient = np.array(result["gradient"])
    return (
        "test accuracy (%): "
        + ", ".join(f"{name} {text(values)}" for name, values in accuracies.items())
        + f"; an image's output varies by {100 * spreads[0]:.1f} % in batches of {batches[0]} and"
        f" {100 * spreads[-1]:.1f} % of {batches[-1]} (power {slope:.2f}); weights times {FACTORS[0]:g} to"
        f" {FACTORS[-1]:g} change outputs by at most {np.max(result['output']):.1e} and the gradient times a is"
        f" {gradient.min():.4f} to {gradient.max():.4f} of the old one; wandering of sigmoid inputs"
        f" {text(result['wander']['without'], 2)} without and {text(result['wander']['with BatchNorm'], 2)} with"
        f" BatchNorm (n = {len(result['seeds'])} seeds, 95 % intervals)"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1.2, 1))
    groups = {**result["variants"], **result["statistics"]}
    for i, (name, values) in enumerate(groups.items()):
        left.plot(values, np.full(len(values), i), "o", color=BLUE if name in VARIANTS else ORANGE, markersize=4)
        left.plot([np.mean(values)] * 2, [i - 0.3, i + 0.3], color=BLACK, linewidth=1)
    left.set_yticks(range(len(groups)), list(groups), fontsize=8)
    left.set(xlabel="test accuracy (%)")
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    left.set_title("variants; statistics in the test", fontsize=10)
    for (name, values), colour, line in zip(result["unit"].items(), COLOURS, ("-", "--"), strict=False):
        low, mid, high = np.transpose(np.array(values, float))
        middle.plot(result["unit_steps"], mid, color=colour, linestyle=line, label=name)
        middle.fill_between(result["unit_steps"], low, high, color=colour, alpha=0.2, linewidth=0)
    middle.set(xlabel="step", ylabel="input of a unit of the last sigmoid")
    middle.set_title("15th, 50th, 85th percentile", fontsize=10)
    middle.grid(alpha=0.3)
    middle.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    batches, spreads = np.array(result["batches"]), np.array(result["spread"])
    bands(right, {"measured": band(batches, 100 * spreads)}, marker="o", markersize=4)
    line = 100 * spreads[-1].mean() * np.sqrt(batches[-1] / batches)
    right.plot(batches, line, color=BLACK, linestyle=":", label="1/√batch")
    right.set(xscale="log", yscale="log", xlabel="images in the batch", ylabel="spread (% of that over images)")
    right.set_xticks(batches, [f"{size}" for size in batches])
    marks = [mark for mark in (1, 2, 5, 10, 20, 50, 100) if 100 * spreads.min() < mark < 100 * spreads.max()]
    right.set_yticks(marks, [f"{mark}" for mark in marks])
    right.minorticks_off()
    right.legend(fontsize=8)
    right.set_title("an image's output", fontsize=10)
    figure.suptitle(f"Batch normalisation taken apart: {len(result['seeds'])} seeds", fontsize=11)


if __name__ == "__main__":
    small = {"variants": (BASE, "no norm"), "steps": 6, "batches": (4, 16), "sigmoid_steps": 40, "seeds": 1}
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke=small)
