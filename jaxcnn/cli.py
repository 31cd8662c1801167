"""The `jaxcnn` command. Flags come from the dataclasses; this file holds the way from a command to a finished run.

Nothing heavy is imported here: a mistyped flag is answered at once, and a signal is heeded from the start.
"""

import argparse
import contextlib
import dataclasses
import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from jaxcnn import config
from jaxcnn.config import Experiment
from jaxcnn.errors import InputError, TrainingFailed, unknown
from jaxcnn.files import load_file
from jaxcnn.signals import Stopped, StopRequest, stop_on_signals


@dataclass(frozen=True)
class Launch:
    """Where and how a run is started: nothing here changes its result."""

    run: str | None = None
    """Name of the run; the same name again resumes it. Without one a fresh name is made."""
    runs_dir: Path = Path("checkpoints")
    """The run directory is RUNS_DIR/EXPERIMENT/RUN."""
    data_dir: Path | None = None
    """Directory of local data sets; by default $JAXCNN_DATA or ~/.cache/jaxcnn/data."""
    seeds: int = 1
    """Train this many seeds, counting up from --seed, and report mean, deviation and interval."""
    smoke: bool = False
    """A few small steps in a temporary directory, to see that everything runs."""
    full: bool = False
    """The experiment at the paper's scale, where its file gives one."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes; or auto, which asks SLURM, Open MPI, Kubernetes or the TPU pod."""
    processes: int | None = None
    """How many processes train this run together."""
    process: int | None = None
    """The number of this one, from 0."""
    async_saves: bool = True
    """Write checkpoints beside the training; it then stands still for a copy of the state only."""
    dry_run: bool = False
    """Say how many steps and checkpoints the run would have and what memory it would take; train nothing."""
    profile: tuple[int, int] | None = None
    """Steps between which a trace for TensorBoard's or Perfetto's profiler is taken, into the run's profile/."""
    accept_environment: bool = False
    """Resume although library versions, XLA flags, device kind or data differ."""
    workers: int | None = None
    """Processes that decode images with --data.storage disk; 0 decodes in threads; by default what the cores allow."""
    quiet: bool = False
    """Say nothing but errors and the result."""


@dataclass(frozen=True)
class _Flags:
    launch: Annotated[Launch, tyro.conf.arg(name="")] = field(default_factory=Launch)
    experiment: Annotated[Experiment, tyro.conf.arg(name="")] = field(default_factory=Experiment)


COMMANDS = {
    "train": "train a network: jaxcnn train [EXPERIMENT.py] [--flags]",
    "eval": "count the right answers of a run or of weights: jaxcnn eval RUN | --model NAME --weights FILE",
    "predict": "name what is on pictures: jaxcnn predict RUN IMAGE... | --model NAME --weights FILE IMAGE...",
    "list": "show the models: jaxcnn list [--json]",
    "summary": "explain a network layer by layer: jaxcnn summary MODEL [--input H W C] [--json]",
    "probe": "follow the signal and its gradient: jaxcnn probe MODEL [--init NAME] [--activation NAME]",
    "verify": "replay a run and compare every bit that it recorded: jaxcnn verify RUN [--from STEP] [--to STEP]",
    "diff": "say where two runs part: jaxcnn diff RUN_A RUN_B [--json]",
    "search": "search hyper-parameters: jaxcnn search [EXPERIMENT.py] --space FIELD=RANGE ... [--flags]",
    "bn": "BatchNorm of a run: jaxcnn bn recalibrate | fold | drift RUN",
    "stylize": "neural style transfer: jaxcnn stylize --content FILE --style FILE --weights FILE --output FILE",
    "weights": "public weights: jaxcnn weights list | show | fetch | convert | export",
    "data": "data sets: jaxcnn data fetch NAME | prepare FOLDER --output DIR",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0 done, 2 bad input, 1 failed, 130 and 143 stopped."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print("usage: jaxcnn COMMAND ...\n\n" + "\n".join(f"  {name:10}{line}" for name, line in COMMANDS.items()))
        return 0 if args else 2
    return guarded(_dispatch, args[0], args[1:])


def run_experiment(experiment: Experiment, *, full: Experiment | None = None) -> NoReturn:
    """The main of an experiment file: `python experiments/NAME.py --flags`; `full` is its paper's scale."""
    sys.exit(guarded(_train_command, experiment, full, sys.argv[1:]))


def run_program(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace, Path], None], *, smoke: Mapping[str, Any]
) -> NoReturn:
    """The main of an experiment that is more than one run: `run(args, output)` with the arguments of `parser`.

    Adds --output, by default a new directory in checkpoints/, and --smoke: a temporary one, and the arguments `smoke`.
    """
    parser.add_argument("--output", type=Path, help="directory for the results (default: a new one in checkpoints/)")
    parser.add_argument("--smoke", action="store_true", help="a small case, to see that everything runs")
    args = parser.parse_args()
    if args.smoke:
        vars(args).update(smoke)
    from jaxcnn import platform

    platform.setup()
    with tempfile.TemporaryDirectory(prefix="jaxcnn-smoke-") as temporary:
        fresh = Path("checkpoints") / Path(sys.argv[0]).stem / time.strftime("%Y%m%d-%H%M%S")
        output = args.output or (Path(temporary) if args.smoke else fresh)
        status = guarded(lambda: run(args, output) or 0)
    sys.exit(status)


