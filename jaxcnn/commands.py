"""The commands beside `train`: eval, predict, list, summary, data."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxcnn import config
from jaxcnn.config import Experiment
from jaxcnn.errors import InputError, unknown
from jaxcnn.files import load_file


@dataclass(frozen=True)
class _DataFlags:
    name: str | None = None
    """Another data set than the run's own."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=("--data.eval-batch-size",))] = 1000
    """Examples in one evaluation batch; the result does not depend on it."""


@dataclass(frozen=True)
class Eval:
    """Counts the right answers of a run on its test split."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    data: _DataFlags = dataclasses.field(default_factory=_DataFlags)
    data_dir: Path | None = None
    json: bool = False


def eval_command(args: Sequence[str]) -> int:
    flags = tyro.cli(Eval, args=list(args), prog="jaxcnn eval")
    if flags.data.batch_size < 1:
        raise InputError(f"--data.batch-size {flags.data.batch_size} must be at least 1")
    loaded = _load(flags.run)
    import jax

    from jaxcnn import build, parallel
    from jaxcnn.data.loader import eval_batches
    from jaxcnn.train import evaluate, make_eval_step

    experiment = loaded.experiment
    if flags.data.name:
        data_settings = dataclasses.replace(experiment.data, name=flags.data.name)
        experiment = dataclasses.replace(experiment, data=data_settings)
    data = build.splits(experiment, data_dir=flags.data_dir)
    net = build.module(experiment.model, num_classes=loaded.num_classes)
    if len(data.classes) != loaded.num_classes:
        raise InputError(
            f"run {flags.run} knows {loaded.num_classes} classes, data set {experiment.data.name} has"
            f" {len(data.classes)}"
        )
    if data.test.images.shape[1:] != loaded.input:
        raise InputError(
            f"run {flags.run} was trained on images of {loaded.input}, those of {experiment.data.name} are"
            f" {data.test.images.shape[1:]} (h, w, c)"
        )
    mesh = parallel.make_mesh()
    step = make_eval_step(net, prepare=build.prepare_eval(experiment, loaded.preprocessing))
    batches = eval_batches(data.test.images, data.test.labels, batch_size=flags.data.batch_size, mesh=mesh)
    with jax.set_mesh(mesh):
        result = evaluate(step, loaded.variables, batches())
    if flags.json:
        print(json.dumps(result))
    else:
        print(f"test accuracy {result['accuracy']:.2%} ({result['correct']} of {result['count']})")
    return 0


@dataclass(frozen=True)
class Predict:
    """Names what is on pictures, by a trained run."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """JPEG or PNG files."""
    top_k: int = 5
    json: bool = False


def predict_command(args: Sequence[str]) -> int:
    flags = tyro.cli(Predict, args=list(args), prog="jaxcnn predict")
    if not flags.images:
        raise InputError("give at least one image: jaxcnn predict RUN IMAGE...")
    if flags.top_k < 1:
        raise InputError(f"--top-k {flags.top_k} must be at least 1")
    loaded = _load(flags.run)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxcnn import build
    from jaxcnn.data.sources import read_image

    experiment = loaded.experiment
    net = build.module(experiment.model, num_classes=loaded.num_classes)
    height, width, channels = loaded.input
    images = np.stack([read_image(path, size=(height, width), channels=channels) for path in flags.images])
    batch = build.prepare_eval(experiment, loaded.preprocessing)({"image": images})
    logits = jax.jit(lambda v, x: net.apply(v, x, train=False))(loaded.variables, batch["image"])
    shares = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
    for path, row in zip(flags.images, shares, strict=True):
        order = np.argsort(-row, kind="stable")[: flags.top_k]
        best = [{"class": loaded.classes[i], "probability": round(float(row[i]), 6)} for i in order]
        if flags.json:
            print(json.dumps({"image": str(path), "top": best}))
        else:
            print(f"{path}: " + ", ".join(f"{one['class']} {one['probability']:.1%}" for one in best))
    return 0


@dataclass(frozen=True)
class _Loaded:
    experiment: Experiment
    variables: Any
    preprocessing: Any
    classes: list[str]
    input: tuple[int, int, int]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def _load(run: Path) -> _Loaded:
    """What a run directory holds, verified; `InputError` where it is none, or has no checkpoint."""
    from jaxcnn import platform

    platform.setup()
    import jax

    from jaxcnn import report
    from jaxcnn.data import preprocess
    from jaxcnn.train.run import read_json

    if not (run / "config.json").is_file():
        raise InputError(f"{run} is not a run directory: it has no config.json")
    experiment = config.from_json(read_json(run / "config.json"))
    jax.config.update("jax_enable_x64", experiment.model.dtype == "float64")
    data = read_json(run / "data.json")
    return _Loaded(
        experiment,
        report.load_variables(run),
        preprocess.load(run / "preprocessing.npz"),
        data["classes"],
        tuple(data["input"]),
    )


def list_command(args: Sequence[str]) -> int:
    """`jaxcnn list [--json]`: the models by family, with parameters and MACs at their usual input, and their source."""

    @dataclass(frozen=True)
    class List:
        json: bool = False

    flags = tyro.cli(List, args=list(args), prog="jaxcnn list", description="Shows the models.")
    from jaxcnn.analysis.counts import counts
    from jaxcnn.models import FAMILIES

    rows = [
        {"name": name, "family": family, **counts(name), "input": list(entry.input), "paper": entry.paper}
        for family, variants in FAMILIES.items()
        for name, entry in variants.items()
    ]
    if flags.json:
        print(json.dumps(rows))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "family", "parameters", "MACs (M)", "input", "paper")
    for row in rows:
        size = "x".join(map(str, row["input"]))
        table.add_row(
            row["name"], row["family"], f"{row['parameters']:,}", f"{row['macs'] / 1e6:,.1f}", size, row["paper"]
        )
    _console(Console).print(table)
    return 0


@dataclass(frozen=True)
class Summary:
    """Explains a network layer by layer, without running it: output, parameters, MACs, FLOPs, activation memory,
    receptive field and stride, for one image in evaluation. FLOPs are 2 per MAC and 1 per element for the rest; taps on
    padding count, which XLA's own count leaves out."""

    model: tyro.conf.Positional[str]
    """A name of `jaxcnn list`, or FILE.py:NAME for a Flax module (a class or an instance) of your own."""
    input: tuple[int, ...] = ()
    """Height, width and channels of an image; by default the model's usual ones."""
    num_classes: int | None = None
    overrides: config.Options = dataclasses.field(default_factory=dict)
    """Fields of the model: --overrides width 32 norm none"""
    json: bool = False


