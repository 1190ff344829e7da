"""Computed time of a kernel on a GPU, from its machine code.

The *bound* sums the cycles of all instructions on each pipe; the busiest pipe of the fullest multiprocessor is a lower
bound of the time. It assumes perfect overlap, no bank conflicts and cache hits only. Code outside of loops counts in
full, even if a branch skips part of it; on sm_100 this adds up to one GEMM step. The *replay* (``replay.py``) simulates
the warps of one multiprocessor with stalls, scoreboards and barriers; tcgen05 is not supported. Neither is a
measurement.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.codegen import replay
from benchmarks.codegen.program import Kernel

STAGGERS = (0, 150, 400)  # cycles between the starts of resident blocks; the result is the median of these replays
DRAM_LATENCY = 200  # cycles in addition to the L2 cache's latency


@dataclass(frozen=True)
class Times:
    """Computed times of a launch in seconds.

    Attributes:
        bound: lower bound from the busiest ``pipe``.
        replayed: time of the replay; None if not supported.
        limit: lower bound from FLOPs and bytes.
        tensor_share: maximum share of the tensor cores' rate in the loop with the most matrix FLOPs.
        blocks: resident blocks per multiprocessor.
    """

    bound: float
    replayed: float | None
    limit: float
    pipe: str
    tensor_share: float | None
    blocks: int

    @property
    def seconds(self) -> float:
        """The replay, or the bound where there is none."""
        return self.bound if self.replayed is None else self.replayed


def times(kernel: Kernel, grid: int, trips: Sequence[int], blocks: int, flops: float, n_bytes: float) -> Times:
    """Times of a launch of ``grid`` blocks with ``blocks`` resident per multiprocessor. ``trips``: trips of each loop;
    ``n_bytes``: memory traffic."""
    gpu = kernel.gpu
    fullest = math.ceil(grid / gpu.multiprocessors)
    resident = min(blocks, fullest)
    one = kernel.cycles(kernel.once, 1)
    for loop, n in zip(kernel.loops, trips, strict=True):
        outer = [m for other, m in zip(kernel.loops, trips, strict=True) if loop.body < other.body]
        for pipe, cycles in kernel.cycles(loop.own, 1).items():
            one[pipe] += n * math.prod(outer) * cycles
    pipe = max(one, key=lambda pipe: one[pipe])
    bound = fullest * one[pipe]
    replayed = None
    if kernel.replays:
        runs = (
            replay.extrapolated(kernel, trips, resident, fullest, dram_latency=DRAM_LATENCY, stagger=stagger)
            for stagger in STAGGERS
        )
        replayed = max(bound, statistics.median(runs))
    memory = n_bytes / (gpu.bandwidth * 1e9)
    second = 1 / (gpu.clock * 1e9)
    return Times(
        bound=max(bound * second, memory),
        replayed=None if replayed is None else max(replayed * second, memory),
        limit=gpu.limit(flops, n_bytes),
        pipe=pipe,
        tensor_share=kernel.tensor_share(),
        blocks=resident,
    )
