"""Sink analysis: which operations evaluate an expression, and which results are materialized.

Elementwise operations are fused into their consumers: stores, reductions, dots and loops (the sinks) evaluate the whole
expression one vector at a time. A result that has several sinks and costs more than MATERIALIZE_COST is computed once
and materialized in memory.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from vit_triton.cpu.axes import RESHAPES, Axes
from vit_triton.cpu.masks import Masks
from vit_triton.cpu.ttir import Op, Value
from vit_triton.cpu.vmath import COST, ELEMENTWISE

# operations that are fused into their sinks
LAZY = ELEMENTWISE | RESHAPES | {"tt.addptr", "tt.make_range", "arith.constant"}
MATERIALIZE_COST = 8  # instructions per vector


class Sink(NamedTuple):
    """An operation that evaluates a value; ``repeats``: it does so again for "every row", or on "every trip" of a
    loop."""

    op: Op
    repeats: str = ""


class Sinks:
    def __init__(self, ops: Sequence[Op], axes: Axes, masks: Masks) -> None:
        self.axes, self.masks = axes, masks
        self.position = {op: i for i, op in enumerate(ops)}
        self.last_use: dict[Value, int] = {}  # the position of the last sink
        self.materialized: set[Value] = set()  # evaluated into memory where they are defined
        self._of: dict[Value, set[Sink]] = {}
        self._cost: dict[Value, int] = {}
        for op in ops:
            for value in op.results:
                self._cost[value] = self._cost_of(op, value)
        for op in reversed(ops):
            for value in op.results:
                self._find(value, _loop_depth(op))
                elementwise = op.name in ELEMENTWISE and value.type.elem != "ptr"
                if elementwise and len(self._of[value]) > 1 and self._cost[value] > MATERIALIZE_COST:
                    self.materialized.add(value)
            if op.name == "scf.for":
                for argument in op.regions[0].arguments:
                    self._find(argument, _loop_depth(op) + 1)

    def is_only_sink(self, value: Value, op: Op) -> bool:
        """Whether ``op`` is the only sink of ``value``, and evaluates it once."""
        return self._of[value] == {Sink(op)}

    def _cost_of(self, op: Op, value: Value) -> int:
        """The approximate number of instructions per vector to evaluate a result."""
        if not value.type.is_tile or op.name in ("tt.make_range", "arith.constant"):
            return 0
        if op.name in RESHAPES:
            return self._cost.get(op.operands[0], 1)
        if op.name == "tt.addptr":
            return sum(self._cost.get(v, 1) for v in op.operands)
        if op.name == "tt.load":
            return 2 + self._cost.get(op.operands[0], 1)
        if op.name not in ELEMENTWISE:
            return 1
        if len(value.users) > 1 and any(u.name == "tt.store" and u.operands[1] is value for u in value.users):
            # stored and used again: otherwise its loads would have to be materialized before the store
            self.materialized.add(value)
            return 2
        if value.type.elem == "i1" and self.masks.conditions(value).complete:
            return 0  # a mask that becomes a loop bound
        if all(self.axes.along(value, axis).affine for axis in range(len(value.type.shape))):
            return 0  # an address or the offset of a mask, computed once per row
        inner = sum(self._cost.get(v, 1) for v in op.operands)
        return min(1000, inner + COST.get(op.name, 1))

    def _find(self, value: Value, depth: int) -> None:
        sinks: set[Sink] = set()
        last = -1
        for user in value.users:
            last = max(last, self.position[user])
            if user.name in LAZY or user.name == "tt.load":
                result = user.results[0]
                materialized = result in self.materialized or not result.type.is_tile
                sinks |= {Sink(user)} if materialized else self._of[result]
                last = last if materialized else max(last, self.last_use[result])
                grows = user.name == "tt.broadcast" and result.type.shape != value.type.shape
                if grows and math.prod(value.type.shape) > 1:
                    sinks.add(Sink(user, "every row"))
            else:
                sinks.add(Sink(user))
            if _loop_depth(user) > depth:
                sinks.add(Sink(user, "every trip"))
        self._of[value] = sinks
        self.last_use[value] = last


def _loop_depth(op: Op) -> int:
    depth, region = 0, op.parent
    while region is not None and region.parent is not None:
        depth, region = depth + (region.parent.name == "scf.for"), region.parent.parent
    return depth