def summary_command(args: Sequence[str]) -> int:
    flags = tyro.cli(Summary, args=list(args), prog="jaxcnn summary")
    from jaxcnn.analysis import summary, table
    from jaxcnn.models import MODELS, create

    if ":" in flags.model:
        if flags.overrides or flags.num_classes is not None:
            raise InputError("--overrides and --num-classes belong to models of `jaxcnn list`: set them in your file")
        if not flags.input:
            raise InputError(f"{flags.model}: give the size of an image, such as --input 224 224 3")
        net, size = _own_module(flags.model), flags.input
    else:
        net = create(flags.model, num_classes=flags.num_classes, **flags.overrides)
        size = flags.input or MODELS[flags.model].input
    found = summary(net, input=size)
    if flags.json:
        print(json.dumps(found.to_json()))
        return 0
    from rich.console import Console

    _console(Console).print(table(found))
    return 0


def _own_module(place: str) -> Any:
    path, name = place.rsplit(":", 1)
    found = load_file(Path(path)).get(name)
    if found is None:
        raise InputError(f"{path} defines no {name}")
    import flax.linen as nn

    net = found() if isinstance(found, type) and issubclass(found, nn.Module) else found
    if not isinstance(net, nn.Module):
        raise InputError(f"{place} is a {type(net).__name__}: expected a flax.linen.Module, the class or an instance")
    return net


def _console(kind: Any) -> Any:
    """As wide as the table where nobody looks at a terminal."""
    return kind() if sys.stdout.isatty() else kind(width=200)


def data_command(args: Sequence[str]) -> int:
    """`jaxcnn data fetch NAME`: the original files, pinned by size and SHA-256."""
    if not args or args[0] not in ("fetch",):
        if args and not args[0].startswith("-"):
            raise unknown("data command", args[0], ["fetch"])
        print("usage: jaxcnn data fetch NAME [--data-dir DIR]")
        return 0 if args else 2

    @dataclass(frozen=True)
    class Fetch:
        name: tyro.conf.Positional[str]
        """mnist, fashion_mnist, cifar10 or cifar100."""
        data_dir: Path | None = None
        """Where the data sets lie; by default $JAXCNN_DATA or ~/.cache/jaxcnn/data."""

    flags = tyro.cli(Fetch, args=list(args[1:]), prog="jaxcnn data fetch")
    from jaxcnn.data.fetch import fetch
    from jaxcnn.data.sources import default_data_dir

    for path in fetch(flags.name, flags.data_dir or default_data_dir(), progress=_progress):
        print(path)
    return 0


def _progress(file: str, held: int, expected: int) -> None:
    print(f"\r{file}: {held / 1e6:.1f} of {expected / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)
    if held >= expected:
        print(file=sys.stderr)
