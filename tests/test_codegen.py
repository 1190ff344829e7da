"""Machine code that the GPU compilers generate for the shipped tiles: properties that CPU runs cannot show.

`make test` checks one form of every kernel on every architecture; `make codegen`, which sets VIT_TRITON_CODEGEN,
checks every tile in every dtype.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
import re
import sys
import traceback

import pytest
import torch
from conftest import EMULATOR, INTERPRETER, launcher_modules

if INTERPRETER or EMULATOR:
    pytest.skip("the interpreter or the emulator replaces the driver", allow_module_level=True)

from triton.runtime.jit import JITFunction

import benchmarks.codegen as command
from benchmarks import __main__ as benchmarks
from benchmarks.codegen import amdgcn, sass, workloads
from benchmarks.codegen.architectures import ARCHITECTURES
from benchmarks.codegen.cost import COSTS, min_bytes
from benchmarks.codegen.driver import compile_for
from benchmarks.codegen.figures import DTYPES, figures, line
from benchmarks.codegen.instructions import Instruction, loops
from vit_triton import functional as F
from vit_triton.kernels import launch
from vit_triton.kernels.attention import config as attention_config
from vit_triton.kernels.device import target_of
from vit_triton.kernels.linear import config as linear_config
from vit_triton.kernels.linear.config import Epilogue, GemmConfig
from vit_triton.kernels.norm import config as norm_config
from vit_triton.kernels.patch_embed import config as patch_embed_config
from vit_triton.kernels.picker import override_choice
from vit_triton.kernels.sums import config as sums_config
from vit_triton.kernels.target import target_named

every_tile = pytest.mark.skipif("VIT_TRITON_CODEGEN" not in os.environ, reason="hours of compiling: make codegen")
KERNELS = {
    name
    for module in launcher_modules()
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel")
} - {"pack_weight_kernel", "patch_embed_gather_kernel"}  # run on CPUs only
# lines that access one number per row or column; all other accesses are rows
VECTORS = re.compile(
    r"\b(lse|delta|dlse|((pre|post)_)?(mean|rstd)|std|d?bias|pre_(weight|bias))_ptr \+"
    r"|\b(d(weight|bias)_partials|d?layer_scale|samples)_ptr \+"
    r"|\bweight_ptr \+ offs_d\b"
    r"|\b(lse|delta) = tl.load|seed_ptr\)"
    r"|\btl.load\(bias_ptrs,|\btl.store\(partial_ptrs,|logit_scale(_partials)?_ptr \+"  # rows of 49 numbers
    r"|\b(max|log2_sum|drel_h)_ptr \+"
    r"|masking.py:\d+: (value \+?=|return) tl.load"  # a bias in a masked step, in the thread layout of the scores
    r"|, (acc|tl.sum\(acc, \d\)).to\(dtype\)|acc.to\(drel_w_ptr"  # a bias's gradient, likewise
    r"|: bias = head_bias\("  # the line after the dropout's seed, to which debug information assigns its load
    r"|= scores_and_dp\(k, v"  # the line after delta's, to which debug information assigns delta's load
)
# partial sums are narrow on purpose, see pick_sum_parts; the bias of windows is gathered number by number
PARTS = re.compile(r"sums/|attention/position_bias")


def check_requirements(found):
    """Check all requirements on one compiled kernel."""
    code = found.code
    assert may_spill(found) or found.local_bytes == 0 and found.count(code.LOCAL) == 0, found
    assert found.registers > 0 and found.blocks >= 1, found
    assert found.shared_bytes <= found.shared_limit, found
    assert found.count(code.DOUBLE) == 0, found
    assert found.per_trip or found.trips <= 3, found  # a few trips known at compile time are unrolled
    half = found.dtype in ("bfloat16", "float16")
    product = "PRECISION" in found.constants and found.constants.get("MULTIPLIED") != "True"
    if not product:
        assert found.count(code.MATRIX) == 0, found
    elif found.dtype == "float32" and code is sass:
        assert found.count(code.MATRIX) == 0, found  # IEEE
    elif tile_rows(found) >= 64 and found.dtype != "tf32":
        own = ARCHITECTURES[found.arch].matrix
        assert 0 < found.count(own) == found.count(code.MATRIX), found
    else:
        assert found.count(code.MATRIX) > 0, found
    if product and half and code is sass and found.stages > 1 and found.trips > 1:
        assert found.count(code.COPIES) > 0, found  # the copy of the next tile overlaps with the product


def may_spill(found):
    """Whether a kernel may spill: LayerNorm rows of more than 8192 numbers exceed the registers; products over fewer
    than 16 numbers read them one by one; in float32, dK and dV of head sizes above 128 need more than 99 KiB of shared
    memory, and the tiles that fit spill; attention in windows spills with dropout, with head sizes above 32 (no Swin
    Transformer has them), with cosines on other GPUs than sm_80, sm_90 and sm_100, and in float32 on AMD GPUs; with a
    bias, attention spills 2 to 4 registers on sm_120 and in float32 on sm_100, and 41 in float32 on gfx90a."""
    if is_biased(found):
        few = {
            ("sm_120", "bfloat16"): 16,
            ("sm_100", "float32"): 16,
            ("gfx90a", "tf32"): 164,
        }
        return found.local_bytes <= few.get((found.arch, found.dtype), 0)
    if found.kernel.startswith("layer_norm"):
        return int(found.constants["BLOCK_D"]) > 8192
    if found.kernel == "linear_fwd_kernel":
        return found.constants["BLOCK_K"] == "16" and found.constants["EVEN_K"] == "False"
    if found.kernel.startswith("window_attention"):
        cosine = found.constants["COSINE"] == "True" and found.arch not in ("sm_80", "sm_90", "sm_100")
        amd = found.dtype in ("float32", "tf32") and found.arch.startswith("gfx")
        return cosine or amd or found.constants["DROPOUT"] == "True" or int(found.constants["HEAD_DIM"]) > 32
    wide = found.kernel == "attention_bwd_dkdv_kernel" and int(found.constants["HEAD_DIM"]) > 128
    return wide and found.dtype in ("float32", "tf32") and found.arch in ("sm_86", "sm_89", "sm_120")


def is_biased(found):
    """Whether the scores of an attention kernel have a bias; pointers of arguments that are None are constants."""
    return found.kernel.startswith("attention") and not {"bias_ptr", "rel_h_ptr"} <= found.constants.keys()


def tile_rows(found):
    """The smallest number of rows in a kernel's products; wgmma and tcgen05 need at least 64."""
    of_weight = "bwd_weight" in found.kernel or "dkdv" in found.kernel
    return int(found.constants["BLOCK_N" if of_weight else "BLOCK_M"])


