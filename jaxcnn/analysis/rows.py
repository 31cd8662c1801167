"""The rows of a summary: one per call of a leaf module, one per run of a container's own operations."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import jax

from jaxcnn.analysis.flops import ELEMENTWISE
from jaxcnn.analysis.receptive_field import Reach
from jaxcnn.analysis.trace import Path, Trace
from jaxcnn.analysis.walk import Operation
from jaxcnn.layers.named import Lambda

Shape = tuple[int, ...]
PerAxis = int | float | tuple[int | float, ...] | None

MOVES = frozenset((
    "bitcast_convert_type", "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "dynamic_slice",
    "expand_dims", "iota", "optimization_barrier", "random_seed", "random_split", "random_unwrap",
    "random_wrap", "reshape", "rev", "sharding_constraint", "slice", "split", "squeeze", "stop_gradient",
    "transpose",
))  # fmt: skip
"""Layout alone: a run of these makes no row."""

_NAMES = {
    "add_any": "add",
    "conv_general_dilated": "convolution",
    "dot_general": "product",
    "reduce_window_max": "max_pool",
    "reduce_window_min": "min_pool",
    "reduce_window_sum": "sum_pool",
    "select_n": "where",
    **{f"reduce_{name}": name for name in ("sum", "prod")},
}


@dataclass(frozen=True)
class Row:
    """One line of a summary; see `Summary` for the units.

    `name` is the module's path ("stage1/block2/conv1"; the class for the network itself), `kind` its class, or the
    operations ("add, relu") where they are the container's own or those of a `Lambda`. `output` is the shape
    without the batch axis, or a tuple of shapes where there are several outputs. `stride` is the distance in input
    pixels of neighbouring outputs, per axis if the axes differ, None where there are no positions left.
    """

    name: str
    kind: str
    output: Shape | tuple[Shape, ...]
    parameters: int
    statistics: int
    macs: int
    flops: int
    activation_bytes: int
    receptive_field: PerAxis
    stride: PerAxis


@dataclass
class _Draft:
    """A row in the making: the operations of one call (of a leaf), or of one run (`own`, of a container)."""

    path: Path
    kind: str
    own: bool = False
    operations: list[Operation] = field(default_factory=list)
    outputs: list[Operation] = field(default_factory=list)
    parameters: int = 0
    statistics: int = 0


def rows(trace: Trace, operations: Sequence[Operation]) -> tuple[Row, ...]:
    """The rows in order of execution, and last the modules that have parameters but do not run in evaluation."""
    operations = _settled(trace, operations)
    drafts = _drafts(trace, operations)
    _count_variables(trace, operations, drafts)
    return tuple(_row(draft, trace) for draft in drafts)


def axes(values: Iterable[int | Fraction | None]) -> PerAxis:
    """One number if all axes agree, else one for each; whole ones as integers; None without axes."""
    known = tuple(values)
    if None in known or not known:
        return None
    plain = tuple(int(v) if v == int(v) else float(v) for v in known if v is not None)
    return plain[0] if len(set(plain)) == 1 else plain


def receptive_field(reaches: Iterable[Reach]) -> PerAxis:
    """The largest over several outputs, axis by axis."""
    sizes = [[span.size for span in reach] for reach in reaches if reach is not None]
    return axes(map(max, zip(*sizes, strict=True)))


def _settled(trace: Trace, operations: Sequence[Operation]) -> list[Operation]:
    """Every operation in a call that returns.

    Flax traces the body of a scan twice and drops the first trace, but for constants that it has found there.
    """
    returned = {operation.call for operation in operations if operation.primitive is None}

    def caller(number: int) -> int:
        while number not in returned and (parent := trace.calls[number].parent) is not None:
            number = parent
        return number

    return [replace(operation, call=caller(operation.call)) for operation in operations]


def _drafts(trace: Trace, operations: Sequence[Operation]) -> list[_Draft]:
    ran = {operation.call for operation in operations}
    containers = {trace.calls[n].parent for n in ran}
    drafts: list[_Draft] = []
    leaves: dict[int, _Draft] = {}
    for operation in operations:
        call = trace.calls[operation.call]
        if call.number not in containers:
            if call.number not in leaves:
                leaves[call.number] = _Draft(call.path, call.kind)
                drafts.append(leaves[call.number])
            draft = leaves[call.number]
            (draft.outputs if operation.primitive is None else draft.operations).append(operation)
            continue
        run = drafts[-1].operations if drafts and drafts[-1].own else None
        if run and _continues(run[-1], operation):
            run.append(operation)
        elif _computes(operation):
            drafts.append(_Draft(call.path, "", own=True, operations=[operation]))
    return drafts


def _computes(operation: Operation) -> bool:
    if operation.primitive is None or operation.primitive in MOVES:
        return False
    return operation.flops > 0 or operation.reach is not None


def _continues(last: Operation, operation: Operation) -> bool:
    """Elementwise operations go on in the row before them; pooling, sums, products and joins begin their own."""
    if _same_function(last, operation):
        return True
    joins = operation.primitive in ELEMENTWISE and operation.output.shape == last.output.shape
    return joins and last.call == operation.call


def _same_function(last: Operation, operation: Operation) -> bool:
    return last.call == operation.call and last.group == operation.group


def _count_variables(trace: Trace, operations: Sequence[Operation], drafts: list[_Draft]) -> None:
    """Counts every variable once, at the first row of its module; modules without a row get one."""
    first: dict[Path, _Draft] = {}
    for draft in drafts:
        first.setdefault(draft.path, draft)
    ran = {trace.calls[operation.call].path for operation in operations}
    for collection, tree in trace.variables.items():
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            path = _module(tuple(str(getattr(key, "key", key)) for key in keys), trace.kinds)
            if path not in first:
                first[path] = _Draft(path, trace.kinds[path] + ("" if path in ran else " (not run)"))
                drafts.insert(_begin(path, drafts), first[path])
            if collection == "params":
                first[path].parameters += math.prod(leaf.shape)
            else:
                first[path].statistics += math.prod(leaf.shape)


def _module(path: Path, kinds: dict[Path, str]) -> Path:
    """The innermost module that a variable belongs to."""
    while path and path not in kinds:
        path = path[:-1]
    return path


def _begin(path: Path, drafts: list[_Draft]) -> int:
    """Where the first row inside a module stands; the end, if there is none."""
    inside = (i for i, draft in enumerate(drafts) if draft.path[: len(path)] == path)
    return next(inside, len(drafts))


def _row(draft: _Draft, trace: Trace) -> Row:
    computing = [op for op in draft.operations if _computes(op)]
    outputs = draft.operations[-1:] if draft.own else draft.outputs
    shapes = tuple(tuple(op.output.shape[1:]) for op in outputs)
    reach = next((op.reach for op in outputs if op.reach is not None), None)
    sizes = (op.output.size * op.output.dtype.itemsize * op.repeats for op in outputs)
    named = draft.own or draft.kind == Lambda.__name__
    return Row(
        name="/".join(draft.path) or trace.kinds[()],
        kind=(describe(op.name for op in computing) if named else "") or draft.kind,
        output=shapes[0] if len(shapes) == 1 else shapes,
        parameters=draft.parameters,
        statistics=draft.statistics,
        macs=sum(op.macs for op in draft.operations),
        flops=sum(op.flops for op in draft.operations),
        activation_bytes=sum(sizes) if computing else 0,
        receptive_field=receptive_field(op.reach for op in outputs),
        stride=axes(span.stride for span in reach or ()),
    )


def describe(operations: Iterable[str]) -> str:
    """The names of operations in order, each once: "max_pool", "add, relu", "mean"."""
    names = []
    for operation in operations:
        name = _NAMES.get(operation, operation).strip("_")
        if name == "div" and names and names[-1] in ("sum", "sum_pool"):
            names[-1] = {"sum": "mean", "sum_pool": "avg_pool"}[names[-1]]
        else:
            names.append(name)
    return ", ".join(dict.fromkeys(names))
