"""Stores pass: a tt.store is a loop that evaluates the value over the part of the tile that satisfies its mask."""

from vit_triton.cpu.bounds import demanded_conditions
from vit_triton.cpu.buffers import materialize_deferred
from vit_triton.cpu.builder import Val
from vit_triton.cpu.expressions import evaluate, vector
from vit_triton.cpu.loops import for_each_vector
from vit_triton.cpu.memory import address, scatter, store_scalar, store_vector
from vit_triton.cpu.sinks import LAZY
from vit_triton.cpu.state import Position, State
from vit_triton.cpu.ttir import Op


def store(s: State, op: Op) -> None:
    materialize_deferred(s, s.sinks.position[op])
    pointers, value = op.operands[:2]
    mask = op.operands[2] if len(op.operands) == 3 else None
    b, shape = s.b, pointers.type.shape
    if not pointers.type.is_tile:
        if mask is None:
            store_scalar(b, s.scalars[value], s.scalars[pointers])
        else:
            with b.when(s.scalars[mask]):
                store_scalar(b, s.scalars[value], s.scalars[pointers])
        return
    conditions = s.masks.conditions(mask)
    along = [s.axes.along(pointers, axis) for axis in range(len(shape))]
    contiguous = [axis for axis, info in enumerate(along) if info.contiguous]
    last = len(shape) - 1
    vector_axis = last if last in contiguous or not contiguous else contiguous[0]
    is_copied = value in s.sinks.materialized and value not in s.buffers
    copy = s.scratch.allocate(value.type) if is_copied else None

    def body(at: Position, tail: Val | None) -> None:
        stored = vector(s, value, at)
        if copy is not None:
            store_vector(b, stored, address(b, copy, shape, at.index))
        where = tail
        if not conditions.complete:
            assert mask is not None
            rest = vector(s, mask, at)
            where = rest if where is None else b.binary("arith.andi", where, rest)
        if contiguous:
            store_vector(b, stored, evaluate(s, pointers, at.scalar), where)
            return
        where = b.constant(True, "i1", at.lanes) if where is None else where
        scatter(b, stored, vector(s, pointers, at), where)

    for_each_vector(s, shape, [conditions.along(axis) for axis in range(len(shape))], vector_axis, body)
    if copy is not None:
        s.buffers[value] = copy


def is_stored_next(s: State, op: Op) -> bool:
    """Whether the next sink stores every part of the result that is read; that store then also materializes it."""
    assert op.parent is not None
    position, value = op.parent.ops.index(op), op.results[0]
    sink = next(o for o in op.parent.ops[position + 1 :] if o.name not in LAZY and o.name != "tt.load")
    if sink.name != "tt.store" or sink.operands[1] is not value or len(sink.operands) < 3:
        return False
    rank = len(value.type.shape)
    conditions = s.masks.conditions(sink.operands[2])
    stored = [conditions.along(axis) for axis in range(rank)]
    contiguous = s.axes.along(sink.operands[0], rank - 1).contiguous
    return conditions.complete and stored == demanded_conditions(s, value) and contiguous
