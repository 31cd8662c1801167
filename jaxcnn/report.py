"""What remains of a run: `summary.json`, its pictures, its weights for another run, figures over seeds."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from jaxcnn import build, faults, metrics, models, parallel, processes
from jaxcnn.checkpoint import Checkpoints
from jaxcnn.config import Experiment
from jaxcnn.data.loader import eval_batches
from jaxcnn.data.preprocess import Preprocessing
from jaxcnn.errors import InputError
from jaxcnn.files import write_json
from jaxcnn.plots import BLUE, ORANGE
from jaxcnn.pretrained import Pretrained, store
from jaxcnn.pretrained.index import INDEX
from jaxcnn.pretrained.pixels import PREPROCESSINGS, Pixels, of_fitted
from jaxcnn.pretrained.read import READERS
from jaxcnn.spread import spread
from jaxcnn.train.loop import FitResult
from jaxcnn.train.run import read_json
from jaxcnn.train.state import create_state
from jaxcnn.transfer import merge
from jaxcnn.tree import state_sha256
from jaxcnn.types import PyTree


def finish(
    run: Path,
    result: FitResult,
    made: build.Parts,
    data: build.Splits,
    preprocessing: Preprocessing,
    experiment: Experiment,
) -> dict[str, Any]:
    """Writes `summary.json` in the directory `run`, which makes it finished, then the pictures; returns the summary."""
    summary = summarize(result, made, experiment)
    if result.unsaved is None and processes.first():
        faults.point("summary")
        write_json(run / "summary.json", summary)
    prepare = build.prepare_eval(experiment, preprocessing)
    counts = confusion_counts(made.net, result.variables, data, prepare, batch_size=experiment.data.eval_batch_size)
    if processes.first():
        curves(result.history, run / "curves.png", title=f"{experiment.name}, seed {experiment.seed}")
        confusion(counts, data.classes, run / "confusion.png", title=f"{experiment.name}: test split")
    return summary


def summarize(result: FitResult, made: build.Parts, experiment: Experiment) -> dict[str, Any]:
    """What `summary.json` says of a run."""
    return {
        "final_step": result.step,
        "selected_step": result.selected_step,
        **{f"test_{name}": value for name, value in result.test.items()},
        "state_sha256": state_sha256(parallel.whole(result.state)),
        "seconds": round(result.seconds, 2),
        "parameters": made.parameters,
        "skipped_steps": int(result.state.counters["skipped"]),
        "seed": experiment.seed,
    }


def show(summary: Mapping[str, Any], *, quiet: bool = False) -> None:
    """The result in one line."""
    accuracy = f"test accuracy {summary['test_accuracy']:.2%} ({summary['test_correct']} of {summary['test_count']})"
    print(f"{accuracy} after {summary['final_step']} steps, {summary['seconds']:.1f} s", flush=True)
    if not quiet:
        print(f"state {summary['state_sha256']}", flush=True)


def across_seeds(path: Path, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and 95 % interval (Student's t) of the test accuracy; written to `path`."""
    values = [s["test_accuracy"] for s in summaries]
    found = spread(values)
    result = {
        "n": found.n,
        "seeds": [s["seed"] for s in summaries],
        "test_accuracy": values,
        "mean": found.mean,
        "std": found.std,
        "interval_95": list(found.interval),
    }
    write_json(path, result)
    print(
        f"{found.n} seeds: test accuracy {found.mean:.2%} +- {found.std:.2%} (standard deviation),"
        f" 95 % interval +- {found.half:.2%}"
    )
    return result


class Initial(NamedTuple):
    """What a new run begins with, and what the weights it took expect of pixels, None where that is not known."""

    variables: dict[str, PyTree] | None
    pixels: Pixels | None


def initial(experiment: Experiment, net: nn.Module, images: np.ndarray) -> Initial:
    """What `--init-from` gives a new run on `images` (n, h, w, c); where `--init-replace` asks, what the run would
    begin with otherwise.

    `InputError` for what is neither run nor weights file nor fetched weights of the index, for weights that do not
    fit, and for weights whose source differs from `net` in what no shape shows (its epsilon, say).
    """
    source, dtype = str(experiment.init_from), np.float64 if experiment.model.dtype == "float64" else np.float32
    path = Path(source)
    sample, replace = jax.ShapeDtypeStruct((1, *images.shape[1:]), dtype), experiment.init_replace
    if source in INDEX or path.suffix in READERS or path.is_file():
        published = _published(source, experiment)
        loaded, pixels = jax.tree.map(lambda leaf: leaf.astype(dtype), published.variables), published.preprocessing
    else:
        loaded, pixels = load_variables(path), None

    def shapes() -> PyTree:
        made = net.init(jax.random.key(0), jnp.zeros(sample.shape, dtype), train=False)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), made)

    merged = merge(jax.eval_shape(shapes), loaded, replace=replace)  # says what does not fit before compiling
    if not replace:
        return Initial(merged, pixels)
    fresh = create_state(net, optimizer=optax.identity(), sample=sample, seed=experiment.seed).variables()
    return Initial(merge(fresh, loaded, replace=replace), pixels)


