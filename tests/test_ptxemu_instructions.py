"""The PTX emulator: single instructions against scalar references in plain Python."""

import functools
import math
import struct

import numpy as np
import pytest
from conftest import EMULATOR

if not EMULATOR:
    pytest.skip("tests of the PTX emulator: make test-compiled", allow_module_level=True)

import ptxemu

pytestmark = pytest.mark.compiled

M32 = 0xFFFFFFFF
rng = np.random.default_rng(0)


def run(body, ins, out_bytes=4, n=256, regs=""):
    """Each thread loads a word of every input into %a0.. (8 bytes: %d0.., 2 bytes: %s0..) and stores %x (%xd, %h)."""
    loads, args = [], []
    for i, a in enumerate(ins):
        a = np.ascontiguousarray(a)
        args.append(a)
        sz = a.dtype.itemsize
        rg = {8: "%d", 4: "%a", 2: "%s"}[sz]
        loads.append(
            f"ld.param.b64 %p{i}, [k_p{i}]; mad.wide.u32 %p{i}, %tid_, {sz}, %p{i};"
            f" ld.global.b{8 * sz} {rg}{i}, [%p{i}];"
        )
    out = np.zeros(n, {8: np.uint64, 4: np.uint32, 2: np.uint16}[out_bytes])
    args.append(out)
    o = len(ins)
    result = {8: "%xd", 4: "%x", 2: "%h"}[out_bytes]
    ptx = f""".version 8.0
.target sm_80
.address_size 64
.visible .entry k({", ".join(f".param .u64 k_p{i}" for i in range(o + 1))}) .reqntid {n}
{{
 .reg .pred %q<9>; .reg .b16 %s<9>; .reg .b16 %h; .reg .b32 %a<9>; .reg .b32 %x; .reg .b32 %t<9>; .reg .b64 %d<9>;
 .reg .b64 %xd; .reg .b64 %p<9>; .reg .b32 %tid_; {regs}
 mov.u32 %tid_, %tid.x;
 {" ".join(loads)}
 {body}
 ld.param.b64 %p{o}, [k_p{o}]; mad.wide.u32 %p{o}, %tid_, {out_bytes}, %p{o};
 st.global.b{8 * out_bytes} [%p{o}], {result};
 ret;
}}"""
    ptxemu.run_ptx(ptx, (1,), n, args)
    return out


def u32(n=256):
    a = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    a[:8] = [0, 1, 2, M32, 0x80000000, 0x7FFFFFFF, 31, 32]
    return a


def s(x, b=32):
    x = int(x) & ((1 << b) - 1)
    return x - (1 << b) if x >> (b - 1) else x


A, B, C = u32(), rng.permutation(u32()), rng.permutation(u32())
SH = rng.integers(0, 40, 256, dtype=np.uint32)


def check(got, fn, *ins):
    exp = np.array([fn(*[int(v) for v in t]) & M32 for t in zip(*ins, strict=True)], np.uint32)
    bad = np.flatnonzero(got != exp)
    assert bad.size == 0, [(hex(int(got[i])), hex(int(exp[i])), [hex(int(a[i])) for a in ins]) for i in bad[:4]]


def tdiv(a, b):
    if b == 0:
        return -1
    q = abs(a) // abs(b)
    return -q if (a < 0) != (b < 0) else q


INT2 = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: (a * b) >> 32,
    "mul.hi.s32": lambda a, b: (s(a) * s(b)) >> 32,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "min.s32": lambda a, b: min(s(a), s(b)),
    "max.s32": lambda a, b: max(s(a), s(b)),
    "min.u32": min,
    "max.u32": max,
    "div.s32": lambda a, b: tdiv(s(a), s(b)),
    "div.u32": lambda a, b: a // b if b else M32,
    "rem.s32": lambda a, b: s(a) - tdiv(s(a), s(b)) * s(b) if b else a,
    "rem.u32": lambda a, b: a % b if b else a,
}


@pytest.mark.parametrize("op", list(INT2))
def test_int2(op):
    check(run(f"{op} %x, %a0, %a1;", [A, B]), INT2[op], A, B)


