"""A run made again beside what it recorded: lines, checkpoints and final state are compared, and nothing is written."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcnn.checkpoint import CheckpointError, Checkpoints, Restored
from jaxcnn.errors import InputError
from jaxcnn.parallel import Layout
from jaxcnn.train.log import TIMINGS, MetricsLog, complete_lines, line_difference, parsed
from jaxcnn.train.record import Record
from jaxcnn.train.state import TrainState
from jaxcnn.tree import flatten, state_sha256

_POSITION = ("lines", "logged", "evaluated")
"""What tells the moments of a step apart at which it can be saved: before its evaluation, after, after a last line."""
_NOTHING = object()


class Difference(Exception):
    """The first thing that a replay does not give again. `where` is a line, a checkpoint or a file of the run."""

    def __init__(
        self, step: int, where: str, reason: str, *, field: str = "", recorded: Any = None, replayed: Any = None
    ):
        super().__init__(f"step {step} differs: {where}: {reason}")
        self.step, self.where, self.reason = step, where, reason
        self.field, self.recorded, self.replayed = field, recorded, replayed


class Reached(Exception):
    """The replay came to the checkpoint at which it was to end, and nothing differed."""


class Replay(Record):
    """Stands for the record of the run in `directory`, whose lines and checkpoints are what `fit` must give again.

    It begins with the checkpoint of step `start`, with nothing at 0, and ends by `Reached` at that of step `end`; with
    `end` None it ends as the run does, and `finish` compares the rest. Whatever differs raises `Difference`.
    `progress(step)` hears of every step that was compared.
    """

    def __init__(
        self,
        directory: Path,
        *,
        start: int = 0,
        end: int | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ):
        super().__init__(None)
        self.directory, self.start, self.end, self._progress = directory, start, end, progress
        self._kept = Checkpoints(directory / "checkpoints")
        self._recorded = complete_lines(directory / "metrics.jsonl")
        steps = self._kept.steps() + (self._kept.incomplete() if end is None else [])
        after = start or -1  # a run that was stopped before its first step has a checkpoint of step 0
        self._open = {step for step in steps if after < step and (end is None or step <= end)}
        # One step beyond the end, so that what comes too late is noticed there.
        self.watched = frozenset(self._open | ({end + 1} if end is not None else set()))
        self._under: Restored | None = None
        self._differing: dict[int, Difference] = {}
        self._best: tuple[int, dict[str, np.ndarray]] | None = None
        self.lines_equal = self.checkpoints_equal = 0

    @property
    def lines_beyond(self) -> int:
        """Lines that lie after the end, which resuming would write again."""
        return len(self._recorded) - self.log.lines

    def restore(self, layout: Layout) -> Restored | None:
        return self._sound(self.start, layout) if self.start else None

    def restore_step(self, step: int, layout: Layout) -> Restored:
        """The best step: as it was replayed, or the run's own where the replay began after it."""
        if self._best is None or self._best[0] != step:
            return self._sound(step, layout)
        arrays = self._best[1]
        return Restored(step, layout.place(dict(arrays)), {}, None, state_sha256(arrays))

    def begin(self, lines: int) -> None:
        self.log = MetricsLog(None)
        if len(self._recorded) < lines:
            held = len(self._recorded)
            raise Difference(self.start, "metrics.jsonl", f"has {held} lines, the checkpoint stands on {lines}")
        self.log.history = [self._line(i, self.start) for i in range(lines)]

    def write(self, line: Mapping[str, Any]) -> None:
        step, place = int(line["step"]), self.log.lines
        self._passed(step)
        if place == len(self._recorded):
            raise Difference(step, _line(place), "is missing", replayed=dict(line))
        recorded = self._line(place, step)
        self.log.write(line)
        if found := line_difference(recorded, self.log.history[-1]):
            hint = ""
            if found.field == "step" and isinstance(found.old, int):
                hint = ", a line is missing" if found.old > step else ", a line was added or repeated"
            values = f"{json.dumps(found.old)} recorded, {json.dumps(found.new)} replayed"
            reason = f"{found.field}: {values}{hint}"
            raise Difference(step, _line(place), reason, field=found.field, recorded=found.old, replayed=found.new)
        self.lines_equal += 1
        self._progress(step)

    def save(self, step: int, state: TrainState, *, loop: Mapping[str, Any], metric: float | None) -> None:
        self._passed(step)
        loop = json.loads(json.dumps({"lines": self.log.lines, **loop}))
        arrays = flatten(state)
        if loop["best_step"] == step:
            self._best = step, {name: np.array(leaf) for name, leaf in arrays.items()}
        if step not in self._open:
            return
        if self._under is None or self._under.step != step:
            self._under = self._sound(step)
        recorded = self._under
        if found := _saved_difference(recorded, arrays, loop, metric):
            if all(recorded.loop.get(name) == loop[name] for name in _POSITION):
                raise found
            self._differing[step] = found  # a later moment of this step may be the one that was saved
            return
        self._under = None
        self._open.remove(step)
        self.checkpoints_equal += 1
        self._progress(step)
        if step == self.end:
            raise Reached

    def finish(self, step: int, summary: Mapping[str, Any]) -> None:
        """Compares what is left when the run has ended by itself: its last step, and what it would say of itself."""
        self._passed(step + 1)
        for beyond in sorted(self._open):
            raise Difference(step, f"checkpoint {beyond}", f"the run ends at step {step}")
        if self.lines_beyond:
            raise Difference(step, _line(self.log.lines), f"the run ends before it, {self.lines_beyond} lines too many")
        recorded = json.loads((self.directory / "summary.json").read_text())
        for field in {**summary, **recorded}:
            a, b = recorded.get(field, _NOTHING), summary.get(field, _NOTHING)
            if field not in TIMINGS and _json(a) != _json(b):
                a, b = (None if value is _NOTHING else value for value in (a, b))
                reason = f"{field}: {json.dumps(a)} recorded, {json.dumps(b)} replayed"
                raise Difference(step, "summary.json", reason, field=field, recorded=a, replayed=b)

    def _passed(self, step: int) -> None:
        """Raises what was found at a checkpoint before `step`: no moment of it is left to come."""
        for open_step in sorted(self._open):
            if open_step < step:
                never = Difference(open_step, f"checkpoint {open_step}", "the run passes this step without saving it")
                raise self._differing.get(open_step, never)

    def _sound(self, step: int, layout: Layout | None = None) -> Restored:
        try:
            return self._kept.restore(step, layout=layout)
        except CheckpointError as error:
            raise Difference(step, f"checkpoint {step}", str(error)) from error

    def _line(self, place: int, step: int) -> dict[str, Any]:
        try:
            return parsed(self._recorded[place])
        except ValueError as error:
            raise Difference(step, _line(place), f"was altered ({error})") from None


