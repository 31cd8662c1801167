"""A trained network that answers: from a run directory, or from a file of weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn import build, config, models, platform, pretrained, report
from jaxcnn.config import Data, Experiment, Model
from jaxcnn.data import preprocess
from jaxcnn.data.sources import read_image
from jaxcnn.errors import InputError
from jaxcnn.pretrained import store
from jaxcnn.pretrained.index import INDEX
from jaxcnn.pretrained.pixels import Pixels
from jaxcnn.train.run import read_json
from jaxcnn.types import Array, PyTree


@dataclass(frozen=True)
class Trained:
    """`network` gives logits of `preprocess(images)`, images (b, h, w, c) of `input`, uint8 or in 0..1; `read` reads
    such an image from a file. `classes` names the logits, None where the names are not known."""

    experiment: Experiment
    network: nn.Module
    variables: dict[str, PyTree]
    classes: tuple[str, ...] | None
    input: tuple[int, int, int]
    preprocess: Callable[[Any], Array]
    read: Callable[[Path], np.ndarray]
    overrides: dict[str, Any]
    pixels: Pixels | None

    @property
    def num_classes(self) -> int:
        return len(self.classes) if self.classes else self.network.num_classes  # type: ignore[attr-defined]


def of_run(run: Path) -> Trained:
    """What a run directory holds, verified. Raises `InputError` where it is none, or has no checkpoint."""
    platform.setup()
    if not (run / "config.json").is_file():
        raise InputError(f"{run} is not a run directory: it has no config.json")
    experiment = config.from_json(read_json(run / "config.json"))
    jax.config.update("jax_enable_x64", experiment.model.dtype == "float64")
    data = read_json(run / "data.json")
    classes, (height, width, channels) = tuple(data["classes"]), data["input"]
    preprocessing = preprocess.load(run / "preprocessing.npz")
    prepare = build.prepare_eval(experiment, preprocessing)
    return Trained(
        experiment,
        build.module(experiment.model, num_classes=len(classes)),
        report.load_variables(run),
        classes,
        (height, width, channels),
        lambda images: prepare({"image": images})["image"],
        lambda path: read_image(path, size=(height, width), channels=channels),
        {**experiment.model.overrides, "num_classes": len(classes)},
        _as_pixels(preprocessing, (height, width)),
    )


def _as_pixels(preprocessing: preprocess.Preprocessing, size: tuple[int, int]) -> Pixels | None:
    """A fitted preprocessing that is a mean and a deviation per channel, else None."""
    if preprocessing.kind not in ("scale", "channel_mean", "standardize"):
        return None
    mean, std = (tuple(map(float, preprocessing.arrays[name])) for name in ("mean", "std"))
    return Pixels(size, 1.0, "bilinear", mean, std)


def of_weights(
    weights: str, *, model: str | None = None, layout: str | None = None, preprocessing: str | None = None
) -> Trained:
    """What a file of weights, or NAME.TAG of the index where it has been fetched, holds for `model`.

    Raises `InputError` where the model is not named, the file is not there, or what `pretrained.load` refuses.
    """
    platform.setup()
    path = Path(weights)
    if weights in INDEX:
        path, model, layout = store.path_of(weights), INDEX[weights].model, layout or INDEX[weights].layout
        if not path.exists():
            raise InputError(f"the weights {weights} are not at {path}: run jaxcnn weights fetch {weights}")
        store.fetch(weights)  # which only checks what is there
    if model is None:
        raise InputError(f"--weights {weights}: also give --model, one of `jaxcnn list`")
    entry = INDEX.get(weights)
    overrides = entry.overrides if entry else {}
    loaded = pretrained.load(model, path, layout=layout, preprocessing=preprocessing, **overrides)
    pixels = entry.preprocessing if entry and preprocessing is None else loaded.preprocessing
    return Trained(
        Experiment(model=Model(model), data=Data("cifar10" if model.startswith("cifar_") else "digits")),
        models.create(model, **loaded.overrides),
        loaded.variables,
        loaded.classes,
        (*pixels.size, len(pixels.mean)),
        lambda images: pixels(jnp.asarray(images)),
        pixels.read,
        loaded.overrides,
        pixels,
    )
