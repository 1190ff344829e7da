"""Expressions pass: evaluate elementwise operations at a position, inside the loops of their sinks.

``evaluate`` walks from a TTIR value to its inputs and writes one MLIR operation for each operation on the way: on a
vector, or on a scalar if all elements along the vector's axis are equal. A chain of elementwise operations is thus
fused into one loop over vectors, the loop of its sink.
"""

from collections.abc import Sequence

from vit_triton.cpu.axes import RESHAPES, operand_axis
from vit_triton.cpu.builder import Val
from vit_triton.cpu.masks import Condition
from vit_triton.cpu.memory import gather, load_scalar, load_vector, masked_load, read_buffer
from vit_triton.cpu.state import SCALAR, Position, State
from vit_triton.cpu.ttir import Op, Unsupported, Value
from vit_triton.cpu.vmath import ELEMENTWISE


def evaluate(s: State, value: Value, at: Position) -> Val:
    """The value at ``at``: a vector, or a scalar if ``at`` is scalar or all lanes are equal."""
    if not value.type.is_tile:
        return s.scalars[value]
    if at.axis is not None and value.type.shape[at.axis] == 1:
        at = at.scalar
    key = (s.generation, value, at)
    cached = s.b.cached_value(key)
    if cached is not None:
        return cached
    if value in s.buffers:
        result = read_buffer(s.b, s.buffers[value], value.type.shape, at.index, at.axis, at.lanes)
    elif value in s.offsets:
        start = evaluate(s, s.axes.initial(value), at)
        if value.type.elem == "ptr":
            result = s.b.gep(start, s.offsets[value], value.type.pointee or "i8")
        else:
            result = s.b.add(start, s.offsets[value])
    elif value.op is None:
        raise Unsupported("a tile as an argument")
    else:
        result = compute(s, value.op, at)
    s.b.cache_value(key, result)
    return result


def vector(s: State, value: Value, at: Position) -> Val:
    """:func:`evaluate`, broadcast to a vector if it is a scalar."""
    return s.b.splat(evaluate(s, value, at), at.lanes)


def compute(s: State, op: Op, at: Position = SCALAR) -> Val:
    """The result of an operation of an expression."""
    b, name, operands = s.b, op.name, op.operands
    if name == "arith.constant":
        return b.constant(op.attrs["value"], op.results[0].type.elem)
    if name == "tt.splat":
        return s.scalars[operands[0]]
    if name == "tt.make_range":
        start = b.convert("arith.trunci", at.index[0], "i32")
        first = b.add(start, b.constant(int(op.attrs["start"]), "i32"))
        return first if at.axis is None else b.add(first, b.iota("i32", at.lanes))
    if name in RESHAPES:
        return evaluate(s, operands[0], _before_reshape(s, op, at))
    if name == "tt.load":
        return load(s, op, at)
    result = op.results[0]
    if at.axis is not None and result.type.elem != "ptr" and s.axes.along(result, at.axis).uniform:
        at = at.scalar
    if name == "arith.select" and operands[0].type.is_tile and _is_true(s, operands[0], at.index):
        return evaluate(s, operands[1], at)
    args = [evaluate(s, v, at) for v in operands]
    if name == "tt.addptr":
        return b.gep(args[0], args[1], result.type.pointee or "i8")
    if name in ELEMENTWISE:
        return s.math.apply(op, args)
    raise Unsupported(f"operation {name}")


def _before_reshape(s: State, op: Op, at: Position) -> Position:
    """The position in the operand of a reshaping operation that corresponds to ``at`` in its result."""
    index = list(s.origin(len(op.operands[0].type.shape)))
    inner_axis = None
    for axis, i in enumerate(at.index):
        to = operand_axis(op, axis)
        if to is not None:
            index[to] = i
            inner_axis = to if axis == at.axis else inner_axis
    return Position(tuple(index), inner_axis, at.lanes) if inner_axis is not None else Position(tuple(index))


def load(s: State, op: Op, at: Position = SCALAR) -> Val:
    """A scalar load if addresses are uniform along the axis, a vector load if they are contiguous, else a gather.
    Conditions of the mask that are implied by the open loops are not tested."""
    b, elem, pointers = s.b, op.results[0].type.elem, op.operands[0]
    info = None if at.axis is None else s.axes.along(pointers, at.axis)
    mask = None if len(op.operands) < 2 else _mask_left(s, op.operands[1], at)
    if info is None or info.uniform and (mask is None or not mask.lanes):
        pointer = evaluate(s, pointers, at.scalar)
        if mask is None:
            return load_scalar(b, pointer, elem)
        other = _other(s, op, at.scalar)
        loaded = masked_load(b, pointer, b.splat(mask, 1), b.splat(other, 1))
        return b.op(f"llvm.extractelement {{0}}[{{1}} : i64] : {loaded.type}", (loaded, b.index(0)), elem)
    if info.contiguous:
        pointer = evaluate(s, pointers, at.scalar)
        if mask is None:
            return load_vector(b, pointer, elem, at.lanes)
        other = b.splat(_other(s, op, at), at.lanes)
        return masked_load(b, pointer, b.splat(mask, at.lanes), other)
    addresses = vector(s, pointers, at)
    mask = b.constant(True, "i1", at.lanes) if mask is None else b.splat(mask, at.lanes)
    return gather(b, addresses, mask, b.splat(_other(s, op, at), at.lanes))


def _other(s: State, op: Op, at: Position) -> Val:
    if len(op.operands) == 3:
        return evaluate(s, op.operands[2], at)
    return s.b.constant(0, op.results[0].type.elem)


def _mask_left(s: State, mask: Value, at: Position) -> Val | None:
    """The part of a mask that is not implied by the open loops; None if all of it is implied."""
    if not mask.type.is_tile:
        return s.scalars[mask]
    conditions = s.masks.conditions(mask)
    if not conditions.complete:
        return evaluate(s, mask, at)
    result: Val | None = None
    for axis, condition in conditions.by_axis:
        key = (condition, at.index[axis].name)
        if key in s.assumptions:
            part = s.assumptions[key]
            if part is not None and axis != at.axis:
                raise Unsupported("a mask along a non-vectorized axis")
        else:
            part = _test(s, condition, at.index[axis], at.lanes if axis == at.axis else 0)
        if part is not None:
            result = part if result is None else s.b.binary("arith.andi", result, part)
    return result


def _is_true(s: State, mask: Value, index: Sequence[Val]) -> bool:
    """Whether the open loops imply ``mask``."""
    conditions = s.masks.conditions(mask)
    return conditions.complete and all(s.holds(c, index[axis]) for axis, c in conditions.by_axis)


def _test(s: State, condition: Condition, index: Val, lanes: int) -> Val:
    if condition.limit is None:
        return s.scalars[condition.offsets]
    at = Position((index,), 0, lanes) if lanes else Position((index,))
    left = evaluate(s, condition.offsets, at)
    return s.b.compare("arith.cmpi slt", left, limit_of(s, condition, left.elem))


def limit_of(s: State, condition: Condition, elem: str) -> Val:
    """The limit of a condition as a scalar of type ``elem``, the type of the offsets."""
    limit = condition.limit
    assert limit is not None
    if isinstance(limit, int):
        return s.b.constant(limit, elem)
    if not limit.type.is_tile:
        return s.scalars[limit]
    return evaluate(s, limit, Position(s.origin(len(limit.type.shape))))
