"""The modules of a network that keep running statistics, and the layers whose output they normalise."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jaxcnn.analysis.program import Program, Ref, Step, operation_name, program
from jaxcnn.analysis.rows import MOVES, describe
from jaxcnn.analysis.trace import Call, Trace, shape_of, trace
from jaxcnn.errors import InputError
from jaxcnn.layers.norm import BatchNorm
from jaxcnn.models.table import call_options
from jaxcnn.tree import flatten
from jaxcnn.types import Array, PyTree


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it computes what `jaxcnn.layers`' BatchNorm or Flax's does, with these or other options."""
    return any(
        isinstance(module, kind) and type(module).__call__ is kind.__call__ for kind in (BatchNorm, nn.BatchNorm)
    )


def normalised(args: Any, kwargs: Mapping[str, Any]) -> Array:
    """What a norm's call is given."""
    return args[0] if args else kwargs["x"]


def returned_dtype(norm: Any, x: Array) -> Any:
    """Of what `norm` makes of `x`."""
    usual = jnp.promote_types(x.dtype, norm.param_dtype) if isinstance(norm, nn.BatchNorm) else x.dtype
    return norm.dtype or usual


class Found(NamedTuple):
    """A module with running statistics, as it is called."""

    kind: str
    known: bool
    epsilon: float
    axis: Any


@dataclass(frozen=True)
class Network:
    """`norms` are the paths of all modules with running statistics in the order in which they are made, `found` what
    they are, `variables` the references of all variables by path, `called` the calls that are not in a loop."""

    trace: Trace
    program: Program
    norms: tuple[str, ...]
    found: dict[str, Found]
    variables: dict[str, Ref]
    shapes: dict[Ref, tuple[int, ...]]
    consumers: dict[Ref, list[Step]]
    called: frozenset[int]

    def runs(self, path: str) -> bool:
        """Whether the module is called at all; heads for training alone are not, in evaluation."""
        return any(_path(call) == path for call in self.trace.calls)

    def calls(self, path: str) -> list[Call]:
        """Those outside of loops."""
        return [call for call in self.trace.calls if _path(call) == path and call.number in self.called]


class _Passing(nn.Module):
    """`module`, in which a BatchNorm of training returns what it is given: one example may be less than it takes."""

    module: nn.Module

    def setup(self) -> None:
        nn.share_scope(self, self.module)

    def __call__(self, x: Array, *, train: bool) -> Any:
        running = not self.is_initializing()

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            passes = running and context.method_name == "__call__" and is_batch_norm(context.module)
            return normalised(args, kwargs) if passes else call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            return self.module(x, **call_options(self.module, train=train))


def look(module: nn.Module, *, input: tuple[int, ...], dtype: Any, train: bool = False) -> Network:
    """Traces `module` for one example of shape `input`; `InputError` as `trace`."""
    found: dict[str, Found] = {}

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        one: Any = context.module
        if context.method_name == "__call__" and one.path:
            known = is_batch_norm(one)
            options = (one.epsilon, getattr(one, "axis", -1)) if known else (math.nan, -1)
            found["/".join(one.path)] = Found(type(one).__name__, known, *options)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        traced = trace(_Passing(module) if train else module, input=input, dtype=dtype, train=train)
    flat = program(traced)
    pairs = jax.tree_util.tree_flatten_with_path(traced.variables)[0]
    keys = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    held = {key.removeprefix("batch_stats/") for key in keys if key.startswith("batch_stats/")}
    norms = [path for path in found if {f"{path}/mean", f"{path}/var"} <= held]
    variables = dict(zip(keys, flat.variables, strict=True))
    shapes = {variables[key]: np.shape(leaf) for key, (_, leaf) in zip(keys, pairs, strict=True)}
    shapes |= {flat.input: (1, *input)} | {ref: aval.shape for ref, aval in flat.avals().items()}
    consumers: dict[Ref, list[Step]] = {}
    for step in flat.steps:
        for ref in {ref for ref in step.inputs if isinstance(ref, Ref)}:
            consumers.setdefault(ref, []).append(step)
    called = frozenset(call for step in flat.steps for call in (step.call, step.returned) if call is not None)
    return Network(traced, flat, tuple(norms), found, variables, shapes, consumers, called)


