"""Resources of a multiprocessor by architecture, and the number of resident blocks of a kernel."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from vit_triton.kernels.target import target_named


@dataclass(frozen=True)
class Architecture:
    """A multiprocessor (compute unit).

    Attributes:
        matrix: regular expression for the opcodes of its matrix instructions.
        shared: maximum bytes of shared memory per block.
        shared_all: bytes of shared memory per multiprocessor, including ``shared_system`` bytes reserved per block.
        warps: maximum warps per scheduler.
        blocks: maximum blocks per multiprocessor.
        registers: 32-bit registers per scheduler, allocated to a warp in units of ``granule``.
        columns: columns of tensor memory (tcgen05).

    NVIDIA: CUDA C++ Programming Guide, table of compute capabilities. AMD: CDNA 2 and 3 instruction set guides, and
    LLVM's AMDGPU usage guide; vector and accumulation registers share the same 512.
    """

    target: GPUTarget
    matrix: str
    shared: int
    shared_all: int
    shared_system: int
    warps: int
    blocks: int
    registers: int = 16384
    granule: int = 256
    schedulers: int = 4
    columns: int = 512

    def resident(self, registers: int, warps: int, shared: int, columns: int = 0) -> tuple[int, str]:
        """(number of resident blocks, limiting resource) for blocks of ``warps`` warps with ``registers`` registers per
        thread, ``shared`` bytes of shared memory and ``columns`` of tensor memory."""
        of_a_warp = max(1, -(-registers * self.target.warp_size // self.granule)) * self.granule
        room = {
            "registers": self.registers // of_a_warp * self.schedulers // warps,
            "shared memory": self.shared_all // max(1, shared + self.shared_system),
            "warps": self.warps * self.schedulers // warps,
            "blocks": self.blocks,
            "tensor memory": self.columns // columns if columns else self.blocks,
        }
        limit = min(room, key=lambda name: room[name])
        return room[limit], limit


def _nvidia(number: int, matrix: str, warps: int, blocks: int) -> Architecture:
    shared, system = target_named(f"sm_{number}").shared_memory, 1024
    return Architecture(GPUTarget("cuda", number, 32), matrix, shared, shared + system, system, warps // 4, blocks)


def _amd(name: str) -> Architecture:
    shared = target_named(name).shared_memory
    target = GPUTarget("hip", name, 64)
    return Architecture(target, r"v_mfma\w*", shared, shared, 0, 8, 32, registers=512 * 64, granule=8 * 64)


ARCHITECTURES = {
    "sm_80": _nvidia(80, "HMMA", 64, 32),
    "sm_86": _nvidia(86, "HMMA", 48, 16),
    "sm_87": _nvidia(87, "HMMA", 48, 16),
    "sm_89": _nvidia(89, "HMMA", 48, 24),
    "sm_90": _nvidia(90, "HGMMA", 64, 32),
    "sm_100": _nvidia(100, r"UTC\w*MMA", 64, 32),
    "sm_120": _nvidia(120, "HMMA", 48, 24),
    "gfx90a": _amd("gfx90a"),
    "gfx942": _amd("gfx942"),
}