SHIFT = {
    "shl.b32": lambda a, n: a << n if n < 32 else 0,
    "shr.u32": lambda a, n: a >> n if n < 32 else 0,
    "shr.s32": lambda a, n: s(a) >> min(n, 31),
}


@pytest.mark.parametrize("op", list(SHIFT))
def test_shift(op):
    check(run(f"{op} %x, %a0, %a1;", [A, SH]), SHIFT[op], A, SH)
    for k in (0, 1, 13, 31, 32, 40):
        check(run(f"{op} %x, %a0, {k};", [A]), lambda a, k=k: SHIFT[op](a, k), A)


@pytest.mark.parametrize(
    "lut", [0, 0xC0, 0xEA, 0x96, 0x1B, 0x80, 0xFE, 0x78, 0xB8, 0xCA, 0xF0, 0x0F, 0x55, 0xFF, 0x3C, 0xD8]
)
def test_lop3(lut):

    def f(a, b, c):
        r = 0
        for i in range(32):
            k = ((a >> i) & 1) << 2 | ((b >> i) & 1) << 1 | ((c >> i) & 1)
            r |= ((lut >> k) & 1) << i
        return r

    check(run(f"lop3.b32 %x, %a0, %a1, %a2, {lut};", [A, B, C]), f, A, B, C)


def _prmt(a, b, c):
    by = [(v >> (8 * i)) & 255 for v in (a, b) for i in range(4)]
    r = 0
    for i in range(4):
        sel = (c >> (4 * i)) & 15
        v = by[sel & 7]
        if sel & 8:
            v = 255 if v & 128 else 0
        r |= v << (8 * i)
    return r


def test_prmt():
    check(run("prmt.b32 %x, %a0, %a1, %a2;", [A, B, C]), _prmt, A, B, C)
    for k in (0x5410, 0x7632, 0x3210, 0x9180, 0x7531):
        check(run(f"prmt.b32 %x, %a0, %a1, {k};", [A, B]), lambda a, b, k=k: _prmt(a, b, k), A, B)


def _bfe(a, pos, ln, signed):
    pos &= 255
    ln &= 255
    sb = 0
    if signed and ln:
        sb = (a >> min(pos + ln - 1, 31)) & 1
    r = 0
    for i in range(32):
        bit = (a >> (pos + i)) & 1 if i < ln and pos + i < 32 else sb
        r |= bit << i
    return r


def test_bfe_bfi():
    P, L = rng.integers(0, 34, 256, dtype=np.uint32), rng.integers(0, 34, 256, dtype=np.uint32)
    for type_, signed in (("u32", False), ("s32", True)):
        check(run(f"bfe.{type_} %x, %a0, %a1, %a2;", [A, P, L]), functools.partial(_bfe, signed=signed), A, P, L)
        for p, l in ((0, 8), (4, 3), (31, 1), (16, 16), (28, 9), (0, 32), (5, 0)):
            extract = functools.partial(_bfe, pos=p, ln=l, signed=signed)
            check(run(f"bfe.{type_} %x, %a0, {p}, {l};", [A]), extract, A)

    def bfi(a, b, p, l):
        r = b
        for i in range(l):
            if p + i < 32:
                r = (r & ~(1 << (p + i))) | (((a >> i) & 1) << (p + i))
        return r

    check(run("bfi.b32 %x, %a0, %a1, %a2, %a3;", [A, B, P, L]), bfi, A, B, P, L)


def test_bit_counts():
    check(run("popc.b32 %x, %a0;", [A]), lambda a: bin(a).count("1"), A)
    check(run("clz.b32 %x, %a0;", [A]), lambda a: 32 - a.bit_length(), A)
    check(run("brev.b32 %x, %a0;", [A]), lambda a: int(f"{a:032b}"[::-1], 2), A)
    check(run("not.b32 %x, %a0;", [A]), lambda a: ~a, A)
    check(run("neg.s32 %x, %a0;", [A]), lambda a: -a, A)
    check(run("abs.s32 %x, %a0;", [A]), lambda a: abs(s(a)), A)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
