"""Eight activation functions in one network, and the ReLU units that high learning rates kill.

    python experiments/activations_compared.py --data-dir DIR

Claim     rectifiers train faster than sigmoid units, and their smooth and leaky kin about as fast; a learning rate
          that is too high leaves ReLU units that are 0 on every example and so learn no more, up to 40 % of a network;
          leaky ReLU and ELU, whose slope is 0 nowhere, have none
Source    Glorot, Bordes & Bengio 2011; Maas et al. 2013; Clevert et al. 2016; Lu et al. 2019, "Dying ReLU and
          Initialization"; Stanford's CS231n, notes on neural networks 1 (the 40 %)
Data      Fashion-MNIST, standardised
Recipe    four hidden layers of 128 units, biases 0 at first; maxout takes the larger of two of 148 sums, which comes to
          about as many weights; SGD with momentum 0.9 at a constant rate, batch 128. Initial weights: Xavier for
          sigmoid and tanh, He for ReLU, leaky ReLU (slope 0.01), ELU and GELU, 1/n for SELU and maxout. For each
          activation the rate is the one of five that has the least training loss at the end, with a seed of its own.
          Dead: the slope is 0 on each of 5,000 training images, at the end of a run at each rate
Cost      5 minutes
Expected  sigmoid last and the others close together; the dead share of ReLU rises with the rate, from hardly any at
          low rates to tens of per cent at rates that are too high; none in leaky ReLU and ELU at any rate
Measured  test accuracy after 400 steps (and training loss, best rate): tanh 84.4 +- 0.8 % (0.402, rate 0.03), maxout
          84.3 +- 0.6 % (0.404, rate 0.01), ELU 84.3 +- 1.0 % (0.398, rate 0.01), leaky ReLU 84.2 +- 0.8 % (0.415, rate
          0.03), SELU 84.1 +- 1.6 % (0.409, rate 0.01), GELU 84.1 +- 1.7 % (0.402, rate 0.03), ReLU 83.7 +- 1.7 %
          (0.412, rate 0.03), sigmoid 76.6 +- 5.2 % (0.637, rate 0.3); dead units of ReLU by rate: 0.01 0.3 % (0.0 to
          0.6) with accuracy 84 %; 0.03 0.2 % (0.0 to 0.4) with accuracy 84 %; 0.06 0.9 % (0.4 to 1.4) with accuracy 84
          %; 0.09 4.1 % (1.4 to 10.5) with accuracy 83 %; 0.12 6.3 % (2.9 to 11.5) with accuracy 82 %, 1 diverged; 0.15
          30.7 % (4.5 to 47.3) with accuracy 40 %, 2 diverged; before training 0.5 %; of leaky ReLU and ELU at most 0.0
          % (n = 5 seeds; 95 % intervals of accuracies, ranges of dead units)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxcnn import models
from jaxcnn.analysis.signal import probe
from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.figures import Bench, run_figure
from jaxcnn.plots import COLOURS, LINES, dots
from jaxcnn.seeds import SeedsResult
from jaxcnn.spread import spread
from jaxcnn.types import PyTree

ACTIVATIONS = {
    "sigmoid": ("sigmoid", "xavier_normal"),
    "tanh": ("tanh", "xavier_normal"),
    "ReLU": ("relu", "kaiming_normal"),
    "leaky ReLU": ("leaky_relu", "kaiming_normal"),
    "ELU": ("elu", "kaiming_normal"),
    "SELU": ("selu", "lecun_normal"),
    "GELU": ("gelu", "kaiming_normal"),
    "maxout": ("maxout", "lecun_normal"),
}


@dataclass(frozen=True)
class Settings:
    activations: tuple[str, ...] = tuple(ACTIVATIONS)
    watched: tuple[str, ...] = ("ReLU", "leaky ReLU", "ELU")
    """Those whose dead units are counted; the others are the controls of the first."""
    data: str = "fashion_mnist"
    depth: int = 4
    """Hidden layers."""
    width: int = 128
    maxout_width: int = 148
    """Sums of a maxout layer; half of them go on."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """From which each activation gets its own."""
    watched_rates: tuple[float, ...] = (0.01, 0.03, 0.06, 0.09, 0.12, 0.15)
    """At which dead units are counted."""
    steps: int = 400
    probed: int = 5000
    """Training images on which a unit has to be dead."""
    seeds: int = 5


def network(settings: Settings, name: str) -> nn.Module:
    act, init = ACTIVATIONS[name]
    width = settings.maxout_width if act == "maxout" else settings.width
    return models.create("mlp", num_classes=10, depth=settings.depth, width=width, act=act, kernel_init=init)


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    return {
        "seeds": list(range(settings.seeds)),
        "steps": settings.steps,
        "watched_rates": settings.watched_rates,
        "activations": {name: _best(settings, bench, name) for name in settings.activations},
        "dying": {name: _dying(settings, bench, name) for name in settings.watched},
    }


def _best(settings: Settings, bench: Bench, name: str) -> dict[str, Any]:
    train = partial(_train, settings, bench, name)
    rate, losses = bench.best_rate(train, settings.rates, seed=settings.seeds)
    found = train(rate, range(settings.seeds))
    return {
        "parameters": sum(leaf[0].size for leaf in jax.tree.leaves(found.variables["params"])),
        "rate": rate,
        "trial_loss": losses,
        "loss": found.curve("loss")[1][-1],
        "accuracy": 100 * found.test["accuracy"],
        "skipped": found.skipped,
    }


def _dying(settings: Settings, bench: Bench, name: str) -> dict[str, Any]:
    """In per cent, `dead` and `accuracy` by rate and seed, NaN for a seed that diverged; `start`: dead, by seed."""
    net, x = network(settings, name), bench.prepared(_experiment(settings, rate=1.0)).train.images[: settings.probed]
    shares, accuracies = [], []
    for rate in settings.watched_rates:
        found = _train(settings, bench, name, rate, range(settings.seeds))
        steady = found.skipped == 0
        shares.append([dead(net, end, x) if fine else np.nan for end, fine in zip(found.each(), steady, strict=True)])
        accuracies.append(np.where(steady, 100 * found.test["accuracy"], np.nan))
    starts = [net.init(jax.random.key(seed), x[:1], train=False) for seed in range(settings.seeds)]
    return {"start": [dead(net, start, x) for start in starts], "dead": shares, "accuracy": accuracies}


def dead(net: nn.Module, variables: PyTree, x: np.ndarray) -> float:
    """The share of hidden units, in per cent, whose slope is 0 for every example of x (b, h, w, c)."""
    shares = [layer.dead for layer in probe(net, x, variables=variables).layers if layer.dead is not None]
    return 100 * float(np.mean(shares))  # the hidden layers are equally wide


def _experiment(settings: Settings, *, rate: float) -> Experiment:
    return Experiment(
        name="activations",
        model=Model("mlp"),
        data=Data(settings.data, batch_size=128),
        optim=Optim("sgd", learning_rate=rate, options={"momentum": 0.9}),
        train=Train(steps=settings.steps, log_every=max(1, settings.steps // 10)),
    )


def _train(settings: Settings, bench: Bench, name: str, rate: float, seeds: Sequence[int]) -> SeedsResult:
    return bench.train(_experiment(settings, rate=rate), seeds=seeds, module=network(settings, name), quiet=True)


def say(result: dict[str, Any]) -> str:
    n, parts = len(result["seeds"]), []
    ranked = sorted(result["activations"].items(), key=lambda item: -np.mean(item[1]["accuracy"]))
    for name, case in ranked:
        accuracy, loss = spread(case["accuracy"]), np.mean(np.array(case["loss"], float))
        parts.append(f"{name} {accuracy:.1f} % ({loss:.3f}, rate {case['rate']:g})")
    counted, (first, *controls) = [], result["dying"]
    for rate, shares, right in zip(result["watched_rates"], *_rows(result, first, "dead", "accuracy"), strict=True):
        whole = np.isfinite(shares)
        if whole.any():
            text = f"{rate:g} {shares[whole].mean():.1f} % ({shares[whole].min():.1f} to {shares[whole].max():.1f})"
            text += f" with accuracy {right[whole].mean():.0f} %"
        else:
            text = f"{rate:g} none"
        counted.append(text + ("" if whole.all() else f", {n - whole.sum()} diverged"))
    others = max(np.nanmax([0.0, *_rows(result, name, "dead")[0].ravel()]) for name in controls)
    return (
        f"test accuracy after {result['steps']} steps (and training loss, best rate): {', '.join(parts)}; dead units"
        f" of {first} by rate: {'; '.join(counted)}; before training {np.mean(result['dying'][first]['start']):.1f} %;"
        f" of {' and '.join(controls)} at most {others:.1f} % (n = {n} seeds; 95 % intervals of accuracies,"
        f" ranges of dead units)"
    )


def _rows(result: dict[str, Any], name: str, *keys: str) -> list[np.ndarray]:
    return [np.array(result["dying"][name][key], float) for key in keys]


def draw(result: dict[str, Any], figure: Any) -> None:
    left, *others = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))
    dots(left, {name: np.array(case["loss"], float).tolist() for name, case in result["activations"].items()})
    left.set_xticks(left.get_xticks(), list(result["activations"]), rotation=50, ha="right", rotation_mode="anchor")
    left.set(ylabel="training loss (nats)")
    left.set_title(f"each at its best rate,\nafter {result['steps']} steps", fontsize=10)
    rates = result["watched_rates"]
    for axes, key, label in zip(others, ("dead", "accuracy"), ("dead units (%)", "test accuracy (%)"), strict=True):
        for i, name in enumerate(result["dying"]):
            values = _rows(result, name, key)[0]
            style: dict[str, Any] = {"color": COLOURS[i], "linestyle": LINES[i]}
            means = [row[np.isfinite(row)].mean() if np.isfinite(row).any() else np.nan for row in values]
            axes.plot(rates, means, label=name, **style)
            axes.plot(rates, values, "osD"[i], color=COLOURS[i], markersize=3)
        axes.set(xlabel="learning rate", ylabel=label, ylim=(-2, None))
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=90, fontsize=8)
        axes.grid(alpha=0.3)
    others[0].set_title("units that are 0\non every example", fontsize=10)
    others[1].set_title("without the seeds\nthat diverged", fontsize=10)
    others[0].legend(fontsize=8, loc="upper left")
    figure.suptitle(f"Activations in one network: each of {len(result['seeds'])} seeds, and the mean", fontsize=11)


if __name__ == "__main__":
    small = {
        "activations": ("ReLU", "maxout"),
        "watched": ("ReLU", "ELU"),
        "depth": 2,
        "width": 16,
        "maxout_width": 20,
        "rates": (0.03,),
        "watched_rates": (0.03,),
        "steps": 6,
        "seeds": 1,
    }
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke=small)
