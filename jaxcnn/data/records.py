"""A folder of images as a few large files: written as ArrayRecord by `jaxcnn data prepare`, read by index."""

import hashlib
import io
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcnn.data import decode
from jaxcnn.data.dataset import Dataset, Split
from jaxcnn.data.decode import Compressed
from jaxcnn.data.disk import DiskImages, Files, split_of
from jaxcnn.data.images import Entry, Size, list_folder, open_image, quiet
from jaxcnn.errors import InputError
from jaxcnn.files import write_json

INDEX = "index.json"
"""`format`; `classes`; and for each split `counts`, its examples by class, and `files`: `name`, `records`, `bytes`,
`sha256`. The examples of a split go through its files in order, sorted by class. A record is the label, four bytes with
the lowest first, and a JPEG or PNG file."""

FORMAT = 1
PARTS = ("train", "test")
SHARD_BYTES = 1 << 30
LABEL_BYTES = 4
CHUNK = 256


class Prepared(NamedTuple):
    """How many images were written, how many bytes they take, and why others were left out."""

    images: int
    bytes: int
    skipped: list[str]


def prepare(
    source: Path,
    output: Path,
    *,
    short_side: int | None = None,
    quality: int = 90,
    shards: int | None = None,
    skip_corrupt: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Prepared:
    """Writes the images of `images.list_folder(source)` to the new directory `output`, in the same splits and order.

    Every image is decoded once to see that it is whole. Its file is copied as it is, unless `short_side` is given and
    its shorter side is larger: then that side is scaled to it (bilinear, antialiased), and the image is written as a
    JPEG of `quality`. Each split gets `shards` files, by default one for each GiB of the folder. `progress(done, of)`
    counts images. `output` appears whole or not at all.

    Raises:
      InputError: as `list_folder`; `output` exists, a number is out of its range, or an image cannot be read, unless
        `skip_corrupt` leaves those out.
    """
    for name, value, low, high in [
        ("--short-side", 1 if short_side is None else short_side, 1, 65535),
        ("--quality", quality, 1, 100),
        ("--shards", 1 if shards is None else shards, 1, 99999),
    ]:
        if not low <= value <= high:
            raise InputError(f"{name} {value} must be from {low} to {high}")
    if output.exists():
        raise InputError(f"{output} exists: move it away, or give another name with --output")
    listing = list_folder(source)
    total = len(listing.train) + len(listing.test)
    temporary = output.with_name(f".{output.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir(parents=True)
    skipped: list[str] = []
    index: dict[str, Any] = {"format": FORMAT, "classes": list(listing.classes)}
    ready = _Ready(source, short_side, quality)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, quiet():
            done = itertools.count(1)

            def records(entries: Sequence[Entry]) -> Iterator[tuple[int, bytes]]:
                for start in range(0, len(entries), CHUNK):
                    for entry, made in pool.map(lambda e: (e, ready(e)), entries[start : start + CHUNK]):
                        progress(next(done), total)
                        if isinstance(made, bytes):
                            yield entry.label, made
                        elif skip_corrupt:
                            skipped.append(str(made))
                        else:
                            raise InputError(f"{made}; --skip-corrupt leaves such images out")

            for part, entries in zip(PARTS, (listing.train, listing.test), strict=True):
                files = shards or math.ceil(sum(entry.path.stat().st_size for entry in entries) / SHARD_BYTES)
                index[part] = _write(temporary, part, records(entries), len(entries), files, len(listing.classes))
        for part in PARTS:
            if not index[part]["files"]:
                raise InputError(f"{source}: no image of the {part} split can be read")
        write_json(temporary / INDEX, index)
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    written = [file for part in PARTS for file in index[part]["files"]]
    return Prepared(sum(file["records"] for file in written), sum(file["bytes"] for file in written), skipped)


@dataclass(frozen=True)
class _Ready:
    """The bytes to write for an image, or why it cannot be read."""

    root: Path
    short_side: int | None
    quality: int

    def __call__(self, entry: Entry) -> bytes | InputError:
        try:
            image = Files(entry.path.parent, np.array([os.fsencode(entry.path.name)]))[0]
            picture = open_image(io.BytesIO(image.content), image.name)
        except InputError as error:
            return error
        if self.short_side is None or min(picture.size) <= self.short_side:
            return image.content
        from PIL import Image

        scale = self.short_side / min(picture.size)
        size = tuple(max(self.short_side, round(side * scale)) for side in picture.size)
        stream = io.BytesIO()
        picture.resize(size, Image.Resampling.BILINEAR).save(stream, "JPEG", quality=self.quality)
        return stream.getvalue()


def _write(
    directory: Path, part: str, records: Iterator[tuple[int, bytes]], examples: int, shards: int, classes: int
) -> dict[str, Any]:
    """Writes one split's files; what the index says of them."""
    from array_record.python.array_record_module import ArrayRecordWriter

    counts, files = [0] * classes, []
    shards = min(max(shards, 1), examples)
    for shard in range(shards):
        path = directory / f"{part}-{shard:05}-of-{shards:05}.array_record"
        wanted = (shard + 1) * examples // shards - shard * examples // shards
        writer, written = ArrayRecordWriter(str(path), "group_size:1,uncompressed"), 0
        try:
            for label, content in itertools.islice(records, wanted):
                writer.write(label.to_bytes(LABEL_BYTES, "little") + content)
                counts[label] += 1
                written += 1
        finally:
            writer.close()
        if written == 0:  # images were left out
            path.unlink()
            continue
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files.append({"name": path.name, "records": written, "bytes": path.stat().st_size, "sha256": sha256})
    return {"counts": counts, "files": files}


class Records:
    """Compressed images by index, out of ArrayRecord files with so many records each; `labels` (n,) are checked."""

    def __init__(self, paths: Sequence[Path], records: Sequence[int], labels: np.ndarray):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._paths, self._ends, self._labels = paths, np.cumsum(records), labels
        self._source = ArrayRecordDataSource([f"{p}[0:{n}]" for p, n in zip(paths, records, strict=True)])

    def __getitem__(self, index: int, /) -> Compressed:
        file = int(np.searchsorted(self._ends, index, side="right"))
        name = f"{self._paths[file]}, record {index - (self._ends[file - 1] if file else 0)}"
        try:
            record = self._source[index]
        except Exception as error:  # of several types
            raise InputError(f"cannot read {name}: {error}: prepare the set anew") from error
        label = int.from_bytes(record[:LABEL_BYTES], "little")
        if label != self._labels[index]:
            raise InputError(f"{name} has label {label}, but {INDEX} says {self._labels[index]}: prepare the set anew")
        return Compressed(record[LABEL_BYTES:], name)


def open_records(folder: Path, *, image_size: Size) -> Dataset:
    """What `prepare` wrote, left on disk. The digest is the index's, which has one of every file.

    Raises:
      InputError: the index is damaged or of another format, or a file is missing or has another length.
    """
    path = folder / INDEX
    try:
        content = path.read_bytes()
        index = json.loads(content)
        if index["format"] != FORMAT:
            raise InputError(f"{path} has format {index['format']}, expected {FORMAT}: prepare the set anew")
        train, test = (_open(folder, index[part], image_size) for part in PARTS)
        classes = tuple(index["classes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): prepare the set anew") from error
    return Dataset(folder.name, train, test, classes, {folder.name: hashlib.sha256(content).hexdigest()})


def _open(folder: Path, part: dict[str, Any], image_size: Size) -> Split:
    paths = [folder / file["name"] for file in part["files"]]
    for path, file in zip(paths, part["files"], strict=True):
        length = path.stat().st_size if path.is_file() else None
        if length != file["bytes"]:
            found = "is missing" if length is None else f"has {length} bytes"
            raise InputError(f"{path} {found}, expected {file['bytes']} bytes: prepare the set anew")
    records = [file["records"] for file in part["files"]]
    labels = np.repeat(np.arange(len(part["counts"])), part["counts"]).astype(np.int32)
    if len(labels) != sum(records):
        raise ValueError(f"{len(labels)} labels for {sum(records)} records")
    return split_of(Records(paths, records, labels), labels, size=image_size)


def read_records(folder: Path, *, image_size: Size | None) -> Dataset:
    """What `prepare` wrote as arrays, as `images.read_folder` reads the folder it was made of.

    Raises:
      InputError: as `open_records`; an unreadable image, or images of several sizes and no `image_size`.
    """
    stored = open_records(folder, image_size=image_size or (1, 1))

    def read(split: Split) -> Split:
        reader, found = _reader(split), np.empty((0,))
        for i in range(len(split)):
            with quiet():
                image = decode.centre(reader[i], size=image_size)
            if i == 0:
                found = np.empty((len(split), *image.shape), np.uint8)
            if image.shape != found[0].shape:
                raise InputError(
                    f"{folder}: image {i} has shape {image.shape}, but image 0 has {found[0].shape}: give one size with"
                    " --data.image-size H W"
                )
            found[i] = image
        return Split(found, split.labels)

    return Dataset(stored.name, read(stored.train), read(stored.test), stored.classes, stored.digests)


def _reader(split: Split) -> Any:
    images: Any = split.images
    assert isinstance(images, DiskImages)
    return images.reader
