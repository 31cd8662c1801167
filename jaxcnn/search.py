"""Hyper-parameter search: random draws from ranges, coarse to fine, with early stopping of bad trials (row L12).

Needs Optuna, the extra `search`. A user's own module goes through without being registered anywhere:

    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x, *, train):
            x = nn.relu(nn.Conv(self.width, (3, 3), strides=2)(x))
            return nn.Dense(10)(x.mean((1, 2)))

    def objective(params, report):
        result = fit(
            Net(params["width"]), train, validation=validation, optimizer=optax.adam(params["rate"]), steps=300,
            eval_every=100, on_evaluation=lambda step, means: report(step, means["accuracy"]), quiet=True,
        )
        return max(line.get("validation_accuracy", 0) for line in result.history)

    space = {"rate": LogUniform(1e-4, 1), "width": Choice((8, 16, 32))}
    found = search(objective, space, trials=20, rounds=2, directory="checkpoints/my_search")
    print(found.best.params, found.best.score)
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxcnn.config import Scalar, differences
from jaxcnn.errors import InputError, TrainingFailed, unknown
from jaxcnn.files import replacing, write_json
from jaxcnn.signals import StopRequest, stop_on_signals


@dataclass(frozen=True)
class _Interval:
    low: Any
    high: Any

    def __post_init__(self):
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"{self}: expected two finite numbers, the lower one first")


class Uniform(_Interval):
    """Real numbers from `low` to `high`, every interval as likely as another of its length."""


class LogUniform(_Interval):
    """Positive numbers from `low` to `high`, every decade as likely as another: for learning rates and decays."""

    def __post_init__(self):
        super().__post_init__()
        if self.low <= 0:
            raise InputError(f"{self}: a range on the log scale must be above 0")


class IntUniform(_Interval):
    """Whole numbers from `low` to `high`, both included."""

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.low, int) and isinstance(self.high, int)):
            raise InputError(f"{self}: both ends must be whole numbers")


@dataclass(frozen=True)
class Choice:
    """One of `values`; rounds do not narrow it, since values without an order have no neighbours."""

    values: Sequence[Scalar]

    def __post_init__(self):
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values or len(set(self.values)) < len(self.values):
            raise InputError(f"{self}: give at least one value, each once")
        if not all(isinstance(value, bool | int | float | str) for value in self.values):
            raise InputError(f"{self}: values must be numbers, texts or booleans, which a file can hold")


Range = Uniform | LogUniform | IntUniform | Choice
Space = Mapping[str, Range]


@dataclass(frozen=True)
class Trial:
    """A finished trial. Two are equal when all but their durations are."""

    number: int
    params: dict[str, Scalar]
    state: Literal["complete", "stopped", "failed"]
    score: float | None
    """What the objective returned, higher is better; of a stopped trial the last report. None, of a failed trial, is
    worse than any number."""
    reports: tuple[tuple[int, float], ...] = ()
    """(step, score) of every report."""
    reason: str = ""
    """Why it was stopped or failed."""
    seconds: float = field(default=0.0, compare=False)
    """In the process that finished it."""


@dataclass(frozen=True)
class SearchResult:
    space: dict[str, Range]
    trials: tuple[Trial, ...]

    @property
    def ranked(self) -> list[Trial]:
        """Complete trials, then stopped, then failed ones; best first, the earlier one of equals."""
        return sorted(self.trials, key=_rank)

    @property
    def best(self) -> Trial:
        """Raises `TrainingFailed` where no trial was completed."""
        first = self.ranked[0]
        if first.state != "complete":
            raise TrainingFailed(f"none of {len(self.trials)} trials was completed; one of them: {first.reason}")
        return first


def _rank(trial: Trial) -> tuple[int, float, int]:
    score = -math.inf if trial.score is None else trial.score
    return ("complete", "stopped", "failed").index(trial.state), -score, trial.number


class TrialStopped(Exception):
    """Raised by `report` in a trial that promises nothing; it ends the trial, not the search."""


class Report:
    """`report(step, score)` hears how the trial of the number `trial` does, higher is better, at growing steps.

    Raises `TrialStopped` where the trial should end, `TrainingFailed` for a score that is not finite, `Stopped` after
    SIGTERM or Ctrl-C.
    """

    def __init__(self, trial: Any, stop: StopRequest):
        self.trial: int = trial.number
        self.reports: list[tuple[int, float]] = []
        self.bad = False
        self._optuna, self._stop = trial, stop

    def __call__(self, step: int, score: float) -> None:
        if self.reports and step <= self.reports[-1][0]:
            raise InputError(f"step {step} reported after step {self.reports[-1][0]}: steps must grow")
        self.reports.append((int(step), _finite(score, f"at step {step}")))
        self._optuna.report(self.reports[-1][1], self.reports[-1][0])
        if self._optuna.should_prune():
            self.bad = True
            raise TrialStopped
        self._stop.check()


Objective = Callable[[dict[str, Any], Report], float]


def _finite(score: Any, where: str = "") -> float:
    try:
        score = float(score)
    except (TypeError, ValueError):
        raise InputError(f"the objective gave {score!r} as a score: expected a number, higher is better") from None
    if not math.isfinite(score):
        raise TrainingFailed(f"score {score} {where}".strip())
    return score


def search(
    objective: Objective,
    space: Space,
    *,
    trials: int,
    seed: int = 0,
    directory: str | os.PathLike | None = None,
    rounds: int = 1,
    pruner: Literal["median", "halving", "none"] = "median",
    about: Mapping[str, Any] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> SearchResult:
    """Calls `objective(params, report)` for `trials` draws from `space`; the objective returns a score to maximise.

    Trials are shared out evenly over `rounds`. Each round after the first draws from ranges half as wide as those of
    the round before, on the log scale where they are log-uniform: around the mean of the best quarter of the complete
    trials, with the best one inside, within the bounds of `space`. `report(step, score)` may stop a trial: `median`
    where its best report so far is below the median report of the complete trials at this step, once there are five;
    `halving` by asynchronous successive halving (Li et al. 2020), with steps as the resource. A trial that
    raises `TrainingFailed` or whose score is not finite is recorded as failed, below all others.

    The parameters of trial i are a function of (seed, i, results of the trials before). With a `directory` each
    finished trial is a line of `trials.jsonl` there before the next one begins, and a second call goes on behind the
    last line and ends as one call would have, provided that the objective gives the same scores again: the trial that
    was cut short is begun anew, so an objective that goes on from a checkpoint of its own (in a directory named by
    `report.trial`, say) must make its earlier reports again, as `fit` does. More trials may be asked for where
    `rounds` is 1; `about` is anything else, in JSON's types, that has to be the same. `on_trial` hears of each trial
    once it is recorded.

    Raises `InputError` for bad ranges, for a directory of another search or in use, and without Optuna; `Stopped`
    after SIGTERM or Ctrl-C. Any other exception of the objective ends the search, which keeps its finished trials.
    """
    try:
        import optuna
    except ImportError:
        raise InputError('the search needs Optuna: pip install "jaxcnn[search]"') from None
    if not space:
        raise InputError("the space is empty: give at least one parameter and its range")
    if not 1 <= rounds <= min(trials, 30):  # beyond, ranges are as narrow as numbers can tell apart
        raise InputError(f"{trials} trials in {rounds} rounds: at most 30, every round with at least one trial")
    if seed < 0:
        raise InputError(f"seed {seed} must not be negative")
    # With several rounds the number of trials decides which ranges a trial is drawn from.
    header = {
        "space": {name: {"kind": type(given).__name__, **vars(given)} for name, given in space.items()},
        "seed": seed,
        "rounds": rounds,
    }
    header |= {"trials": trials if rounds > 1 else None, "pruner": pruner, **(about or {})}
    quiet = optuna.logging.get_verbosity()
    with contextlib.ExitStack() as stack:
        record = stack.enter_context(_record(directory, header))
        stop = stack.enter_context(stop_on_signals())
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        stack.callback(optuna.logging.set_verbosity, quiet)
        study = optuna.create_study(direction="maximize", pruner=_pruner(optuna, pruner))
        for number in range(trials):
            round_ = number * rounds // trials
            before = record.trials[: -(-round_ * trials // rounds)]  # up to the first trial of this round
            own_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
            study.sampler = optuna.samplers.RandomSampler(seed=own_seed)
            ranges = sorted(narrowed(space, before, round_).items())
            trial = study.ask({name: _distribution(optuna, given) for name, given in ranges})
            if number < len(record.trials):
                _replay(trial, record.trials[number], record.path)
            else:
                stop.check()
                record.add(_play(objective, trial, stop))
                if on_trial:
                    on_trial(record.trials[-1])
            _tell(optuna, study, trial, record.trials[number])
    return SearchResult(dict(space), tuple(record.trials[:trials]))


def _pruner(optuna: Any, name: str) -> Any:
    all_ = optuna.pruners
    pruners = {"median": all_.MedianPruner, "halving": all_.SuccessiveHalvingPruner, "none": all_.NopPruner}
    if name not in pruners:
        raise unknown("pruner", name, pruners)
    return pruners[name]()


def _distribution(optuna: Any, given: Range) -> Any:
    kinds = optuna.distributions
    if isinstance(given, Choice):
        return kinds.CategoricalDistribution(given.values)
    kind = kinds.IntDistribution if isinstance(given, IntUniform) else kinds.FloatDistribution
    return kind(given.low, given.high, log=isinstance(given, LogUniform))


def _play(objective: Objective, trial: Any, stop: StopRequest) -> Trial:
    """Runs one trial to its end, good or bad."""
    began, report, state, score, reason = time.monotonic(), Report(trial, stop), "complete", None, ""
    try:
        score = objective(dict(trial.params), report)
        if report.bad:  # and the objective did not heed it
            raise TrialStopped
        score = _finite(score)
    except TrialStopped:
        step, score = report.reports[-1] if report.reports else (None, None)
        state, reason = "stopped", f"behind the other trials at step {step}"
    except TrainingFailed as failure:
        state, score, reason = "failed", None, str(failure)
    seconds = round(time.monotonic() - began, 3)
    return Trial(trial.number, dict(trial.params), state, score, tuple(report.reports), reason, seconds)


def _replay(trial: Any, recorded: Trial, path: Path | None) -> None:
    """Brings Optuna to where it was when the trial ended; its pruners keep notes of every report."""
    if trial.params != recorded.params:
        raise InputError(
            f"{path}: trial {recorded.number} was made with {recorded.params}, this version of Optuna or of jaxcnn"
            f" draws {trial.params}: go on with the version that began, or choose another directory"
        )
    for step, score in recorded.reports:
        trial.report(score, step)
        trial.should_prune()


def _tell(optuna: Any, study: Any, trial: Any, ended: Trial) -> None:
    states = optuna.trial.TrialState
    state = {"complete": states.COMPLETE, "stopped": states.PRUNED, "failed": states.FAIL}[ended.state]
    study.tell(trial, ended.score if ended.state == "complete" else None, state=state)


def narrowed(space: Space, trials: Sequence[Trial], round_: int) -> dict[str, Range]:
    """The ranges of round `round_`, 0 the first: 2**-round_ as wide as `space`, around the best quarter of the
    complete trials, with the best one inside, and never beyond `space`; unchanged while none is complete."""
    complete = sorted((trial for trial in trials if trial.state == "complete"), key=_rank)
    best = complete[: max(1, len(complete) // 4)]
    if not best:
        return dict(space)
    return {name: _around(given, [trial.params[name] for trial in best], round_) for name, given in space.items()}


def _around(given: Range, values: Sequence[Any], round_: int) -> Range:
    """A part of `given` around the mean of `values`, the first of which stays inside."""
    if isinstance(given, Choice):
        return given
    to, back = (math.log, math.exp) if isinstance(given, LogUniform) else (float, float)
    low, high = to(given.low), to(given.high)
    width = (high - low) / 2**round_
    start = statistics.fmean(map(to, values)) - width / 2
    start = min(max(start, to(values[0]) - width), to(values[0]))
    start = min(max(start, low), high - width)
    ends: tuple[Any, Any] = (back(start), back(start + width))
    if isinstance(given, IntUniform):
        ends = (math.floor(ends[0]), math.ceil(ends[1]))
    return dataclasses.replace(given, low=max(ends[0], given.low), high=min(ends[1], given.high))


class _Record:
    """Finished trials, each on the disk as soon as it is added, where there is a `path`."""

    def __init__(self, path: Path | None):
        self.path, self.trials = path, [] if path is None else _read(path)

    def add(self, trial: Trial) -> None:
        if self.path is not None:
            line = json.dumps(dataclasses.asdict(trial), allow_nan=False).encode() + b"\n"
            with open(self.path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self.trials.append(trial)


@contextlib.contextmanager
def _record(directory: str | os.PathLike | None, header: Mapping[str, Any]) -> Iterator[_Record]:
    """The record in `directory`, for this process alone until the end; in memory without one."""
    if directory is None:
        yield _Record(None)
        return
    path = Path(directory).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "lock", "wb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise InputError(f"search directory {path} cannot be written: {error.strerror}; choose another") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"search {path} is in use by another process: wait for it, or choose another") from None
        _settle(path / "search.json", json.loads(json.dumps(header)))
        yield _Record(path / "trials.jsonl")


def _settle(path: Path, header: Mapping[str, Any]) -> None:
    """Writes what the search is, or compares."""
    if not path.exists():
        write_json(path, header)
        return
    if changed := differences(json.loads(path.read_bytes()), header):
        more = "\nwith several rounds the number of trials decides where ranges narrow, so it cannot grow"
        raise InputError(
            f"{path.parent} holds another search:\n  "
            + "\n  ".join(changed)
            + (more if any(line.startswith("trials:") for line in changed) else "")
            + "\nchoose another directory or name, or give the same search again"
        )


def _read(path: Path) -> list[Trial]:
    """The trials of the whole lines of `path`; a last line that was cut short is taken away."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        with replacing(path) as file:
            file.write(b"".join(lines))
    trials = []
    for number, line in enumerate(lines):
        try:
            values = json.loads(line)
            trial = Trial(**{**values, "reports": tuple((step, score) for step, score in values["reports"])})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}, line {number + 1} is no trial ({error}): restore it, or start anew") from None
        if trial.number != number:
            raise InputError(f"{path}, line {number + 1} is trial {trial.number}: restore it, or start anew")
        trials.append(trial)
    return trials
