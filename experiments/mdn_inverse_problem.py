"""One input, several answers: a mixture density network where a single Gaussian averages them.

    python experiments/mdn_inverse_problem.py

Claim     where an input has several right answers, the mean of a Gaussian lies between them and is none of them; a
          mixture density network names each with its probability, and its likelihood is far higher
Source    Bishop 1994, "Mixture Density Networks", section 5: y = x + 0.3 sin(2 pi x) + U(-0.1, 0.1), inverted
Data      1,000 training and 1,000 test pairs, drawn once; y in, x out
Recipe    20 tanh units, 3 components, Adam at 1e-2 with a cosine schedule, batches of 100, all seeds the same data
Cost      half a minute
Expected  a lower negative log-likelihood of the mixture in every seed; of the forward problem, which has one answer,
          nearly the same of both
Measured  negative log-likelihood of the inverse problem -0.21 +- 0.06 nats for one Gaussian, -0.99 +- 0.00 for the
          mixture (lower in 5 of 5 seeds); of the forward problem -1.40 and -1.40 (n = 5, 95 % intervals)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import optax

from jaxcnn.figures import Bench, run_figure
from jaxcnn.losses import gaussian, mixture
from jaxcnn.models import create
from jaxcnn.plots import BLUE, ORANGE, dots
from jaxcnn.seeds import fit_seeds
from jaxcnn.spread import spread


@dataclass(frozen=True)
class Settings:
    examples: int = 1000
    steps: int = 3000
    seeds: int = 5


WAYS = {"one Gaussian": ("gaussian_density", gaussian()), "mixture of 3": ("mixture_density", mixture())}
GRID = np.linspace(-0.1, 1.1, 121)


def pairs(n: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y, (n, 1) each."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 1, (n, 1))
    y = x + 0.3 * np.sin(2 * np.pi * x) + rng.uniform(-0.1, 0.1, (n, 1))
    return x.astype(np.float32), y.astype(np.float32)


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    (x, y), (x_test, y_test) = pairs(settings.examples, seed=0), pairs(settings.examples, seed=1)
    problems = {"inverse": ((y, x), (y_test, x_test)), "forward": ((x, y), (x_test, y_test))}
    result: dict[str, Any] = {"seeds": list(range(settings.seeds)), "nll": {}, "parts": {}}
    for problem, (train, test) in problems.items():
        for way, (name, loss) in WAYS.items():
            options = {"components": 3} if "mixture" in way else {}
            net = create(name, **options)
            found = fit_seeds(
                net,
                train,
                test=test,
                optimizer=optax.adam(optax.cosine_decay_schedule(1e-2, settings.steps)),
                steps=settings.steps,
                batch_size=100,
                seeds=range(settings.seeds),
                loss_fn=loss,
                metrics={},
                log_every=1000,
                quiet=True,
            )
            result["nll"][f"{problem}: {way}"] = found.test["loss"]
            if problem == "inverse":
                result["parts"][way] = _parts(net.apply(found.each()[0], GRID[:, None].astype(np.float32), train=False))
    result["data"] = {"y": y_test[:300, 0], "x": x_test[:300, 0]}
    return result


def _parts(outputs: Any) -> dict[str, Any]:
    """Weights, means and deviations (g, k) along the grid."""
    if hasattr(outputs, "logits"):
        weights = np.exp(outputs.logits - np.logaddexp.reduce(outputs.logits, 1, keepdims=True))
        return {"weight": weights, "mean": outputs.means[..., 0], "scale": outputs.scales}
    return {"weight": np.ones_like(outputs.mean), "mean": outputs.mean, "scale": outputs.scale}


def say(result: dict[str, Any]) -> str:
    nll = {name: spread(values) for name, values in result["nll"].items()}
    n = len(result["seeds"])
    inverse = [nll[f"inverse: {way}"] for way in WAYS]
    forward = [nll[f"forward: {way}"] for way in WAYS]
    lower = sum(b < a for a, b in zip(*(result["nll"][f"inverse: {way}"] for way in WAYS), strict=True))
    return (
        f"negative log-likelihood of the inverse problem {inverse[0]:.2f} nats for one"
        f" Gaussian, {inverse[1]:.2f} for the mixture (lower in {lower} of {n} seeds); of"
        f" the forward problem {forward[0].mean:.2f} and {forward[1].mean:.2f} (n = {n}, 95 % intervals)"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
    for axes, (way, parts), colour in zip((left, middle), result["parts"].items(), (BLUE, ORANGE), strict=True):
        axes.plot(result["data"]["y"], result["data"]["x"], ".", color="0.7", markersize=3)
        weight, mean, scale = (np.array(parts[key]) for key in ("weight", "mean", "scale"))
        for k in range(mean.shape[1]):
            strong = weight[:, k] > 0.1
            for sign, line in ((0, "-"), (-1, ":"), (1, ":")):
                shown = np.where(strong, mean[:, k] + sign * scale[:, k], np.nan)
                axes.plot(GRID, shown, line, color=colour, linewidth=2 if sign == 0 else 1)
        axes.set(xlabel="y (input)", ylabel="x (answer)", ylim=(-0.2, 1.2))
        axes.set_title(f"{way}: mean ± scale", fontsize=10)
        axes.grid(alpha=0.3)
    short = {"inverse: one Gaussian": "inverse,\nGaussian", "inverse: mixture of 3": "inverse,\nmixture"}
    short |= {"forward: one Gaussian": "forward,\nGaussian", "forward: mixture of 3": "forward,\nmixture"}
    dots(right, {short[name]: values for name, values in result["nll"].items()})
    right.tick_params(axis="x", labelsize=8)
    right.set(
        ylabel="test negative log-likelihood (nats)",
    )
    right.set_title(f"{len(result['seeds'])} seeds", fontsize=10)


if __name__ == "__main__":
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke={"examples": 200, "steps": 30, "seeds": 2})
