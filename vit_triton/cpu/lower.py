"""TTIR to MLIR's scf, arith and llvm dialects: loops over vectors instead of tiles.

A program of the grid becomes one call of the generated function. Tiles are not computed where they are written: an
elementwise operation is an expression, evaluated (``Lowering.at``) a vector at a time by the operation that needs it,
a sink: a store, a reduction, a product, a value carried by a loop. Sinks loop over the part of the tile that a mask
allows and that anyone will look at. Only results of sinks, and expressions that several sinks would evaluate, have
memory: a buffer in the scratch space of the thread.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vit_triton.cpu.analysis import IDENTITY, LAZY, RESHAPES, Analysis, Condition, operand_axis, walk
from vit_triton.cpu.builder import Builder, Val, mlir_type
from vit_triton.cpu.dot import Dot
from vit_triton.cpu.ttir import Function, Op, Region, Type, Unsupported, Value
from vit_triton.cpu.vmath import ELEMENTWISE, Math, declarations

TRIPLE = "x86_64-unknown-linux-gnu"
LANES = 16
ALIGN = 64
HEADER_SLOTS = 9  # of the launch block, see _worker
BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "ptr": 8}


@dataclass(frozen=True)
class Program:
    """``text`` defines ``entry(launch block)``; each thread needs ``scratch_bytes`` of memory."""

    name: str
    text: str
    scratch_bytes: int


@dataclass(frozen=True)
class Buffer:
    """A tile in memory, row-major; ``stride`` elements from row to row."""

    pointer: Val
    elem: str
    stride: int


Index = list[Val]


class Lowering(Dot):
    def __init__(self, function: Function, features: Sequence[str]) -> None:
        self.function = function
        self.b = Builder()
        self.math = Math(self.b, features)
        self.bf16_dot = "avx512_bf16" in features
        self.info = Analysis(function)
        self.scalars: dict[Value, Val] = {}
        self.buffers: dict[Value, Buffer] = {}
        self.offsets: dict[Value, Val] = {}  # how far the pointer tiles of a loop have come
        self.defined: set[Value] = set()
        self.pending: list[Value] = []  # loaded tiles that are read where they are used
        self.assumed: dict[tuple[Condition, str], Val | None] = {}  # in these loops true, or true for these lanes
        self.reduced: set[Op] = set()  # with an earlier one, in one loop
        self.scratch = Val("%scratch", "ptr")
        self.used = self.most_used = 0
        self.sink = 0

    # --- the whole function

    def program(self) -> Program:
        names = []
        for i, value in enumerate(self.function.arguments):
            if value.type.is_tile:
                raise Unsupported("a tile as an argument of a kernel")
            self.scalars[value] = Val(f"%arg{i}", value.type.elem)
            self.defined.add(value)
            names.append(f"%arg{i}: {mlir_type(value.type.elem)}")
        self.region(self.function.body)
        axes = ", ".join(f"%pid{d}: i32, %grid{d}: i32" for d in range(3))
        kernel = [
            f"llvm.func internal @kernel({', '.join([*names, axes])}, %scratch: !llvm.ptr {{llvm.noalias}}) {{",
            *self.b.regions[0].lines,
            "llvm.return",
            "}",
        ]
        lines = [*declarations(self.math.libm_used), *kernel, *_worker(self.function)]
        return Program(
            self.function.name,
            f'module attributes {{llvm.target_triple = "{TRIPLE}"}} {{\n' + "\n".join(lines) + "\n}\n",
            self.most_used,
        )

    def region(self, region: Region) -> None:
        for op in region.ops:
            self.sink += 1
            with self.b.pinned_here():
                self.op(op)
            self.defined.update(op.results)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """What is defined and allocated inside is gone outside."""
        defined, used, pending = set(self.defined), self.used, list(self.pending)
        yield
        self.defined, self.used, self.pending = defined, used, [v for v in self.pending if v in pending]

    def op(self, op: Op) -> None:
        name = op.name
        if name in ("tt.return", "scf.yield", "tt.reduce.return"):
            return
        if name in ("tt.get_program_id", "tt.get_num_programs"):
            axis = "xyz".index(op.attrs["words"][0])
            self.scalars[op.results[0]] = Val(f"%{'pid' if name == 'tt.get_program_id' else 'grid'}{axis}", "i32")
        elif name == "tt.store":
            self.store(op)
        elif name == "tt.dot":
            self.dot(op)
        elif name == "tt.reduce":
            self.reduce(op)
        elif name == "scf.for":
            self.for_loop(op)
        elif name == "scf.if":
            self.branch(op)
        elif name == "tt.load":
            if op.results[0].type.is_tile:
                self.pending.append(op.results[0])
            else:
                self.scalars[op.results[0]] = self.load(op, [], None, 0)
        elif name in ELEMENTWISE or name in RESHAPES or name in ("tt.addptr", "arith.constant", "tt.make_range"):
            result = op.results[0]
            if not result.type.is_tile:
                self.scalars[result] = self.evaluate(op, [], None, 0)
            elif result in self.info.kept and not self._stored_next(op):
                self.materialise(result)
        else:
            raise Unsupported(f"operation {name}")

    # --- expressions

    def at(self, value: Value, index: Index, lane: int | None, lanes: int) -> Val:
        """The element of a tile at ``index``, or ``lanes`` elements from it on along axis ``lane``; a scalar where all
        of them are the same."""
        if not value.type.is_tile:
            return self.scalars[value]
        if lane is not None and value.type.shape[lane] == 1:
            lane = None
        key = f"at {self.sink} {id(value)} {[v.name for v in index]} {lane} {lanes if lane is not None else 0}"
        for region in reversed(self.b.regions):
            if key in region.known:
                return region.known[key]
        if value in self.buffers:
            result = self.read_buffer(self.buffers[value], value.type, index, lane, lanes)
        elif value in self.offsets:
            start = self.at(self.info.initial(value), index, lane, lanes)
            if value.type.elem == "ptr":
                result = self.b.gep(start, self.offsets[value], value.type.pointee or "i8")
            else:
                result = self.b.add(start, self.offsets[value])
        elif value.op is None:
            raise Unsupported("a tile that is an argument")
        else:
            result = self.evaluate(value.op, index, lane, lanes)
        self.b.regions[result.level].known[key] = result
        return result

    def vector(self, value: Value, index: Index, lane: int, lanes: int) -> Val:
        return self.b.splat(self.at(value, index, lane, lanes), lanes)

    def evaluate(self, op: Op, index: Index, lane: int | None, lanes: int) -> Val:
        b, name, operands = self.b, op.name, op.operands
        if name == "arith.constant":
            return b.constant(op.attrs["value"], op.results[0].type.elem)
        if name == "tt.splat":
            return self.scalars[operands[0]]
        if name == "tt.make_range":
            start = b.convert("arith.trunci", index[0], "i32")
            first = b.add(start, b.constant(int(op.attrs["start"]), "i32"))
            return first if lane is None else b.add(first, b.iota("i32", lanes))
        if name in RESHAPES:
            inner: Index = [b.index(0)] * len(operands[0].type.shape)
            inner_lane = None
            for axis, i in enumerate(index):
                to = operand_axis(op, axis)
                if to is not None:
                    inner[to] = i
                    inner_lane = to if axis == lane else inner_lane
            return self.at(operands[0], inner, inner_lane, lanes)
        if name == "tt.load":
            return self.load(op, index, lane, lanes)
        if lane is not None and op.results[0].type.elem != "ptr" and self.info.coefficient(op.results[0], lane) == 0:
            lane = None
        if name == "arith.select" and operands[0].type.is_tile and self._holds(operands[0], index):
            return self.at(operands[1], index, lane, lanes)
        args = [self.at(v, index, lane, lanes) for v in operands]
        if name == "tt.addptr":
            return b.gep(args[0], args[1], op.results[0].type.pointee or "i8")
        if name in ELEMENTWISE:
            return self.math.apply(op, args)
        raise Unsupported(f"operation {name}")

    def load(self, op: Op, index: Index, lane: int | None, lanes: int) -> Val:
        b, elem = self.b, op.results[0].type.elem
        pointer_tile = op.operands[0]
        step = None if lane is None else self.info.coefficient(pointer_tile, lane)
        mask = None if len(op.operands) < 2 else self.mask(op.operands[1], index, lane, lanes)
        if lane is None or step == 0 and (mask is None or not mask.lanes):
            pointer = self.at(pointer_tile, index, None, 0)
            if mask is None:
                return b.read(f"llvm.load {{0}} : !llvm.ptr -> {mlir_type(elem)}", (pointer,), elem)
            other = self.other(op, index, None, 0)
            vector = self._masked_load(pointer, b.splat(mask, 1), b.splat(other, 1), elem, 1)
            return b.op(f"llvm.extractelement {{0}}[{{1}} : i64] : {vector.type}", (vector, b.index(0)), elem)
        if step == 1:
            pointer = self.at(pointer_tile, index, None, 0)
            if mask is None:
                return self.load_vector(pointer, elem, lanes)
            other = b.splat(self.other(op, index, lane, lanes), lanes)
            return self._masked_load(pointer, b.splat(mask, lanes), other, elem, lanes)
        pointers = b.splat(self.at(pointer_tile, index, lane, lanes), lanes)
        mask = b.constant(True, "i1", lanes) if mask is None else b.splat(mask, lanes)
        other = b.splat(self.other(op, index, lane, lanes), lanes)
        return self._gather(pointers, mask, other)

    def other(self, op: Op, index: Index, lane: int | None, lanes: int) -> Val:
        if len(op.operands) == 3:
            return self.at(op.operands[2], index, lane, lanes)
        return self.b.constant(0, op.results[0].type.elem)

    def load_vector(self, pointer: Val, elem: str, lanes: int) -> Val:
        stored = mlir_type("i8" if elem == "i1" else elem, lanes)
        text = f"llvm.load {{0}} {{{{alignment = {BYTES[elem]} : i64}}}} : !llvm.ptr -> {stored}"
        value = self.b.read(text, (pointer,), "i8" if elem == "i1" else elem, lanes)
        return self.b.convert("arith.trunci", value, "i1") if elem == "i1" else value

    def store_vector(self, value: Val, pointer: Val, mask: Val | None = None) -> None:
        b = self.b
        if value.elem == "i1":
            value = b.convert("arith.extui", value, "i8")
        if mask is None:
            b.effect(
                f"llvm.store {{0}}, {{1}} {{{{alignment = {BYTES[value.elem]} : i64}}}} : {value.type}, !llvm.ptr",
                (value, pointer),
            )
            return
        text = f"llvm.intr.masked.store {{0}}, {{1}}, {{2}} {{{{alignment = {BYTES[value.elem]} : i32}}}}"
        b.effect(f"{text} : {value.type}, {mask.type} into !llvm.ptr", (value, pointer, mask))

    def _masked_load(self, pointer: Val, mask: Val, other: Val, elem: str, lanes: int) -> Val:
        text = f"llvm.intr.masked.load {{0}}, {{1}}, {{2}} {{{{alignment = {BYTES[elem]} : i32}}}}"
        types = f"(!llvm.ptr, {mask.type}, {other.type}) -> {other.type}"
        return self.b.read(f"{text} : {types}", (pointer, mask, other), elem, lanes)

    def _gather(self, pointers: Val, mask: Val, other: Val) -> Val:
        text = f"llvm.intr.masked.gather {{0}}, {{1}}, {{2}} {{{{alignment = {BYTES[other.elem]} : i32}}}}"
        types = f"({pointers.type}, {mask.type}, {other.type}) -> {other.type}"
        return self.b.read(f"{text} : {types}", (pointers, mask, other), other.elem, other.lanes)

    def mask(self, mask: Value, index: Index, lane: int | None, lanes: int) -> Val | None:
        """None where the loops around make it true."""
        if not mask.type.is_tile:
            return self.scalars[mask]
        conditions, complete = self.info.conditions(mask)
        if not complete:
            return self.at(mask, index, lane, lanes)
        result: Val | None = None
        for axis, condition in conditions:
            key = (condition, index[axis].name)
            if key in self.assumed:
                part = self.assumed[key]
                if part is not None and axis != lane:
                    raise Unsupported("a mask along an axis that is not vectorised")
            else:
                part = self._condition(condition, index[axis], lanes if axis == lane else 0)
            if part is not None:
                result = part if result is None else self.b.binary("arith.andi", result, part)
        return result

    def _holds(self, mask: Value, index: Index) -> bool:
        """Whether the loops around make ``mask`` true."""
        conditions, complete = self.info.conditions(mask)
        return complete and all(self.assumed.get((c, index[a].name), mask) is None for a, c in conditions)

    def _condition(self, condition: Condition, index: Val, lanes: int) -> Val:
        if condition.limit is None:
            return self.scalars[condition.offsets]
        left = self.at(condition.offsets, [index], 0 if lanes else None, lanes)
        return self.b.compare("arith.cmpi slt", left, self._limit(condition, left.elem))

    def _limit(self, condition: Condition, elem: str) -> Val:
        limit = condition.limit
        assert limit is not None
        if isinstance(limit, int):
            return self.b.constant(limit, elem)
        return (
            self.scalars[limit]
            if not limit.type.is_tile
            else self.at(limit, [self.b.index(0)] * len(limit.type.shape), None, 0)
        )

    # --- loops of sinks

    def known(self, condition: Condition) -> bool:
        limit = condition.limit
        return condition.offsets in self.defined and (not isinstance(limit, Value) or limit in self.defined)

    def bound(self, conditions: Sequence[Condition], size: int) -> "Val | int":
        """How many of the first ``size`` indices meet all conditions."""
        result: Val | int = size
        b = self.b
        for condition in conditions:
            if condition.limit is None:
                result = b.select(self.scalars[condition.offsets], self.to_val(result), b.index(0))
                continue
            first = self.at(condition.offsets, [b.index(0)], None, 0)
            limit = self._limit(condition, first.elem)
            number = self._static_bound(condition)
            if number is not None:
                result = min(result, max(0, number)) if isinstance(result, int) else result
                if isinstance(result, int):
                    continue
            count = b.binary("arith.subi", b.to_index(limit), b.to_index(first))
            count = b.binary("arith.maxsi", count, b.index(0))
            most = b.index(result) if isinstance(result, int) else result
            result = b.binary("arith.minsi", count, most)
        return result

    def _static_bound(self, condition: Condition) -> int | None:
        op = condition.offsets.op
        start = 0
        if op is not None and op.name == "arith.addi":
            constants = [self.info.constant(v) for v in op.operands]
            ranges = [v.op for v in op.operands if v.op is not None and v.op.name == "tt.make_range"]
            start_of = [c for c in constants if c is not None]
            if len(ranges) != 1 or len(start_of) != 1:
                return None
            op, start = ranges[0], start_of[0]
        if op is None or op.name != "tt.make_range" or not isinstance(condition.limit, int):
            return None
        return condition.limit - start - int(op.attrs["start"])

    def to_val(self, bound: "Val | int") -> Val:
        return self.b.index(bound) if isinstance(bound, int) else bound

    def wanted(self, value: Value) -> list[list[Condition]]:
        """For each axis the conditions on the indices that anyone looks at."""
        return [[d] if isinstance(d, Condition) and self.known(d) else [] for d in self.info.demand_of(value)]

    def tile_loops(
        self,
        shape: Sequence[int],
        conditions: Sequence[Sequence[Condition]],
        lane: int,
        body: Callable[[Index, int, Val | None], None],
    ) -> None:
        """Call ``body(index, lanes, mask)`` for every vector along ``lane``; only a last, partial one has a mask."""
        b = self.b
        bounds = [self.bound(c, n) for c, n in zip(conditions, shape, strict=True)]
        lanes = min(LANES, shape[lane])
        index: Index = [b.index(0)] * len(shape)

        def assume(axis: int, value: Val, mask: Val | None) -> list[tuple[Condition, str]]:
            keys = [(c, value.name) for c in conditions[axis]]
            for key in keys:
                self.assumed[key] = mask
            return keys

        def nest(axes: Sequence[int]) -> None:
            if not axes:
                vectors()
                return
            axis = axes[0]
            if bounds[axis] == 1 and shape[axis] == 1:
                self._forget(assume(axis, index[axis], None), lambda: nest(axes[1:]))
                return
            with b.loop(b.index(0), self.to_val(bounds[axis]), b.index(1)) as loop:
                index[axis] = loop.index
                self._forget(assume(axis, loop.index, None), lambda: nest(axes[1:]))

        def vectors() -> None:
            bound = bounds[lane]
            if isinstance(bound, int):
                full: Val | int = bound // lanes * lanes
            else:
                full = b.binary("arith.andi", bound, b.index(-lanes))
            if full == lanes:
                index[lane] = b.index(0)
                self._forget(assume(lane, index[lane], None), lambda: body(list(index), lanes, None))
            elif full != 0:
                with b.loop(b.index(0), self.to_val(full), b.index(lanes)) as loop:
                    index[lane] = loop.index
                    self._forget(assume(lane, loop.index, None), lambda: body(list(index), lanes, None))
            if isinstance(bound, int) and bound == full:
                return
            rest = b.compare("arith.cmpi slt", self.to_val(full), self.to_val(bound))
            with b.when(rest), b.pinned_here():
                index[lane] = self.to_val(full)
                mask = self._lane_mask(self.to_val(full), self.to_val(bound), lanes)
                self._forget(assume(lane, index[lane], mask), lambda: body(list(index), lanes, mask))

        nest([axis for axis in range(len(shape)) if axis != lane])

    def _forget(self, keys: list[tuple[Condition, str]], body: Callable[[], None]) -> None:
        body()
        for key in keys:
            self.assumed.pop(key, None)

    def _lane_mask(self, start: Val, bound: Val, lanes: int) -> Val:
        b = self.b
        rest = b.convert("arith.trunci", b.binary("arith.subi", bound, start), "i32")
        return b.compare("arith.cmpi slt", b.iota("i32", lanes), rest)

    def best_lane(self, value: Value) -> int:
        """The axis along which most loads of the expression are contiguous; the last if that is no matter."""
        votes = [0] * len(value.type.shape)
        self._vote(value, list(range(len(votes))), votes, set())
        best = len(votes) - 1
        for axis, count in enumerate(votes):
            if count > votes[best] and value.type.shape[axis] > 1:
                best = axis
        return best

    def _vote(self, value: Value, axes: list[int | None], votes: list[int], seen: set) -> None:
        if (value, tuple(axes)) in seen or not value.type.is_tile:
            return
        seen.add((value, tuple(axes)))
        op = value.op
        contiguous = None
        if value in self.buffers:
            contiguous = len(value.type.shape) - 1
        elif op is None:
            return
        elif op.name == "tt.load":
            steps = [self.info.coefficient(op.operands[0], a) for a in range(len(value.type.shape))]
            contiguous = steps.index(1) if 1 in steps else None
        elif op.name in RESHAPES:
            inner: list[int | None] = [None] * len(op.operands[0].type.shape)
            for axis, outer in enumerate(axes):
                to = operand_axis(op, axis)
                if to is not None:
                    inner[to] = outer
            return self._vote(op.operands[0], inner, votes, seen)
        elif op.name in ELEMENTWISE:
            for operand in op.operands:
                self._vote(operand, axes, votes, seen)
        if contiguous is not None and axes[contiguous] is not None:
            votes[axes[contiguous]] += 1  # type: ignore[index]

    # --- buffers

    def allocate(self, type_: Type) -> Buffer:
        columns = type_.shape[-1]
        stride = columns
        if len(type_.shape) > 1 and columns * BYTES[type_.elem] >= 1024:
            stride += ALIGN // BYTES[type_.elem]  # rows a power of two apart fall into the same cache sets
        rows = math.prod(type_.shape[:-1])
        return Buffer(self.reserve(rows * stride * BYTES[type_.elem]), type_.elem, stride)

    def reserve(self, size: int) -> Val:
        start = self.used
        self.used = -(-(start + size + ALIGN) // ALIGN) * ALIGN
        self.most_used = max(self.most_used, self.used)
        return self.b.gep(self.scratch, self.b.index(start), "i8")

    def address(self, buffer: Buffer, shape: Sequence[int], index: Index) -> Val:
        b, pointer, stride = self.b, buffer.pointer, buffer.stride
        for axis in range(len(index) - 2, -1, -1):
            pointer = b.gep(pointer, b.mul(index[axis], b.index(stride)), buffer.elem)
            stride *= shape[axis]
        return b.gep(pointer, index[-1], buffer.elem)

    def read_buffer(self, buffer: Buffer, type_: Type, index: Index, lane: int | None, lanes: int) -> Val:
        pointer = self.address(buffer, type_.shape, index)
        if lane is None:
            elem = "i8" if buffer.elem == "i1" else buffer.elem
            value = self.b.read(f"llvm.load {{0}} : !llvm.ptr -> {mlir_type(elem)}", (pointer,), elem)
            return self.b.convert("arith.trunci", value, "i1") if buffer.elem == "i1" else value
        if lane == len(type_.shape) - 1:
            return self.load_vector(pointer, buffer.elem, lanes)
        if buffer.elem == "i1":
            raise Unsupported("a transposed mask that is kept in memory")
        steps = self.b.binary("arith.muli", self.b.iota("i64", lanes), self.b.index(buffer.stride))
        pointers = self.b.gep(pointer, steps, buffer.elem)
        return self._gather(pointers, self.b.constant(True, "i1", lanes), self.b.constant(0, buffer.elem, lanes))

    def materialise(self, value: Value) -> None:
        """Evaluate a tile into a buffer of its own."""
        if value in self.buffers:
            return
        buffer = self.allocate(value.type)
        self.write(value, buffer)
        self.buffers[value] = buffer
        if value in self.pending:
            self.pending.remove(value)

    def write(self, value: Value, buffer: Buffer) -> None:
        shape = value.type.shape

        def body(index: Index, lanes: int, mask: Val | None) -> None:
            # lanes past the bound are written too: a row has room for them, and nobody looks
            self.store_vector(self.vector(value, index, len(shape) - 1, lanes), self.address(buffer, shape, index))

        with self.b.pinned_here():
            self.sink += 1
            self.tile_loops(shape, self.wanted(value), len(shape) - 1, body)
        self.sink += 1

    def flush(self, position: int) -> None:
        """Read what was loaded, and is used after ``position``, before something is stored."""
        for value in list(self.pending):
            if self.info.last_use[value] > position and value in self.pending:
                self.materialise(value)

    # --- sinks

    def _stored_next(self, op: Op) -> bool:
        """Whether the next thing done is to store the result, all of it that is wanted: it is kept on the way."""
        assert op.parent is not None
        position, value = op.parent.ops.index(op), op.results[0]
        sink = next(o for o in op.parent.ops[position + 1 :] if o.name not in LAZY and o.name != "tt.load")
        if sink.name != "tt.store" or sink.operands[1] is not value or len(sink.operands) < 3:
            return False
        last = len(value.type.shape) - 1
        conditions, complete = self.info.conditions(sink.operands[2])
        stored = [[c for a, c in conditions if a == axis] for axis in range(last + 1)]
        return complete and stored == self.wanted(value) and self.info.coefficient(sink.operands[0], last) == 1

    def store(self, op: Op) -> None:
        position = self.info.position[op]
        self.flush(position)
        pointers, value = op.operands[:2]
        mask = op.operands[2] if len(op.operands) == 3 else None
        b, shape = self.b, pointers.type.shape
        if not pointers.type.is_tile:
            pointer, scalar = self.scalars[pointers], self.scalars[value]
            store = f"llvm.store {{0}}, {{1}} : {scalar.type}, !llvm.ptr"
            if mask is None:
                b.effect(store, (scalar, pointer))
            else:
                with b.when(self.scalars[mask]):
                    b.effect(store, (scalar, pointer))
            return
        conditions, complete = ([], True) if mask is None else self.info.conditions(mask)
        by_axis = [[c for a, c in conditions if a == axis] for axis in range(len(shape))]
        steps = [self.info.coefficient(pointers, axis) for axis in range(len(shape))]
        lane = len(shape) - 1
        if steps[lane] != 1 and 1 in steps:
            lane = steps.index(1)
        keep = value in self.info.kept and value not in self.buffers
        kept = self.allocate(value.type) if keep else None

        def body(index: Index, lanes: int, tail: Val | None) -> None:
            vector = self.vector(value, index, lane, lanes)
            if kept is not None:
                self.store_vector(vector, self.address(kept, shape, index))
            where = tail
            if not complete:
                assert mask is not None
                rest = b.splat(self.at(mask, index, lane, lanes), lanes)
                where = rest if where is None else b.binary("arith.andi", where, rest)
            if steps[lane] == 1:
                self.store_vector(vector, self.at(pointers, index, None, 0), where)
                return
            where = b.constant(True, "i1", lanes) if where is None else where
            if vector.elem == "i1":
                vector = b.convert("arith.extui", vector, "i8")
            targets = self.b.splat(self.at(pointers, index, lane, lanes), lanes)
            text = f"llvm.intr.masked.scatter {{0}}, {{1}}, {{2}} {{{{alignment = {BYTES[vector.elem]} : i32}}}}"
            b.effect(f"{text} : {vector.type}, {where.type} into {targets.type}", (vector, targets, where))

        self.tile_loops(shape, by_axis, lane, body)
        if kept is not None:
            self.buffers[value] = kept

    def reduce(self, op: Op) -> None:
        """A reduction, and those after it over the same tiles' axis that can be had in the same loop."""
        if op in self.reduced:
            return
        group = [op, *self._alike(op)]
        self.reduced.update(group)
        axis, shape = op.attrs["axis"], op.operands[0].type.shape
        limits, lane = self._reduce_limits(op), self.best_lane(op.operands[0])
        folds = [self._fold(each) for each in group]
        totals_before = [self._running_total(each) if lane != axis else None for each in group]
        buffers = [
            self.buffers[before]
            if before
            else self.allocate(each.results[0].type)
            if each.results[0].type.is_tile
            else None
            for each, before in zip(group, totals_before, strict=True)
        ]
        b = self.b
        rest = [a for a in range(len(shape)) if a != axis]
        if lane == axis:
            lanes = min(LANES, shape[axis])

            def row(index: Index) -> None:
                totals = self._reduce_row(group, folds, index, lanes, limits[axis])
                for each, (fold, _), buffer, total in zip(group, folds, buffers, totals, strict=True):
                    while total.lanes > 1:
                        half = total.lanes // 2
                        low = b.shuffle(total, total, range(half))
                        total = fold(low, b.shuffle(total, total, range(half, 2 * half)))
                    total = b.op(
                        f"llvm.extractelement {{0}}[{{1}} : i64] : {total.type}", (total, b.index(0)), total.elem
                    )
                    if buffer is None:
                        self.scalars[each.results[0]] = total
                    else:
                        target = self.address(buffer, each.results[0].type.shape, [index[a] for a in rest])
                        b.effect(f"llvm.store {{0}}, {{1}} : {total.type}, !llvm.ptr", (total, target))

            self._rows(shape, limits, axis, row)
        else:
            # row after row, so that what depends on the row alone is computed once for it
            outer = list(shape)
            outer[axis] = 1
            outer_limits = [[] if a == axis else limits[a] for a in range(len(shape))]

            def place(each: Op, buffer: Buffer | None, index: Index) -> Val:
                assert buffer is not None
                return self.address(buffer, each.results[0].type.shape, [index[a] for a in rest])

            def begin(index: Index, lanes: int, tail: Val | None) -> None:
                for each, (_, start), buffer, before in zip(group, folds, buffers, totals_before, strict=True):
                    if before is None:
                        self.store_vector(b.splat(start, lanes), place(each, buffer, index))

            def add_row(index: Index, lanes: int, tail: Val | None) -> None:
                at = list(index)
                at[axis] = row_index
                for each, (fold, _), buffer in zip(group, folds, buffers, strict=True):
                    target = place(each, buffer, index)
                    vector = self.vector(each.operands[0], at, lane, lanes)
                    self.store_vector(fold(self.load_vector(target, vector.elem, lanes), vector), target)

            self.tile_loops(outer, outer_limits, lane, begin)
            high = self.to_val(self.bound(limits[axis], shape[axis]))
            with b.loop(b.index(0), high, b.index(1)) as loop, b.pinned_here():
                row_index = loop.index
                keys = [(c, loop.index.name) for c in limits[axis]]
                self.assumed.update(dict.fromkeys(keys))
                self._forget(keys, lambda: self.tile_loops(outer, outer_limits, lane, add_row))
        self.buffers |= {
            each.results[0]: buffer for each, buffer in zip(group, buffers, strict=True) if buffer is not None
        }

    def _running_total(self, op: Op) -> Value | None:
        """The value carried by the loop around that this reduction is added to, and nothing else happens to."""
        users = op.results[0].users
        if len(users) != 1 or users[0].name != op.regions[0].ops[0].name or users[0].parent is not op.parent:
            return None
        total, region = users[0].results[0], op.parent
        assert region is not None
        before = next(v for v in users[0].operands if v is not op.results[0])
        carried = before in self.buffers and before.users == [users[0]] and before in region.arguments
        if not carried or before.type != total.type:
            return None
        self.buffers[total] = self.buffers[before]
        return before

    def _fold(self, op: Op) -> tuple[Callable[[Val, Val], Val], Val]:
        """How a tt.reduce joins two values, and what it starts from."""
        region, elem = op.regions[0], op.operands[0].type.elem
        if len(op.operands) > 1:
            raise Unsupported("tt.reduce of several tiles at once")
        if region.ops[-1].operands[0] is not region.ops[-2].results[0] or len(region.ops) != 2:
            raise Unsupported("tt.reduce with more than one operation")
        name, b = region.ops[0].name, self.b
        identity = IDENTITY.get(name)
        if identity is None or elem == "bf16":
            raise Unsupported(f"tt.reduce of {elem} with {name}")

        def fold(a: Val, new: Val) -> Val:
            if name in ("arith.maxnumf", "arith.minnumf"):
                # the accumulator is never NaN: a comparison that a NaN fails does what maxnumf does, in one instruction
                order = "ogt" if name == "arith.maxnumf" else "olt"
                return b.select(b.compare(f"arith.cmpf {order}", new, a), new, a)
            return b.binary(name, a, new)

        return fold, b.constant(identity, elem)

    def _reduce_limits(self, op: Op) -> list[list[Condition]]:
        limits = self.wanted(op.operands[0])
        limits[op.attrs["axis"]] = [c for c in self.info.reduced(op) if self.known(c)]
        return limits

    def _alike(self, op: Op) -> list[Op]:
        """Reductions further on that run over the same elements and need nothing that is computed in between."""
        assert op.parent is not None
        found = []
        for other in op.parent.ops[op.parent.ops.index(op) + 1 :]:
            if other.name in ("tt.store", "scf.for", "scf.if", "tt.dot"):
                break
            if (
                other.name == "tt.reduce"
                and len(other.operands) == 1
                and other.attrs["axis"] == op.attrs["axis"]
                and other.operands[0].type.shape == op.operands[0].type.shape
                and self._evaluable(other.operands[0])
                and self._reduce_limits(other) == self._reduce_limits(op)
                and self.best_lane(other.operands[0]) == self.best_lane(op.operands[0])
            ):
                found.append(other)
        return found

    def _evaluable(self, value: Value) -> bool:
        """Whether the expression can be computed here, though it is written further on."""
        if value in self.defined or value in self.buffers:
            return True
        op = value.op
        lazy = op is not None and value.type.is_tile and (op.name in LAZY or op.name == "tt.load")
        return lazy and value not in self.info.kept and all(map(self._evaluable, op.operands))  # type: ignore[union-attr]

    def _rows(
        self, shape: Sequence[int], limits: list[list[Condition]], axis: int, row: Callable[[Index], None]
    ) -> None:
        b = self.b
        index: Index = [b.index(0)] * len(shape)

        def nest(axes: list[int]) -> None:
            if not axes:
                row(list(index))
                return
            bound = self.bound(limits[axes[0]], shape[axes[0]])
            if shape[axes[0]] == 1 and bound == 1:
                nest(axes[1:])
                return
            with b.loop(b.index(0), self.to_val(bound), b.index(1)) as loop:
                index[axes[0]] = loop.index
                keys = [(c, loop.index.name) for c in limits[axes[0]]]
                for key in keys:
                    self.assumed[key] = None
                self._forget(keys, lambda: nest(axes[1:]))

        nest([a for a in range(len(shape)) if a != axis])

    def _reduce_row(
        self,
        group: Sequence[Op],
        folds: Sequence[tuple[Callable[[Val, Val], Val], Val]],
        index: Index,
        lanes: int,
        limits: Sequence[Condition],
    ) -> list[Val]:
        """One row along the axis, in four accumulators that do not wait for each other, to a vector per reduction."""
        b, axis, size = self.b, group[0].attrs["axis"], group[0].operands[0].type.shape[group[0].attrs["axis"]]
        bound = self.bound(limits, size)
        ways = 4 if size >= 8 * lanes else 1
        starts = [b.splat(start, lanes) for _, start in folds]

        def accumulate(totals: Sequence[Val], at: Val, mask: Val | None) -> list[Val]:
            here = list(index)
            here[axis] = at
            keys = [(c, at.name) for c in limits]
            for key in keys:
                self.assumed[key] = mask
            vectors = [self.vector(op.operands[0], here, axis, lanes) for op in group]
            for key in keys:
                self.assumed.pop(key, None)
            if mask is not None:
                vectors = [b.select(mask, v, start) for v, start in zip(vectors, starts, strict=True)]
            return [fold(total, v) for (fold, _), total, v in zip(folds, totals, vectors, strict=True)]

        n = len(group)
        full = self.to_val(bound) if isinstance(bound, Val) else b.index(bound)
        whole = b.binary("arith.andi", full, b.index(-lanes))
        blocks = b.binary("arith.divui", full, b.index(ways * lanes))
        blocks = b.mul(blocks, b.index(ways * lanes))
        accumulators = starts * ways
        if ways > 1:
            with b.loop(b.index(0), blocks, b.index(ways * lanes), accumulators) as loop:
                for way in range(ways):
                    at = b.add(loop.index, b.index(way * lanes))
                    loop.next += accumulate(loop.carried[way * n : (way + 1) * n], at, None)
            accumulators = loop.results
        with b.loop(blocks if ways > 1 else b.index(0), whole, b.index(lanes), accumulators[:n]) as loop:
            loop.next = accumulate(loop.carried, loop.index, None)
        accumulators = [*loop.results, *accumulators[n:]]
        if isinstance(bound, Val) or bound % lanes:
            # a loop of at most one trip
            with b.loop(whole, full, b.index(lanes), accumulators[:n]) as loop:
                loop.next = accumulate(loop.carried, loop.index, self._lane_mask(loop.index, full, lanes))
            accumulators = [*loop.results, *accumulators[n:]]
        while len(accumulators) > n:
            half = len(accumulators) // 2
            accumulators = [folds[i % n][0](accumulators[i], accumulators[i + half]) for i in range(half)]
        return accumulators

    # --- control flow

    def for_loop(self, op: Op) -> None:
        b, body = self.b, op.regions[0]
        if self._stores(op):
            self.flush(self.info.position[op])
        arguments, news = body.arguments[1:], body.yielded
        carried: list[Val] = []
        slots: list[tuple[str, Value, Value]] = []
        for argument, init, new in zip(arguments, op.operands[3:], news, strict=True):
            if not argument.type.is_tile:
                slots.append(("scalar", argument, new))
                carried.append(self.scalars[init])
            elif argument in self.info.inductions:
                step = self.info.inductions[argument]
                slots.append(("offset", argument, step.operands[1]))
                carried.append(b.constant(0, step.operands[1].type.elem))
            else:
                slots.append(("tile", argument, new))
                self.buffers[argument] = self._own_buffer(init, op)
        low, high, step_val = (self.scalars[v] for v in op.operands[:3])
        with b.loop(low, high, step_val, carried) as loop, self.scope():
            self.scalars[body.arguments[0]] = loop.index
            values = iter(loop.carried)
            for kind, argument, _ in slots:
                if kind == "scalar":
                    self.scalars[argument] = next(values)
                elif kind == "offset":
                    self.offsets[argument] = next(values)
            self.defined.update(body.arguments)
            self.region(body)
            with b.pinned_here():
                self.sink += 1
                self._carry([(a, new) for kind, a, new in slots if kind == "tile"])
                for kind, argument, new in slots:
                    if kind == "scalar":
                        loop.next.append(self.scalars[new])
                    elif kind == "offset":
                        zeros = [b.index(0)] * len(new.type.shape)
                        loop.next.append(b.add(self.offsets[argument], self.at(new, zeros, None, 0)))
        results = iter(loop.results)
        for (kind, argument, _), result in zip(slots, op.results, strict=True):
            if kind == "scalar":
                self.scalars[result] = next(results)
            elif kind == "tile":
                self.buffers[result] = self.buffers[argument]
            else:
                self.offsets[result] = next(results)
                if result.users:
                    raise Unsupported("a pointer tile that a loop has advanced, used after it")

    def _stores(self, op: Op) -> bool:
        return any(inner.name == "tt.store" for region in op.regions for inner in walk(region))

    def _own_buffer(self, init: Value, user: Op) -> Buffer:
        """A buffer that holds ``init`` and may be overwritten."""
        if init in self.buffers and self.info.sinks[init] == {user}:
            return self.buffers[init]
        buffer = self.allocate(init.type)
        self.write(init, buffer)
        return buffer

    def _carry(self, pairs: list[tuple[Value, Value]]) -> None:
        """Move the new values of a loop's tiles into the buffers of the old ones."""
        targets = {argument: self.buffers[argument] for argument, _ in pairs}
        copies = []
        for argument, new in pairs:
            target = targets[argument]
            if self.buffers.get(new) == target:
                continue
            reads = self._buffers_read(new)
            others = reads & {*targets.values()} - {target}
            if others or target in reads and not self._in_place(new, target, len(new.type.shape)):
                saved = self.allocate(new.type)  # before any of the old values is gone
                self.write(new, saved)
                self.buffers[new] = saved
            copies.append((new, target))
        for new, target in copies:
            self.write(new, target)
        self.buffers |= targets

    def _buffers_read(self, value: Value) -> set[Buffer]:
        if value in self.buffers:
            return {self.buffers[value]}
        if value.op is None or not value.type.is_tile:
            return set()
        return {buffer for v in value.op.operands for buffer in self._buffers_read(v)}

    def _in_place(self, value: Value, target: Buffer, rank: int) -> bool:
        """Whether the expression reads ``target`` only at the element that is being computed."""
        if value in self.buffers:
            return self.buffers[value] != target or len(value.type.shape) == rank
        if value.op is None:
            return True
        if value.op.name in RESHAPES:
            return target not in self._buffers_read(value)
        return all(self._in_place(v, target, rank) for v in value.op.operands)

    def branch(self, op: Op) -> None:
        b = self.b
        if self._stores(op):
            self.flush(self.info.position[op])
        slots = {}
        for result in op.results:
            if result.type.is_tile:
                if result.type.elem == "ptr":
                    raise Unsupported("a pointer tile that scf.if gives")
                slots[result] = self.allocate(result.type)
            else:
                slots[result] = Buffer(self.reserve(ALIGN), result.type.elem, 1)
        condition = self.scalars[op.operands[0]]
        conditions = [condition, b.binary("arith.xori", condition, b.constant(True, "i1"))]
        for region, when in zip(op.regions, conditions, strict=False):
            with b.when(when), self.scope():
                self.region(region)
                with b.pinned_here():
                    for result, value in zip(op.results, region.yielded, strict=True):
                        if result.type.is_tile:
                            self.write(value, slots[result])
                        else:
                            scalar, pointer = self.scalars[value], slots[result].pointer
                            b.effect(f"llvm.store {{0}}, {{1}} : {scalar.type}, !llvm.ptr", (scalar, pointer))
        for result, buffer in slots.items():
            if result.type.is_tile:
                self.buffers[result] = buffer
            else:
                text = f"llvm.load {{0}} : !llvm.ptr -> {mlir_type(buffer.elem)}"
                self.scalars[result] = b.read(text, (buffer.pointer,), buffer.elem)


