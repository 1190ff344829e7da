"""Tiles of the normalisation kernels."""

from collections.abc import Iterable
from dataclasses import dataclass

from vit_triton.kernels.picker import cdiv, next_power_of_2, tunable
from vit_triton.kernels.target import Target

MAX_LAYER_NORM_WIDTH = 2**16


@dataclass(frozen=True)
class LayerNormConfig:
    """A tile of ``block_m`` whole rows, padded to ``block_d`` >= width columns; the backward kernel writes at most
    ``partials`` partial sums, 32 on a CPU and in the interpreter."""

    block_m: int
    block_d: int
    num_warps: int
    partials: int = 32


def check_layer_norm_width(width: int) -> None:
    """Raise ValueError if the width is not supported: one program holds a whole row in registers."""
    if not 0 < width <= MAX_LAYER_NORM_WIDTH:
        raise ValueError(f"layer_norm: width must be 1 to {MAX_LAYER_NORM_WIDTH}, got {width}")


def _candidates_layer_norm(width: int, target: Target) -> Iterable[LayerNormConfig]:
    block_d = next_power_of_2(width)
    for num_warps in (1, 2, 4, 8, 16, 32):
        for per_thread in (8, 16, 32):
            rows = num_warps * 32 * per_thread // block_d
            if 1 <= rows <= 16:
                yield LayerNormConfig(rows, block_d, num_warps, backward_programs(target))


def backward_programs(target: Target) -> int:
    """Programs of a backward kernel that fill a GPU, four of four warps per multiprocessor; `sum_parts` adds up to 512
    partial sums in one step (benchmarks codegen)."""
    return min(512, 4 * (target.multiprocessors or 132))


@tunable(LayerNormConfig, candidates=_candidates_layer_norm)
def pick_layer_norm(width: int, target: Target) -> LayerNormConfig:
    """Tiles of both LayerNorm kernels."""
    block_d = next_power_of_2(width)
    if target.family == "interpreter":
        # 2**17 elements: fewer programs for large inputs, without padding small inputs to 2**20 elements
        return LayerNormConfig(max(1, 2**17 // block_d), block_d, 4)
    if target.family == "cpu":
        # a row, and in the backward pass the column sums, stay in the L1 cache between passes
        return LayerNormConfig(1, block_d, 1)
    # 16 elements per thread: two 16-byte loads of bfloat16, and the backward kernel does not spill (benchmarks codegen)
    num_warps = 4 if block_d <= 1024 else min(16, block_d // 256) if block_d <= 8192 else 32
    return LayerNormConfig(max(1, min(16, num_warps * 512 // block_d)), block_d, num_warps, backward_programs(target))


def pick_qk_norm(head_dim: int, target: Target) -> LayerNormConfig:
    """Tiles of both kernels that normalise queries and keys: many short rows of ``head_dim`` elements."""
    block_d = next_power_of_2(head_dim)
    if target.family == "interpreter":
        return pick_layer_norm(head_dim, target)
    if target.family == "cpu":
        return LayerNormConfig(max(1, 1024 // block_d), block_d, 1)
    per_thread = 8 if target.family == "sm_100" else 16  # with 16 the backward kernel spills on sm_100
    return LayerNormConfig(max(1, min(128, 128 * per_thread // block_d)), block_d, 4, backward_programs(target))


def layer_norm_stretch(n_rows: int, config: LayerNormConfig) -> tuple[int, int]:
    """(programs, steps of ``block_m`` rows per program) of the backward kernel: at most ``partials`` programs."""
    n_blocks = cdiv(n_rows, config.block_m)
    n_steps = max(1, cdiv(n_blocks, config.partials))
    return cdiv(n_blocks, n_steps), n_steps
