"""A walk through a traced network in the order of execution: what each operation costs, sees and belongs to."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jaxcnn.analysis.flops import Cost, cost
from jaxcnn.analysis.receptive_field import Reach, blurred, of_input, propagate, stacked, union, unstacked
from jaxcnn.analysis.trace import Trace, call_of, returned_by, shape_of


@dataclass(frozen=True)
class Operation:
    """A primitive operation, or a call's return of one output (`primitive` None).

    `name` is that of the jitted function which it is part of, if any, else the primitive's; operations of one
    such function have one `group`. Costs are of all `repeats`, the steps of the scans around it; `reach` is of the
    last of them.
    """

    call: int
    primitive: str | None
    name: str
    group: int
    repeats: int
    macs: int
    flops: int
    output: Any
    reach: Reach


class _Place(NamedTuple):
    """Where an equation stands: its call, the jitted function inside that call, and the steps around it."""

    call: int
    function: str | None = None
    group: int | None = None
    repeats: int = 1


def walk(trace: Trace) -> tuple[list[Operation], list[Reach]]:
    """All operations that run, and the reach of the network's outputs.

    Of a conditional, the branch with most operations counts; a while loop counts as one step, since the number of
    its steps is not known.
    """
    walker, operations = _Walker(), []
    variables = [None] * (len(trace.jaxpr.invars) - 1)
    image = of_input(len(shape_of(trace.jaxpr.invars[-1])) - 2)
    return operations, walker.run(trace.jaxpr, [*variables, image], _Place(0), operations)


def _inner(equation: JaxprEqn) -> Jaxpr | None:
    """The jaxpr of a call: jit, custom derivatives, rematerialisation, shard_map, ..."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(key)
        inner = getattr(inner, "jaxpr", inner)
        if inner is not None and _arity(inner) == _arity(equation):
            return inner
    return None


def _arity(program: Jaxpr | JaxprEqn) -> tuple[int, int]:
    return len(program.invars), len(program.outvars)


def _name(equation: JaxprEqn) -> str | None:
    """Of a jitted function, if it has one."""
    name = equation.params.get("name")
    return None if name == "<lambda>" else name


class _Walker:
    def __init__(self) -> None:
        self._groups = itertools.count()
        self._product: dict[int, int] = {}

    def run(self, jaxpr: Jaxpr, inputs: Sequence[Reach], place: _Place, into: list[Operation]) -> list[Reach]:
        """The reach of the jaxpr's outputs; its operations are appended to `into`."""
        known: dict[Any, Reach] = dict(zip(jaxpr.invars, inputs, strict=True))

        def reach_of(variable: Any) -> Reach:
            return None if isinstance(variable, Literal) else known.get(variable)

        for equation in jaxpr.eqns:
            reaches = [reach_of(v) for v in equation.invars]
            call = call_of(equation)
            here = place if call in (None, place.call) else _Place(call, repeats=place.repeats)
            known.update(zip(equation.outvars, self._step(equation, reaches, here, into), strict=True))
        return [reach_of(v) for v in jaxpr.outvars]

    def _step(self, equation: JaxprEqn, reaches: list[Reach], here: _Place, into: list[Operation]) -> list[Reach]:
        returning = returned_by(equation)
        if returning is not None:
            output = equation.outvars[0].aval
            into.append(Operation(returning, None, "", -1, here.repeats, 0, 0, output, reaches[0]))
            return reaches
        name = equation.primitive.name
        if name == "scan":
            return self._scan(equation, reaches, here, into)
        if name == "while":
            skipped, body = equation.params["cond_nconsts"], equation.params["body_jaxpr"]
            return self.run(body.jaxpr, reaches[skipped:], here, into)
        if name == "cond":
            return self._branch(equation, reaches, here, into)
        inner = _inner(equation) if name not in ("reduce_window", "reduce") else None
        if inner is not None:
            function = here.function or _name(equation)
            group = next(self._groups) if here.group is None else here.group
            return self.run(inner, reaches, here._replace(function=function, group=group), into)
        return self._compute(equation, reaches, here, into)

    def _compute(self, equation: JaxprEqn, reaches: list[Reach], here: _Place, into: list[Operation]) -> list[Reach]:
        outputs = propagate(equation, reaches)
        macs, flops = self._without_bias(equation, reaches, here.call)
        group = next(self._groups) if here.group is None else here.group
        primitive = equation.primitive.name
        output = equation.outvars[0].aval if equation.outvars else None
        into.append(
            Operation(
                here.call,
                primitive,
                here.function or primitive,
                group,
                here.repeats,
                macs * here.repeats,
                flops * here.repeats,
                output,
                outputs[0] if outputs else None,
            )
        )
        return outputs

    def _without_bias(self, equation: JaxprEqn, reaches: list[Reach], call: int) -> Cost:
        """The cost, where a constant added right after a product is free: the sums of the product start from it."""
        spent = cost(equation)
        if spent.macs:
            self._product[call] = math.prod(shape_of(equation.outvars[0]))
        elif spent.flops:
            product = self._product.pop(call, None)
            if equation.primitive.name == "add" and spent.flops == product and None in reaches:
                return Cost(0, 0)
        return spent

    def _scan(self, equation: JaxprEqn, reaches: list[Reach], here: _Place, into: list[Operation]) -> list[Reach]:
        """Step by step until nothing new is seen; the operations are those of one step, `length` times."""
        p = equation.params
        body, length, split = p["jaxpr"].jaxpr, p["length"], p["num_consts"] + p["num_carry"]
        constants, carry = reaches[: p["num_consts"]], reaches[p["num_consts"] : split]
        slices = [unstacked(r, shape_of(v)) for r, v in zip(reaches[split:], equation.invars[split:], strict=True)]
        rows: list[list[Reach]] = []
        operations: list[Operation] = []
        for _ in range(length):
            operations.clear()
            inside = here._replace(repeats=here.repeats * length)
            outputs = self.run(body, [*constants, *carry, *slices], inside, operations)
            rows.append(outputs[p["num_carry"] :])
            carry, before = outputs[: p["num_carry"]], carry
            if carry == before:
                break
        into.extend(operations)
        shapes = [shape_of(v) for v in body.outvars[p["num_carry"] :]]
        seen = [union((row[i] for row in rows), shape) for i, shape in enumerate(shapes)]
        return [*carry, *map(stacked, seen)]

    def _branch(self, equation: JaxprEqn, reaches: list[Reach], here: _Place, into: list[Operation]) -> list[Reach]:
        choice, *operands = reaches
        branches = []
        for branch in equation.params["branches"]:
            operations: list[Operation] = []
            branches.append((self.run(branch.jaxpr, operands, here, operations), operations))
        into.extend(max((operations for _, operations in branches), key=lambda ops: sum(op.flops for op in ops)))
        choice = blurred(choice, shape_of(equation.invars[0]))
        return [
            union([choice, *(outputs[i] for outputs, _ in branches)], shape_of(v))
            for i, v in enumerate(equation.outvars)
        ]
