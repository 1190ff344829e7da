"""Products in the tiles of AMX: the generated code in an emulator of the tile instructions, and its instructions.

The emulator (:mod:`amx_emulator`) runs on CPUs without AMX, but the rest of the code is native and needs AVX-512 BF16.
On CPUs with AMX, all tests of the package also run the instructions themselves.
"""

import ctypes
import functools
import mmap
import multiprocessing
import re

import amx_emulator
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from amx_emulator import EMULATOR
from conftest import EMULATOR as PTX_EMULATOR
from conftest import INTERPRETER
from precision import assert_as_precise, double, magnitude, run
from test_attention import absolute as absolute_attention
from test_attention import formula as attention

if INTERPRETER or PTX_EMULATOR:
    pytest.skip("nothing is compiled for the CPU with the interpreter or the emulator", allow_module_level=True)

from triton._C.libtriton import llvm
from triton.compiler import ASTSource
from triton.runtime import driver as triton_driver

from vit_triton import functional as F
from vit_triton.cpu import compiler, elf, features
from vit_triton.cpu.driver import CPUDriver
from vit_triton.kernels.linear.backward import linear_bwd_input, linear_bwd_weight
from vit_triton.kernels.linear.forward import linear_fwd
from vit_triton.kernels.linear.pack import pack_weight

BF16 = (*features.REQUIRED, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
AMX = ",".join((*BF16, *features.AMX))

needs_bf16 = pytest.mark.skipif(not set(BF16) <= set(features.detect()), reason="the CPU does not have AVX-512 BF16")


@pytest.fixture
def amx(monkeypatch, tmp_path):
    """Emulate AMX in everything that is compiled for the CPU; invalid instructions fail the test."""
    make, address = compiler._make_llir, elf._libm_address
    monkeypatch.setattr(compiler, "_make_llir", lambda text, options: make(amx_emulator.with_calls(text), options))
    monkeypatch.setattr(elf, "_libm_address", lambda name: amx_emulator.SYMBOLS.get(name) or address(name))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # its own name: kernels are cached by the target
    monkeypatch.setattr(triton_driver, "_active", CPUDriver(f"{AMX},emulated"))
    EMULATOR.reset()
    yield EMULATOR
    assert not EMULATOR.errors, "\n".join(EMULATOR.errors[:5])


@triton.jit
def product_kernel(
    a_ptr, b_ptr, y_ptr, m, n, k, stride_am, stride_ak, stride_bk, stride_bn,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    offs_m, offs_n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, k, K):
        offs_k = start + tl.arange(0, K)
        a_ptrs = a_ptr + offs_m * stride_am + offs_k[None, :] * stride_ak
        b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n * stride_bn
        a = tl.load(a_ptrs, mask=(offs_m < m) & (offs_k < k)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(offs_k < k)[:, None] & (offs_n < n), other=0.0)
        total = tl.dot(a, b, total)
    tl.store(y_ptr + offs_m * n + offs_n, total, mask=(offs_m < m) & (offs_n < n))


def matrix(rows, cols, *, transposed=False, gap=0):
    """Random numbers between memory that must not be read as tiles. ``transposed``: columns are contiguous; ``gap``:
    elements between the rows in memory, which are NaN."""
    rows, cols = (cols, rows) if transposed else (rows, cols)
    memory = torch.full((4096 + rows * (cols + gap) + 4096,), torch.nan).bfloat16()
    x = memory[4096:-4096].view(rows, cols + gap)[:, :cols]
    x.copy_(torch.randn(rows, cols))
    start, size = memory.data_ptr(), memory.element_size()
    stop = x.data_ptr() + ((rows - 1) * x.stride(0) + cols) * size
    EMULATOR.outside += [(start, x.data_ptr()), (stop, start + len(memory) * size)]
    return x.T if transposed else x


def multiply(a, b, tile):
    (m, k), n = a.shape, b.shape[1]
    y = torch.full((m, n), torch.nan)
    product_kernel[(1,)](a, b, y, m, n, k, *a.stride(), *b.stride(), *tile)
    assert_product(y, a, b)


def assert_product(y, a, b):
    """The rule of :mod:`precision` for sums of float32."""
    allowed = 4 * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs()).norm()
    assert (y - a.double() @ b.double()).norm() <= allowed