def narrow_rows(found):
    """Lines that access rows of 16-bit numbers with less than 16 bytes per thread. 16 bytes require tiles of realistic
    sizes."""
    # on AMD GPUs, Triton's accumulator layout gives a thread 8 bytes of a row
    if found.code is not sass or found.dtype not in ("bfloat16", "float16"):
        return []
    if found.kernel.startswith("window_attention") and found.constants["BLOCK_M"] != "64":
        return []  # 16 or 32 rows of a head of 32 are less than 16 bytes per thread
    if found.kernel == "attention_fwd_kernel" and "rel_h_ptr" not in found.constants:
        return []  # with a decomposed bias, eight warps share a tile of 64 x 64: less than 16 bytes per thread
    if found.kernel == "layer_scale_bwd_kernel":
        return []  # the weight has the thread layout of the float32 partial sums
    rows = [where for where in found.narrow if not VECTORS.search(where.split(" < ")[0]) and not PARTS.match(where)]
    if "mean_ptr" not in found.constants and found.kernel.startswith("patch_embed"):
        rows = [where for where in rows if "a = tl.load(ptrs" not in where]  # a uint8 image
    return rows


FLOAT32 = [("sm_80", "float32"), ("sm_90", "float32"), ("sm_100", "float32"), ("gfx90a", "tf32")]
IN_FEW_FORMS = [*((arch, "bfloat16") for arch in ARCHITECTURES if arch != "sm_87"), *FLOAT32]


@functools.cache
def each_kernel(arch, dtype):
    return figures(arch, dtype, workloads.each_kernel)


@pytest.mark.parametrize(("arch", "dtype"), IN_FEW_FORMS)
def test_each_kernel(arch, dtype):
    assert {found.kernel for found in each_kernel(arch, dtype)} == KERNELS == set(COSTS)
    for found in each_kernel(arch, dtype):
        check_requirements(found)
        assert not narrow_rows(found), found


