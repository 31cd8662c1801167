"""`jaxcnn search`: hyper-parameters of an experiment by validation accuracy; the test split is never looked at."""

import dataclasses
import functools
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxcnn import config
from jaxcnn.cli import Launch, experiment_of, parse
from jaxcnn.commands.output import show
from jaxcnn.config import Experiment
from jaxcnn.errors import InputError, unknown
from jaxcnn.search import Choice, IntUniform, LogUniform, Range, Report, SearchResult, Trial, Uniform, search
from jaxcnn.signals import StopRequest, stop_on_signals

INCOMPARABLE = ("name", "seed", "data.name", "data.validation")
"""Fields on which two validation accuracies cannot be compared, or that the search has for itself."""
DURATIONS = ("train.steps", "train.epochs")
KINDS = {"uniform": Uniform, "log": LogUniform, "int": IntUniform, "choice": Choice}
SMOKE_TRIALS = 3


@dataclass(frozen=True)
class Search:
    """Searches hyper-parameters by validation accuracy: jaxcnn search [EXPERIMENT.py] --space FIELD=RANGE ... and every
    flag of `jaxcnn train`; --seed is that of the draws and of every trial. The test split is never looked at; the
    command that trains the best and tests it is printed. A finished trial keeps its log and no weights."""

    space: tuple[str, ...]
    """FIELD=RANGE pairs such as optim.learning_rate=log:1e-4:1, optim.warmup=uniform:0:0.5, data.crop_padding=int:0:4
    or model.overrides.width=choice:8,16."""
    trials: int = 20
    rounds: int = 1
    """Coarse to fine: each round draws from ranges half as wide, around the best trials before it."""
    pruner: Literal["median", "halving", "none"] = "median"
    """What stops a trial early: it lies below the median, or by successive halving."""
    search: str | None = None
    """Name of the search; the same name again resumes it. Without one a fresh name is made."""
    json: bool = False


def main(args: Sequence[str]) -> int:
    """`jaxcnn search [EXPERIMENT.py] --space FIELD=RANGE ... [--flags]`; returns the exit status."""
    file = [args[0]] if args and args[0].endswith(".py") else []
    flags, rest = tyro.cli(Search, args=list(args[len(file) :]), prog="jaxcnn search", return_unknown_args=True)
    base, full = experiment_of(Path(file[0])) if file else (config.LENET5_DIGITS, None)
    if "--full" in rest:
        if full is None:
            raise InputError(f"{base.name} has no --full scale of its own: give its length by --train.epochs")
        base = full
    launch, experiment = parse(base, rest)
    _check(flags, launch, experiment)
    space = dict(parameter(text) for text in flags.space)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        from jaxcnn import platform

        platform.setup(deterministic=experiment.train.deterministic, elastic=experiment.train.elastic)
        if launch.smoke:
            flags = dataclasses.replace(flags, trials=min(flags.trials, max(SMOKE_TRIALS, flags.rounds)))
            if launch.runs_dir == Path("checkpoints"):
                temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxcnn-smoke-"))
                launch = dataclasses.replace(launch, runs_dir=Path(temporary))
        name = flags.search or f"search-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        directory = launch.runs_dir / experiment.name / name
        found = _search(flags, launch, experiment, space, directory, stop)
        _picture(found, directory, experiment, say=not flags.json)
        chosen = trial_experiment(experiment, found.best.params, smoke=launch.smoke)
        command = ["jaxcnn", "train", *file, *(["--full"] if base is full else []), *differing(base, chosen)]
        for flag in ("runs_dir", "data_dir"):
            if getattr(launch, flag) != getattr(Launch(), flag):
                command += _flag(flag, getattr(launch, flag))
        _show(found, directory, command=shlex.join(command), as_json=flags.json)
    return 0


def _check(flags: Search, launch: Launch, experiment: Experiment) -> None:
    if launch.run is not None or launch.seeds != 1:
        raise InputError("--run and --seeds belong to jaxcnn train: give --search NAME, and train the best by itself")
    if flags.search is not None and (not flags.search or "/" in flags.search or flags.search.startswith(".")):
        raise InputError(f"--search {flags.search!r} must be one directory name: without '/', not starting with '.'")
    if not (experiment.data.validation and experiment.train.eval_every):
        raise InputError(
            f"{experiment.name} has no validation split to compare trials by: give --data.validation (0.1, say), the"
            " share of the training split that is held out, and --train.eval-every (100, say), the steps between its"
            " evaluations"
        )