def guarded(command: Any, *args: Any) -> int:
    """Turns what went wrong into one line and an exit status."""
    together = False
    try:
        status, together = command(*args), True
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except Stopped as stopped:
        print(f"{stopped}", file=sys.stderr)
        status, together = stopped.exit_code, True
    except KeyboardInterrupt:
        status = 130
    except (TrainingFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except Exception:
        processes = sys.modules.get("jaxcnn.processes")
        if processes is None or not processes.several():
            raise
        traceback.print_exc()
        time.sleep(2 * processes.GRACE)  # if another process's end is the cause, that is said, and this one ended
        status = 1
    processes = sys.modules.get("jaxcnn.processes")
    return processes.end(status, together=together) if processes else status


def run_subcommand(
    command: str, subcommands: Mapping[str, tuple[Any, Callable[[Any], int]]], args: Sequence[str]
) -> int:
    """`jaxcnn COMMAND SUBCOMMAND ...`, by the (flags, function) of `subcommands`, described by its docstring."""
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, subcommands))
        lines = (f"  {name:{width}}  {function.__doc__}" for name, (_, function) in subcommands.items())
        print(f"usage: jaxcnn {command} COMMAND ...\n\n" + "\n".join(lines))
        return 0 if args else 2
    if args[0] not in subcommands:
        raise unknown(f"{command} command", args[0], subcommands)
    flags, function = subcommands[args[0]]
    prog = f"jaxcnn {command} {args[0]}"
    return function(tyro.cli(flags, args=list(args[1:]), prog=prog, description=function.__doc__))


def _dispatch(command: str, args: list[str]) -> int:
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    if command != "train":
        return importlib.import_module(f"jaxcnn.commands.{command}").main(args)
    if args and args[0].endswith(".py"):
        return _train_command(*experiment_of(Path(args[0])), args[1:])
    return _train_command(config.LENET5_DIGITS, None, args)


def experiment_of(path: Path) -> tuple[Experiment, Experiment | None]:
    """The `experiment` that an experiment file defines, and its `full` one or None."""
    names = load_file(path)
    found = names.get("experiment")
    if not isinstance(found, Experiment):
        raise InputError(f"{path} defines no `experiment = Experiment(...)`")
    return found, names.get("full")