def test_main_kernels_on_sm_87():
    """Jetson Orin has the tiles of sm_80."""
    found = figures("sm_87", "bfloat16", workloads.main_kernels)
    assert len({kernel.kernel for kernel in found}) > 10
    for kernel in found:
        check_requirements(kernel)


@pytest.mark.parametrize("arch", linear_config.SMALL_TILES)
def test_tiles_for_few_rows(arch):
    """They have the matrix instruction of the tiles for many rows."""

    def workload(dtype):
        for tile in linear_config.SMALL_TILES[arch]:
            with override_choice(lambda picker, args, tile=tile: tile):
                workloads.residual_mlp(dtype, 1, training=False)
        workloads.packed_attention(dtype, 1, 197, 64)

    found = figures(arch, "bfloat16", workload, only="_fwd")
    tiles = collections.Counter((kernel.kernel, kernel.constants["BLOCK_M"]) for kernel in found)
    assert tiles.total() == 2 * len(linear_config.SMALL_TILES[arch]) + 1 and tiles["attention_fwd_kernel", "64"] == 1
    for kernel in found:
        check_requirements(kernel)
        assert arch == "sm_80" or tile_rows(kernel) >= 64, kernel


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_hidden_width_that_is_no_multiple_of_16(arch):
    def workload(dtype):
        with workloads.tiles_of(2**30):
            workloads.residual_mlp(dtype, 1, hidden=3000)

    for found in figures(arch, "bfloat16", workload, only="linear_bwd_input"):
        check_requirements(found)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_masked_attention(arch):
    """Biases, key lengths, causal masks and packed sequences cause no spills at head size 64."""
    found = figures(arch, "bfloat16", workloads.masked_attention, only="attention")
    assert {kernel.kernel for kernel in found} == {name for name in KERNELS if name.startswith("attention")}
    for kernel in found:
        check_requirements(kernel)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_cosine_windows(arch):
    """Windows of Swin V2 (8 and 16), and of 7, which are masked, cause no spills."""

    def workload(dtype):
        for window in (7, 8, 16):
            workloads.swin_attention(dtype, 1, 2 * window, 2, window, cosine=True)

    for found in figures(arch, "bfloat16", workload, only="window_attention"):
        check_requirements(found)


def test_expanded_gradients():
    """Expanded gradients keep 16-byte loads and cause no spills."""
    for found in figures("sm_80", "bfloat16", workloads.expanded_gradients):
        check_requirements(found)
        assert not narrow_rows(found), found


@pytest.mark.parametrize(
    ("arch", "dtype"), [*((f"sm_{n}", "bfloat16") for n in (80, 86, 90, 100)), ("sm_80", "float32")]
)
def test_one_head_size_for_every_attention_tile(arch, dtype):
    def workload(dtype):
        for head_dim, dropout_p in itertools.product((72, 88, 128, 192, 256), (0.0, 0.1)):
            workloads.attention(dtype, head_dim, dropout_p)

    for found in figures(arch, dtype, workload):
        check_requirements(found)
        # includes head sizes 72 and 88, whose strides are no multiples of 16; too small for 16 bytes per thread: the
        # second tile, and dK/dV's masked step of 16 query rows with eight warps
        small = ("_tail", "tile[1]", "= attention_bwd_dkdv_step(")
        assert not [where for where in narrow_rows(found) if not any(name in where for name in small)], found


