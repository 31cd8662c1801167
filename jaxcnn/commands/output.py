"""What commands show: tables, and the progress of what takes long."""

import sys
import time
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


class Counted:
    """Within it `counted(done, of)` shows a bar with ETA on a terminal, a line at every tenth elsewhere."""

    def __init__(self, what: str):
        self._what, self._bar, self._task = what, None, None
        self._started, self._tenth = time.monotonic(), 0

    def __enter__(self) -> "Counted":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=None)
        return self

    def __call__(self, done: int, of: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=of)
        elif (tenth := 10 * done // of) > self._tenth:
            self._tenth, left = tenth, (time.monotonic() - self._started) * (of - done) / done
            print(f"{self._what}: {done:,} of {of:,}, ETA {left:.0f} s", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
