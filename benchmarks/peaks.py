"""The most a device can do: from data sheets for GPUs, measured in the same run for a CPU."""

import functools
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
        """The least time the roofline allows (Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785)."""
        return max(flops / self.flops, size / self.bytes)


# NVIDIA's data sheets: name as CUDA reports it, TFLOP/s of float16 and bfloat16 on tensor cores (dense, float32 sums), of
# float32 outside them, GB/s.
GPUS = {
    "NVIDIA A100-SXM4-40GB": (312, 19.5, 1555),
    "NVIDIA A100-SXM4-80GB": (312, 19.5, 2039),
    "NVIDIA A100 80GB PCIe": (312, 19.5, 1935),
    "NVIDIA H100 80GB HBM3": (989, 67, 3350),
    "NVIDIA H100 PCIe": (756, 51, 2000),
    "NVIDIA H200": (989, 67, 4800),
    "NVIDIA L4": (121, 30.3, 300),
    "NVIDIA L40S": (362, 91.6, 864),
    "NVIDIA GeForce RTX 4090": (165, 82.6, 1008),
}


def peak(device: str, dtype: torch.dtype, threads: int) -> Peak | None:
    """None for a GPU that is not in the table."""
    if device == "cpu":
        return measured(dtype, threads)
    name = torch.cuda.get_device_name()
    if name not in GPUS:
        return None
    half, single, bandwidth = GPUS[name]
    return Peak((single if dtype == torch.float32 else half) * 1e12, bandwidth * 1e9, f"data sheet of {name}")


@functools.cache
def measured(dtype: torch.dtype, threads: int) -> Peak:
    """The best of a few runs of a 2048^3 product and of a copy of 256 MiB, by PyTorch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(2, 2048, 2048).to(dtype)
        source = torch.zeros(2**28, dtype=torch.uint8)
        target = torch.empty_like(source)
        flops = 2 * 2048**3 / _best(lambda: a @ b)
        rate = 2 * source.numel() / _best(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(before)
    return Peak(flops, rate, "measured in this run: a product of 2048 x 2048 matrices and a copy of 256 MiB by PyTorch")


def _best(call: Callable[[], object]) -> float:
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
