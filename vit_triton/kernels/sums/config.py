"""Tiles of ``sum_parts_kernel``."""

from collections.abc import Iterable
from dataclasses import dataclass

from vit_triton.kernels.picker import next_power_of_2, tunable
from vit_triton.kernels.target import Target


@dataclass(frozen=True)
class SumConfig:
    """A tile of ``block_p`` partial sums of ``block`` elements each."""

    block_p: int
    block: int
    num_warps: int


def _candidates_sum_parts(n_parts: int, target: Target) -> Iterable[SumConfig]:
    for block in (8, 16, 32, 64, 128, 256):
        for most in (8, 32, 64, 512):
            yield SumConfig(min(most, next_power_of_2(n_parts)), block, 4)


@tunable(SumConfig, candidates=_candidates_sum_parts)
def pick_sum_parts(n_parts: int, target: Target) -> SumConfig:
    """Tiles of ``sum_parts_kernel``."""
    if target.family == "interpreter":
        return SumConfig(min(1024, next_power_of_2(n_parts)), 1024, 4)
    if target.family == "cpu":
        return SumConfig(min(32, next_power_of_2(n_parts)), 256, 1)
    # many partials (a LayerNorm's 432 of 768 elements) need many loads at once and small blocks, to fill the GPU (2
    # instead of 9 us on an A100, benchmarks codegen); few partials belong to a large weight
    block_p = min(512, next_power_of_2(n_parts))
    return SumConfig(block_p, 8 if block_p == 512 else 16 if block_p >= 32 else 2048 // block_p, 4)
