"""A network's call as one jaxpr, with every equation labelled by the module call that it belongs to."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Jaxpr, JaxprEqn

from jaxcnn.errors import InputError
from jaxcnn.layers.window import as_written
from jaxcnn.models.table import call_options
from jaxcnn.types import PyTree

Path = tuple[str, ...]

_MARK = "jaxcnn_call_"
_LAST_MARK = re.compile(rf".*{_MARK}(\d+)")
_traces = itertools.count()


@dataclass(frozen=True)
class Call:
    """One call of a module: its number, where the module stands, its class, and the call that it was made from."""

    number: int
    path: Path
    kind: str
    parent: int | None


@dataclass(frozen=True)
class Trace:
    """`jaxpr` takes the variables and last the input, and `constants` for its constvars; `kinds` has the class of
    every module, run or not."""

    jaxpr: Jaxpr
    constants: Sequence[Any]
    calls: Sequence[Call]
    kinds: dict[Path, str]
    variables: dict[str, PyTree]


class _Marks:
    """A Flax interceptor that marks what each call computes (by a name scope) and what it returns (by a name).

    A call begins where another module is entered, by whatever method; a module's own methods and the wrappers of
    lifted transformations have the path of the module that is open, and belong to its call.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._open: list[Call] = []

    def __call__(self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        inside = self._open[-1] if self._open else None
        if context.method_name == "setup" or module.scope is None or (inside and inside.path == module.path):
            return method(*args, **kwargs)
        call = Call(len(self.calls), module.path, type(module).__name__, inside.number if inside else None)
        self.calls.append(call)
        self._open.append(call)
        mark = f"{_MARK}{call.number}"
        try:
            with jax.named_scope(mark):
                outputs = method(*args, **kwargs)
        finally:
            self._open.pop()
        return jax.tree.map(lambda leaf: checkpoint_name(leaf, mark) if isinstance(leaf, jax.Array) else leaf, outputs)


def shape_of(variable: Any) -> tuple[int, ...]:
    """Of a variable of a jaxpr."""
    return variable.aval.shape


def call_of(equation: JaxprEqn) -> int | None:
    """The innermost marked call that the equation was traced in, as far as its own jaxpr knows."""
    mark = _LAST_MARK.match(str(equation.source_info.name_stack))
    return int(mark[1]) if mark else None


def returned_by(equation: JaxprEqn) -> int | None:
    """The call whose output this equation names; None for all other equations."""
    name = equation.params.get("name", "") if equation.primitive.name == "name" else ""
    return int(name[len(_MARK) :]) if name.startswith(_MARK) else None


def trace(module: nn.Module, *, input: tuple[int, ...], dtype: Any, batch: int = 1, train: bool = False) -> Trace:
    """The call on `batch` examples of shape `input`, without computing anything.

    `train` is given to modules that take it. Random streams are there for modules that ask for one.

    Raises:
        InputError: sizes that are not positive integers, or whatever the module raises on such an input.
    """
    if not input or any(type(size) is not int or size < 1 for size in input):
        raise InputError(f"input {input}: expected the positive sizes of one example, such as (224, 224, 3)")
    example = jax.ShapeDtypeStruct((batch, *input), dtype)
    created, applied = _Marks(), _Marks()
    # Functions that are jitted inside keep their traces, with the marks and the faster forms of earlier ones. The
    # metadata is part of the key of that cache, so a fresh value has them traced anew.
    with as_written(), set_xla_metadata(jaxcnn_trace=str(next(_traces))):
        try:
            keywords = call_options(module, train=train)
            with nn.intercept_methods(created):
                variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, **keywords), example)
            mutable = [name for name in variables if name != "params"]

            def evaluate(variables: PyTree, x: Any) -> Any:
                return module.apply(variables, x, rngs=jax.random.key(0), mutable=mutable, **keywords)[0]

            with nn.intercept_methods(applied):
                closed = jax.make_jaxpr(evaluate)(variables, example)
        except InputError:
            raise
        except Exception as error:
            what = f"an input {input} of {jnp.dtype(dtype).name}"
            raise InputError(f"{type(module).__name__} does not take {what}: {error}") from error
    kinds = {call.path: call.kind for call in (*created.calls, *applied.calls)}
    return Trace(closed.jaxpr, closed.consts, applied.calls, kinds, dict(variables))