@pytest.mark.parametrize("direction", "lr")
def test_shf(direction, mode):
    def f(lo, hi, n):
        n = n & 31 if mode == "wrap" else min(n, 32)
        w = hi << 32 | lo
        return ((w << n) >> 32) if direction == "l" else w >> n

    check(run(f"shf.{direction}.{mode}.b32 %x, %a0, %a1, %a2;", [A, B, SH]), f, A, B, SH)


def test_mad_and_carry():
    check(run("mad.lo.s32 %x, %a0, %a1, %a2;", [A, B, C]), lambda a, b, c: a * b + c, A, B, C)
    check(
        run("mad.lo.cc.u32 %t0, %a0, %a1, %a2; madc.hi.u32 %x, %a0, %a1, 0;", [A, B, C]),
        lambda a, b, c: (a * b + c) >> 32,
        A,
        B,
        C,
    )
    check(
        run("add.cc.u32 %t0, %a0, %a1; addc.u32 %x, %a2, 0;", [A, B, C]), lambda a, b, c: c + ((a + b) >> 32), A, B, C
    )
    check(
        run("sub.cc.u32 %t0, %a0, %a1; subc.u32 %x, %a2, 0;", [A, B, C]),
        lambda a, b, c: c - (1 if a < b else 0),
        A,
        B,
        C,
    )


def test_64bit():
    D = rng.integers(0, 1 << 64, 256, dtype=np.uint64)
    E = rng.integers(0, 1 << 64, 256, dtype=np.uint64)
    M = (1 << 64) - 1
    for op, f in {
        "mul.hi.u64": lambda a, b: (a * b) >> 64,
        "mul.hi.s64": lambda a, b: (s(a, 64) * s(b, 64)) >> 64,
        "mul.lo.s64": lambda a, b: a * b,
        "add.s64": lambda a, b: a + b,
    }.items():
        got = run(f"{op} %xd, %d0, %d1;", [D, E], 8)
        assert all(int(g) == f(int(a), int(b)) & M for g, a, b in zip(got, D, E, strict=True)), op
    got = run("mul.wide.s32 %xd, %a0, %a1;", [A, B], 8)
    assert all(int(g) == (s(a) * s(b)) & M for g, a, b in zip(got, A, B, strict=True))
    got = run("mad.wide.u32 %xd, %a0, %a1, %d2;", [A, B, D], 8)
    assert all(int(g) == (int(a) * int(b) + int(d)) & M for g, a, b, d in zip(got, A, B, D, strict=True))
    got = run("mov.b64 {%t0, %t1}, %d0; mov.b64 %xd, {%t1, %t0};", [D], 8)
    assert all(int(g) == (int(d) >> 32 | (int(d) << 32)) & M for g, d in zip(got, D, strict=True))
    got = run("mov.b64 {%s5, %s6, %s7, %s8}, %d0; mov.b32 %x, {%s8, %s6};", [D])
    assert all(int(g) == (int(d) >> 48) | ((int(d) >> 16 & 0xFFFF) << 16) for g, d in zip(got, D, strict=True))


def f32(n=256):
    a = (rng.standard_normal(n) * np.exp(rng.standard_normal(n) * 8)).astype(np.float32)
    a[:12] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-41, 3.4e38, 0.5, 1.5, 2.5, -2.5]
    return a


FA, FB, FC = f32(), rng.permutation(f32()), rng.permutation(f32())


def feq(got, exp):
    g, e = got.view(np.float32), np.asarray(exp, np.float32)
    ok = (g.view(np.uint32) == e.view(np.uint32)) | (np.isnan(g) & np.isnan(e))
    assert ok.all(), [(g[i], e[i]) for i in np.flatnonzero(~ok)[:5]]


def flush(x):
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.float32(1.1754944e-38), np.copysign(np.float32(0), x), x).astype(np.float32)


