"""Folders of small JPEG files for tests; no JAX, as workers import this."""

import io
import os
import signal
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth noise in colour."""
    small = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(height: int, width: int, *, seed: int = 0, **options) -> bytes:
    stream = io.BytesIO()
    picture(np.random.default_rng(seed), height, width).save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


def folder(path: Path, *, classes: int = 3, each: int = 15, held: int = 0) -> Path:
    """`path/CLASS/*.jpg` of several sizes; with `held`, `path/train` and `path/val` with so many of each class."""
    for part, count in (("train", each), ("val", held)) if held else (("", each),):
        for label in range(classes):
            directory = path / part / f"class{label}"
            directory.mkdir(parents=True)
            for i in range(count):
                seed = 1000 * label + i + 10**6 * (part == "val")
                (directory / f"{i:03}.jpg").write_bytes(jpeg(24 + seed % 17, 30 + seed % 7, seed=seed))
    return path


def of_worker(index: int) -> dict[str, np.ndarray]:
    """A `make` for a pipeline: whether signals are ignored there, and which heavy packages have been imported."""
    import jaxcnn.data.disk

    assert jaxcnn.data.disk.DiskImages
    ignored = [signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGTERM, signal.SIGINT)]
    modules = [name for name in ("jax", "jaxlib", "tensorflow", "flax") if sys.modules.get(name) is not None]
    return {"ignored": np.array(ignored), "modules": np.array(modules, dtype="U20")}


def deadly(index: int) -> dict[str, np.ndarray]:
    """A `make` that ends its process, as the kernel does where memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def several(index: int) -> dict[str, np.ndarray]:
    """A `make` with arrays of several types, shapes and orders in memory."""
    rng = np.random.default_rng(index)
    image = rng.integers(0, 256, (3, 4, 5), dtype=np.uint8)
    return {
        "image": image,
        "turned": image.T,
        "mask": rng.random(7),
        "one": np.array(index, np.float32),
        "none": np.zeros((0, 2)),
        "label": rng.integers(0, 10, 4, dtype=np.int32),
    }


def faulty(index: int) -> dict[str, np.ndarray]:
    """A `make` with a bug."""
    return {"image": np.zeros(3)[index:][0:1] / {}[index]}
