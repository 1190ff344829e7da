"""Tiles of the GEMM kernels and of the elementwise kernels around them."""

import enum
from dataclasses import dataclass, replace

import torch

from vit_triton.kernels.linear.expected import is_ours_ahead
from vit_triton.kernels.picker import CompilerOptions, cdiv, clip, next_power_of_2, time_of, tunable
from vit_triton.kernels.target import Target


@dataclass(frozen=True)
class TileConfig:
    """A tile of ``block_m`` x ``block_n`` elements."""

    block_m: int
    block_n: int
    num_warps: int


def pick_layer_scale_bwd(k: int, target: Target) -> TileConfig:
    """Tiles of ``layer_scale_bwd_kernel``: one program loops over one row of k weights."""
    return TileConfig(1, min(1024, next_power_of_2(k)), 1 if target.family == "cpu" else 4)


def pick_swiglu(h: int, target: Target) -> TileConfig:
    """Tiles of both SwiGLU kernels for a hidden width h."""
    cols = min(256, next_power_of_2(h))
    if target.family == "interpreter":
        return TileConfig(256, cols, 4)
    return TileConfig(1024 // cols, cols, 1 if target.family == "cpu" else 4)  # 16 bytes of bfloat16 per thread


class Epilogue(enum.Enum):
    """The most expensive step of an epilogue; the tile must leave registers for it."""

    NONE = "none"
    ELEMENTWISE = "elementwise"  # an activation or a residual
    BRANCH = "branch"  # LayerScale or stochastic depth
    DROPOUT = "dropout"
    ROTATION = "rotation"  # of q and k in a packed projection

    @staticmethod
    def of(*, elementwise: bool, branch: bool = False, dropout: bool = False) -> "Epilogue":
        if dropout:
            return Epilogue.DROPOUT
        return Epilogue.BRANCH if branch else Epilogue.ELEMENTWISE if elementwise else Epilogue.NONE


@dataclass(frozen=True)
class GemmConfig(CompilerOptions):
    """An output tile of ``block_m`` x ``block_n`` with ``block_k`` of the contraction per step. ``group`` rows of tiles
    share the L2 cache. ``split``: the factor of split-K. ``subtiles``: the epilogue processes the columns of the tile
    in this many epilogue subtiles, one after the other. ``descriptors``: load both operands with NVIDIA's tensor memory
    accelerator (sm_90 and later) if their strides allow it."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8
    split: int = 1
    subtiles: int = 1
    max_registers: int = 255
    descriptors: bool = False


@dataclass(frozen=True)
class VendorGemm(GemmConfig):
    """The GEMM of the vendor's library; the epilogue is one pass of our kernel over its result, in tiles of ``block_m``
    x ``block_n``. Selected by tuned tables, and by :func:`prefers_vendor`."""

    block_m: int = 32
    block_n: int = 128
    block_k: int = 16
    num_warps: int = 4
    num_stages: int = 1


GEMM_TILES = (
    *(GemmConfig(128, 128, 32, 4, 4), GemmConfig(128, 64, 32, 4, 4), GemmConfig(64, 64, 32, 4, 4)),
    *(GemmConfig(128, 128, 64, 8, 3), GemmConfig(128, 256, 64, 8, 3), GemmConfig(128, 64, 64, 8, 3)),
    *(GemmConfig(128, 64, 64, 4, 3), GemmConfig(64, 64, 64, 4, 3), GemmConfig(64, 128, 64, 4, 3)),
)
GEMM_FLOAT32_TILES = (
    *(GemmConfig(64, 32, 16, 8, 2), GemmConfig(64, 64, 32, 4, 3), GemmConfig(64, 64, 32, 8, 3)),
    *(GemmConfig(128, 64, 16, 8, 2), GemmConfig(32, 32, 16, 4, 2)),
)


# two or three resident blocks where the epilogue's registers allow only one with 128 x 128; wgmma and tcgen05 prefer
# tiles with a side of 128 and a depth of 64
NARROW = GemmConfig(64, 128, 64, 4, 3)


def pick_gemm(
    rows: int, cols: int, depth: int, dtype: torch.dtype, target: Target, precision: str, epilogue: Epilogue
) -> GemmConfig:
    if target.family == "interpreter":
        tile = GemmConfig(256, 512, 256, 4, 1)  # the interpreter's cost per tile is independent of its size
    elif target.uses_amx(dtype):
        # Measured on a Xeon with an L2 cache of 2 MB: a weight that fits is read again for every 32 rows of x, which
        # stay in the L1 cache; of a larger one, 16 KB of the panel stay there for 256 rows
        fits = 2 * cols * depth <= 3 << 19
        tile = GemmConfig(32, 64, 1024, 1, 1, group=1) if fits else GemmConfig(256, 64, 256, 1, 1, group=1)
    elif target.family == "cpu":
        # 64 columns of the weight stay in the L2 cache for 512 rows
        tile = GemmConfig(512, 64, 1024, 1, 1)
    elif dtype == torch.float32 and precision == "ieee":
        tile = GemmConfig(64, 32, 16, 8, 2)
    elif dtype == torch.float32:
        # TF32: twice the bytes of bfloat16; elementwise and branch epilogues spill with four warps
        tile = GemmConfig(64, 64, 32, 8 if epilogue in (Epilogue.ELEMENTWISE, Epilogue.BRANCH) else 4, 3)
    elif target.family == "gfx":
        tile = GemmConfig(128, 128, 64, 8, 2) if epilogue is Epilogue.NONE else GemmConfig(128, 64, 64, 8, 2)
    elif target.family in ("sm_90", "sm_100"):
        # Two epilogue subtiles allow two resident blocks; 128 x 256 has one resident block and is not faster
        # (benchmarks codegen, --time)
        tile = GemmConfig(128, 128, 64, 8, 3, subtiles=1 if epilogue is Epilogue.NONE else 2)
    else:
        # two resident blocks on an A100 without spills: 128 x 128 leaves no registers for an epilogue
        tile = GemmConfig(128, 128 if epilogue is Epilogue.NONE else 64, 32, 4, 4)
    return clipped(tile, rows, cols, depth)


def clipped(tile: GemmConfig, rows: int, cols: int, depth: int) -> GemmConfig:
    block_m, block_n = clip(tile.block_m, rows), clip(tile.block_n, cols)
    # the register limit applies to the unclipped tile
    most = tile.max_registers if (block_m, block_n) == (tile.block_m, tile.block_n) else 255
    return replace(tile, block_m=block_m, block_n=block_n, block_k=clip(tile.block_k, depth), max_registers=most)


def candidates_gemm(rows: int, cols: int, depth: int, dtype: torch.dtype) -> list[GemmConfig]:
    tiles = GEMM_FLOAT32_TILES if dtype == torch.float32 else GEMM_TILES
    return [clipped(tile, rows, cols, depth) for tile in tiles]


def described(tile: GemmConfig, dtype: torch.dtype, target: Target) -> GemmConfig:
    """``tile`` with descriptors for 16-bit operands, where the GPU supports them."""
    return replace(tile, descriptors=dtype != torch.float32 and target.family in ("sm_90", "sm_100"))


def tokens(m: int, target: Target) -> int:
    """``m`` in the interpreter, else unlimited: a tile is not clipped to the rows; :func:`for_rows` depends on them."""
    return m if target.family == "interpreter" else 2**30


def prefers_vendor(product: str, dtype: torch.dtype, target: Target, epilogue: Epilogue) -> bool:
    """Whether the vendor's GEMM is the default for a product of :data:`.expected.EXPECTED`."""
    if target.fastest:
        return not is_ours_ahead(target.name, product, epilogue.value, dtype)
    return target.prefers_vendor_gemm(dtype)


# Tiles for products too small to fill a GPU with the tiles above. Rows, columns, depth and warps of a tile leave the
# bits of a result as they are; another matrix instruction would not, so sm_90 and sm_100 have at least 64 rows and four
# warps. No split, whose sums differ.
_64_ROWS = GemmConfig(64, 32, 128, 4, 3), GemmConfig(64, 64, 64, 4, 4), GemmConfig(64, 128, 64, 4, 3, subtiles=2)
SMALL_TILES = {
    "sm_80": (GemmConfig(32, 32, 128, 4, 4), GemmConfig(64, 64, 64, 4, 3), GemmConfig(128, 64, 64, 4, 3)),
    **dict.fromkeys(("sm_90", "sm_100"), _64_ROWS),
}
# Computed microseconds of 1, 2, ... programs of block_m x block_n per multiprocessor with a depth of 768 (benchmarks
# codegen)
TIMES: dict[str, dict[tuple[int, int], tuple[float, ...]]] = {
    "sm_80": {
        (32, 32): (6, 7, 9.5, 12, 14.4),
        (64, 64): (8.3, 10.1, 14.1, 17, 21, 25, 29, 32.7, 37),
        (128, 64): (12, 14.8, 25, 30.8, 36.4),
        (128, 128): (18, 23.4, 41.1, 46),
    },
    "sm_90": {
        (64, 32): (4.1, 5, 6.8, 10.6, 11.7),
        (64, 64): (5.4, 6.3, 8.9, 11, 13.5, 16, 20.2),
        (64, 128): (8, 10.1, 11.4, 18.4, 22.5),
        (128, 128): (9.5, 13.5, 24, 27),
    },
    "sm_100": {(64, 32): (1.75,), (64, 64): (2.2,), (64, 128): (3.1,), (128, 128): (4.4,)},
}


def for_rows(tile: GemmConfig, rows: int, cols: int, depth: int, target: Target) -> GemmConfig:
    """``tile``, or a small one where ``tile`` makes too few programs for the multiprocessors of the target."""
    if target.multiprocessors == 0 or target.family not in SMALL_TILES:
        return tile
    times = TIMES[target.family]

    def time(tile: GemmConfig) -> float:
        programs = cdiv(rows, tile.block_m) * cdiv(cols, tile.block_n)
        return time_of(programs, target.multiprocessors, times[tile.block_m, tile.block_n])

    small = [clipped(tile, 2**30, cols, depth) for tile in SMALL_TILES[target.family]]
    known = [tile for tile in small if (tile.block_m, tile.block_n) in times]
    if rows == 0 or not known or (tile.block_m, tile.block_n) not in times:
        return tile
    best = min(known, key=time)
    return best if time(best) < 0.95 * time(tile) else tile  # smaller differences are below the model's error


def _adapted(pick, tuned, m, *args):
    """A tuned tile applies to as many rows as fill the GPU; to fewer rows, the tile that ``pick`` has for them."""
    if isinstance(tuned, VendorGemm):
        return tuned
    few = pick(m, *args)
    return tuned if few == pick(2**30, *args) else few


def _candidates_linear_fwd(m, n, k, dtype, target, precision, epilogue):
    tiles = candidates_gemm(tokens(m, target), n, k, dtype)
    return [*(described(tile, dtype, target) for tile in tiles), VendorGemm()]


@tunable(GemmConfig, VendorGemm, candidates=_candidates_linear_fwd, adapt=_adapted)
def pick_linear_fwd(
    m: int, n: int, k: int, dtype: torch.dtype, target: Target, precision: str, epilogue: Epilogue
) -> GemmConfig:
    """Tiles of ``linear_fwd_kernel`` ((m, k) -> (m, n))."""
    if prefers_vendor("forward", dtype, target, epilogue):
        return VendorGemm()
    tile = _linear_fwd_tile(m, n, k, dtype, target, precision, epilogue)
    if dtype == torch.float32 or epilogue in (Epilogue.DROPOUT, Epilogue.ROTATION):
        return tile
    return for_rows(tile, m, n, k, target)


def _linear_fwd_tile(
    m: int, n: int, k: int, dtype: torch.dtype, target: Target, precision: str, epilogue: Epilogue
) -> GemmConfig:
    rotates = epilogue is Epilogue.ROTATION  # whole heads: as many columns as without an epilogue, in one subtile
    tile = pick_gemm(tokens(m, target), n, k, dtype, target, precision, Epilogue.NONE if rotates else epilogue)
    tile = described(tile, dtype, target)
    if dtype == torch.float32 or epilogue is Epilogue.NONE:
        return tile
    if rotates and target.family == "sm_80":
        return replace(tile, num_warps=8)  # both layouts of pairs fit in 128 registers: two resident blocks
    if target.family == "sm_80":
        # Two resident blocks: an elementwise epilogue in two subtiles fits in 128 registers with eight warps; other
        # epilogues need more registers and therefore 64 columns (benchmarks codegen)
        block_n, num_warps = (128, 8) if epilogue is Epilogue.ELEMENTWISE else (64, 4)
        tile = replace(tile, block_n=block_n, num_warps=num_warps, subtiles=2)
        if epilogue is Epilogue.DROPOUT:  # four resident blocks
            tile = replace(tile, num_stages=3 if target.has_small_shared_memory else 4, max_registers=128)
        return clipped(tile, 2**30, n, k)
    if target.family == "sm_90":
        # without the limit the compiler exceeds it: one resident block
        return replace(tile, max_registers=128, subtiles=1 if epilogue is Epilogue.ELEMENTWISE else tile.subtiles)
    return tile


def _candidates_linear_bwd_input(m, n, k, dtype, target, precision, epilogue):
    tiles = candidates_gemm(tokens(m, target), k, n, dtype)
    return [*(described(tile, dtype, target) for tile in tiles), VendorGemm()]


@tunable(GemmConfig, VendorGemm, candidates=_candidates_linear_bwd_input, adapt=_adapted)
def pick_linear_bwd_input(
    m: int, n: int, k: int, dtype: torch.dtype, target: Target, precision: str, epilogue: Epilogue
) -> GemmConfig:
    """Tiles of ``linear_bwd_input_kernel`` ((m, n) -> (m, k), depth n)."""
    if prefers_vendor("input", dtype, target, epilogue):
        return VendorGemm()
    tile = _linear_bwd_input_tile(m, n, k, dtype, target, precision, epilogue)
    if dtype == torch.float32 or epilogue not in (Epilogue.NONE, Epilogue.ELEMENTWISE):
        return tile
    return for_rows(tile, m, k, n, target)


def _linear_bwd_input_tile(
    m: int, n: int, k: int, dtype: torch.dtype, target: Target, precision: str, epilogue: Epilogue
) -> GemmConfig:
    tile = described(pick_gemm(tokens(m, target), k, n, dtype, target, precision, epilogue), dtype, target)
    if dtype == torch.float32 or epilogue is Epilogue.NONE:
        return tile
    # the activation and its derivative together: one subtile spills on sm_80
    if target.family == "sm_80":
        tile = replace(tile, subtiles=2)
        if epilogue is Epilogue.DROPOUT:  # four resident blocks of 64 rows, or three of 128
            small = target.has_small_shared_memory
            tile = replace(tile, block_m=64) if small else replace(tile, max_registers=168)
        return clipped(tile, 2**30, k, n)
    if target.family == "sm_90" and epilogue is Epilogue.BRANCH:
        # pointers: gamma scales dy between its load and the product (benchmarks codegen)
        return clipped(replace(NARROW, subtiles=4, max_registers=168), 2**30, k, n)
    # rows of pre that are no multiple of 16 numbers are read one by one, which takes more registers
    aligned = k % 16 == 0
    if target.family == "sm_90":  # two resident blocks
        return replace(tile, block_n=tile.block_n if aligned else clip(64, k), subtiles=4, max_registers=128)
    if target.family == "sm_100" and epilogue is Epilogue.ELEMENTWISE and tile.block_n == 128 and not aligned:
        return replace(tile, subtiles=8)
    return tile


_MAX_SPLIT = 16


def split_k(tile: GemmConfig, m: int, n: int, k: int, target: Target) -> GemmConfig:
    """``tile`` with the factor of split-K that takes the least time for m rows. A weight has few tiles (768 x 768 has
    36 of 128 x 128), which do not fill a GPU or leave most of it idle in the last wave."""
    tiles = max(1, cdiv(n, tile.block_m) * cdiv(k, tile.block_n))
    multiprocessors = target.multiprocessors or 108

    def rows(split: int) -> float:
        """The time, in rows of the product of one program; two programs are resident per multiprocessor."""
        waves = cdiv(tiles * split, 2 * multiprocessors)
        # writing and adding a partial sum takes as long as 256 rows (bytes and FLOPs of an A100; an H100 has twice)
        return waves * cdiv(m, split) + 256 * split * tiles / multiprocessors

    return replace(tile, split=min(range(1, _MAX_SPLIT + 1), key=rows))


def candidates_bwd_weight(m, n, k, dtype, target, precision):
    return [split_k(tile, m, n, k, target) for tile in candidates_gemm(n, k, tokens(m, target), dtype)]


def _candidates_linear_bwd_weight(m, n, k, dtype, target, precision, epilogue):
    tiles = candidates_bwd_weight(m, n, k, dtype, target, precision)
    return [*(described(tile, dtype, target) for tile in tiles), VendorGemm()]


@tunable(GemmConfig, VendorGemm, candidates=_candidates_linear_bwd_weight)
def pick_linear_bwd_weight(
    m: int, n: int, k: int, dtype: torch.dtype, target: Target, precision: str, epilogue: Epilogue
) -> GemmConfig:
    """Tiles of ``linear_bwd_weight_kernel`` ((n, k), depth m) and the split-K factor. ``epilogue``: BRANCH with
    stochastic depth, else NONE."""
    if prefers_vendor("weight", dtype, target, epilogue):
        return VendorGemm()
    if dtype != torch.float32 and target.family == "sm_90" and epilogue is Epilogue.BRANCH:
        # pointers: the scale of a sample multiplies dy between its load and the product (benchmarks codegen)
        return split_k(clipped(NARROW, n, k, 2**30), m, n, k, target)
    tile = pick_bwd_weight(m, n, k, dtype, target, precision, Epilogue.NONE)
    return described(tile, dtype, target)


def pick_bwd_weight(
    m: int, n: int, k: int, dtype: torch.dtype, target: Target, precision: str, epilogue: Epilogue
) -> GemmConfig:
    if target.family == "cpu":
        return GemmConfig(clip(256, n), clip(256, k), clip(128, tokens(m, target)), 1, 1)
    tile = pick_gemm(n, k, tokens(m, target), dtype, target, precision, epilogue)
    return tile if target.family == "interpreter" else split_k(tile, m, n, k, target)
