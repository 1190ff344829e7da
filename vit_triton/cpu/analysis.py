"""What can be known of the tiles of a kernel before any code is written.

``Analysis`` answers, of a value of the TTIR: how it changes along an axis (``coefficient``), which index ranges a mask
allows (``conditions``), beyond which index it is a given constant (``extent``), which part of it anyone will look at
(``demand``), and which operations evaluate it (``sinks``).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vit_triton.cpu.ttir import Function, Op, Region, Value
from vit_triton.cpu.vmath import COST, ELEMENTWISE

RESHAPES = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.trans"}
LAZY = ELEMENTWISE | RESHAPES | {"tt.addptr", "tt.make_range", "arith.constant"}
IDENTITY = {
    "arith.addf": 0.0, "arith.addi": 0, "arith.maxnumf": -math.inf, "arith.minnumf": math.inf,
    "arith.maximumf": -math.inf, "arith.minimumf": math.inf, "arith.mulf": 1.0, "arith.muli": 1, "arith.ori": 0,
    "arith.xori": 0, "arith.andi": -1, "arith.maxui": 0,
}  # fmt: skip
MATERIALISE_COST = 8  # above it, a tile that is evaluated twice is kept instead


@dataclass(frozen=True)
class Condition:
    """``offsets[i] < limit``, offsets (a 1-D tile) growing by one with i; limit a scalar, or a uniform tile. Without a
    limit, ``offsets`` is a scalar that is true or false for every i."""

    offsets: Value
    limit: Value | int | None


FULL = "full"


def walk(region: Region) -> Iterator[Op]:
    """Every operation, nested ones after the one that holds them."""
    for op in region.ops:
        yield op
        for nested in op.regions:
            yield from walk(nested)


def trans_axis(op: Op, axis: int) -> int:
    """The axis of the operand of tt.trans that is ``axis`` of its result."""
    return op.attrs["order"][axis]


def operand_axis(op: Op, axis: int) -> int | None:
    """The axis of the operand of a reshaping op that runs along ``axis`` of the result; None if it has none."""
    if op.name == "tt.trans":
        return trans_axis(op, axis)
    if op.name == "tt.broadcast":
        return axis if op.operands[0].type.shape[axis] == op.results[0].type.shape[axis] else None
    if op.name == "tt.expand_dims":
        new = int(op.attrs["axis"])
        return None if axis == new else axis - (axis > new)
    return None


class Analysis:
    def __init__(self, function: Function) -> None:
        self.ops = list(walk(function.body))
        self.position = {op: i for i, op in enumerate(self.ops)}
        self.inductions: dict[Value, Op] = {}  # a loop's pointer or offset tile -> the op that advances it
        for op in self.ops:
            if op.name == "scf.for":
                self._find_inductions(op)
        self.sinks: dict[Value, set] = {}
        self.last_use: dict[Value, int] = {}
        self.cost: dict[Value, int] = {}
        self.kept: set[Value] = set()  # evaluated once, into memory, where they are defined
        self._costs()
        self._find_sinks()
        self.demand: dict[Value, list] = {}
        self._find_demand()

    # --- how a value changes along an axis

    def _find_inductions(self, loop: Op) -> None:
        body = loop.regions[0]
        for argument, new in zip(body.arguments[1:], body.yielded, strict=True):
            step = new.op
            if not argument.type.is_tile or step is None or step.name not in ("tt.addptr", "arith.addi"):
                continue
            if step.operands[0] is argument and self.is_uniform(step.operands[1]):
                self.inductions[argument] = step

    def initial(self, argument: Value) -> Value:
        """What a loop's tile argument starts as."""
        region = self.inductions[argument].parent
        assert region is not None and region.parent is not None
        loop = region.parent
        return loop.operands[3 + loop.regions[0].arguments[1:].index(argument)]

    def is_uniform(self, value: Value) -> bool:
        return all(self.coefficient(value, axis, whole=True) == 0 for axis in range(len(value.type.shape)))

    def coefficient(self, value: Value, axis: int, *, whole: bool = False) -> "int | str | None":
        """0: does not change along ``axis``; an integer: grows by it; "affine": grows by an amount known at run time;
        None: none of these is known. It holds within aligned runs of 16, which is where vectors lie, or everywhere if
        ``whole``: a quotient by 16 is 0 and a remainder grows by 1 in such a run only."""
        if value.type.shape[axis] == 1:
            return 0
        op = value.op
        if value in self.inductions:
            return self.coefficient(self.initial(value), axis, whole=whole)
        if op is None:
            return None
        if op.name == "tt.make_range":
            return 1
        if op.name in ("tt.splat", "arith.constant"):
            return 0
        if op.name in RESHAPES:
            inner = operand_axis(op, axis)
            return 0 if inner is None else self.coefficient(op.operands[0], inner, whole=whole)
        if op.name == "tt.load":
            return 0 if all(self.coefficient(v, axis, whole=whole) == 0 for v in op.operands) else None
        if op.name not in ELEMENTWISE and op.name != "tt.addptr":
            return None
        parts = [self.coefficient(v, axis, whole=whole) for v in op.operands]
        if all(c == 0 for c in parts):
            return 0
        if None in parts:
            return None
        if op.name in ("arith.addi", "tt.addptr", "arith.subi"):
            a, b = parts
            if isinstance(a, int) and isinstance(b, int):
                return a - b if op.name == "arith.subi" else a + b
            return "affine"
        if op.name == "arith.muli":
            for c, other in ((parts[0], op.operands[1]), (parts[1], op.operands[0])):
                if self.coefficient(other, axis, whole=whole) == 0:
                    number = self.constant(other)
                    return c * number if isinstance(c, int) and number is not None else "affine"
            return None
        if op.name in ("arith.extsi", "arith.extui", "arith.trunci"):
            return parts[0]
        if op.name in ("arith.divsi", "arith.remsi", "arith.divui", "arith.remui") and parts[0] == 1 and not whole:
            divisor = self.constant(op.operands[1])
            if divisor is not None and divisor % 16 == 0 and self.divisibility(op.operands[0]) % 16 == 0:
                return 1 if "rem" in op.name else 0
        return None

    def offsets(self, value: Value, axis: int) -> list[int] | None:
        """How far each element along ``axis`` lies from the first, where that is known to the number."""
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
            first = self._strip(op.operands[0]).op
            if first is not None and first.name == "tt.make_range" and int(first.attrs["start"]) == 0:
                return [x // number if op.name == "arith.divsi" else x % number for x in a]
        return None

    def constant(self, value: Value) -> int | None:
        """The number a uniform integer is, if it is known."""
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
        for loop in self.ops:
            if loop.name == "scf.for" and loop.regions[0].arguments[0] is value:
                return math.gcd(self.divisibility(loop.operands[0]), self.divisibility(loop.operands[2]))
        return value.index or 1  # set from tt.divisibility for the arguments of the kernel

    # --- masks

    def conditions(self, mask: Value) -> tuple[list[tuple[int, Condition]], bool]:
        """The (axis, condition) pairs that hold where ``mask`` is true, and whether they are all it says."""
        op = mask.op
        if op is None:
            return [], False
        if op.name == "arith.constant":
            return [], bool(op.attrs["value"])
        if op.name == "arith.andi":
            (a, all_a), (b, all_b) = (self.conditions(v) for v in op.operands)
            return a + b, all_a and all_b
        if op.name == "tt.splat":
            return [(0, Condition(op.operands[0], None))], True
        if op.name in RESHAPES:
            inner, complete = self.conditions(op.operands[0])
            axes = {operand_axis(op, axis): axis for axis in range(len(mask.type.shape))}
            outer = [(0 if c.limit is None else axes.get(axis), c) for axis, c in inner]
            # a condition on the one row that is repeated is one on all of them
            return [(a, c) for a, c in outer if a is not None], complete and all(a is not None for a, _ in outer)
        if op.name == "arith.cmpi" and op.attrs["words"][0] == "slt" and self.is_uniform(op.operands[1]):
            shape = mask.type.shape
            rising = [a for a in range(len(shape)) if self.coefficient(op.operands[0], a, whole=True) != 0]
            if shape == (1,) or len(rising) == 1 and self.coefficient(op.operands[0], rising[0], whole=True) == 1:
                rising = rising or [0]
                return [(rising[0], Condition(self._strip(op.operands[0]), self._limit(op.operands[1])))], True
        return [], False

    def _strip(self, value: Value) -> Value:
        while value.op is not None and value.op.name in ("tt.expand_dims", "tt.broadcast"):
            value = value.op.operands[0]
        return value

    def _limit(self, value: Value) -> "Value | int":
        number = self.constant(value)
        if number is not None:
            return number
        while value.op is not None and value.op.name in RESHAPES:
            value = value.op.operands[0]
        return value

    def extent(self, value: Value, axis: int, outside: float) -> list[Condition]:
        """Conditions on the index along ``axis`` without any one of which the value is ``outside``."""
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
            return [c for a, c in self.conditions(op.operands[1])[0] if a == axis]
        if name == "arith.select":
            found = self.extent(op.operands[1], axis, outside)
            if self.uniform_number(op.operands[2]) == outside:
                found = found + [c for a, c in self.conditions(op.operands[0])[0] if a == axis]
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

    def reduced(self, op: Op) -> list[Condition]:
        """Conditions on the index along the axis of a tt.reduce without which an element is its identity."""
        identity = IDENTITY.get(op.regions[0].ops[0].name)
        if identity is None or op.operands[0].type.elem[0] not in "fb":
            return []
        return list(dict.fromkeys(self.extent(op.operands[0], op.attrs["axis"], identity)))

    def contracted(self, op: Op) -> list[Condition]:
        """Conditions on the index that a tt.dot sums over without which a product is 0."""
        a, b = op.operands[:2]
        return list(dict.fromkeys((*self.extent(a, 1, 0.0), *self.extent(b, 0, 0.0))))

    def _inside(self, conditions: list[Condition]) -> "Condition | str":
        return conditions[0] if len(conditions) == 1 else FULL

    # --- who evaluates what

    def _costs(self) -> None:
        for op in self.ops:
            for value in op.results:
                if not value.type.is_tile:
                    self.cost[value] = 0
                elif op.name in RESHAPES:
                    self.cost[value] = self.cost.get(op.operands[0], 1)
                elif op.name in ELEMENTWISE:
                    if value.type.elem == "i1" and self.conditions(value)[1]:
                        self.cost[value] = 0  # a mask that becomes the bound of a loop
                    elif all(self.coefficient(value, a) is not None for a in range(len(value.type.shape))):
                        self.cost[value] = 0  # an address or a mask's offset: computed per row, not per element
                    else:
                        inner = sum(self.cost.get(v, 1) for v in op.operands)
                        self.cost[value] = min(1000, inner + COST.get(op.name, 1))
                    if len(value.users) > 1 and any(
                        u.name == "tt.store" and u.operands[1] is value for u in value.users
                    ):
                        # stored, and used again: else all it was loaded from would have to be kept before the store
                        self.kept.add(value)
                        self.cost[value] = 2
                elif op.name in ("tt.make_range", "arith.constant"):
                    self.cost[value] = 0
                elif op.name == "tt.addptr":
                    self.cost[value] = sum(self.cost.get(v, 1) for v in op.operands)
                elif op.name == "tt.load":
                    self.cost[value] = 2 + self.cost.get(op.operands[0], 1)
                else:
                    self.cost[value] = 1

    def _depth(self, op: Op) -> int:
        depth, region = 0, op.parent
        while region is not None and region.parent is not None:
            depth, region = depth + (region.parent.name == "scf.for"), region.parent.parent
        return depth

    def _find_sinks(self) -> None:
        for op in reversed(self.ops):
            for value in op.results:
                self._sinks_of(value, self._depth(op))
                elementwise = op.name in ELEMENTWISE and value.type.elem != "ptr"
                if elementwise and len(self.sinks[value]) > 1 and self.cost[value] > MATERIALISE_COST:
                    self.kept.add(value)
            if op.name == "scf.for":
                for argument in op.regions[0].arguments:
                    self._sinks_of(argument, self._depth(op) + 1)

    def _sinks_of(self, value: Value, depth: int) -> None:
        sinks: set = set()
        last = -1
        for user in value.users:
            last = max(last, self.position[user])
            if user.name in LAZY or user.name == "tt.load":
                result = user.results[0]
                kept = result in self.kept or not result.type.is_tile
                sinks |= {user} if kept else self.sinks[result]
                last = last if kept else max(last, self.last_use[result])
                grows = user.name == "tt.broadcast" and result.type.shape != value.type.shape
                if grows and math.prod(value.type.shape) > 1:
                    sinks.add((user, "every row"))
            else:
                sinks.add(user)
            if self._depth(user) > depth:
                sinks.add((user, "every trip"))
        self.sinks[value] = sinks
        self.last_use[value] = last

    # --- which part of a tile is looked at

    def _find_demand(self) -> None:
        changed = True
        while changed:
            changed = False
            for op in reversed(self.ops):
                for value, demand in self._demands(op):
                    changed |= self._join(value, demand)

    def demand_of(self, value: Value) -> list:
        return self.demand.setdefault(value, [None] * len(value.type.shape))

    def _join(self, value: Value, demand: list) -> bool:
        old = self.demand_of(value)
        new = [d if o is None else o if d is None or d == o else FULL for o, d in zip(old, demand, strict=True)]
        self.demand[value] = new
        return new != old

    def _demands(self, op: Op) -> Iterator[tuple[Value, list]]:
        name = op.name
        if name == "tt.store":
            demand: list = [FULL] * len(op.operands[0].type.shape)
            if len(op.operands) == 3:
                for axis, condition in self.conditions(op.operands[2])[0]:
                    if condition.limit is not None or demand[axis] == FULL:
                        demand[axis] = condition
            for value in op.operands:
                yield value, list(demand)
        elif name == "scf.for":
            body = op.regions[0]
            for init, argument, new, result in zip(
                op.operands[3:], body.arguments[1:], body.yielded, op.results, strict=True
            ):
                yield argument, self.demand_of(result)
                yield new, self.demand_of(argument)
                yield init, self.demand_of(argument)
        elif name == "scf.if":
            for region in op.regions:
                for new, result in zip(region.yielded, op.results, strict=True):
                    yield new, self.demand_of(result)
        elif name == "scf.yield":
            return
        elif name == "tt.dot":
            rows, cols = self.demand_of(op.results[0])
            depth = self._inside(self.contracted(op))
            yield op.operands[0], [rows, depth if rows else None]
            yield op.operands[1], [depth if cols else None, cols]
            yield op.operands[2], [rows, cols]
        elif name == "tt.reduce":
            for value, result in zip(op.operands, op.results, strict=True):
                demand, axis = self.demand_of(result), op.attrs["axis"]
                yield value, [*demand[:axis], self._inside(self.reduced(op)), *demand[axis:]]
        elif name in ("tt.broadcast", "tt.expand_dims", "tt.trans"):
            shape, demand = op.operands[0].type.shape, self.demand_of(op.results[0])
            inner: list = [FULL] * len(shape)
            for axis, d in enumerate(demand):
                at = operand_axis(op, axis)
                if at is not None:
                    inner[at] = d
            yield op.operands[0], inner
        elif name in ELEMENTWISE or name in ("tt.addptr", "tt.load"):
            for value in op.operands:
                if value.type.is_tile and op.results[0].type.is_tile:
                    yield value, self.demand_of(op.results[0])
        else:
            for value in op.operands:
                yield value, [FULL] * len(value.type.shape)