@pytest.mark.filterwarnings("ignore")
def test_float_ops():
    feq(run("add.f32 %x, %a0, %a1;", [FA, FB]), FA + FB)
    feq(run("add.ftz.f32 %x, %a0, %a1;", [FA, FB]), flush(flush(FA) + flush(FB)))
    feq(run("mul.ftz.f32 %x, %a0, %a1;", [FA, FB]), flush(flush(FA) * flush(FB)))
    feq(run("add.sat.f32 %x, %a0, %a1;", [FA, FB]), np.where(np.isnan(FA + FB), 0, np.clip(FA + FB, 0, 1)))
    feq(run("min.f32 %x, %a0, %a1;", [FA, FB]), np.fmin(FA, FB))
    feq(run("max.NaN.f32 %x, %a0, %a1;", [FA, FB]), np.maximum(FA, FB))
    feq(run("neg.f32 %x, %a0;", [FA]), -FA)
    feq(run("abs.f32 %x, %a0;", [FA]), np.abs(FA))
    feq(run("copysign.f32 %x, %a0, %a1;", [FA, FB]), np.copysign(FB, FA))


def _frac_round(x, mode):
    """Round x, an exact rational, to float32 in a rounding mode: compare it with neighbouring floats."""
    from fractions import Fraction

    y = np.float32(float(x))
    c = [np.nextafter(y, np.float32(-np.inf)), y, np.nextafter(y, np.float32(np.inf))]
    c = [v for v in c if np.isfinite(v)]
    lo = max(v for v in c if Fraction(float(v)) <= x)
    hi = min(v for v in c if Fraction(float(v)) >= x)
    if lo == hi:
        return lo
    if mode == "rm":
        return lo
    if mode == "rp":
        return hi
    if mode == "rz":
        return lo if x > 0 else hi
    dl, dh = x - Fraction(float(lo)), Fraction(float(hi)) - x
    if dl != dh:
        return lo if dl < dh else hi
    return lo if not (int(np.float32(lo).view(np.uint32)) & 1) else hi


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_rounding_modes(mode):
    from fractions import Fraction as Fr

    a, b, c = (rng.standard_normal(256).astype(np.float32) for _ in range(3))
    g = run(f"add.{mode}.f32 %x, %a0, %a1;", [a, b]).view(np.float32)
    e = [_frac_round(Fr(float(x)) + Fr(float(y)), mode) for x, y in zip(a, b, strict=True)]
    assert (g == np.array(e)).all()
    g = run(f"fma.{mode}.f32 %x, %a0, %a1, %a2;", [a, b, c]).view(np.float32)
    e = [_frac_round(Fr(float(x)) * Fr(float(y)) + Fr(float(z)), mode) for x, y, z in zip(a, b, c, strict=True)]
    assert (g == np.array(e)).all()


CMP = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a < b or a > b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: not (a < b or a > b),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: not a >= b,
    "leu": lambda a, b: not a > b,
    "gtu": lambda a, b: not a <= b,
    "geu": lambda a, b: not a < b,
    "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b,
}


@pytest.mark.parametrize("c", list(CMP))
def test_setp_float(c):
    b = FB.copy()
    b[20:60] = FA[20:60]
    got = run(f"setp.{c}.f32 %q1, %a0, %a1; selp.b32 %x, 1, 0, %q1;", [FA, b])
    assert (got == np.array([CMP[c](float(x), float(y)) for x, y in zip(FA, b, strict=True)])).all()


def test_setp_combined():
    got = run(
        "setp.lt.s32 %q1, %a2, 0; setp.lt.and.u32 %q2|%q3, %a0, %a1, !%q1; selp.b32 %t0, 1, 0, %q2;"
        "selp.b32 %t1, 2, 0, %q3; or.b32 %x, %t0, %t1;",
        [A, B, C],
    )

    def f(a, b, c):
        p = s(c) >= 0
        return int((a < b) and p) | int((not a < b) and p) << 1

    check(got, f, A, B, C)


def bf_ref(x):
    u = struct.unpack("<I", struct.pack("<f", x))[0]
    if x != x:
        return 0x7FFF
    lo, hi = u & 0xFFFF, u >> 16
    if lo > 0x8000 or (lo == 0x8000 and hi & 1):
        hi += 1
    return hi


