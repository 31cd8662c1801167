"""Many seeds of one small network: trained in one program, or one after another by one program, and summed up."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcnn import metrics as metric_table
from jaxcnn import parallel
from jaxcnn.data.loader import TrainFeed, batch_shapes, eval_batches, train_feed
from jaxcnn.errors import InputError
from jaxcnn.losses import LossFn
from jaxcnn.metrics import Metric, Totals
from jaxcnn.spread import Spread, spread
from jaxcnn.train.log import Progress
from jaxcnn.train.loop import Arrays, example
from jaxcnn.train.state import Prepare, TrainState, state_maker
from jaxcnn.train.step import CLASSIFY, make_eval_step, make_train_step
from jaxcnn.types import Array, Batch, PyTree

Line = dict[str, Any]
"""`step`, and under every other name a value for each seed: float64 (s,)."""


@dataclass(frozen=True)
class SeedsResult:
    """s runs that differ in their seed alone. `test` and every line of `history` keep them in the order of `seeds`."""

    seeds: tuple[int, ...]
    test: dict[str, np.ndarray]
    """What `evaluate` gives for the last step, (s,) each; empty without test data."""
    history: list[Line]
    """A line of training means every `log_every` steps (`loss`, `accuracy`, ...), one of the test split every
    `eval_every` (`test_loss`, ...)."""
    skipped: np.ndarray
    """int (s,): steps whose loss or result was not finite, each skipped whole."""
    variables: dict[str, PyTree]
    """Parameters and collections at the end (the moving average where there is one), on the host: leaves (s, ...)."""
    together: int
    """Seeds in one program."""
    seconds: float

    def spread(self, metric: str = "accuracy") -> Spread:
        """Of the test split at the end; `InputError` for a metric that was not measured."""
        if metric not in self.test:
            raise InputError(
                f"no {metric!r} was tested: it is one of {', '.join(self.test) or 'none, without test data'}"
            )
        return spread(self.test[metric].tolist())

    def each(self) -> list[dict[str, PyTree]]:
        """The variables of every seed."""
        return [jax.tree.map(lambda leaf, i=i: leaf[i], self.variables) for i in range(len(self.seeds))]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps (t,), values (t, s)) of the lines of `history` that have `name`, such as "test_accuracy"."""
        lines = [line for line in self.history if name in line]
        values = [line[name] for line in lines]
        return np.array([line["step"] for line in lines], int), np.reshape(values, (len(lines), len(self.seeds)))


def fit_seeds(
    module: nn.Module,
    train: Arrays,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    seeds: Sequence[int],
    batch_size: int = 128,
    test: Arrays | None = None,
    loss_fn: LossFn = CLASSIFY,
    eval_loss_fn: LossFn | None = None,
    metrics: Mapping[str, Metric] = metric_table.CLASSIFICATION,
    prepare: Prepare | None = None,
    prepare_eval: Callable[[Batch], Batch] | None = None,
    ema_decay: float | None = None,
    accumulate: int = 1,
    log_every: int = 50,
    eval_every: int = 0,
    eval_batch_size: int = 1000,
    together: int | None = None,
    quiet: bool = False,
) -> SeedsResult:
    """What `fit` does with each of `seeds`, on one device, without checkpoints: same start, order of examples, draws.

    `together` seeds are trained in one program (`jax.vmap` over the training step), then the next ones. By default
    all are on an accelerator, which a small network alone leaves idle; on a CPU it is one at a time, in the same
    compiled program, which is `fit` bit by bit: kernels that differ from example to example are slow there. Together
    a seed equals its own run within rounding. A seed that diverges has its steps skipped and does not stop the others.

    Raises:
        InputError: no seeds, or the same one twice; numbers out of range; what `fit` raises.
    """
    seeds = tuple(int(seed) for seed in seeds)
    together = together or (1 if jax.default_backend() == "cpu" else len(seeds))
    _check(seeds, steps=steps, together=together, log_every=log_every, eval_every=eval_every)
    mesh = parallel.make_mesh(jax.devices()[:1])
    parallel.check_divisible(batch_size, devices=1, accumulate=accumulate)
    feed = train_feed(*train, batch_size=batch_size, seed=seeds[0], mesh=mesh, resident=True)
    options = {"loss_fn": loss_fn, "metrics": metrics, "prepare": prepare, "ema_decay": ema_decay, "mesh": mesh}
    step = make_train_step(module, optimizer=optimizer, accumulate=accumulate, **options)
    eval_step = make_eval_step(module, loss_fn=eval_loss_fn or loss_fn, metrics=metrics, prepare=prepare_eval)

    def indexed(state: TrainState, indices: Array, seed: Array, store: PyTree) -> Any:
        return step(state, {"store": store, "indices": indices}, seed)

    sample = example(batch_shapes(*train, batch_size=batch_size, mesh=mesh), prepare)
    many = _Many(
        start=state_maker(module, optimizer=optimizer, sample=sample, ema=ema_decay is not None, mesh=mesh),
        step=jax.jit(_over_seeds(indexed, together), donate_argnums=0),
        eval_step=jax.jit(_over_seeds(eval_step, together)),
        feed=feed,
        test=None if test is None else eval_batches(*test, batch_size=eval_batch_size, mesh=mesh),
        steps=steps,
        log_every=log_every,
        eval_every=eval_every,
        progress=Progress(steps * len(seeds) // together, quiet=quiet, what=f"{len(seeds)} seeds"),
    )
    begun = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            parts = [many.run(seeds[i : i + together], i // together) for i in range(0, len(seeds), together)]
    finally:
        many.progress.close()
    joined = jax.tree.map(lambda *x: np.concatenate(x) if isinstance(x[0], np.ndarray) else x[0], *parts)
    return SeedsResult(seeds, **joined._asdict(), together=together, seconds=time.monotonic() - begun)


def _check(seeds: tuple[int, ...], *, steps: int, together: int, log_every: int, eval_every: int) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**32:
        raise InputError(f"seeds {seeds}: expected at least one, each from 0 to 2**32 - 1, none of them twice")
    if not 1 <= together <= len(seeds) or len(seeds) % together:
        raise InputError(f"together {together}: expected a divisor of the number of seeds, {len(seeds)}")
    if steps < 1 or log_every < 1 or eval_every < 0:
        raise InputError(f"steps {steps}, log_every {log_every}, eval_every {eval_every}: expected 1, 1 and 0 or more")


def _over_seeds(function: Callable[..., Any], n: int) -> Callable[..., Any]:
    """`function(*args, shared)` with a leading axis of n seeds on every one of `args` and on the result."""

    def many(*given: Any) -> Any:
        *args, shared = given
        if n > 1:
            return jax.vmap(lambda *args: function(*args, shared))(*args)
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], args), shared))

    return many


