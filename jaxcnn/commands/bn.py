"""`jaxcnn bn`: the BatchNorm of a finished run: statistics set anew, folded away, or compared with the data."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxcnn.cli import run_subcommand
from jaxcnn.commands.output import show
from jaxcnn.errors import InputError
from jaxcnn.types import Batch, PyTree


def main(args: Sequence[str]) -> int:
    """`jaxcnn bn recalibrate|fold|drift RUN`."""
    return run_subcommand("bn", SUBCOMMANDS, args)


@dataclass(frozen=True)
class _Run:
    run: tyro.conf.Positional[Path]
    """Run directory."""
    batch_size: int = 256
    """Examples in one batch; only one_pass depends on it."""
    data_dir: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class Recalibrate(_Run):
    mode: Literal["exact", "one_pass"] = "exact"
    """exact: layer by layer, as in evaluation; one_pass: the usual precise BatchNorm, as in training."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The .safetensors file to write; its card gets the suffix .md. By default RUN/recalibrated.safetensors."""


def _recalibrate(flags: Recalibrate) -> int:
    """Sets the running statistics to those of the training split, in a new file of weights."""
    output = flags.output or flags.run / "recalibrated.safetensors"
    _check_output(output)
    trained, data = _load(flags)
    from jaxcnn.analysis.batchnorm import recalibrate

    found = recalibrate(
        trained.network,
        trained.variables,
        _batches(trained, data.train, flags.batch_size),
        mode=flags.mode,
        seed=trained.experiment.seed,
        progress=_show_progress,
    )
    before, after = (
        trained.evaluate(data.test, batch_size=flags.batch_size, variables=variables)["accuracy"]
        for variables in (trained.variables, found.variables)
    )
    facts = {"statistics": f"recalibrated ({found.mode}) on {found.examples} images of {trained.experiment.data.name}"}
    _export(output, trained, found.variables, trained.overrides, facts)
    result = {
        "mode": found.mode,
        "examples": found.examples,
        "passes": found.passes,
        "test_accuracy_before": before,
        "test_accuracy_after": after,
        "output": str(output),
    }
    if flags.json:
        print(json.dumps(result))
        return 0
    print(f"mode {found.mode}: {found.passes} passes over {found.examples} training images")
    print(f"test accuracy {before:.2%} before, {after:.2%} after\n{output}")
    return 0


@dataclass(frozen=True)
class Fold(_Run):
    output: Annotated[Path, tyro.conf.arg(metavar="FILE")] = dataclasses.field(kw_only=True)
    """The .safetensors file to write."""


