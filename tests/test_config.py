"""Tile sizes and launches: requirements on every pick, for every architecture."""

import dataclasses
import itertools

import pytest
import torch
import triton
import triton.language as tl

from vit_triton.cpu.driver import use_cpu_driver
from vit_triton.kernels import launch
from vit_triton.kernels.attention import config as attention
from vit_triton.kernels.attention.config import AttentionConfig
from vit_triton.kernels.linear import config as linear
from vit_triton.kernels.linear.config import Epilogue, GemmConfig, split_k
from vit_triton.kernels.norm.config import MAX_LAYER_NORM_WIDTH, pick_layer_norm
from vit_triton.kernels.patch_embed import config as patch_embed
from vit_triton.kernels.picker import INTERPRETER_TILE, PICKERS, next_power_of_2
from vit_triton.kernels.target import Tuned, target_named

NAMES = ("interpreter", "cpu", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "xpu")
TARGETS = tuple(map(target_named, NAMES))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 10, 48, 192, 384, 768, 1000, 3072)
GEMMS = [
    linear.pick_linear_fwd,
    linear.pick_linear_bwd_input,
    linear.pick_linear_bwd_weight,
    patch_embed.pick_patch_embed_fwd,
    patch_embed.pick_patch_embed_bwd_image,
    patch_embed.pick_patch_embed_bwd_weight,
]
ATTENTIONS = [attention.pick_attention_fwd, attention.pick_attention_bwd_dq, attention.pick_attention_bwd_dkdv]


def str_of(target):
    return target.name


def is_power_of_2(n):
    return n > 0 and n & (n - 1) == 0


def attentions(pick, target, n_q, n_k, head_dim, dtype, dropout, m=16):
    return pick(*([m] if pick is attention.pick_attention_fwd else []), n_q, n_k, head_dim, dtype, target, dropout)


def gemms(pick, target, m):
    epilogues = list(Epilogue) if "linear" in pick.__name__ else [None]
    for n in WIDTHS:
        for k in WIDTHS:
            for dtype in DTYPES:
                for precision in ("ieee", "tf32"):
                    for epilogue in epilogues:
                        yield pick(m, n, k, dtype, target, precision, *filter(None, [epilogue]))


@pytest.mark.parametrize("target", TARGETS, ids=str_of)
@pytest.mark.parametrize("pick", GEMMS, ids=lambda pick: pick.__name__)
def test_gemm_tiles(pick, target):
    for tile in gemms(pick, target, 1576):
        sides = (tile.block_m, tile.block_n, tile.block_k)
        assert all(is_power_of_2(side) and side >= 16 for side in sides), tile
        assert max(sides[0] * sides[1], sides[0] * sides[2], sides[1] * sides[2]) <= INTERPRETER_TILE, tile
        assert 1 <= tile.split <= 16 and tile.group >= 1, tile


@pytest.mark.parametrize("name", ["gfx942", "xpu"])
def test_nvidia_compiler_options_are_set_for_nvidia_gpus_only(name):
    for pick in GEMMS:
        assert not any("maxnreg" in tile.options for tile in gemms(pick, target_named(name), 1576))
    for pick in ATTENTIONS:
        for n, head_dim in itertools.product((197, 1025), (64, 72, 80, 128, 256)):
            tile = attentions(pick, target_named(name), n, n, head_dim, torch.bfloat16, False)
            assert tile is None or "maxnreg" not in tile.options