# ViT-B/16 in bfloat16: maximum registers, minimum blocks per multiprocessor, maximum instructions per loop trip
# (together they bound the utilization of the matrix units)
LIMITS = {
    # windows of 7 x 7 and 16 x 16 tokens
    ("sm_80", "window_attention_fwd_kernel"): (168, 3, 730),
    ("sm_90", "window_attention_fwd_kernel"): (176, 2, 710),
    **{(f"sm_{n}", "window_attention_bwd_dkdv_kernel"): (255, 1, 1350) for n in (80, 90, 100)},
    ("sm_80", "attention_fwd_kernel"): (255, 2, 700),
    ("sm_80", "attention_bwd_dq_kernel"): (168, 3, 230),
    ("sm_80", "attention_bwd_dkdv_kernel"): (255, 2, 300),
    ("sm_80", "linear_fwd_kernel"): (255, 2, 175),
    ("sm_80", "linear_bwd_input_kernel"): (255, 2, 190),
    ("sm_80", "linear_bwd_weight_kernel"): (255, 2, 430),  # with stochastic depth; else 220
    ("sm_90", "attention_fwd_kernel"): (128, 4, 350),  # the tile for few heads; else 330
    ("sm_90", "attention_bwd_dq_kernel"): (128, 4, 200),
    ("sm_90", "attention_bwd_dkdv_kernel"): (168, 3, 250),
    ("sm_90", "linear_fwd_kernel"): (128, 2, 95),
    ("sm_90", "linear_bwd_input_kernel"): (128, 2, 170),
    ("sm_90", "linear_bwd_weight_kernel"): (128, 2, 135),
    ("sm_100", "attention_fwd_kernel"): (255, 2, 570),
    ("sm_100", "attention_bwd_dq_kernel"): (168, 2, 510),
    ("sm_100", "attention_bwd_dkdv_kernel"): (168, 2, 390),
    ("sm_100", "linear_fwd_kernel"): (128, 2, 115),
    ("sm_100", "linear_bwd_input_kernel"): (128, 2, 180),
    ("sm_100", "linear_bwd_weight_kernel"): (128, 2, 290),  # with stochastic depth; else 120
    # a rotating epilogue: with a limit of 128 registers it spills 14, in two subtiles it takes more instructions
    ("sm_100", "linear_fwd_kernel, rotating"): (168, 1, 115),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_registers_blocks_and_instructions_of_vit_b_16(arch):
    products = [found for found in each_kernel(arch, "bfloat16") if "PRECISION" in found.constants]
    assert {kernel.split(",")[0] for of, kernel in LIMITS if of == arch} <= {found.kernel for found in products}
    for found in products:
        if is_biased(found):
            continue
        limits = LIMITS.get((arch, found.kernel), (255, 2, 10**4))
        if found.kernel == "linear_fwd_kernel" and found.constants["PAIRS"] != "":
            limits = LIMITS.get((arch, "linear_fwd_kernel, rotating"), limits)
        registers, blocks, instructions = limits
        linear = ("linear_fwd_kernel", "linear_bwd_input_kernel", "linear_bwd_weight_kernel")
        # other tiles, without descriptors; with stochastic depth, a weight's gradient has one of them
        few_rows = arch == "sm_90" and found.kernel in linear and found.warps == 4
        registers = 168 if few_rows else registers
        assert found.registers <= registers and found.blocks >= blocks, found
        scaled = found.kernel == "linear_bwd_weight_kernel"
        assert max(found.per_trip) <= ((370 if scaled else 200) if few_rows else instructions), found
        if found.kernel in linear and not few_rows:
            assert (found.count("UTMALDG") > 0) == (arch != "sm_80"), found  # loads through descriptors
        if arch == "sm_90" and found.kernel == "linear_fwd_kernel" and not few_rows:  # stores through descriptors
            assert (found.count("UTMASTG") > 0) == (found.constants["SUBTILES"] == "1"), found


def test_registers_blocks_and_instructions_of_long_attention():
    """The sequences end with a masked step of 16, 64 or 32 keys. Many heads: few have smaller tiles."""

    def workload(dtype):
        with workloads.tiles_of(workloads.HEAD_COUNTS[-1]):
            for head_dim, n_tokens in ((64, 577), (64, 570), (72, 730), (88, 730)):
                workloads.attention(dtype, head_dim, 0.0, n_tokens, n_tokens)

    long = figures("sm_90", "bfloat16", workload, only="attention_fwd")
    assert len(long) == 4
    for found in long:
        check_requirements(found)
        assert found.constants["BLOCK_M"] == "128" and found.registers <= 128 and found.blocks >= 2, found


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_instructions_of_an_activation(dtype, arch, activation):
    """At most 12 float32 instructions per element, excluding the bias addition."""

    @torch.no_grad()
    def workload(dtype):
        x, w1, b1, w2 = (torch.zeros(shape, dtype=dtype) for shape in ((512, 768), (3072, 768), (3072,), (768, 3072)))
        F.mlp(x, w1, b1, w2, None, activation=activation, backend="triton")

    (found,) = (each for each in figures(arch, dtype, workload) if each.constants["ACTIVATION"] == activation)
    elements = int(found.constants["BLOCK_M"]) * int(found.constants["BLOCK_N"]) / (32 * found.warps)  # per thread
    float32 = found.count("F(FMA|MUL|ADD)2?|FMNMX|FSETP|FSEL|MUFU") / elements - 1
    assert 6 < float32 <= 12.1, float32  # 0.1 for instructions per tile


# --- every tile --------------------------------------------------------------------------------------------


@every_tile
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tile(arch, dtype):
    failed = []
    for found in figures(arch, dtype, workloads.every_tile):
        try:
            check_requirements(found)
        except AssertionError as error:
            failed.append(f"{line(found)}  {traceback.extract_tb(error.__traceback__)[-1].line}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "tf32"])  # float16 has bfloat16's tiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tile_is_compiled(arch, dtype, monkeypatch):
    picked = record_picks(monkeypatch)
    monkeypatch.setattr(launch, "start", lambda *launch: None)
    figures(arch, dtype, workloads.every_tile)
    for name in list(picked):
        if is_of_bias(name):
            del picked[name]  # test_masked_attention compiles their tiles for heads of 64
    for name, configs in every_pick(arch, dtype).items():
        assert picked.pop(name) == configs, name
    assert not picked


def is_of_bias(name):
    """Whether a picker chooses tiles for scores with a bias."""
    return name.startswith("pick_attention") and name.endswith(("_rel", "_bias"))


def record_picks(monkeypatch):
    """Record the results of the ``pick_*`` functions by name."""
    picked = collections.defaultdict(set)

    def recording(name, pick):
        def wrapper(*args):
            picked[name].add(_in_one_part(pick(*args)))
            return pick(*args)

        return wrapper

    for module in launcher_modules():
        for name in [name for name in vars(module) if name.startswith("pick_")]:
            monkeypatch.setattr(module, name, recording(name, getattr(module, name)))
    return picked


def _in_one_part(config):
    """Drop split-K and the windows per program, which leave the loops unchanged."""
    if isinstance(config, attention_config.WindowConfig):
        return dataclasses.replace(config, group=1)
    return dataclasses.replace(config, split=1) if isinstance(config, GemmConfig) else config


def every_pick(arch, dtype):
    """The results of the ``pick_*`` functions for all relevant arguments, by name, except those for biased scores."""
    torch_dtype, precision = DTYPES[dtype], "tf32" if dtype == "tf32" and arch != "gfx90a" else "ieee"
    lengths, sizes, powers = (
        (1, 16, 17, 197, 513),
        (1, 17, 33, 64, 65, 129, 768, 1152, 1536, 3072, 4096),
        [2**n for n in range(17)],
    )
    target = target_named(arch)
    attention = list(itertools.product(lengths, lengths, range(1, 257), [torch_dtype], [target], (False, True)))
    patches = [(8, n, k, torch_dtype, target, precision) for n in sizes for k in sizes]
    linear = [(*args, epilogue) for args in patches for epilogue in Epilogue]
    tokens = [side**2 for side in workloads.WINDOWS]
    windows = list(itertools.product([8], tokens, (16, 32, 64), [torch_dtype], [target], (False, True)))
    of_blocks = [args for args in windows if attention_config.pick_window_bwd(*args).block_m < args[1]]
    parts = range(2, 300)  # a single part is the gradient itself
    widths = {
        "pick_layer_norm": powers,
        "pick_qk_norm": range(1, 257),
        "pick_rotary": range(1, 129),
        "pick_layer_scale_bwd": powers,
        "pick_swiglu": powers,
        "pick_sum_parts": parts,
        "pick_position_bias": tokens,
    }
    arguments = {name: [(width, target) for width in sizes] for name, sizes in widths.items()}
    pickers = {
        name: pick
        for module in (attention_config, linear_config, norm_config, patch_embed_config, sums_config)
        for name, pick in vars(module).items()
        if name.startswith("pick_") and name not in ("pick_gemm", "pick_bwd_weight") and not is_of_bias(name)
    }
    for name in pickers:
        if name == "pick_attention_fwd":
            arguments[name] = [(m, *args) for m in workloads.HEAD_COUNTS for args in attention]
        elif name.startswith("pick_attention"):
            arguments[name] = attention
        elif name == "pick_window_fwd":
            arguments[name] = [(*args, dropout) for args in windows for dropout in (False, True)]
        elif name.startswith("pick_window"):
            arguments[name] = of_blocks if name == "pick_window_bwd_dkdv" else windows
        elif name in workloads.BY_ROWS:
            arguments[name] = [(m, *args[1:]) for m in workloads.ROW_COUNTS for args in linear]
        elif name.startswith("pick_linear"):
            arguments[name] = linear
        elif name.startswith("pick_patch"):
            arguments[name] = patches
    return {name: {_in_one_part(pickers[name](*args)) for args in calls} for name, calls in arguments.items()}


# --- computation of the figures ----------------------------------------------------------------------------


def test_architecture_names_match_the_targets():
    for arch in ARCHITECTURES:
        with compile_for(arch):
            assert target_of(torch.device("cpu")).name == arch


def test_resident_blocks():
    """H100: 128 threads with 128 registers use 16384 of 65536; 45.5 KiB plus 1 KiB for the system fit 4 times in
    228 KiB. MI300: 512 registers per lane hold 4 waves with 128 registers, or 3 with 136; then a block of 8 waves fits
    once."""
    h100, mi300 = ARCHITECTURES["sm_90"], ARCHITECTURES["gfx942"]
    assert h100.resident(128, 4, 0) == (4, "registers")
    assert h100.resident(33, 4, 45 * 1024 + 512) == (4, "shared memory")
    assert h100.resident(16, 32, 0) == (2, "warps")
    assert h100.resident(16, 1, 0) == (32, "blocks")
    assert mi300.resident(128, 4, 0) == (4, "registers")
    assert mi300.resident(129, 8, 0) == (1, "registers")
    assert mi300.resident(32, 4, 20 * 1024) == (3, "shared memory")


def test_resident_blocks_agree_with_llvm():
    """LLVM's AMD assembly contains the occupancy: the waves per SIMD that the registers allow."""
    with compile_for("gfx942") as found:
        workloads.each_kernel(torch.bfloat16)
    for each in found:
        registers, _, _ = amdgcn.read(each.kernel)
        waves = int(re.search(r"; Occupancy: (\d+)", each.kernel.asm["amdgcn"])[1])
        assert ARCHITECTURES["gfx942"].resident(registers, 4, 0)[0] == waves, (each.kernel.name, registers)


def test_loops():
    """Flow 0 -> 1 -> 2 -> 3 -> 4 with branches 3 -> 1 and 2 -> 2; the jump to 4 after EXIT forms no loop."""
    code = [Instruction("A"), Instruction("B"), Instruction("BRA", 2), Instruction("BRA", 1)]
    code += [Instruction("C"), Instruction("EXIT", falls_through=False), Instruction("BRA", 4, falls_through=False)]
    assert loops(code) == [{1, 2, 3}]


def test_a_loop_that_ends_without_a_branch():
    code = [Instruction("s_branch", 3, falls_through=False), Instruction("A"), Instruction("s_cbranch", 5)]
    code += [Instruction("B"), Instruction("s_branch", 1, falls_through=False), Instruction("s_endpgm", None, False)]
    assert loops(code) == [{1, 2, 3, 4}]


def test_flops_and_bytes_of_a_launch():
    """197 tokens, 12 heads of 64, 8 images: attention takes two products forward, three for dQ, four for dK and dV."""
    found = {each.kernel: each for each in each_kernel("sm_80", "bfloat16") if not is_biased(each)}
    product = 2 * 8 * 12 * 197 * 197 * 64
    tokens, lse = 8 * 197 * 768 * 2, 8 * 12 * 197 * 4
    forward = found["attention_fwd_kernel"]
    assert (forward.flops, forward.bytes, forward.grid) == (2 * product, 4 * tokens + lse, 2 * 96)
    assert forward.trips == 197 // 64 and forward.intensity == forward.flops / forward.bytes
    assert found["attention_bwd_dq_kernel"].flops == 3 * product
    assert found["attention_bwd_dkdv_kernel"].flops == 4 * product
    inputs = {each.flops for each in each_kernel("sm_80", "bfloat16") if each.kernel == "linear_bwd_input_kernel"}
    assert 2 * 8 * 197 * 768 * 3072 in inputs
    image = 8 * 196 * 768 * 2  # bytes; the image is read, its gradient read and written
    assert found["patch_embed_bwd_norm_kernel"].bytes == 3 * image + 2 * 8 * 196 * 4 + 768 * 2


@torch.no_grad()
def test_inference_attention_writes_no_log_sum_exp():
    (found,) = figures("sm_80", "bfloat16", lambda dtype: workloads.attention(dtype, 64, 0.0), only="attention_fwd")
    rows = 2 * 197
    assert (found.flops, found.bytes) == (2 * 2 * rows * 197 * 64, 4 * rows * 64 * 2)


def test_an_expanded_tensor_counts_once():
    x = torch.zeros(1).expand(1000, 1000)
    assert min_bytes("any", {"x_ptr": x, "y_ptr": torch.zeros(3), "n": 5}) == 4 + 12


def test_loop_trip_computes_one_step_of_a_tile():
    """A loop trip computes one step of a block's tile, so the loop is found completely and is not unrolled."""
    for found in each_kernel("sm_80", "bfloat16"):
        if found.kernel == "linear_bwd_input_kernel":
            rows, cols, depth = (int(found.constants["BLOCK_" + side]) for side in "MKN")
            with compile_for("sm_80") as again:
                workloads.each_kernel(torch.bfloat16)
            (code,) = (sass.read(each.kernel)[2] for each in again if each.kernel.hash == found.hash)
            (body,) = loops(code)
            products = sum(code[i].opcode == "HMMA" for i in body)
            assert products * 16 * 8 * 16 * found.warps == rows * cols * depth


# --- the command -------------------------------------------------------------------------------------------


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "codegen", *map(str, arguments)])
    benchmarks.main()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.workloads, "vit_b_16", workloads.each_kernel)
    options = ("--arch", "sm_80", "--dtype", "bfloat16", "--jobs", 1)
    run(monkeypatch, *options, "--only", "sum_parts", "--json", tmp_path / "f.json", "--dump", tmp_path / "dump")
    content = json.loads((tmp_path / "f.json").read_text())
    assert content["command"] == "codegen" and content["options"]["arch"] == ["sm_80"] and content["machine"]["triton"]
    written = content["results"]
    assert {each["kernel"] for each in written} == {"sum_parts_kernel"} and written[0]["constants"]["BLOCK"]
    assert written[0]["intensity"] == written[0]["flops"] / written[0]["bytes"] and written[0]["trips"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert "without a GPU" in lines[0] and lines[1].startswith("arch") and "sum_parts" in lines[2]
    assert len({len(line) for line in lines[1:]}) == 1
    dumped = {path.suffix for path in (tmp_path / "dump").iterdir()}
    assert dumped == {".cubin", ".ptx", ".json"}


def test_only_selected_kernels_are_compiled():
    with compile_for("sm_80", "sum_parts") as found:
        workloads.each_kernel(torch.bfloat16)
    assert {each.kernel.name for each in found} == {"sum_parts_kernel"}


def test_results_before_an_interrupt_are_kept(tmp_path, monkeypatch, capsys):
    read = command.figures

    def interrupted(arch, dtype, **options):
        if arch == "sm_90":
            raise KeyboardInterrupt
        return read(arch, dtype, **options)

    monkeypatch.setattr(command, "figures", interrupted)
    monkeypatch.setattr(command.workloads, "vit_b_16", workloads.each_kernel)
    options = ("--arch", "sm_80", "sm_90", "--dtype", "bfloat16", "--jobs", 1, "--only", "sum_parts")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *options, "--json", tmp_path / "f.json")
    assert stopped.value.code == 130 and "stopped" in capsys.readouterr().out
    assert {each["arch"] for each in json.loads((tmp_path / "f.json").read_text())["results"]} == {"sm_80"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--arch", "sm_70"], "invalid choice: 'sm_70'"),
        (["--dump", __file__], "must be a folder, got the file"),
        (["--json", "/nowhere/figures.json"], "must be a file in a folder that exists"),
        (["--jobs", "0"], "must be a whole number above 0"),
        (["--only", "tension"], "no name contains 'tension'; available: attention_fwd_kernel; "),
    ],
)
def test_wrong_options(arguments, complaint, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code != 0 and complaint in capsys.readouterr().err + str(stopped.value.code)
