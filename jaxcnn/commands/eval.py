"""`jaxcnn eval`: exact counts on a test split."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxcnn.commands.source import Source
from jaxcnn.errors import InputError


@dataclass(frozen=True)
class _DataFlags:
    name: str | None = None
    """Another data set than the run's own."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=("--data.eval-batch-size",))] = 1000
    """Examples in one evaluation batch; the result does not depend on it."""


@dataclass(frozen=True)
class Eval:
    """Counts the right answers of a run, or of published weights, on a test split."""

    run: tyro.conf.Positional[Path | None] = None
    """Run directory."""
    source: tyro.conf.OmitArgPrefixes[Source] = dataclasses.field(default_factory=Source)
    data: _DataFlags = dataclasses.field(default_factory=_DataFlags)
    data_dir: Path | None = None
    json: bool = False


def main(args: Sequence[str]) -> int:
    flags = tyro.cli(Eval, args=list(args), prog="jaxcnn eval")
    if flags.data.batch_size < 1:
        raise InputError(f"--data.batch-size {flags.data.batch_size} must be at least 1")
    trained = flags.source.trained(flags.run)
    from jaxcnn import build
    from jaxcnn.data import sources

    experiment = trained.experiment
    if flags.data.name:
        data_settings = dataclasses.replace(experiment.data, name=flags.data.name)
        if flags.data.name in sources.SOURCES or flags.data.name.startswith("tfds:"):  # which cannot stay on disk
            data_settings = dataclasses.replace(data_settings, storage="memory", random_resized_crop=None)
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
    result = trained.evaluate(data.test, batch_size=flags.data.batch_size)
    if flags.json:
        print(json.dumps(result))
    else:
        print(f"test accuracy {result['accuracy']:.2%} ({result['correct']} of {result['count']})")
    return 0
