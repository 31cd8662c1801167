"""A signal for people: a table, and a picture of moments and histograms."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from jaxcnn.analysis.signal import Layer, Signal
from jaxcnn.files import replacing
from jaxcnn.plots import BLUE, ORANGE

MEASURED, PREDICTED = BLUE, ORANGE
NAMED = 30
"""Layers up to which the picture names each."""
HISTOGRAMS = 6


def table(signal: Signal) -> Table:
    """One line per layer; second moments measured and predicted, forward and backward."""
    seeds = f", geometric means over {signal.seeds} seeds" if signal.seeds > 1 else ""
    shown = Table(caption=f"E\\[x^2] and E\\[g^2]: second moments of values and of the gradient by them{seeds}")
    for name in ("layer", "kind", "output"):
        shown.add_column(name, overflow="fold")
    columns = ("mean", "std", "E\\[x^2]", "predicted", "E\\[g^2]", "predicted", "saturated", "dead")
    for name in columns:
        shown.add_column(name, justify="right")
    for layer in signal.layers:
        shares = ("" if share is None else f"{share:.1%}" for share in (layer.saturated, layer.dead))
        numbers = (layer.mean, layer.std, layer.second_moment, layer.predicted, layer.gradient)
        numbers = (f"{number:.3g}" for number in (*numbers, layer.predicted_gradient))
        shown.add_row(layer.name, layer.kind, "x".join(map(str, layer.shape)), *numbers, *shares)
    return shown


def plot(signal: Signal, path: Path, *, title: str = "") -> None:
    """Second moments by layer, measured and predicted, and histograms of layers spread over the depth, as a PNG."""
    from matplotlib.figure import Figure

    layers = signal.layers
    picked = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, HISTOGRAMS).round().astype(int))]
    figure = Figure(figsize=(14, 11), layout="constrained")
    grid = figure.add_gridspec(4, len(picked), height_ratios=(3, 3, 2, 2))
    figure.suptitle(f"{title}\n{signal.verdict}".strip(), fontsize=12)
    for row, (what, measured, predicted) in enumerate(
        (
            ("signal, E[x²]", [one.second_moment for one in layers], [one.predicted for one in layers]),
            ("gradient, E[g²]", [one.gradient for one in layers], [one.predicted_gradient for one in layers]),
        )
    ):
        axis = figure.add_subplot(grid[row, :])
        _moments(axis, measured, predicted)
        axis.set_ylabel(f"second moment of the\n{what}")
        _name_layers(axis, layers, last=row == 1)
    for column, layer in enumerate(picked):
        for row, sample, what in ((2, layer.sample, "value"), (3, layer.gradient_sample, "gradient")):
            axis = figure.add_subplot(grid[row, column])
            _histogram(axis, sample)
            axis.set_xlabel(what, fontsize=9)
            axis.set_ylabel("share" if column == 0 else "")
            if row == 2:
                axis.set_title(f"{layers.index(layer) + 1}: {_short(layer, 22)}", fontsize=9)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _moments(axis, measured: Sequence[float], predicted: Sequence[float]) -> None:
    at = np.arange(1, len(measured) + 1)
    for values, colour, line, label in (
        (measured, MEASURED, "o-", "measured"),
        (predicted, PREDICTED, "x--", "predicted"),
    ):
        values = np.array(values)
        values[~(np.isfinite(values) & (values > 0))] = np.nan  # what a logarithmic axis has no place for
        axis.plot(at, values, line, color=colour, label=label, markersize=4, linewidth=1.2)
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend()


def _name_layers(axis, layers: Sequence[Layer], *, last: bool) -> None:
    if len(layers) <= NAMED:
        names = [f"{i}: {_short(layer, 26)}" if last else str(i) for i, layer in enumerate(layers, 1)]
        axis.set_xticks(range(1, len(layers) + 1), names, rotation=60 if last else 0, ha="right" if last else "center")
        axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel("layer, in the order of the table" if last else "")


def _short(layer: Layer, most: int) -> str:
    name = f"{layer.name} {layer.kind}"
    return name if len(name) <= most else "…" + name[1 - most :]


def _histogram(axis, sample: np.ndarray) -> None:
    finite = sample[np.isfinite(sample)].astype(np.float64)
    if finite.size:
        axis.hist(finite, bins=40, weights=np.full(finite.size, 1 / finite.size), color=MEASURED)
    axis.tick_params(labelsize=7)
    axis.xaxis.get_offset_text().set_fontsize(7)
    axis.ticklabel_format(axis="x", scilimits=(-2, 3))
    axis.locator_params(axis="x", nbins=4)
