"""Names inside a network: of functions that are layers in the paper, and of the layer that an error comes from."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
from flax.errors import ScopeParamShapeError

from jaxcnn.errors import InputError
from jaxcnn.types import Array


@contextlib.contextmanager
def located(module: nn.Module) -> Iterator[None]:
    """Errors of bad input from inside begin with the module's path: "stage3/block2/conv1: ..."."""
    path = "/".join(module.path)
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}" if path else str(error)) from error
    except ScopeParamShapeError as error:
        raise InputError(f"{path}: the parameters belong to an input of another shape: {error.args[0]}") from error


class Lambda(nn.Module):
    """A function under a name, without parameters: `Lambda(nn.relu, name="relu1_1")(x)`.

    Activations and pooling are functions. Where the paper names one (`relu4_2`, `pool5`), this gives it that name in
    features, summaries and errors.
    """

    fn: Callable[..., Any]

    def __call__(self, x: Array) -> Any:
        """`fn(x)`."""
        with located(self):
            return self.fn(x)