@pytest.mark.parametrize("target", [target for target in TARGETS if target.is_gpu or target.name == "cpu"], ids=str_of)
@pytest.mark.parametrize("pick", GEMMS, ids=lambda pick: pick.__name__)
def test_the_order_of_sums_does_not_depend_on_the_batch_size(pick, target):
    """Nor does the matrix instruction: wgmma requires 64 rows and four warps. A weight's gradient is a sum over the
    batch, whose parts depend on the batch."""
    for one, many in zip(gemms(pick, target, 197), gemms(pick, target, 64 * 197), strict=True):
        if "weight" in pick.__name__:
            assert one == dataclasses.replace(many, split=one.split)
        elif one != many:
            assert pick in (linear.pick_linear_fwd, linear.pick_linear_bwd_input)
            assert one.split == many.split == 1
            if target.family in ("sm_90", "sm_100"):
                assert min(one.block_m, many.block_m) >= 64 and min(one.num_warps, many.num_warps) >= 4


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_few_rows_have_small_tiles(name):
    def tile(m, n, k, dtype=torch.bfloat16, target=None, precision="ieee"):
        return linear.pick_linear_fwd(m, n, k, dtype, target or target_named(name), precision, Epilogue.ELEMENTWISE)

    smallest, larger, *_ = linear.SMALL_TILES[name]
    assert tile(197, 768, 3072) == smallest
    assert tile(8 * 197, 768, 3072) == (tile(2**30, 768, 3072) if name == "sm_100" else larger)
    assert tile(64 * 197, 768, 3072) == tile(2**30, 768, 3072)
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32")):
        assert tile(197, 768, 3072, dtype, precision=precision) == tile(2**30, 768, 3072, dtype, precision=precision)
    unknown = dataclasses.replace(target_named(name), multiprocessors=0)
    assert tile(197, 768, 3072, target=unknown) == tile(2**30, 768, 3072, target=unknown)


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_a_tuned_tile_applies_to_rows_that_fill_the_gpu(name):
    args = 768, 3072, torch.bfloat16
    tuned, rest = linear.GemmConfig(128, 64, 32, 4, 4), ("ieee", Epilogue.NONE)
    key = PICKERS["pick_linear_fwd"].key((1, *args, target_named(name), *rest))
    for config in (tuned, linear.VendorGemm()):
        target = dataclasses.replace(target_named(name), tuned=Tuned({key: config}))
        assert linear.pick_linear_fwd(64 * 197, *args, target, *rest) == config
        few = linear.pick_linear_fwd(197, *args, target, *rest)
        assert few == (linear.SMALL_TILES[name][0] if config is tuned else config)


@pytest.mark.parametrize("target", [target for target in TARGETS if target.is_gpu or target.name == "cpu"], ids=str_of)
def test_the_order_of_sums_of_attention_does_not_depend_on_the_batch_size(target):
    """Nor does the matrix instruction, see above."""
    for n, head_dim, dtype, dropout in itertools.product((17, 50, 197, 577), (64, 72, 128), DTYPES, (False, True)):
        arguments = attention.pick_attention_fwd, target, n, n, head_dim, dtype, dropout
        few, many = attentions(*arguments, m=12), attentions(*arguments, m=6144)
        assert few.block_n == many.block_n
        assert few == many or dtype != torch.float32 and min(few.block_m, many.block_m) >= 64 and few.num_warps == 4


@pytest.mark.parametrize(
    ("name", "n", "heads", "rows"),
    [
        *(("sm_80", 1370, 12, 64), ("sm_80", 1370, 96, 128), ("sm_80", 197, 12, 64), ("sm_80", 197, 96, 128)),
        *(("sm_86", 1370, 6, 64), ("sm_86", 1370, 96, 128), ("sm_90", 1370, 12, 64), ("sm_90", 1370, 96, 128)),
        *(("sm_100", 197, 12, 64), ("sm_100", 197, 768, 128)),
    ],
)
def test_few_heads_have_small_attention_tiles(name, n, heads, rows):
    def tile(heads, n=n, **changes):
        target = dataclasses.replace(target_named(name), **changes)
        return attentions(attention.pick_attention_fwd, target, n, n, 64, torch.bfloat16, False, heads)

    assert tile(heads).block_m == rows and tile(2**30) == tile(heads, multiprocessors=0)
    one, other = AttentionConfig(128, 64, 8, 2), AttentionConfig(64, 32, 4, 2)
    key = PICKERS["pick_attention_fwd"].key((heads, n, n, 64, torch.bfloat16, target_named(name), False))
    for tuned in (one, other):  # another number of keys would change the order of the sums
        chosen = tile(heads, tuned=Tuned({key: tuned}))
        assert chosen == (tile(heads) if tuned is one and rows == 64 else tuned)


