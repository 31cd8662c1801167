"""Every architecture by name: one explicit table, and `create`."""

import dataclasses
from typing import Any

import flax.linen as nn

from jaxcnn.errors import InputError, unknown
from jaxcnn.models import (
    alexnet,
    cifar_resnet,
    densenet,
    density,
    he2015,
    inception,
    lenet,
    mobilenet,
    neocognitron,
    randwire,
    resnet,
    resnetv2,
    simple,
    snn,
    squeezenet,
    unet,
    vanilla,
    vgg,
)
from jaxcnn.models.table import Entry

FAMILIES: dict[str, dict[str, Entry]] = {
    "simple": simple.VARIANTS,
    "snn": snn.VARIANTS,
    "lenet": lenet.VARIANTS,
    "vanilla": vanilla.VARIANTS,
    "alexnet": alexnet.VARIANTS,
    "vgg": vgg.VARIANTS,
    "he2015": he2015.VARIANTS,
    "cifar_resnet": cifar_resnet.VARIANTS,
    "resnet": resnet.VARIANTS,
    "resnetv2": resnetv2.VARIANTS,
    "densenet": densenet.VARIANTS,
    "mobilenet": mobilenet.VARIANTS,
    "squeezenet": squeezenet.VARIANTS,
    "inception": inception.VARIANTS,
    "unet": unet.VARIANTS,
    "randwire": randwire.VARIANTS,
    "density": density.VARIANTS,
    "neocognitron": neocognitron.VARIANTS,
}
"""Each family is one file, imported above, and one line here; its variants are a table at the end of that file."""

MODELS: dict[str, Entry] = {name: entry for variants in FAMILIES.values() for name, entry in variants.items()}


def create(name: str, *, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """The module of that name; it takes images (b, h, w, c) and `train`, and returns logits (b, num_classes).

    `num_classes` None means the model's own (1000 for ImageNet nets, 10 for the others). `overrides` are fields of
    its family: width, norm, act, kernel_init, dtype, ... Raises `InputError` for an unknown name or field. A module
    holds no weights: `jaxcnn.pretrained.load(name, path)` gives them, and the overrides that they belong to.
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
        if key == "weights":
            raise InputError(
                f"weights: a module holds none: loaded = jaxcnn.pretrained.load({name!r}, path),"
                f" then create({name!r}, **loaded.overrides).apply(loaded.variables, x, train=False)"
            )
        if key not in known:
            raise unknown(f"override of model {name!r}", key, known)
    return entry.module(**{**entry.fields, **overrides})
