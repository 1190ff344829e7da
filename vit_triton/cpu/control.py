"""Control flow pass: scf.for and scf.if of the TTIR. Their bodies are lowered by ``lower_region``.

Loop-carried scalars are MLIR values and loop-carried tiles are buffers. Tiles of pointers and offsets that advance by a
uniform step (inductions) are represented by the accumulated step. The results of a branch are in memory.
"""

import enum
from collections.abc import Callable, Iterable
from typing import NamedTuple

from vit_triton.cpu.buffers import buffers_read, is_in_place, materialize_deferred, write
from vit_triton.cpu.builder import Val
from vit_triton.cpu.expressions import evaluate
from vit_triton.cpu.memory import ALIGN, Buffer, load_scalar, store_scalar
from vit_triton.cpu.panels import fits_tiles
from vit_triton.cpu.state import Position, State
from vit_triton.cpu.ttir import Op, Region, Unsupported, Value, walk

LowerRegion = Callable[[State, Region], None]


class _Kind(enum.Enum):
    SCALAR = enum.auto()
    INDUCTION = enum.auto()
    TILE = enum.auto()


class _Carried(NamedTuple):
    """A loop-carried value: ``argument`` in this iteration, ``new`` in the next (the step of an induction), and
    ``result`` after the loop."""

    kind: _Kind
    argument: Value
    new: Value
    result: Value


def for_loop(s: State, op: Op, lower_region: LowerRegion) -> None:
    b, body = s.b, op.regions[0]
    _before_stores(s, op)
    carried: list[_Carried] = []
    starts: list[Val] = []
    sums: list[Value] = []
    low, high, step_val = (s.scalars[v] for v in op.operands[:3])
    values = zip(body.arguments[1:], op.operands[3:], body.yielded, op.results, strict=True)
    for argument, init, new, result in values:
        if not argument.type.is_tile:
            carried.append(_Carried(_Kind.SCALAR, argument, new, result))
            starts.append(s.scalars[init])
        elif argument in s.axes.inductions:
            step = s.axes.inductions[argument].operands[1]
            carried.append(_Carried(_Kind.INDUCTION, argument, step, result))
            starts.append(b.constant(0, step.type.elem))
        else:
            carried.append(_Carried(_Kind.TILE, argument, new, result))
            if _is_sum_of_tile_products(s, argument, init, new):
                s.buffers[argument] = s.scratch.allocate(init.type)
                with b.when(b.compare("arith.cmpi sge", low, high)):
                    write(s, init, s.buffers[argument])
                sums.append(argument)
            else:
                s.buffers[argument] = _own_buffer(s, init, op)
    with b.loop(low, high, step_val, starts) as loop, s.scope():
        s.scalars[body.arguments[0]] = loop.index
        for argument in sums:
            s.first_trip[argument] = b.compare("arith.cmpi eq", loop.index, low)
        _set_values(s, carried, loop.carried)
        s.defined.update(body.arguments)
        lower_region(s, body)
        with s.evaluation():
            _carry_tiles(s, [(c.argument, c.new) for c in carried if c.kind is _Kind.TILE])
            for kind, argument, new, _ in carried:
                if kind is _Kind.SCALAR:
                    loop.next.append(s.scalars[new])
                elif kind is _Kind.INDUCTION:
                    step_now = evaluate(s, new, Position(s.origin(len(new.type.shape))))
                    loop.next.append(b.add(s.offsets[argument], step_now))
    _set_values(s, [c._replace(argument=c.result) for c in carried], loop.results)
    for kind, argument, _, result in carried:
        if kind is _Kind.TILE:
            s.buffers[result] = s.buffers[argument]
        elif kind is _Kind.INDUCTION and result.users:
            raise Unsupported("a pointer tile that is advanced in a loop and used after it")


def _set_values(s: State, carried: Iterable[_Carried], values: Iterable[Val]) -> None:
    remaining = iter(values)
    for kind, argument, _, _ in carried:
        if kind is _Kind.SCALAR:
            s.scalars[argument] = next(remaining)
        elif kind is _Kind.INDUCTION:
            s.offsets[argument] = next(remaining)


def _before_stores(s: State, op: Op) -> None:
    if any(inner.name == "tt.store" for region in op.regions for inner in walk(region)):
        materialize_deferred(s, s.sinks.position[op])


def _is_sum_of_tile_products(s: State, argument: Value, init: Value, new: Value) -> bool:
    """Whether the loop sums products in tiles of AMX, starting from 0. The first iteration then zeroes the tiles; this
    is not faster for other products."""
    dot = new.op
    if init in s.buffers or s.masks.uniform_number(init) != 0 or dot is None or dot.name != "tt.dot":
        return False
    if argument.users != [dot] or dot.operands[2] is not argument:
        return False
    return dot.parent is not None and argument in dot.parent.arguments and fits_tiles(s, dot)


def _own_buffer(s: State, init: Value, user: Op) -> Buffer:
    """A buffer with the value of ``init`` that may be overwritten."""
    if init in s.buffers and s.sinks.is_only_sink(init, user):
        return s.buffers[init]
    buffer = s.scratch.allocate(init.type)
    write(s, init, buffer)
    return buffer


def _carry_tiles(s: State, pairs: list[tuple[Value, Value]]) -> None:
    """Write the new values of loop-carried tiles into the buffers of the old ones."""
    targets = {argument: s.buffers[argument] for argument, _ in pairs}
    copies = []
    for argument, new in pairs:
        target = targets[argument]
        if s.buffers.get(new) == target:
            continue
        reads = buffers_read(s, new)
        others = reads & {*targets.values()} - {target}
        if others or target in reads and not is_in_place(s, new, target):
            saved = s.scratch.allocate(new.type)  # evaluated before old values are overwritten
            write(s, new, saved)
            s.buffers[new] = saved
        copies.append((new, target))
    for new, target in copies:
        write(s, new, target)
    s.buffers |= targets


def branch(s: State, op: Op, lower_region: LowerRegion) -> None:
    b = s.b
    _before_stores(s, op)
    buffers = {}
    for result in op.results:
        if result.type.elem == "ptr" and result.type.is_tile:
            raise Unsupported("a pointer tile as a result of scf.if")
        if result.type.is_tile:
            buffers[result] = s.scratch.allocate(result.type)
        else:
            buffers[result] = Buffer(s.scratch.reserve(ALIGN), result.type.elem, 1)
    condition = s.scalars[op.operands[0]]
    conditions = [condition, b.binary("arith.xori", condition, b.constant(True, "i1"))]
    for region, when in zip(op.regions, conditions, strict=False):
        with b.when(when), s.scope():
            lower_region(s, region)
            with b.pinned_here():
                for result, value in zip(op.results, region.yielded, strict=True):
                    if result.type.is_tile:
                        write(s, value, buffers[result])
                    else:
                        store_scalar(b, s.scalars[value], buffers[result].pointer)
    for result, buffer in buffers.items():
        if result.type.is_tile:
            s.buffers[result] = buffer
        else:
            s.scalars[result] = load_scalar(b, buffer.pointer, buffer.elem)
