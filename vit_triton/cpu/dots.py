"""Dots pass: a tt.dot is computed in blocks of results in registers (:func:`.features.register_block`).

    for each panel of B                     packed once in words of 4 bytes: float32, or pairs of bfloat16 along K;
                                            read in place if it is loaded from memory with that layout
        for each block of rows of A
            for each k                      the vectors of B times each element of A

bfloat16 uses vdpbf16ps if the CPU supports it, and AMX (:mod:`vit_triton.cpu.amx`) for all but the last K % 32. The
operands are prepared by :mod:`vit_triton.cpu.panels`.
"""

from collections.abc import Sequence

from vit_triton.cpu import amx
from vit_triton.cpu.bounds import bound_value, loop_bound
from vit_triton.cpu.buffers import is_in_place, leaves, write
from vit_triton.cpu.builder import Val, mlir_type
from vit_triton.cpu.memory import Buffer, address, load_vector, store_vector
from vit_triton.cpu.panels import (
    TILE,
    Accumulator,
    Product,
    Rows,
    pack_panel,
    panel_address,
    product_of,
    reserve_panel,
    rows_of_a,
)
from vit_triton.cpu.prefetch import prefetch, stored_to
from vit_triton.cpu.state import LANES, State
from vit_triton.cpu.ttir import Op, Unsupported, Value


def dot(s: State, op: Op) -> None:
    a, b_, c = op.operands[:3]
    (rows, depth), cols = a.type.shape, b_.type.shape[1]
    if a.type.elem not in ("f32", "f16", "bf16") or b_.type.elem != a.type.elem or c.type.elem != "f32":
        raise Unsupported(f"tt.dot of {a.type.elem} and {b_.type.elem} into {c.type.elem}")
    b = s.b
    target = _accumulator(s, op)
    product = product_of(s, op)
    store = stored_to(s, op) if s.prefetches else None
    with s.scope(), s.evaluation():
        a_rows = rows_of_a(s, product)
        m = bound_value(s, loop_bound(s, product.rows, rows))
        n = bound_value(s, loop_bound(s, product.cols, cols))
        k_bound = loop_bound(s, product.depth, depth)
        k = bound_value(s, k_bound)
        in_memory = panel_address(s, product)
        panel = in_memory or reserve_panel(s, product)
        with b.loop(b.index(0), n, b.index(product.width)) as columns, b.pinned_here():
            if in_memory is None:
                pack_panel(s, product, panel, columns.index, n, k)
            if a_rows.pitch is None:
                _multiply_panel(s, product, a_rows, panel, target, columns.index, m, (b.index(0), k), store)
            else:
                whole = b.binary("arith.andi", k, b.index(-TILE))
                is_read_once = in_memory is not None and rows <= 2 * TILE
                amx.multiply(s, a_rows, panel, target, columns.index, m, whole, store=store, ahead=is_read_once)
                if not isinstance(k_bound, int) or k_bound % TILE:
                    with b.when(b.compare("arith.cmpi slt", whole, k)), b.pinned_here():
                        sums = target._replace(fresh=False)
                        _multiply_panel(s, product, a_rows, panel, sums, columns.index, m, (whole, k), None)
    s.buffers[op.results[0]] = target.buffer


