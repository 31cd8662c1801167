"""`jaxcnn weights`: the public weights that are known, their download, and files for and from others."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxcnn.cli import run_subcommand
from jaxcnn.commands.output import show_download


def main(args: Sequence[str]) -> int:
    """`jaxcnn weights list|show|fetch|convert|export`."""
    return run_subcommand("weights", SUBCOMMANDS, args)


@dataclass(frozen=True)
class List:
    json: bool = False


def _list(flags: List) -> int:
    """Shows the known weights: accuracy, licence, whether they are here."""
    from jaxcnn.pretrained.index import INDEX
    from jaxcnn.pretrained.store import path_of

    rows = [
        {
            "name": name,
            "top1": entry.top1,
            "top5": entry.top5,
            "licence": entry.licence,
            "url": entry.url,
            "sha256": entry.sha256,
            "here": path_of(name).exists(),
        }
        for name, entry in INDEX.items()
    ]
    if flags.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        top5 = f"{row['top5']:.2f}" if row["top5"] else "-"
        here = "here" if row["here"] else ""
        print(f"{row['name']:40} top-1 {row['top1']:.2f}  top-5 {top5:>5}  {row['licence']:13} {here}".rstrip())
    return 0


@dataclass(frozen=True)
class Name:
    name: tyro.conf.Positional[str]
    """NAME.TAG of `jaxcnn weights list`."""
    weights_dir: Path | None = None
    """Where weights lie; by default $JAXCNN_WEIGHTS or ~/.cache/jaxcnn/weights."""


def _show(flags: Name) -> int:
    """Says where the weights come from, their licence, preprocessing and accuracy."""
    from jaxcnn.pretrained.index import describe, find
    from jaxcnn.pretrained.read import PICKLES, conversion
    from jaxcnn.pretrained.store import path_of

    path = path_of(flags.name, flags.weights_dir)
    print(describe(find(flags.name)))
    print(f"{'file':13}  {path}{'' if path.exists() else ' (not fetched)'}")
    if path.suffix in PICKLES:
        print(f"{'conversion':13}  {conversion(path)}")
    return 0


def _fetch(flags: Name) -> int:
    """Downloads the weights, verified; an interrupted download goes on where it was."""
    from jaxcnn.pretrained.read import PICKLES, conversion
    from jaxcnn.pretrained.store import fetch

    path = fetch(flags.name, flags.weights_dir, progress=show_download)
    print(path)
    if path.suffix in PICKLES:
        print(
            f"note: a pickle, which jaxcnn does not read; with PyTorch, convert it: {conversion(path)}", file=sys.stderr
        )
    return 0


@dataclass(frozen=True)
class Convert:
    weights: tyro.conf.Positional[str]
    """A .safetensors, .npz or Keras .h5 file, or NAME.TAG of `jaxcnn weights list`, once fetched."""
    out: tyro.conf.Positional[Path]
    """The .safetensors file to write; its card gets the suffix .md."""
    model: str | None = None
    """One of `jaxcnn list`; not needed for NAME.TAG."""
    layout: str | None = None
    """How the file names its layers; by default the layout that fits best."""
    preprocessing: str | None = None
    """What images go through; by default the layout's."""


def _convert(flags: Convert) -> int:
    """Rewrites another codebase's weights under our names, checked to the last tensor."""
    from jaxcnn import trained
    from jaxcnn.pretrained.index import INDEX

    source = trained.of_weights(
        flags.weights, model=flags.model, layout=flags.layout, preprocessing=flags.preprocessing
    )
    entry = INDEX.get(flags.weights)
    facts = {"converted from": entry.url if entry else Path(flags.weights).name}
    return _write(source, flags.out, facts | ({"licence": entry.licence} if entry else {}))


@dataclass(frozen=True)
class Export:
    run: tyro.conf.Positional[Path]
    """Run directory."""
    out: tyro.conf.Positional[Path]
    """The .safetensors file to write; its card gets the suffix .md."""
    licence: Annotated[str, tyro.conf.arg(metavar="NAME")] = "not stated"
    """What the card says of the licence."""


def _export(flags: Export) -> int:
    """Writes the weights of a run as safetensors, with a model card."""
    from jaxcnn import trained
    from jaxcnn.train.run import read_json

    source = trained.of_run(flags.run)
    summary = read_json(flags.run / "summary.json") or {}
    facts = {"data": source.experiment.data.name, "licence": flags.licence}
    if "test_accuracy" in summary:
        facts["test accuracy"] = f"{summary['test_accuracy']:.2%} of {summary['test_count']} images"
    return _write(source, flags.out, facts)


def _write(source: Any, out: Path, facts: dict[str, str]) -> int:
    from jaxcnn.pretrained.export import export

    card = export(
        out,
        source.variables,
        model=source.experiment.model.name,
        overrides=source.overrides,
        classes=source.classes,
        pixels=source.pixels,
        facts=facts,
    )
    if source.pixels is None:
        print("note: this run's preprocessing is no fixed arithmetic on pixels and stays with the run", file=sys.stderr)
    print(f"{out}\n{card}")
    return 0


SUBCOMMANDS = {
    "list": (List, _list),
    "show": (Name, _show),
    "fetch": (Name, _fetch),
    "convert": (Convert, _convert),
    "export": (Export, _export),
}
