"""Reductions pass: a tt.reduce is a loop over the part of the tile in which elements are not the identity.

A reduction along the vector axis uses four independent accumulators per row, then reduces across lanes. A reduction
along another axis accumulates row after row into a row of results in memory. Reductions over the same elements share
one loop: the sum and the sum of squares of a row read it once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vit_triton.cpu.bounds import available_conditions, bound_value, demanded_conditions, loop_bound
from vit_triton.cpu.builder import Val
from vit_triton.cpu.expressions import vector
from vit_triton.cpu.loops import for_each_row, for_each_vector, lane_mask, vector_axis
from vit_triton.cpu.masks import IDENTITY, Condition
from vit_triton.cpu.memory import Buffer, address, load_vector, store_scalar, store_vector
from vit_triton.cpu.sinks import LAZY
from vit_triton.cpu.state import LANES, Position, State
from vit_triton.cpu.ttir import Op, Unsupported, Value


@dataclass
class Reduction:
    """A tt.reduce: ``combine(accumulator, new)``, starting with ``identity``; tile results are in ``buffer``."""

    op: Op
    combine: Callable[[Val, Val], Val]
    identity: Val
    buffer: Buffer | None = None
    starts_from_buffer: bool = False  # start with the loop-carried values in ``buffer``

    @property
    def source(self) -> Value:
        return self.op.operands[0]

    @property
    def result(self) -> Value:
        return self.op.results[0]


def reduce(s: State, op: Op) -> None:
    """Lower a reduction, fused with later reductions that share its loop."""
    if op in s.fused:
        return
    group = [_reduction(s, each) for each in (op, *_fusible(s, op))]
    s.fused.update(each.op for each in group)
    axis, conditions = op.attrs["axis"], _conditions(s, op)
    lane_axis = vector_axis(s, op.operands[0])
    if lane_axis != axis:
        for each in group:
            each.buffer = _carried_buffer(s, each.op)
            each.starts_from_buffer = each.buffer is not None
    for each in group:
        if each.buffer is None and each.result.type.is_tile:
            each.buffer = s.scratch.allocate(each.result.type)
    if lane_axis == axis:
        _reduce_along_vectors(s, group, axis, conditions)
    else:
        _reduce_across_vectors(s, group, axis, lane_axis, conditions)
    s.buffers |= {each.result: each.buffer for each in group if each.buffer is not None}


def _reduction(s: State, op: Op) -> Reduction:
    region, elem = op.regions[0], op.operands[0].type.elem
    if len(op.operands) > 1:
        raise Unsupported("tt.reduce of several tiles at once")
    if region.ops[-1].operands[0] is not region.ops[-2].results[0] or len(region.ops) != 2:
        raise Unsupported("tt.reduce with more than one operation")
    name, b = region.ops[0].name, s.b
    identity = IDENTITY.get(name)
    if identity is None or elem == "bf16":
        raise Unsupported(f"tt.reduce of {elem} with {name}")

    def combine(a: Val, new: Val) -> Val:
        if name in ("arith.maxnumf", "arith.minnumf"):
            # comparisons with NaN are false and the accumulator is never NaN: same as maxnumf, in one instruction
            order = "ogt" if name == "arith.maxnumf" else "olt"
            return b.select(b.compare(f"arith.cmpf {order}", new, a), new, a)
        return b.binary(name, a, new)

    return Reduction(op, combine, b.constant(identity, elem))


def _conditions(s: State, op: Op) -> list[list[Condition]]:
    """The conditions on the elements that are reduced, for each axis of the operand."""
    conditions = demanded_conditions(s, op.operands[0])
    conditions[op.attrs["axis"]] = available_conditions(s, s.masks.reduction_conditions(op))
    return conditions


# --- fusion of reductions


def _fusible(s: State, op: Op) -> list[Op]:
    """Later reductions over the same elements that do not depend on operations in between."""
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
            and _is_evaluable(s, other.operands[0])
            and _conditions(s, other) == _conditions(s, op)
            and vector_axis(s, other.operands[0]) == vector_axis(s, op.operands[0])
        ):
            found.append(other)
    return found


def _is_evaluable(s: State, value: Value) -> bool:
    """Whether the expression can be evaluated here, before its position in the program."""
    if value in s.defined or value in s.buffers:
        return True
    op = value.op
    if op is None or not value.type.is_tile or op.name not in LAZY and op.name != "tt.load":
        return False
    return value not in s.sinks.materialized and all(_is_evaluable(s, v) for v in op.operands)


def _carried_buffer(s: State, op: Op) -> Buffer | None:
    """The buffer of the loop-carried tile that the result is added to, if that tile has no other user."""
    users = op.results[0].users
    if len(users) != 1 or users[0].name != op.regions[0].ops[0].name or users[0].parent is not op.parent:
        return None
    total, region = users[0].results[0], op.parent
    assert region is not None
    before = next(v for v in users[0].operands if v is not op.results[0])
    carried = before in s.buffers and before.users == [users[0]] and before in region.arguments
    if not carried or before.type != total.type:
        return None
    s.buffers[total] = s.buffers[before]
    return s.buffers[before]


# --- the loops


def _reduce_along_vectors(
    s: State, group: Sequence[Reduction], axis: int, conditions: Sequence[Sequence[Condition]]
) -> None:
    b, shape = s.b, group[0].source.type.shape

    def row(at: Position) -> None:
        vectors = _reduce_row(s, group, at, axis, conditions[axis])
        for each, total in zip(group, vectors, strict=True):
            while total.lanes > 1:
                half = total.lanes // 2
                low = b.shuffle(total, total, range(half))
                total = each.combine(low, b.shuffle(total, total, range(half, 2 * half)))
            total = b.op(f"llvm.extractelement {{0}}[{{1}} : i64] : {total.type}", (total, b.index(0)), total.elem)
            if each.buffer is None:
                s.scalars[each.result] = total
            else:
                store_scalar(b, total, _address_of_result(s, each, axis, at))

    for_each_row(s, shape, conditions, axis, row)


def _address_of_result(s: State, each: Reduction, axis: int, at: Position) -> Val:
    assert each.buffer is not None
    return address(s.b, each.buffer, each.result.type.shape, (*at.index[:axis], *at.index[axis + 1 :]))


def _reduce_row(
    s: State, group: Sequence[Reduction], row: Position, axis: int, conditions: Sequence[Condition]
) -> list[Val]:
    """Reduce one row along the axis to one vector per reduction."""
    b, size = s.b, group[0].source.type.shape[axis]
    lanes = min(LANES, size)
    bound = loop_bound(s, conditions, size)
    ways = 4 if size >= 8 * lanes else 1  # accumulators per reduction
    starts = [b.splat(each.identity, lanes) for each in group]

    def accumulate(totals: Sequence[Val], index: Val, mask: Val | None = None) -> list[Val]:
        at = Position(row.with_index(axis, index).index, axis, lanes)
        with s.assume(conditions, index, mask):
            vectors = [vector(s, each.source, at) for each in group]
        if mask is not None:
            vectors = [b.select(mask, v, start) for v, start in zip(vectors, starts, strict=True)]
        return [each.combine(total, v) for each, total, v in zip(group, totals, vectors, strict=True)]

    n = len(group)
    stop = bound_value(s, bound)
    whole = b.binary("arith.andi", stop, b.index(-lanes))
    blocks = b.binary("arith.divui", stop, b.index(ways * lanes))
    blocks = b.mul(blocks, b.index(ways * lanes))
    accumulators = starts * ways
    if ways > 1:
        with b.loop(b.index(0), blocks, b.index(ways * lanes), accumulators) as loop:
            for way in range(ways):
                index = b.add(loop.index, b.index(way * lanes))
                loop.next += accumulate(loop.carried[way * n : (way + 1) * n], index)
        accumulators = loop.results
    with b.loop(blocks if ways > 1 else b.index(0), whole, b.index(lanes), accumulators[:n]) as loop:
        loop.next = accumulate(loop.carried, loop.index)
    accumulators = [*loop.results, *accumulators[n:]]
    if isinstance(bound, Val) or bound % lanes:
        # a loop of at most one iteration
        with b.loop(whole, stop, b.index(lanes), accumulators[:n]) as loop:
            loop.next = accumulate(loop.carried, loop.index, lane_mask(s, loop.index, stop, lanes))
        accumulators = [*loop.results, *accumulators[n:]]
    while len(accumulators) > n:
        half = len(accumulators) // 2
        accumulators = [group[i % n].combine(accumulators[i], accumulators[i + half]) for i in range(half)]
    return accumulators


def _reduce_across_vectors(
    s: State, group: Sequence[Reduction], axis: int, lane_axis: int, conditions: Sequence[Sequence[Condition]]
) -> None:
    """Reduce row after row, so that values that depend only on the row are computed once per row."""
    b, shape = s.b, group[0].source.type.shape
    row_shape = [1 if a == axis else size for a, size in enumerate(shape)]
    row_conditions = [[] if a == axis else c for a, c in enumerate(conditions)]

    def begin(at: Position, mask: Val | None) -> None:
        for each in group:
            if not each.starts_from_buffer:
                store_vector(b, b.splat(each.identity, at.lanes), _address_of_result(s, each, axis, at))

    def add_row(at: Position, mask: Val | None) -> None:
        for each in group:
            target = _address_of_result(s, each, axis, at)
            new = vector(s, each.source, at.with_index(axis, row.index))
            store_vector(b, each.combine(load_vector(b, target, new.elem, at.lanes), new), target)

    for_each_vector(s, row_shape, row_conditions, lane_axis, begin)
    stop = bound_value(s, loop_bound(s, conditions[axis], shape[axis]))
    with b.loop(b.index(0), stop, b.index(1)) as row, b.pinned_here(), s.assume(conditions[axis], row.index):
        for_each_vector(s, row_shape, row_conditions, lane_axis, add_row)