def parameter(text: str) -> tuple[str, Range]:
    """The field's name and its range of FIELD=KIND:ENDS, such as optim.learning_rate=log:1e-4:1."""
    name, _, rest = text.partition("=")
    kind, _, values = rest.partition(":")
    if not values or kind not in KINDS:
        raise InputError(
            f"--space {text}: expected FIELD=uniform:LOW:HIGH, FIELD=log:LOW:HIGH, FIELD=int:LOW:HIGH or"
            " FIELD=choice:A,B,..."
        )
    name, hints = _field(name)
    if KINDS[kind] is Choice:
        return name, Choice([_scalar(value) for value in values.split(",")])
    wanted = {int, float} if kind == "int" else {float}
    if not wanted & hints:
        raise InputError(f"--space {text}: {name} is no real number; give choice:A,B,... or, for whole numbers, int:")
    try:
        low, high = map(int if kind == "int" else float, values.split(":"))
    except ValueError:
        raise InputError(f"--space {text}: expected two numbers, as in {kind}:LOW:HIGH") from None
    return name, KINDS[kind](low, high)


def _field(name: str) -> tuple[str, set[Any]]:
    """The name of a field of `Experiment`, or of an entry of one of its dictionaries, and the types of its values."""
    fields = _fields(Experiment)
    found = name.replace("-", "_")
    if found in INCOMPARABLE:
        raise InputError(f"--space {name}: trials that differ in it cannot be compared; give it as a flag")
    for field, hint in fields.items():
        if found == field and typing.get_origin(hint) is not dict:
            hints = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
            if any(typing.get_origin(one) is tuple for one in hints):
                raise InputError(f"--space {name}: pairs cannot be searched; give it as a flag")
            return field, hints
        if typing.get_origin(hint) is dict and found.startswith(f"{field}.") and len(found) > len(field) + 1:
            key = name[len(field) + 1 :]  # a pattern of rates may hold a '-'
            return f"{field}.{key if field == 'optim.rates' else key.replace('-', '_')}", {int, float}
    known = (f"{field}.NAME" if typing.get_origin(hint) is dict else field for field, hint in fields.items())
    raise unknown("field of the experiment", name, [field for field in known if field not in INCOMPARABLE])


def _fields(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Types of the leaves by dotted name."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        found |= _fields(hint, f"{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return found


def _scalar(text: str) -> config.Scalar:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def trial_experiment(experiment: Experiment, params: Mapping[str, Any], *, smoke: bool) -> Experiment:
    """The experiment with the values of a trial, exactly as their flags would give it; `InputError` outside its
    bounds."""
    return parse(experiment, [*_flags(params), *(["--smoke"] if smoke else [])])[1]


def _flags(values: Mapping[str, Any]) -> list[str]:
    """Flags of values by dotted name; what lies deeper than a field is an entry of its dictionary."""
    flags: list[str] = []
    options: dict[str, list[str]] = {}
    for name, value in values.items():
        section, _, rest = name.partition(".")
        field, _, key = rest.partition(".")
        if key:
            options.setdefault(f"{section}.{field}", []).extend((key, str(value)))
        else:
            flags += _flag(name, value)
    for name, pairs in options.items():
        flags += [f"--{name.replace('_', '-')}", *pairs]
    return flags


def _flag(name: str, value: Any) -> list[str]:
    section, dot, field = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return [f"--{section}{dot}{'' if value else 'no-'}{field}"]
    return [f"--{section}{dot}{field}", *map(str, value if isinstance(value, list | tuple) else [value])]


def differing(base: Experiment, experiment: Experiment) -> list[str]:
    """The flags that make `experiment` of `base`; dictionaries are given whole."""
    old, new = _leaves(dataclasses.asdict(base)), _leaves(dataclasses.asdict(experiment))
    changed = {tuple(name.split(".")[:2]) for name, value in new.items() if old.get(name) != value}
    given = {name: value for name, value in new.items() if tuple(name.split(".")[:2]) in changed}
    return _flags({name: value for name, value in given.items() if not (name in DURATIONS and value is None)})


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _search(
    flags: Search, launch: Launch, experiment: Experiment, space: dict[str, Range], directory: Path, stop: StopRequest
) -> SearchResult:
    from jaxcnn import build, search_report

    @functools.lru_cache(maxsize=1)
    def splits(model: str) -> build.Splits:  # the digits are scaled to what a model takes
        taken = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, name=model))
        return build.splits(taken, data_dir=launch.data_dir, smoke=launch.smoke, workers=launch.workers)

    for name, given in space.items():
        for value in given.values if isinstance(given, Choice) else (given.low, given.high):
            chosen = trial_experiment(experiment, {name: value}, smoke=launch.smoke)
            if not chosen.train.eval_every:
                raise InputError(f"--space {name}: 0 has no evaluations to compare trials by")
            _parts(chosen, splits(chosen.model.name))
    stop.check()

    def objective(params: dict[str, Any], report: Report) -> float:
        chosen = trial_experiment(experiment, params, smoke=launch.smoke)
        return _train(chosen, splits(chosen.model.name), launch, _run(directory, report.trial), report)

    def ended(trial: Trial) -> None:
        _forget(directory, trial)
        if not (flags.json or launch.quiet):
            score = "" if trial.score is None else f", validation accuracy {trial.score:.2%}"
            values = " ".join(f"{name}={search_report.text(trial.params[name])}" for name in space)
            print(f"trial {trial.number}: {trial.state}{score}, {trial.seconds:.1f} s: {values}", flush=True)

    if not (flags.json or launch.quiet):
        print(
            f"search {directory}: {flags.trials} trials of {experiment.model.name} on {experiment.data.name}",
            flush=True,
        )
    found = search(
        objective,
        space,
        trials=flags.trials,
        seed=experiment.seed,
        directory=directory,
        rounds=flags.rounds,
        pruner=flags.pruner,
        about={"experiment": config.to_json(experiment)},
        on_trial=ended,
    )
    for trial in found.trials:  # of a process that was killed between the record and this
        _forget(directory, trial)
    return found