def test_cvt_bf16():
    got = run("cvt.rn.bf16x2.f32 %x, %a0, %a1;", [FA, FB])
    check(got, lambda i: bf_ref(float(FA[i])) << 16 | bf_ref(float(FB[i])), np.arange(256))
    got = run("cvt.rn.bf16.f32 %h, %a0;", [FA], 2)
    assert all(int(g) == bf_ref(float(x)) for g, x in zip(got, FA, strict=True))
    h = rng.integers(0, 1 << 16, 256, dtype=np.uint16)
    got = run("cvt.f32.bf16 %x, %s0;", [h])
    ok = got == (h.astype(np.uint32) << 16)
    assert ok.all()


@pytest.mark.filterwarnings("ignore")
def test_cvt_f16():
    got = run("cvt.rn.f16.f32 %h, %a0;", [FA], 2)
    exp = FA.astype(np.float16).view(np.uint16)
    nan = np.isnan(FA)
    assert (got[~nan] == exp[~nan]).all()
    got = run("cvt.rn.f16x2.f32 %x, %a0, %a1;", [FA, FB])
    assert ((got >> 16)[~nan] == exp[~nan]).all()


ROUNDED = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ROUNDED)
@pytest.mark.parametrize("type_", ["s32", "u32", "s16", "u8", "s8"])
def test_cvt_float_to_int(type_, mode):
    """The conversion saturates and maps NaN to 0."""
    bits = int(type_[1:])
    low = -(1 << bits - 1) if type_[0] == "s" else 0
    high = low + (1 << bits) - 1

    def reference(x):
        if x != x:
            return 0
        if math.isinf(x):
            return high if x > 0 else low
        return max(low, min(high, ROUNDED[mode](x)))

    to, size, mask = ("%x", 4, M32) if bits == 32 else ("%h", 2, 0xFFFF)
    got = run(f"cvt.{mode}.{type_}.f32 {to}, %a0;", [FA], size)
    assert [int(g) for g in got] == [reference(float(x)) & mask for x in FA]


@pytest.mark.filterwarnings("ignore")
def test_cvt_int():
    got = run("cvt.rzi.s64.f32 %xd, %a0;", [FA], 8)  # conversions from or to 64 bits map NaN to the top bit
    for g, x in zip(got.view(np.int64), FA, strict=True):
        x = float(x)
        e = -(2**63) if x != x else (2**63 - 1 if x >= 2.0**63 else (-(2**63) if x <= -(2.0**63) else math.trunc(x)))
        assert int(g) == e
    h = rng.integers(0, 1 << 16, 256, dtype=np.uint16)
    assert (run("cvt.s32.s8 %x, %s0;", [h]).view(np.int32) == h.astype(np.int8)).all()
    assert (run("cvt.u32.u8 %x, %s0;", [h]) == h.astype(np.uint8)).all()
    assert (run("cvt.s16.s8 %h, %s0;", [h], 2).view(np.int16) == h.astype(np.int8)).all()
    assert (run("cvt.u16.u32 %h, %a0;", [A], 2) == A.astype(np.uint16)).all()
    assert (run("cvt.s64.s32 %xd, %a0;", [A], 8).view(np.int64) == A.view(np.int32)).all()
    feq(run("cvt.rn.f32.s32 %x, %a0;", [A]), A.view(np.int32).astype(np.float32))
    feq(run("cvt.rn.f32.u32 %x, %a0;", [A]), A.astype(np.float32))
    got = run("cvt.sat.s8.s32 %h, %a0;", [A], 2)
    assert (got.view(np.int16) == np.clip(A.view(np.int32), -128, 127)).all()


def test_cvt_tf32():
    got = run("cvt.rna.tf32.f32 %x, %a0;", [FA[12:].repeat(2)[:256]])
    x = FA[12:].repeat(2)[:256].view(np.uint32).astype(np.uint64)
    assert (got == ((x + 0x1000) & 0xFFFFE000)).all()


