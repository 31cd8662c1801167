"""The commands beside `train`: eval, predict, list, summary, probe, bn, stylize, data, weights."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxcnn import config
from jaxcnn.errors import InputError, unknown
from jaxcnn.files import load_file


@dataclass(frozen=True)
class _DataFlags:
    name: str | None = None
    """Another data set than the run's own."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=("--data.eval-batch-size",))] = 1000
    """Examples in one evaluation batch; the result does not depend on it."""


@dataclass(frozen=True)
class _Source:
    model: str | None = None
    """With --weights: one of `jaxcnn list`."""
    weights: str | None = None
    """In place of a run: a .safetensors, .npz or Keras .h5 file, or NAME.TAG of `jaxcnn weights list`, once fetched."""
    layout: str | None = None
    """How the file names its layers; by default the layout that fits best."""
    preprocessing: str | None = None
    """What images go through: imagenet, imagenet_bicubic, inception, caffe or squeezenet; by default the layout's."""


def _trained(run: Path | None, source: _Source) -> Any:
    if (run is None) == (source.weights is None):
        raise InputError("give a run directory, or a model and its weights: --model NAME --weights FILE")
    from jaxcnn import trained

    if run is not None:
        for flag in ("model", "layout", "preprocessing"):
            if getattr(source, flag) is not None:
                raise InputError(f"--{flag} belongs to --weights: run {run} has its own")
        return trained.of_run(run)
    assert source.weights is not None
    return trained.of_weights(
        source.weights, model=source.model, layout=source.layout, preprocessing=source.preprocessing
    )


@dataclass(frozen=True)
class Eval:
    """Counts the right answers of a run, or of published weights, on a test split."""

    run: tyro.conf.Positional[Path | None] = None
    """Run directory."""
    source: tyro.conf.OmitArgPrefixes[_Source] = dataclasses.field(default_factory=_Source)
    data: _DataFlags = dataclasses.field(default_factory=_DataFlags)
    data_dir: Path | None = None
    json: bool = False


def eval_command(args: Sequence[str]) -> int:
    flags = tyro.cli(Eval, args=list(args), prog="jaxcnn eval")
    if flags.data.batch_size < 1:
        raise InputError(f"--data.batch-size {flags.data.batch_size} must be at least 1")
    trained = _trained(flags.run, flags.source)
    import jax

    from jaxcnn import build, parallel
    from jaxcnn.data.loader import eval_batches
    from jaxcnn.train import evaluate, make_eval_step

    experiment = trained.experiment
    if flags.data.name:
        data_settings = dataclasses.replace(experiment.data, name=flags.data.name)
        experiment = dataclasses.replace(experiment, data=data_settings)
    data = build.splits(experiment, data_dir=flags.data_dir)
    what = f"run {flags.run}" if flags.run else f"the weights {flags.source.weights}"
    if len(data.classes) != trained.num_classes:
        raise InputError(
            f"{what} knows {trained.num_classes} classes, data set {experiment.data.name} has {len(data.classes)}"
        )
    if data.test.images.shape[1:] != trained.input:
        raise InputError(
            f"{what} takes images of {trained.input}, those of {experiment.data.name} are"
            f" {data.test.images.shape[1:]} (h, w, c)"
        )
    mesh = parallel.make_mesh()
    step = make_eval_step(trained.network, prepare=lambda batch: {**batch, "image": trained.preprocess(batch["image"])})
    batches = eval_batches(data.test.images, data.test.labels, batch_size=flags.data.batch_size, mesh=mesh)
    with jax.set_mesh(mesh):
        result = evaluate(step, trained.variables, batches())
    if flags.json:
        print(json.dumps(result))
    else:
        print(f"test accuracy {result['accuracy']:.2%} ({result['correct']} of {result['count']})")
    return 0


@dataclass(frozen=True)
class Predict:
    """Names what is on pictures, by a trained run or published weights."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Run directory, unless --weights is given, and JPEG or PNG files."""
    source: tyro.conf.OmitArgPrefixes[_Source] = dataclasses.field(default_factory=_Source)
    top_k: int = 5
    json: bool = False


def predict_command(args: Sequence[str]) -> int:
    flags = tyro.cli(Predict, args=list(args), prog="jaxcnn predict")
    run, images = (None, flags.paths) if flags.source.weights else (flags.paths[:1], flags.paths[1:])
    if not images:
        raise InputError("give at least one image: jaxcnn predict RUN IMAGE...")
    if flags.top_k < 1:
        raise InputError(f"--top-k {flags.top_k} must be at least 1")
    trained = _trained(run[0] if run else None, flags.source)
    import jax
    import jax.numpy as jnp
    import numpy as np

    pictures = trained.preprocess(np.stack([trained.read(path) for path in images]))
    logits = jax.jit(lambda v, x: trained.network.apply(v, x, train=False))(trained.variables, pictures)
    shares = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
    classes = trained.classes or tuple(f"class {i}" for i in range(shares.shape[1]))
    for path, row in zip(images, shares, strict=True):
        order = np.argsort(-row, kind="stable")[: flags.top_k]
        best = [{"class": classes[i], "probability": round(float(row[i]), 6)} for i in order]
        if flags.json:
            print(json.dumps({"image": str(path), "top": best}))
        else:
            print(f"{path}: " + ", ".join(f"{one['class']} {one['probability']:.1%}" for one in best))
    return 0


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
    console(Console).print(table)
    return 0


