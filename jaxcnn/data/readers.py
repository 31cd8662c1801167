"""The published file formats: idx (MNIST and its kin) and the binary version of CIFAR."""

import gzip
import hashlib
import io
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcnn.errors import InputError

IDX_UBYTE = {1: b"\x00\x00\x08\x01", 3: b"\x00\x00\x08\x03"}
"""Magic number of an idx file of unsigned bytes, by rank."""

DEFLATE_LIMIT = 1032
"""Deflate cannot shrink data by more: a header that asks for more is damaged, and is not believed."""

CIFAR_SHAPE = (3, 32, 32)
CIFAR_BYTES = 3 * 32 * 32


class File(NamedTuple):
    """A file as found on disk (what its digest is taken of); `path` names it in messages."""

    path: Path
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def read_file(path: Path) -> File:
    """Raises InputError when the system refuses to read `path`."""
    try:
        return File(path, path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def parse_idx(file: File, *, rank: int) -> np.ndarray:
    """The uint8 array of an idx file (rank 1: labels; rank 3: images (n, h, w)), gzipped if named `.gz`.

    Raises:
      InputError: wrong magic number, damaged gzip data, or a length other than the header's.
    """
    header_size = 4 + 4 * rank
    with _unpacked(file) as stream:
        header = _read(file, stream, header_size)
        if header[:4] != IDX_UBYTE[rank]:
            raise InputError(
                f"{file.path}: starts with {header[:4].hex()}, expected {IDX_UBYTE[rank].hex()} "
                f"(an idx file of unsigned bytes of rank {rank}): not the original file"
            )
        if len(header) < header_size:
            raise InputError(f"{file.path}: truncated, {len(header)} bytes, expected {header_size} of header")
        shape = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
        expected = int(np.prod(shape, dtype=object))
        if expected > DEFLATE_LIMIT * len(file.data):
            raise InputError(f"{file.path}: header says {shape}, more than {len(file.data)} bytes can hold")
        body = _read(file, stream, expected + 1)  # one more, to notice a file that is too long
    if len(body) != expected:
        found = f"{len(body)} bytes" if len(body) < expected else "more"
        raise InputError(f"{file.path}: header says {shape}, so {expected} bytes should follow, found {found}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _unpacked(file: File) -> io.BufferedIOBase:
    stream = io.BytesIO(file.data)
    return gzip.GzipFile(fileobj=stream) if file.path.suffix == ".gz" else stream


def _read(file: File, stream: io.BufferedIOBase, size: int) -> bytes:
    try:
        return stream.read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file.path}: truncated or damaged gzip data ({error}): get the file again") from error


class Examples(NamedTuple):
    """`images` (n, h, w, c) uint8, `labels` (n,) int32."""

    images: np.ndarray
    labels: np.ndarray


def pair_idx(images: File, labels: File, *, classes: int) -> Examples:
    """Images (n, h, w, 1) and labels of two idx files.

    Raises:
      InputError: as `parse_idx`; different counts; a label of `classes` or more.
    """
    pixels, values = parse_idx(images, rank=3), parse_idx(labels, rank=1)
    if len(pixels) != len(values):
        raise InputError(f"{labels.path}: {len(values)} labels, expected {len(pixels)} as in {images.path.name}")
    return Examples(pixels[..., None], _labels(labels.path, values, classes))


def parse_cifar(file: File, *, records: int, label_bytes: int, classes: int) -> Examples:
    """Images (n, 32, 32, 3) of a CIFAR binary file: `label_bytes` labels, then red, green, blue planes.

    Where a record has two labels (CIFAR-100: coarse, fine) the last counts.

    Raises:
      InputError: not exactly `records` records, or a label of `classes` or more.
    """
    size = label_bytes + CIFAR_BYTES
    if len(file.data) != records * size:
        raise InputError(
            f"{file.path}: {len(file.data)} bytes, expected {records * size} ({records} records of {size}): "
            "truncated, or not the original file"
        )
    rows = np.frombuffer(file.data, np.uint8).reshape(records, size)
    planes = rows[:, label_bytes:].reshape(records, *CIFAR_SHAPE)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return Examples(images, _labels(file.path, rows[:, label_bytes - 1], classes))


def _labels(path: Path, values: np.ndarray, classes: int) -> np.ndarray:
    outside = np.flatnonzero(values >= classes)
    if outside.size:
        index = int(outside[0])
        raise InputError(f"{path}: label {values[index]} of example {index} is outside 0..{classes - 1}")
    return values.astype(np.int32)


def tar_members(archive: File, *, names: list[str], limit: int) -> dict[str, File]:
    """The regular members called `names`, read in memory: nothing in the archive decides a path on disk.

    Raises:
      InputError: damaged archive, a member missing, or one of more than `limit` bytes.
    """
    found: dict[str, File] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive.data), mode="r:gz") as tar:
            for member in tar:
                if member.name not in names or not member.isfile():
                    continue
                if member.size > limit:
                    raise InputError(f"{archive.path}: {member.name} has {member.size} bytes, expected {limit}")
                stream = tar.extractfile(member)
                assert stream is not None  # a regular member always has contents
                found[member.name] = File(archive.path / member.name, stream.read())
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{archive.path}: truncated or damaged archive ({error}): get it again") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(f"{archive.path}: {', '.join(missing)} not found inside: not the original archive")
    return found
