"""Which positions of the input each element of a value can depend on, followed through single equations (row A10)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from jax.extend.core import JaxprEqn

from jaxcnn.analysis.trace import shape_of

Window = tuple[float, float]
"""The first and the last position, (inf, -inf) for none; before the image and behind it are counted on."""

_LONGEST_REPEAT = 64
"""Merging an axis with others after it repeats its elements; beyond so many it is a flattening, not an up-sampling."""


@dataclass(frozen=True)
class Span:
    """Where the elements of a value look along one axis of the input.

    With n = len(windows), element m n + r along `axis` sees windows[r] moved by m `jump`: n is 1 until something
    enlarges the image, whose neighbouring outputs then differ in what they see. All elements along other axes see
    the same. `axis` None: every element sees windows[0].
    """

    axis: int | None
    jump: int
    windows: tuple[Window, ...]

    @property
    def size(self) -> int:
        """Positions from first to last, for the elements that see most: the receptive field."""
        return int(max(0, *(high - low + 1 for low, high in self.windows))) if self.windows else 0

    @property
    def stride(self) -> Fraction | None:
        """Input positions between neighbouring elements; None without an axis."""
        return None if self.axis is None else Fraction(self.jump, len(self.windows))

    def at(self, index: int) -> Window:
        """What the element `index` sees."""
        cycle, phase = divmod(index, len(self.windows))
        low, high = self.windows[phase]
        return low + cycle * self.jump, high + cycle * self.jump

    def everywhere(self, elements: int) -> "Span":
        """The span of a value that depends on all `elements` along the axis."""
        return self if self.axis is None else Span(None, 0, (_hull(map(self.at, range(elements))),))

    def slide(self, offsets: Iterable[int], *, stride: int = 1, low: int = 0, holes: int = 1) -> "Span":
        """Output o depends on the elements (o stride - low + t) / holes for t in `offsets`, where that is whole."""
        offsets, period = tuple(offsets), len(self.windows) * holes
        cycle = period // math.gcd(stride, period)
        windows = []
        for o in range(cycle):
            positions = (o * stride - low + t for t in offsets)
            windows.append(_hull(self.at(p // holes) for p in positions if p % holes == 0))
        return replace(self, jump=self.jump * (cycle * stride // period), windows=tuple(windows))

    def on(self, axis: int | None) -> "Span":
        """The same along another axis of the value."""
        return replace(self, axis=axis)


Reach = tuple[Span, ...] | None
"""One span per spatial axis of the input; None for a value that does not depend on it."""


def of_input(axes: int) -> Reach:
    """The reach of the input (b, *spatial, c) itself, with so many spatial axes."""
    return tuple(Span(axis + 1, 1, ((0, 0),)) for axis in range(axes))


def union(reaches: Iterable[Reach], shape: Sequence[int]) -> Reach:
    """The reach of values of one shape, combined element by element."""
    present = [reach for reach in reaches if reach is not None]
    if not present:
        return None
    return tuple(_union(spans, shape) for spans in zip(*present, strict=True))


def blurred(reach: Reach, shape: Sequence[int]) -> Reach:
    """The reach of something that depends on every element of a value of that shape."""
    return _each(reach, lambda span: _collapsed(span, shape))


def unstacked(reach: Reach, shape: Sequence[int]) -> Reach:
    """The reach of any one element along the first axis of a value of that shape."""
    return _each(reach, lambda span: _collapsed(span, shape) if span.axis in (0, None) else span.on(span.axis - 1))


def stacked(reach: Reach) -> Reach:
    """The reach of values stacked along a new first axis."""
    return _each(reach, lambda span: span if span.axis is None else span.on(span.axis + 1))


def propagate(equation: JaxprEqn, reaches: Sequence[Reach]) -> list[Reach]:
    """The reach of each output of an equation without inner jaxprs, from those of its operands.

    Unknown operations are elementwise if the shapes allow it; otherwise every output depends on everything.
    """
    outputs = [shape_of(v) for v in equation.outvars]
    if all(reach is None for reach in reaches):
        return [None] * len(outputs)
    shapes = [shape_of(v) for v in equation.invars]
    name = equation.primitive.name
    if name in _SPLITS:
        return _SPLITS[name](equation, reaches)
    rule = _RULES.get(name)
    if rule and all(reach is None for reach in reaches[1:]):
        return [_each(reaches[0], lambda span: _ruled(rule, equation, span))] * len(outputs)
    if not rule and all(_fits(shape, output) for shape in shapes for output in outputs):
        return [
            union([_spread(r, s, output) for r, s in zip(reaches, shapes, strict=True)], output) for output in outputs
        ]
    return [union([blurred(r, s) for r, s in zip(reaches, shapes, strict=True)], ())] * len(outputs)


def _hull(windows: Iterable[Window]) -> Window:
    low, high = math.inf, -math.inf
    for first, last in windows:
        low, high = min(low, first), max(high, last)
    return low, high


def _union(spans: Sequence[Span], shape: Sequence[int]) -> Span:
    if len({(span.axis, span.stride) for span in spans}) > 1:
        spans = [_collapsed(span, shape) for span in spans]
    period = math.lcm(*(len(span.windows) for span in spans))
    windows = tuple(_hull(span.at(phase) for span in spans) for phase in range(period))
    return Span(spans[0].axis, spans[0].jump * period // len(spans[0].windows), windows)


def _each(reach: Reach, change: Callable[[Span], Span]) -> Reach:
    return None if reach is None else tuple(map(change, reach))


def _collapsed(span: Span, shape: Sequence[int]) -> Span:
    return span if span.axis is None else span.everywhere(shape[span.axis])


def _fits(shape: Sequence[int], output: Sequence[int]) -> bool:
    """Whether an operand of that shape goes into an elementwise operation with that output."""
    return not shape or (len(shape) == len(output) and all(n in (1, m) for n, m in zip(shape, output, strict=True)))


def _spread(reach: Reach, shape: Sequence[int], output: Sequence[int]) -> Reach:
    """The reach after an axis of one element is repeated, as elementwise operations do."""
    return _each(
        reach, lambda span: span if span.axis is None or shape[span.axis] == output[span.axis] else span.everywhere(1)
    )


# Rules for one span of the first operand: the equation, the span, its axis and the number of elements along it.

Rule = Callable[[JaxprEqn, Span, int, int], Span]


def _ruled(rule: Rule, equation: JaxprEqn, span: Span) -> Span:
    return span if span.axis is None else rule(equation, span, span.axis, shape_of(equation.invars[0])[span.axis])


def _broadcast(equation: JaxprEqn, span: Span, axis: int, elements: int) -> Span:
    target = equation.params["broadcast_dimensions"][axis]
    kept = equation.params["shape"][target] == elements
    return span.on(target) if kept else span.everywhere(elements)


def _transpose(equation: JaxprEqn, span: Span, axis: int, elements: int) -> Span:
    return span.on(equation.params["permutation"].index(axis))


def _without(axes: Sequence[int], span: Span, axis: int, elements: int) -> Span:
    return span.everywhere(elements) if axis in axes else span.on(axis - sum(a < axis for a in axes))


def _squeeze(equation: JaxprEqn, span: Span, axis: int, elements: int) -> Span:
    return _without(equation.params["dimensions"], span, axis, elements)


def _reduce(equation: JaxprEqn, span: Span, axis: int, elements: int) -> Span:
    return _without(equation.params["axes"], span, axis, elements)


def _along(key: str) -> Rule:
    """Operations in which every element depends on all along one axis."""
    return lambda equation, span, axis, elements: (
        span.everywhere(elements) if axis == equation.params[key] % len(shape_of(equation.invars[0])) else span
    )


def _reshape(equation: JaxprEqn, span: Span, axis: int, elements: int) -> Span:
    """Rows stay rows where an axis is split (the outer axis keeps it) or merged with axes after it."""
    shape, output = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    before = math.prod(shape[:axis])
    targets = [b for b in range(len(output)) if math.prod(output[:b]) == before]
    if not targets:
        return span.everywhere(elements)
    target = targets[-1]
    repeat, rest = divmod(output[target], elements)
    if rest == 0 and repeat <= _LONGEST_REPEAT:
        windows = tuple(window for window in span.windows for _ in range(repeat))
        return Span(target, span.jump, windows)
    if elements % output[target] == 0:
        run = elements // output[target]
        return span.slide(range(run), stride=run).on(target)
    return span.everywhere(elements)


def _slice(equation: JaxprEqn, span: Span, axis: int, elements: int) -> Span:
    strides = equation.params["strides"]
    return span.slide((0,), stride=strides[axis] if strides else 1, low=-equation.params["start_indices"][axis])


def _rev(equation: JaxprEqn, span: Span, axis: int, elements: int) -> Span:
    return span.slide((0,), stride=-1, low=1 - elements) if axis in equation.params["dimensions"] else span


def _pad(equation: JaxprEqn, span: Span, axis: int, elements: int) -> Span:
    low, _, interior = equation.params["padding_config"][axis]
    return span.slide((0,), low=low, holes=interior + 1)


def _reduce_window(equation: JaxprEqn, span: Span, axis: int, elements: int) -> Span:
    p = equation.params
    taps, gap = p["window_dimensions"][axis], p["window_dilation"][axis]
    return span.slide(
        range(0, taps * gap, gap),
        stride=p["window_strides"][axis],
        low=p["padding"][axis][0],
        holes=p["base_dilation"][axis],
    )


def _convolution(equation: JaxprEqn, span: Span, axis: int, elements: int) -> Span:
    p = equation.params
    numbers = p["dimension_numbers"]
    place = numbers.lhs_spec.index(axis)
    if place == 1:
        return span.everywhere(elements)
    if place == 0:
        return span.on(numbers.out_spec[0]) if p["batch_group_count"] == 1 else span.everywhere(elements)
    window = shape_of(equation.invars[1])[numbers.rhs_spec[place]]
    i = place - 2
    gap = p["rhs_dilation"][i]
    slid = span.slide(
        range(0, window * gap, gap), stride=p["window_strides"][i], low=p["padding"][i][0], holes=p["lhs_dilation"][i]
    )
    return slid.on(numbers.out_spec[place])


def _dynamic_slice(equation: JaxprEqn, span: Span, axis: int, elements: int) -> Span:
    return span if equation.params["slice_sizes"][axis] == elements else span.everywhere(elements)


def _gather(equation: JaxprEqn, span: Span, axis: int, elements: int) -> Span:
    """An axis that is taken whole stays; of one that is picked from, anything may have been picked."""
    numbers = equation.params["dimension_numbers"]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    if axis in gone or equation.params["slice_sizes"][axis] != elements:
        return span.everywhere(elements)
    return span.on(numbers.offset_dims[axis - sum(a < axis for a in gone)])


_RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "slice": _slice,
    "rev": _rev,
    "pad": _pad,
    "conv_general_dilated": _convolution,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "fft": lambda equation, span, axis, elements: span.everywhere(elements),
    **{f"reduce_{name}": _reduce for name in ("sum", "max", "min", "prod", "and", "or", "xor")},
    **dict.fromkeys(("argmax", "argmin"), _reduce),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window"), _reduce_window),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
    "sort": _along("dimension"),
    "top_k": _along("axis"),
}


# Rules for equations with several operands or outputs of different reach.


def _dot_general(equation: JaxprEqn, reaches: Sequence[Reach]) -> list[Reach]:
    """Contracted axes are seen whole; the output has the batch axes, then the left free axes, then the right ones."""
    contracted, batch = equation.params["dimension_numbers"]
    output = shape_of(equation.outvars[0])
    start, placed = len(batch[0]), []
    for operand, summed, batched, reach in zip(equation.invars, contracted, batch, reaches, strict=True):
        shape = shape_of(operand)
        free = [axis for axis in range(len(shape)) if axis not in summed and axis not in batched]
        target = {axis: i for i, axis in enumerate(batched)} | {axis: start + i for i, axis in enumerate(free)}
        start += len(free)
        placed.append(_each(reach, lambda span, t=target, s=shape: _moved(span, t, s)))
    return [union(placed, output)]


def _moved(span: Span, target: dict[int, int], shape: Sequence[int]) -> Span:
    return span.on(target[span.axis]) if span.axis in target else _collapsed(span, shape)


def _concatenate(equation: JaxprEqn, reaches: Sequence[Reach]) -> list[Reach]:
    """Along the joined axis, one operand among constants is moved; where there are several, any may be behind."""
    joined, output = equation.params["dimension"], shape_of(equation.outvars[0])
    lone = sum(reach is not None for reach in reaches) == 1
    start, placed = 0, []
    for operand, reach in zip(equation.invars, reaches, strict=True):
        shape = shape_of(operand)

        def move(span: Span, elements: int = shape[joined], start: int = start) -> Span:
            if span.axis != joined:
                return span
            return span.slide((0,), low=start) if lone else span.everywhere(elements)

        placed.append(_each(reach, move))
        start += shape[joined]
    return [union(placed, output)]


def _split(equation: JaxprEqn, reaches: Sequence[Reach]) -> list[Reach]:
    axis, start, outputs = equation.params["axis"], 0, []
    for size in equation.params["sizes"]:
        outputs.append(_each(reaches[0], lambda span, s=start: span.slide((0,), low=-s) if span.axis == axis else span))
        start += size
    return outputs


_SPLITS = {"dot_general": _dot_general, "concatenate": _concatenate, "split": _split}