@pytest.mark.parametrize(("name", "tiles", "expected"), [("sm_80", 144, 3), ("sm_90", 36, 7), ("sm_90", 144, 7)])
def test_split_k_fills_whole_waves(name, tiles, expected):
    """The split with the least time, and one part where a part would have few rows."""
    tile, target = GemmConfig(128, 128, 64, 8, 3), target_named(name)
    split = {m: split_k(tile, m, 128 * tiles, 128, target).split for m in (1, 25216)}
    assert split == {1: 1, 25216: expected}
    waves = tiles * expected / (2 * target.multiprocessors)
    assert waves % 1 == 0 or waves % 1 > 0.8


@pytest.mark.parametrize("target", TARGETS, ids=str_of)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("pick", ATTENTIONS, ids=lambda pick: pick.__name__)
def test_attention_tiles(pick, target, dropout):
    for n_q, n_k in [(1, 1), (1, 197), (197, 197), (577, 64), (1370, 1370)]:
        for head_dim in (1, 16, 40, 64, 72, 80, 88, 128, 256):
            for dtype in DTYPES:
                tile = attentions(pick, target, n_q, n_k, head_dim, dtype, dropout)
                if tile is None:  # the dK/dV kernel covers all keys in one block and computes dQ too
                    assert pick is attention.pick_attention_bwd_dq
                    assert attention.pick_attention_bwd_dkdv(n_q, n_k, head_dim, dtype, target, dropout).block_n >= n_k
                    continue
                assert is_power_of_2(tile.block_m) and is_power_of_2(tile.block_n), tile
                assert min(tile.block_m, tile.block_n) >= 16, tile
                assert tile.block_m * tile.block_n <= INTERPRETER_TILE, tile


@pytest.mark.parametrize("target", TARGETS, ids=str_of)
def test_layer_norm_tile_covers_a_row(target):
    for width in (*WIDTHS, MAX_LAYER_NORM_WIDTH):
        tile = pick_layer_norm(width, target)
        assert is_power_of_2(tile.block_d) and width <= tile.block_d < 2 * width or width == 1, tile
        assert is_power_of_2(tile.block_m) and tile.block_m * tile.block_d <= INTERPRETER_TILE, tile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS, ids=str_of)
def test_split_head_is_padded_to_at_most_the_next_power_of_two(target, dtype):
    for head_dim in range(1, 257):
        main, tail = attention.split_head_dim(head_dim, dtype, target)
        whole = max(16, next_power_of_2(head_dim))
        assert is_power_of_2(main) and main >= 16 and (tail == 0 or is_power_of_2(tail) and tail >= 16)
        assert head_dim <= main + tail <= whole


def test_split_of_common_head_sizes():
    sizes, sm_90 = (64, 72, 80, 88, 96, 104), target_named("sm_90")
    covered = {d: sum(attention.split_head_dim(d, torch.bfloat16, sm_90)) for d in sizes}
    assert covered == {64: 64, 72: 80, 80: 80, 88: 96, 96: 96, 104: 128}


def test_split_of_float32_heads_depends_on_the_target():
    heads = (72, 80, 88, 96, 160)
    for name, covered in {"sm_80": (80, 80, 128, 128, 256), "cpu": (80, 80, 96, 96, 160)}.items():
        sums = tuple(sum(attention.split_head_dim(d, torch.float32, target_named(name))) for d in heads)
        assert sums == covered


@pytest.mark.parametrize("length", [1, 16, 64, 65, 196, 197, 257, 577, 1370])
def test_tail_block_covers_the_rest_of_the_sequence(length):
    for block in (16, 32, 64, 128):
        tail = attention.attention_tail(length, block)
        assert length % block <= tail < max(32, 2 * (length % block)) if length % block else tail == 0


