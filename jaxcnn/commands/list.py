"""`jaxcnn list`: the models."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from jaxcnn.commands.output import show


def main(args: Sequence[str]) -> int:
    """`jaxcnn list [--json]`: the models by family, with parameters and MACs at their usual input, and their source."""

    @dataclass(frozen=True)
    class List:
        json: bool = False

    flags = tyro.cli(List, args=list(args), prog="jaxcnn list", description="Shows the models.")
    from jaxcnn.analysis.counts import counts
    from jaxcnn.models import FAMILIES

    rows = [
        {"name": name, "family": family, **counts(name), "input": list(entry.input), "paper": entry.paper}
        for family, variants in FAMILIES.items()
        for name, entry in variants.items()
    ]
    if flags.json:
        print(json.dumps(rows))
        return 0
    from rich.table import Table

    table = Table("name", "family", "parameters", "MACs (M)", "input", "paper")
    for row in rows:
        size = "x".join(map(str, row["input"]))
        table.add_row(
            row["name"], row["family"], f"{row['parameters']:,}", f"{row['macs'] / 1e6:,.1f}", size, row["paper"]
        )
    show(table)
    return 0
