"""`jaxcnn data`: data sets to download, and folders of images to pack."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jaxcnn.cli import run_subcommand
from jaxcnn.commands.output import show_download


def main(args: Sequence[str]) -> int:
    """`jaxcnn data fetch|prepare`."""
    return run_subcommand("data", SUBCOMMANDS, args)


@dataclass(frozen=True)
class Fetch:
    name: tyro.conf.Positional[str]
    """mnist, fashion_mnist, cifar10 or cifar100."""
    data_dir: Path | None = None
    """Where the data sets lie; by default $JAXCNN_DATA or ~/.cache/jaxcnn/data."""


def _fetch(flags: Fetch) -> int:
    """Downloads the original files, pinned by size and SHA-256."""
    from jaxcnn.data.fetch import fetch
    from jaxcnn.data.sources import default_data_dir

    for path in fetch(flags.name, flags.data_dir or default_data_dir(), progress=show_download):
        print(path)
    return 0


@dataclass(frozen=True)
class Prepare:
    source: tyro.conf.Positional[Path]
    """A folder of images: FOLDER/CLASS/*.jpg, or FOLDER/train/CLASS/*.jpg beside FOLDER/val or FOLDER/test."""
    output: Path
    """The directory to make. As DIR/NAME it is --data.name folder:NAME --data-dir DIR."""
    short_side: int | None = None
    """Scale larger images down until their shorter side has so many pixels, and write those anew as JPEG."""
    quality: int = 90
    """Of the JPEGs written anew, 1 to 100."""
    shards: int | None = None
    """Files of each split; by default one for each GiB of the folder."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read, and list them."""


def _prepare(flags: Prepare) -> int:
    """Packs a folder of images into a few large files, after reading every image once."""
    from jaxcnn.commands.output import Counted
    from jaxcnn.data.records import prepare

    with Counted("preparing") as counted:
        found = prepare(
            flags.source,
            flags.output,
            short_side=flags.short_side,
            quality=flags.quality,
            shards=flags.shards,
            skip_corrupt=flags.skip_corrupt,
            progress=counted,
        )
    for reason in found.skipped:
        print(f"left out: {reason}")
    print(f"{flags.output}: {found.images:,} images, {found.bytes / 1e6:,.1f} MB")
    return 0


SUBCOMMANDS = {"fetch": (Fetch, _fetch), "prepare": (Prepare, _prepare)}
