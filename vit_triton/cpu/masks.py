"""Mask analysis: the conditions on indices that a mask consists of.

``offs < n`` over a range is a :class:`Condition`: the loop over the tile ends at ``n``, computed by
:mod:`vit_triton.cpu.bounds`, and does not test the mask. The condition of a masked load also bounds later operations
such as sums, as long as each operation maps the constant outside the mask to a constant (``Masks.extent``).
"""

import math
from dataclasses import dataclass

from vit_triton.cpu.axes import RESHAPES, Axes, operand_axis, strip_axes
from vit_triton.cpu.ttir import Op, Value

# identity elements of reductions
IDENTITY = {
    "arith.addf": 0.0, "arith.addi": 0, "arith.maxnumf": -math.inf, "arith.minnumf": math.inf,
    "arith.maximumf": -math.inf, "arith.minimumf": math.inf, "arith.mulf": 1.0, "arith.muli": 1, "arith.ori": 0,
    "arith.xori": 0, "arith.andi": -1, "arith.maxui": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """``offsets[i] < limit``: offsets is a 1-D tile that increases by one, limit is a scalar or a uniform tile. Without
    limit, ``offsets`` is a boolean scalar that applies to every i."""

    offsets: Value
    limit: Value | int | None


@dataclass(frozen=True)
class Conditions:
    """The conditions of a mask, each with the axis whose index it restricts. ``complete``: the mask is equivalent to
    them."""

    by_axis: tuple[tuple[int, Condition], ...]
    complete: bool

    def along(self, axis: int) -> list[Condition]:
        return [condition for a, condition in self.by_axis if a == axis]


NO_MASK = Conditions((), True)
_UNKNOWN = Conditions((), False)


class Masks:
    def __init__(self, axes: Axes) -> None:
        self.axes = axes

    def conditions(self, mask: Value | None) -> Conditions:
        """The conditions that hold where ``mask`` is true; empty without a mask."""
        if mask is None:
            return NO_MASK
        op = mask.op
        if op is None:
            return _UNKNOWN
        if op.name == "arith.constant":
            return Conditions((), bool(op.attrs["value"]))
        if op.name == "arith.andi":
            a, b = (self.conditions(v) for v in op.operands)
            return Conditions(a.by_axis + b.by_axis, a.complete and b.complete)
        if op.name == "tt.splat":
            return Conditions(((0, Condition(op.operands[0], None)),), True)
        if op.name in RESHAPES:
            return self._reshape_conditions(op, len(mask.type.shape))
        if op.name == "arith.cmpi" and op.attrs["words"][0] == "slt" and self.axes.is_uniform(op.operands[1]):
            return self._comparison_conditions(op, mask.type.shape)
        return _UNKNOWN

    def _reshape_conditions(self, op: Op, rank: int) -> Conditions:
        inner = self.conditions(op.operands[0])
        axes = {operand_axis(op, axis): axis for axis in range(rank)}
        outer = [(0 if c.limit is None else axes.get(axis), c) for axis, c in inner.by_axis]
        # a condition along an axis that tt.broadcast repeats does not restrict an index
        known = tuple((axis, c) for axis, c in outer if axis is not None)
        return Conditions(known, inner.complete and len(known) == len(outer))

    def _comparison_conditions(self, op: Op, shape: tuple[int, ...]) -> Conditions:
        offsets, limit = op.operands
        rising = [a for a in range(len(shape)) if not self.axes.along(offsets, a, whole=True).uniform]
        if shape == (1,) or len(rising) == 1 and self.axes.along(offsets, rising[0], whole=True).contiguous:
            condition = Condition(strip_axes(offsets), self._limit(limit))
            return Conditions(((rising[0] if rising else 0, condition),), True)
        return _UNKNOWN

    def _limit(self, value: Value) -> Value | int:
        number = self.axes.constant(value)
        if number is not None:
            return number
        while value.op is not None and value.op.name in RESHAPES:
            value = value.op.operands[0]
        return value

    def extent(self, value: Value, axis: int, outside: float) -> list[Condition]:
        """Conditions on the index along ``axis``; where one of them is false, the value is ``outside``."""
        op = value.op
        if op is None:
            return []
        name = op.name
        if name in RESHAPES and name != "tt.splat":
            inner = operand_axis(op, axis)
            return [] if inner is None else self.extent(op.operands[0], inner, outside)
        if name in ("arith.extf", "arith.truncf"):
            return self.extent(op.operands[0], axis, outside)
        if name == "tt.load" and len(op.operands) == 3 and self.uniform_number(op.operands[2]) == outside:
            return self.conditions(op.operands[1]).along(axis)
        if name == "arith.select":
            found = self.extent(op.operands[1], axis, outside)
            if self.uniform_number(op.operands[2]) == outside:
                found = found + self.conditions(op.operands[0]).along(axis)
            elif not set(found) <= set(self.extent(op.operands[2], axis, outside)):
                return []
            return found
        if name == "arith.mulf" and outside == 0:
            return [c for v in op.operands for c in self.extent(v, axis, outside)]
        if name in ("arith.addf", "arith.subf") and outside == 0:
            a, b = (self.extent(v, axis, outside) for v in op.operands)
            return [c for c in a if c in b]
        if name == "arith.subf" and outside == -math.inf:
            return self.extent(op.operands[0], axis, outside)
        if name == "math.exp2" and outside == 0:
            return self.extent(op.operands[0], axis, -math.inf)
        return []

    def uniform_number(self, value: Value) -> float | None:
        op = value.op
        while op is not None and op.name in RESHAPES:
            op = op.operands[0].op
        return float(op.attrs["value"]) if op is not None and op.name == "arith.constant" else None

    def reduction_conditions(self, op: Op) -> list[Condition]:
        """Conditions on the index along the axis of a tt.reduce; elements outside them are the identity."""
        identity = IDENTITY.get(op.regions[0].ops[0].name)
        if identity is None or op.operands[0].type.elem[0] not in "fb":
            return []
        return list(dict.fromkeys(self.extent(op.operands[0], op.attrs["axis"], identity)))

    def contraction_conditions(self, op: Op) -> list[Condition]:
        """Conditions on the index that a tt.dot sums over; products outside them are 0."""
        a, b = op.operands[:2]
        return list(dict.fromkeys((*self.extent(a, 1, 0.0), *self.extent(b, 0, 0.0))))
