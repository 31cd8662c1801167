"""What the project's pictures have in common: colours that colour-blind readers tell apart, and curves with bands."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# Okabe and Ito's.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
PURPLE, AMBER, SKY = "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK)
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def band(x: ArrayLike, values: ArrayLike) -> dict[str, np.ndarray]:
    """Mean, least and largest of values (t, s) over s seeds at x (t,): what `bands` draws, each (t,)."""
    x, values = np.asarray(x), np.asarray(values, float)
    return {"x": x, "mean": values.mean(1), "low": values.min(1), "high": values.max(1)}


def bands(axes: Any, curves: Mapping[str, Mapping[str, Any]], **style: Any) -> None:
    """A line and the band about it for each name of `curves`; what is None or NaN is left out."""
    for i, (name, curve) in enumerate(curves.items()):
        x, mean, low, high = (np.array(curve[key], float) for key in ("x", "mean", "low", "high"))
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(x, mean, color=colour, linestyle=LINES[i % len(LINES)], label=name, **style)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3)


def dots(axes: Any, groups: Mapping[str, Sequence[float]]) -> None:
    """Every value of each group as a dot above its name, and the group's mean as a line."""
    for i, values in enumerate(groups.values()):
        at = i + np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [i]
        axes.plot(at, values, "o", color=COLOURS[i % len(COLOURS)], markersize=5)
        axes.hlines(np.mean(values), i - 0.3, i + 0.3, color=BLACK, linewidth=1)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.grid(axis="y", alpha=0.3)