def test_packed_half():
    h = rng.standard_normal(512).astype(np.float16)
    g = rng.standard_normal(512).astype(np.float16)
    k = rng.standard_normal(512).astype(np.float16)
    a, b, c = (v.view(np.uint32) for v in (h, g, k))
    assert (run("add.f16x2 %x, %a0, %a1;", [a, b]).view(np.float16) == h + g).all()
    assert (run("mul.rn.f16x2 %x, %a0, %a1;", [a, b]).view(np.float16) == h * g).all()
    e = (h.astype(np.float64) * g + k).astype(np.float16)
    assert (run("fma.rn.f16x2 %x, %a0, %a1, %a2;", [a, b, c]).view(np.float16) == e).all()
    x = rng.standard_normal(512).astype(np.float32).view(np.uint32) & 0xFFFF0000
    y = rng.standard_normal(512).astype(np.float32).view(np.uint32) & 0xFFFF0000
    px, py = (x[::2] >> 16) | x[1::2], (y[::2] >> 16) | y[1::2]
    got = run("fma.rn.bf16x2 %x, %a0, %a1, %a0;", [px, py])
    fx, fy = x.view(np.float32).astype(np.float64), y.view(np.float32).astype(np.float64)
    r = [bf_ref(v) for v in (fx * fy + fx).astype(np.float32)]
    assert (got == np.array([r[2 * i] | r[2 * i + 1] << 16 for i in range(256)], np.uint32)).all()


@pytest.mark.parametrize(
    "mode,b,c",
    [
        ("bfly", 1, 31),
        ("bfly", 16, 31),
        ("idx", 5, 31),
        ("up", 3, 0),
        ("down", 7, 31),
        ("bfly", 2, 0x1C03 | 31),
        ("idx", 2, (24 << 8) | 31),
        ("up", 1, 24 << 8),
    ],
)
def test_shfl(mode, b, c):
    got = run(f"shfl.sync.{mode}.b32 %x, %a0, {b}, {c}, -1;", [A])
    dyn = run(
        f"mov.b32 %t0, {b}; add.s32 %t0, %t0, %tid_; sub.s32 %t0, %t0, %tid_; "
        f"shfl.sync.{mode}.b32 %x|%q1, %a0, %t0, {c}, -1;",
        [A],
    )
    exp = []
    for t in range(256):
        lane, base = t & 31, t & ~31
        seg, cl = (c >> 8) & 31, c & 31
        mx = (lane & seg) | (cl & ~seg & 31)
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": (lane & seg) | (b & ~seg & 31)}[mode]
        ok = j >= mx if mode == "up" else j <= mx
        exp.append(A[base + (j if ok else lane)])
    assert (got == np.array(exp)).all() and (dyn == np.array(exp)).all()


def test_vote_redux():
    got = run("setp.lt.s32 %q1, %a0, 0; vote.sync.ballot.b32 %x, %q1, -1;", [A])
    for w in range(8):
        e = sum(1 << i for i in range(32) if s(A[32 * w + i]) < 0)
        assert (got[32 * w : 32 * w + 32] == e).all()
    got = run("redux.sync.min.s32 %x, %a0, -1;", [A])
    assert all(int(got[32 * w]) == min(s(v) for v in A[32 * w : 32 * w + 32]) & M32 for w in range(8))
    got = run("redux.sync.add.s32 %x, %a0, -1;", [A])
    assert all(int(got[32 * w]) == sum(int(v) for v in A[32 * w : 32 * w + 32]) & M32 for w in range(8))


