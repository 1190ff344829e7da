"""Loads, stores and buffers: the MLIR of memory accesses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vit_triton.cpu.builder import Builder, Val, mlir_type
from vit_triton.cpu.ttir import Type, Unsupported

ALIGN = 64
BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "ptr": 8}


@dataclass(frozen=True)
class Buffer:
    """A row-major tile in memory; ``stride`` is the distance of rows in elements."""

    pointer: Val
    elem: str
    stride: int


class Scratch:
    """A stack allocator for the scratch memory of a thread; reset ``used`` to free the last allocations."""

    def __init__(self, builder: Builder, pointer: Val, spare_rows: int) -> None:
        """``spare_rows``: see :attr:`.features.Block.spare_rows`."""
        self.b, self.pointer, self.spare_rows = builder, pointer, spare_rows
        self.used = self.most_used = 0  # bytes

    def reserve(self, size: int) -> Val:
        """Allocate ``size`` bytes and return the address."""
        start = self.used
        self.used = -(-(start + size + ALIGN) // ALIGN) * ALIGN
        self.most_used = max(self.most_used, self.used)
        return self.b.gep(self.pointer, self.b.index(start), "i8")

    def allocate(self, type_: Type) -> Buffer:
        columns = type_.shape[-1]
        stride = columns
        if len(type_.shape) > 1 and columns * BYTES[type_.elem] >= 1024:
            stride += ALIGN // BYTES[type_.elem]  # rows at a distance of a power of two share cache sets
        rows = math.prod(type_.shape[:-1]) + (self.spare_rows if len(type_.shape) == 2 else 0)
        return Buffer(self.reserve(rows * stride * BYTES[type_.elem]), type_.elem, stride)


def load_scalar(b: Builder, pointer: Val, elem: str) -> Val:
    return b.read(f"llvm.load {{0}} : !llvm.ptr -> {mlir_type(elem)}", (pointer,), elem)


def store_scalar(b: Builder, value: Val, pointer: Val) -> None:
    b.effect(f"llvm.store {{0}}, {{1}} : {value.type}, !llvm.ptr", (value, pointer))


def load_vector(b: Builder, pointer: Val, elem: str, lanes: int) -> Val:
    """Load ``lanes`` consecutive elements; an i1 is stored in a byte."""
    stored = "i8" if elem == "i1" else elem
    text = f"llvm.load {{0}} {{{{alignment = {BYTES[elem]} : i64}}}} : !llvm.ptr -> {mlir_type(stored, lanes)}"
    value = b.read(text, (pointer,), stored, lanes)
    return b.convert("arith.trunci", value, "i1") if elem == "i1" else value


def store_vector(b: Builder, value: Val, pointer: Val, mask: Val | None = None) -> None:
    value = _storable(b, value)
    if mask is None:
        text = f"llvm.store {{0}}, {{1}} {{{{alignment = {BYTES[value.elem]} : i64}}}} : {value.type}, !llvm.ptr"
        b.effect(text, (value, pointer))
        return
    text = f"llvm.intr.masked.store {{0}}, {{1}}, {{2}} {{{{alignment = {BYTES[value.elem]} : i32}}}}"
    b.effect(f"{text} : {value.type}, {mask.type} into !llvm.ptr", (value, pointer, mask))


def masked_load(b: Builder, pointer: Val, mask: Val, other: Val) -> Val:
    """Load consecutive elements where ``mask`` is true; ``other`` elsewhere."""
    text = f"llvm.intr.masked.load {{0}}, {{1}}, {{2}} {{{{alignment = {BYTES[other.elem]} : i32}}}}"
    types = f"(!llvm.ptr, {mask.type}, {other.type}) -> {other.type}"
    return b.read(f"{text} : {types}", (pointer, mask, other), other.elem, other.lanes)


def gather(b: Builder, pointers: Val, mask: Val, other: Val) -> Val:
    """Load an element from each address where ``mask`` is true; ``other`` elsewhere."""
    text = f"llvm.intr.masked.gather {{0}}, {{1}}, {{2}} {{{{alignment = {BYTES[other.elem]} : i32}}}}"
    types = f"({pointers.type}, {mask.type}, {other.type}) -> {other.type}"
    return b.read(f"{text} : {types}", (pointers, mask, other), other.elem, other.lanes)


def scatter(b: Builder, value: Val, pointers: Val, mask: Val) -> None:
    value = _storable(b, value)
    text = f"llvm.intr.masked.scatter {{0}}, {{1}}, {{2}} {{{{alignment = {BYTES[value.elem]} : i32}}}}"
    b.effect(f"{text} : {value.type}, {mask.type} into {pointers.type}", (value, pointers, mask))


def _storable(b: Builder, value: Val) -> Val:
    return b.convert("arith.extui", value, "i8") if value.elem == "i1" else value


def address(b: Builder, buffer: Buffer, shape: Sequence[int], index: Sequence[Val]) -> Val:
    """The address of the element at ``index`` of a tile of ``shape``."""
    pointer, stride = buffer.pointer, buffer.stride
    for axis in range(len(index) - 2, -1, -1):
        pointer = b.gep(pointer, b.mul(index[axis], b.index(stride)), buffer.elem)
        stride *= shape[axis]
    return b.gep(pointer, index[-1], buffer.elem)


def read_buffer(
    b: Builder, buffer: Buffer, shape: Sequence[int], index: Sequence[Val], axis: int | None, lanes: int
) -> Val:
    """The element at ``index``, or ``lanes`` elements along ``axis`` starting there."""
    pointer = address(b, buffer, shape, index)
    if axis is None:
        value = load_scalar(b, pointer, "i8" if buffer.elem == "i1" else buffer.elem)
        return b.convert("arith.trunci", value, "i1") if buffer.elem == "i1" else value
    if axis == len(shape) - 1:
        return load_vector(b, pointer, buffer.elem, lanes)
    if buffer.elem == "i1":
        raise Unsupported("a transposed mask that is materialized")
    steps = b.binary("arith.muli", b.iota("i64", lanes), b.index(buffer.stride))
    pointers = b.gep(pointer, steps, buffer.elem)
    return gather(b, pointers, b.constant(True, "i1", lanes), b.constant(0, buffer.elem, lanes))


def prefetch_line(b: Builder, pointer: Val, *, write: bool) -> None:
    attributes = f"<{{{{cache = 1 : i32, hint = 3 : i32, rw = {int(write)} : i32}}}}>"
    b.effect(f'"llvm.intr.prefetch"({{0}}) {attributes} : (!llvm.ptr) -> ()', (pointer,))