@dataclass(frozen=True)
class _Network:
    model: tyro.conf.Positional[str]
    """A name of `jaxcnn list`, or FILE.py:NAME for a Flax module (a class or an instance) of your own."""
    input: tuple[int, ...] = ()
    """Height, width and channels of an image; by default the model's usual ones."""
    num_classes: int | None = None
    overrides: config.Options = dataclasses.field(default_factory=dict)
    """Fields of the model: --overrides width 32 norm none"""

    def created(self, **overrides: Any) -> tuple[Any, tuple[int, ...]]:
        """The module, and the (h, w, c) of its input."""
        from jaxcnn.models import MODELS, create

        overrides = {**self.overrides, **overrides}
        if ":" not in self.model:
            net = create(self.model, num_classes=self.num_classes, **overrides)
            return net, self.input or MODELS[self.model].input
        if overrides or self.num_classes is not None:
            raise InputError(
                "--overrides, --activation and --num-classes belong to models of `jaxcnn list`: set them in your file"
            )
        if not self.input:
            raise InputError(f"{self.model}: give the size of an image, such as --input 224 224 3")
        return _own_module(self.model), self.input


@dataclass(frozen=True)
class Summary:
    """Explains a network layer by layer, without running it: output, parameters, MACs, FLOPs, activation memory,
    receptive field and stride, for one image in evaluation. FLOPs are 2 per MAC and 1 per element for the rest; taps on
    padding count, which XLA's own count leaves out."""

    network: tyro.conf.OmitArgPrefixes[_Network]
    json: bool = False


def summary_command(args: Sequence[str]) -> int:
    flags = tyro.cli(Summary, args=list(args), prog="jaxcnn summary")
    from jaxcnn.analysis import summary, table

    net, size = flags.network.created()
    found = summary(net, input=size)
    if flags.json:
        print(json.dumps(found.to_json()))
        return 0
    from rich.console import Console

    console(Console).print(table(found))
    return 0


@dataclass(frozen=True)
class Probe:
    """Follows a signal through a network with fresh weights, and its gradient back: the moments of every layer, beside
    what theory predicts, as a table and a picture."""

    network: tyro.conf.OmitArgPrefixes[_Network]
    init: str | None = None
    """Draws all kernels anew: an initialiser's NAME or NAME:OPTION=NUMBER, such as xavier_normal, normal:std=0.01."""
    activation: str | None = None
    """In place of the model's own, as --overrides act NAME."""
    batch: int = 16
    """Examples of N(0, 1) that go through."""
    seed: int = 0
    seeds: int = 1
    """Draws of the weights to average over."""
    evaluation: bool = False
    """With running statistics and without dropout, in place of training."""
    output: Path | None = None
    """The picture; by default MODEL.signal.png."""
    json: bool = False


def probe_command(args: Sequence[str]) -> int:
    flags = tyro.cli(Probe, args=list(args), prog="jaxcnn probe")
    for name in ("batch", "seeds"):
        if getattr(flags, name) < 1:
            raise InputError(f"--{name} {getattr(flags, name)} must be at least 1")
    net, size = flags.network.created(**({"act": flags.activation} if flags.activation else {}))
    init = _initializer(flags.init) if flags.init else None
    import numpy as np

    from jaxcnn.analysis import signal_report
    from jaxcnn.analysis.signal import probe

    x = np.random.default_rng(flags.seed).standard_normal((flags.batch, *size)).astype(np.float32)
    found = probe(net, x, init=init, seed=flags.seed, seeds=flags.seeds, train=not flags.evaluation)
    output = flags.output or Path(f"{flags.network.model.rsplit(':')[-1]}.signal.png")
    signal_report.plot(found, output, title=_title(flags))
    if flags.json:
        print(json.dumps({**found.to_json(), "picture": str(output)}))
        return 0
    from rich.console import Console

    console(Console).print(signal_report.table(found))
    print(f"{found.verdict}\n{output}")
    return 0


def _title(flags: Probe) -> str:
    network = flags.network
    own = [f"{key} {value}" for key, value in network.overrides.items()]
    given = [f"{name} {value}" for name, value in (("init", flags.init), ("act", flags.activation)) if value]
    return ", ".join((network.model, *own, *given))


def _initializer(text: str) -> Any:
    """NAME, or NAME:OPTION=NUMBER,OPTION=NUMBER."""
    from jaxcnn.layers.init import initializer

    name, _, options = text.partition(":")
    pairs = [option.partition("=") for option in options.split(",") if option]
    try:
        return initializer(name, **{key: float(value) for key, _, value in pairs})
    except (ValueError, TypeError) as error:
        raise InputError(
            f"--init {text}: {error}; expected NAME or NAME:OPTION=NUMBER, such as normal:std=0.01"
        ) from None


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


def console(kind: Any) -> Any:
    """As wide as the table where nobody looks at a terminal."""
    return kind() if sys.stdout.isatty() else kind(width=200)


def bn_command(args: Sequence[str]) -> int:
    from jaxcnn import bn_cli

    return bn_cli.main(args)


def weights_command(args: Sequence[str]) -> int:
    from jaxcnn import weights_cli

    return weights_cli.main(args)


def stylize_command(args: Sequence[str]) -> int:
    from jaxcnn import stylize_cli

    return stylize_cli.main(args)


def search_command(args: Sequence[str]) -> int:
    from jaxcnn import search_cli

    return search_cli.main(args)


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

    for path in fetch(flags.name, flags.data_dir or default_data_dir(), progress=show_progress):
        print(path)
    return 0


def show_progress(file: str, held: int, expected: int) -> None:
    print(f"\r{file}: {held / 1e6:.1f} of {expected / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)
    if held >= expected:
        print(file=sys.stderr)
