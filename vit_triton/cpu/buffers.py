"""Buffers pass: evaluate tiles into memory if several sinks need them or a store would overwrite their source."""

from vit_triton.cpu.axes import RESHAPES
from vit_triton.cpu.bounds import demanded_conditions
from vit_triton.cpu.builder import Val
from vit_triton.cpu.expressions import vector
from vit_triton.cpu.loops import for_each_vector
from vit_triton.cpu.memory import Buffer, address, store_vector
from vit_triton.cpu.state import Position, State
from vit_triton.cpu.ttir import Value


def materialize(s: State, value: Value) -> None:
    """Evaluate a tile into a new buffer."""
    if value in s.buffers:
        return
    buffer = s.scratch.allocate(value.type)
    write(s, value, buffer)
    s.buffers[value] = buffer
    if value in s.deferred:
        s.deferred.remove(value)


def write(s: State, value: Value, buffer: Buffer) -> None:
    """Evaluate the part of a tile that is read into ``buffer``."""
    shape = value.type.shape

    def body(at: Position, mask: Val | None) -> None:
        # no mask: a row has space for the lanes past the bound, which are not read
        store_vector(s.b, vector(s, value, at), address(s.b, buffer, shape, at.index))

    with s.evaluation():
        for_each_vector(s, shape, demanded_conditions(s, value), len(shape) - 1, body)


def materialize_deferred(s: State, position: int) -> None:
    """Before a store: materialize deferred loads that have sinks after ``position``."""
    for value in list(s.deferred):
        if s.sinks.last_use[value] > position and value in s.deferred:
            materialize(s, value)


def leaves(s: State, value: Value) -> list[Value]:
    """The tiles in memory that an expression reads."""
    if value in s.buffers:
        return [value]
    if value.op is None or not value.type.is_tile:
        return []
    return [leaf for v in value.op.operands for leaf in leaves(s, v)]


def buffers_read(s: State, value: Value) -> set[Buffer]:
    return {s.buffers[leaf] for leaf in leaves(s, value)}


def is_in_place(s: State, value: Value, target: Buffer) -> bool:
    """Whether each element of the expression reads ``target`` only at the same index."""
    if value in s.buffers or value.op is None or not value.type.is_tile:
        return True
    if value.op.name in RESHAPES:
        return target not in buffers_read(s, value)
    return all(is_in_place(s, v, target) for v in value.op.operands)
