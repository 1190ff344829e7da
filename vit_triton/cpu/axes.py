"""Axis analysis: how the elements of a tile change along an axis.

A load along an axis is a vector load if its addresses are contiguous, and a scalar load if they are uniform. A
comparison of contiguous offsets with a limit can become the bound of a loop (:mod:`vit_triton.cpu.masks`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vit_triton.cpu.ttir import Op, Value
from vit_triton.cpu.vmath import ELEMENTWISE

RESHAPES = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.trans"}


@dataclass(frozen=True)
class AxisInfo:
    """``affine``: each element is its predecessor plus ``stride``, which is None if it is not a compile-time
    constant."""

    affine: bool
    stride: int | None = None

    @property
    def uniform(self) -> bool:
        return self.stride == 0

    @property
    def contiguous(self) -> bool:
        return self.stride == 1

    def plus(self, other: "AxisInfo", sign: int = 1) -> "AxisInfo":
        """The AxisInfo of the sum of two affine values, or with ``sign=-1`` of their difference."""
        if self.stride is None or other.stride is None:
            return AxisInfo(True)
        return AxisInfo(True, self.stride + sign * other.stride)

    def times(self, factor: int | None) -> "AxisInfo":
        """The AxisInfo of the product of an affine value and a uniform one."""
        return AxisInfo(True, None if self.stride is None or factor is None else self.stride * factor)


IRREGULAR = AxisInfo(False)
UNIFORM = AxisInfo(True, 0)
CONTIGUOUS = AxisInfo(True, 1)


def operand_axis(op: Op, axis: int) -> int | None:
    """For an op in RESHAPES, the axis of the operand that becomes ``axis`` of the result; None if the op adds it."""
    if op.name == "tt.trans":
        return op.attrs["order"][axis]
    if op.name == "tt.broadcast":
        return axis if op.operands[0].type.shape[axis] == op.results[0].type.shape[axis] else None
    if op.name == "tt.expand_dims":
        new = int(op.attrs["axis"])
        return None if axis == new else axis - (axis > new)
    return None


class Axes:
    def __init__(self, ops: Sequence[Op]) -> None:
        """``ops``: all operations of a kernel, from :func:`vit_triton.cpu.ttir.walk`."""
        self.loops = [op for op in ops if op.name == "scf.for"]
        self.inductions: dict[Value, Op] = {}  # a loop's pointer or offset tile -> the op that advances it
        for loop in self.loops:
            self._find_inductions(loop)

    def _find_inductions(self, loop: Op) -> None:
        body = loop.regions[0]
        for argument, new in zip(body.arguments[1:], body.yielded, strict=True):
            step = new.op
            if not argument.type.is_tile or step is None or step.name not in ("tt.addptr", "arith.addi"):
                continue
            if step.operands[0] is argument and self.is_uniform(step.operands[1]):
                self.inductions[argument] = step

    def initial(self, argument: Value) -> Value:
        """The value of an induction before the first iteration."""
        region = self.inductions[argument].parent
        assert region is not None and region.parent is not None
        loop = region.parent
        return loop.operands[3 + loop.regions[0].arguments[1:].index(argument)]

    def is_uniform(self, value: Value) -> bool:
        return all(self.along(value, axis, whole=True).uniform for axis in range(len(value.type.shape)))

    def along(self, value: Value, axis: int, *, whole: bool = False) -> AxisInfo:
        """The AxisInfo along ``axis`` within aligned runs of 16 elements (vectors), or with ``whole`` along the entire
        axis: a quotient by 16 is uniform, and a remainder contiguous, only within such a run."""
        if value.type.shape[axis] == 1:
            return UNIFORM
        op = value.op
        if value in self.inductions:
            return self.along(self.initial(value), axis, whole=whole)
        if op is None:
            return IRREGULAR
        if op.name == "tt.make_range":
            return CONTIGUOUS
        if op.name in ("tt.splat", "arith.constant"):
            return UNIFORM
        if op.name in RESHAPES:
            inner = operand_axis(op, axis)
            return UNIFORM if inner is None else self.along(op.operands[0], inner, whole=whole)
        if op.name == "tt.load":
            return UNIFORM if all(self.along(v, axis, whole=whole).uniform for v in op.operands) else IRREGULAR
        if op.name not in ELEMENTWISE and op.name != "tt.addptr":
            return IRREGULAR
        return self._along_elementwise(op, axis, whole)

    def _along_elementwise(self, op: Op, axis: int, whole: bool) -> AxisInfo:
        parts = [self.along(v, axis, whole=whole) for v in op.operands]
        if all(part.uniform for part in parts):
            return UNIFORM
        if not all(part.affine for part in parts):
            return IRREGULAR
        if op.name in ("arith.addi", "tt.addptr"):
            return parts[0].plus(parts[1])
        if op.name == "arith.subi":
            return parts[0].plus(parts[1], sign=-1)
        if op.name == "arith.muli":
            for part, factor, value in zip(parts, reversed(parts), reversed(op.operands), strict=True):
                if factor.uniform:
                    return part.times(self.constant(value))
            return IRREGULAR
        if op.name in ("arith.extsi", "arith.extui", "arith.trunci"):
            return parts[0]
        remainder = op.name in ("arith.remsi", "arith.remui")
        if (remainder or op.name in ("arith.divsi", "arith.divui")) and parts[0].contiguous and not whole:
            divisor = self.constant(op.operands[1])
            if divisor is not None and divisor % 16 == 0 and self.divisibility(op.operands[0]) % 16 == 0:
                return CONTIGUOUS if remainder else UNIFORM
        return IRREGULAR

    def offsets(self, value: Value, axis: int) -> list[int] | None:
        """The differences of each element along ``axis`` and the first; None if they are not compile-time constants."""
        size, op = value.type.shape[axis], value.op
        if value in self.inductions:
            return self.offsets(self.initial(value), axis)
        if size == 1 or op is not None and op.name in ("tt.splat", "arith.constant"):
            return [0] * size
        if op is None:
            return None
        if op.name == "tt.make_range":
            return list(range(size))
        if op.name in RESHAPES:
            inner = operand_axis(op, axis)
            return [0] * size if inner is None else self.offsets(op.operands[0], inner)
        if op.name == "arith.extsi":
            return self.offsets(op.operands[0], axis)
        if op.name in ("arith.addi", "tt.addptr", "arith.muli", "arith.divsi", "arith.remsi"):
            a, b = (self.offsets(v, axis) for v in op.operands)
            if a is None or b is None:
                return None
            if op.name in ("arith.addi", "tt.addptr"):
                return [x + y for x, y in zip(a, b, strict=True)]
            if not any(a) and not any(b):
                return a
            number = self.constant(op.operands[1])
            if number is None or any(b):
                return None
            if op.name == "arith.muli":
                return [x * number for x in a]
            first = strip_axes(op.operands[0]).op
            if first is not None and first.name == "tt.make_range" and int(first.attrs["start"]) == 0:
                return [x // number if op.name == "arith.divsi" else x % number for x in a]
        return None

    def constant(self, value: Value) -> int | None:
        """The value of a uniform integer; None if it is not a compile-time constant."""
        op = value.op
        while op is not None and op.name in (*RESHAPES, "arith.extsi"):
            op = op.operands[0].op
        return op.attrs["value"] if op is not None and op.name == "arith.constant" else None

    def divisibility(self, value: Value) -> int:
        """A power of two (at most 16) that divides the first element of every aligned run of 16."""
        op = value.op
        if op is None:
            return self._argument_divisibility(value)
        if op.name == "arith.constant":
            return math.gcd(16, int(op.attrs["value"]))
        if op.name == "tt.make_range":
            return math.gcd(16, int(op.attrs["start"]))
        if op.name in RESHAPES or op.name == "arith.extsi":
            return self.divisibility(op.operands[0])
        if op.name in ("arith.addi", "arith.subi"):
            return math.gcd(*(self.divisibility(v) for v in op.operands))
        if op.name == "arith.muli":
            return math.gcd(16, math.prod(self.divisibility(v) for v in op.operands))
        return 1

    def _argument_divisibility(self, value: Value) -> int:
        for loop in self.loops:
            if loop.regions[0].arguments[0] is value:
                return math.gcd(self.divisibility(loop.operands[0]), self.divisibility(loop.operands[2]))
        return value.index or 1  # tt.divisibility of a kernel argument


def strip_axes(value: Value) -> Value:
    """The tile before tt.expand_dims and tt.broadcast."""
    while value.op is not None and value.op.name in ("tt.expand_dims", "tt.broadcast"):
        value = value.op.operands[0]
    return value
