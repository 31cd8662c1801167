"""How the terms fell, and what they come to in the end, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcnn.files import replacing

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")


def losses(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Curves of the total and of every term that is not 0 throughout, and bars of each layer's first and last value."""
    from matplotlib.figure import Figure

    names = [name for name in lines[0] if "/" in name or name in ("total", "tv")]
    values = {name: np.array([line[name] for line in lines]) for name in names}
    values = {name: value for name, value in values.items() if (value > 0).any()}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    for i, (name, value) in enumerate(values.items()):
        style = {"color": "black", "linewidth": 2} if name == "total" else {"color": COLOURS[i % len(COLOURS)]}
        curves.plot(np.where(value > 0, value, np.nan), label=name, **style)
    curves.set(yscale="log", xlabel="evaluations", ylabel="weighted loss", title="Terms")
    curves.legend(fontsize=8)
    curves.grid(alpha=0.3)
    layers = [name for name in values if name != "total"]
    at = np.arange(len(layers))
    for shift, index, label, colour in ((-0.2, 0, "first", "#999999"), (0.2, -1, "last", COLOURS[0])):
        bars.bar(at + shift, [values[name][index] for name in layers], 0.4, label=label, color=colour)
    bars.set(yscale="log", ylabel="weighted loss", title="By layer")
    bars.set_xticks(at, layers, rotation=30, ha="right")
    bars.legend()
    bars.grid(axis="y", alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)
