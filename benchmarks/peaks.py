"""Peak FLOP/s and bandwidth: from data sheets for a GPU, measured in the same run for a CPU."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """``flops`` and ``bytes`` per second."""

    flops: float
    bytes: float
    source: str

    def seconds(self, flops: float, size: float) -> float:
        """Minimum time by the roofline model (Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785)."""
        return max(flops / self.flops, size / self.bytes)


# Driver's device name -> (TFLOP/s float16 and bfloat16, dense, float32 accumulation; TFLOP/s IEEE float32, on AMD with
# matrix cores; GB/s), from the vendors' data sheets and white papers.
GPUS = {
    "NVIDIA A10": (125, 31.2, 600),
    "NVIDIA A100-SXM4-40GB": (312, 19.5, 1555),
    "NVIDIA A100-SXM4-80GB": (312, 19.5, 2039),
    "NVIDIA A100 80GB PCIe": (312, 19.5, 1935),
    "NVIDIA H100 80GB HBM3": (989, 67, 3350),
    "NVIDIA H100 PCIe": (756, 51, 2000),
    "NVIDIA H200": (989, 67, 4800),
    "NVIDIA B200": (2250, 75, 7700),  # an eighth of an HGX B200
    "NVIDIA L4": (121, 30.3, 300),
    "NVIDIA L40S": (362, 91.6, 864),
    # GeForce cards run 16-bit GEMMs at half rate with float32 accumulation; appendices of the white papers on GA102,
    # AD102 and RTX Blackwell
    "NVIDIA GeForce RTX 3090": (71, 35.6, 936),
    "NVIDIA GeForce RTX 4090": (165, 82.6, 1008),
    "NVIDIA GeForce RTX 5070": (61.7, 30.9, 672),
    "NVIDIA GeForce RTX 5070 Ti": (87.9, 43.9, 896),
    "NVIDIA GeForce RTX 5080": (112.6, 56.3, 960),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8, 1792),
    "AMD Instinct MI210": (181, 45.3, 1638),
    "AMD Instinct MI250X": (191.5, 47.9, 1638),  # one of two dies; each die is a device
    "AMD Instinct MI300X": (1307.4, 163.4, 5300),
    "AMD Instinct MI300X OAM": (1307.4, 163.4, 5300),
}


def peak(device: str, dtype: torch.dtype, threads: int) -> Peak | None:
    """Peak of the device; None for a GPU without a table entry."""
    if device == "cpu":
        return measured(dtype, threads)
    name = torch.cuda.get_device_name()
    if name not in GPUS:
        return None
    half, single, bandwidth = GPUS[name]
    return Peak((single if dtype == torch.float32 else half) * 1e12, bandwidth * 1e9, f"data sheet of {name}")


CALLS = 5  # of a measurement
_measured: dict[tuple[torch.dtype, int], Peak] = {}


def measured(dtype: torch.dtype, threads: int) -> Peak:
    """Best rates so far of PyTorch's 1024^3 GEMM and of a 256 MiB copy. Every call measures again, because the machine
    may have been busy before. Data that stays in the caches can exceed the copy's bandwidth."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(2, 1024, 1024).to(dtype)
        source = torch.zeros(2**28, dtype=torch.uint8)
        target = torch.empty_like(source)
        flops = 2 * 1024**3 / shortest(lambda: a @ b, CALLS)
        rate = 2 * source.numel() / shortest(lambda: target.copy_(source), CALLS)
    finally:
        torch.set_num_threads(before)
    best = _measured.get((dtype, threads), Peak(0, 0, ""))
    source_text = "best in this run: GEMM of 1024 x 1024 matrices, copy of 256 MiB"
    _measured[dtype, threads] = Peak(max(flops, best.flops), max(rate, best.bytes), source_text)
    return _measured[dtype, threads]


def shortest(call: Callable[[], object], calls: int, device: str = "cpu") -> float:
    """Seconds of the fastest of several calls on "cpu" or "cuda"."""
    times = []
    for _ in range(calls):
        if device == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            call()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return min(times)
