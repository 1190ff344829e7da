"""Prefetch pass: fetch lines before they are needed.

- The lines that a product's results will be stored to, while the product is computed. The rows of a tile of results are
  far apart in memory, and their lines are in no cache: without the prefetch, the stores wait for each line.
- The rows that follow in memory, while a tile of one row is stored. A norm reads a row from memory once and then from
  the L1 cache: without the prefetch, nothing is read from memory meanwhile. With several rows (LayerNorm's backward
  pass), it made no difference or took longer.
"""

from collections.abc import Sequence

from vit_triton.cpu.builder import Val
from vit_triton.cpu.expressions import compute, evaluate
from vit_triton.cpu.memory import BYTES, prefetch_line
from vit_triton.cpu.sinks import LAZY
from vit_triton.cpu.state import Position, State
from vit_triton.cpu.ttir import Op, Value
from vit_triton.cpu.vmath import ELEMENTWISE

LINE = 64  # bytes
AHEAD = 8192  # bytes; 4096 is slower at 768 columns


def stored_to(s: State, dot: Op) -> Value | None:
    """The pointers that an elementwise function of the product, or of its sum over a loop, is stored to; None if there
    is no such store or the pointers depend on values that are computed later."""
    value, shape, region = dot.results[0], dot.results[0].type.shape, dot.parent
    if region is not None and region.parent is not None and region.parent.name == "scf.for":
        if value not in region.yielded:
            return None
        value = region.parent.results[region.yielded.index(value)]
    found, values = {value}, [value]
    while values:
        for user in values.pop().users:
            if user.name == "tt.store" and user.operands[1] in found:
                return user.operands[0] if _is_known(s, user.operands[0]) else None
            if user.name in ELEMENTWISE:
                more = {r for r in user.results if r.type.shape == shape} - found
                found |= more
                values += more
    return None


def _is_known(s: State, value: Value) -> bool:
    """Whether an address can be evaluated here; its scalars are computed."""
    if value in s.defined or value in s.scalars or value in s.buffers:
        return True
    op = value.op
    if op is None or op.name not in LAZY or not all(_is_known(s, operand) for operand in op.operands):
        return False
    if not value.type.is_tile:
        s.scalars[value] = compute(s, op)
    return True


def prefetch(s: State, pointers: Value, rows: Sequence[Val], column: Val, width: int) -> None:
    """Prefetch ``width`` columns of rows of a tile for writing."""
    b, size = s.b, BYTES[pointers.type.pointee or "i8"]
    for row in rows:
        for start in range(0, width, LINE // size):
            place = evaluate(s, pointers, Position((row, b.add(column, b.index(start)))))
            prefetch_line(b, place, write=True)


def row_read_again(s: State, store: Op, value: Value) -> Value | None:
    """The pointers of the only row in the expression ``value`` of ``store`` that an earlier loop also reads; None if
    the tile has several rows, or the expression reads several such rows."""
    found: set[Value] = set()

    def visit(value: Value) -> None:
        op = value.op
        if value in s.buffers or op is None or len(value.type.shape) != 2 or value.type.shape[0] != 1:
            return
        if op.name == "tt.load":
            if s.axes.along(op.operands[0], 1).contiguous and not s.sinks.is_only_sink(value, store):
                found.add(op.operands[0])
        elif op.name in ELEMENTWISE:
            for operand in op.operands:
                visit(operand)

    visit(value)
    return found.pop() if len(found) == 1 else None


def prefetch_ahead(s: State, pointers: Value, at: Position) -> None:
    """Prefetch the line ``AHEAD`` bytes after the address at ``at``."""
    prefetch_line(s.b, s.b.gep(evaluate(s, pointers, at.scalar), s.b.index(AHEAD), "i8"), write=False)
