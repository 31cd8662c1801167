"""Checkpoints that are complete, verified, or not there. The only file that imports Orbax.

Orbax writes the arrays; it restores a flipped bit as wrong weights without a word. So a step counts only once
`MANIFEST.json`, renamed into it last, lists the SHA-256 of every file and of every logical array, and restoring
checks all of them. A step that fails is moved to `damaged/` beside `checkpoints/`, named, and the one before is used.
"""

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcnn import faults, parallel
from jaxcnn.errors import InputError
from jaxcnn.files import json_sha256, write_json
from jaxcnn.tree import flatten, state_sha256

FORMAT = 1
MANIFEST = "MANIFEST.json"


class CheckpointError(Exception):
    """A checkpoint could not be written, or one that was asked for is damaged. Names path and reason."""


@dataclass(frozen=True)
class Restored:
    step: int
    arrays: dict[str, Any]
    """`{"params/conv1/kernel": array, ...}`, as `tree.flatten` names them."""
    loop: dict[str, Any]
    """What the training loop keeps beside its arrays, JSON types."""
    metric: float | None
    state_sha256: str


class Checkpoints:
    """The checkpoints of one run, below `directory` (`directory/STEP/`).

    With `asynchronous`, `save` returns once the state is copied, and a thread writes it; `wait` says what became of it.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_latest: int = 2,
        keep_best: int = 1,
        asynchronous: bool = False,
        report: Callable[[str], None] = lambda message: print(message, flush=True),
    ):
        self.directory = Path(directory).absolute()
        self.damaged = self.directory.parent / "damaged"
        self.keep_latest, self.keep_best, self.report = keep_latest, keep_best, report
        self.asynchronous = asynchronous
        self._writing: threading.Thread | None = None
        self._failed: CheckpointError | None = None

    def save(self, step: int, state: Any, *, loop: Mapping[str, Any], metric: float | None = None) -> None:
        """Writes the step whole or not at all; `CheckpointError` with path and reason if it cannot be.

        An asynchronous one first waits for the one before, whose error it raises.
        """
        if not self.asynchronous:
            return self._save(step, flatten(state), loop, metric)
        self.wait()
        # Copies: the next step takes the state's memory, and the loop goes on counting.
        arrays, loop = {name: np.array(leaf) for name, leaf in flatten(state).items()}, copy.deepcopy(dict(loop))

        def write() -> None:
            try:
                self._save(step, arrays, loop, metric)
            except CheckpointError as error:
                self._failed = error

        self._writing = threading.Thread(target=write, name=f"checkpoint {step}")
        self._writing.start()

    def wait(self) -> None:
        """Returns once no save is under way; `CheckpointError` if the last one failed, once."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _save(self, step: int, arrays: Mapping[str, Any], loop: Mapping[str, Any], metric: float | None) -> None:
        path = self.directory / str(step)
        faults.point("save.begin")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if path.exists():  # never committed, or this step again: the manifest is what counts
                shutil.rmtree(path)
            with _manager(self.directory, read_only=False) as manager:
                manager.save(step, args=_save_args(arrays, loop))
            faults.point("save.arrays")
            _write_manifest(path, step=step, arrays=arrays, metric=metric)
        except Exception as error:
            self._discard(path)
            raise CheckpointError(f"checkpoint {path} could not be written: {_reason(error, path, arrays)}") from error
        faults.point("save.committed")
        self._prune()

    def steps(self) -> list[int]:
        """Committed steps, oldest first; not verified yet."""
        return [step for step in self._present() if (self.directory / str(step) / MANIFEST).is_file()]

    def incomplete(self) -> list[int]:
        """Steps that were never committed, or whose manifest is gone, oldest first."""
        return sorted({*self._present()} - {*self.steps()})

    def _present(self) -> list[int]:
        """Whatever is named like a step, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", p.name))

    def restore_latest(self, *, layout: parallel.Layout | None = None) -> Restored | None:
        """The newest step that passes verification. Others are moved to `damaged/` and reported."""
        for step in reversed(self._present()):
            try:
                return self.restore(step, layout=layout)
            except CheckpointError as error:
                kept = self._set_aside(self.directory / str(step))
                self.report(f"{error}\nmoved to {kept}; going back to the checkpoint before it")
        return None

    def restore_first(self, steps: Iterable[int]) -> Restored | None:
        """The first of `steps` that passes verification. Others are reported and stay: for readers of a run."""
        for step in steps:
            try:
                return self.restore(step)
            except CheckpointError as error:
                self.report(f"{error}; trying another step")
        return None

    def restore(self, step: int, *, layout: parallel.Layout | None = None) -> Restored:
        """The step's arrays (NumPy, or placed by `layout`), every file and array verified.

        `CheckpointError` if the step is incomplete or damaged; `InputError` if this version or this process
        (64-bit arrays without `jax_enable_x64`) cannot hold it.
        """
        path = self.directory / str(step)
        manifest = _verified_manifest(path)
        try:
            with _manager(self.directory, read_only=True) as manager:
                items = manager.restore(step, args=_restore_args(manifest["arrays"]))
        except Exception as error:  # corruption raises many types
            raise CheckpointError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
        arrays = dict(items["state"])
        for name, entry in manifest["arrays"].items():
            if name not in arrays or _array_entry(arrays[name]) != entry:
                raise CheckpointError(f"checkpoint {path} is damaged: array {name} is not what was saved")
        if layout is not None:
            arrays = _placed(arrays, layout, path)
        return Restored(step, arrays, dict(items["loop"]), manifest["metric"], manifest["state_sha256"])

    def best_step(self) -> int | None:
        """The committed step with the highest metric, the earlier one of equals."""
        return next(iter(self._by_metric()), None)

    def _by_metric(self) -> list[int]:
        """Committed steps with a finite metric, the best first, the earlier one of equals first."""
        metrics = {step: _read_manifest(self.directory / str(step)).get("metric") for step in self.steps()}
        finite = {step: metric for step, metric in metrics.items() if metric is not None and math.isfinite(metric)}
        return sorted(finite, key=lambda step: -finite[step])

    def _prune(self) -> None:
        """Deletes what neither LatestN nor BestN keeps, and what a kill left of old ones, once a newer one counts."""
        steps = self.steps()
        keep = {*steps[-self.keep_latest :], *self._by_metric()[: self.keep_best]}
        for step in {step for step in self._present() if step < steps[-1]} - keep:
            self._discard(self.directory / str(step))

    def _discard(self, path: Path) -> None:
        """Removes a step and Orbax's temporary directories of it; without its manifest first, it never counts."""
        with contextlib.suppress(OSError):
            (path / MANIFEST).unlink(missing_ok=True)
        faults.point("save.discard")
        for leftover in self.directory.glob(f"{path.name}*"):
            if leftover.name == path.name or "tmp" in leftover.name:
                shutil.rmtree(leftover, ignore_errors=True)

    def _set_aside(self, path: Path) -> Path:
        self.damaged.mkdir(exist_ok=True)
        kept = self.damaged / f"{path.name}-{uuid.uuid4().hex[:8]}"
        path.rename(kept)
        return kept