def _worker(function: Function) -> list[str]:
    """``entry``: what every thread runs. Threads take chunks of programs from a shared counter.

    The launch block is 64-bit slots: 0 the next chunk, 1 the next thread number, 2 programs, 3 chunk length, 4 chunks,
    5 and 6 the grid's first two sizes, 7 scratch memory, 8 its size per thread, then the arguments.
    """
    lines = ["llvm.func @entry(%block: !llvm.ptr) {"]
    lines += ["%one = llvm.mlir.constant(1 : i64) : i64", "%zero = llvm.mlir.constant(0 : i64) : i64"]

    def slot(name: str, number: int, type_: str) -> None:
        lines.append(f"%at_{name} = llvm.getelementptr %block[{number}] : (!llvm.ptr) -> !llvm.ptr, i64")
        if type_ == "i1":
            lines.append(f"%byte_{name} = llvm.load %at_{name} : !llvm.ptr -> i8")
            lines.append(f"%{name} = arith.trunci %byte_{name} : i8 to i1")
        elif type_:
            lines.append(f"%{name} = llvm.load %at_{name} : !llvm.ptr -> {type_}")

    slot("next", 0, "")
    slot("threads", 1, "")
    for number, name in enumerate(("total", "chunk", "chunks", "x", "y"), 2):
        slot(name, number, "i64")
    slot("memory", 7, "!llvm.ptr")
    slot("share", 8, "i64")
    types = [mlir_type(v.type.elem) for v in function.arguments]
    for i, type_ in enumerate(types):
        slot(f"a{i}", HEADER_SLOTS + i, type_)
    args = "".join(f"%a{i}, " for i in range(len(types)))
    signature = "".join(f"{t}, " for t in types) + "i32, " * 6 + "!llvm.ptr"
    lines += [
        "%number = llvm.atomicrmw add %at_threads, %one monotonic : !llvm.ptr, i64",
        "%shift = arith.muli %number, %share : i64",
        "%scratch = llvm.getelementptr %memory[%shift] : (!llvm.ptr, i64) -> !llvm.ptr, i8",
        "%xy = arith.muli %x, %y : i64",
        "%depth = arith.divui %total, %xy : i64",
        "%x32 = arith.trunci %x : i64 to i32",
        "%y32 = arith.trunci %y : i64 to i32",
        "%z32 = arith.trunci %depth : i64 to i32",
        "scf.for %c = %zero to %chunks step %one : i64 {",
        "%start = llvm.atomicrmw add %at_next, %chunk monotonic : !llvm.ptr, i64",
        "%stop_ = arith.addi %start, %chunk : i64",
        "%stop = arith.minsi %stop_, %total : i64",
        "scf.for %p = %start to %stop step %one : i64 {",
        "%px = arith.remui %p, %x : i64",
        "%pr = arith.divui %p, %x : i64",
        "%py = arith.remui %pr, %y : i64",
        "%pz = arith.divui %pr, %y : i64",
        "%px32 = arith.trunci %px : i64 to i32",
        "%py32 = arith.trunci %py : i64 to i32",
        "%pz32 = arith.trunci %pz : i64 to i32",
        f"llvm.call @kernel({args}%px32, %x32, %py32, %y32, %pz32, %z32, %scratch) : ({signature}) -> ()",
        "}",
        "}",
        "llvm.return",
        "}",
    ]
    return lines


def lower(function: Function, features: Sequence[str]) -> Program:
    """The MLIR module of a kernel.

    Raises:
        Unsupported: naming the operation, type or form that is not known.
    """
    return Lowering(function, features).program()
