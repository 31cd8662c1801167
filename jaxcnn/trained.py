"""A trained network that answers: from a run directory, or from a file of weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn import build, config, models, parallel, platform, report
from jaxcnn.config import Data, Experiment, Model
from jaxcnn.data import preprocess
from jaxcnn.data.dataset import Split
from jaxcnn.data.decode import BORDER
from jaxcnn.data.loader import eval_batches
from jaxcnn.data.sources import read_image
from jaxcnn.errors import InputError
from jaxcnn.pretrained import store
from jaxcnn.pretrained.pixels import Pixels, of_fitted
from jaxcnn.train import evaluate, make_eval_step
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

    def evaluate(
        self, split: Split, *, batch_size: int, variables: Mapping[str, PyTree] | None = None
    ) -> dict[str, float]:
        """Exact counts over the split, as `train.evaluate` gives them; `variables` stand for its own."""
        mesh = parallel.make_mesh()
        step = make_eval_step(self.network, prepare=lambda batch: {**batch, "image": self.preprocess(batch["image"])})
        batches = eval_batches(split.images, split.labels, batch_size=batch_size, mesh=mesh)
        with jax.set_mesh(mesh):
            return evaluate(step, variables or self.variables, batches())


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
    border = 0.0 if experiment.data.random_resized_crop is None else BORDER
    return Trained(
        experiment,
        build.module(experiment.model, num_classes=len(classes)),
        report.load_variables(run),
        classes,
        (height, width, channels),
        lambda images: prepare({"image": images})["image"],
        lambda path: read_image(path, size=(height, width), channels=channels, border=border),
        {**experiment.model.overrides, "num_classes": len(classes)},
        of_fitted(preprocessing, (height, width)),
    )


def of_weights(
    weights: str, *, model: str | None = None, layout: str | None = None, preprocessing: str | None = None
) -> Trained:
    """What a file of weights, or NAME.TAG of the index where it has been fetched, holds for `model`.

    Raises `InputError` as `pretrained.store.load` does.
    """
    platform.setup()
    loaded = store.load(weights, model=model, layout=layout, preprocessing=preprocessing)
    pixels, name = loaded.preprocessing, loaded.model
    return Trained(
        Experiment(model=Model(name), data=Data("cifar10" if name.startswith("cifar_") else "digits")),
        models.create(name, **loaded.overrides),
        loaded.variables,
        loaded.classes,
        (*pixels.size, len(pixels.mean)),
        lambda images: pixels(jnp.asarray(images)),
        pixels.read,
        loaded.overrides,
        pixels,
    )
