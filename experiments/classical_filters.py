"""Filters that were designed, not learnt, on a photograph; and what convolution is.

    python experiments/classical_filters.py

Claim     the classical filters are convolutions by a few numbers: averages blur and let through ||k|| of white noise,
          sharpening adds the difference to the average, [-1 1] finds vertical edges and its transpose horizontal ones;
          a convolution is a sparse matrix of shared weights, commutes (correlation does not), and is all that a linear
          shift-invariant system can be: its impulse response says everything
Source    Gonzalez & Woods, Digital Image Processing, chapters 3 and 10
Data      a grey photograph that comes with scikit-learn
Recipe    each seed draws white noise, an image and kernels of N(0, 1); the system is a box, a Gaussian and sharpening
          in turn, and as control a maximum over 3x3, which is not linear; errors are norms relative to the result's
Cost      seconds
Expected  the box 9x9 lets through 1/9 of the noise, the Gaussian of s = 3 about 1/(2 s sqrt(pi)) = 0.094, [-1 1] the
          1.41 fold; errors of rounding size, but for the controls
Measured  n = 5 seeds: white noise comes through by 0.113 (box 9x9), 0.264 (box 1x15), 0.264 (box 15x1), 0.096
          (Gaussian, s = 3), 2.847 (sharpening), 1.412 ([-1 1]), 1.414 ([-1 1] transposed), within 2.5% of ||k||; 3x3 on
          16x16 is a matrix 196 x 256 with 3.5% nonzero and 9 different weights, error 6e-08; convolution commutes
          within 1e-07, correlation is off by 1.4 or more; a cascade of three filters is convolution with its impulse
          response within 2e-07, the maximum is not (6.8)
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.analysis import filters
from jaxcnn.figures import Bench, run_figure
from jaxcnn.layers.conv import conv
from jaxcnn.layers.pool import max_pool
from jaxcnn.style.pictures import luminance, photograph, to_array
from jaxcnn.types import Array


@dataclass(frozen=True)
class Settings:
    noise: int = 512
    """Side of the white noise, in pixels."""
    seeds: int = 5


ROWS, COLUMNS = slice(100, 260), slice(190, 380)


def temple() -> Array:
    """(1, h, w, 1) in 0..1."""
    return luminance(to_array(photograph("china.jpg")))[:, ROWS, COLUMNS, :1]


def cascade(x: Array) -> Array:
    """(1, h, w, 1), zeros outside: a linear shift-invariant system."""
    for kernel in (filters.box(3, 3), filters.gaussian(1), filters.sharpening(2)):
        x = conv(x, jnp.asarray(kernel)[..., None, None], padding="SAME")
    return x


def maximum(x: Array) -> Array:
    """(1, h, w, 1): shift-invariant, but not linear."""
    return max_pool(x, window=3, strides=1, padding=1)


def error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def by_response(system: Any, x: Array) -> float:
    """The error, away from the border, of convolving with the system's impulse response instead."""
    response = filters.impulse_response(system, size=(21, 21))
    inner = (slice(None), slice(10, -10), slice(10, -10))
    return error(filters.respond(response, x)[inner], system(x)[inner])


def algebra(seed: int) -> dict[str, float]:
    """Errors with kernels and an image of N(0, 1)."""
    keys = jax.random.split(jax.random.key(seed), 3)
    a, b = jax.random.normal(keys[0], (7, 9)), jax.random.normal(keys[1], (5, 3))
    image, kernel = jax.random.normal(keys[2], (16, 16)), b[:3, :3]
    matrix = filters.matrix(np.asarray(kernel)[..., None, None], size=(16, 16))
    by_windows = conv(image[None, ..., None], kernel[..., None, None])
    return {
        "matrix": error(matrix @ np.asarray(image).ravel(), by_windows.ravel()),
        "convolution": error(filters.full_convolution(a, b), filters.full_convolution(b, a)),
        "correlation": error(filters.full_correlation(a, b), filters.full_correlation(b, a)),
    }


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    seeds, gains = range(settings.seeds), {}
    for name, kernel in filters.FILTERS.items():
        noise = [jax.random.normal(jax.random.key(seed), (1, settings.noise, settings.noise, 1)) for seed in seeds]
        measured = [float(filters.filtered(x, kernel).std()) for x in noise]
        gains[name] = {"norm": float(np.linalg.norm(kernel)), "measured": measured}
    sparse: Any = filters.matrix(np.arange(1.0, 10).reshape(3, 3, 1, 1), size=(16, 16))
    matrix = sparse.toarray()
    return {
        "seeds": list(seeds),
        "gains": gains,
        "algebra": [algebra(seed) for seed in seeds],
        "matrix": {"shape": matrix.shape, "nonzero": np.count_nonzero(matrix), "weights": len(np.unique(matrix)) - 1},
        "response": {"cascade": by_response(cascade, temple()), "maximum": by_response(maximum, temple())},
    }


def say(result: dict[str, Any]) -> str:
    gains = result["gains"]
    off = max(abs(np.mean(gain["measured"]) / gain["norm"] - 1) for gain in gains.values())
    largest = {name: max(one[name] for one in result["algebra"]) for name in result["algebra"][0]}
    least = min(one["correlation"] for one in result["algebra"])
    rows, columns = result["matrix"]["shape"]
    through = ", ".join(f"{np.mean(gain['measured']):.3f} ({name})" for name, gain in gains.items())
    return (
        f"n = {len(result['seeds'])} seeds: white noise comes through by {through}, within {off:.1%} of ||k||; 3x3 on"
        f" 16x16 is a matrix {rows} x {columns} with {result['matrix']['nonzero'] / (rows * columns):.1%} nonzero and"
        f" {result['matrix']['weights']} different weights, error {largest['matrix']:.0e}; convolution commutes within"
        f" {largest['convolution']:.0e}, correlation is off by {least:.1f} or more; a cascade of three filters is"
        f" convolution with its impulse response within {result['response']['cascade']:.0e}, the maximum is not"
        f" ({result['response']['maximum']:.1f})"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    x, panels = temple(), figure.subplots(2, 4).ravel()
    panels[0].imshow(np.asarray(x)[0, ..., 0], cmap="gray", vmin=0, vmax=1)
    panels[0].set_title("original", fontsize=9)
    grey = edges = None
    for panel, (name, kernel) in zip(panels[1:], filters.FILTERS.items(), strict=True):
        picture = np.asarray(filters.filtered(x, kernel))[0, ..., 0]
        if abs(float(kernel.sum())) < 0.5:
            edges = panel.imshow(picture, cmap="PuOr", vmin=-0.3, vmax=0.3)
        else:
            grey = panel.imshow(picture, cmap="gray", vmin=0, vmax=1)
        gain = np.mean(result["gains"][name]["measured"])
        panel.set_title(f"{name}\n(noise × {gain:.2f})", fontsize=9)
    for panel in panels:
        panel.set_axis_off()
    figure.colorbar(grey, ax=panels[:4], label="brightness", shrink=0.7, pad=0.01)
    figure.colorbar(edges, ax=panels[4:], label="difference", shrink=0.7, extend="both", pad=0.01)


if __name__ == "__main__":
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke={"noise": 64, "seeds": 2})
