"""Tiles of the attention kernels."""

import bisect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vit_triton.kernels.picker import CompilerOptions, cdiv, clip, next_power_of_2, time_of, tunable
from vit_triton.kernels.target import Target


@dataclass(frozen=True)
class AttentionConfig(CompilerOptions):
    """A tile of ``block_m`` query rows and ``block_n`` keys per step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 255


def split_head_dim(head_dim: int, dtype: torch.dtype, target: Target) -> tuple[int, int]:
    """Powers of two (main, tail) that cover ``head_dim``: 72 -> (64, 16), 96 -> (64, 32), 64 -> (64, 0).

    tl.dot requires tile sizes that are powers of two of at least 16; the tail avoids padding 72 to 128.
    """
    whole = max(16, next_power_of_2(head_dim))
    main = whole // 2
    tail = max(16, next_power_of_2(head_dim - main))
    if main < 16 or main + tail >= whole:
        return whole, 0
    if dtype == torch.float32 and main + tail > 80 and target.is_nvidia:
        return whole, 0  # FMA dots on NVIDIA hold both operands in registers; two tiles spill (benchmarks codegen)
    return main, tail


def attention_tail(length: int, block: int) -> int:
    """Width of the masked step after the full blocks of size ``block``: 0 or a power of two of at least 16."""
    rest = length % block
    return max(16, next_power_of_2(rest)) if rest else 0


def _pick_interpreted_attention(n_rows: int, n_cols: int) -> AttentionConfig:
    block_m = min(256, max(16, next_power_of_2(n_rows)))
    block_n = min(256, max(16, next_power_of_2(n_cols)))
    return AttentionConfig(block_m, block_n, 4, 1)


def _pick_cpu_attention(n_rows: int, n_cols: int, block_m: int, block_n: int) -> AttentionConfig:
    """The tile of scores fits in the L2 cache together with its keys and values."""
    return AttentionConfig(clip(block_m, n_rows), clip(block_n, n_cols), 1, 1)


# block_m, block_n, num_warps, num_stages, and max_registers where there is a limit
Tile = tuple[int, int, int, int] | tuple[int, int, int, int, int]
Row = tuple[Tile, Tile, Tile, Tile, Tile]  # entry i: head sizes up to _HEAD_DIMS[i]
_HEAD_DIMS = (64, 96, 128, 192, 256)


@dataclass(frozen=True)
class AttentionTiles:
    """Tiles of one kernel: per target family for 16-bit dtypes, per vendor for float32. ``small_float32`` overrides
    ``nvidia_float32`` on GPUs with at most 99 KiB of shared memory per block."""

    sm_80: Row
    sm_90: Row
    sm_100: Row
    gfx: Row
    nvidia_float32: Row
    amd_float32: Row
    small_float32: Row | None = None

    def row(self, dtype: torch.dtype, target: Target) -> Row:
        if dtype != torch.float32:
            row: Row = getattr(self, target.family)
            return row
        if not target.is_nvidia:
            return self.amd_float32
        small = self.small_float32 if target.has_small_shared_memory else None
        return small or self.nvidia_float32

    def tile(self, head_dim: int, dtype: torch.dtype, target: Target) -> "AttentionConfig":
        covered = sum(split_head_dim(head_dim, dtype, target))
        return AttentionConfig(*self.row(dtype, target)[bisect.bisect_left(_HEAD_DIMS, covered)])

    def all(self, float32: bool) -> Iterable[Tile]:
        rows = (self.nvidia_float32, self.amd_float32, self.small_float32 or ()) if float32 else ()
        return itertools.chain(*(rows or (self.sm_80, self.sm_90, self.sm_100, self.gfx)))


# Selected from the generated machine code (python -m benchmarks codegen --all, and --time for ViT-B/16): no bfloat16
# tile spills at these head sizes, tiles of 64 rows use the architecture's native matrix instruction, and loads are
# asynchronous. Comments about registers, spills and resident blocks below come from the same command.
_FWD = AttentionTiles(
    # 128 x 64 is limited by the tensor cores; its accumulators spill for head sizes above 64
    sm_80=((128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2), (64, 16, 4, 2), (32, 32, 8, 1)),
    # wgmma requires 64 rows; four resident blocks, which need 32 keys per step for head sizes above 64
    sm_90=((64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 4, 2), (64, 32, 4, 2)),
    # head size 104 spills with 64 keys per step
    sm_100=((128, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
    gfx=((128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    # IEEE dots use FMA with both operands in registers: larger tiles spill
    nvidia_float32=((32, 32, 4, 2), (32, 32, 4, 2), (16, 64, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1)),
    amd_float32=((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1)),
)
_FWD_DROPOUT = replace(  # Philox needs registers in addition to those of the tile
    _FWD,
    sm_80=((64, 64, 4, 2, 168), (64, 64, 4, 2), (64, 16, 8, 2), (64, 16, 4, 2), (16, 32, 4, 1)),
    sm_90=((64, 64, 4, 2, 128), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
    sm_100=((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
    gfx=((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
)
# above 512 keys, 128 x 64 with eight warps and two resident blocks is faster (benchmarks codegen --time)
_LONG_FWD = {"sm_90": AttentionConfig(128, 64, 8, 3, max_registers=128)}
_BWD_DQ = AttentionTiles(
    # three resident blocks. Head size 72: 64 x 64 is faster on sm_80 but spills on sm_86
    sm_80=((64, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
    # five resident blocks
    sm_90=((64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 4, 2), (64, 32, 4, 2), (64, 16, 4, 2)),
    sm_100=((128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
    gfx=((64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
    nvidia_float32=((64, 32, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1)),
    amd_float32=((32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    small_float32=((64, 32, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
)
_BWD_DQ_DROPOUT = replace(
    _BWD_DQ,
    sm_80=((64, 32, 4, 3, 168), (64, 32, 4, 3), (32, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
    sm_90=((64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 16, 4, 2)),
    sm_100=((64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
)
_BWD_DKDV = AttentionTiles(  # block_m query rows per step, block_n keys per program
    # 128 keys spill
    sm_80=((32, 64, 4, 3), (32, 64, 4, 3), (32, 32, 4, 3), (16, 16, 4, 2), (32, 16, 8, 2)),
    sm_90=((32, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 3), (32, 16, 4, 3), (32, 16, 8, 2)),
    # head size 96: 32 x 64 with four warps spills
    sm_100=((32, 128, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
    gfx=((32, 64, 4, 2), (32, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 1), (32, 64, 8, 1)),
    nvidia_float32=((64, 32, 8, 1), (64, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
    amd_float32=((32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    # head sizes above 128: tiles without spills need more than 99 KiB of shared memory; these spill
    small_float32=((64, 32, 8, 1), (64, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
)
_BWD_DKDV_DROPOUT = replace(
    _BWD_DKDV,
    sm_80=((32, 64, 4, 3), (16, 64, 4, 3), (32, 32, 8, 1), (16, 16, 4, 2), (32, 16, 8, 2)),
    sm_90=((32, 64, 4, 3, 168), (32, 64, 4, 2), (16, 64, 4, 2), (32, 16, 4, 3), (32, 16, 8, 2)),
    sm_100=((32, 64, 4, 2), (16, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
    nvidia_float32=((64, 32, 8, 1), (64, 32, 8, 1), (32, 16, 8, 2), (32, 16, 8, 1), (32, 16, 8, 1)),
)


# A bias adds loads and sums of another tile of scores. With dropout too, and for a decomposed bias, which takes most
# registers: the tiles _REL.
_FWD_REL = replace(
    _FWD_DROPOUT, sm_80=((64, 64, 8, 2), *_FWD_DROPOUT.sm_80[1:]), sm_90=((64, 64, 4, 2), *_FWD_DROPOUT.sm_90[1:])
)
_BWD_DQ_REL = replace(
    _BWD_DQ_DROPOUT,
    sm_80=((32, 32, 4, 2), *_BWD_DQ_DROPOUT.sm_80[1:]),
    sm_90=((64, 32, 4, 3), *_BWD_DQ_DROPOUT.sm_90[1:]),
)
_BWD_DKDV_REL = replace(
    _BWD_DKDV_DROPOUT,
    sm_80=((16, 64, 4, 2), *_BWD_DKDV_DROPOUT.sm_80[1:]),
    sm_90=((32, 64, 4, 3), *_BWD_DKDV_DROPOUT.sm_90[1:]),
)
_FWD_BIAS = replace(
    _FWD_DROPOUT,
    sm_80=((64, 32, 4, 3), *_FWD_DROPOUT.sm_80[1:]),
    sm_90=((64, 32, 4, 3, 102), *_FWD_DROPOUT.sm_90[1:]),  # five resident blocks
    sm_100=((128, 32, 4, 2), *_FWD_DROPOUT.sm_100[1:]),
)
_BWD_DQ_BIAS = replace(_BWD_DQ_REL, sm_80=((64, 32, 4, 3), *_BWD_DQ_DROPOUT.sm_80[1:]))
_BWD_DKDV_BIAS = replace(
    _BWD_DKDV_REL,
    sm_80=((16, 64, 4, 3), *_BWD_DKDV_DROPOUT.sm_80[1:]),
    sm_90=((16, 64, 4, 3), *_BWD_DKDV_DROPOUT.sm_90[1:]),
)
_BWD_BIAS = replace(
    _BWD_DQ,
    sm_80=((64, 32, 4, 2, 168), *_BWD_DQ.sm_80[1:]),  # three resident blocks
    sm_90=((64, 32, 4, 2), *_BWD_DQ.sm_90[1:]),
    sm_100=_BWD_DQ_DROPOUT.sm_100,  # 128 x 64 spills
)


def _candidates(tiles: AttentionTiles, more: Iterable[Tile]) -> Callable[..., Any]:
    """Candidates: the tiles of every architecture and head size, and ``more``."""

    def candidates(
        n_q: int, n_k: int, head_dim: int, dtype: torch.dtype, target: Target, dropout: bool
    ) -> list[AttentionConfig]:
        most_m, most_n = (max(64, next_power_of_2(n)) for n in (n_q, n_k))
        float32 = dtype == torch.float32
        every = (AttentionConfig(*tile) for tile in (*tiles.all(float32), *(() if float32 else more)))
        return [tile for tile in every if tile.block_m <= most_m and tile.block_n <= most_n]

    return candidates


# Computed microseconds of 1, 2, ... programs of a 16-bit forward tile per multiprocessor, with 1,370 keys and heads of
# 64 (benchmarks codegen). The first tile of a family is for few heads. 64 query rows leave the bits of 128 as they are;
# 32 rows (another matrix instruction on sm_90) and other numbers of keys do not.
_FEW_HEADS: dict[str, dict[AttentionConfig, tuple[float, ...]]] = {
    "sm_80": {  # three resident blocks
        AttentionConfig(64, 64, 4, 3, 168): (24.3, 31.3, 42.5, 61.3, 73.9, 84.4, 99.5, 115.2, 125.2, 138.8),
        AttentionConfig(128, 64, 4, 3): (36.5, 50, 82.3, 100.5, 129.9, 150.3),
    },
    "sm_86": {  # 99 KiB of shared memory: two resident blocks
        AttentionConfig(64, 64, 4, 3): (25.8, 32.4, 57.9, 64.5, 90, 96.6, 112.6, 128.6),
        AttentionConfig(128, 64, 4, 3): (39.8, 58.3, 97.9, 116.4, 156, 174.5),
    },
    "sm_90": {
        AttentionConfig(64, 64, 4, 3): (16.7, 18.8, 22.3, 25.8, 40.3, 46.5, 48.5, 54.4),
        AttentionConfig(64, 64, 4, 2): (22.8, 23.7, 25.4, 26.1, 48.8, 50.9, 51.8, 54.7),
        _LONG_FWD["sm_90"]: (21.3, 26.3, 47.3, 54.9, 73.4, 78),
    },
    "sm_100": {AttentionConfig(64, 64, 4, 2): (4.43,), AttentionConfig(128, 64, 4, 2): (6.65,)},
}


def for_heads(tile: AttentionConfig, heads: int, n_q: int, n_k: int, head_dim: int, target: Target) -> AttentionConfig:
    """``tile``, or a small one where ``tile`` makes too few programs of ``heads`` heads of all samples."""
    small_memory = target.family == "sm_80" and target.has_small_shared_memory
    times = _FEW_HEADS.get("sm_86" if small_memory else target.family, {})
    if target.multiprocessors == 0 or heads == 0 or not 32 < head_dim <= 64 or tile not in times:
        return tile
    if target.family == "sm_90" and attention_tail(n_k, tile.block_n) == 64:
        return tile  # a masked step of 64 keys takes more registers: three resident blocks of the small tile

    def time(tile: AttentionConfig) -> float:
        return time_of(heads * cdiv(n_q, tile.block_m), target.multiprocessors, times[tile])

    small = next(iter(times))
    return small if time(small) < 0.95 * time(tile) else tile  # smaller differences are below the model's error


def _adapted(pick: Any, tuned: AttentionConfig, m: int, *args: Any) -> AttentionConfig:
    """A tuned tile applies to as many heads as fill the GPU; to fewer, the tile that ``pick`` has for them if it leaves
    the bits as they are."""
    few = pick(m, *args)
    smaller = few.block_m < tuned.block_m and few.block_n == tuned.block_n
    return few if smaller and few != pick(2**30, *args) else tuned


def _candidates_attention_fwd(m: int, *args: Any) -> list[AttentionConfig]:
    return _candidates(_FWD, [(128, 64, 8, 3), (128, 32, 4, 3), (16, 64, 4, 2)])(*args)


@tunable(AttentionConfig, candidates=_candidates_attention_fwd, adapt=_adapted)
def pick_attention_fwd(
    m: int, n_q: int, n_k: int, head_dim: int, dtype: torch.dtype, target: Target, dropout: bool
) -> AttentionConfig:
    """Tiles of ``attention_fwd_kernel``; ``m``: number of samples times heads. ``dropout``: or a bias or mask, which
    need registers too."""
    if target.family == "interpreter":
        return _pick_interpreted_attention(n_q, n_k)
    if target.family == "cpu":
        # with AMX, 256 keys per step took 1.56 ms where 64 took 1.93 (batch 8, 6 heads, 197 x 64)
        return _pick_cpu_attention(n_q, n_k, 256, 256 if target.uses_amx(dtype) else 64)
    if n_q <= 16 and head_dim <= 128 and dtype != torch.float32:
        # a single query row (class token, pooling) does not pay for a tile of 64 rows
        return AttentionConfig(16, 64 if head_dim <= 64 or not dropout else 32, 4, 2)
    fits = head_dim <= 64 or head_dim <= 96 and attention_tail(n_k, 64) < 64  # a masked step of 64 keys spills
    if n_k > 512 and fits and dtype != torch.float32 and not dropout and target.family in _LONG_FWD:
        return for_heads(_LONG_FWD[target.family], m, n_q, n_k, head_dim, target)
    tile = (_FWD_DROPOUT if dropout else _FWD).tile(head_dim, dtype, target)
    return tile if dropout else for_heads(tile, m, n_q, n_k, head_dim, target)


def pick_attention_fwd_bias(
    m: int, n_q: int, n_k: int, head_dim: int, dtype: torch.dtype, target: Target, dropout: bool
) -> AttentionConfig:
    """:func:`pick_attention_fwd` for scores with a bias. ``dropout``: or a decomposed bias."""
    if target.is_gpu and n_q > 16:
        return (_FWD_REL if dropout else _FWD_BIAS).tile(head_dim, dtype, target)
    return pick_attention_fwd(m, n_q, n_k, head_dim, dtype, target, True)


_CPU_MAX_KEYS = 512  # per program that computes dq, dk and dv: its tiles of scores fit in the L2 cache


@tunable(AttentionConfig, candidates=_candidates(_BWD_DQ, [(64, 64, 4, 2), (128, 64, 8, 2)]))
def pick_attention_bwd_dq(
    n_q: int, n_k: int, head_dim: int, dtype: torch.dtype, target: Target, dropout: bool
) -> AttentionConfig | None:
    """Tiles of ``attention_bwd_dq_kernel``; None if one program of ``attention_bwd_dkdv_kernel`` holds all keys and
    computes dq too."""
    if target.family == "interpreter":
        return _pick_interpreted_attention(n_q, n_k)
    if target.family == "cpu":
        return None if n_k <= _CPU_MAX_KEYS else _pick_cpu_attention(n_q, n_k, 128, 64)
    return (_BWD_DQ_DROPOUT if dropout else _BWD_DQ).tile(head_dim, dtype, target)


@tunable(AttentionConfig, candidates=_candidates(_BWD_DKDV, [(32, 64, 4, 2), (64, 64, 4, 2)]))
def pick_attention_bwd_dkdv(
    n_q: int, n_k: int, head_dim: int, dtype: torch.dtype, target: Target, dropout: bool
) -> AttentionConfig:
    """Tiles of ``attention_bwd_dkdv_kernel``: ``block_n`` keys per program, ``block_m`` query rows per step."""
    if target.family == "interpreter":
        return _pick_interpreted_attention(n_q, n_k)
    if target.family == "cpu":
        return _pick_cpu_attention(n_q, n_k, 64, _CPU_MAX_KEYS if n_k <= _CPU_MAX_KEYS else 256)
    return (_BWD_DKDV_DROPOUT if dropout else _BWD_DKDV).tile(head_dim, dtype, target)


def pick_attention_bwd_dq_bias(
    n_q: int, n_k: int, head_dim: int, dtype: torch.dtype, target: Target, dropout: bool
) -> AttentionConfig | None:
    """:func:`pick_attention_bwd_dq` for scores with a bias. ``dropout``: or a decomposed bias."""
    if target.is_gpu:
        return (_BWD_DQ_REL if dropout else _BWD_DQ_BIAS).tile(head_dim, dtype, target)
    return pick_attention_bwd_dq(n_q, n_k, head_dim, dtype, target, dropout)


def pick_attention_bwd_dkdv_bias(
    n_q: int, n_k: int, head_dim: int, dtype: torch.dtype, target: Target, dropout: bool
) -> AttentionConfig:
    """:func:`pick_attention_bwd_dkdv` for scores with a bias. ``dropout``: or a decomposed bias."""
    if target.is_gpu:
        return (_BWD_DKDV_REL if dropout else _BWD_DKDV_BIAS).tile(head_dim, dtype, target)
    return pick_attention_bwd_dkdv(n_q, n_k, head_dim, dtype, target, dropout)


def pick_attention_bwd_bias(
    n_q: int, n_k: int, head_dim: int, dtype: torch.dtype, target: Target, dropout: bool
) -> AttentionConfig:
    """Tiles of ``attention_bwd_bias_kernel``."""
    if target.family == "interpreter":
        return _pick_interpreted_attention(n_q, n_k)
    if target.family == "cpu":
        return _pick_cpu_attention(n_q, n_k, 64, 256)
    return (_BWD_DQ_DROPOUT if dropout else _BWD_BIAS).tile(head_dim, dtype, target)


def bias_splits(n_tiles: int, n_steps: int, target: Target) -> int:
    """Number of programs that compute one of ``n_tiles`` tiles of a bias's gradient, which takes ``n_steps`` steps."""
    programs = 2048 if target.is_gpu else 16  # fills the device a few times
    return max(1, min(n_steps, programs // max(1, n_tiles)))


def _rel_tile(block_m: int, width: int, num_warps: int, num_stages: int) -> AttentionConfig:
    return AttentionConfig(block_m, max(16, next_power_of_2(width)), num_warps, num_stages)


def pick_attention_bwd_rel(
    n_q: int, width: int, head_dim: int, dtype: torch.dtype, target: Target, dropout: bool
) -> AttentionConfig:
    """Tiles of ``attention_bwd_rel_kernel``: ``block_n`` covers a row of ``width`` keys."""
    if target.family == "interpreter":
        return _rel_tile(_pick_interpreted_attention(n_q, width).block_m, width, 4, 1)
    if target.family == "cpu":
        return _rel_tile(clip(64, n_q), width, 1, 1)
    small = dtype == torch.float32 or head_dim > 96 or width > 64
    return _rel_tile(16 if small else 64, width, 4, 1 if dtype == torch.float32 else 2)


@dataclass(frozen=True)
class RotaryConfig:
    """A tile of ``block_m`` rows of ``block_i`` pairs of channels."""

    block_m: int
    block_i: int
    num_warps: int


def pick_rotary(half: int, target: Target) -> RotaryConfig:
    """Tiles of ``rotary_kernel`` for rows with ``half`` pairs."""
    block_i = next_power_of_2(half)
    if target.family == "interpreter":
        return RotaryConfig(2**15 // block_i, block_i, 4)
    if target.family == "cpu":
        return RotaryConfig(max(1, 256 // block_i), block_i, 1)
    # 8 pairs per thread: 16-byte loads of bfloat16
    return RotaryConfig(max(1, 1024 // block_i), block_i, 4)


# --- windows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WindowConfig(CompilerOptions):
    """A tile of ``block_m`` query rows and ``block_n`` keys of a window, for ``group`` windows one after another."""

    block_m: int
    block_n: int
    group: int
    num_warps: int
    num_stages: int
    max_registers: int = 255


def _group(m: int, blocks: int, programs: int, most: int) -> int:
    """Windows per program: as many as leave ``programs`` programs, up to ``most``. ``m``: windows * heads."""
    return max(1, min(most, m * blocks // programs))


def _pick_cpu_window(m: int, block_m: int, block_n: int, target: Target) -> WindowConfig:
    """CPUs and the interpreter: 64 programs leave few partial sums, and one for each core."""
    if target.family == "interpreter":
        return WindowConfig(block_m, block_n, _group(m, 1, 4, 64), 4, 1)
    return WindowConfig(block_m, block_n, _group(m, 1, 64, 4096), 1, 1)


# Registers and spills below are those of `python -m benchmarks codegen`, in bfloat16. On GPUs, 1024 programs leave
# several per multiprocessor, and more than 8 windows per program save little of the loads of the bias.
_GPU_PROGRAMS, _GPU_GROUP = 1024, 8


def pick_window_fwd(
    m: int, n_tokens: int, head_dim: int, dtype: torch.dtype, target: Target, cosine: bool, dropout: bool
) -> WindowConfig:
    """Tiles of ``window_attention_fwd_kernel``; ``m``: number of windows times heads."""
    block = max(16, next_power_of_2(n_tokens))
    if not target.is_gpu:
        return _pick_cpu_window(m, min(block, 64), block, target)
    block_m, warps, limit = min(block, 64), 4, 255
    if block > 64 or dtype == torch.float32:
        block_m = 16  # 64 x 256 spills
        # FMA dots on NVIDIA hold both operands in registers; on AMD, eight warps have half the registers
        warps = 8 if block > 64 and dtype == torch.float32 and target.is_nvidia else 4
    elif target.is_nvidia and not (dropout or cosine and target.family == "sm_80"):
        limit = 168  # three resident blocks; dropout, and cosine attention on sm_80, would spill
    group = _group(m, block // block_m, _GPU_PROGRAMS, _GPU_GROUP)
    return WindowConfig(block_m, block, group, warps, 1 if dtype == torch.float32 else 2, limit)


def pick_window_bwd(
    m: int, n_tokens: int, head_dim: int, dtype: torch.dtype, target: Target, cosine: bool
) -> WindowConfig:
    """Tiles of ``window_attention_bwd_kernel``, which computes dk and dv too if ``block_m`` covers the window."""
    block = max(16, next_power_of_2(n_tokens))
    if not target.is_gpu:
        return _pick_cpu_window(m, min(block, 64), block, target)
    if block > 64 or dtype == torch.float32:
        group = _group(m, block // 16, _GPU_PROGRAMS, _GPU_GROUP)  # 32 x 256 spills
        if dtype == torch.float32:
            return WindowConfig(16, block, group, 8 if block > 64 and target.is_nvidia else 4, 1)
        return WindowConfig(16, block, group, 4, 2)
    # two stages spill on sm_86, sm_89 and sm_120, and in cosine attention on sm_100
    small = target.family == "sm_80" and target.name != "sm_80"
    stages = 1 if small or cosine and target.family == "sm_100" else 2
    return WindowConfig(block, block, _group(m, 1, _GPU_PROGRAMS, _GPU_GROUP), 4, stages)


def pick_window_bwd_dkdv(
    m: int, n_tokens: int, head_dim: int, dtype: torch.dtype, target: Target, cosine: bool
) -> WindowConfig:
    """Tiles of ``window_attention_bwd_dkdv_kernel``: all query rows of a window and ``block_n`` keys."""
    block = max(16, next_power_of_2(n_tokens))
    if not target.is_gpu:
        return _pick_cpu_window(m, block, min(block, 64), target)
    block_n = min(block, 16 if dtype == torch.float32 else 32)
    group = _group(m, block // block_n, _GPU_PROGRAMS, _GPU_GROUP)
    return WindowConfig(block, block_n, group, 8 if block > 64 else 4, 1)  # two stages spill


@dataclass(frozen=True)
class PositionBiasConfig:
    """Forward: ``block_m`` rows of ``block_n`` columns, a whole row. Backward: ``block_e`` entries of the table."""

    block_m: int
    block_n: int
    block_e: int
    num_warps: int


def pick_position_bias(n_tokens: int, target: Target) -> PositionBiasConfig:
    """Tiles of both kernels of the relative position bias."""
    block_n = next_power_of_2(n_tokens)
    if not target.is_gpu:
        return PositionBiasConfig(max(1, min(64, 4096 // block_n)), block_n, 64, 1)
    return PositionBiasConfig(max(1, 1024 // block_n), block_n, 16, 4)