def test_configurations_are_frozen_and_hashable():
    for tile in (
        pick_layer_norm(768, target_named("sm_80")),
        attention.pick_attention_fwd(96, 197, 197, 64, torch.float16, target_named("sm_80"), False),
        linear.pick_linear_fwd(197, 768, 768, torch.float16, target_named("sm_80"), "ieee", Epilogue.NONE),
    ):
        hash(tile)
        with pytest.raises(dataclasses.FrozenInstanceError):
            tile.num_warps = 1


class Kernel:
    """Replaces a Triton kernel and its compiled form; records the first dimension of its grids."""

    arg_names = ()
    module = "loaded"

    def __init__(self):
        self.grids = []

    def warmup(self, **arguments):
        return self

    def __getitem__(self, grid):
        return lambda **arguments: self.grids.append(grid[0])


@pytest.mark.parametrize(("programs", "launched"), [(0, []), (1, [1]), (2**31 - 1, [2**31 - 1])])
def test_launch(programs, launched):
    kernel = Kernel()
    with use_cpu_driver():
        launch.launch(kernel, (programs,), torch.zeros(1))
    assert kernel.grids == launched


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n) * factor, mask=i < n)


@pytest.mark.compiled
def test_compiled_kernel_is_reused_for_matching_arguments_only():
    """A launch reuses a compiled kernel only for matching arguments."""
    buffer = torch.arange(3000.0)
    for x in (buffer[:2000], buffer[1:2001], buffer[:2000].bfloat16(), buffer[3:2003].double(), buffer[5:50]):
        for factor in (1.0, 3.0, 0.5):
            for block in (16, 1024):
                y = torch.zeros_like(x)
                arguments = dict(x_ptr=x, y_ptr=y, n=len(x), factor=factor, BLOCK=block)
                with use_cpu_driver():
                    launch.launch(scale_kernel, (-(-len(x) // block),), x, **arguments)
                assert torch.equal(y, x * factor), (x.dtype, len(x), factor, block)


@pytest.mark.compiled
def test_repeated_launch_skips_the_kernel_lookup(monkeypatch):
    if launch.INTERPRETING:
        return  # nothing is compiled
    x = torch.arange(64.0)
    calls = []
    run = scale_kernel.run
    monkeypatch.setattr(scale_kernel, "run", lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs))
    for factor, searches in ((7.0, 1), (7.0, 1), (9.0, 2), (7.0, 2)):
        y = torch.empty_like(x)
        with use_cpu_driver():
            launch.launch(scale_kernel, (1,), x, x_ptr=x, y_ptr=y, n=64, factor=factor, BLOCK=64)
        assert torch.equal(y, x * factor) and len(calls) == searches


def test_grid_beyond_the_limit_raises():
    kernel = Kernel()
    kernel.__name__ = "some_kernel"
    with pytest.raises(ValueError, match="2147483648 programs of some_kernel, a GPU supports 2147483647"):
        launch.launch(kernel, (2**31,), torch.zeros(1))
    assert kernel.grids == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_amx_changes_the_tiles_of_bfloat16_only(dtype):
    """A weight that fits in the L2 cache is read again for every 32 rows; attention takes 256 keys per step."""
    plain = target_named("cpu")
    amx = dataclasses.replace(plain, features=("avx512_bf16", "amx_tile", "amx_bf16"))

    def tiles(target):
        sides = [(1536, 384), (3072, 768)]
        gemms = [linear.pick_linear_fwd(1576, n, k, dtype, target, "ieee", Epilogue.NONE) for n, k in sides]
        keys = attention.pick_attention_fwd(96, 197, 1000, 64, dtype, target, False).block_n
        return [(tile.block_m, tile.block_k, tile.group) for tile in gemms], keys

    if dtype == torch.bfloat16:
        assert tiles(amx) == ([(32, 512, 1), (256, 256, 1)], 256)
    else:
        assert tiles(amx) == tiles(plain)
