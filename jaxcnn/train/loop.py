"""The training loop: `fit` logs, evaluates and saves at stated intervals, and resumes to the same bits."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxcnn import faults, parallel, processes
from jaxcnn import metrics as metric_table
from jaxcnn.checkpoint import CheckpointError, Restored
from jaxcnn.data.loader import TrainFeed, batch_shapes, eval_batches, gather, train_feed
from jaxcnn.errors import InputError, TrainingFailed, unknown
from jaxcnn.losses import LossFn
from jaxcnn.metrics import Metric
from jaxcnn.signals import Stopped, StopRequest, stop_on_signals
from jaxcnn.train import log, rng
from jaxcnn.train.elastic import check_parts
from jaxcnn.train.record import Record
from jaxcnn.train.state import Prepare, Totals, TrainState, TrainStep, create_state
from jaxcnn.train.step import CLASSIFY, make_eval_step, make_train_step, scan_steps
from jaxcnn.tree import unflatten
from jaxcnn.types import Batch, PyTree

Arrays = tuple[np.ndarray, np.ndarray]
"""Inputs (n, h, w, c) and labels (n, ...)."""
Batches = Callable[[], Iterable[Batch]]
CALLS_UNDER_WAY = 2
"""Calls of the step that the device may have before it while the host goes on."""


@dataclass(frozen=True)
class FitResult:
    state: TrainState
    step: int
    selected_step: int
    """The step that was tested: the best by validation where there is a validation split, else the last."""
    variables: dict[str, PyTree]
    """Parameters and collections of the selected step (its moving average where there is one)."""
    test: dict[str, float]
    history: list[dict[str, Any]]
    seconds: float
    """Training and evaluation over all starts, compilation included."""
    unsaved: str | None
    """Why the last save failed, if it did."""


def fit(
    module: nn.Module,
    train: Arrays | Callable[[int], Batch],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch_size: int = 128,
    validation: Arrays | Batches | None = None,
    test: Arrays | Batches | None = None,
    seed: int = 0,
    loss_fn: LossFn = CLASSIFY,
    eval_loss_fn: LossFn | None = None,
    metrics: Mapping[str, Metric] = metric_table.CLASSIFICATION,
    select_by: str = "accuracy",
    prepare: Prepare | None = None,
    prepare_eval: Callable[[Batch], Batch] | None = None,
    learning_rate: optax.Schedule | None = None,
    ema_decay: float | None = None,
    accumulate: int = 1,
    early_stopping: int = 0,
    max_skipped: int = 20,
    log_every: int = 50,
    eval_every: int = 0,
    eval_batch_size: int = 1000,
    checkpoint_every: int = 500,
    keep_latest: int = 2,
    keep_best: int = 1,
    directory: str | Path | None = None,
    variables: Mapping[str, PyTree] | None = None,
    mesh: Mesh | None = None,
    fsdp: bool = False,
    parallel_mode: Literal["jit", "pmap"] = "jit",
    shards: int = 0,
    steps_per_call: int = 1,
    tensorboard: bool = False,
    quiet: bool = False,
    asynchronous_saves: bool = False,
    profile: tuple[int, int] | None = None,
    record: Record | None = None,
    on_evaluation: Callable[[int, dict[str, float]], None] | None = None,
) -> FitResult:
    """Trains `module` for `steps` and returns the final state and what was measured.

    `train` is a pair of arrays (n, h, w, c) and (n,), or a function of the step that gives a batch. With a
    `directory` the run logs to `metrics.jsonl`, saves checkpoints there, and a second call goes on from the newest
    verified one, to the same bits as without the stop; one run at a time, which the command line sees to. Its
    checkpoints are written beside the training with `asynchronous_saves`, and a trace of JAX's profiler between the
    steps of `profile`. A `record` stands in its place.
    `validation` is evaluated every `eval_every` steps, and the checkpoint with the highest `select_by` (the lowest
    loss) is the one that is tested; without it `test` is evaluated then, and selects nothing. `prepare` augments and
    normalises training batches inside the step, `prepare_eval` normalises evaluation batches. `learning_rate` is
    only logged. With `shards` the result does not depend on the number of devices (`jaxcnn.train.elastic`), with `fsdp`
    each device keeps a part of the state (`parallel.Layout`).
    `on_evaluation(step, result)` hears of each evaluation during training, in order, once the step's
    line and checkpoint are written; a resumed run tells it of the earlier ones first. It may raise, which ends the
    run after a save.

    Raises `InputError` before compiling, `TrainingFailed` after `max_skipped` consecutive non-finite steps,
    `Stopped` after SIGTERM or Ctrl-C once the state is saved.
    """
    mesh = mesh or parallel.make_mesh()
    if steps < 0:
        raise InputError(f"steps {steps} must not be negative")
    _check(
        {"log_every": (log_every, 1), "checkpoint_every": (checkpoint_every, 1), "eval_every": (eval_every, 0)}
        | {"steps_per_call": (steps_per_call, 1), "accumulate": (accumulate, 1), "max_skipped": (max_skipped, 1)}
    )
    if validation is not None and select_by not in ("loss", *metrics):
        raise unknown("metric to select by", select_by, ["loss", *metrics])
    if early_stopping and not (validation is not None and eval_every):
        raise InputError("early stopping needs a validation split and eval_every")
    if shards and (accumulate > 1 or steps_per_call > 1 or parallel_mode == "pmap"):
        raise InputError(f"shards {shards} divide the batch: give neither accumulate nor steps_per_call nor pmap")
    if fsdp and (shards or parallel_mode == "pmap"):
        raise InputError("fsdp divides the state over the devices, which shards and pmap need on each of them")
    check_parts(batch_size, devices=mesh.size, accumulate=accumulate, shards=shards)
    feed = train if callable(train) else train_feed(*train, batch_size=batch_size, seed=seed, mesh=mesh)
    resident = isinstance(feed, TrainFeed) and feed.store is not None
    if steps_per_call > 1 and (parallel_mode == "pmap" or not resident):
        raise InputError("steps_per_call > 1 needs jit and a training set that lives on the devices; use 1")
    first = train(0) if callable(train) else batch_shapes(*train, batch_size=batch_size, mesh=mesh)
    sample = example(first, prepare)
    step = make_train_step(
        module,
        optimizer=optimizer,
        loss_fn=loss_fn,
        metrics=metrics,
        prepare=prepare,
        ema_decay=ema_decay,
        accumulate=accumulate,
        shards=shards,
        mesh=mesh,
        fsdp=fsdp,
        parallel_mode=parallel_mode,
    )
    eval_step = make_eval_step(
        module, loss_fn=eval_loss_fn or loss_fn, metrics=metrics, prepare=prepare_eval, shards=shards, mesh=mesh
    )
    with jax.set_mesh(mesh), stop_on_signals() as stop:
        loop = _Loop(
            step=step,
            eval_step=eval_step,
            feed=feed,
            stop=stop,
            steps=steps,
            batch_size=batch_size,
            validation=_batches(validation, eval_batch_size, mesh, shards),
            test=_batches(test, eval_batch_size, mesh, shards),
            seed=seed,
            select_by=select_by,
            learning_rate=learning_rate,
            early_stopping=early_stopping,
            max_skipped=max_skipped,
            log_every=log_every,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            steps_per_call=steps_per_call,
            layout=parallel.Layout(mesh, fsdp),
            profile=profile,
            on_evaluation=on_evaluation,
        )
        loop.heed()
        loop.state = create_state(
            module,
            optimizer=optimizer,
            sample=sample,
            seed=seed,
            ema=ema_decay is not None,
            mesh=mesh,
            fsdp=fsdp,
            variables=variables,
        )
        record = record or Record(
            None if directory is None else Path(directory).absolute(),
            keep_latest=keep_latest,
            keep_best=keep_best,
            asynchronous=asynchronous_saves,
        )
        try:
            return loop.run(record, tensorboard=tensorboard, quiet=quiet)
        finally:
            if not callable(train):
                feed.close()


def _check(values: Mapping[str, tuple[int, int]]) -> None:
    for name, (value, low) in values.items():
        if value < low:
            raise InputError(f"{name} {value} must be at least {low}")


def example(batch: Batch, prepare: Prepare | None) -> jax.ShapeDtypeStruct:
    """Shape and type of the model's input, one example, of a training batch or its shapes; nothing runs."""
    ready = prepare or (lambda batch, key: gather(batch))
    image = jax.eval_shape(lambda batch: ready(batch, rng.stream(0, "augment")), batch)["image"]
    return jax.ShapeDtypeStruct((1, *image.shape[1:]), image.dtype)