# partial blocks of 1 to 31 rows, every remainder of K, several trips of the loop and none
@needs_bf16
@pytest.mark.parametrize(
    ("m", "n", "k", "tile"),
    [
        *((m, 32, 32, (64, 32, 32)) for m in (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64)),
        *((40, 50, k, (64, 64, 64)) for k in (0, 1, 2, 31, 32, 33, 43, 63, 64, 65, 95, 129)),
        *((70, n, 70, (128, 64, 32)) for n in (1, 16, 31, 33, 64)),
    ],
)
def test_products_of_any_size(m, n, k, tile, amx):
    multiply(matrix(m, k), matrix(k, n), tile)
    blocks = -(-m // 32) * -(-n // 32)
    assert amx.executed["tdpbf16ps"] == 4 * blocks * (k // 32)
    trips = -(-k // tile[2])
    assert amx.executed["tilezero"] == 4 * blocks * min(trips, 1)  # only the first trip starts from 0
    partial = trips * -(-n // 32) * (m % 32 > 0)
    assert (amx.executed["ldtilecfg"], amx.executed["tilerelease"]) == (1 + 2 * partial, 1)


@needs_bf16
@pytest.mark.parametrize("m", [7, 20, 45, 64])
@pytest.mark.parametrize("k", [33, 64, 77])
@pytest.mark.parametrize(("a", "b"), [(True, False), (False, True), (True, True)])
def test_products_of_transposed_operands(a, b, m, k, amx):
    multiply(matrix(m, k, transposed=a, gap=5), matrix(k, 40, transposed=b, gap=3), (64, 64, 64))
    assert amx.executed["tdpbf16ps"]


def _multiply_at_the_end_of_memory(m, k):
    """A (m, k) lies transposed before a page that cannot be read."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 4 * page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + 3 * page
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0)
    words = torch.frombuffer(memory, dtype=torch.bfloat16, count=3 * page // 2)
    multiply(words[-m * k :].view(k, m).copy_(torch.randn(k, m)).T, matrix(k, 32), (64, 32, 64))
    assert EMULATOR.executed["tdpbf16ps"]


@needs_bf16
@pytest.mark.parametrize(("m", "k"), [(64, 40), (64, 33), (50, 40)])
def test_transposed_operand_is_read_within_its_bounds(m, k, amx):
    child = multiprocessing.get_context("fork").Process(target=_multiply_at_the_end_of_memory, args=(m, k))
    child.start()
    child.join(120)
    assert child.exitcode == 0  # a read of the page would be a segmentation fault


@needs_bf16
@pytest.mark.parametrize("stride", [2, -40])
def test_products_of_strided_rows(stride, amx):
    """The elements along K are contiguous; the rows are every second one, or in reverse order."""
    a = matrix(80, 40)
    if stride > 0:
        multiply(a[::2], matrix(40, 32), (64, 32, 64))
    else:
        y, b = torch.full((80, 32), torch.nan), matrix(40, 32)
        product_kernel[(1,)](a[-1:], b, y, 80, 32, 40, stride, 1, *b.stride(), 128, 32, 64)
        assert_product(y, a.flip(0), b)
    assert amx.executed["tdpbf16ps"] == 4 * (2 if stride > 0 else 3)


@triton.jit
def irregular_rows_kernel(rows_ptr, a_ptr, b_ptr, y_ptr, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    offs_m, offs_n = tl.arange(0, M), tl.arange(0, N)
    rows = tl.load(rows_ptr + offs_m)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, k, K):
        offs_k = start + tl.arange(0, K)
        a = tl.load(a_ptr + rows[:, None] * k + offs_k[None, :])
        b = tl.load(b_ptr + offs_k[:, None] * N + offs_n[None, :])
        total = tl.dot(a, b, total)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], total)


@needs_bf16
def test_rows_without_a_pitch_use_no_tiles(amx):
    rows = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6] * 4, dtype=torch.int32)
    a, b, y = matrix(10, 64), matrix(64, 32), torch.full((32, 32), torch.nan)
    irregular_rows_kernel[(1,)](rows, a, b, y, 64, 32, 32, 32)
    assert_product(y, a[rows], b)
    assert not amx.executed


@triton.jit
def sums_kernel(a_ptr, b_ptr, y_ptr, k, scale, SIZE: tl.constexpr):
    """Sums of products that start from 0, from other numbers, and that are changed between two products."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    first, second, third = (
        tl.zeros([SIZE, SIZE], tl.float32),
        tl.full([SIZE, SIZE], 2.0, tl.float32),
        tl.zeros([SIZE, SIZE], tl.float32),
    )
    for start in range(0, k, SIZE):
        a = tl.load(a_ptr + i * k + start + j)
        b = tl.load(b_ptr + (start + i) * SIZE + j)
        first = tl.dot(a, b, first)
        second = tl.dot(a, b, second)
        third = tl.dot(a, b, third * scale)
    tl.store(y_ptr + i * SIZE + j, first)
    tl.store(y_ptr + SIZE * SIZE + i * SIZE + j, second)
    tl.store(y_ptr + 2 * SIZE * SIZE + i * SIZE + j, third)


@needs_bf16
@pytest.mark.parametrize("trips", [0, 1, 3])
def test_sums_of_products_in_a_loop(trips, amx):
    size, scale = 32, -0.5
    a, b = matrix(size, trips * size), matrix(trips * size, size)
    y = torch.full((3, size, size), torch.nan)
    sums_kernel[(1,)](a, b, y, trips * size, scale, size)
    parts = [x.double() @ z.double() for x, z in zip(a.split(size, 1), b.split(size), strict=True) if trips]
    third = torch.zeros(size, size).double()
    for part in parts:
        third = third * scale + part
    total = sum(parts, torch.zeros(size, size).double())
    assert (y - torch.stack([total, total + 2, third])).norm() <= 1e-5 * (1 + total.norm())


# --- instructions and permission ---------------------------------------------------------------------------


def tile_instructions(kernel, signature, arch, **constants):
    """The tile instructions in the assembly of a kernel, in order, with their tiles."""
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, types, constants), target=CPUDriver(arch).get_current_target())
    cpu, enabled = features.llvm_target(arch)
    assembly = llvm.translate_to_asm(compiled.asm["llir"], compiler.TRIPLE, cpu, enabled, [], True, False, False)
    found = re.findall(r"^\s+(ldtilecfg|tile\w+|tdp\w+)(.*)", assembly, re.MULTILINE)
    return [" ".join([name, *re.findall(r"tmm\d", operands)]) for name, operands in found]


INTEGERS = dict.fromkeys(("m", "n", "k", "stride_am", "stride_bk"), "i32")
LAYOUT = {"stride_ak": 1, "stride_bn": 1, "M": 64, "N": 64, "K": 32}


def pointers(dtype):
    return {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "y_ptr": "*fp32"}


def test_tiles_are_configured_first_and_released_last():
    found = tile_instructions(product_kernel, {**pointers("bf16"), **INTEGERS}, AMX, **LAYOUT)
    assert found[0] == "ldtilecfg" and found[-1] == "tilerelease" and found.count("tilerelease") == 1
    # in assembly, the result is the last operand and B the first
    step = [*(f"tileloadd tmm{i}" for i in range(4, 8)),
            *(f"tdpbf16ps tmm{6 + i % 2} tmm{4 + i // 2} tmm{i}" for i in (0, 2, 1, 3))]  # fmt: skip
    start = found.index("tileloadd tmm4")
    assert found[start : start + 8] == step
    assert set(found) == {"ldtilecfg", "tilerelease", *step, *(f"tilezero tmm{i}" for i in range(4)),
                          *(f"{x} tmm{i}" for x in ("tileloadd", "tilestored") for i in range(4))}  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "arch", "sizes"),
    [("fp32", AMX, {}), ("fp16", AMX, {}), ("bf16", ",".join(BF16), {}), ("bf16", AMX, {"M": 16})],
)
def test_other_products_use_no_tiles(dtype, arch, sizes):
    assert not tile_instructions(product_kernel, {**pointers(dtype), **INTEGERS}, arch, **{**LAYOUT, **sizes})


