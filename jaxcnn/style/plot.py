"""How the terms fell, and what they come to in the end, as a picture."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcnn.files import replacing
from jaxcnn.plots import BLACK, COLOURS, LINES

SPAN = 1e-6
"""What is smaller than this share of the largest value is rounding, and not shown."""


def losses(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Curves of the total and of every term that is not 0 throughout, and bars of each one's first and last value."""
    from matplotlib.figure import Figure

    names = ["total", *(name for name in lines[0] if "/" in name or name == "tv")]
    values = {name: np.array([line[name] for line in lines]) for name in names}
    values = {name: value for name, value in values.items() if name == "total" or (value > 0).any()}
    most = max(value.max() for value in values.values()) or 1.0
    values = {name: np.maximum(value, SPAN / 10 * most) for name, value in values.items()}
    limits = 0.5 * max(SPAN * most, min(value.min() for value in values.values())), 2 * most
    looks = [(BLACK, "-"), *((colour, line) for line in LINES for colour in COLOURS if colour != BLACK)]
    figure = Figure(figsize=(12, 2.5 + 0.35 * max(len(values), 5)), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for (name, value), (colour, line) in zip(values.items(), itertools.cycle(looks), strict=False):
        marker = "o" if len(value) == 1 else ""
        curves.plot(value, linestyle=line, label=name, color=colour, marker=marker)
    curves.set(yscale="log", ylim=limits, xlabel="evaluations", ylabel="weighted loss", title="The terms on the way")
    curves.grid(alpha=0.3)
    at = np.arange(len(values))
    for shift, index, label, colour in ((-0.2, 0, "first", "#999999"), (0.2, -1, "last", COLOURS[0])):
        bars.barh(at + shift, [value[index] for value in values.values()], 0.4, label=label, color=colour)
    bars.set(xscale="log", xlim=limits, xlabel="weighted loss", title="First and last")
    bars.set_yticks(at, list(values))
    bars.invert_yaxis()
    bars.grid(axis="x", alpha=0.3)
    figure.legend(handles=curves.get_lines(), loc="outside lower left", ncols=4, fontsize=9)
    figure.legend(handles=bars.containers, loc="outside lower right", ncols=2, fontsize=9)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)
