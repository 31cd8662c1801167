"""How many samples: shared weights need fewer, many dimensions need more, and a shifted image is cheaper to convolve.

    python experiments/sample_complexity.py --data-dir DIR

Claim     an m-tap filter on d inputs is estimated up to the error eps from O(m/eps^2) samples, a dense layer from no
          fewer than Omega(d/eps^2); a function known to be Lipschitz, and no more, takes O(1/eps^d); on shifted images
          a convolutional net needs fewer examples than an MLP of its size
Source    Du et al. 2018, "How Many Samples are Needed to Estimate a Convolutional Neural Network?" (linear activation,
          average pooling); Bronstein et al. 2021, "Geometric Deep Learning", section 2
Data      MNIST at 14 pixels, each image at a random place on 24x24 (shifted) or in the middle (centred); the other
          panels draw x
Recipe    left: x ~ N(0, I), y = b x + N(0, 1), b an 8-tap filter with stride 8, average-pooled, |b| = 1; least squares
          for the taps or for all 256 weights, from twice as many samples as weights on; error |b^ - b|, which is the
          root mean square over new x. Middle: f = sum |x_i - 1/2| / sqrt(d) on the unit torus, without noise, by the
          nearest of n points. Right: CNN of 3 stages and a hidden layer, MLP of 2 hidden layers; Adam, cosine, batch
          50; the rate of least training loss of three, on the most shifted images, with a seed of its own; 300 steps,
          1,500 for the MLP, which learns its training images later; every seed draws images, places and weights
Cost      4 minutes
Expected  left: slopes -1/2, samples in the ratio 256/8 = 32; middle: slopes -1/d; right: the CNN ahead at every size on
          shifted images, by more than on centred ones
Measured  error 0.1 after 798 samples by 8 taps and 26,390 by 256, 33 times as many (slopes -0.50 and -0.51, n = 10
          draws); nearest neighbour: slopes -0.99 for d = 1, -0.49 for d = 2, -0.23 for d = 4, -0.11 for d = 8 (n = 10);
          shifted images, test accuracy (n = 5 seeds; CNN 60,874 parameters, 92 % in training, MLP 61,030 parameters,
          100 % in training): 100 images CNN 37.5 %, MLP 17.8 % (gap 19.8 points, 95 % interval 13.9 to 25.6; 2.0 on
          centred images); 500 images CNN 73.6 %, MLP 34.4 % (gap 39.2 points, 95 % interval 36.2 to 42.3; 2.7 on
          centred images); 2,000 images CNN 85.8 %, MLP 61.8 % (gap 24.0 points, 95 % interval 20.3 to 27.8; 1.8 on
          centred images)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import numpy as np
import optax
from scipy.spatial import KDTree

from jaxcnn import build, models
from jaxcnn.config import Data, Experiment, Model
from jaxcnn.data.dataset import Split
from jaxcnn.figures import Bench, run_figure
from jaxcnn.plots import BLUE, COLOURS, LINES, ORANGE, band
from jaxcnn.seeds import SeedsResult, fit_seeds
from jaxcnn.spread import spread


@dataclass(frozen=True)
class Settings:
    inputs: int = 256
    taps: int = 8
    samples: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    reached: float = 0.1
    """The error for which samples are counted."""
    dimensions: tuple[int, ...] = (1, 2, 4, 8)
    points: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    queries: int = 1000
    draws: int = 10
    """Of the two panels without networks."""
    images: tuple[int, ...] = (100, 500, 2000)
    test: int = 2000
    cnn_steps: int = 300
    mlp_steps: int = 1500
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: int = 5


NETS: dict[str, nn.Module] = {
    "CNN": models.create("vanilla_cnn", num_classes=10, width=16, hidden=64),
    "MLP": models.create("mlp", num_classes=10, width=90),
}
PLACES = ("shifted", "centred")
SIDE, CANVAS = 14, 24
BATCH = 50


def estimation_error(seed: int, *, n: int, inputs: int, taps: int, shared: bool) -> float:
    """|b^ - b| after n samples, by least squares for the filter (`shared`) or for every weight of b (d,)."""
    rng = np.random.default_rng((seed, n))
    patches = inputs // taps
    taps_true = rng.standard_normal(taps)
    taps_true *= patches**0.5 / np.linalg.norm(taps_true)  # the average over the patches then has |b| = 1
    x = rng.standard_normal((n, patches, taps))
    y = x.mean(1) @ taps_true + rng.standard_normal(n)
    features = x.mean(1) if shared else x.reshape(n, inputs)
    found = np.linalg.solve(features.T @ features, features.T @ y)
    if shared:
        found = np.tile(found, patches) / patches
    return float(np.linalg.norm(found - np.tile(taps_true, patches) / patches))


def neighbour_error(seed: int, *, n: int, dimension: int, queries: int) -> float:
    """The root mean square over new x of f(nearest of n points) - f(x), f of slope 1 on the unit torus."""
    rng = np.random.default_rng((seed, n, dimension))
    known, asked = rng.random((n, dimension)), rng.random((queries, dimension))
    nearest = KDTree(known, boxsize=1.0).query(asked)[1]
    known_f, asked_f = (np.abs(x - 0.5).sum(1) / dimension**0.5 for x in (known[nearest], asked))
    return float(np.sqrt(np.mean((known_f - asked_f) ** 2)))


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    return {
        "seeds": list(range(max(settings.draws, settings.seeds))),
        "filter": _filters(settings),
        "neighbour": _neighbours(settings),
        "images": _images(settings, bench),
    }


def _filters(settings: Settings) -> dict[str, Any]:
    students = {}
    for name, weights in (("filter", settings.taps), ("dense", settings.inputs)):
        n = [n for n in settings.samples if n >= 2 * weights]
        errors = np.array(
            [
                [
                    estimation_error(seed, n=k, inputs=settings.inputs, taps=settings.taps, shared=name == "filter")
                    for seed in range(settings.draws)
                ]
                for k in n
            ]
        )
        middle = np.sqrt((errors**2).mean(1))
        predicted = np.sqrt(weights / (np.array(n) - weights - 1))  # the mean over designs, exactly
        students[name] = {
            "weights": weights,
            "errors": band(n, errors) | {"mean": middle},
            "predicted": predicted,
            "slope": slope(n[len(n) // 2 :], middle[len(n) // 2 :]),
            "samples": float(np.exp(np.interp(-np.log(settings.reached), -np.log(middle), np.log(n)))),
        }
    return {"draws": settings.draws, "reached": settings.reached, "students": students}


def slope(n: Sequence[int], errors: np.ndarray) -> float:
    """The power of n by which errors fall: the straight line of least squares in the logarithms."""
    return float(np.polyfit(np.log(n), np.log(errors), 1)[0])


def _neighbours(settings: Settings) -> dict[str, Any]:
    curves = {}
    for dimension in settings.dimensions:
        errors = [
            [
                neighbour_error(seed, n=n, dimension=dimension, queries=settings.queries)
                for seed in range(settings.draws)
            ]
            for n in settings.points
        ]
        curve = band(settings.points, errors)
        curves[dimension] = {"errors": curve, "slope": slope(settings.points, curve["mean"])}
    return {"draws": settings.draws, "curves": curves}


def _images(settings: Settings, bench: Bench) -> dict[str, Any]:
    data = Experiment(model=Model("mlp"), data=Data("mnist", image_size=(SIDE, SIDE)))
    splits = bench.splits(data)
    found: dict[str, Any] = {"sizes": settings.images, "n": settings.seeds, "ways": {}}
    for name, steps in (("CNN", settings.cnn_steps), ("MLP", settings.mlp_steps)):
        task = Task(NETS[name], splits, steps=steps, test=settings.test)
        rate, losses = bench.best_rate(
            lambda rate, seeds, task=task: task.fit(
                size=max(settings.images), place="shifted", rate=rate, seed=seeds[0]
            ),
            settings.rates,
            seed=settings.seeds,
        )
        found["ways"][name] = {
            "parameters": build.check_model(NETS[name], np.zeros((1, CANVAS, CANVAS, 1))),
            "steps": steps,
            "rate": rate,
            "losses": losses,
            **{place: _accuracies(task, settings, place=place, rate=rate) for place in PLACES},
        }
    return found


@dataclass(frozen=True)
class Task:
    net: nn.Module
    splits: build.Splits
    steps: int
    test: int

    def fit(self, *, size: int, place: str, rate: float, seed: int) -> SeedsResult:
        """Trained on `size` images; the seed draws them, their places, the test images and the weights."""
        rng = np.random.default_rng(seed)
        train = self.splits.train.take(rng.permutation(len(self.splits.train))[:size])
        test = self.splits.test.take(rng.permutation(len(self.splits.test))[: self.test])
        return fit_seeds(
            self.net,
            placed(train, rng, place=place),
            test=placed(test, rng, place=place),
            optimizer=optax.adam(optax.cosine_decay_schedule(rate, self.steps)),
            steps=self.steps,
            seeds=[seed],
            batch_size=BATCH,
            log_every=max(1, self.steps // 10),
            quiet=True,
        )


def _accuracies(task: Task, settings: Settings, *, place: str, rate: float) -> dict[str, Any]:
    """In per cent, of every size and seed, (sizes, s): in the test, and on the last tenth of the training steps."""
    runs = [
        [task.fit(size=size, place=place, rate=rate, seed=seed) for seed in range(settings.seeds)]
        for size in settings.images
    ]
    return {
        "test": [[100 * run.test["accuracy"].item() for run in row] for row in runs],
        "train": [[100 * run.curve("accuracy")[1][-1, 0] for run in row] for row in runs],
    }


def placed(split: Split, rng: np.random.Generator, *, place: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, CANVAS, CANVAS, c) in 0..1, each at a random place ("shifted") or in the middle, and labels (n,)."""
    n, height, width, channels = split.images.shape
    canvas = np.zeros((n, CANVAS, CANVAS, channels), np.float32)
    at = rng.integers(0, CANVAS - SIDE + 1, (n, 2)) if place == "shifted" else np.full((n, 2), (CANVAS - SIDE) // 2)
    for image, target, (y, x) in zip(split.images, canvas, at, strict=True):
        target[y : y + height, x : x + width] = image / 255
    return canvas, split.labels


def gaps(result: dict[str, Any], place: str) -> np.ndarray:
    """CNN less MLP, in points, of every size and seed: (sizes, s)."""
    ways = result["images"]["ways"]
    return np.array(ways["CNN"][place]["test"]) - np.array(ways["MLP"][place]["test"])


def say(result: dict[str, Any]) -> str:
    students, images = result["filter"]["students"], result["images"]
    taps, dense = students["filter"], students["dense"]
    slopes = ", ".join(f"{one['slope']:.2f} for d = {d}" for d, one in result["neighbour"]["curves"].items())
    parts = []
    for i, size in enumerate(images["sizes"]):
        shown = ", ".join(f"{name} {np.mean(way['shifted']['test'][i]):.1f} %" for name, way in images["ways"].items())
        gap = {place: spread(gaps(result, place)[i].tolist()) for place in PLACES}
        low, high = gap["shifted"].interval
        parts.append(
            f"{size:,} images {shown} (gap {gap['shifted'].mean:.1f} points, 95 % interval {low:.1f} to {high:.1f};"
            f" {gap['centred'].mean:.1f} on centred images)"
        )
    ways = ", ".join(
        f"{name} {way['parameters']:,} parameters, {np.mean(way['shifted']['train'][-1]):.0f} % in training"
        for name, way in images["ways"].items()
    )
    return (
        f"error {result['filter']['reached']} after {taps['samples']:,.0f} samples by {taps['weights']} taps and"
        f" {dense['samples']:,.0f} by {dense['weights']}, {dense['samples'] / taps['samples']:.0f} times as many"
        f" (slopes {taps['slope']:.2f} and {dense['slope']:.2f}, n = {result['filter']['draws']} draws); nearest"
        f" neighbour: slopes {slopes} (n = {result['neighbour']['draws']}); shifted images, test accuracy (n ="
        f" {images['n']} seeds; {ways}): {'; '.join(parts)}"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    left, middle, right = figure.subplots(1, 3)
    _draw_filters(left, result["filter"])
    _draw_neighbours(middle, result["neighbour"])
    _draw_images(right, result["images"])
    for panel in (left, middle, right):
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
        panel.legend(
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.45, -0.2),
            ncols=2,
            columnspacing=1,
            handlelength=2,
            frameon=False,
        )
        panel.title.set_fontsize(10)


def _draw_filters(axes: Any, found: dict[str, Any]) -> None:
    for (name, one), colour, line, marker in zip(
        found["students"].items(), (BLUE, ORANGE), ("-", "--"), "os", strict=True
    ):
        curve = one["errors"]
        axes.fill_between(curve["x"], curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(curve["x"], one["predicted"], color=colour, linestyle=line, linewidth=1, label=f"{name}, predicted")
        label = f"{name}, {one['weights']} weights"
        axes.plot(curve["x"], curve["mean"], color=colour, linestyle="", marker=marker, markersize=4, label=label)
    axes.axhline(found["reached"], color="0.5", linewidth=1, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="samples", ylabel="error of the prediction (rms)")
    axes.set_title("An m-tap filter on d inputs")


def _draw_neighbours(axes: Any, found: dict[str, Any]) -> None:
    for i, (dimension, one) in enumerate(found["curves"].items()):
        curve = one["errors"]
        style: dict[str, Any] = {"color": COLOURS[i], "linestyle": LINES[i], "marker": "os^D"[i % 4], "markersize": 4}
        axes.plot(curve["x"], curve["mean"], label=f"d = {dimension}: {one['slope']:.2f}", **style)
        axes.fill_between(curve["x"], curve["low"], curve["high"], color=COLOURS[i], alpha=0.2, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="samples", ylabel="error of the nearest neighbour (rms)")
    axes.set_title("A Lipschitz function: slopes")


def _draw_images(axes: Any, found: dict[str, Any]) -> None:
    for (name, way), colour, marker in zip(found["ways"].items(), (BLUE, ORANGE), "os", strict=True):
        for place, line in zip(PLACES, ("-", ":"), strict=True):
            curve = band(found["sizes"], 100 - np.array(way[place]["test"]))
            style: dict[str, Any] = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4}
            axes.plot(curve["x"], curve["mean"], label=f"{name}, {place}", **style)
            axes.fill_between(curve["x"], curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
    axes.set(xscale="log", xlabel="training images", ylabel="test error (%)", ylim=(0, None))
    axes.set_xticks(found["sizes"], [f"{size:,}" for size in found["sizes"]])
    axes.minorticks_off()
    axes.set_title("MNIST, shifted and centred")


SMOKE = {
    "inputs": 32,
    "samples": (32, 64, 256, 1024, 8192),
    "points": (64, 256),
    "queries": 100,
    "draws": 2,
    "images": (50,),
    "test": 100,
    "cnn_steps": 10,
    "mlp_steps": 20,
    "rates": (1e-3,),
    "seeds": 2,
}

if __name__ == "__main__":
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke=SMOKE)