def _manager(directory: Path, *, read_only: bool) -> Any:
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    alone = jax.process_index()  # several processes take turns by themselves: none waits for another here
    options = ocp.CheckpointManagerOptions(
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=alone, active_processes={alone}, barrier_sync_key_prefix=f"process{alone}"
        ),
        enable_async_checkpointing=False,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,  # a reader must not touch what a training process is writing
    )  # no limit on the number: ours prunes, after the manifest is written
    return ocp.CheckpointManager(directory, options=options, item_names=("state", "loop"))


def _save_args(arrays: Mapping[str, Any], loop: Mapping[str, Any]) -> Any:
    import orbax.checkpoint as ocp

    return ocp.args.Composite(state=ocp.args.StandardSave(dict(arrays)), loop=ocp.args.JsonSave(dict(loop)))


def _restore_args(entries: Mapping[str, Any]) -> Any:
    import orbax.checkpoint as ocp

    like = {name: np.empty(entry["shape"], np.dtype(entry["dtype"])) for name, entry in entries.items()}
    return ocp.args.Composite(state=ocp.args.StandardRestore(like), loop=ocp.args.JsonRestore())


def _placed(arrays: Mapping[str, np.ndarray], layout: parallel.Layout, path: Path) -> dict[str, jax.Array]:
    placed = layout.place(dict(arrays))
    for name, array in placed.items():
        if array.dtype != arrays[name].dtype:
            raise InputError(
                f"checkpoint {path} holds {name} as {arrays[name].dtype}, which JAX would cut to {array.dtype}:"
                " set jax_enable_x64, or --model.dtype as it was"
            )
    return placed


def _reason(error: Exception, path: Path, arrays: Mapping[str, Any]) -> str:
    """The first line of what went wrong; of a full disk also the bytes it has and those it lacks."""
    text = str(error).strip().splitlines()
    reason = text[0] if text else type(error).__name__
    if "no space left" in str(error).lower() or "quota" in str(error).lower():
        needed = sum(np.asarray(array).nbytes for array in arrays.values())
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            reason += f" ({free:,} bytes are free, {needed:,} are needed)"
    return reason


def _write_manifest(path: Path, *, step: int, arrays: Mapping[str, Any], metric: float | None) -> None:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    manifest = {
        "format": FORMAT,
        "step": step,
        "metric": metric,
        "state_sha256": state_sha256(arrays),
        "arrays": {name: _array_entry(array) for name, array in arrays.items()},
        "files": {str(p.relative_to(path)): _file_entry(p) for p in files},
    }
    manifest["manifest_sha256"] = json_sha256(manifest)
    for file in files:  # the manifest vouches for them: they must be on the disk before it is
        _fsync(file)
    faults.point("save.files")
    write_json(path / MANIFEST, manifest, before=lambda: faults.point("save.manifest"))
    _fsync(path)
    _fsync(path.parent)


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a step, or {} where there is none or it was altered."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = manifest.pop("manifest_sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}
    return manifest if json_sha256(manifest) == expected else {}


def _verified_manifest(path: Path) -> dict[str, Any]:
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"checkpoint {path} is not complete: it has no {MANIFEST}")
    manifest = _read_manifest(path)
    if not manifest:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} was altered")
    if manifest["format"] > FORMAT:
        raise InputError(
            f"checkpoint {path} has format {manifest['format']}, this version reads up to {FORMAT}: upgrade jaxcnn"
        )
    for name, entry in manifest["files"].items():
        file = path / name
        try:
            intact = _file_entry(file) == entry
        except FileNotFoundError:
            raise CheckpointError(f"checkpoint {path} is damaged: file {name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} is damaged: file {name}: {error.strerror}") from error
        if not intact:
            raise CheckpointError(f"checkpoint {path} is damaged: file {name} is not what was saved")
    return manifest


def _array_entry(array: Any) -> dict[str, Any]:
    array = np.asarray(array)
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": digest}


def _file_entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as f:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
