"""The PTX emulator: whole Triton kernels against PyTorch, under different thread schedules."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from conftest import EMULATOR
from philox import philox
from precision import assert_same

if not EMULATOR:
    pytest.skip("tests of the PTX emulator: make test-compiled", allow_module_level=True)

import ptxemu
import ptxemu_kernels as K
import triton
from ptxemu import scheduler

pytestmark = pytest.mark.compiled

OPTS = [
    dict(),
    dict(order="shuffle", batch_ctas=3, seed=1),
    dict(schedule="warps", seed=2),
    dict(async_copy="immediate", order="reverse"),
]


def rel(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("opt", OPTS)
def test_vadd(opt):
    x, y = torch.randn(1003), torch.randn(1003)
    z = ptxemu.poison_(torch.empty(1003))
    with ptxemu.emulate(**opt):
        K.vadd[(4,)](x, y, z, 1003, BLOCK=256)
    assert torch.equal(z, x + y)
    assert ptxemu.unwritten(z) == 0


@pytest.mark.parametrize("opt", OPTS)
@pytest.mark.parametrize("dt", [torch.float32, torch.float16, torch.bfloat16])
def test_softmax(dt, opt):
    x = (torch.randn(17, 1000) * 3).to(dt)
    y = torch.empty_like(x)
    with ptxemu.emulate(**opt):
        K.softmax[(17,)](x, y, 1000, x.stride(0), BLOCK=1024)
    r = torch.softmax(x.double(), 1)
    assert rel(y, r) < {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dt]


@pytest.mark.parametrize("dt", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [768, 1000])
def test_layernorm(dt, n):
    x, w, b = torch.randn(13, n).to(dt), torch.randn(n).to(dt), torch.randn(n).to(dt)
    y, mu, rs = torch.empty_like(x), torch.empty(13), torch.empty(13)
    with ptxemu.emulate(race="error"):
        K.layernorm[(13,)](x, w, b, y, mu, rs, n, 1e-6, BLOCK=1024, num_warps=4)
    r = TF.layer_norm(x.double(), (n,), w.double(), b.double(), 1e-6)
    assert rel(y, r) < (1e-6 if dt == torch.float32 else 4e-3)
    assert_same(mu, x.double().mean(1), n)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("dt", [torch.float16, torch.bfloat16, torch.float32])
def test_gemm(dt, stages):
    M, N, Kd = 150, 136, 208
    a, b = torch.randn(M, Kd).to(dt), torch.randn(Kd, N).to(dt)
    c = ptxemu.poison_(torch.empty(M, N))
    with ptxemu.emulate(race="error", **OPTS[stages % 4]):
        K.gemm[(3, 3)](a, b, c, M, N, Kd, Kd, 1, N, 1, BM=64, BN=64, BK=32, num_stages=stages)
        ops = ptxemu.last_stats().opcodes
    assert any(k.startswith("mma.sync") for k in ops)
    assert rel(c, a.double() @ b.double()) < (1e-3 if dt == torch.float32 else 1e-6)


def test_gemm_transposed_operands():
    M, N, Kd = 64, 96, 128
    a, b = torch.randn(Kd, M).half().t(), torch.randn(N, Kd).half().t()
    c = torch.empty(M, N)
    with ptxemu.emulate():
        K.gemm[(1, 2)](a, b, c, M, N, Kd, *a.stride(), *b.stride(), BM=64, BN=64, BK=64, num_warps=8)
    assert rel(c, a.double() @ b.double()) < 1e-6


@pytest.mark.parametrize("prec", ["ieee", "tf32x3", "bf16x3"])
def test_gemm_fp32_precisions(prec):
    a, b, c = torch.randn(64, 64), torch.randn(64, 64), torch.empty(64, 64)
    with ptxemu.emulate():
        K.gemm[(2, 2)](a, b, c, 64, 64, 64, 64, 1, 64, 1, BM=32, BN=32, BK=32, PREC=prec)
    assert rel(c, a.double() @ b.double()) < {"ieee": 1e-6, "tf32x3": 2e-6, "bf16x3": 3e-5}[prec]


def test_gemm_fp64():
    a, b, c = (torch.randn(64, 64, dtype=torch.float64) for _ in range(3))
    with ptxemu.emulate():
        K.gemm[(2, 2)](a, b, c, 64, 64, 64, 64, 1, 64, 1, BM=32, BN=32, BK=16, PREC="ieee")
    assert rel(c, a @ b) < 1e-14


def test_gemm_int8():
    a = torch.randint(-128, 128, (64, 128), dtype=torch.int8)
    b = torch.randint(-128, 128, (128, 32), dtype=torch.int8)
    c = torch.empty(64, 32, dtype=torch.int32)
    with ptxemu.emulate():
        K.gemm_i8[(2,)](a, b, c, 128, BM=32, BN=32, BK=64)
    assert torch.equal(c, a.int() @ b.int())


def _fa(dt, B, H, N, D, opt, causal=False, BM=64, BN=64, **kw):
    qkv = torch.randn(B, N, 3, H, D).to(dt)
    q, k, v = qkv.unbind(2)
    o = ptxemu.poison_(torch.empty(B, N, H, D, dtype=dt))
    l = ptxemu.poison_(torch.empty(B * H, N))
    with ptxemu.emulate(**opt):
        K.fa_fwd[(triton.cdiv(N, BM), B * H)](
            q, k, v, o, l, D**-0.5, N, *q.stride()[:3], *o.stride()[:3], H, D=D, BM=BM, BN=BN, CAUSAL=causal, **kw
        )
    qt, kt, vt = (x.double().transpose(1, 2) for x in (q, k, v))
    r = TF.scaled_dot_product_attention(qt, kt, vt, is_causal=causal).transpose(1, 2)
    s = qt @ kt.transpose(-1, -2) * D**-0.5
    if causal:
        s = s.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -math.inf)
    lse = torch.logsumexp(s, -1).reshape(B * H, N) / math.log(2)
    assert ptxemu.unwritten(o) == 0
    assert rel(o, r) < {torch.float16: 6e-4, torch.bfloat16: 4e-3, torch.float32: 2e-3}[dt]
    assert (l.double() - lse).abs().max() < 5e-3


@pytest.mark.parametrize("dt", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("opt", OPTS)
def test_fa_fwd(dt, opt):
    _fa(dt, 1, 2, 197, 64, dict(race="error", **opt))


@pytest.mark.parametrize("opt", OPTS)
def test_fa_fwd_causal(opt):
    _fa(torch.float16, 1, 2, 197, 64, opt, causal=True)


def test_fa_fwd_fp32_and_warps():
    _fa(torch.float32, 1, 1, 100, 32, {}, BM=32, BN=32)
    _fa(torch.bfloat16, 1, 1, 100, 64, {}, BM=128, BN=32, num_warps=8)


@pytest.mark.parametrize("dt", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("opt", OPTS)
def test_fa_bwd(dt, opt):
    BH, N, D = 2, 150, 64
    q, k, v, do = (torch.randn(BH, N, D).to(dt) for _ in range(4))
    qd, kd, vd = (t.double().requires_grad_() for t in (q, k, v))
    s = qd @ kd.transpose(1, 2) * D**-0.5
    o = torch.softmax(s, -1) @ vd
    o.backward(do.double())
    lse = (torch.logsumexp(s.detach(), -1) / math.log(2)).float()
    delta = (o.detach() * do.double()).sum(-1).float()
    dk, dv = ptxemu.poison_(torch.empty_like(k)), ptxemu.poison_(torch.empty_like(v))
    with ptxemu.emulate(race="error", **opt):
        K.fa_bwd_dkdv[(triton.cdiv(N, 64), BH)](q, k, v, do, lse, delta, dk, dv, D**-0.5, N, N * D, D=D, BM=32, BN=64)
    tol = 8e-3 if dt == torch.bfloat16 else 1e-3
    assert rel(dk, kd.grad) < tol and rel(dv, vd.grad) < tol


@pytest.mark.parametrize("opt", OPTS)
def test_atomics(opt):
    n = 1000
    x = torch.randint(0, 10000, (n,), dtype=torch.int32)
    cnt, mx = torch.zeros(7, dtype=torch.int32), torch.zeros(7, dtype=torch.int32)
    mn, fs = torch.full((7,), 1 << 30, dtype=torch.int32), torch.zeros(1)
    with ptxemu.emulate(race="error", **opt):
        K.atomics[(4,)](x, cnt, mx, mn, fs, n, BLOCK=256)
    g = x % 7
    assert torch.equal(cnt, torch.bincount(g, minlength=7).int())
    assert torch.equal(mx, torch.stack([x[g == i].max() for i in range(7)]))
    assert torch.equal(mn, torch.stack([x[g == i].min() for i in range(7)]))
    assert abs(fs.item() - x.sum().item()) < 16


def test_atomic_return_values():
    t, out = torch.zeros(1, dtype=torch.int32), torch.empty(512, dtype=torch.int32)
    with ptxemu.emulate(order="shuffle"):
        K.atomic_ticket[(4,)](t, out, BLOCK=128)
    assert t.item() == 512 and torch.equal(out.sort()[0], torch.arange(512, dtype=torch.int32))


@pytest.mark.parametrize("dt", [torch.float16, torch.bfloat16, torch.float64])
def test_atomic_half(dt):
    x = torch.randint(-3, 4, (640,)).to(dt)
    y = torch.zeros(64, dtype=dt)
    with ptxemu.emulate():
        K.atomic_half[(5,)](x, y, 640, BLOCK=128)
    assert torch.equal(y.double(), x.double().reshape(10, 64).sum(0))


@pytest.mark.parametrize("opt", [dict(), dict(batch_ctas=5, order="shuffle")])
def test_spin_lock(opt, monkeypatch):
    monkeypatch.setattr(scheduler, "SPIN_LIMIT", 100)
    M, n, R = 8, 100, 3
    dy, x = torch.randn(M, n), torch.randn(M, n)
    dw, lock, count = torch.empty(R, n), torch.zeros(R, dtype=torch.int32), torch.zeros(R, dtype=torch.int32)
    with ptxemu.emulate(**opt):
        K.ln_bwd_lock[(M,)](dy, x, dw, lock, count, n, R=R, BLOCK=128, num_warps=2)
    assert_same(dw.sum(0), (dy * x).sum(0), M)
    assert lock.sum() == 0


REF = dict(
    erf=torch.erf,
    tanh=torch.tanh,
    exp=torch.exp,
    log=lambda a: torch.log(a.abs() + 1e-3),
    sin=torch.sin,
    cos=torch.cos,
    sqrt=lambda a: a.abs().sqrt(),
    rsqrt=lambda a: (a.abs() + 0.1).rsqrt(),
    sigmoid=torch.sigmoid,
    floor=torch.floor,
    ceil=torch.ceil,
    expm1=torch.expm1,
    log1p=lambda a: a.abs().log1p(),
    pow=lambda a: a.abs() ** (a * 0.1),
    gelu=lambda a: TF.gelu(a),
    rint=torch.round,
    div=lambda a: 1 / a,
    div_rn=lambda a: a / (a + 3.0),
    sqrt_rn=lambda a: a.abs().sqrt(),
    lgamma=lambda a: torch.lgamma(a.abs() + 0.5),
    erfinv=lambda a: torch.erfinv(a / 1000.0),
    atan2=lambda a: torch.atan2(a, a * a - 1),
)


@pytest.mark.parametrize("op", list(REF))
def test_math(op):
    x = torch.cat([torch.randn(700) * 3, torch.linspace(-8, 8, 300), torch.tensor([0.0, 1e-5, -20.0])])
    if op in ("sin", "cos"):
        x = torch.cat([x, torch.randn(50) * 1e6])  # Payne-Hanek path: local memory, divergent loop
    if op == "div":
        x = x[x != 0]
    y = torch.empty_like(x)
    n = x.numel()
    with ptxemu.emulate():
        K.unary[(triton.cdiv(n, 512),)](x, y, n, OP=op, BLOCK=512)
    r = REF[op](x.double())
    err = ((y.double() - r).abs() / (r.abs() + (1.0 if op == "gelu" else 1e-3))).max().item()
    assert err < (3e-6 if op not in ("log", "pow", "lgamma", "erfinv") else 1e-4), err


def uniform(seed, off):
    """triton.language.rand: the first word of Philox with 10 rounds."""
    zero = np.zeros((), int)
    x = philox(seed, off, zero, zero, zero, rounds=10)[0].astype(np.uint32).view(np.int32)
    x = np.where(x < 0, -x - 1, x).astype(np.float32)
    return x * np.float32(4.6566127342e-10)


def test_dropout_philox():
    x = torch.randn(1000)
    y = torch.empty_like(x)
    with ptxemu.emulate():
        K.dropout[(4,)](x, y, 0.3, 123456789, 1000, BLOCK=256)
    keep = torch.from_numpy(uniform(123456789, np.arange(1000)) > np.float32(0.3))
    assert torch.equal(y != 0, keep)
    assert_same(y, torch.where(keep, x / 0.7, torch.zeros(())))


ALL = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.int8,
    torch.int16,
    torch.uint8,
]


@pytest.mark.parametrize("src", ALL)
@pytest.mark.parametrize("dst", ALL)
def test_casts(src, dst):
    x = torch.randn(300, dtype=torch.float64) * 50
    x = x.abs() if torch.uint8 in (src, dst) else x
    x = x.to(src)
    y = torch.empty(300, dtype=dst)
    with ptxemu.emulate():
        K.cast[(3,)](x, y, 300, BLOCK=128)
    assert torch.equal(y, x.to(dst))


def test_fp8_cast():
    x = torch.randn(384)
    y = torch.empty(384, dtype=torch.float8_e5m2)
    z = torch.empty(384)
    with ptxemu.emulate():
        K.cast_plain[(3,)](x, y, BLOCK=128)
        K.cast_plain[(3,)](y, z, BLOCK=128)
    assert torch.equal(z, x.to(torch.float8_e5m2).float())


def test_bf16_rounding_specials():
    x = torch.tensor([1.00390625, 1.01171875, math.inf, -math.inf, math.nan, 3.4e38, 1e-40, -0.0, 65504.0, 65520.0])
    for dt in (torch.bfloat16, torch.float16):
        y = torch.empty(10, dtype=dt)
        with ptxemu.emulate():
            K.cast[(1,)](x, y, 10, BLOCK=32)
        assert torch.equal(torch.nan_to_num(y.float(), 7.0), torch.nan_to_num(x.to(dt).float(), 7.0))


@pytest.mark.parametrize("opt", OPTS)
@pytest.mark.parametrize("w", [1, 4])
def test_scan_sort(w, opt):
    x = torch.randint(-50, 50, (256,)).float()
    y, z = torch.empty(256), torch.empty(256)
    with ptxemu.emulate(**opt):
        K.scan_sort[(1,)](x, y, z, 256, BLOCK=256, num_warps=w)
    assert torch.equal(y, x.cumsum(0)) and torch.equal(z, x.sort()[0])


def test_argmax():
    x = torch.randn(9, 100)
    y, v = torch.empty(9, dtype=torch.int32), torch.empty(9)
    with ptxemu.emulate():
        K.argmaxrow[(9,)](x, y, v, 100, BLOCK=128)
    assert torch.equal(y.long(), x.argmax(1)) and torch.equal(v, x.max(1)[0])


@pytest.mark.parametrize("dt", [torch.float32, torch.float16, torch.int8, torch.float64])
def test_transpose(dt):
    x = (torch.randn(70, 50) * 20).to(dt)
    y = torch.empty(50, 70, dtype=dt)
    with ptxemu.emulate(schedule="warps"):
        K.transpose[(3, 2)](x, y, 70, 50, BM=32, BN=32)
    assert torch.equal(y, x.t())


def test_histogram():
    x = torch.randint(0, 32, (512,), dtype=torch.int32)
    y = torch.empty(32, dtype=torch.int32)
    with ptxemu.emulate():
        K.hist[(1,)](x, y, 512, BLOCK=512, BINS=32)
    assert torch.equal(y, torch.bincount(x, minlength=32).int())


def test_int_math():
    n = 256
    x = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32)
    y = torch.randint(-1000, 1000, (n,), dtype=torch.int32)
    y[y == 0] = 3
    q, r, s, h = (torch.empty(n, dtype=torch.int32) for _ in range(4))
    with ptxemu.emulate():
        K.int_math[(1,)](x, y, q, r, s, h, n, BLOCK=256)
    assert torch.equal(q, torch.div(x, y, rounding_mode="trunc"))
    assert torch.equal(r, torch.fmod(x, y))
    assert torch.equal(s, (x << 3) ^ (y >> 2) | (x & y))
    xu, yu = x.numpy().view(np.uint32).astype(np.uint64), y.numpy().view(np.uint32).astype(np.uint64)
    assert (h.numpy().view(np.uint32) == (xu * yu >> np.uint64(32))).all()


@pytest.mark.parametrize("opt", OPTS)
def test_divergent_trip_counts(opt):
    lens = torch.tensor([0, 5, 2, 7, 1, 3, 7, 0], dtype=torch.int32)
    x, y = torch.randn(8, 128), torch.empty(8, 128)
    with ptxemu.emulate(**opt):
        K.varloop[(8,)](x, y, lens, BLOCK=128)
    for p in range(8):
        r = torch.zeros(128)
        for k in range(lens[p]):
            r += x[k]
        assert torch.equal(y[p], r * 2 if p % 2 == 0 else r)


def test_gemm_of_eight_warps():
    a, b, c = torch.randn(512, 512).half(), torch.randn(512, 512).half(), torch.empty(512, 512)
    with ptxemu.emulate():
        K.gemm[(4, 4)](a, b, c, 512, 512, 512, 512, 1, 512, 1, BM=128, BN=128, BK=32, num_warps=8)
    assert rel(c, a.double() @ b.double()) < 1e-6


def test_erf_before_bf16_dot():
    """A branch whose body follows its join block reconverges before a warp-collective instruction."""
    M, N, Kd = 50, 40, 72
    a, b, out = (torch.randn(M, Kd) * 3).bfloat16(), torch.randn(N, Kd).bfloat16(), torch.full((M, N), float("nan"))
    for schedule in ("lockstep", "warps"):
        with ptxemu.emulate(schedule=schedule):
            K.erf_matmul[(triton.cdiv(M, 32), triton.cdiv(N, 32))](a, b, out, M, N, Kd, BM=32, BN=32, BK=32)
        ref = torch.nn.functional.gelu(a.double()).bfloat16().double() @ b.double().T
        assert (out.double() - ref).norm() / ref.norm() < 1e-3
