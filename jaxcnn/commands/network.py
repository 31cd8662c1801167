"""Which network: the flags that summary and probe share."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from jaxcnn import config
from jaxcnn.errors import InputError
from jaxcnn.files import load_file


@dataclass(frozen=True)
class Network:
    model: tyro.conf.Positional[str]
    """A name of `jaxcnn list`, or FILE.py:NAME for a Flax module (a class or an instance) of your own."""
    input: tuple[int, ...] = ()
    """Height, width and channels of an image; by default the model's usual ones."""
    num_classes: int | None = None
    overrides: config.Options = dataclasses.field(default_factory=dict)
    """Fields of the model: --overrides width 32 norm none"""

    def created(self, **overrides: Any) -> tuple[Any, tuple[int, ...]]:
        """The module, and the (h, w, c) of its input."""
        from jaxcnn.models import MODELS, create

        overrides = {**self.overrides, **overrides}
        if ":" not in self.model:
            net = create(self.model, num_classes=self.num_classes, **overrides)
            return net, self.input or MODELS[self.model].input
        if overrides or self.num_classes is not None:
            raise InputError(
                "--overrides, --activation and --num-classes belong to models of `jaxcnn list`: set them in your file"
            )
        if not self.input:
            raise InputError(f"{self.model}: give the size of an image, such as --input 224 224 3")
        return _own_module(self.model), self.input


def _own_module(place: str) -> Any:
    path, name = place.rsplit(":", 1)
    found = load_file(Path(path)).get(name)
    if found is None:
        raise InputError(f"{path} defines no {name}")
    import flax.linen as nn

    net = found() if isinstance(found, type) and issubclass(found, nn.Module) else found
    if not isinstance(net, nn.Module):
        raise InputError(f"{place} is a {type(net).__name__}: expected a flax.linen.Module, the class or an instance")
    return net
