"""The launch block and ``entry``, the generated function that reads it.

A launch runs ``entry(launch block)`` on every thread. Each thread takes a thread number, which selects its scratch
memory, then takes chunks of programs from a shared counter until none is left, and calls ``kernel`` for each program.
The launch block is a sequence of 64-bit slots: those of ``HEADER``, then one per kernel argument.
"""

import struct
from collections.abc import Sequence
from typing import Any

from vit_triton.cpu.amx import CONFIGURATION
from vit_triton.cpu.builder import mlir_type
from vit_triton.cpu.ttir import Function

# struct formats of a slot, by argument type in the kernel's signature
_FORMATS = {
    "i1": "?7x", "u1": "?7x", "i8": "b7x", "i16": "h6x", "i32": "i4x", "i64": "q", "u8": "B7x", "u16": "H6x",
    "u32": "I4x", "u64": "Q", "fp32": "f4x", "f32": "f4x", "fp64": "d", "f64": "d",
}  # fmt: skip

# the first slots; threads increment the first two
HEADER = (
    "next_program",  # the first program not taken by a thread
    "next_thread",
    "programs",
    "chunk",  # programs per chunk
    "chunks",
    "grid_x",
    "grid_y",
    "scratch",  # the address of the scratch memory
    "scratch_size",  # bytes per thread
)


class LaunchBlock:
    """The format of a launch block; ``kinds``: argument types as in a signature, e.g. "i32", "fp32", "*fp32"."""

    def __init__(self, kinds: Sequence[str]) -> None:
        formats = ("Q" if kind[0] == "*" else _FORMATS[kind] for kind in kinds)
        packer = struct.Struct(f"={len(HEADER)}q" + "".join(formats))
        self.size, self.pack_into = packer.size, packer.pack_into

    def fill(
        self, memory: Any, arguments: Sequence[Any], programs: int, chunk: int, grid_x: int, grid_y: int,
        scratch: int, scratch_size: int,
    ) -> None:  # fmt: skip
        """Write the block of a new launch, with the slots of HEADER in order."""
        chunks = -(-programs // chunk)
        self.pack_into(memory, 0, 0, 0, programs, chunk, chunks, grid_x, grid_y, scratch, scratch_size, *arguments)


def entry(function: Function, *, configures_tiles: bool) -> list[str]:
    """The MLIR lines of ``entry`` for a kernel. ``configures_tiles``: the kernel requires AMX with CONFIGURATION; a
    configuration per program would take as long as many products."""
    lines = ["llvm.func @entry(%block: !llvm.ptr) {"]
    lines += ["%one = llvm.mlir.constant(1 : i64) : i64", "%zero = llvm.mlir.constant(0 : i64) : i64"]
    types = [mlir_type(v.type.elem) for v in function.arguments]
    kinds = dict.fromkeys(HEADER, "i64") | {"scratch": "!llvm.ptr"}
    kinds |= {f"a{i}": type_ for i, type_ in enumerate(types)}
    for number, (name, type_) in enumerate(kinds.items()):
        lines.append(f"%at_{name} = llvm.getelementptr %block[{number}] : (!llvm.ptr) -> !llvm.ptr, i64")
        if name in ("next_program", "next_thread"):
            continue
        if type_ == "i1":
            lines.append(f"%byte_{name} = llvm.load %at_{name} : !llvm.ptr -> i8")
            lines.append(f"%{name} = arith.trunci %byte_{name} : i8 to i1")
        else:
            lines.append(f"%{name} = llvm.load %at_{name} : !llvm.ptr -> {type_}")
    if configures_tiles:
        lines += [
            "%configuration = llvm.alloca %one x vector<8xi64> {alignment = 64 : i64} : (i64) -> !llvm.ptr",
            f"%whole_tiles = arith.constant dense<{CONFIGURATION}> : vector<8xi64>",
            "llvm.store %whole_tiles, %configuration : vector<8xi64>, !llvm.ptr",
            'llvm.call_intrinsic "llvm.x86.ldtilecfg"(%configuration) : (!llvm.ptr) -> ()',
        ]
    args = "".join(f"%a{i}, " for i in range(len(types)))
    signature = "".join(f"{t}, " for t in types) + "i32, " * 6 + "!llvm.ptr"
    lines += [
        "%thread = llvm.atomicrmw add %at_next_thread, %one monotonic : !llvm.ptr, i64",
        "%shift = arith.muli %thread, %scratch_size : i64",
        "%own_scratch = llvm.getelementptr %scratch[%shift] : (!llvm.ptr, i64) -> !llvm.ptr, i8",
        "%grid_xy = arith.muli %grid_x, %grid_y : i64",
        "%grid_z = arith.divui %programs, %grid_xy : i64",
        "%x32 = arith.trunci %grid_x : i64 to i32",
        "%y32 = arith.trunci %grid_y : i64 to i32",
        "%z32 = arith.trunci %grid_z : i64 to i32",
        "scf.for %c = %zero to %chunks step %one : i64 {",
        "%start = llvm.atomicrmw add %at_next_program, %chunk monotonic : !llvm.ptr, i64",
        "%stop_ = arith.addi %start, %chunk : i64",
        "%stop = arith.minsi %stop_, %programs : i64",
        "scf.for %p = %start to %stop step %one : i64 {",
        "%px = arith.remui %p, %grid_x : i64",
        "%pr = arith.divui %p, %grid_x : i64",
        "%py = arith.remui %pr, %grid_y : i64",
        "%pz = arith.divui %pr, %grid_y : i64",
        "%px32 = arith.trunci %px : i64 to i32",
        "%py32 = arith.trunci %py : i64 to i32",
        "%pz32 = arith.trunci %pz : i64 to i32",
        f"llvm.call @kernel({args}%px32, %x32, %py32, %y32, %pz32, %z32, %own_scratch) : ({signature}) -> ()",
        "}",
        "}",
        *(['llvm.call_intrinsic "llvm.x86.tilerelease"() : () -> ()'] if configures_tiles else []),
        "llvm.return",
        "}",
    ]
    return lines
