"""What a run leaves behind: the lines of its log and its checkpoints, written by the first process, read by all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcnn import parallel, processes
from jaxcnn.checkpoint import CheckpointError, Checkpoints, Restored
from jaxcnn.errors import InputError
from jaxcnn.train.log import MetricsLog
from jaxcnn.train.state import TrainState


class Record:
    """`directory` has `metrics.jsonl` and `checkpoints/`; without one the lines are kept in memory, and no checkpoint.

    With `asynchronous` a save only copies the state; what became of it is known at `settle`.
    """

    def __init__(self, directory: Path | None, *, keep_latest: int = 2, keep_best: int = 1, asynchronous: bool = False):
        self.directory, self.log = directory, MetricsLog(None)
        self.watched: frozenset[int] = frozenset()
        """Steps that are saved at every moment at which a stop could have saved them, for a replay to compare."""
        self.checkpoints: Checkpoints | None = None
        if directory is not None:
            if processes.first():
                directory.mkdir(parents=True, exist_ok=True)
            self.checkpoints = Checkpoints(
                directory / "checkpoints", keep_latest=keep_latest, keep_best=keep_best, asynchronous=asynchronous
            )

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.log.history

    def restore(self, layout: parallel.Layout) -> Restored | None:
        """The newest checkpoint that passes verification, in the first process's eyes."""
        if self.checkpoints is None:
            return None
        found: list[Restored] = []

        def newest() -> int | None:
            assert self.checkpoints is not None
            restored = self.checkpoints.restore_latest(layout=layout)
            found.extend([restored] if restored else [])
            return restored and restored.step

        step = processes.from_first(newest)
        if step is None or found:
            return found[0] if found else None
        return self._shared(step, layout)

    def restore_step(self, step: int, layout: parallel.Layout) -> Restored:
        """The checkpoint of `step`; `CheckpointError` in every process if it is damaged."""
        assert self.checkpoints is not None
        found: list[Restored] = []

        def read() -> str | None:
            assert self.checkpoints is not None
            try:
                found.append(self.checkpoints.restore(step, layout=layout))
            except CheckpointError as error:
                return str(error)
            return None

        if (reason := processes.from_first(read)) is not None:
            raise CheckpointError(reason)
        return found[0] if found else self._shared(step, layout)

    def _shared(self, step: int, layout: parallel.Layout) -> Restored:
        assert self.checkpoints is not None
        try:
            return self.checkpoints.restore(step, layout=layout)
        except CheckpointError as error:
            raise InputError(f"{error}: every process must see the run directory of the first one") from error

    def begin(self, lines: int) -> None:
        """Opens the log after its first `lines` lines, those that the checkpoint stands on."""
        if self.directory is not None and processes.first():
            self.log = MetricsLog(self.directory / "metrics.jsonl", keep=lines)

    def write(self, line: Mapping[str, Any]) -> None:
        self.log.write(line)

    def save(self, step: int, state: TrainState, *, loop: Mapping[str, Any], metric: float | None) -> None:
        """A checkpoint that stands on the lines so far. `CheckpointError` or `OSError` where there is none now."""
        if self.checkpoints is None:
            return
        state = parallel.whole(state)
        if processes.first():
            self.log.sync()
            self.checkpoints.save(step, state, loop={"lines": self.log.lines, **loop}, metric=metric)

    def settle(self) -> None:
        """Waits for a save under way; `CheckpointError` if it failed."""
        if self.checkpoints is not None:
            self.checkpoints.wait()

    def close(self) -> None:
        self.log.close()