def _run(directory: Path, number: int) -> Path:
    return directory / f"trial-{number:03}"


def _forget(directory: Path, trial: Trial) -> None:
    """A finished trial keeps its configuration and log, and no weights."""
    shutil.rmtree(_run(directory, trial.number) / "checkpoints", ignore_errors=True)


def _parts(experiment: Experiment, data: Any) -> Any:
    """What a trial is made of; `InputError` for what does not fit, before compilation."""
    import jax

    from jaxcnn import build

    jax.config.update("jax_enable_x64", experiment.model.dtype == "float64")
    return build.parts(experiment, data, devices=jax.device_count())


def _train(experiment: Experiment, data: Any, launch: Launch, path: Path, report: Report) -> float:
    """One trial: a run without a test. Returns its best validation accuracy."""
    from jaxcnn import build
    from jaxcnn import report as results
    from jaxcnn.data import preprocess
    from jaxcnn.train import run
    from jaxcnn.train.loop import fit

    made = _parts(experiment, data)
    variables = None
    if experiment.init_from:
        variables = results.initial(experiment, made.net, data.train.images).variables
    with run.RunDirectory(
        path,
        config=config.to_json(experiment),
        environment=run.environment(data=data.digests),
        accept_environment=launch.accept_environment,
    ) as directory:
        for warning in directory.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        directory.require_space(64 * made.parameters + (1 << 20))
        preprocessing = preprocess.fit(experiment.data.preprocessing, data.train.images)
        fit(
            made.net,
            (data.train.images, data.train.labels),
            validation=(data.validation.images, data.validation.labels),
            directory=directory.path,
            variables=variables,
            quiet=True,
            on_evaluation=lambda step, means: report(step, means["accuracy"]),
            **build.fit_options(experiment, made, preprocessing, data),
        )
    return max(score for _, score in report.reports)


def _picture(found: SearchResult, directory: Path, experiment: Experiment, *, say: bool) -> None:
    """Writes `trials.png`, and prints the table where `say`."""
    from jaxcnn import search_report

    first = found.ranked[0]
    best = f"best {first.number} ({first.score:.2%})" if first.state == "complete" else "none completed"
    title = f"{experiment.name}: {len(found.trials)} trials, {best}"
    search_report.plot(found, directory / "trials.png", title=title, score="best validation accuracy")
    if say:
        show(search_report.table(found))


def _show(found: SearchResult, directory: Path, *, command: str, as_json: bool) -> None:
    best, picture = found.best, str(directory / "trials.png")
    if as_json:
        trials = [dataclasses.asdict(trial) for trial in found.ranked]
        shown = {"directory": str(directory), "best": trials[0], "trials": trials, "command": command}
        print(json.dumps({**shown, "picture": picture}))
        return
    print(f"best: trial {best.number}, validation accuracy {best.score:.2%}\n{picture}")
    print(f"The test split was not looked at. To train this setting and test it once:\n  {command}")
