"""`jaxcnn data`: data sets to download."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jaxcnn.commands.output import show_download
from jaxcnn.errors import unknown


def main(args: Sequence[str]) -> int:
    """`jaxcnn data fetch NAME`: the original files, pinned by size and SHA-256."""
    if not args or args[0] not in ("fetch",):
        if args and not args[0].startswith("-"):
            raise unknown("data command", args[0], ["fetch"])
        print("usage: jaxcnn data fetch NAME [--data-dir DIR]")
        return 0 if args else 2

    @dataclass(frozen=True)
    class Fetch:
        name: tyro.conf.Positional[str]
        """mnist, fashion_mnist, cifar10 or cifar100."""
        data_dir: Path | None = None
        """Where the data sets lie; by default $JAXCNN_DATA or ~/.cache/jaxcnn/data."""

    flags = tyro.cli(Fetch, args=list(args[1:]), prog="jaxcnn data fetch")
    from jaxcnn.data.fetch import fetch
    from jaxcnn.data.sources import default_data_dir

    for path in fetch(flags.name, flags.data_dir or default_data_dir(), progress=show_download):
        print(path)
    return 0
