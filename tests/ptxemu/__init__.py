"""Runs the sm_80 PTX that Triton compiles on CPU tensors: compiled kernels are checked without a GPU.

    with ptxemu.emulate(race="error"):
        kernel[grid](x, y, n, BLOCK=128)  # CPU tensors; the autotuner, heuristics and tensor descriptors work
        print(ptxemu.last_stats())  # opcodes, bytes, registers, spills

``Options`` says what can be checked, and in which order things run. ``poison_`` and ``unwritten`` find elements that a
kernel never wrote; ``register`` allows buffers reached through addresses in memory; ``run_ptx`` takes PTX text without
Triton. Errors name the line of the Python source, the PTX instruction, the CTA and the thread. TRITON_INTERPRET must
not be set when kernels are decorated.

Not modelled: times; order and rounding of the sums inside tensor cores (products are float32, inputs of TF32 are
truncated); the error of *.approx instructions (they are exact here); caches that disagree; errors of ptxas; wgmma, TMA,
mbarrier and clusters (sm_90 and later); fp8 instructions of sm_89. A float32 fma is rounded twice, through float64, and
differs in about 1 of 2^29 cases; a float64 fma is not fused.

How it works: ``parser`` reads PTX, ``blocks`` finds its control flow, ``codegen`` and ``instructions`` turn every basic
block into a numpy function over all threads of a batch of CTAs, ``scheduler`` runs them, ``batch`` and ``memory`` hold
shared and global memory. Global memory is the process's own, seen through one numpy view behind checks of bounds.
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
