"""Sets that tensorflow-datasets has prepared on disk, read without TensorFlow."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcnn.data.dataset import Dataset, Split, array_digests
from jaxcnn.data.images import Size, resize
from jaxcnn.errors import InputError

HELD = ("test", "validation")
NAME = re.compile(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?")


def read_prepared(name: str, *, root: Path, image_size: Size | None) -> Dataset:
    """Materialise `name` (`SET`, `SET/CONFIG` or `SET:1.0.0`) through `tfds.data_source`.

    Looked for in `root/tfds`, or in `root` where that does not exist. Needs splits `train` and `test`
    (else `validation`), a uint8 image feature and a class label: the supervised pair, or the features
    `image` and `label`. Nothing is downloaded or generated.

    Raises:
      InputError: not prepared there in a format with random access (ArrayRecord), a split or feature
        missing, or images of several sizes and no `image_size`.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"tfds:{name}: expected tfds:SET, tfds:SET/CONFIG or tfds:SET:1.0.0")
    train, test = _sources(name, root / "tfds" if (root / "tfds").is_dir() else root)
    info = train.dataset_info
    image, label = info.supervised_keys or ("image", "label")
    names = getattr(info.features[label], "names", None) if label in info.features else None
    if image not in info.features or not names:
        raise InputError(f"tfds:{name} has features {', '.join(info.features)}: expected an image and a class label")

    def read(source: Sequence[Any]) -> Split:
        return _materialise(f"tfds:{name}", source, (image, label), image_size)

    return array_digests(Dataset(name, read(train), read(test), tuple(names), {}))


def _sources(name: str, directory: Path) -> Any:
    """The training split and the first of `HELD` that there is."""
    import tensorflow_datasets as tfds

    reasons = []
    for held in HELD:
        try:
            return tfds.data_source(name, split=["train", held], data_dir=str(directory), download=False)
        except Exception as error:  # of many types: unknown set or split, not prepared, another file format
            reasons.append(str(error).strip().partition("\n")[0])
    raise InputError(
        f"cannot read tfds:{name} in {directory} ({reasons[0]}): expected a prepared set with splits train and "
        f"{' or '.join(HELD)}: run `tfds build {name} --data_dir {directory} --file_format array_record` in an "
        "environment with TensorFlow"
    )


def _materialise(name: str, source: Sequence[Any], keys: tuple[str, str], image_size: Size | None) -> Split:
    images: np.ndarray | None = None
    labels = np.empty(len(source), np.int32)
    for index in range(len(source)):
        example = source[index]
        image = np.asarray(example[keys[0]])
        if image.dtype != np.uint8 or image.ndim != 3:
            raise InputError(f"{name}: image {index} is {image.dtype} {image.shape}, expected uint8 (h, w, c)")
        if image_size is not None:
            image = resize(image[None], image_size)[0]
        if images is None:
            images = np.empty((len(source), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise InputError(
                f"{name}: image {index} has shape {image.shape}, but image 0 has {images.shape[1:]}: "
                "give one size with --data.image-size H W"
            )
        images[index], labels[index] = image, example[keys[1]]
    if images is None:
        raise InputError(f"{name}: a split is empty")
    return Split(images, labels)
