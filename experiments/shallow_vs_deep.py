"""Shallow against deep on one data set: raw pixels, hand-made features, learnt features.

    python experiments/shallow_vs_deep.py --data-dir DIR

Claim     given enough images, features that are learnt in layers beat hand-made ones, and those beat raw pixels
Source    LeCun et al. 1998; Csurka et al. 2004; Perronnin et al. 2010; Krizhevsky et al. 2012
Data      Fashion-MNIST: nested sets of 300, 2,000 and 12,000 training images (--full: 1,000, 10,000 and 60,000); the
          same 4,000 (10,000) test images for all
Recipe    raw pixels: logistic regression, 3 nearest neighbours, an MLP without activations (one linear map); hand-made:
          DAISY descriptors at 3 scales as a bag of 200 visual words or as Fisher vectors, with a linear SVM; learnt:
          MLP of 2 hidden layers, LeNet-5, a vanilla CNN of 3 stages, a VGG of 7 layers with BatchNorm and without
          dropout, a plain and a residual net of 8 layers with BatchNorm; every net by the recipe of lenet5_fashion.py,
          Adam at 2e-3 with a cosine schedule, for 1,000 steps (10,000) of 64 standardised images, not mirrored, tuned
          for none of them; the shallow ones once, with the package's defaults (visual words, Gaussians and SVM draw,
          with seed 0)
Cost      10 minutes
Expected  Fisher vectors above raw pixels at every size, and above the networks on few images; with more images and
          longer training the convolutional nets come level with Fisher vectors and pass them
Measured  test accuracy in per cent, networks with 95 % intervals of n = 3 seeds, the others n = 1 (chance in 4,000 test
          images moves a difference by 1.6); 12,000 images: logistic regression 82.8, 3-NN 81.1, MLP, no activations
          83.0 +- 0.0, bag of words 83.0, Fisher vectors 86.6, MLP 86.4 +- 0.3, LeNet-5 86.4 +- 1.3, vanilla CNN 87.4 +-
          1.1, VGG 87.7 +- 0.6, plain 84.5 +- 1.6, residual 84.4 +- 0.8; best learnt less best hand-made +1.1 points,
          which does not show it; best hand-made less best raw pixels +3.6 points; best of 300 images: logistic
          regression 74.3; Fisher vectors 76.3; MLP 75.5 +- 0.8; best of 2,000 images: logistic regression 80.8; Fisher
          vectors 84.5; LeNet-5 82.9 +- 0.2
"""

import time
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import numpy as np

from jaxcnn import build, models
from jaxcnn.baselines import BASELINES
from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.figures import Bench, run_figure
from jaxcnn.plots import BLACK, BLUE, GREEN, LINES, ORANGE
from jaxcnn.spread import spread

SHALLOW = {"logistic regression": "linear", "3-NN": "knn", "bag of words": "bag_of_words", "Fisher vectors": "fisher"}
NETS: dict[str, nn.Module] = {
    "MLP, no activations": models.create("mlp", num_classes=10, act="identity"),
    "MLP": models.create("mlp", num_classes=10),
    "LeNet-5": models.create("lenet5", num_classes=10),
    "vanilla CNN": models.create("vanilla_cnn", num_classes=10, width=16, hidden=128),
    "VGG": models.create("vgg11_bn", num_classes=10, convs=(2, 2), width=8, hidden=128, dropout=0.0),
    "plain": models.create("cifar_plain20", num_classes=10, depth=8, width=8),
    "residual": models.create("cifar_resnet20", num_classes=10, depth=8, width=8),
}
KINDS = {
    "raw pixels": ("logistic regression", "3-NN", "MLP, no activations"),
    "hand-made": ("bag of words", "Fisher vectors"),
    "learnt": ("MLP", "LeNet-5", "vanilla CNN", "VGG", "plain", "residual"),
}
COLOUR = {"raw pixels": ORANGE, "hand-made": GREEN, "learnt": BLUE}
CURVES = ("logistic regression", "3-NN", "Fisher vectors", "MLP", "LeNet-5")
RATE = 2e-3
"""LeNet-5's, of lenet5_fashion.py."""


@dataclass(frozen=True)
class Settings:
    sizes: tuple[int, ...] = (300, 2000, 12_000)
    """Training images: `CURVES` see all of them, the others the last."""
    test: int = 4000
    steps: int = 1000
    ways: tuple[str, ...] = tuple(name for names in KINDS.values() for name in names)
    seeds: int = 3
    """Of the networks."""


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    accuracy: dict[str, dict[int, list[float]]] = {}
    timings = {}
    for name in settings.ways:
        sizes = settings.sizes if name in CURVES else settings.sizes[-1:]
        begun = time.monotonic()
        accuracy[name] = {size: _accuracies(settings, bench, name, size) for size in sizes}
        timings[name] = time.monotonic() - begun
    return {
        "seeds": list(range(settings.seeds)),
        "sizes": settings.sizes,
        "test": settings.test,
        "steps": settings.steps,
        "parameters": {
            name: build.check_model(NETS[name], np.zeros((1, 28, 28, 1))) for name in settings.ways if name in NETS
        },
        "accuracy": accuracy,
        "timings": timings,
    }


