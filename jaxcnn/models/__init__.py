"""Every architecture by name: one explicit table, and `create`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn

from jaxcnn.errors import InputError, unknown
from jaxcnn.models.cifar_resnet import DEPTHS, CifarResNet
from jaxcnn.models.lenet import LeNet5, LeNet5Of1998
from jaxcnn.models.resnet import ResNet
from jaxcnn.models.simple import MLP, Linear


@dataclass(frozen=True)
class Entry:
    """A row of the table: the module and the fields that make the variant, its usual input (h, w, c), its source."""

    module: type[nn.Module]
    input: tuple[int, int, int]
    paper: str
    fields: Mapping[str, Any] = field(default_factory=dict)


_LECUN = "LeCun et al. 1998"
_HE = "He et al. 2016"

MODELS: dict[str, Entry] = {
    "linear": Entry(Linear, (28, 28, 1), "textbook"),
    "mlp": Entry(MLP, (28, 28, 1), "textbook"),
    "lenet5": Entry(LeNet5, (28, 28, 1), _LECUN),
    "lenet5_1998": Entry(LeNet5Of1998, (28, 28, 1), _LECUN),
    **{f"cifar_plain{d}": Entry(CifarResNet, (32, 32, 3), _HE, {"depth": d, "shortcut": "none"}) for d in DEPTHS},
    **{f"cifar_resnet{d}": Entry(CifarResNet, (32, 32, 3), _HE, {"depth": d}) for d in DEPTHS},
    "resnet18": Entry(ResNet, (224, 224, 3), _HE, {"blocks": (2, 2, 2, 2)}),
}


def create(name: str, *, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """The module of that name; it takes images (b, h, w, c) and `train`, and returns logits (b, num_classes).

    `num_classes` None means the model's own (1000 for ImageNet nets, 10 for the others). `overrides` are fields of
    its family: width, norm, act, kernel_init, dtype, ... Raises `InputError` for an unknown name or field.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    entry = MODELS[name]
    if num_classes is not None:
        if num_classes < 1:
            raise InputError(f"{num_classes} classes: a model needs at least 1")
        overrides["num_classes"] = num_classes
    known = [f.name for f in dataclasses.fields(entry.module) if f.init and f.name not in ("parent", "name")]
    for key in overrides:
        if key not in known:
            raise unknown(f"override of model {name!r}", key, known)
    return entry.module(**{**entry.fields, **overrides})
