"""Published figures of NVIDIA GPUs, and instruction rates.

A rate is the number of cycles that one warp's instruction occupies a pipe in one of the multiprocessor's four parts.
Sources:

- fp32, integers, special functions and shuffles: CUDA C++ Best Practices Guide, table of arithmetic throughput.
  ptxas encodes the same rates as stall counts in runs of one opcode.
- F2FP (two float32 to a pair of 16-bit numbers) on the integer pipe: Nsight Compute guide. Published measurements: 2
  cycles on an A100, 4 on sm_100; the latter is the least certain rate.
- HMMA: A100 whitepaper (1024 FMA a cycle and multiprocessor); two thirds of wgmma on sm_90 (FlashAttention-3 paper, and
  6 cycles of stall from ptxas); 8 cycles of stall from ptxas on sm_100.
- wgmma: 2048 FMA a cycle and multiprocessor (989 TFLOP/s of 132 at 1.83 GHz); tcgen05: 4096 (2250 TFLOP/s of 148 at
  1.856 GHz).
"""

from dataclasses import dataclass

from benchmarks.codegen.architectures import ARCHITECTURES, Architecture

SHARED_BYTES, GLOBAL_BYTES = 128, 64  # bytes per cycle and multiprocessor: shared memory, L2 cache
PARTS = 4  # parts of a multiprocessor, each with a scheduler


@dataclass(frozen=True)
class Rates:
    """Cycles per instruction: ``fp32``, packed 16-bit (``half``), HMMA.16816 (``hmma``), IMAD, other integers, special
    functions. ``tensor``: 16-bit FMA per cycle and multiprocessor of the architecture's native matrix instruction."""

    fp32: int
    half: int
    hmma: int
    tensor: int
    imad: int = 2
    integer: int = 2
    special: int = 8


RATES = {
    "sm_80": Rates(fp32=2, half=1, hmma=8, tensor=1024),
    "sm_86": Rates(fp32=1, half=2, hmma=16, tensor=512),
    "sm_89": Rates(fp32=1, half=2, hmma=16, tensor=512),
    "sm_90": Rates(fp32=1, half=1, hmma=6, tensor=2048),
    "sm_100": Rates(fp32=1, half=2, hmma=8, tensor=4096),
}


@dataclass(frozen=True)
class GPU:
    """``clock``: GHz that the data sheet's peak refers to; ``bandwidth``: memory bandwidth in GB/s."""

    arch: str
    multiprocessors: int
    clock: float
    bandwidth: int

    @property
    def rates(self) -> Rates:
        return RATES[self.arch]

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.arch]

    @property
    def peak(self) -> float:
        """Dense 16-bit FLOP/s."""
        return 2 * self.rates.tensor * self.multiprocessors * self.clock * 1e9

    def limit(self, flops: float, n_bytes: float) -> float:
        """Lower bound in seconds: FLOPs at the peak rate or bytes at the memory bandwidth, whichever is larger."""
        return max(flops / self.peak, n_bytes / (self.bandwidth * 1e9))


GPUS = {
    "A100": GPU("sm_80", 108, 1.41, 2039),
    "A10": GPU("sm_86", 72, 1.695, 600),
    "L40S": GPU("sm_89", 142, 2.52, 864),
    "H100": GPU("sm_90", 132, 1.83, 3350),
    "H200": GPU("sm_90", 132, 1.83, 4800),
    "B200": GPU("sm_100", 148, 1.856, 7700),
}
