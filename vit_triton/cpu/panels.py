"""Panels pass: the operands of tt.dot, A in rows and B in panels of columns, read in place or packed.

A word is the operand of one multiplication: a float32, or a pair of bfloat16 consecutive along K if the CPU multiplies
bfloat16. A row of A is a sequence of words with a constant stride. A panel of B contains, for each word along K, that
word of all columns contiguously. float16, and bfloat16 without CPU support, are converted to float32 when packed.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vit_triton.cpu.bounds import available_conditions, bound_value, demanded_conditions, loop_bound
from vit_triton.cpu.builder import Val, mlir_type
from vit_triton.cpu.expressions import evaluate, vector
from vit_triton.cpu.loops import for_each_vector, vector_axis
from vit_triton.cpu.masks import Condition
from vit_triton.cpu.memory import Buffer, address, store_vector
from vit_triton.cpu.state import LANES, Position, State
from vit_triton.cpu.ttir import Op, Type, Value

TILE = 2 * LANES  # rows, columns and depth of a block in tiles of AMX


@dataclass(frozen=True)
class Product:
    """A (M, K) times B (K, N); ``width``: columns of a panel; ``pairs``: words are pairs of bfloat16. Outside the
    conditions on rows and columns, results are not read; outside those on depth, elements of A or B are 0. ``tiles``:
    see :func:`fits_tiles`."""

    a: Value
    b: Value
    width: int
    pairs: bool
    tiles: bool
    rows: Sequence[Condition]
    cols: Sequence[Condition]
    depth: Sequence[Condition]

    @property
    def word(self) -> int:
        return 2 if self.pairs else 1

    @property
    def elem(self) -> str:
        return "bf16" if self.pairs else "f32"


def product_of(s: State, op: Op) -> Product:
    a, b = op.operands[:2]
    rows, cols = demanded_conditions(s, op.results[0])
    pairs = a.type.elem == "bf16" and s.bf16_dot
    width = min(s.block.columns, b.type.shape[1])
    depth = available_conditions(s, s.masks.contraction_conditions(op))
    return Product(a, b, width, pairs, fits_tiles(s, op), rows, cols, depth)


def fits_tiles(s: State, op: Op) -> bool:
    """Whether a product can use the tiles of AMX; it does if its :class:`Rows` have a pitch."""
    a, b = op.operands[:2]
    return s.has_tiles and a.type.elem == "bf16" and min(*a.type.shape, b.type.shape[1]) >= TILE


@dataclass
class Rows:
    """The words of A in memory: ``row(i)`` is the address of the first word of row i, ``step`` the stride in words. For
    products in tiles, whose step is 1: ``pitch`` is the stride of rows in bytes, None if it is not constant."""

    row: Callable[[Val], Val]
    step: Val
    pitch: Val | None = None


class Accumulator(NamedTuple):
    """The buffer of the result; ``fresh``: the addend is 0, else the buffer contains it."""

    buffer: Buffer
    fresh: bool | Val


def _before_transposes(s: State, value: Value) -> tuple[Value, bool]:
    """The tile before its transposes, and whether their result is transposed."""
    transposed = False
    while value.op is not None and value.op.name == "tt.trans" and value not in s.buffers:
        value, transposed = value.op.operands[0], not transposed
    return value, transposed


# --- A


def rows_of_a(s: State, p: Product) -> Rows:
    b, a = s.b, p.a
    source, transposed = _before_transposes(s, a)

    def first(row: Val) -> tuple[Val, Val]:
        return (b.index(0), row) if transposed else (row, b.index(0))

    if source.type.elem == p.elem and source in s.buffers and not (transposed and p.pairs):
        buffer = s.buffers[source]
        step = b.index(buffer.stride if transposed else 1)
        return Rows(lambda i: address(b, buffer, source.type.shape, first(i)), step, _pitch(s, p, buffer))
    if source.type.elem == p.elem and source not in s.buffers and _is_loaded_in_rows(s, p, source, transposed):
        assert source.op is not None
        pointers = source.op.operands[0]
        rows = Rows(lambda i: evaluate(s, pointers, Position(first(i))), b.index(1))
        if p.tiles and s.axes.along(pointers, 1 if transposed else 0, whole=True).affine:
            ends = [b.op("llvm.ptrtoint {0} : !llvm.ptr to i64", (rows.row(b.index(i)),), "i64") for i in range(2)]
            rows.pitch = b.binary("arith.subi", ends[1], ends[0])
        return rows
    if p.tiles and vector_axis(s, a) == 0:
        return _transpose_a(s, p)
    if vector_axis(s, a) == 0 and a.type.shape[0] >= LANES:
        return _pack_transposed_a(s, p)
    buffer = s.scratch.allocate(Type(a.type.shape, p.elem))
    _write_a(s, p, buffer)
    return _rows_of_buffer(s, p, buffer)


def _rows_of_buffer(s: State, p: Product, buffer: Buffer) -> Rows:
    b = s.b
    return Rows(lambda i: address(b, buffer, p.a.type.shape, (i, b.index(0))), b.index(1), _pitch(s, p, buffer))


def _pitch(s: State, p: Product, buffer: Buffer) -> Val | None:
    return s.b.index(2 * buffer.stride) if p.tiles else None


def _is_loaded_in_rows(s: State, p: Product, source: Value, transposed: bool) -> bool:
    """Whether A is loaded from contiguous rows, with a mask implied by the conditions of the product."""
    op, k_axis = source.op, 0 if transposed else 1
    if op is None or op.name != "tt.load" or not s.axes.along(op.operands[0], k_axis, whole=True).contiguous:
        return False
    conditions = s.masks.conditions(op.operands[1] if len(op.operands) > 1 else None)
    allowed = {1 - k_axis: p.rows, k_axis: p.depth}
    return conditions.complete and all(c in allowed[axis] for axis, c in conditions.by_axis)


def _write_a(s: State, p: Product, buffer: Buffer) -> None:
    """Evaluate A into ``buffer`` row by row, along K."""
    b = s.b

    def body(at: Position, mask: Val | None) -> None:
        elements = vector(s, p.a, at)
        elements = elements if elements.elem == p.elem else b.convert("arith.extf", elements, p.elem)
        if mask is not None:
            elements = b.select(mask, elements, b.constant(0.0, p.elem, at.lanes))
        store_vector(b, elements, address(b, buffer, p.a.type.shape, at.index))

    for_each_vector(s, p.a.type.shape, [p.rows, p.depth], 1, body)


def _pack_transposed_a(s: State, p: Product) -> Rows:
    """Pack A if the row index is contiguous in memory: for each word along K, that word of all rows contiguously."""
    b = s.b
    rows, depth = p.a.type.shape
    stride = b.index(rows + LANES)  # rows at a distance of a power of two share cache sets
    base = s.scratch.reserve((depth // p.word or 1) * (rows + LANES) * 4)
    k = bound_value(s, loop_bound(s, p.depth, depth))
    with b.loop(b.index(0), k, b.index(p.word)) as loop:
        start = b.mul(b.binary("arith.divui", loop.index, b.index(p.word)), stride)

        def body(at: Position, mask: Val | None) -> None:
            here = Position((at.index[0], loop.index), 0, at.lanes)
            words = vector(s, p.a, here)
            if p.pairs:
                words = _interleave(s, words, vector(s, p.a, here.with_index(1, b.add(loop.index, b.index(1)))))
            elif words.elem != "f32":
                words = b.convert("arith.extf", words, "f32")
            store_vector(b, words, b.gep(base, b.add(start, at.index[0]), "f32"))

        with s.assume(p.depth, loop.index):
            for_each_vector(s, [rows], [p.rows], 0, body)
    return Rows(lambda i: b.gep(base, i, "f32"), stride)


def _transpose_a(s: State, p: Product) -> Rows:
    """Write the rows of A, which AMX requires, if the row index is contiguous in memory: transpose blocks of 16 rows x
    16 pairs."""
    b, shape = s.b, p.a.type.shape
    buffer = s.scratch.allocate(Type(shape, "bf16"))
    k = bound_value(s, loop_bound(s, p.depth, shape[1]))
    whole = b.binary("arith.andi", k, b.index(-TILE))

    def transpose(low: Val, high: Val, conditions: Sequence[Condition]) -> None:
        with b.loop(low, high, b.index(TILE)) as loop, b.pinned_here(), contextlib.ExitStack() as stack:
            depths = [b.add(loop.index, b.index(i)) for i in range(TILE)]

            def body(at: Position, mask: Val | None) -> None:
                vectors = [vector(s, p.a, at.with_index(1, depth)) for depth in depths]
                pairs = [_interleave(s, *vectors[i : i + 2]) for i in range(0, TILE, 2)]
                words = [b.op(f"llvm.bitcast {{0}} : {x.type} to vector<16xi32>", (x,), "i32", LANES) for x in pairs]
                for r, row in enumerate(b.transpose(words)):
                    store_vector(b, row, address(b, buffer, shape, (b.add(at.index[0], b.index(r)), loop.index)))

            for depth in depths:
                stack.enter_context(s.assume(conditions, depth))
            for_each_vector(s, shape[:1], [p.rows], 0, body)

    transpose(b.index(0), whole, p.depth)
    transpose(whole, k, ())  # the conditions do not hold everywhere: loads are masked
    return _rows_of_buffer(s, p, buffer)


def _interleave(s: State, low: Val, high: Val) -> Val:
    """Interleave the elements of two vectors."""
    return s.b.shuffle(low, high, [i // 2 + i % 2 * low.lanes for i in range(2 * low.lanes)])


# --- B


def panel_address(s: State, p: Product) -> Val | None:
    """The address that B is loaded from if its memory layout is one panel, else None."""
    source, transposed = _before_transposes(s, p.b)
    op, k_axis = source.op, 1 if transposed else 0
    depth, cols = p.b.type.shape
    if op is None or op.name != "tt.load" or source in s.buffers or cols != s.block.columns:
        return None
    conditions = s.masks.conditions(op.operands[1] if len(op.operands) > 1 else None)
    if not conditions.complete or any(axis != k_axis or c not in p.depth for axis, c in conditions.by_axis):
        return None  # a panel is read without a mask on columns
    pointers = op.operands[0]
    along_k = [k // p.word * cols * p.word + k % p.word for k in range(depth)]
    along_n = [n * p.word for n in range(cols)]
    if source.type.elem != p.elem or s.axes.offsets(pointers, k_axis) != along_k:
        return None
    if s.axes.offsets(pointers, 1 - k_axis) != along_n:
        return None
    return evaluate(s, pointers, Position(s.origin(2)))


def reserve_panel(s: State, p: Product) -> Val:
    return s.scratch.reserve(max(p.b.type.shape[0], 32) * p.width * (2 if p.pairs else 4) + 4 * p.width)


def pack_panel(s: State, p: Product, panel: Val, column: Val, n: Val, k: Val) -> None:
    """Pack the columns of B starting at ``column`` into ``panel``; B has ``n`` columns of ``k`` elements."""
    b = s.b
    if vector_axis(s, p.b) == 0 and p.b.type.shape[0] >= LANES:
        last = b.binary("arith.subi", n, b.index(1))
        # columns past the end repeat the last one; their results are not read
        columns = [b.binary("arith.minsi", b.add(column, b.index(c)), last) for c in range(p.width)]
        with contextlib.ExitStack() as stack:
            for number in columns:
                stack.enter_context(s.assume(p.cols, number))
            _pack_transposed_b(s, p, panel, columns, k)
        return
    with b.loop(b.index(0), k, b.index(p.word)) as loop:
        for c in range(0, p.width, LANES):
            here = Position((loop.index, b.add(column, b.index(c))), 1, LANES)
            words = vector(s, p.b, here)
            if p.pairs:
                below = b.constant(0.0, "bf16", LANES)
                if p.b.type.shape[0] > 1:
                    # memory past an odd k is undefined, and 0 * NaN is NaN
                    next_k = b.add(loop.index, b.index(1))
                    there = b.compare("arith.cmpi slt", next_k, k)
                    below = b.select(there, vector(s, p.b, here.with_index(0, next_k)), below)
                words = _interleave(s, words, below)
            elif words.elem != "f32":
                words = b.convert("arith.extf", words, "f32")
            offset = b.add(b.mul(loop.index, b.index(p.width)), b.index(c * p.word))
            store_vector(b, words, b.gep(panel, offset, p.elem))


def _pack_transposed_b(s: State, p: Product, panel: Val, columns: Sequence[Val], k: Val) -> None:
    """Pack B if K is contiguous in memory: transpose blocks of 16 columns x 16 words."""
    b = s.b
    span = 2 * LANES if p.pairs and p.b.type.shape[0] >= 2 * LANES else LANES
    with b.loop(b.index(0), k, b.index(span)) as loop:
        for c in range(0, p.width, LANES):
            vectors = []
            for column in columns[c : c + LANES]:
                here = Position((loop.index, column), 0, LANES)
                words = vector(s, p.b, here)
                if p.pairs:
                    high = b.constant(0.0, "bf16", LANES)
                    if span > LANES:
                        high = vector(s, p.b, here.with_index(0, b.add(loop.index, b.index(LANES))))
                    both = b.shuffle(words, high, range(2 * LANES))
                    text = f"llvm.bitcast {{0}} : {both.type} to {mlir_type('i32', LANES)}"
                    words = b.op(text, (both,), "i32", LANES)
                elif words.elem != "f32":
                    words = b.convert("arith.extf", words, "f32")
                vectors.append(words)
            start = b.mul(loop.index, b.index(p.width // p.word))
            for i, words in enumerate(b.transpose(vectors)[: span // p.word]):
                offset = b.add(start, b.index(i * p.width + c))
                store_vector(b, words, b.gep(panel, offset, words.elem))
