"""How long a kernel takes on a GPU that is not there, computed from its machine code.

Two times. The *bound* adds up what every instruction occupies of each pipe; the busiest pipe of the fullest
multiprocessor cannot be beaten: perfect overlap, no bank conflicts, every load a hit. Code outside of loops counts in
full, though a branch may skip some of it; on sm_100 that is up to a product. The *replay* (``replay.py``) runs
the warps of one multiprocessor through their stalls, scoreboards and barriers; it does not cover tcgen05. Neither is a
measurement.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.codegen import replay
from benchmarks.codegen.program import Kernel

STAGGERS = (0, 150, 400)  # cycles between the starts of resident blocks; the median of the replays counts
DRAM_LATENCY = 200  # cycles beyond the L2 cache


@dataclass(frozen=True)
class Times:
    """Seconds of a launch: ``bound`` of its busiest ``pipe``, ``replayed`` (None where that is not modelled), and
    ``limit``, which no kernel can be faster than. ``tensor_share``: of the tensor cores' rate, what the loop with most
    products could reach at most. ``blocks`` are resident on a multiprocessor."""

    bound: float
    replayed: float | None
    limit: float
    pipe: str
    tensor_share: float | None
    blocks: int


def times(kernel: Kernel, grid: int, trips: Sequence[int], blocks: int, flops: float, n_bytes: float) -> Times:
    """Of a launch of ``grid`` blocks, of which a multiprocessor holds ``blocks``. ``trips`` of each loop; ``n_bytes``
    go through the memory."""
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