class _Part(NamedTuple):
    """The runs of a few seeds in one program, as in `SeedsResult`."""

    test: dict[str, np.ndarray]
    history: list[Line]
    skipped: np.ndarray
    variables: dict[str, PyTree]


@dataclass
class _Many:
    """The compiled program and what it runs on; the same for every group of seeds."""

    start: Callable[[int], TrainState]
    step: Callable[..., Any]
    eval_step: Callable[..., Any]
    feed: TrainFeed
    test: Callable[[], Iterable[Batch]] | None
    steps: int
    log_every: int
    eval_every: int
    progress: Progress

    def run(self, seeds: Sequence[int], group: int) -> _Part:
        """Trains `seeds`; `group` others of their number were trained before."""
        feeds = [dataclasses.replace(self.feed, seed=seed) for seed in seeds]
        states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[self.start(seed) for seed in seeds])
        keys, history, before = np.array(seeds, np.uint32), [], group * self.steps
        pending: list[Any] = []
        begun = time.monotonic()
        for at in range(1, self.steps + 1):
            rows = np.stack([feed.indices(at - 1) for feed in feeds])
            states, totals = self.step(states, rows, keys, self.feed.store)
            pending.append(totals)
            jax.block_until_ready(pending[max(0, len(pending) - 3)])  # the host stays at most two steps ahead
            if at % self.log_every == 0 or at == self.steps:
                history.append({"step": at, **_means(pending)})
                pending.clear()
                self._show(history[-1], before, (time.monotonic() - begun) / at)
            if self.test is not None and self.eval_every and at % self.eval_every == 0 and at < self.steps:
                history.append(self._tested(at, states))
                self._show(history[-1], before, (time.monotonic() - begun) / at)
            self.progress.step(before + at)
        test: dict[str, np.ndarray] = {}
        if self.test is not None:
            history.append(self._tested(self.steps, states))
            test = {name.removeprefix("test_"): value for name, value in history[-1].items() if name != "step"}
        skipped = np.asarray(states.counters["skipped"])
        return _Part(test, history, skipped, jax.device_get(states.variables()))

    def _tested(self, at: int, states: TrainState) -> Line:
        assert self.test is not None
        variables, totals = states.variables(), [Totals() for _ in states.step]
        for batch in self.test():
            found = jax.device_get(self.eval_step(variables, batch))
            for i, one in enumerate(totals):
                one.add(jax.tree.map(lambda x, i=i: x[i], found))
        results = [one.result() for one in totals]
        return {"step": at} | {f"test_{name}": np.array([result[name] for result in results]) for name in results[0]}

    def _show(self, line: Line, before: int, seconds_a_step: float) -> None:
        """The means over the seeds under way."""
        names = [name for name in line if name.removeprefix("test_") in ("loss", "accuracy")]
        shown = {"step": before + line["step"]} | {name: float(line[name].mean()) for name in names}
        self.progress.line(shown, eta=(self.progress.steps - shown["step"]) * seconds_a_step)


def _means(pending: Sequence[Mapping[str, Any]]) -> Line:
    """The sum of each metric over its count, (s,); NaN where every step was skipped."""
    totals = jax.device_get(pending)
    line = {}
    for name in totals[0]:
        if name != "skipped":
            sums, counts = (np.sum([np.float64(one[name][i]) for one in totals], 0) for i in (0, 1))
            line[name] = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return line