def _published(source: str, experiment: Experiment) -> Pretrained:
    """Weights of a file or of the index, whose source is the experiment's model but for the head."""
    model = experiment.model
    overrides: dict[str, Any] = dict(model.overrides)
    loaded, net = store.load(source, model=model.name, **overrides), models.create(model.name, **overrides)
    lacking = {k: value for k, value in loaded.overrides.items() if k != "num_classes" and getattr(net, k) != value}
    if lacking:
        flags = " ".join(f"{field} {value}" for field, value in lacking.items())
        raise InputError(f"{source} belongs to another {model.name}: give --model.overrides {flags}")
    return loaded


def other_pixels(experiment: Experiment, preprocessing: Preprocessing, expected: Pixels) -> str:
    """One line where a run's preprocessing is not what the weights it starts from expect; empty where it is.

    Also empty for another number of channels than the run's, where `expected` is its family's and not the file's.
    """
    if len(expected.mean) != len(preprocessing.channel_mean):
        return ""
    found = of_fitted(preprocessing, expected.size)
    if found and found.same_arithmetic(expected):
        return ""
    fixed = [kind for kind in ("imagenet", "inception") if PREPROCESSINGS[kind].same_arithmetic(expected)]
    return (
        f"--data.preprocessing {preprocessing.kind} gives {found.arithmetic if found else 'other pixels'},"
        f" {experiment.init_from} expects {expected.arithmetic}"
        + (f": give --data.preprocessing {fixed[0]}" if fixed else "")
    )


def load_variables(path: Path) -> dict[str, PyTree]:
    """Parameters and collections of a run directory's selected or newest step, nested, on the host."""
    run = path.absolute()
    if not (run / "config.json").is_file():
        raise InputError(
            f"{path} is not a run directory: it has no config.json; files of weights end in {', '.join(READERS)}, and"
            " published weights are named as in `jaxcnn weights list`"
        )
    checkpoints = Checkpoints(run / "checkpoints", report=lambda message: print(message, file=sys.stderr))
    summary = read_json(run / "summary.json")
    best = summary["selected_step"] if summary else checkpoints.best_step()
    newest_first = checkpoints.steps()[::-1]
    restored = checkpoints.restore_first(newest_first if best is None else dict.fromkeys([best, *newest_first]))
    if restored is None:
        raise InputError(f"run {path} has no complete checkpoint yet")
    average = any(name.startswith("ema/") for name in restored.arrays)
    flat: dict[str, np.ndarray] = {}
    for name, array in restored.arrays.items():
        if average == name.startswith("ema/"):
            place = name.removeprefix("ema/")
            if place.startswith(("params/", "collections/")):
                flat[place.removeprefix("collections/")] = np.asarray(array)
    return unflatten_dict(flat, sep="/")


def confusion_counts(
    net: nn.Module, variables: PyTree, data: build.Splits, prepare: Any, *, batch_size: int
) -> np.ndarray:
    """(k, k) counts over the test split, rows the true classes."""
    classes = len(data.classes)

    @jax.jit
    def count(variables: PyTree, batch: Any) -> Any:
        batch = prepare(batch)
        outputs: Any = net.apply(variables, batch["image"], train=False)
        return metrics.confusion(outputs, batch, classes)

    mesh = parallel.make_mesh()
    batches = eval_batches(data.test.images, data.test.labels, batch_size=batch_size, mesh=mesh)
    with jax.set_mesh(mesh):
        return np.sum([jax.device_get(count(variables, batch)) for batch in batches()], axis=0)


def curves(history: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Loss and error over the steps, training beside evaluation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("loss (nats)", "error (%)"), strict=True):
        for prefix, colour, name in (("", BLUE, "training"), *((f"{n}_", ORANGE, n) for n in ("validation", "test"))):
            points = [(line["step"], line.get(prefix + key)) for line in history if line.get(prefix + key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                shown = values if key == "loss" else [100 * (1 - v) for v in values]
                marker = "o" if len(points) < 30 and prefix else None
                style = "--" if prefix == "test_" else "-"
                axes.plot(steps, shown, style, color=colour, label=name, marker=marker, markersize=4)
        axes.set(xlabel="step", ylabel=label)
        axes.set_yscale("log") if key == "loss" else axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def confusion(counts: np.ndarray, classes: Sequence[str], path: Path, *, title: str) -> None:
    """The confusion matrix as a picture; the numbers are written in up to 20 classes."""
    from matplotlib.figure import Figure

    k = len(classes)
    side = min(12, 2.5 + 0.45 * k)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class")
    if k <= 20:
        axes.set_xticks(range(k), classes, rotation=45, ha="right")
        axes.set_yticks(range(k), classes)
        for i, j in zip(*np.nonzero(counts), strict=True):
            colour = "w" if share[i, j] > 0.5 else "k"
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    figure.savefig(path, dpi=120)