def parse(experiment: Experiment, args: Sequence[str]) -> tuple[Launch, Experiment]:
    """Flags over an experiment's own values. A duration on the command line replaces the experiment's."""
    flags = {arg.split("=")[0].replace("_", "-") for arg in args}
    durations = flags & {"--train.steps", "--train.epochs"}
    if len(durations) > 1:
        raise InputError("--train.steps and --train.epochs both give the length of the run: give one of them")
    if durations:
        train = dataclasses.replace(experiment.train, steps=None, epochs=None)
        experiment = dataclasses.replace(experiment, train=train)
    base = experiment
    model = dataclasses.replace(base.model, overrides={})
    optim = dataclasses.replace(base.optim, options={}, schedule_options={}, rates={})
    default = _Flags(experiment=dataclasses.replace(base, model=model, optim=optim))
    parsed = tyro.cli(_Flags, args=list(args), default=default, prog=f"{experiment.name}", description="")
    launch, experiment = parsed.launch, _with_options(base, parsed.experiment)
    if launch.run is not None and (not launch.run or "/" in launch.run or launch.run.startswith(".")):
        raise InputError(f"--run {launch.run!r} must be one directory name: without '/', not starting with '.'")
    if launch.seeds < 1 or experiment.seed + launch.seeds > 2**32:
        raise InputError(f"--seeds {launch.seeds} from --seed {experiment.seed}: seeds are from 0 to 2**32 - 1")
    if launch.profile is not None and not 0 <= launch.profile[0] < launch.profile[1]:
        raise InputError(f"--profile {launch.profile}: expected the first step, 0 or more, and a later one")
    if launch.smoke:
        experiment = config.smoke(experiment)
    return launch, config.validate(experiment)


def _with_options(base: Experiment, given: Experiment) -> Experiment:
    """Adds the experiment's options to those of the command line, where both are for the same thing by name."""

    def merged(mine: Any, theirs: Any, name: str, options: str) -> Any:
        old = getattr(mine, options) if getattr(mine, name) == getattr(theirs, name) else {}
        return dataclasses.replace(theirs, **{options: {**old, **getattr(theirs, options)}})

    optim = merged(base.optim, given.optim, "name", "options")
    optim = merged(base.optim, optim, "schedule", "schedule_options")
    optim = dataclasses.replace(optim, rates=optim.rates or base.optim.rates)  # their order counts: all or none
    return dataclasses.replace(given, model=merged(base.model, given.model, "name", "overrides"), optim=optim)


def _train_command(experiment: Experiment, full: Experiment | None, args: list[str]) -> int:
    if "--full" in args:
        if full is None:
            raise InputError(f"{experiment.name} has no --full scale of its own: give its length by --train.epochs")
        experiment = full
    launch, experiment = parse(experiment, args)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        from jaxcnn import platform

        platform.setup(deterministic=experiment.train.deterministic, elastic=experiment.train.elastic)
        if (launch.coordinator, launch.processes, launch.process) != (None, None, None):
            from jaxcnn import processes

            processes.start(launch.coordinator, launch.processes, launch.process)
            if launch.run is None:
                raise InputError("several processes need one name for their run: give --run")
        if launch.smoke and launch.runs_dir == Path("checkpoints"):
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxcnn-smoke-"))
            launch = dataclasses.replace(launch, runs_dir=Path(temporary))
        name = launch.run or f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        if launch.seeds == 1 or launch.dry_run:  # seeds differ in nothing that it says
            return train(experiment, launch, name, stop)[0]
        results = []
        for seed in range(experiment.seed, experiment.seed + launch.seeds):
            status, summary = train(dataclasses.replace(experiment, seed=seed), launch, f"{name}-seed{seed}", stop)
            if status:
                return status
            results.append(summary)
        from jaxcnn.report import across_seeds

        across_seeds(launch.runs_dir / experiment.name / f"{name}-seeds.json", results)
        return 0