def _multiply_panel(
    s: State, p: Product, a: Rows, panel: Val, target: Accumulator, column: Val, m: Val, depth: tuple[Val, Val],
    store: Value | None,
) -> None:  # fmt: skip
    """Multiply ``m`` rows of A by a panel of B whose first column is ``column``, over a range of K. ``store``: the
    pointers that the results are stored to, which are prefetched."""
    b, rows = s.b, p.a.type.shape[0]
    count = -(-rows // -(-rows // s.block.rows))  # blocks of equal size
    with b.loop(b.index(0), m, b.index(count)) as block, b.pinned_here():
        words = _row_addresses(s, a, block.index, m, count)
        places = _result_addresses(s, target.buffer, block.index, column, count, p.width)
        if store is not None:
            prefetch(s, store, [b.add(block.index, b.index(r)) for r in range(count)], column, p.width)
        results = _multiply(s, p, words, a.step, panel, depth)
        for result, place in zip(results, places, strict=True):
            if target.fresh is not True:  # added last, which is more accurate than starting from a large sum
                addend = load_vector(b, place, "f32", LANES)
                if target.fresh is not False:
                    addend = b.select(target.fresh, b.constant(0.0, "f32", LANES), addend)
                result = b.binary("arith.addf", addend, result)
            store_vector(b, result, place)


def _accumulator(s: State, op: Op) -> Accumulator:
    """The buffer of the addend if it has no other sink, else a copy."""
    c = op.operands[2]
    if c in s.first_trip:
        return Accumulator(s.buffers[c], s.first_trip[c])
    if s.masks.uniform_number(c) == 0:
        return Accumulator(s.scratch.allocate(c.type), True)
    for value in leaves(s, c):
        buffer = s.buffers[value]
        if value.type == c.type and s.sinks.is_only_sink(value, op) and is_in_place(s, c, buffer):
            if value is not c:
                write(s, c, buffer)
            return Accumulator(buffer, False)
    buffer = s.scratch.allocate(c.type)
    write(s, c, buffer)
    return Accumulator(buffer, False)


# --- the block in registers


def _row_addresses(s: State, a: Rows, first_row: Val, m: Val, count: int) -> list[Val]:
    """Addresses of the rows of A. Rows past the end repeat the last one; their results are not read."""
    b = s.b
    last = b.binary("arith.subi", m, b.index(1))
    numbers = [b.binary("arith.minsi", b.add(first_row, b.index(r)), last) for r in range(count)]
    return [a.row(number) for number in numbers]


def _result_addresses(s: State, buffer: Buffer, first_row: Val, column: Val, count: int, width: int) -> list[Val]:
    """Addresses of the vectors of results, row by row."""
    b = s.b
    return [
        b.gep(address(b, buffer, (0, 0), (b.add(first_row, b.index(r)), column)), b.index(c), "f32")
        for r in range(count)
        for c in range(0, width, LANES)
    ]


def _multiply(s: State, p: Product, rows: Sequence[Val], step: Val, panel: Val, depth: tuple[Val, Val]) -> list[Val]:
    """Multiply rows of A, given by their addresses, by a panel of B, over a range of K that starts with a word."""
    b, (first, k) = s.b, depth
    starts = range(0, p.width, LANES)

    def accumulate(carried: Sequence[Val], position: Val, elem: str) -> list[Val]:
        word = b.binary("arith.divui", position, b.index(2)) if p.pairs else position
        base = b.gep(panel, b.mul(word, b.index(p.width)), "f32")
        columns = [_load_panel(s, b.gep(base, b.index(c), "f32"), p.pairs) for c in starts]
        offset = b.mul(word, step)
        words = [_broadcast_word(s, b.gep(row, offset, "f32"), elem) for row in rows]
        factors = ((x, y) for x in words for y in columns)
        return [_multiply_add(s, total, x, y, p.pairs) for total, (x, y) in zip(carried, factors, strict=True)]

    totals = [b.constant(0.0, "f32", LANES)] * (len(rows) * len(starts))
    even = b.binary("arith.andi", k, b.index(-2)) if p.pairs else k
    with b.loop(first, even, b.index(p.word), totals) as loop:
        loop.next = accumulate(loop.carried, loop.index, "i32" if p.pairs else "f32")
    if not p.pairs:
        return loop.results
    # the last element of an odd k has no partner; memory past it is undefined
    with b.loop(even, k, b.index(2), loop.results) as rest:
        rest.next = accumulate(rest.carried, rest.index, "i16")
    return rest.results


def _load_panel(s: State, pointer: Val, pairs: bool) -> Val:
    elem, lanes = ("bf16", 2 * LANES) if pairs else ("f32", LANES)
    text = f"llvm.load {{0}} {{{{alignment = 4 : i64}}}} : !llvm.ptr -> {mlir_type(elem, lanes)}"
    return s.b.read(text, (pointer,), elem, lanes)


def _broadcast_word(s: State, pointer: Val, elem: str) -> Val:
    """Broadcast a word of A to every lane. With ``elem`` "i16" only its lower half is read, and the upper half is 0."""
    b = s.b
    word = b.read(f"llvm.load {{0}} {{{{alignment = 2 : i64}}}} : !llvm.ptr -> {elem}", (pointer,), elem)
    if elem == "f32":
        return b.splat(word, LANES)
    word = b.splat(b.convert("arith.extui", word, "i32") if elem == "i16" else word, LANES)
    return b.op(f"llvm.bitcast {{0}} : {word.type} to {mlir_type('bf16', 2 * LANES)}", (word,), "bf16", 2 * LANES)


def _multiply_add(s: State, total: Val, x: Val, y: Val, pairs: bool) -> Val:
    if not pairs:
        return s.math.fma(x, y, total)
    native = f"vector<{2 * LANES}xbf16>"
    x, y = (s.b.op(f"llvm.bitcast {{0}} : {v.type} to {native}", (v,), "bf16", 2 * LANES) for v in (x, y))
    types = f"({total.type}, {native}, {native}) -> {total.type}"
    text = f'llvm.call_intrinsic "llvm.x86.avx512bf16.dpbf16ps.512"({{0}}, {{1}}, {{2}}) : {types}'
    return s.b.op(text, (total, x, y), "f32", LANES)
