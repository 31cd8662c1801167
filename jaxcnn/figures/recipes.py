"""Training that several figures share."""

from typing import Any

import flax.linen as nn

from jaxcnn import models
from jaxcnn.alrao import AveragedClassifiers
from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.plots import band
from jaxcnn.seeds import SeedsResult
from jaxcnn.types import Array


def residual(
    *,
    image_size: tuple[int, int],
    batch_size: int,
    steps: int,
    logged: int,
    warmup: float = 0.0,
    nesterov: bool = False,
) -> Experiment:
    """The recipe of the CIFAR residual networks (He et al. 2016, section 4.2) for `steps` steps, with `logged` lines.

    CIFAR-10 shifted by up to an eighth of the image and mirrored; SGD at 0.1 with momentum 0.9, weight decay 1e-4.
    """
    options: dict[str, Any] = {"momentum": 0.9} | ({"nesterov": True} if nesterov else {})
    return Experiment(
        name="residual",
        model=Model("cifar_resnet20"),
        data=Data("cifar10", batch_size=batch_size, image_size=image_size, crop_padding=image_size[0] // 8, flip=True),
        optim=Optim("sgd", learning_rate=0.1, schedule="steps", warmup=warmup, weight_decay=1e-4, options=options),
        train=Train(steps=steps, log_every=max(1, steps // logged)),
    )


def errors(found: SeedsResult) -> dict[str, Any]:
    """In per cent: the training error as a curve and over the last tenth of the run, (s,), and the test error, (s,)."""
    steps, accuracy = found.curve("accuracy")
    error = 100 * (1 - accuracy)
    return {
        "curve": band(steps, error),
        "training_error": error[-max(1, len(error) // 10) :].mean(0),
        "test_error": 100 * (1 - found.test["accuracy"]),
        "skipped": found.skipped,
    }


def small_cnn(*, width: int, hidden: int, copies: int = 0) -> nn.Module:
    """Two convolutions with BatchNorm and two dense layers, the last one with `copies` that are averaged, for Alrao."""
    options: dict[str, Any] = {"stages": 2, "width": width, "norm": "batch"}
    if copies:
        return Averaged(models.create("vanilla_cnn", num_classes=hidden, dense_layers=1, **options), copies)
    return models.create("vanilla_cnn", num_classes=10, hidden=hidden, dense_layers=2, **options)


class Averaged(nn.Module):
    """Copies of an output layer for ten classes on `body`, which gives the features before their ReLU."""

    body: nn.Module
    copies: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Any:
        return AveragedClassifiers(10, self.copies, name="output")(nn.relu(self.body(x, train=train)), train=train)
