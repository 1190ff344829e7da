"""Emulator for the sm_80 PTX that Triton compiles: checks compiled kernels on CPU tensors, without a GPU.

    with ptxemu.emulate(race="error"):
        kernel[grid](x, y, n, BLOCK=128)  # CPU tensors; the autotuner, heuristics and tensor descriptors work
        print(ptxemu.last_stats())  # opcodes, bytes, registers, spills

``Options`` lists the checks and the execution orders. ``poison_`` and ``unwritten`` find elements that a kernel leaves
unwritten; ``register`` allows access to buffers that are reached through addresses in memory; ``run_ptx`` runs PTX text
without Triton. Errors name the line of the Python source, the PTX instruction, the CTA and the thread. TRITON_INTERPRET
must be unset when kernels are decorated.

Not supported: time; order and rounding of sums in tensor cores (products are float32, TF32 inputs are truncated);
errors of *.approx instructions (they are exact here); incoherent caches; errors of ptxas; wgmma, TMA, mbarrier and
clusters (sm_90 and later); fp8 instructions of sm_89. A float32 fma is rounded twice, through float64; about 1 of 2^29
results differ. A float64 fma is not fused.

Implementation: ``parser`` reads PTX, ``blocks`` builds the control flow graph, ``codegen`` and ``instructions`` convert
each basic block into a numpy function over all threads of a batch of CTAs, ``scheduler`` runs the functions, ``batch``
and ``memory`` hold shared and global memory. Global memory is the process's memory, accessed through one numpy view
with bounds checks.
"""

from ptxemu.driver import emulate, last_stats, poison_, register, run_ptx, track_uninit, unwritten
from ptxemu.errors import (
    DeadlockError,
    DeviceAssert,
    MemoryFault,
    Misaligned,
    OutOfBounds,
    PtxEmuError,
    PtxSyntaxError,
    RaceDetected,
    UninitializedRead,
    UnsupportedInstruction,
)
from ptxemu.options import Options
from ptxemu.stats import LaunchStats

__all__ = [
    "DeadlockError",
    "DeviceAssert",
    "LaunchStats",
    "MemoryFault",
    "Misaligned",
    "Options",
    "OutOfBounds",
    "PtxEmuError",
    "PtxSyntaxError",
    "RaceDetected",
    "UninitializedRead",
    "UnsupportedInstruction",
    "emulate",
    "last_stats",
    "poison_",
    "register",
    "run_ptx",
    "track_uninit",
    "unwritten",
]
