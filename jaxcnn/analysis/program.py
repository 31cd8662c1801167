"""A traced network as a flat list of equations that can be run with other values, and looked at in the middle.

Calls of modules are inlined; functions without modules inside, such as a jitted activation, stay one step each.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jaxcnn.analysis.flops import ELEMENTWISE
from jaxcnn.analysis.rows import MOVES, describe
from jaxcnn.analysis.trace import Trace, call_of, returned_by
from jaxcnn.layers.named import Lambda
from jaxcnn.types import Array

INLINED = frozenset((
    "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
    "jit", "pjit", "remat", "remat2",
))  # fmt: skip
"""Calls that may as well stand where they are called from. Loops and conditionals may not."""


class Ref(NamedTuple):
    """A value of the program, by number."""

    number: int


class Step(NamedTuple):
    """One equation; `inputs` are `Ref`s or constants. `returned`: the call whose output it names, else None."""

    equation: JaxprEqn
    call: int
    returned: int | None
    inputs: tuple[Any, ...]
    outputs: tuple[Ref, ...]
    alone: ClosedJaxpr
    """The equation as a program of its own, which takes what is no literal."""

    def compute(self, operands: Sequence[Any]) -> list[Any]:
        """What the equation makes of these operands."""
        pairs = zip(self.equation.invars, operands, strict=True)
        given = {variable: operand for variable, operand in pairs if not isinstance(variable, Literal)}
        return jaxpr_as_fun(self.alone)(*given.values())


class Place(NamedTuple):
    """A value that goes from one layer to the next: the module that computes it, by what, and the shape that it goes
    in; `steps` are what lies between it and the places before, `roots` the places, variables and input behind them."""

    name: str
    kind: str
    ref: Ref
    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    roots: tuple[Ref, ...]

    @property
    def elementwise(self) -> bool:
        """Whether it is an activation: a function of one value, element by element, without variables."""
        return len(self.roots) == 1 and all(_elementwise(step.equation) for step in self.steps)


Rule = Callable[[Step, Sequence[Any]], Array | None]
"""Another way to compute a step from its operands; None: as it is written."""


@dataclass(frozen=True)
class Program:
    """`steps` in order; `variables` and `input` are what they start from, `outputs` what the network returns."""

    steps: tuple[Step, ...]
    variables: tuple[Ref, ...]
    input: Ref
    outputs: tuple[Any, ...]

    def run(
        self,
        variables: Sequence[Any],
        x: Array,
        *,
        taps: Mapping[Ref, Array] | None = None,
        rule: Rule = lambda step, operands: None,
    ) -> tuple[list[Any], dict[Ref, Any]]:
        """The outputs, and the values of all refs; `taps` are added to values where they arise."""
        values: dict[Ref, Any] = dict(zip((*self.variables, self.input), (*variables, x), strict=True))

        def value(ref: Any) -> Any:
            return values[ref] if isinstance(ref, Ref) else ref

        for step in self.steps:
            operands = [value(ref) for ref in step.inputs]
            replaced = rule(step, operands)
            found = [replaced] if replaced is not None else step.compute(operands)
            for ref, one in zip(step.outputs, found, strict=True):
                values[ref] = one + taps[ref] if taps and ref in taps else one
        return [value(ref) for ref in self.outputs], values

    @cached_property
    def producers(self) -> dict[Ref, Step]:
        return {ref: step for step in self.steps for ref in step.outputs}

    def avals(self) -> dict[Ref, Any]:
        """Shape and dtype of all that is computed."""
        return {ref: v.aval for step in self.steps for ref, v in zip(step.outputs, step.equation.outvars, strict=True)}

    def depending(self, roots: Iterable[Ref]) -> set[Ref]:
        """Every value that is computed from `roots`, and they themselves."""
        found = set(roots)
        for step in self.steps:
            if not found.isdisjoint(ref for ref in step.inputs if isinstance(ref, Ref)):
                found.update(step.outputs)
        return found


def program(trace: Trace) -> Program:
    """The steps of a trace."""
    flat = _Flat()
    inputs = [flat.new() for _ in trace.jaxpr.invars]
    outputs = flat.inline(trace.jaxpr, trace.constants, inputs, 0)
    return Program(tuple(flat.steps), tuple(inputs[:-1]), inputs[-1], tuple(outputs))


class _Flat:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._count = 0

    def new(self) -> Ref:
        self._count += 1
        return Ref(self._count)

    def inline(self, jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[Any], call: int) -> list[Any]:
        known = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(zip(jaxpr.invars, inputs, strict=True))

        def ref(variable: Any) -> Any:
            return variable.val if isinstance(variable, Literal) else known[variable]

        for equation in jaxpr.eqns:
            operands = tuple(map(ref, equation.invars))
            here = call_of(equation)
            here = call if here is None else here
            inside = _inside(equation)
            if inside is not None and _calls_modules(inside):
                outputs = self.inline(getattr(inside, "jaxpr", inside), getattr(inside, "consts", ()), operands, here)
            else:
                outputs = tuple(self.new() for _ in equation.outvars)
                alone = ClosedJaxpr(_alone(jaxpr, equation), ())
                self.steps.append(Step(equation, here, returned_by(equation), operands, outputs, alone))
            known.update(zip(equation.outvars, outputs, strict=True))
        return [ref(variable) for variable in jaxpr.outvars]


def _alone(jaxpr: Jaxpr, equation: JaxprEqn) -> Jaxpr:
    taken = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal)))
    return jaxpr.replace(
        constvars=[], invars=taken, outvars=list(equation.outvars), eqns=[equation], effects=equation.effects
    )


def _inside(equation: JaxprEqn) -> Any:
    """The program of a call that may as well stand where it is called, as a jaxpr or a closed one; else None."""
    if equation.primitive.name not in INLINED:
        return None
    return next((equation.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in equation.params), None)


def _equations(inside: Any) -> Sequence[JaxprEqn]:
    return getattr(inside, "jaxpr", inside).eqns


def _calls_modules(inside: Any) -> bool:
    return any(
        returned_by(equation) is not None or ((deeper := _inside(equation)) is not None and _calls_modules(deeper))
        for equation in _equations(inside)
    )


def _elementwise(equation: JaxprEqn) -> bool:
    if (inside := _inside(equation)) is not None:
        return all(map(_elementwise, _equations(inside)))
    return equation.primitive.name in ELEMENTWISE or _moves(equation)


def _moves(equation: JaxprEqn) -> bool:
    return equation.primitive.name in MOVES or equation.primitive.name == "name"


def places(trace: Trace, program: Program) -> list[Place]:
    """The values that go from layer to layer, in order: what a module computes and another one, or the user, takes.

    Only floating-point ones that depend on the input; what is only moved (reshaped, say) on the way is one value.
    """
    origins: dict[Ref, Ref] = {}
    moving, crossing = program.depending([program.input]), dict[Ref, tuple[int, ...]]()
    avals = program.avals()
    for step in program.steps:
        refs = [ref for ref in step.inputs if isinstance(ref, Ref)]
        if _moves(step.equation) and refs:
            origins[step.outputs[0]] = origins.get(refs[0], refs[0])
        for ref in refs:
            origin = origins.get(ref, ref)
            if origin in program.producers and program.producers[origin].call != step.call:
                crossing.setdefault(origin, avals[ref].shape)
    for ref in program.outputs:
        if isinstance(ref, Ref):
            crossing.setdefault(origins.get(ref, ref), avals[ref].shape)
    wanted = [
        ref
        for step in program.steps
        for ref in step.outputs
        if ref in crossing and ref in moving and jnp.issubdtype(avals[ref].dtype, jnp.floating)
    ]
    containers = {trace.calls[step.call].parent for step in program.steps}
    shapes = {ref: crossing[ref] for ref in wanted}
    return [_place(trace, program, ref, shapes, containers) for ref in wanted]


def _place(
    trace: Trace, program: Program, ref: Ref, wanted: Mapping[Ref, tuple[int, ...]], containers: set[int | None]
) -> Place:
    steps, roots, ahead = [], dict[Ref, None](), [ref]
    seen: set[Ref] = set()
    while ahead:
        current = ahead.pop()
        step = program.producers.get(current)
        if step is None or (current in wanted and current != ref):
            roots[current] = None
        elif not seen.issuperset(step.outputs):
            seen.update(step.outputs)
            steps.append(step)
            ahead += [one for one in step.inputs if isinstance(one, Ref)]
    steps.sort(key=lambda step: step.outputs)  # references are numbered in the order of steps
    call = trace.calls[program.producers[ref].call]
    named = call.number in containers or call.kind == Lambda.__name__
    operations = describe(operation_name(step.equation) for step in steps if not _moves(step.equation))
    name = "/".join(call.path) or trace.kinds[()]
    return Place(name, operations if named and operations else call.kind, ref, wanted[ref], tuple(steps), tuple(roots))


def operation_name(equation: JaxprEqn) -> str:
    """Of the jitted function, also of one with a derivative of its own, or the primitive."""
    name = equation.params.get("name")
    if isinstance(name, str) and name != "<lambda>":
        return name
    inside = _inside(equation)
    within = _equations(inside) if inside is not None else ()
    return operation_name(within[-1]) if len(within) == 1 else equation.primitive.name
