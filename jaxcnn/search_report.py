"""A search for people: a table of its trials, best first, and a picture of the score against each parameter."""

from pathlib import Path
from typing import Any

from rich.table import Table

from jaxcnn.files import replacing
from jaxcnn.plots import BLUE, ORANGE
from jaxcnn.search import Choice, IntUniform, LogUniform, Range, SearchResult, Trial

COLUMNS = 3
"""Panels beside each other."""


def table(found: SearchResult) -> Table:
    """One line per trial, as `ranked`."""
    shown = Table(caption=f"{len(found.trials)} trials, best first; a stopped trial has the score of its last report")
    for name, justify in (("trial", "right"), ("score", "right"), ("state", "left")):
        shown.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in found.space:
        shown.add_column(name, justify="right", overflow="fold")
    shown.add_column("reports", justify="right")
    shown.add_column("why", overflow="fold")
    for trial in found.ranked:
        score = "" if trial.score is None else f"{trial.score:.5g}"
        values = (text(trial.params[name]) for name in found.space)
        shown.add_row(str(trial.number), score, trial.state, *values, str(len(trial.reports)), trial.reason)
    return shown


def text(value: Any) -> str:
    """A value as short as people need it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(found: SearchResult, path: Path, *, title: str, score: str = "score") -> None:
    """Writes a PNG with one panel per parameter; `score` names the vertical axis.

    Failed trials have no score: crosses on the lower edge.
    """
    from matplotlib.figure import Figure

    names = list(found.space)
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(6.4, 4.4 * columns), 3.6 * rows + 1.2), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, names, strict=False):
        _panel(axes, name, found)
    for axes in panels[:, 0]:
        axes.set_ylabel(score)
    for axes in panels.flat[len(names) :]:
        axes.remove()
    handles = {label: handle for handle, label in zip(*panels[0, 0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    figure.suptitle(title)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _panel(axes: Any, name: str, found: SearchResult) -> None:
    given = found.space[name]
    _scale(axes, given)
    for state, marker, colour, face, label in (
        ("complete", "o", BLUE, BLUE, "complete"),
        ("stopped", "v", ORANGE, "none", "stopped (last report)"),
        ("failed", "x", "0.3", "0.3", "failed (no score)"),
    ):
        trials = [trial for trial in found.trials if trial.state == state]
        if not trials:
            continue
        places = [_place(given, name, trial) for trial in trials]
        edge = state == "failed"
        heights = [0.03 if edge else trial.score for trial in trials]
        transform = axes.get_xaxis_transform() if edge else axes.transData
        axes.scatter(
            places, heights, marker=marker, edgecolors=None if edge else colour, facecolors=face, label=label,
            transform=transform, s=36, alpha=0.8,
        )  # fmt: skip
    _mark_best(axes, name, found.ranked[0], given)
    axes.set_xlabel(name)
    axes.grid(alpha=0.3)


def _mark_best(axes: Any, name: str, first: Trial, given: Range) -> None:
    if first.state == "complete":
        place = _place(given, name, first)
        axes.scatter(
            place, first.score, marker="*", s=260, facecolors="none", edgecolors="k", linewidths=1.3, label="best"
        )


def _place(given: Range, name: str, trial: Trial) -> Any:
    """Trials of one choice stand a little apart, so that equal scores are seen."""
    value = trial.params[name]
    if not isinstance(given, Choice):
        return value
    return list(given.values).index(value) + 0.3 * (0.618 * trial.number % 1 - 0.5)


def _scale(axes: Any, given: Range) -> None:
    """The horizontal axis over the whole range, with a little room beside."""
    from matplotlib.ticker import MaxNLocator

    if isinstance(given, Choice):
        names = [_short(str(value)) for value in given.values]
        turned = sum(map(len, names)) > 24
        axes.set_xticks(range(len(names)), names, rotation=35 if turned else 0, ha="right" if turned else "center")
        axes.set_xlim(-0.5, len(names) - 0.5)
        return
    if isinstance(given, LogUniform):
        room = (given.high / given.low) ** 0.04
        axes.set_xscale("log")
        axes.set_xlim(given.low / room, given.high * room)
        return
    if isinstance(given, IntUniform):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    room = (given.high - given.low) * 0.04
    axes.set_xlim(given.low - room, given.high + room)


def _short(text: str, most: int = 14) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