@pytest.mark.parametrize(
    ("flags", "granted", "expected"),
    [
        ((*BF16, "amx_tile", "amx_bf16", "amx_int8"), True, True),
        ((*BF16, "amx_tile", "amx_bf16"), False, False),
        ((*BF16, "amx_tile"), True, False),
        ((*features.REQUIRED, "amx_tile", "amx_bf16"), True, False),
        (BF16, True, False),
    ],
)
@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_permission_is_requested_once_on_cpus_with_amx(vendor, flags, granted, expected, monkeypatch):
    requests = []
    monkeypatch.setattr(features, "_cpuinfo", {"flags": " ".join(flags), "vendor_id": vendor}.get)
    monkeypatch.setattr(features, "_request_tiles", lambda: requests.append(1) or granted)
    monkeypatch.setattr(features, "detect", functools.cache(features.detect.__wrapped__))
    names = features.arch().split(",")
    assert features.arch().split(",") == names
    assert len(requests) == (set(features.AMX) <= set(flags) and "avx512_bf16" in flags)
    assert ("amx_tile" in names, "amx_bf16" in names) == (expected, expected)
    # without AMX, Intel's CPUs widen bfloat16
    bf16_words = features.multiplies_bf16(names)
    assert bf16_words == (expected or vendor != "GenuineIntel" and "avx512_bf16" in flags)
    assert CPUDriver(",".join(names)).panels[1:] == (((torch.bfloat16, (32, 2)),) if bf16_words else ())


