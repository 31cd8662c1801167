"""Named intermediates of any Flax module: "relu4_2", "stage3/block2", "conv1"."""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax

from jaxcnn.errors import InputError, unknown
from jaxcnn.layers.window import as_written
from jaxcnn.models.table import call_options
from jaxcnn.types import Array, PyTree


class _Deepest(Exception):
    """Ends the call of the module when nothing more is wanted of it."""


def features(module: nn.Module, variables: PyTree, x: Array, *, names: Iterable[str], train: bool = False) -> dict:
    """What the layers of those names return for `x`: {name: (b, h, w, c), ...} in the order of `names`.

    A name is a module's path, "stage3/block2" or "stage3/block2/conv1", as `summary` shows it; activations and
    pooling that the paper names are modules too ("relu4_2", "pool5"). Of a module that is called several times, the
    first call counts. Nothing behind the deepest one is computed, nor has it to fit: a VGG gives "relu4_2" for images
    of any size. With `train` the batch's statistics are used, and the running ones stay as they are. Works inside
    `jax.jit` and `jax.grad`; what lies inside a lifted transformation (`nn.scan`, `nn.remat`) has no name.

    Raises:
        InputError: no name, or one that the module does not call; the error suggests the nearest.
    """
    wanted = list(dict.fromkeys([names] if isinstance(names, str) else names))
    if not wanted:
        raise InputError("no features asked for: give names such as 'conv1'; feature_names lists them")
    found: dict[str, Any] = {}
    seen: list[str] = []

    def take(path: str, output: Any) -> None:
        seen.append(path)
        if path in wanted and path not in found:
            found[path] = output
            if len(found) == len(wanted):
                raise _Deepest

    try:
        _call(module, variables, x, train=train, visit=take)
    except _Deepest:
        return {name: found[name] for name in wanted}
    missing = next(name for name in wanted if name not in found)
    raise unknown(f"feature of {type(module).__name__}", missing, dict.fromkeys(seen))


def feature_names(module: nn.Module, *, input: tuple[int, ...]) -> list[str]:
    """All names that `features` knows for an input of shape (h, w, c), in the order in which they are computed."""
    example = jax.ShapeDtypeStruct((1, *input), "float32")
    names: dict[str, None] = {}
    options = call_options(module, train=False)

    def run(x: Array) -> None:
        variables = module.init(jax.random.key(0), x, **options)
        _call(module, variables, x, train=False, visit=lambda path, output: names.setdefault(path))

    jax.eval_shape(run, example)
    return list(names)


def _call(module: nn.Module, variables: PyTree, x: Any, *, train: bool, visit: Callable[[str, Any], Any]) -> None:
    """Applies the module; `visit` is given the path and the output of every module inside, in order."""

    def intercept(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        output = method(*args, **kwargs)
        if context.method_name == "__call__" and context.module.path:
            visit("/".join(context.module.path), output)
        return output

    mutable = [collection for collection in variables if collection != "params"] if train else False
    with as_written(), nn.intercept_methods(intercept):
        module.apply(variables, x, mutable=mutable, **call_options(module, train=train))
