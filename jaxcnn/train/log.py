"""What a run says: `metrics.jsonl`, each line exactly once even across restarts; a progress bar; TensorBoard."""

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxcnn import faults
from jaxcnn.errors import InputError
from jaxcnn.files import replacing

WAITS = ("data_seconds", "checkpoint_seconds")
"""Seconds since the last line in which training stood still: for its next batch, for a checkpoint."""
TIMINGS = ("seconds", "images_per_second", *WAITS)
"""Fields of a line that differ between two runs of the same configuration."""


class LineDifference(NamedTuple):
    field: str
    old: Any
    new: Any


def line_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> LineDifference | None:
    """The first field, timings aside, in which two lines of logs differ as JSON; the step before all others."""
    for field in {"step": None, **new, **old}:
        a, b = old.get(field), new.get(field)
        if field not in TIMINGS and (json.dumps(a) != json.dumps(b) or (field in old) != (field in new)):
            return LineDifference(field, a, b)
    return None


def complete_lines(path: Path) -> list[bytes]:
    """The lines of a log, without one that was cut short; none where there is no log."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def parsed(line: bytes) -> dict[str, Any]:
    """A line of a log; `ValueError` for what is none."""
    values = json.loads(line)
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise ValueError("not an object with a step")
    return values


class MetricsLog:
    """JSON lines in `path` after its first `keep` lines, those that the checkpoint stands on; None keeps them
    in memory only. A line that a full disk refuses is kept and written with the next one."""

    def __init__(self, path: Path | None, *, keep: int = 0):
        self.history: list[dict[str, Any]] = []
        self._waiting = b""
        self._file = None
        if path is None:
            return
        old = complete_lines(path)[:keep]
        if len(old) < keep:
            raise InputError(
                f"{path} has {len(old)} lines, the checkpoint stands on {keep}: restore it, or give another --run name"
            )
        self.history = _parsed(old, path)
        with replacing(path) as file:
            file.write(b"".join(old))
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - closed by close()
        self._end = self._file.seek(0, os.SEEK_END)

    @property
    def lines(self) -> int:
        return len(self.history)

    def write(self, line: Mapping[str, Any]) -> None:
        """One line; non-finite numbers become null, which JSON has instead."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.history.append(clean)
        self._waiting += json.dumps(clean).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._flush()
        faults.point("log.line")

    def _flush(self) -> None:
        if self._file is None:
            return
        try:
            if self._waiting and self._file.write(self._waiting) != len(self._waiting):
                raise OSError(errno.ENOSPC, "metrics.jsonl could not be written: no space left")
        except OSError:
            self._file.truncate(self._end)  # no half line
            self._file.seek(self._end)
            raise
        self._end, self._waiting = self._end + len(self._waiting), b""

    def sync(self) -> None:
        """Every line is on the disk, or `OSError`: called before a checkpoint counts on them."""
        self._flush()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._flush()
            self._file.close()


class Progress:
    """A rich bar with ETA on a terminal, plain lines elsewhere, nothing when `quiet`."""

    def __init__(self, steps: int, *, start: int = 0, quiet: bool = False, what: str = "training"):
        self.quiet, self._bar = quiet, None
        self.steps = steps
        if quiet or not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[numbers]}"),
        )
        self._bar.start()
        self._task = self._bar.add_task(what, total=steps, completed=start, numbers="compiling")

    def step(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step)

    def line(self, line: Mapping[str, Any], *, eta: float | None = None) -> None:
        """Shows a line of the log."""
        shown = {k: v for k, v in line.items() if k != "step" and not k.endswith("seconds")}
        shown |= {f"{k.removesuffix('_seconds')}_wait_s": line[k] for k in WAITS if line.get(k, 0) > 0.05}
        text = " ".join(f"{k} {_short(v)}" for k, v in shown.items())
        if self._bar and eta is not None:
            self._bar.update(self._task, numbers=text)
        else:
            left = "" if eta is None else f" ETA {eta:.0f} s"
            self.say(f"step {line['step']}/{self.steps} {text}{left}")

    def say(self, message: str) -> None:
        if self._bar:
            self._bar.console.print(message, highlight=False, markup=False)
        elif not self.quiet:
            print(message, flush=True)

    def warn(self, message: str) -> None:
        """Said on standard error whatever is quiet."""
        print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _parsed(lines: Sequence[bytes], path: Path) -> list[dict[str, Any]]:
    try:
        return [parsed(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{path} was altered ({error}): restore it, or give another --run name") from None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def tensorboard() -> Any:
    """The tensorboardX module; `InputError` where that optional package is missing."""
    try:
        import tensorboardX
    except ImportError:
        raise InputError("--train.tensorboard needs tensorboardX: pip install 'jaxcnn[tensorboard]'") from None
    return tensorboardX
