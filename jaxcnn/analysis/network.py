"""A network explained layer by layer, without running it (rows A9 and A10)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from rich.table import Table

from jaxcnn.analysis.rows import PerAxis, Row, receptive_field, rows
from jaxcnn.analysis.trace import trace
from jaxcnn.analysis.walk import walk


@dataclass(frozen=True)
class Summary:
    """What a network is and costs, for one example in evaluation; every total is the sum over `layers`.

    `parameters`: elements of the collection "params"; `statistics`: of all others (running means and variances).

    `macs`: multiply-accumulates of convolutions and matrix products. `flops`: two for each of them, and one per
    element for other arithmetic; a bias is where the sums of a product start and is not counted. Taps on padding
    count. XLA's own count leaves them out, so that the two agree only for valid convolutions.

    `activation_bytes`: the outputs of all rows, in their dtypes. Elementwise operations of a container are one row
    with what they follow, as they are compiled.

    `receptive_field`: input pixels from the first to the last that an output element can depend on, r_L = 1 +
    sum_l d_l (K_l - 1) prod_{i<l} S_i, the largest over branches and, after up-sampling, over outputs; a tuple
    where the axes differ. A dense layer or global pooling over n positions is a window of n. Padding is not
    clipped, so that it can be larger than the image. Indices that are computed may pick anything: resizing by
    `jax.image.resize` sees the whole axis. None for inputs without spatial axes.
    """

    parameters: int
    statistics: int
    macs: int
    flops: int
    activation_bytes: int
    receptive_field: PerAxis
    layers: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, under the names of the fields."""
        return _plain(dataclasses.asdict(self))


def summary(module: nn.Module, *, input: tuple[int, ...], dtype: Any = jnp.float32) -> Summary:
    """The summary of any Flax Linen module for one example of shape `input`, such as (h, w, c), of `dtype`.

    Nothing is computed: shapes are inferred, and the traced program is read. A module that takes `train` gets
    `train=False`. A while loop counts as one step (its steps are not known), a scan as all of them, a conditional
    as its most expensive branch; a module in a scan has one row, with the shape of one step.

    Raises:
        InputError: sizes that are not positive, or an input that the module does not take, with its reason.
    """
    traced = trace(module, input=input, dtype=dtype)
    operations, outputs = walk(traced)
    layers = rows(traced, operations)
    return Summary(
        parameters=sum(row.parameters for row in layers),
        statistics=sum(row.statistics for row in layers),
        macs=sum(row.macs for row in layers),
        flops=sum(row.flops for row in layers),
        activation_bytes=sum(row.activation_bytes for row in layers),
        receptive_field=receptive_field(outputs),
        layers=layers,
    )


def table(summary: Summary) -> Table:
    """For people: one line per row, and the totals."""
    shown = Table(show_footer=True, caption="one example in evaluation; taps on padding count; FLOPs are 2 per MAC")
    statistics = summary.statistics > 0
    shown.add_column("layer", "total", overflow="fold")
    shown.add_column("kind", overflow="fold")
    shown.add_column("output")
    shown.add_column("parameters", f"{summary.parameters:,}", justify="right")
    if statistics:
        shown.add_column("statistics", f"{summary.statistics:,}", justify="right")
    shown.add_column("MACs", _scaled(summary.macs), justify="right")
    shown.add_column("FLOPs", _scaled(summary.flops), justify="right")
    shown.add_column("activations", _bytes(summary.activation_bytes), justify="right")
    shown.add_column("receptive field", _axes(summary.receptive_field), justify="right")
    shown.add_column("stride", justify="right")
    for row in summary.layers:
        counts = [_count(row.parameters), _count(row.statistics)][: 1 + statistics]
        costs = [_scaled(row.macs), _scaled(row.flops), _bytes(row.activation_bytes)]
        shown.add_row(
            row.name, row.kind, _shape(row.output), *counts, *costs, _axes(row.receptive_field), _axes(row.stride)
        )
    return shown


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _count(value: int) -> str:
    return f"{value:,}" if value else ""


def _scaled(value: float, step: int = 1000, units: tuple[str, ...] = ("", "k", "M", "G", "T")) -> str:
    """Three digits and a prefix: "1.81 G"; nothing for 0."""
    power = 0
    while value >= step and power < len(units) - 1:
        value, power = value / step, power + 1
    digits = f"{value:.0f}" if power == 0 or value >= 99.95 else f"{value:.3g}"
    return f"{digits} {units[power]}".rstrip() if value else ""


def _bytes(value: int) -> str:
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB"))


def _shape(output: Any) -> str:
    several = bool(output) and isinstance(output[0], tuple)
    return ", ".join(map(_shape, output)) if several else "x".join(map(str, output))


def _axes(value: PerAxis) -> str:
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    return "x".join(f"{v:g}" for v in values)