def _fold(flags: Fold) -> int:
    """Folds BatchNorm into the layers before it and writes the weights that remain."""
    _check_output(flags.output)
    trained, data = _load(flags)
    from jaxcnn.analysis.batchnorm import compare, fold

    x = trained.preprocess(data.test.images[: flags.batch_size])
    folded = fold(trained.network, trained.variables, x=x)
    found = compare(trained.network, trained.variables, folded, x)
    overrides = _without_norms(trained, folded.variables)
    if overrides is None:
        _write_arrays(flags.output, folded.variables)
    else:
        facts = {"BatchNorm": f"folded: {len(folded.folded)} norms; stored with no norm"}
        _export(flags.output, trained, folded.variables, overrides, facts)
    result = {
        "folded": folded.folded,
        "kept": folded.kept,
        **found._asdict(),
        "output": str(flags.output),
        "overrides": overrides,
    }
    if flags.json:
        print(json.dumps(result))
        return 0
    print(f"folded {len(folded.folded)}: {', '.join(folded.folded) or 'none'}")
    for path, reason in folded.kept.items():
        print(f"kept {path}: {reason}")
    print(f"largest logit difference {found.difference:.3g}, {found.relative:.3g} of the largest logit")
    print(f"{found.speedup:.2f} times as fast, {len(x)} images a call\n{flags.output}")
    if overrides is None:
        what = f"no options of {trained.experiment.model.name} give exactly these layers, so jaxcnn eval cannot read it"
        print(f"note: {what}; jaxcnn.analysis.batchnorm.fold gives the module that it belongs to", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class Drift(_Run):
    pass


def _drift(flags: Drift) -> int:
    """Compares the running statistics with the training split's, in evaluation, norm by norm."""
    trained, data = _load(flags)
    from jaxcnn.analysis.batchnorm import drift

    rows = drift(trained.network, trained.variables, _batches(trained, data.train, flags.batch_size))
    if flags.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
        return 0
    from rich.table import Table

    caption = "data in evaluation against running statistics; shifts in standard deviations of the data"
    table = Table("norm", caption=caption)
    for name in ("variance ratio", "smallest", "largest", "mean shift", "largest shift"):
        table.add_column(name, justify="right")
    for row in rows:
        values = (row.ratio, row.smallest, row.largest, row.shift, row.largest_shift)
        table.add_row(row.name, *(f"{value:.3g}" for value in values))
    show(table)
    return 0


def _check_output(output: Path) -> None:
    """Before anything is computed."""
    if output.suffix != ".safetensors":
        raise InputError(f"{output} has suffix {output.suffix!r}: expected .safetensors")
    if output.exists():
        raise InputError(f"{output} exists: move it away, or give another name with --output")


def _load(flags: _Run) -> tuple[Any, Any]:
    """The run, and its data."""
    if flags.batch_size < 1:
        raise InputError(f"--batch-size {flags.batch_size} must be at least 1")
    from jaxcnn import build, trained

    found = trained.of_run(flags.run)
    return found, build.splits(found.experiment, data_dir=flags.data_dir)


def _batches(trained: Any, split: Any, size: int) -> Callable[[], Iterator[Batch]]:
    """All examples in order, through the run's preprocessing, without augmentation."""
    import jax

    from jaxcnn import parallel
    from jaxcnn.data.loader import eval_batches

    raw = eval_batches(split.images, split.labels, batch_size=size, mesh=parallel.make_mesh())
    preprocess = jax.jit(trained.preprocess)

    def batches() -> Iterator[Batch]:
        for batch in raw():
            yield {"image": preprocess(batch["image"]), "mask": batch["mask"]}

    return batches


def _export(output: Path, trained: Any, variables: PyTree, overrides: dict[str, Any], facts: dict[str, str]) -> None:
    from jaxcnn.pretrained.export import export

    export(
        output,
        variables,
        model=trained.experiment.model.name,
        overrides=overrides,
        classes=trained.classes,
        pixels=trained.pixels,
        facts=facts,
    )


def _without_norms(trained: Any, variables: PyTree) -> dict[str, Any] | None:
    """The overrides with which the run's model has exactly these variables, and no norm; None where there are none."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxcnn import models
    from jaxcnn.tree import flatten

    given = {path: np.shape(leaf) for path, leaf in flatten(variables).items()}
    usual = {name: value for name, value in trained.overrides.items() if name != "statistics"}
    for options in ({"norm": "none"}, {"norm": "none", "use_bias": True}):
        overrides = {**usual, **options}
        try:
            net = models.create(trained.experiment.model.name, **overrides)
        except InputError:  # the model has no such option
            continue
        example = jnp.zeros((1, *trained.input))
        made = jax.eval_shape(lambda net=net, x=example: net.init(jax.random.key(0), x, train=False))
        if {path: leaf.shape for path, leaf in flatten(made).items()} == given:
            return overrides
    return None


def _write_arrays(output: Path, variables: PyTree) -> None:
    import numpy as np
    from safetensors.numpy import save

    from jaxcnn.files import replacing
    from jaxcnn.tree import flatten

    arrays = {path: np.ascontiguousarray(leaf) for path, leaf in flatten(variables).items()}
    with replacing(output) as file:
        file.write(save(arrays))


def _show_progress(done: int, passes: int) -> None:
    if passes > 1 and sys.stderr.isatty():
        print(f"\rpass {done} of {passes}", end="\n" if done == passes else "", file=sys.stderr, flush=True)


SUBCOMMANDS = {
    "recalibrate": (Recalibrate, _recalibrate),
    "fold": (Fold, _fold),
    "drift": (Drift, _drift),
}