def check_variables(network: Network, variables: Mapping[str, PyTree]) -> dict[str, Any]:
    """The variables by path; `InputError` unless they are the network's."""
    given, expected = flatten(variables), flatten(network.trace.variables)
    for path in sorted(given.keys() | expected.keys()):
        shapes = [np.shape(tree[path]) if path in tree else None for tree in (expected, given)]
        if shapes[0] != shapes[1]:
            what = ["missing" if shape is None else str(shape) for shape in shapes]
            raise InputError(f"the variables are not this network's: {path} should be {what[0]} and is {what[1]}")
    return given


def _path(call: Call) -> str:
    return "/".join(call.path)


def layer_before(network: Network, path: str) -> tuple[str | None, str]:
    """The layer that the norm at `path` can be folded into; else None and why there is none."""
    norm, calls = network.found[path], network.calls(path)
    if not norm.known:
        return None, f"is a {norm.kind}, no BatchNorm of jaxcnn.layers or flax.linen"
    if not network.runs(path):
        return None, "is not called in evaluation"
    if len(calls) != 1:
        return None, f"is called {len(calls)} times" if calls else "is inside a loop, whose rounds share one program"
    reader = calls[0].number
    inside = [step for step in network.program.steps if step.call == reader]
    made = {ref for step in inside for ref in step.outputs}
    taken = {ref for step in inside for ref in step.inputs if isinstance(ref, Ref)} - made
    if not _runs_on(network, path, inside):
        return None, "normalises by the batch's own statistics in evaluation too"
    seen = taken.difference(network.program.variables)
    if len(seen) != 1:
        return None, "sees more than one value"
    (ref,) = seen
    if norm.axis not in (-1, (-1,)) and norm.axis not in ((last := len(network.shapes[ref]) - 1), (last,)):
        return None, f"its statistics are over another axis than the last, {norm.axis}"
    return _source(network, ref, reader, network.shapes[network.variables[f"batch_stats/{path}/mean"]])


def _runs_on(network: Network, path: str, inside: list[Step]) -> bool:
    """Whether what a norm returns, computed by the steps `inside`, depends on its running statistics."""
    moving = {network.variables[f"batch_stats/{path}/{name}"] for name in ("mean", "var")}
    for step in inside:
        if not moving.isdisjoint(ref for ref in step.inputs if isinstance(ref, Ref)):
            moving.update(step.outputs)
    outputs = (step.inputs[0] for step in network.program.steps if step.returned == network.calls(path)[0].number)
    return all(ref in moving for ref in outputs)


def _source(network: Network, ref: Ref, reader: int, features: tuple[int, ...]) -> tuple[str | None, str]:
    """As `layer_before`, of the value `ref` that a norm's call `reader` sees: (features,) on the last axis."""
    elsewhere = any(step.call != reader for step in network.consumers[ref])
    while (step := network.program.producers.get(ref)) is not None:
        elsewhere = elsewhere or ref in network.program.outputs
        if step.returned is None:
            return None, _follows(network, step)
        call = network.trace.calls[step.returned]
        elsewhere = elsewhere or len(network.consumers[step.inputs[0]]) > 1
        path = _path(call)
        if f"params/{path}/kernel" in network.variables:
            if len(network.calls(path)) > 1:
                return None, f"follows {path}, which is called {len(network.calls(path))} times"
            if elsewhere:
                return None, f"the output of {path} is used elsewhere too"
            if not _is_product(network, call, step, features):
                return None, f"follows {path}, which is no plain convolution or dense layer"
            return path, ""
        ref = step.inputs[0]
    return None, "follows the input of the network"


_WORDS = {
    "add": "a sum",
    "add_any": "a sum",
    "concatenate": "a concatenation",
    "mul": "a product",
    "sub": "a difference",
}


def _follows(network: Network, step: Step) -> str:
    before = network.program.producers.get(step.inputs[0]) if isinstance(step.inputs[0], Ref) else None
    names = [operation_name(one.equation) for one in (before, step) if one is not None]
    last = describe(names).split(", ")[-1]  # of two, because an average is a sum and a division
    return f"follows {_WORDS.get(step.equation.primitive.name, last)}"


class _Tag(NamedTuple):
    """A value that is proportional to the kernel's or the bias's features, on this axis."""

    kernel: bool
    bias: bool
    axis: int


