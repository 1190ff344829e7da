"""tt.dot: blocks of 8 x 32 results in registers, B packed into panels of 32 columns, A read where it lies.

    for each panel of B                     packed once, 4 bytes wide: float32, or pairs of bfloat16 along K;
                                            or read where it lies, if it is loaded from memory laid out so
        for each 8 rows of A
            for each k                      2 vectors of B, 8 elements of A, 16 multiply-adds

bfloat16 takes vdpbf16ps where the CPU has it; elsewhere it is widened to float32 while it is packed, as float16 is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vit_triton.cpu.analysis import Condition
from vit_triton.cpu.builder import Builder, Val, mlir_type
from vit_triton.cpu.ttir import Op, Type, Unsupported, Value

ROWS = 8
LANES = 16
PANEL = 2 * LANES  # columns


@dataclass
class Rows:
    """Where the words of A lie: ``row(i)`` is the address of row i's first, ``step`` words are from one to the next. A
    word is a float32, or two bfloat16 that follow each other along K."""

    row: Callable[[Val], Val]
    step: Val


class Dot:
    """The part of the lowering that knows tt.dot."""

    if TYPE_CHECKING:
        b: Builder
        bf16_dot: bool
        used: int
        sink: int

        def __getattr__(self, name: str) -> Any: ...

    def dot(self, op: Op) -> None:
        a, bt, c = op.operands[:3]
        (rows, depth), cols = a.type.shape, bt.type.shape[1]
        if a.type.elem not in ("f32", "f16", "bf16") or bt.type.elem != a.type.elem or c.type.elem != "f32":
            raise Unsupported(f"tt.dot of {a.type.elem} and {bt.type.elem} into {c.type.elem}")
        pairs = a.type.elem == "bf16" and self.bf16_dot
        with self.scope():
            target, fresh = self._accumulator(op)
            kept = self.used
            row_limits, col_limits = self.wanted(op.results[0])
            depth_limits = [c for c in self.info.contracted(op) if self.known(c)]
            with self.b.pinned_here():
                self.sink += 1
                a_rows = self._a_rows(a, row_limits, depth_limits, pairs)
                m = self.to_val(self.bound(row_limits, rows))
                n = self.to_val(self.bound(col_limits, cols))
                k = self.to_val(self.bound(depth_limits, depth))
                width = min(PANEL, cols)
                lying = self._lying_panel(bt, depth_limits, pairs)
                panel = lying or self.reserve(max(depth, 32) * width * (2 if pairs else 4) + 4 * width)
                b = self.b
                with b.loop(b.index(0), n, b.index(width)) as columns:
                    with b.pinned_here():
                        if lying is None:
                            self._pack(bt, columns.index, width, k, panel, pairs, col_limits, n)
                        with b.loop(b.index(0), m, b.index(min(ROWS, rows))) as block, b.pinned_here():
                            self._block(
                                a_rows,
                                block.index,
                                m,
                                min(ROWS, rows),
                                k,
                                panel,
                                width,
                                target,
                                columns.index,
                                fresh,
                                pairs,
                            )
            self.sink += 1
        self.used = max(self.used, kept)
        self.buffers[op.results[0]] = target

    def _accumulator(self, op: Op) -> tuple[Any, bool]:
        """Where the result goes, and whether the product is all of it; else the addend is there already."""
        c = op.operands[2]
        if self.info.uniform_number(c) == 0:
            return self.allocate(c.type), True
        for value in self._leaves(c):
            buffer = self.buffers[value]
            if value.type == c.type and self.info.sinks[value] == {op} and self._in_place(c, buffer, 2):
                if value is not c:
                    self.write(c, buffer)
                return buffer, False
        buffer = self.allocate(c.type)
        self.write(c, buffer)
        return buffer, False

    def _leaves(self, value: Value) -> list[Value]:
        if value in self.buffers:
            return [value]
        if value.op is None or not value.type.is_tile:
            return []
        return [leaf for v in value.op.operands for leaf in self._leaves(v)]

    # --- A

    def _a_rows(self, a: Value, row_limits: list[Condition], depth_limits: list[Condition], pairs: bool) -> Rows:
        b = self.b
        wide = "bf16" if pairs else "f32"
        source, transposed = a, False
        while source.op is not None and source.op.name == "tt.trans" and source not in self.buffers:
            source, transposed = source.op.operands[0], not transposed
        if source.type.elem == wide and source in self.buffers and not (transposed and pairs):
            buffer = self.buffers[source]
            at = (lambda i: [b.index(0), i]) if transposed else (lambda i: [i, b.index(0)])
            step = b.index(buffer.stride if transposed else 1)
            return Rows(lambda i: self.address(buffer, source.type.shape, at(i)), step)
        if (
            source.type.elem == wide
            and source not in self.buffers
            and self._lies_in_rows(source, transposed, row_limits, depth_limits)
        ):
            assert source.op is not None
            pointers = source.op.operands[0]
            at = (lambda i: [b.index(0), i]) if transposed else (lambda i: [i, b.index(0)])
            return Rows(lambda i: self.at(pointers, at(i), None, 0), b.index(1))
        if self.best_lane(a) == 0 and a.type.shape[0] >= LANES:
            return self._pack_a(a, row_limits, depth_limits, pairs)
        buffer = self.allocate(Type(a.type.shape, wide))
        self._write_a(a, buffer, row_limits, depth_limits)
        return Rows(lambda i: self.address(buffer, a.type.shape, [i, b.index(0)]), b.index(1))

    def _lies_in_rows(
        self, source: Value, transposed: bool, row_limits: list[Condition], depth_limits: list[Condition]
    ) -> bool:
        """Whether A is loaded from where its rows lie whole, and nothing that is masked would be read."""
        op, k_axis = source.op, 0 if transposed else 1
        if op is None or op.name != "tt.load" or self.info.coefficient(op.operands[0], k_axis, whole=True) != 1:
            return False
        allowed = {1 - k_axis: row_limits, k_axis: depth_limits}
        conditions, complete = self.info.conditions(op.operands[1]) if len(op.operands) > 1 else ([], True)
        return complete and all(c in allowed[axis] for axis, c in conditions)

    def _write_a(self, a: Value, buffer: Any, row_limits: list[Condition], depth_limits: list[Condition]) -> None:
        """Evaluate A into rows, along K."""
        b = self.b

        def body(index: list[Val], lanes: int, mask: Val | None) -> None:
            vector = self.vector(a, index, 1, lanes)
            vector = vector if vector.elem == buffer.elem else b.convert("arith.extf", vector, buffer.elem)
            if mask is not None:
                vector = b.select(mask, vector, b.constant(0.0, buffer.elem, lanes))
            self.store_vector(vector, self.address(buffer, a.type.shape, index))

        self.tile_loops(a.type.shape, [row_limits, depth_limits], 1, body)

    def _pack_a(self, a: Value, row_limits: list[Condition], depth_limits: list[Condition], pairs: bool) -> Rows:
        """A lies transposed: keep it so, a word (a float32, or two bfloat16 along K) of every row side by side."""
        b = self.b
        rows, depth = a.type.shape
        step = 2 if pairs else 1
        stride = b.index(rows + LANES)  # rows a power of two apart fall into the same cache sets
        base = self.reserve((depth // step or 1) * (rows + LANES) * 4)
        k = self.to_val(self.bound(depth_limits, depth))
        with b.loop(b.index(0), k, b.index(step)) as loop:
            start = b.mul(b.binary("arith.divui", loop.index, b.index(step)), stride)
            for condition in depth_limits:
                self.assumed[(condition, loop.index.name)] = None

            def body(index: list[Val], lanes: int, mask: Val | None) -> None:
                vector = self.vector(a, [index[0], loop.index], 0, lanes)
                if pairs:
                    other = self.vector(a, [index[0], b.add(loop.index, b.index(1))], 0, lanes)
                    vector = b.shuffle(vector, other, [i // 2 + i % 2 * lanes for i in range(2 * lanes)])
                elif vector.elem != "f32":
                    vector = b.convert("arith.extf", vector, "f32")
                self.store_vector(vector, b.gep(base, b.add(start, index[0]), "f32"))

            self.tile_loops([rows], [row_limits], 0, body)
            for condition in depth_limits:
                self.assumed.pop((condition, loop.index.name), None)
        return Rows(lambda i: b.gep(base, i, "f32"), stride)

    # --- B

    def _lying_panel(self, b_: Value, depth_limits: list[Condition], pairs: bool) -> Val | None:
        """Where B is one panel already: the address it is loaded from."""
        source, k_axis = b_, 0
        while source.op is not None and source.op.name == "tt.trans" and source not in self.buffers:
            source, k_axis = source.op.operands[0], 1 - k_axis
        op, word = source.op, 2 if pairs else 1
        depth, cols = b_.type.shape
        if op is None or op.name != "tt.load" or source in self.buffers or cols != PANEL:
            return None
        conditions, complete = self.info.conditions(op.operands[1]) if len(op.operands) > 1 else ([], True)
        if not complete or any(axis != k_axis or c not in depth_limits for axis, c in conditions):
            return None  # a panel is read as a whole
        pointers = op.operands[0]
        along_k = [k // word * cols * word + k % word for k in range(depth)]
        along_n = [n * word for n in range(cols)]
        if source.type.elem != ("bf16" if pairs else "f32") or self.info.offsets(pointers, k_axis) != along_k:
            return None
        return (
            self.at(pointers, [self.b.index(0)] * 2, None, 0)
            if self.info.offsets(pointers, 1 - k_axis) == along_n
            else None
        )

    def _pack(
        self,
        bt: Value,
        column: Val,
        width: int,
        k: Val,
        panel: Val,
        pairs: bool,
        col_limits: list[Condition],
        n: Val,
    ) -> None:
        b = self.b
        depth = bt.type.shape[0]
        if self.best_lane(bt) == 0 and depth >= LANES:
            last = b.binary("arith.subi", n, b.index(1))
            # columns past the end repeat the last one: what they give is not looked at
            numbers = [b.binary("arith.minsi", b.add(column, b.index(c)), last) for c in range(width)]
            keys = [(condition, number.name) for condition in col_limits for number in numbers]
            self.assumed.update(dict.fromkeys(keys))
            self._forget(keys, lambda: self._pack_transposed(bt, numbers, k, panel, pairs))
            return
        with b.loop(b.index(0), k, b.index(2 if pairs else 1)) as loop:
            for c in range(0, width, LANES):
                at = b.add(column, b.index(c))
                vector = self.vector(bt, [loop.index, at], 1, LANES)
                if pairs:
                    below = b.constant(0.0, "bf16", LANES)
                    if depth > 1:
                        # past an odd end there may be anything, and 0 * NaN is NaN
                        next_k = b.add(loop.index, b.index(1))
                        there = b.compare("arith.cmpi slt", next_k, k)
                        below = b.select(there, self.vector(bt, [next_k, at], 1, LANES), below)
                    vector = b.shuffle(vector, below, [i // 2 + i % 2 * LANES for i in range(2 * LANES)])
                elif vector.elem != "f32":
                    vector = b.convert("arith.extf", vector, "f32")
                offset = b.add(b.mul(loop.index, b.index(width)), b.index(2 * c if pairs else c))
                self.store_vector(vector, b.gep(panel, offset, "bf16" if pairs else "f32"))

    def _pack_transposed(self, bt: Value, columns: list[Val], k: Val, panel: Val, pairs: bool) -> None:
        """B lies with k running fastest: transpose 16 columns x 16 words at a time."""
        b, width = self.b, len(columns)
        span = 2 * LANES if pairs and bt.type.shape[0] >= 2 * LANES else LANES
        words = span // 2 if pairs else span
        with b.loop(b.index(0), k, b.index(span)) as loop:
            for c in range(0, width, LANES):
                vectors = []
                for at in columns[c : c + LANES]:
                    vector = self.vector(bt, [loop.index, at], 0, LANES)
                    if pairs:
                        high = b.constant(0.0, "bf16", LANES)
                        if span > LANES:
                            high = self.vector(bt, [b.add(loop.index, b.index(LANES)), at], 0, LANES)
                        both = b.shuffle(vector, high, range(2 * LANES))
                        vector = b.op(
                            f"llvm.bitcast {{0}} : {both.type} to {mlir_type('i32', LANES)}", (both,), "i32", LANES
                        )
                    elif vector.elem != "f32":
                        vector = b.convert("arith.extf", vector, "f32")
                    vectors.append(vector)
                start = b.mul(loop.index, b.index(width // 2 if pairs else width))
                for i, vector in enumerate(self._transpose(vectors)[:words]):
                    offset = b.add(start, b.index(i * width + c))
                    self.store_vector(vector, b.gep(panel, offset, vector.elem))

    def _transpose(self, rows: list[Val]) -> list[Val]:
        rows = list(rows)
        for distance in (8, 4, 2, 1):
            for i in range(LANES):
                if i & distance:
                    continue
                low, high = rows[i], rows[i + distance]
                first = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
                second = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
                rows[i], rows[i + distance] = self.b.shuffle(low, high, first), self.b.shuffle(low, high, second)
        return rows

    # --- the block in registers

    def _block(
        self,
        a: Rows,
        first_row: Val,
        m: Val,
        rows: int,
        k: Val,
        panel: Val,
        width: int,
        target: Any,
        column: Val,
        fresh: bool,
        pairs: bool,
    ) -> None:
        b = self.b
        last = b.binary("arith.subi", m, b.index(1))
        # rows past the end repeat the last one: what they give is not looked at
        numbers = [b.binary("arith.minsi", b.add(first_row, b.index(r)), last) for r in range(rows)]
        pointers = [a.row(i) for i in numbers]
        places = [
            [
                b.gep(self.address(target, (0, 0), [b.add(first_row, b.index(r)), column]), b.index(c), "f32")
                for c in range(0, width, LANES)
            ]
            for r in range(rows)
        ]
        zero = b.constant(0.0, "f32", LANES)
        start = [zero] * (len(places) * len(places[0]))

        def accumulate(carried: list[Val], position: Val, elem: str) -> list[Val]:
            word = b.binary("arith.divui", position, b.index(2)) if pairs else position
            base = b.gep(panel, b.mul(word, b.index(width)), "f32")
            columns = [self._panel(b.gep(base, b.index(c), "f32"), pairs) for c in range(0, width, LANES)]
            offset = b.mul(word, a.step)
            elements = [self._word(b.gep(p, offset, "f32"), elem) for p in pointers]
            n = len(columns)
            pairings = ((elements[i // n], columns[i % n]) for i in range(len(carried)))
            return [self._multiply_add(acc, *xy, pairs) for acc, xy in zip(carried, pairings, strict=True)]

        even = b.binary("arith.andi", k, b.index(-2)) if pairs else k
        with b.loop(b.index(0), even, b.index(2 if pairs else 1), start) as loop:
            loop.next = accumulate(loop.carried, loop.index, "i32" if pairs else "f32")
        results = loop.results
        if pairs:
            # an odd k: its partner is not there, and in memory may be anything
            with b.loop(even, k, b.index(2), results) as loop:
                loop.next = accumulate(loop.carried, loop.index, "i16")
            results = loop.results
        flat = [p for row in places for p in row]
        for result, place in zip(results, flat, strict=True):
            if not fresh:  # added last: the roundings are those of short sums, not of one as long as the contraction
                result = b.binary("arith.addf", self.load_vector(place, "f32", LANES), result)
            self.store_vector(result, place)

    def _panel(self, pointer: Val, pairs: bool) -> Val:
        vector = ("bf16", 2 * LANES) if pairs else ("f32", LANES)
        text = f"llvm.load {{0}} {{{{alignment = 4 : i64}}}} : !llvm.ptr -> {mlir_type(*vector)}"
        return self.b.read(text, (pointer,), *vector)

    def _word(self, pointer: Val, elem: str) -> Val:
        """A word of A in every lane; half of one where its other half lies beyond the end."""
        b = self.b
        word = b.read(f"llvm.load {{0}} {{{{alignment = 2 : i64}}}} : !llvm.ptr -> {elem}", (pointer,), elem)
        if elem == "f32":
            return b.splat(word, LANES)
        word = b.splat(b.convert("arith.extui", word, "i32") if elem == "i16" else word, LANES)
        return b.op(f"llvm.bitcast {{0}} : {word.type} to {mlir_type('bf16', 2 * LANES)}", (word,), "bf16", 2 * LANES)

    def _multiply_add(self, acc: Val, x: Val, y: Val, pairs: bool) -> Val:
        if not pairs:
            return self.math.fma(x, y, acc)
        native = f"vector<{2 * LANES}xbf16>"
        x, y = (self.b.op(f"llvm.bitcast {{0}} : {v.type} to {native}", (v,), "bf16", 2 * LANES) for v in (x, y))
        types = f"({acc.type}, {native}, {native}) -> {acc.type}"
        text = f'llvm.call_intrinsic "llvm.x86.avx512bf16.dpbf16ps.512"({{0}}, {{1}}, {{2}}) : {types}'
        return self.b.op(text, (acc, x, y), "f32", LANES)
