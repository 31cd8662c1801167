"""From trained weights to another task: a new head on them, and parts that stay as they are."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from jaxcnn.errors import InputError
from jaxcnn.layers.blocks import Stage
from jaxcnn.layers.norm import BatchNorm
from jaxcnn.tree import flatten, path_pattern, unflatten
from jaxcnn.types import Array, PyTree

LEAVES = ("scale", "bias", "mean", "var")
"""Of a BatchNorm."""


def merge(fresh: Mapping[str, PyTree], loaded: Mapping[str, PyTree], *, replace: str = "") -> dict[str, PyTree]:
    """The variables of a new network, with what `loaded` holds for it.

    A leaf is known by its path, collection included: "params/fc/kernel", "batch_stats/bn1/mean". Those that the
    regular expression `replace` finds are taken from `fresh`, whatever `loaded` has there; all others come from
    `loaded`, which has exactly them, in the shapes and types of `fresh`.

    Raises:
      InputError: a leaf that is missing, unexpected or of another shape or type, all in one message; `replace` finds
        no leaf of `fresh`, or is no regular expression.
    """
    expected, given = flatten(fresh), flatten(loaded)
    if replace:
        pattern = path_pattern("replace", replace)
        new = {path: leaf for path, leaf in expected.items() if pattern.search(path)}
        if not new:
            raise InputError(
                f"replace {replace!r} finds nothing among {', '.join(list(expected)[-5:])}, ...: its parameters must"
                " be there to be replaced"
            )
        given = {path: leaf for path, leaf in given.items() if not pattern.search(path)} | new
    try:
        return unflatten(fresh, given, what="loaded weights")
    except InputError as error:
        raise InputError(
            f"{error}\nlayers that are to start anew, a head for other classes say, are named by"
            ' replace="params/fc" (on the command line --init-replace params/fc)'
        ) from None


class Frozen(nn.Module):
    """`module`, in which every BatchNorm that `pattern` finds uses its running statistics in training too.

    They do not move then, and an example's output does not depend on the rest of its batch. Parameters keep their
    paths. The regular expression is looked for in the paths of a BatchNorm's leaves, without the collection
    ("stage1/block1/bn1/scale"), so that `make_optimizer(freeze=pattern)` holds the same parameters. Dropout goes on.

    Raises:
      InputError: `pattern` is no regular expression, or tells blocks apart that are compiled as one loop.
    """

    module: nn.Module
    pattern: str

    def setup(self) -> None:
        nn.share_scope(self, self.module)

    @property
    def num_classes(self) -> int | None:
        """The module's own."""
        return getattr(self.module, "num_classes", None)

    def __call__(self, x: Array, *, train: bool) -> Any:
        """What `module` returns."""
        pattern, stages = path_pattern("freeze", self.pattern), list[Stage]()

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            module = context.module
            if isinstance(module, Stage):
                stages.append(module)
                try:
                    return call(*args, **kwargs)
                finally:
                    stages.pop()
            if isinstance(module, BatchNorm) and context.method_name == "__call__":
                looped = self._root(module) is not self._root(self)
                kwargs = {**kwargs, "train": kwargs["train"] and not _frozen(pattern, module, stages if looped else [])}
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            return self.module(x, train=train)

    @staticmethod
    def _root(module: nn.Module) -> Any:
        assert module.scope is not None
        return module.scope.root


def _frozen(pattern: re.Pattern[str], norm: BatchNorm, stages: list[Stage]) -> bool:
    """Whether the pattern finds a leaf of `norm`; in a loop of the last of `stages`, the same one of every block."""
    places = [norm.path]
    if stages:
        stage = stages[-1]
        places = [(*stage.path, f"block{i + 1}", *norm.path) for i in range(stage.blocks)]
    found = {any(pattern.search("/".join((*place, leaf))) for leaf in LEAVES) for place in places}
    if len(found) > 1:
        raise InputError(
            f"freezing {pattern.pattern!r} holds only some blocks of {'/'.join(stages[-1].path)}, which are compiled as"
            " one: build the network with scan=False and remat=False"
        )
    return found.pop()
