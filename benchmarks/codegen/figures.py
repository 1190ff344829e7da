"""Figures of a compiled kernel, as a dataclass and as a printed line."""

import collections
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.codegen import amdgcn, sass
from benchmarks.codegen.architectures import ARCHITECTURES
from benchmarks.codegen.cost import COSTS, min_bytes
from benchmarks.codegen.driver import CompiledKernel, compile_for
from benchmarks.codegen.instructions import Instruction, loops, narrow_accesses, waits
from vit_triton.tuning.shapes import DTYPES as TORCH_DTYPES

# float32 GEMMs are IEEE; "tf32" is float32 with TF32 GEMMs
DTYPES = {**TORCH_DTYPES, "tf32": torch.float32}


@dataclass(frozen=True)
class Figures:
    """Figures of a compiled kernel and of its largest launch.

    Attributes:
        local_bytes: local memory per thread, including spills.
        blocks: resident blocks per multiprocessor; ``limit`` is the limiting resource.
        per_trip: instructions of each loop, except loops that only wait.
        narrow: {source line: bytes} of global accesses of less than 16 bytes per thread.
        opcodes: static count of each opcode in the code.
        grid, trips, flops, bytes: programs, loop trips of a program, and minimum cost, computed from the arguments.
    """

    kernel: str
    hash: str
    arch: str
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    local_bytes: int
    shared_bytes: int
    shared_limit: int
    blocks: int
    limit: str
    per_trip: list[int]
    narrow: dict[str, int]
    opcodes: dict[str, int]
    grid: int
    trips: int
    flops: int
    bytes: int

    @property
    def code(self) -> Any:
        return _code(self.arch)

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.opcodes.items() if re.fullmatch(pattern, name))

    def names(self, pattern: str) -> str:
        return "+".join(sorted(name for name in self.opcodes if re.fullmatch(pattern, name))) or "-"

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "intensity": self.intensity,
            "matrix": self.names(self.code.MATRIX),
            "copies": self.count(self.code.COPIES),
        }


def _code(arch: str) -> Any:
    return amdgcn if arch.startswith("gfx") else sass


def figures(
    arch: str, dtype: str, run: Callable[[torch.dtype], None], *, only: str = "", dump: Path | None = None
) -> list[Figures]:
    """Figures of every kernel launched by ``run`` whose name contains ``only``, compiled for ``arch``. ``dump``: output
    folder for binary, assembly and figures."""
    with compile_for(arch, only) as found, precision(dtype):
        run(DTYPES[dtype])
    return [_figures(each, arch, dtype, dump) for each in found]


def tensor_columns(kernel: Any) -> int:
    """Columns of tensor memory per block of a compiled kernel."""
    return getattr(kernel.metadata, "tmem_size", 0) or 0


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Allow TF32 if ``dtype`` is "tf32"."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _figures(launched: CompiledKernel, arch: str, dtype: str, dump: Path | None) -> Figures:
    kernel, limits = launched.kernel, ARCHITECTURES[arch]
    registers, local_bytes, code = _code(arch).read(kernel)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    blocks, limit = limits.resident(registers, warps, shared, tensor_columns(kernel))
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: str(value) for path, value in kernel.src.constants.items() if len(path) == 1}
    flops_of, trips_of = COSTS[kernel.name]
    grid, arguments = max(launched.launches, key=lambda launch: min_bytes(kernel.name, launch[1]))
    result = Figures(
        kernel=kernel.name,
        hash=kernel.hash,
        arch=arch,
        dtype=dtype,
        constants=constants,
        warps=warps,
        stages=kernel.metadata.num_stages,
        registers=registers,
        local_bytes=local_bytes,
        shared_bytes=shared,
        shared_limit=limits.shared,
        blocks=blocks,
        limit=limit,
        per_trip=_per_trip(code),
        narrow=narrow_accesses(code),
        opcodes=dict(collections.Counter(instruction.opcode for instruction in code)),
        grid=grid,
        trips=trips_of(arguments),
        flops=flops_of(arguments),
        bytes=min_bytes(kernel.name, arguments),
    )
    if dump is not None:
        stem = f"{kernel.name}-{arch}-{dtype}-{kernel.hash[:8]}"
        (dump / f"{stem}.{_code(arch).BINARY}").write_bytes(kernel.asm[_code(arch).BINARY])
        (dump / f"{stem}.{_code(arch).ASSEMBLY}").write_text(kernel.asm[_code(arch).ASSEMBLY])
        (dump / f"{stem}.json").write_text(json.dumps(result.as_json(), indent=1))
    return result


def _per_trip(code: list[Instruction]) -> list[int]:
    """Instructions of each loop, except loops that only wait."""
    return sorted((len(body) for body in loops(code) if not waits(code, body)), reverse=True)


HEADER = (
    f"{'arch':<7}{'dtype':<9} {'kernel':<30}{'tile':<12}{'warps':>5}{'regs':>5}{'spilled':>8}{'shared KiB':>13}"
    f"{'CTAs':>5} limited by    {'matrix':<14}{'copies':>6}{'code':>6}{'a trip':>7}{'trips':>6}{'grid':>6}"
    f"{'MFLOP':>9}{'MB':>7}{'FLOP/B':>7}  narrowest"
)


def line(found: Figures) -> str:
    tile = "x".join(value for name, value in found.constants.items() if name.startswith("BLOCK_"))
    shared = f"{found.shared_bytes / 1024:.1f} of {found.shared_limit // 1024}"
    matrix = found.names(found.code.MATRIX)
    if found.arch.startswith("gfx") and matrix != "-":
        matrix = "MFMA"
    return (
        f"{found.arch:<7}{found.dtype:<9} {found.kernel.removesuffix('_kernel'):<30}{tile:<12}{found.warps:>5}"
        f"{found.registers:>5}{found.local_bytes:>8}{shared:>13}{found.blocks:>5} {found.limit:<14}{matrix:<14}"
        f"{found.count(found.code.COPIES):>6}{sum(found.opcodes.values()):>6}{max(found.per_trip, default=0):>7}"
        f"{found.trips:>6}{found.grid:>6}{found.flops / 1e6:>9.1f}{found.bytes / 1e6:>7.2f}{found.intensity:>7.1f}"
        f"{min(found.narrow.values(), default=16):>11}"
    )
