"""Pictures from disk: one JPEG or PNG file, or a folder of class folders."""

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxcnn.data.dataset import Dataset, Split, stratified
from jaxcnn.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png")
TEST_FRACTION = 0.2
SPLIT_SEED = 0

Size = tuple[int, int]


def read_image(
    path: Path | str, *, size: Size | None = None, channels: int = 3, border: float = 0.0
) -> NDArray[np.uint8]:
    """An image file as (h, w, `channels`) in 0..255, turned upright as its EXIF entry says.

    With `size` (h, w) it is scaled (bilinear, antialiased) until it just covers that size, and cropped
    about its centre, inside what `border` (see `cover`) leaves. Grey, palette and CMYK pictures become RGB
    (`channels` 3) or any becomes grey (1); 16-bit values are divided by 257; transparency is dropped.

    Raises:
      InputError: missing, unreadable or damaged file, neither JPEG nor PNG, or more pixels than
        Pillow's `MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    with quiet():
        picture = open_image(path, str(path), channels=channels)
    if size is not None:
        picture = cover(picture, size, border=border)
    return np.asarray(picture, np.uint8).reshape(picture.height, picture.width, channels)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's warnings about metadata that plays no part here. Not for threads, which share the filters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_image(
    file: Path | str | BinaryIO, name: str, *, channels: int = 3, draft: Callable[[Any], object] | None = None
) -> Any:
    """The Pillow image as `read_image` states, in mode RGB or L; errors call it `name`.

    `draft` sees the image before it is decoded, and may tell a JPEG to come out smaller. Warnings are the caller's to
    silence (`quiet`).
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file, formats=["JPEG", "PNG"]) as image:
            pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if most is not None and pixels > most:  # Pillow itself only warns up to twice as many
                raise Image.DecompressionBombError(f"{pixels} pixels, at most {most}")
            if draft is not None:
                draft(image)
            upright = ImageOps.exif_transpose(image)
        return _eight_bit(upright).convert({1: "L", 3: "RGB"}[channels])
    except Image.DecompressionBombError as error:
        raise InputError(f"cannot read image {name}: decompression bomb: {error}") from error
    except Exception as error:  # Pillow raises many types on damaged files
        raise InputError(f"cannot read image {name}: {error}") from error


def _eight_bit(image):
    """`image` in a mode from which Pillow converts to L or RGB without clipping or warnings."""
    from PIL import Image

    if image.mode.startswith("I"):  # I, I;16, I;16B: 16-bit grey
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    return image.convert("RGBA") if image.mode == "P" else image


def cover(picture: Any, size: Size, *, border: float = 0.0) -> Any:
    """A Pillow image scaled until it just covers `size` (h, w), bilinear and antialiased, cropped about its centre.

    The share `border` of height and width is cut off first, on each side.
    """
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (size[1], size[0]), method=Image.Resampling.BILINEAR, bleed=border)


def resize(images: np.ndarray, size: Size) -> NDArray[np.uint8]:
    """uint8 images (n, h, w, c), c 1 or 3, scaled and centre-cropped to `size` (h, w) as in `read_image`."""
    from PIL import Image

    if images.shape[1:3] == size:
        return images
    if images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        raise InputError(f"cannot resize {images.dtype} images of shape {images.shape[1:]}: uint8, 1 or 3 channels")
    out = np.empty((len(images), *size, images.shape[-1]), np.uint8)
    for target, image in zip(out, images, strict=True):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        target[...] = np.asarray(cover(picture, size)).reshape(target.shape)
    return out


class Entry(NamedTuple):
    path: Path
    label: int


class Listing(NamedTuple):
    classes: tuple[str, ...]
    train: list[Entry]
    test: list[Entry]


def list_folder(folder: Path) -> Listing:
    """The images of `folder/CLASS/*.{jpg,jpeg,png}`, the classes being the sorted folder names.

    The splits are `folder/train/CLASS` and `folder/test/CLASS` (or `val`) where they exist; else, and
    where `train` stands alone, a fixed stratified fifth, drawn over the sorted paths, is the test
    split. Hidden files and other suffixes are ignored.

    Raises:
      InputError: no class folder, an empty one, or classes that differ between the splits.
    """
    train_root = folder / "train" if _subfolders(folder / "train") else folder
    held_root = next((folder / part for part in ("test", "val") if _subfolders(folder / part)), None)
    classes, train = _list(train_root)
    if train_root != folder and held_root is not None:
        test_classes, test = _list(held_root)
        if test_classes != classes:
            differ = ", ".join(sorted(set(classes) ^ set(test_classes)))
            raise InputError(f"{held_root} and {train_root} differ in their class folders: {differ}")
    else:
        mask = stratified(np.array([entry.label for entry in train]), TEST_FRACTION, seed=SPLIT_SEED)
        test = [entry for entry, chosen in zip(train, mask, strict=True) if chosen]
        train = [entry for entry, chosen in zip(train, mask, strict=True) if not chosen]
    if not test:
        raise InputError(f"{folder}: too few images for a test split, expected three or more in some class")
    return Listing(classes, train, test)


def read_folder(folder: Path, *, image_size: Size | None) -> Dataset:
    """The RGB images of `list_folder`.

    Without `image_size` all images must be of one size. The digest covers the relative paths and the bytes of the
    files, in the order of use.

    Raises:
      InputError: as `list_folder`; an unreadable image, or images of several sizes and no `image_size`.
    """
    classes, train, test = list_folder(folder)
    both, digest = _read(folder, train + test, image_size)
    return Dataset(
        name=folder.name,
        train=Split(both.images[: len(train)], both.labels[: len(train)]),
        test=Split(both.images[len(train) :], both.labels[len(train) :]),
        classes=classes,
        digests={folder.name: digest},
    )


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _list(root: Path) -> tuple[tuple[str, ...], list[Entry]]:
    """The class names and the image files of all classes, in an order the file system has no part in."""
    folders = _subfolders(root)
    if not folders:
        raise InputError(f"{root}: no class folder found, expected {root}/CLASS/*.jpg (or .jpeg, .png)")
    entries: list[Entry] = []
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not files:
            raise InputError(f"{folder}: empty class folder, expected at least one {', '.join(SUFFIXES)} file")
        entries += [Entry(path, label) for path in files]
    return tuple(folder.name for folder in folders), entries


def _read(folder: Path, entries: list[Entry], image_size: Size | None) -> tuple[Split, str]:
    first = read_image(entries[0].path, size=image_size)
    images = np.empty((len(entries), *first.shape), np.uint8)
    sha = hashlib.sha256()
    for index, entry in enumerate(entries):
        image = read_image(entry.path, size=image_size)
        if image.shape != first.shape:
            raise InputError(
                f"{entry.path}: {image.shape[0]} x {image.shape[1]} pixels, but {entries[0].path} has "
                f"{first.shape[0]} x {first.shape[1]}: give one size with --data.image-size H W"
            )
        images[index] = image
        sha.update(entry.path.relative_to(folder).as_posix().encode() + b"\0")
        sha.update(hashlib.sha256(entry.path.read_bytes()).digest())
    return Split(images, np.array([entry.label for entry in entries], np.int32)), sha.hexdigest()
