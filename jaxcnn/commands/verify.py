"""`jaxcnn verify`: replays a run and compares every bit that it recorded."""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxcnn import config
from jaxcnn.cli import Launch, data_facts, fit_experiment, prepare
from jaxcnn.commands.output import Counted
from jaxcnn.config import Experiment
from jaxcnn.errors import InputError
from jaxcnn.signals import StopRequest, stop_on_signals

ALTERED = "config.json was altered after the run began"


@dataclass(frozen=True)
class Verify:
    """Trains a run again and compares all that it recorded, but for timings: every line of its log, every checkpoint,
    its result. Says the first step that differs, and in what (status 1), or that there is none (status 0). Writes
    nothing."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    start: Annotated[int | None, tyro.conf.arg(name="from", metavar="STEP")] = None
    """Replay from the checkpoint of this step, which is taken as given; by default from the beginning."""
    end: Annotated[int | None, tyro.conf.arg(name="to", metavar="STEP")] = None
    """Replay to the checkpoint of this step; by default to the end of the run, or to its last checkpoint."""
    data_dir: Path | None = None
    """Directory of local data sets; by default $JAXCNN_DATA or ~/.cache/jaxcnn/data."""
    accept_environment: bool = False
    """Replay although library versions, XLA flags, device kind or data differ."""
    workers: int | None = None
    """Processes that decode images with --data.storage disk, as in jaxcnn train."""
    json: bool = False
    quiet: bool = False
    """Say nothing but errors and the result."""


def main(args: Sequence[str]) -> int:
    """`jaxcnn verify RUN [--from STEP] [--to STEP]`; returns the exit status, 1 where something differs."""
    flags = tyro.cli(Verify, args=list(args), prog="jaxcnn verify")
    from jaxcnn.train import run

    if not (flags.run / "config.json").is_file():
        raise InputError(f"{flags.run} is not a run directory: it has no config.json")
    with stop_on_signals() as stop, run.reading(flags.run):
        result = _verify(flags, stop)
    print(json.dumps(result) if flags.json else _text(result), flush=True)
    return 0 if result["reproduced"] else 1


def _verify(flags: Verify, stop: StopRequest) -> dict[str, Any]:
    """What was compared and found, JSON types."""
    from jaxcnn import platform
    from jaxcnn.train import replay, run

    path = flags.run.absolute()
    recorded, about, summary = (_object(path / f"{name}.json") or {} for name in ("environment", "data", "summary"))
    if altered := run.config_altered(_object(path / "config.json") or {}, recorded):
        _warn(ALTERED)
    experiment = _experiment(path)
    start, end = replay.interval(path, start=flags.start, end=flags.end, finished=bool(summary))
    platform.setup(deterministic=experiment.train.deterministic, elastic=experiment.train.elastic)
    launch = Launch(data_dir=flags.data_dir, smoke=bool(about.get("smoke")), workers=flags.workers)
    data, made = prepare(experiment, launch)
    environment = _environment(flags, experiment, recorded, run.environment(data=data.digests))
    preprocessing = _preprocessing(path, experiment, data)
    stop.check()

    last = summary.get("final_step") if end is None else end
    last = last if isinstance(last, int) else made.steps
    with contextlib.ExitStack() as stack:
        counted = stack.enter_context(Counted("verifying")) if not flags.quiet else lambda done, of: None
        record = replay.Replay(
            path,
            start=start,
            end=end,
            progress=lambda step: counted(min(step, last) - start, max(last - start, 1)),
        )
        if about and (changed := config.differences(about, data_facts(data, launch))):
            difference = replay.Difference(start, "data.json", "; ".join(changed))
        else:
            difference = _difference(record, experiment, made, preprocessing, data)
    fields = ("step", "where", "field", "recorded", "replayed", "reason")
    return {
        "run": str(path),
        "reproduced": difference is None and not altered,
        "from": start,
        "to": last,
        "lines": record.lines_equal,
        "checkpoints": record.checkpoints_equal,
        "summary": difference is None and end is None,
        "lines_beyond": record.lines_beyond if difference is None else None,
        "config_altered": altered,
        "environment": environment,
        "difference": None if difference is None else {name: getattr(difference, name) for name in fields},
    }


def _difference(record: Any, experiment: Experiment, made: Any, preprocessing: Any, data: Any) -> Any:
    """The first `train.replay.Difference`, or None."""
    from jaxcnn import report
    from jaxcnn.train.replay import Difference, Reached

    variables = None
    if experiment.init_from and not record.start:
        variables = report.initial(experiment, made.net, data.train.images).variables
    options = {"record": record, "variables": variables, "quiet": True, "tensorboard": False}
    try:
        result = fit_experiment(experiment, made, preprocessing, data, **options)
        record.finish(result.step, report.summarize(result, made, experiment))
    except Reached:
        return None
    except Difference as found:
        return found
    return None


def _preprocessing(path: Path, experiment: Experiment, data: Any) -> Any:
    """What the run has; said where the training split gives another."""
    from jaxcnn.data import preprocess
    from jaxcnn.tree import state_sha256

    kept = preprocess.load(path / "preprocessing.npz")
    fitted = preprocess.fit(experiment.data.preprocessing, data.train.images)
    if (fitted.kind, state_sha256(fitted)) != (kept.kind, state_sha256(kept)):
        _warn("preprocessing.npz is not what the training split gives; the replay takes it all the same")
    return kept


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON object of the run, or None where there is none; `InputError` for what is no object."""
    from jaxcnn.train.run import read_json

    values = read_json(path)
    if not isinstance(values, dict | None):
        raise InputError(f"{path} is no JSON object: restore it")
    return values