def train(experiment: Experiment, launch: Launch, name: str, stop: StopRequest) -> tuple[int, dict[str, Any]]:
    """Trains one run, or goes on with it, or says that it is finished: (exit status, summary)."""
    import jax

    from jaxcnn import processes, report
    from jaxcnn.data import preprocess
    from jaxcnn.train import run
    from jaxcnn.train.log import tensorboard

    data, made = prepare(experiment, launch)
    if experiment.train.tensorboard:
        tensorboard()
    path = launch.runs_dir / experiment.name / name
    environment = run.environment(data=data.digests)
    processes.same("configuration", {"run": name, **config.to_json(experiment)})
    processes.same("environment", {field: environment[field] for field in run.REFUSED})
    if launch.dry_run:
        from jaxcnn import dry_run

        fitted = preprocess.fit(experiment.data.preprocessing, data.train.images)
        found = dry_run.plan(experiment, made, data, fitted, run=path)
        print(dry_run.show(found))
        return 0, found
    initial = report.Initial(None, None)
    if experiment.init_from and not (path / "summary.json").exists():  # on resuming too, if no checkpoint is whole
        initial = report.initial(experiment, made.net, data.train.images)
    if not processes.several():
        stop.check()

    with contextlib.ExitStack() as stack:

        def open_run() -> dict[str, Any] | None:
            """Its summary, if it is finished."""
            directory = stack.enter_context(
                run.RunDirectory(
                    path,
                    config=config.to_json(experiment),
                    environment=environment,
                    accept_environment=launch.accept_environment,
                    upgrade=lambda old: config.to_json(config.from_json(old)),
                )
            )
            for warning in directory.warnings:
                print(f"warning: {warning}", file=sys.stderr)
            if (summary := directory.read("summary.json")) is not None:
                return summary
            directory.require_space(64 * made.parameters + (1 << 20))
            directory.write("data.json", data_facts(data, launch))
            kept = directory.path / "preprocessing.npz"  # of the training split that the run began with
            if not kept.exists():
                preprocess.fit(experiment.data.preprocessing, data.train.images).save(kept)
            return None

        say = processes.first() and not launch.quiet
        if (summary := processes.from_first(open_run)) is not None:
            if processes.first():
                print(f"run {path.absolute()} is finished")
                report.show(summary, quiet=launch.quiet)
            return 0, summary
        preprocessing = preprocess.load(path / "preprocessing.npz")
        if initial.pixels and (difference := report.other_pixels(experiment, preprocessing, initial.pixels)):
            print(f"warning: {difference}", file=sys.stderr)
        if say:
            print(
                f"{experiment.model.name}, {made.parameters:,} parameters, on {data_line(experiment, data)}:"
                f" {made.steps} steps on {jax.device_count()} x {jax.devices()[0].device_kind}\nrun {path.absolute()}",
                flush=True,
            )
        result = fit_experiment(
            experiment,
            made,
            preprocessing,
            data,
            directory=path,
            variables=initial.variables,
            quiet=launch.quiet,
            asynchronous_saves=launch.async_saves,
            profile=launch.profile,
        )
        summary = report.finish(path.absolute(), result, made, data, preprocessing, experiment)
        if processes.first():
            report.show(summary, quiet=launch.quiet)
        if result.unsaved:
            print(f"error: the last checkpoint was not saved: {result.unsaved}", file=sys.stderr)
            return 1, summary
        return 0, summary


def prepare(experiment: Experiment, launch: Launch) -> tuple[Any, Any]:
    """The experiment's data and its network with what trains it: `build.Splits`, `build.Parts`."""
    import jax

    from jaxcnn import build, parallel

    jax.config.update("jax_enable_x64", experiment.model.dtype == "float64")
    mesh = parallel.make_mesh()  # before all else: it says how devices start
    data = build.splits(experiment, data_dir=launch.data_dir, smoke=launch.smoke, workers=launch.workers)
    return data, build.parts(experiment, data, devices=mesh.size)


def fit_experiment(experiment: Experiment, made: Any, preprocessing: Any, data: Any, **options: Any) -> Any:
    """`fit` with all that the experiment decides; `options` are the rest of its arguments, and win."""
    from jaxcnn import build
    from jaxcnn.train.loop import fit

    return fit(
        made.net,
        (data.train.images, data.train.labels),
        validation=(data.validation.images, data.validation.labels) if data.validation else None,
        test=(data.test.images, data.test.labels),
        **{**build.fit_options(experiment, made, preprocessing, data), **options},
    )


def data_facts(data: Any, launch: Launch) -> dict[str, Any]:
    """What `data.json` says; that a smoke run took only a few of the examples stands nowhere else."""
    few = {"smoke": True} if launch.smoke else {}
    return {"classes": list(data.classes), "input": list(data.train.images.shape[1:]), **few}


def data_line(experiment: Experiment, data: Any) -> str:
    """The data in one line: name, number of examples, shape."""
    shape = "x".join(map(str, data.train.images.shape[1:]))
    return f"{experiment.data.name} ({len(data.train):,} + {len(data.test):,} images of {shape})"
