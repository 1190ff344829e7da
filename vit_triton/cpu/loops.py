"""Loops pass: loops over the vectors of a tile, used by stores, reductions and dots.

A loop covers the part of the tile that satisfies its conditions (:mod:`vit_triton.cpu.bounds`), which hold inside it.
Only an incomplete last vector has a mask.
"""

import contextlib
from collections.abc import Callable, Sequence

from vit_triton.cpu.axes import RESHAPES, operand_axis
from vit_triton.cpu.bounds import Bound, bound_value, loop_bound
from vit_triton.cpu.builder import Val
from vit_triton.cpu.masks import Condition
from vit_triton.cpu.state import LANES, Position, State
from vit_triton.cpu.ttir import Value
from vit_triton.cpu.vmath import ELEMENTWISE

Body = Callable[[Position, Val | None], None]


def for_each_vector(
    s: State, shape: Sequence[int], conditions: Sequence[Sequence[Condition]], axis: int, body: Body
) -> None:
    """Call ``body(position, mask)`` for every vector along ``axis`` that satisfies the conditions on each axis."""
    b = s.b
    bounds = [loop_bound(s, c, size) for c, size in zip(conditions, shape, strict=True)]
    lanes = min(LANES, shape[axis])
    index = list(s.origin(len(shape)))

    def visit(at: Val, mask: Val | None = None) -> None:
        index[axis] = at
        with s.assume(conditions[axis], at, mask):
            body(Position(tuple(index), axis, lanes), mask)

    with contextlib.ExitStack() as stack:
        for outer in (a for a in range(len(shape)) if a != axis):
            if not (bounds[outer] == 1 and shape[outer] == 1):
                loop = stack.enter_context(b.loop(b.index(0), bound_value(s, bounds[outer]), b.index(1)))
                index[outer] = loop.index
            stack.enter_context(s.assume(conditions[outer], index[outer]))
        bound = bounds[axis]
        full: Bound
        if isinstance(bound, int):
            full = bound // lanes * lanes
        else:
            full = b.binary("arith.andi", bound, b.index(-lanes))
        if full == lanes:
            visit(b.index(0))
        elif full != 0:
            with b.loop(b.index(0), bound_value(s, full), b.index(lanes)) as loop:
                visit(loop.index)
        if isinstance(bound, int) and bound == full:
            return
        rest = b.compare("arith.cmpi slt", bound_value(s, full), bound_value(s, bound))
        with b.when(rest), b.pinned_here():
            start = bound_value(s, full)
            visit(start, lane_mask(s, start, bound_value(s, bound), lanes))


def for_each_row(
    s: State,
    shape: Sequence[int],
    conditions: Sequence[Sequence[Condition]],
    axis: int,
    body: Callable[[Position], None],
) -> None:
    """Call ``body(position)`` for every row along ``axis`` that satisfies the conditions on the other axes."""
    b = s.b
    index = list(s.origin(len(shape)))
    with contextlib.ExitStack() as stack:
        for outer in (a for a in range(len(shape)) if a != axis):
            bound = loop_bound(s, conditions[outer], shape[outer])
            if shape[outer] == 1 and bound == 1:
                continue
            loop = stack.enter_context(b.loop(b.index(0), bound_value(s, bound), b.index(1)))
            index[outer] = loop.index
            stack.enter_context(s.assume(conditions[outer], loop.index))
        body(Position(tuple(index)))


def lane_mask(s: State, start: Val, bound: Val, lanes: int) -> Val:
    """The mask of the lanes of a vector at ``start`` that are before ``bound``."""
    b = s.b
    rest = b.convert("arith.trunci", b.binary("arith.subi", bound, start), "i32")
    return b.compare("arith.cmpi slt", b.iota("i32", lanes), rest)


def vector_axis(s: State, value: Value) -> int:
    """The axis along which most loads of the expression are contiguous; the last axis in case of a tie."""
    counts = [0] * len(value.type.shape)
    _count_contiguous_loads(s, value, tuple(range(len(counts))), counts, set())
    best = len(counts) - 1
    for axis, count in enumerate(counts):
        if count > counts[best] and value.type.shape[axis] > 1:
            best = axis
    return best


def _count_contiguous_loads(s: State, value: Value, axes: tuple[int | None, ...], counts: list[int], seen: set) -> None:
    """``axes``: the axis of the expression for each axis of ``value``."""
    if (value, axes) in seen or not value.type.is_tile:
        return
    seen.add((value, axes))
    op = value.op
    contiguous = None
    if value in s.buffers:
        contiguous = axes[-1]
    elif op is None:
        return
    elif op.name == "tt.load":
        found = [a for i, a in enumerate(axes) if s.axes.along(op.operands[0], i).contiguous]
        contiguous = found[0] if found else None
    elif op.name in RESHAPES:
        inner: list[int | None] = [None] * len(op.operands[0].type.shape)
        for axis, outer in enumerate(axes):
            to = operand_axis(op, axis)
            if to is not None:
                inner[to] = outer
        _count_contiguous_loads(s, op.operands[0], tuple(inner), counts, seen)
    elif op.name in ELEMENTWISE:
        for operand in op.operands:
            _count_contiguous_loads(s, operand, axes, counts, seen)
    if contiguous is not None:
        counts[contiguous] += 1