def _experiment(path: Path) -> Experiment:
    try:
        return config.validate(config.from_json(_object(path / "config.json") or {}))
    except (TypeError, AttributeError) as error:  # a value of another type than the field's
        raise InputError(f"{path / 'config.json'} is no configuration: {error}") from error


def _environment(flags: Verify, experiment: Experiment, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences between the run's environment and this one, which are also said; `InputError` as on resuming."""
    from jaxcnn.train import run

    if not old:
        _warn(f"run {flags.run} has no environment.json: whether its bits can be expected here is not known")
        return []
    if experiment.train.elastic:  # whose bits do not depend on them
        new = {**new, **{field: old[field] for field in ("devices", "processes", "cores") if field in old}}
    refused, warned = run.compare_environments(old, new, elastic=bool(experiment.train.elastic))
    if refused and not flags.accept_environment:
        raise InputError(
            f"run {flags.run} was made in another environment, its bits cannot be expected here:\n  "
            + "\n  ".join(refused)
            + "\n--accept-environment replays it all the same"
        )
    for line in refused + warned:
        _warn(line)
    return refused + warned


def _text(result: Mapping[str, Any]) -> str:
    equal = [_number(result["lines"], "line"), _number(result["checkpoints"], "checkpoint")]
    difference, lines = result["difference"], []
    if difference is None:
        things = ", ".join(equal) + " and the result" if result["summary"] else " and ".join(equal)
        steps = f"from step {result['from']} to {result['to']}"
        lines.append(f"run {result['run']} is reproduced {steps}: {things} are equal")
        if result["lines_beyond"]:
            lines.append(f"not compared: {_number(result['lines_beyond'], 'line')} after step {result['to']}")
    else:
        lines.append(
            f"run {result['run']} is not reproduced; from step {result['from']} on {' and '.join(equal)} are equal"
        )
        lines.append(f"step {difference['step']} differs: {difference['where']}: {difference['reason']}")
        if result["environment"]:
            lines.append("its environment was another one, so its bits could not be expected:")
            lines += [f"  {line}" for line in result["environment"]]
    if result["config_altered"]:
        lines.append(ALTERED + ("" if difference else ", in nothing that is computed"))
    return "\n".join(lines)


def _number(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