def _accuracies(settings: Settings, bench: Bench, name: str, size: int) -> list[float]:
    """In per cent, of every seed; of a shallow way one value."""
    experiment = Experiment(
        name="shallow_vs_deep",
        model=Model("mlp"),
        data=Data("fashion_mnist", batch_size=64),
        optim=Optim("adam", learning_rate=RATE, schedule="cosine"),
        train=Train(steps=settings.steps, log_every=max(1, settings.steps // 5)),
    )
    if name in NETS:
        seeds = range(settings.seeds)
        found = bench.train(experiment, seeds=seeds, module=NETS[name], train=size, test=settings.test)
        return (100 * found.test["accuracy"]).tolist()
    data = bench.splits(experiment, train=size, test=settings.test)
    fitted = BASELINES[SHALLOW[name]]().fit(data.train.images, data.train.labels, num_classes=10)
    return [100 * fitted.evaluate(data.test.images, data.test.labels)["accuracy"]]


def best(result: dict[str, Any], kind: str, size: int) -> tuple[str, list[float]]:
    """Of a kind the way of the highest mean accuracy, among those measured at this size."""
    found = {name: values[str(size)] for name, values in result["accuracy"].items() if str(size) in values}
    return max(((name, found[name]) for name in KINDS[kind] if name in found), key=lambda one: np.mean(one[1]))


def say(result: dict[str, Any]) -> str:
    largest, accuracy = str(result["sizes"][-1]), result["accuracy"]
    every = ", ".join(f"{name} {_shown(values[largest])}" for name, values in accuracy.items())
    curves = []
    for size in result["sizes"][:-1]:
        at = "; ".join(f"{name} {_shown(values)}" for name, values in (best(result, k, size) for k in KINDS))
        curves.append(f"best of {size:,} images: {at}")
    means = {kind: float(np.mean(best(result, kind, int(largest))[1])) for kind in KINDS}
    margin = _margin(result, largest)
    verdicts = [
        f"best {better} less best {worse} {means[better] - means[worse]:+.1f} points"
        + ("" if means[better] - means[worse] > margin else ", which does not show it")
        for better, worse in (("learnt", "hand-made"), ("hand-made", "raw pixels"))
    ]
    return (
        f"test accuracy in per cent, networks with 95 % intervals of n = {len(result['seeds'])} seeds, the others n = 1"
        f" (chance in {result['test']:,} test images moves a difference by {margin:.1f}); {int(largest):,} images:"
        f" {every}; {'; '.join(verdicts + curves)}"
    )


def _shown(values: list[float]) -> str:
    return f"{spread(values):.1f}"


def _margin(result: dict[str, Any], size: str) -> float:
    """In points: 95 % of the differences of two equal ways, each on test images of its own, are smaller."""
    p = float(np.median([np.mean(values[size]) for values in result["accuracy"].values()])) / 100
    return 100 * 1.96 * (2 * p * (1 - p) / result["test"]) ** 0.5


def draw(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    for i, name in enumerate(name for name in CURVES if name in result["accuracy"]):
        points = {int(size): np.array(values) for size, values in result["accuracy"][name].items()}
        middle = np.array([values.mean() for values in points.values()])
        off = [middle - [v.min() for v in points.values()], [v.max() for v in points.values()] - middle]
        style: dict[str, Any] = {"color": COLOUR[kind_of[name]], "linestyle": LINES[i], "marker": "os^Dv*"[i]}
        left.errorbar(list(points), middle, yerr=off, capsize=3, markersize=5, label=name, **style)
    left.set(xscale="log", xlabel="training images", ylabel="test accuracy (%)")
    left.set_xticks(result["sizes"], [f"{size:,}" for size in result["sizes"]])
    left.minorticks_off()
    left.legend(fontsize=8, loc="lower right")
    left.grid(alpha=0.3)
    size, names = str(result["sizes"][-1]), list(result["accuracy"])
    for i, name in enumerate(names):
        values = result["accuracy"][name][size]
        right.plot(values, [i] * len(values), "o", color=COLOUR[kind_of[name]], markersize=5)
        right.plot([np.mean(values)], [i], "|", color=BLACK, markersize=12)
    parameters = result["parameters"]
    labels = [f"{name} ({parameters[name] / 1000:.0f} k)" if name in parameters else name for name in names]
    right.set_yticks(range(len(names)), labels, fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="test accuracy (%)")
    right.grid(alpha=0.3)
    right.set_title(f"{int(size):,} images (thousands of weights)", fontsize=10)
    left.set_title("By the number of images", fontsize=10)
    for kind, colour in COLOUR.items():
        right.plot([], [], "o", color=colour, label=kind)
    figure.legend(*right.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Fashion-MNIST: mean and range of {len(result['seeds'])} seeds of networks", fontsize=11)


SMOKE = {
    "sizes": (128,),
    "test": 60,
    "steps": 4,
    "ways": ("logistic regression", "3-NN", "bag of words", "Fisher vectors", "MLP", "LeNet-5"),
    "seeds": 1,
}
FULL = {"sizes": (1000, 10_000, 60_000), "test": 10_000, "steps": 10_000, "seeds": 5}

if __name__ == "__main__":
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke=SMOKE, full=FULL)