def interval(directory: Path, *, start: int | None, end: int | None, finished: bool) -> tuple[int, int | None]:
    """The steps to replay between; an end of None is that of the finished run. `InputError` where no checkpoint is."""
    steps = Checkpoints(directory / "checkpoints").steps()
    known = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
    for flag, step in (("--from", start), ("--to", end)):
        if step is not None and step not in steps and (flag, step) != ("--from", 0):
            raise InputError(f"{flag} {step}: run {directory} has no checkpoint of that step, {known}")
    if end is None and not finished:
        if not steps:
            raise InputError(f"run {directory} is not finished and has no checkpoint yet: nothing can be compared")
        end = steps[-1]
    start = start or 0
    if end is not None and start >= end > 0:
        raise InputError(f"--from {start} must be before the end, step {end}")
    return start, end


def _saved_difference(
    recorded: Restored, arrays: Mapping[str, Any], loop: Mapping[str, Any], metric: float | None
) -> Difference | None:
    """What a sound checkpoint has otherwise than the state, its arrays first."""
    step, where = recorded.step, f"checkpoint {recorded.step}"
    old, new = state_sha256(recorded.arrays), state_sha256(arrays)
    if old != new or recorded.state_sha256 != new:
        both = recorded.arrays.keys() & arrays.keys()
        differing = [name for name in sorted(both) if not _same_array(recorded.arrays[name], arrays[name])]
        differing += sorted(recorded.arrays.keys() ^ arrays.keys())
        reason = f"state_sha256: {recorded.state_sha256} recorded, {new} replayed"
        if differing:
            reason += f"; {len(differing)} of {len(arrays)} arrays differ, the first by name is {differing[0]}"
        return Difference(step, where, reason, field="state_sha256", recorded=recorded.state_sha256, replayed=new)
    kept = {**recorded.loop, "metric": recorded.metric}
    for field, value in {**loop, "metric": metric}.items():
        if field not in TIMINGS and _json(kept.get(field)) != _json(value):
            reason = f"{field}: {json.dumps(kept.get(field))} recorded, {json.dumps(value)} replayed"
            return Difference(step, where, reason, field=field, recorded=kept.get(field), replayed=value)
    return None


def _same_array(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _json(value: Any) -> str:
    return "" if value is _NOTHING else json.dumps(value, sort_keys=True)


def _line(place: int) -> str:
    return f"line {place + 1} of metrics.jsonl"
