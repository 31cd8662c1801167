"""What commands show: tables, and the progress of a download."""

import sys
from typing import Any


def show(table: Any) -> None:
    """A rich table; as wide as it is where nobody looks at a terminal."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)


def show_download(file: str, held: int, expected: int) -> None:
    print(f"\r{file}: {held / 1e6:.1f} of {expected / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)
    if held >= expected:
        print(file=sys.stderr)