def test_tiles_are_requested_from_linux(monkeypatch):
    calls = []

    class Library:
        def __init__(self, name):
            pass

        def syscall(self, *numbers):
            calls.append(numbers)
            return -(len(calls) > 1)

    monkeypatch.setattr("ctypes.CDLL", Library)
    assert features._request_tiles() and not features._request_tiles()
    assert calls[0] == (158, 0x1023, 18)  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)


# --- the emulator ------------------------------------------------------------------------------------------


def configuration(rows, row_bytes):
    memory = np.zeros(64, np.uint8)
    memory[0], memory[48 : 48 + len(rows)] = 1, rows
    memory[16 : 16 + 2 * len(rows)] = np.array(row_bytes, np.uint16).view(np.uint8)
    return memory


@pytest.mark.parametrize(
    ("rows", "row_bytes", "instruction", "message"),
    [
        ([17], [64], None, "too large"),
        ([16], [65], None, "too large"),
        ([0], [64], None, "only one of rows and bytes"),
        ([16, 16], [64, 64], ("tilezero", 2), "tile 2 is not configured"),
        ([16, 15, 16], [64] * 3, ("tdpbf16ps", 0, 1, 2), "15 rows of A, 16 of the result"),
        ([16, 16, 15], [64] * 3, ("tdpbf16ps", 0, 1, 2), "15 rows of B, 16 words"),
        ([16, 16, 16], [64, 64, 32], ("tdpbf16ps", 0, 1, 2), "32 bytes per row of B, 64 of the result"),
        ([16, 16, 16], [64] * 3, ("tdpbf16ps", 0, 1, 1), "a tile is two operands"),
    ],
)
def test_emulator_reports_invalid_instructions(rows, row_bytes, instruction, message):
    EMULATOR.reset()
    memory = configuration(rows, row_bytes)
    EMULATOR.execute("ldtilecfg", memory.ctypes.data)
    if instruction is not None:
        assert not EMULATOR.errors
        EMULATOR.execute(*instruction)
    assert len(EMULATOR.errors) == 1 and message in EMULATOR.errors[0]


def test_emulator_reports_reads_outside_an_array():
    EMULATOR.reset()
    memory, words = configuration([2], [64]), np.zeros(48, np.float32)
    EMULATOR.execute("ldtilecfg", memory.ctypes.data)
    EMULATOR.outside.append((words.ctypes.data + 128, words.ctypes.data + 192))
    EMULATOR.execute("tileloadd64", 0, words.ctypes.data, 64)
    assert not EMULATOR.errors
    EMULATOR.execute("tileloadd64", 0, words.ctypes.data + 4, 64)
    assert "row 1 is read outside its array" in EMULATOR.errors[0]