def _is_product(network: Network, call: Call, last: Step, features: tuple[int, ...]) -> bool:
    """Whether scaling the kernel's last axis scales the output's last, and the bias, if any, is added to that."""
    path, variables = _path(call), network.variables
    kernel, bias = variables[f"params/{path}/kernel"], variables.get(f"params/{path}/bias")
    shape = network.shapes[kernel]
    own = sum(key.startswith(f"params/{path}/") for key in variables)
    if shape[-1:] != features or own != (1 if bias is None else 2):
        return False
    tags = {kernel: _Tag(True, False, len(shape) - 1)}
    if bias is not None:
        tags[bias] = _Tag(False, True, 0)
    if any(step.call != call.number for ref in tags for step in network.consumers.get(ref, ())):
        return False
    for step in network.program.steps:
        if step.call == call.number and any(ref in tags for ref in step.inputs if isinstance(ref, Ref)):
            tag = _follow(step.equation, [tags.get(ref) if isinstance(ref, Ref) else None for ref in step.inputs])
            if tag is None:
                return False
            tags[step.outputs[0]] = tag
    return tags.get(last.inputs[0]) == _Tag(True, bias is not None, len(network.shapes[last.outputs[0]]) - 1)


def _follow(equation: JaxprEqn, operands: list[_Tag | None]) -> _Tag | None:
    """The tag of what an equation computes of operands with these tags; None where it is no longer proportional."""
    name = equation.primitive.name
    if name in ("jit", "pjit"):
        return _follow_inside(equation.params["jaxpr"].jaxpr, operands)
    tagged = [tag for tag in operands if tag is not None]
    shapes = [shape_of(variable) for variable in (*equation.invars, equation.outvars[0])]
    if name in ("add", "add_any") and len(tagged) == 2:
        one, other = tagged
        fits = one.axis == other.axis and (one.kernel, one.bias) == (other.bias, other.kernel)
        return _Tag(True, True, one.axis) if fits and one.kernel != one.bias else None
    if len(tagged) != 1 or len(equation.outvars) != 1:
        return None
    axis = _axis(equation, name, operands.index(tagged[0]), tagged[0].axis, shapes)
    return None if axis is None else tagged[0]._replace(axis=axis)


def _follow_inside(jaxpr: Jaxpr, operands: list[_Tag | None]) -> _Tag | None:
    tags: dict[Any, _Tag | None] = dict(zip(jaxpr.invars, operands, strict=True))
    for equation in jaxpr.eqns:
        inner = [None if isinstance(variable, Literal) else tags.get(variable) for variable in equation.invars]
        if any(inner):
            tags.update(dict.fromkeys(equation.outvars, _follow(equation, inner)))
    (output,) = jaxpr.outvars
    return None if isinstance(output, Literal) else tags.get(output)


def _axis(equation: JaxprEqn, name: str, operand: int, axis: int, shapes: list[tuple[int, ...]]) -> int | None:
    """Where the features are in the output of a step that has them on `axis` of an operand."""
    parameters = equation.params
    if name == "conv_general_dilated":
        dimensions = parameters["dimension_numbers"]
        fits = operand == 1 and dimensions.rhs_spec[0] == axis and parameters["batch_group_count"] == 1
        return dimensions.out_spec[1] if fits else None
    if name == "dot_general":
        contracted, batch = parameters["dimension_numbers"]
        if axis in (*contracted[operand], *batch[operand]):
            return None
        free = [i for i in range(len(shapes[operand])) if i not in (*contracted[operand], *batch[operand])]
        before = len(shapes[0]) - len(contracted[0]) - len(batch[0]) if operand else 0
        return len(batch[0]) + before + free.index(axis)
    if name not in MOVES or (name == "rev" and axis in parameters["dimensions"]):
        return None
    if name == "transpose":
        return parameters["permutation"].index(axis)
    if name == "broadcast_in_dim":
        return parameters["broadcast_dimensions"][axis]
    if name in ("convert_element_type", "copy", "copy_p", "rev"):
        return axis
    if name in ("reshape", "squeeze", "expand_dims"):
        behind, out = math.prod(shapes[0][axis + 1 :]), shapes[-1]
        places = (i for i, n in enumerate(out) if n == shapes[0][axis] and math.prod(out[i + 1 :]) == behind)
        return next(places, None)
    return None
