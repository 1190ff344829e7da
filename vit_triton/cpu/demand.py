"""Demand analysis: which part of a tile is read.

The demand along an axis is nothing, everything, or the indices that satisfy one condition. A masked store reads the
indices that satisfy its mask, and so do the expressions that it stores: with 197 keys in a tile of 256, only 197 are
computed.
"""

import enum
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from vit_triton.cpu.axes import operand_axis
from vit_triton.cpu.masks import Condition, Masks
from vit_triton.cpu.ttir import Op, Value
from vit_triton.cpu.vmath import ELEMENTWISE


class Part(enum.Enum):
    NOTHING = enum.auto()
    EVERYTHING = enum.auto()


AxisDemand: TypeAlias = Condition | Part


def _one_condition(conditions: Sequence[Condition]) -> AxisDemand:
    return conditions[0] if len(conditions) == 1 else Part.EVERYTHING


def _join(a: AxisDemand, b: AxisDemand) -> AxisDemand:
    if a is Part.NOTHING or b is Part.NOTHING:
        return b if a is Part.NOTHING else a
    return a if a == b else Part.EVERYTHING


class Demand:
    def __init__(self, ops: Sequence[Op], masks: Masks) -> None:
        self.masks = masks
        self.found: dict[Value, list[AxisDemand]] = {}
        changed = True
        while changed:  # loop-carried values need several rounds
            changed = False
            for op in reversed(ops):
                for value, demand in self._of_operands(op):
                    before = self.of(value)
                    self.found[value] = [_join(a, b) for a, b in zip(before, demand, strict=True)]
                    changed |= self.found[value] != before

    def of(self, value: Value) -> list[AxisDemand]:
        """The part that is read, for each axis."""
        return self.found.setdefault(value, [Part.NOTHING] * len(value.type.shape))

    def _of_operands(self, op: Op) -> Iterator[tuple[Value, list[AxisDemand]]]:
        name = op.name
        if name == "tt.store":
            demand: list[AxisDemand] = [Part.EVERYTHING] * len(op.operands[0].type.shape)
            if len(op.operands) == 3:
                for axis, condition in self.masks.conditions(op.operands[2]).by_axis:
                    if condition.limit is not None or demand[axis] is Part.EVERYTHING:
                        demand[axis] = condition
            for value in op.operands:
                yield value, list(demand)
        elif name == "scf.for":
            body = op.regions[0]
            for init, argument, new, result in zip(
                op.operands[3:], body.arguments[1:], body.yielded, op.results, strict=True
            ):
                yield argument, self.of(result)
                yield new, self.of(argument)
                yield init, self.of(argument)
        elif name == "scf.if":
            for region in op.regions:
                for new, result in zip(region.yielded, op.results, strict=True):
                    yield new, self.of(result)
        elif name == "scf.yield":
            return
        elif name == "tt.dot":
            rows, cols = self.of(op.results[0])
            depth = _one_condition(self.masks.contraction_conditions(op))
            yield op.operands[0], [rows, rows if rows is Part.NOTHING else depth]
            yield op.operands[1], [cols if cols is Part.NOTHING else depth, cols]
            yield op.operands[2], [rows, cols]
        elif name == "tt.reduce":
            for value, result in zip(op.operands, op.results, strict=True):
                demand, axis = self.of(result), op.attrs["axis"]
                yield value, [*demand[:axis], _one_condition(self.masks.reduction_conditions(op)), *demand[axis:]]
        elif name in ("tt.broadcast", "tt.expand_dims", "tt.trans"):
            inner: list[AxisDemand] = [Part.EVERYTHING] * len(op.operands[0].type.shape)
            for axis, d in enumerate(self.of(op.results[0])):
                at = operand_axis(op, axis)
                if at is not None:
                    inner[at] = d
            yield op.operands[0], inner
        elif name in ELEMENTWISE or name in ("tt.addptr", "tt.load"):
            for value in op.operands:
                if value.type.is_tile and op.results[0].type.is_tile:
                    yield value, self.of(op.results[0])
        else:
            for value in op.operands:
                yield value, [Part.EVERYTHING] * len(value.type.shape)
