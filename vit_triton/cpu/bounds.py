"""Bounds pass: convert masks to loop bounds.

The conditions of a mask (:mod:`vit_triton.cpu.masks`) have the form ``offsets[i] < limit``, with offsets that increase
by one. They hold for the first ``limit - offsets[0]`` indices; ``loop_bound`` is that number, clamped to the tile size.
Loops end at the bound (:mod:`vit_triton.cpu.loops`), so the conditions need no test inside them.
"""

from collections.abc import Sequence
from typing import TypeAlias

from vit_triton.cpu.builder import Val
from vit_triton.cpu.demand import AxisDemand
from vit_triton.cpu.expressions import evaluate, limit_of
from vit_triton.cpu.masks import Condition
from vit_triton.cpu.state import Position, State
from vit_triton.cpu.ttir import Value

Bound: TypeAlias = Val | int  # int: a compile-time constant


def loop_bound(s: State, conditions: Sequence[Condition], size: int) -> Bound:
    """The number of leading indices, at most ``size``, that satisfy all conditions."""
    result: Bound = size
    b = s.b
    for condition in conditions:
        if condition.limit is None:
            result = b.select(s.scalars[condition.offsets], bound_value(s, result), b.index(0))
            continue
        first = evaluate(s, condition.offsets, Position(s.origin(1)))
        limit = limit_of(s, condition, first.elem)
        number = _constant_bound(s, condition)
        if number is not None and isinstance(result, int):
            result = min(result, max(0, number))
            continue
        count = b.binary("arith.subi", b.to_index(limit), b.to_index(first))
        count = b.binary("arith.maxsi", count, b.index(0))
        result = b.binary("arith.minsi", count, bound_value(s, result))
    return result


def _constant_bound(s: State, condition: Condition) -> int | None:
    op = condition.offsets.op
    start = 0
    if op is not None and op.name == "arith.addi":
        constants = [number for v in op.operands if (number := s.axes.constant(v)) is not None]
        ranges = [v.op for v in op.operands if v.op is not None and v.op.name == "tt.make_range"]
        if len(ranges) != 1 or len(constants) != 1:
            return None
        op, start = ranges[0], constants[0]
    if op is None or op.name != "tt.make_range" or not isinstance(condition.limit, int):
        return None
    return condition.limit - start - int(op.attrs["start"])


def bound_value(s: State, bound: Bound) -> Val:
    return s.b.index(bound) if isinstance(bound, int) else bound


def available_conditions(s: State, conditions: Sequence[AxisDemand]) -> list[Condition]:
    """The conditions whose bound can be computed here, because the values it needs are defined."""
    found = [c for c in conditions if isinstance(c, Condition) and c.offsets in s.defined]
    return [c for c in found if not isinstance(c.limit, Value) or c.limit in s.defined]


def demanded_conditions(s: State, value: Value) -> list[list[Condition]]:
    """The available conditions on the indices that are read, for each axis."""
    return [available_conditions(s, [demand]) for demand in s.demand.of(value)]