def test_emulator_multiplies_as_the_instruction():
    """Even and odd elements are summed separately, in order; subnormal numbers are 0."""
    EMULATOR.reset()
    memory = configuration([1, 1, 16], [64] * 3)
    EMULATOR.execute("ldtilecfg", memory.ctypes.data)
    a, b, total = torch.ones(32).bfloat16(), torch.zeros(16, 16, 2).bfloat16(), torch.zeros(16)
    # 2^24 + 1 is 2^24 in float32: the sums are 2^24 + 0 and 1 - 2^24, in order of K 0
    b[0, 0, 0], b[1, 0, 0], b[2, 0, 0] = 2.0**24, 1.0, -(2.0**24)
    b[0, 1], b[1, 1], b[2, 1] = torch.tensor([2.0**24, 1.0]), torch.tensor([-(2.0**24), 1.0]), torch.tensor([0.0, 1.0])
    b[0, 2] = 1e-39
    total[3] = 1e-39
    total[4] = 5.0
    for tile, x in enumerate((total, a, b)):
        EMULATOR.execute("tileloadd64", tile, x.data_ptr(), 64)
    EMULATOR.execute("tdpbf16ps", 0, 1, 2)
    EMULATOR.execute("tilestored64", 0, total.data_ptr(), 64)
    assert not EMULATOR.errors
    assert total[:6].tolist() == [0.0, 3.0, 0.0, 0.0, 5.0, 0.0]


# --- the ops -----------------------------------------------------------------------------------------------


def bf16(*shape):
    return torch.randn(shape).bfloat16()


@needs_bf16
@pytest.mark.parametrize(("m", "n", "k"), [(1, 7, 5), (33, 40, 43), (70, 96, 64), (50, 33, 130)])
def test_linear(m, n, k, amx):
    inputs, grads = [bf16(m, k), bf16(n, k), bf16(n)], [bf16(m, n)]
    ours = run(lambda *x: F.linear(*x, backend="triton"), inputs, grads)
    assert bool(amx.executed["tdpbf16ps"]) == (m > 1)
    peers = run(torch.nn.functional.linear, inputs, grads)
    exact = run(torch.nn.functional.linear, double(inputs), double(grads))
    absolute = run(torch.nn.functional.linear, magnitude(inputs), magnitude(grads))
    assert_as_precise(ours, [peers], exact, absolute, ["y", "dx", "dweight", "dbias"])


@needs_bf16
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_a_linear_layer_are_read_within_their_bounds(transposed, amx):
    """Forward with packed weights, and both gradients, with strides between the rows."""
    m, n, k = 45, 70, 77
    x, weight, dy = (matrix(*shape, transposed=transposed, gap=6) for shape in ((m, k), (n, k), (m, n)))
    packed = pack_weight(weight, 32, 2)
    results = {
        "y": (linear_fwd(x, weight, None, panels=packed)[0], x, weight.T),
        "dx": (linear_bwd_input(dy, weight)[0], dy, weight),
        "dweight": (linear_bwd_weight(dy, x, weight, with_bias=False)[0], dy.T, x),
    }
    for name, (ours, a, b) in results.items():
        exact, absolute = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        assert_as_precise([ours], [[a @ b]], [exact], [absolute], [name])
    assert amx.executed["tilerelease"] == len(results)


@needs_bf16
@pytest.mark.parametrize(("n_q", "n_k", "dim"), [(20, 50, 32), (65, 77, 40), (33, 300, 64)])
def test_attention(n_q, n_k, dim, amx):
    q, k, v, do = (bf16(1, n, 2, dim) for n in (n_q, n_k, n_k, n_q))
    ours = run(lambda *x: F.attention(*x, backend="triton"), [q, k, v], [do])
    assert amx.executed["tdpbf16ps"]
    scale = dim**-0.5
    peer, exact = (run(lambda *x: attention(*x, scale)[0], f([q, k, v]), f([do])) for f in (list, double))
    size = absolute_attention(*double([q, k, v, do]), torch.zeros(1, 2, n_q), scale)
    assert_as_precise(ours, [peer], exact, [size[0], *size[2:]], ("out", "dq", "dk", "dv"))


@needs_bf16
def test_every_thread_configures_its_tiles(amx):
    x, weight = bf16(300, 70), bf16(200, 70)
    expected = F.linear(x, weight, backend="triton")
    before, number = dict(amx.executed), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(F.linear(x, weight, backend="triton"), expected)
    finally:
        torch.set_num_threads(number)
    assert amx.executed["tilerelease"] == before["tilerelease"] + 3
    assert not any(map(any, (tiles.rows for tiles in amx.threads.values())))
