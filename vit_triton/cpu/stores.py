"""Stores pass: a tt.store is a loop that evaluates the value over the part of the tile that satisfies its mask.

A tile that is loaded along one axis and stored along the other is transposed in registers, in blocks of 16 x 16.
"""

from collections.abc import Sequence

from vit_triton.cpu.bounds import bound_value, demanded_conditions, loop_bound
from vit_triton.cpu.buffers import materialize_deferred
from vit_triton.cpu.builder import Val
from vit_triton.cpu.expressions import evaluate, vector
from vit_triton.cpu.loops import for_each_vector, vector_axis
from vit_triton.cpu.masks import Condition
from vit_triton.cpu.memory import address, scatter, store_scalar, store_vector
from vit_triton.cpu.prefetch import prefetch_ahead, row_read_again
from vit_triton.cpu.sinks import LAZY
from vit_triton.cpu.state import LANES, Position, State
from vit_triton.cpu.ttir import Op, Value


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
    stored_axis = last if last in contiguous or not contiguous else contiguous[0]
    is_copied = value in s.sinks.materialized and value not in s.buffers
    copy = s.scratch.allocate(value.type) if is_copied else None
    row = row_read_again(s, op, value) if s.prefetches and not is_copied else None

    def body(at: Position, tail: Val | None) -> None:
        if row is not None and tail is None:
            prefetch_ahead(s, row, at)
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

    by_axis = [conditions.along(axis) for axis in range(len(shape))]
    if conditions.complete and contiguous and copy is None and _is_transposed(s, value, by_axis, stored_axis):
        _store_transposed(s, pointers, value, by_axis[1 - stored_axis], stored_axis)
    else:
        for_each_vector(s, shape, by_axis, stored_axis, body)
    if copy is not None:
        s.buffers[value] = copy


def _is_transposed(s: State, value: Value, conditions: Sequence[Sequence[Condition]], axis: int) -> bool:
    """Whether the tile is loaded along the axis that is not ``axis``, all of which is stored."""
    shape = value.type.shape
    return len(shape) == 2 and min(shape) >= LANES and not conditions[axis] and vector_axis(s, value) != axis


def _store_transposed(s: State, pointers: Value, value: Value, conditions: Sequence[Condition], axis: int) -> None:
    """Store a tile along ``axis``. ``conditions``: those of the other axis, along which the value is loaded."""
    b, shape = s.b, value.type.shape
    bound = bound_value(s, loop_bound(s, conditions, shape[1 - axis]))
    whole = b.binary("arith.andi", bound, b.index(-LANES))

    def index(along: Val, other: Val) -> tuple[Val, Val]:
        return (along, other) if axis == 0 else (other, along)

    for low, high, step in ((b.index(0), whole, LANES), (whole, bound, 1)):
        with b.loop(low, high, b.index(step)) as loop, s.assume(conditions, loop.index):
            for start in range(0, shape[axis], LANES):
                if step == 1:
                    at = index(b.index(start), loop.index)
                    rows = [vector(s, value, Position(at, axis, LANES))]
                else:
                    places = [index(b.index(start + i), loop.index) for i in range(LANES)]
                    rows = b.transpose([vector(s, value, Position(at, 1 - axis, LANES)) for at in places])
                for i, row in enumerate(rows):
                    at = index(b.index(start), b.add(loop.index, b.index(i)))
                    store_vector(b, row, evaluate(s, pointers, Position(at)))


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