def _batches(data: Arrays | Batches | None, batch_size: int, mesh: Mesh, shards: int) -> Batches | None:
    if data is None or callable(data):
        return data
    return eval_batches(*data, batch_size=batch_size, mesh=mesh, shards=shards)


EvalStep = Callable[[Mapping[str, PyTree], Batch], Totals]


def evaluate(
    eval_step: EvalStep,
    variables: Mapping[str, PyTree],
    batches: Iterable[Batch],
    *,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means over every example once, and `count`, an int; with an accuracy also `correct`, an int.

    Sums and counts are added on the host and divided once: the size of the batches does not matter.
    `check` is called between batches and may raise.
    """
    totals = metric_table.Totals()
    for batch in batches:
        check()
        totals.add(eval_step(variables, batch))
    return totals.result()


@dataclass
class _Loop:
    """The position of one run: `state` on the devices and, beside it, what has been said about it."""

    step: TrainStep
    eval_step: EvalStep
    feed: Callable[[int], Batch]
    stop: StopRequest
    steps: int
    batch_size: int
    validation: Batches | None
    test: Batches | None
    seed: int
    select_by: str
    learning_rate: optax.Schedule | None
    early_stopping: int
    max_skipped: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    steps_per_call: int
    layout: parallel.Layout
    profile: tuple[int, int] | None
    on_evaluation: Callable[[int, dict[str, float]], None] | None

    state: TrainState = field(init=False)
    at: int = 0
    logged: int = 0
    evaluated: int = 0
    in_a_row: int = 0
    seconds_before: float = 0.0
    best_step: int = -1
    best_variables: dict[str, PyTree] = field(default_factory=dict)
    score: float | None = None
    saved: int = -1
    told: int = 0
    unsaved: str | None = None
    waited: float = 0.0
    stalled: float = 0.0
    tracing: bool = False

    def __post_init__(self) -> None:
        self.agreed = processes.Agreement(self.layout.mesh) if processes.several() else None

    def run(self, record: Record, *, tensorboard: bool, quiet: bool) -> FitResult:
        self.window = metric_table.Totals()
        self.pending: list[tuple[int, Totals]] = []
        self.record, path = record, record.directory
        restored = record.restore(self.layout)
        record.begin(0 if restored is None else self._resume(restored))
        wanted = tensorboard and processes.first()
        self.writer = log.tensorboard().SummaryWriter(str(path / "tensorboard")) if wanted and path else None
        self.started = time.monotonic()
        self.progress = log.Progress(self.steps, start=self.at, quiet=quiet or not processes.first())
        try:
            if self.at:
                self.progress.say(f"going on from step {self.at} of {self.steps}")
            self._train()
            return self._finish()
        finally:
            self._end_trace()
            self._settle()
            self.progress.close()
            record.close()
            if self.writer:
                self.writer.close()

    def _resume(self, restored: Restored) -> int:
        """Takes over a checkpoint; the number of log lines that it stands on."""
        like = jax.eval_shape(lambda: self.state)
        self.state = unflatten(like, restored.arrays, what="checkpoint's arrays")
        faults.point("restore")
        loop = restored.loop
        self.at = self.saved = restored.step
        self.logged, self.evaluated = loop["logged"], loop["evaluated"]
        self.in_a_row, self.best_step = int(self.state.counters["skipped_in_a_row"]), loop["best_step"]
        self.seconds_before = loop["seconds"]
        self.window.sums, self.window.counts = dict(loop["sums"]), dict(loop["counts"])
        return loop["lines"]

    def heed(self, *, lag: int = 0) -> None:
        """Raises `Stopped` if a signal came, to any of the processes: all of them stop at the same step."""
        if self.agreed is None:
            return self.stop.check()
        if signum := self.agreed(self.stop.signum or 0, lag=lag):
            raise Stopped(signum)

    def _train(self) -> None:
        many = scan_steps(self.step) if self.steps_per_call > 1 else self.step
        self.clock, self.clock_step, first = time.monotonic(), self.at, True
        self._boundary()
        while self.at < self.steps and not self._stopped_early():
            n = self.steps_per_call if self._next_boundary() - self.at >= self.steps_per_call else 1
            self._trace()
            began = time.monotonic()
            batch = self.feed(self.at, steps=n) if n > 1 else self.feed(self.at)  # type: ignore[call-arg]
            self.waited += time.monotonic() - began
            self.state, totals = (many if n > 1 else self.step)(self.state, batch, np.uint32(self.seed))
            self.pending.append((n, totals))
            self.at += n
            if first:  # compiled by now
                jax.block_until_ready(totals)
                self.clock, self.clock_step, self.waited, first = time.monotonic(), self.at, 0.0, False
            # A stop is heeded soon, and the device still never waits for the host.
            jax.block_until_ready(self.pending[max(0, len(self.pending) - 1 - CALLS_UNDER_WAY)][1])
            self.progress.step(self.at)
            self._boundary()
        if self.logged < self.at:  # stopped early, between two lines
            self._log_line()
        self._save_now()

    def _trace(self) -> None:
        """Starts and stops the profiler where its window does."""
        if self.profile is None or self.record.directory is None:
            return
        first, last = self.profile
        if not self.tracing and first <= self.at < last:
            jax.profiler.start_trace(str(self.record.directory / "profile"))
            self.tracing = True
        elif self.tracing and self.at >= last:
            self._end_trace()

    def _end_trace(self) -> None:
        if self.tracing:
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
            self.tracing = False

    def _next_boundary(self) -> int:
        every = [n for n in (self.log_every, self.eval_every, self.checkpoint_every) if n]
        watched = (step for step in self.record.watched if step > self.at)
        return min(self.steps, *((self.at // n + 1) * n for n in every), *watched)

    def _boundary(self) -> None:
        """What is due at this step, in this order: line, evaluation, checkpoint; then a stop that was asked for."""
        end = self.at == self.steps
        if (self.at % self.log_every == 0 or end) and self.logged < self.at:
            self._log_line()
        monitored, watched = self.validation or self.test, self.at in self.record.watched
        due = self.eval_every and self.at % self.eval_every == 0
        due = self.validation is not None if end else due  # the test split has its own line at the end
        try:
            if monitored is not None and due and self.evaluated < self.at:
                if watched:
                    self.save()
                self._evaluate(monitored)
            if watched or (self.at and (self.at % self.checkpoint_every == 0 or self.best_step == self.at)):
                self.save()
            self._tell()
            self.heed(lag=0 if jax.default_backend() == "cpu" else CALLS_UNDER_WAY)
        except Stopped:
            self._save_now()
            raise

    def _tell(self) -> None:
        """Tells `on_evaluation` of the evaluations in the log that it has not heard of."""
        if self.on_evaluation is None:
            return
        prefix = f"{self._split}_"
        for line in self.record.history[self.told :]:
            self.told += 1
            if f"{prefix}loss" not in line or "selected_step" in line:  # the latter: the last test, of a finished run
                continue
            result = {k.removeprefix(prefix): float("nan") if v is None else v for k, v in line.items() if k != "step"}
            try:
                self.on_evaluation(line["step"], result)
            except BaseException:
                self._save_now()
                raise

    def _drain(self) -> None:
        """Adds the totals of finished calls to the window, in the order of their steps."""
        step = self.at - sum(n for n, _ in self.pending)
        for n, totals in self.pending:
            totals = jax.device_get(totals) if n > 1 else totals
            for i in range(n):
                step += 1
                one = jax.tree.map(lambda x, i=i: x[i], totals) if n > 1 else totals
                self.window.add(one)
                self.in_a_row = self.in_a_row + 1 if one["skipped"].sum else 0
                if self.in_a_row >= self.max_skipped:
                    self.pending.clear()
                    raise TrainingFailed(
                        f"loss or gradient was not finite in {self.in_a_row} consecutive steps,"
                        f" {step - self.in_a_row + 1} to {step}: each was skipped, so the state is that of step"
                        f" {step - self.in_a_row}; lower the learning rate, clip gradients or look at these batches"
                    )
        self.pending.clear()

    def _log_line(self) -> None:
        self._drain()
        window, self.window = self.window, metric_table.Totals()
        means = {k: window.sums[k] / n if n else float("nan") for k, n in window.counts.items() if k != "skipped"}
        now = time.monotonic()
        steps, seconds = self.at - self.clock_step, now - self.clock
        line: dict[str, Any] = {"step": self.at, "loss": means.pop("loss"), **means}
        if examples := getattr(self.feed, "examples", None):
            line["epoch"] = round(self.at * self.batch_size / examples, 4)
        if self.learning_rate is not None:
            updates = self.at - 1 - int(self.state.counters["skipped"])  # a skipped step is none for the optimiser
            line["learning_rate"] = float(np.asarray(self.learning_rate(updates)))
        if window.sums["skipped"]:
            line["skipped"] = int(window.sums["skipped"])
        line["images_per_second"] = round(steps * self.batch_size / seconds, 1) if steps else None
        line["data_seconds"], line["checkpoint_seconds"] = round(self.waited, 3), round(self.stalled, 3)
        line["seconds"] = round(self._seconds(), 3)
        self.waited = self.stalled = 0.0
        self.clock, self.clock_step, self.logged = now, self.at, self.at
        self._write(line, eta=(self.steps - self.at) * seconds / steps if steps else None)

    def _write(self, line: dict[str, Any], *, eta: float | None = None) -> None:
        self.record.write(line)
        self.progress.line(line, eta=eta)
        if self.writer:
            for key, value in line.items():
                if isinstance(value, int | float) and key != "step":
                    self.writer.add_scalar(key, value, line["step"])

    def _evaluate(self, batches: Batches) -> None:
        """Evaluates the monitored split; with a validation split, keeps the score and early stopping's patience."""
        began = time.monotonic()
        result = evaluate(self.eval_step, self.state.variables(), batches(), check=self.heed)
        self._write({"step": self.at, **{f"{self._split}_{name}": value for name, value in result.items()}})
        self.evaluated = self.at
        self.clock += time.monotonic() - began  # not training time
        if self.validation is None:
            return
        sign = -1 if self.select_by == "loss" else 1
        self.score = sign * float(np.float32(result[self.select_by]))  # as the counters keep it: equal must stay equal
        counters = dict(self.state.counters)
        better = self.score > float(counters["best"])
        if better:
            self.best_step = self.at
            if self.record.directory is None:
                self.best_variables = jax.device_get(parallel.whole(self.state.variables()))
        waited = 0 if better else int(counters["evaluations_without_best"]) + 1
        new = {"best": np.float32(self.score if better else counters["best"])}
        new["evaluations_without_best"] = np.int32(waited)  # type: ignore[assignment]
        self.state = self.state.replace(  # type: ignore[attr-defined]
            counters=counters | self.layout.place(new)
        )
        self.saved = -1  # a checkpoint of this step, made when a stop cut the evaluation short, lacks all this

    @property
    def _split(self) -> str:
        return "test" if self.validation is None else "validation"

    def _stopped_early(self) -> bool:
        if not self.early_stopping or self.evaluated < self.at:
            return False
        return int(self.state.counters["evaluations_without_best"]) >= self.early_stopping

    def save(self) -> None:
        """A checkpoint of this step, unless it has one. A failure is reported and the run goes on."""
        if self.record.directory is None:
            return
        saved = processes.from_first(lambda: self.saved)  # the others do not hear of a save that failed
        if saved == self.at and self.at not in self.record.watched:
            return
        began = time.monotonic()
        self._drain()
        self._settle()
        beside = {
            "logged": self.logged,
            "evaluated": self.evaluated,
            "best_step": self.best_step,
            "sums": self.window.sums,
            "counts": self.window.counts,
            "seconds": self._seconds(),
        }
        metric = self.score if self.validation is not None and self.evaluated == self.at else None
        try:
            self.record.save(self.at, self.state, loop=beside, metric=metric)
        except (CheckpointError, OSError) as error:
            self._not_saved(error)
        else:
            self.unsaved, self.saved = None, self.at
        seconds = time.monotonic() - began
        self.stalled += seconds
        self.clock += seconds  # not training time

    def _settle(self) -> None:
        """Hears what became of a save under way."""
        try:
            self.record.settle()
        except CheckpointError as error:
            self._not_saved(error)

    def _not_saved(self, error: Exception) -> None:
        self.unsaved, self.saved = str(error), -1
        self.progress.warn(f"{error}; training goes on and tries again at the next checkpoint")

    def _save_now(self) -> None:
        """A checkpoint of this step that is complete on return, if it can be."""
        self.save()
        self._settle()
        self.save()  # once more, where that one failed
        self._settle()

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _finish(self) -> FitResult:
        """Tests the selected step once and closes the log."""
        selected, variables = self.at, self.state.variables()
        if self.validation is not None and self.best_step not in (-1, self.at):
            selected, variables = self._best(variables)
        result: dict[str, float] = {}
        if self.test is not None:
            result = evaluate(self.eval_step, variables, self.test(), check=self.heed)
            named = {f"test_{name}": value for name, value in result.items()}
            self._write({"step": self.at, "selected_step": selected, **named})
        return FitResult(
            state=self.state,
            step=self.at,
            selected_step=selected,
            variables=variables,
            test=result,
            history=self.record.history,
            seconds=self._seconds(),
            unsaved=self.unsaved,
        )

    def _best(self, fallback: dict[str, PyTree]) -> tuple[int, dict[str, PyTree]]:
        if self.record.directory is None:
            return self.best_step, self.best_variables
        try:
            arrays = self.record.restore_step(self.best_step, self.layout).arrays
        except CheckpointError as error:
            self.progress.warn(f"{error}; testing the last step instead of the best one")
            return self.at, fallback
        state = unflatten(jax.eval_shape(lambda: self.state), arrays, what="checkpoint's arrays")
        return self.best_step, state.variables()