def test_guards_and_branches():
    got = run(
        "mov.b32 %x, 7; setp.lt.s32 %q1, %a0, 0; @%q1 add.s32 %x, %a0, 1; @!%q1 bra $E; mul.lo.s32 %x, %x, 3;\n$E:\n",
        [A],
    )
    check(got, lambda a: ((a + 1) * 3) if s(a) < 0 else 7, A)
    # a loop with a different trip count in every lane
    n = rng.integers(0, 20, 256, dtype=np.uint32)
    got = run(
        "mov.b32 %x, 0; mov.b32 %t0, 0;\n$L:\n setp.ge.u32 %q1, %t0, %a0; @%q1 bra $D; add.s32 %x, %x, %t0;"
        "add.s32 %t0, %t0, 1; bra.uni $L;\n$D:\n",
        [n],
    )
    check(got, lambda k: k * (k - 1) // 2, n)


def test_mma_layouts_against_scalar_definition():
    """m16n8k16 bf16 with fragments scattered by the ISA's formulas."""
    Am = rng.integers(-8, 8, (16, 16)).astype(np.float32)
    Bm = rng.integers(-8, 8, (16, 8)).astype(np.float32)
    Cm = rng.integers(-8, 8, (16, 8)).astype(np.float32)

    def bf(x):
        return int(np.float32(x).view(np.uint32)) >> 16

    ra, rb, rc = np.zeros((4, 32), np.uint32), np.zeros((2, 32), np.uint32), np.zeros((4, 32), np.float32)
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        for i in range(8):
            row = g if i in (0, 1, 4, 5) else g + 8
            col = t * 2 + (i & 1) + (8 if i >= 4 else 0)
            ra[i // 2, lane] |= bf(Am[row, col]) << (16 * (i & 1))
        for i in range(4):
            row = t * 2 + (i & 1) + (8 if i >= 2 else 0)
            rb[i // 2, lane] |= bf(Bm[row, g]) << (16 * (i & 1))
            rc[i, lane] = Cm[g + (8 if i >= 2 else 0), t * 2 + (i & 1)]
    out = [_mma(ra, rb, rc, k) for k in range(4)]
    D = Am @ Bm + Cm
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        for i in range(4):
            assert out[i][lane] == D[g + (8 if i >= 2 else 0), t * 2 + (i & 1)]


def _mma(ra, rb, rc, k):
    allr = np.concatenate([ra, rb, rc.view(np.uint32)]).T.copy()  # (32, 10)
    loads = " ".join(f"ld.global.b32 %r{i}, [%p3+{4 * i}];" for i in range(10))
    out = np.zeros(32, np.uint32)
    ptx = f""".version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 k_in, .param .u64 k_out) .reqntid 32
{{ .reg .b32 %r<20>; .reg .b64 %p<9>;
 mov.u32 %r19, %tid.x; ld.param.b64 %p1, [k_in]; ld.param.b64 %p2, [k_out];
 mad.wide.u32 %p3, %r19, 40, %p1; {loads}
 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
  {{%r10,%r11,%r12,%r13}}, {{%r0,%r1,%r2,%r3}}, {{%r4,%r5}}, {{%r6,%r7,%r8,%r9}};
 mad.wide.u32 %p4, %r19, 4, %p2; st.global.b32 [%p4], %r{10 + k};
 ret; }}"""
    ptxemu.run_ptx(ptx, (1,), 32, [allr, out])
    return out.view(np.float32)


def test_ldmatrix_against_definition():
    tile = rng.integers(0, 1 << 16, (32, 8), dtype=np.uint16)  # four 8x8 matrices, 16-byte rows
    for trans in ("", ".trans"):
        out = np.zeros((32, 4), np.uint32)
        ptx = f""".version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 sm[];
.visible .entry k(.param .u64 k_in, .param .u64 k_out) .reqntid 32
{{ .reg .b32 %r<20>; .reg .b64 %p<9>;
 mov.u32 %r9, %tid.x; ld.param.b64 %p1, [k_in]; ld.param.b64 %p2, [k_out];
 mad.wide.u32 %p3, %r9, 16, %p1; ld.global.v4.b32 {{%r1,%r2,%r3,%r4}}, [%p3];
 mov.b32 %r10, sm; shl.b32 %r11, %r9, 4; add.s32 %r12, %r10, %r11;
 st.shared.v4.b32 [%r12], {{%r1,%r2,%r3,%r4}};
 bar.sync 0;
 ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r5,%r6,%r7,%r8}}, [%r12];
 mad.wide.u32 %p4, %r9, 16, %p2; st.global.v4.b32 [%p4], {{%r5,%r6,%r7,%r8}};
 ret; }}"""
        ptxemu.run_ptx(ptx, (1,), 32, [tile, out], 1024)
        for lane in range(32):
            for i in range(4):
                m = tile[8 * i : 8 * i + 8]
                if trans:
                    m = m.T
                e = int(m[lane // 4, 2 * (lane % 4)]) | int(m[lane // 4, 2 * (lane % 4) + 1]) << 16
                assert int(out[lane, i]) == e
