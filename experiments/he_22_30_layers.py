"""22 and 30 ReLU layers: the variance of the initial weights decides whether they train.

    python experiments/he_22_30_layers.py --data-dir DIR

Claim     22 ReLU layers converge sooner with Var w = 2/n than with 1/n (what the paper calls Xavier); of 30 layers, 2/n
          learns and 1/n stays at chance
Source    He et al. 2015, section 2.2 and figures 2 and 3
Data      MNIST, standardised (--full: CIFAR-10 scaled to 64 pixels; the paper: ImageNet)
Recipe    21 or 29 dense ReLU layers of 32 units and an output (--full: he22 and he30), no normalisation, biases 0; SGD
          with momentum 0.9, batch 128, 1,000 steps, the paper's weight decay of 5e-4; for each depth and variance the
          learning rate is the one of four that has the least training loss at the end, with a seed of its own; at
          chance: under 15 % accuracy in the last fortieth of the run, where always naming the commonest digit gives 11
          %. The budget counts: at widths of 64 and 128 some or all 30-layer nets with 1/n leave chance within 1,000
          steps, and the rest is a matter of time
Cost      1.5 minutes
Expected  at 22 layers 2/n reaches 50 % training error sooner; at 30 layers 2/n learns and 1/n is at chance, in 5 of 5
          seeds: it shrinks the signal by sqrt(2) a layer, to 2^-14.5 = 4e-5 of its size
Measured  n = 5 seeds, 1000 steps; 22 layers: 2/n at 50 % training error after 195 steps (175 to 225), at chance in 0 of
          5, test accuracy 91.1 %; 1/n at 50 % training error after 560 steps (425 to 700), at chance in 0 of 5, test
          accuracy 64.6 %. 30 layers: 2/n at 50 % training error after 305 steps (250 to 400), at chance in 0 of 5, test
          accuracy 88.5 %; 1/n never at 50 % training error (least loss of 4 rates 2.30), at chance in 5 of 5, test
          accuracy 11.3 %
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxcnn import models
from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.figures import Bench, run_figure
from jaxcnn.plots import band, bands
from jaxcnn.seeds import SeedsResult


@dataclass(frozen=True)
class Settings:
    family: str = "mlp"
    """mlp, or he: the paper's networks."""
    width: int = 32
    """Units of the mlp's layers."""
    data: str = "mnist"
    image_size: tuple[int, int] | None = None
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    steps: int = 1000
    seeds: int = 5


DEPTHS = (22, 30)
CASES = {"2/n": "kaiming_normal", "1/n": "lecun_normal"}
CHANCE = 0.15
LOGGED = 40


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    cases = {
        f"{depth} layers": {name: _case(settings, bench, depth, init) for name, init in CASES.items()}
        for depth in DEPTHS
    }
    return {"seeds": list(range(settings.seeds)), "steps": settings.steps, "rates": settings.rates, "cases": cases}


def _case(settings: Settings, bench: Bench, depth: int, init: str) -> dict[str, Any]:
    train = partial(_train, settings, bench, depth, init)
    rate, losses = bench.best_rate(train, settings.rates, seed=settings.seeds)
    found = train(rate, range(settings.seeds))
    steps, accuracy = found.curve("accuracy")
    return {
        "rate": rate,
        "trial_loss": losses,
        "error": band(steps, 100 * (1 - accuracy)),
        "train_accuracy": accuracy[-1],
        "test_accuracy": found.test["accuracy"],
        "half": [int(steps[np.argmax(one >= 0.5)]) if (one >= 0.5).any() else None for one in accuracy.T],
        "skipped": found.skipped,
    }


def _train(settings: Settings, bench: Bench, depth: int, init: str, rate: float, seeds: Any) -> SeedsResult:
    experiment = Experiment(
        name=f"depth{depth}",
        model=Model(f"he{depth}" if settings.family == "he" else "mlp"),
        data=Data(settings.data, batch_size=128, image_size=settings.image_size),
        optim=Optim("sgd", learning_rate=rate, weight_decay=5e-4, options={"momentum": 0.9}),
        train=Train(steps=settings.steps, log_every=max(1, settings.steps // LOGGED)),
    )
    shape = {} if settings.family == "he" else {"depth": depth - 1, "width": settings.width}
    net = models.create(experiment.model.name, num_classes=10, kernel_init=init, **shape)
    return bench.train(experiment, seeds=seeds, module=net)


def say(result: dict[str, Any]) -> str:
    parts = []
    for depth, cases in result["cases"].items():
        each = []
        for name, case in cases.items():
            stuck = sum(one is None or one < CHANCE for one in case["train_accuracy"])
            half = [step for step in case["half"] if step is not None]
            if half:
                reached = f"at 50 % training error after {np.mean(half):.0f} steps ({min(half)} to {max(half)})"
                reached += "" if len(half) == len(case["half"]) else f" in {len(half)} of them"
            else:
                least = min((loss for loss in case["trial_loss"] if loss is not None), default=float("nan"))
                reached = f"never at 50 % training error (least loss of {len(case['trial_loss'])} rates {least:.2f})"
            test = 100 * np.array(case["test_accuracy"], float)
            each.append(
                f"{name} {reached}, at chance in {stuck} of {len(result['seeds'])}, test accuracy {test.mean():.1f} %"
            )
        parts.append(f"{depth}: {'; '.join(each)}")
    return f"n = {len(result['seeds'])} seeds, {result['steps']} steps; {'. '.join(parts)}"


def draw(result: dict[str, Any], figure: Any) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (depth, cases) in zip(panels, result["cases"].items(), strict=True):
        bands(panel, {f"Var w = {name}, rate {case['rate']:g}": case["error"] for name, case in cases.items()})
        panel.set(title=depth, xlabel="step", ylim=(0, 100))
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    panels[0].set_ylabel("training error (%)")
    figure.suptitle(f"ReLU layers without normalisation: mean and range of {len(result['seeds'])} seeds", fontsize=11)


FULL = {"family": "he", "data": "cifar10", "image_size": (64, 64), "steps": 8000}

if __name__ == "__main__":
    run_figure(
        Settings(),
        measure=measure,
        say=say,
        draw=draw,
        smoke={"width": 16, "rates": (0.003,), "steps": 10, "seeds": 2},
        full=FULL,
    )
