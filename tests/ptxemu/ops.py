"""Numeric helpers used by the generated code.

A register value is a 1-d array of unsigned words (u2/u4/u8) or bools, of length T (one element per thread of the frame)
or of length 1 (the same value in all threads).
"""

import numpy as np

U1, U2, U4, U8 = np.dtype("u1"), np.dtype("u2"), np.dtype("u4"), np.dtype("u8")
I1, I2, I4, I8 = np.dtype("i1"), np.dtype("i2"), np.dtype("i4"), np.dtype("i8")
F2, F4, F8 = np.dtype("f2"), np.dtype("f4"), np.dtype("f8")
C16 = np.dtype("c16")  # used as a 16-byte word
UW = {1: U1, 2: U2, 4: U4, 8: U8, 16: C16}

# NaN in f16, bf16, f32 and f64; a huge integer.
POISON = {
    0: np.zeros(1, bool),
    2: np.array([0x7FFF], U2),
    4: np.array([0x7FFF7FFF], U4),
    8: np.array([0x7FFF7FFF7FFF7FFF], U8),
}
EXP32 = np.uint32(0x7F800000)
SIGN32 = np.uint32(0x80000000)


def ftz(x):
    """Flush f32 subnormals to signed zero."""
    u = x.view(U4)
    m = (u & EXP32) == 0
    if not m.any():
        return x
    return np.where(m, u & SIGN32, u).view(F4)


def sat01(x):
    return np.fmin(np.fmax(x, x.dtype.type(0)), x.dtype.type(1))


def relu(x):
    return np.where(np.isnan(x), x, np.fmax(x, x.dtype.type(0)))


def fma32(a, b, c):
    """f32 fused multiply-add; the product is exact in f64, the sum is rounded to f64 and then to f32."""
    r = a.astype(F8)
    if r.shape[0] < b.shape[0] or r.shape[0] < c.shape[0]:
        return (r * b + c).astype(F4)
    r *= b
    r += c
    return r.astype(F4)


def fma16(a, b, c):
    return (a.astype(F8) * b + c).astype(F2)


def round_dir(x, mode):
    """f64 -> f32 with directed rounding (rz, rm, rp)."""
    y = x.astype(F4)
    y8 = y.astype(F8)
    inf = F4.type(np.inf)
    if mode == "rz":
        return np.where(np.abs(y8) > np.abs(x), np.nextafter(y, F4.type(0)), y)
    if mode == "rm":
        return np.where(y8 > x, np.nextafter(y, -inf), y)
    return np.where(y8 < x, np.nextafter(y, inf), y)


def bf2f(u):
    """bf16 bits (u2) -> f32"""
    return (u.astype(U4) << np.uint32(16)).view(F4)


def f2bf(x, mode="rn"):
    """f32 -> bf16 bits (u2)"""
    u = x.view(U4)
    if mode == "rz":
        r = u >> np.uint32(16)
    else:
        r = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = np.isnan(x)
    if nan.any():
        r = np.where(nan, np.uint32(0x7FFF), r)
    return r.astype(U2)


def f2h_rz(x):
    y = x.astype(F2)
    over = np.abs(y.astype(F8)) > np.abs(x.astype(F8))
    return np.where(over, np.nextafter(y, F2.type(0)), y)


def f2tf32(x, mode="rna"):
    u = x.view(U4)
    if mode == "rna":
        r = (u + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    elif mode == "rn":
        r = (u + np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    else:
        r = u & np.uint32(0xFFFFE000)
    special = (u & EXP32) == EXP32
    return np.where(special, u, r).astype(U4)


def pack2(lo, hi):
    """two u2 -> u4"""
    return lo.astype(U4) | (hi.astype(U4) << np.uint32(16))


def h2(x):
    """u4 -> two f16 planes"""
    return x.astype(U2).view(F2), (x >> np.uint32(16)).astype(U2).view(F2)


def b2(x):
    """u4 -> two f32 planes holding the bf16 halves"""
    return (x << np.uint32(16)).view(F4), (x & np.uint32(0xFFFF0000)).view(F4)


INT_RANGE = {f"u{n}": (0, 2**n - 1) for n in (8, 16, 32, 64)}
INT_RANGE |= {f"s{n}": (-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in (8, 16, 32, 64)}


def f2i(x, ty, mode):
    """float -> integer with saturation; NaN -> 0, or the top bit alone when either side is 64 bits wide."""
    wide = x.dtype == F8 or ty.endswith("64")
    x = x.astype(F8)
    x = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode](x)
    lo, hi = INT_RANGE[ty]
    bits = int(ty[1:])
    nan = np.isnan(x)
    if bits == 64:
        dt = U8 if ty[0] == "u" else I8
        top = 2.0**64 if ty[0] == "u" else 2.0**63
        big, small = x >= top, x <= float(lo)
        r = np.where(big | small | nan, 0.0, x).astype(dt)
        r = np.where(big, dt.type(hi), np.where(small, dt.type(lo), r)).astype(dt)
        return np.where(nan, np.uint64(1 << 63).astype(dt), r)
    at_nan = float(-(1 << (bits - 1)) if ty[0] == "s" else 1 << (bits - 1)) if wide else 0.0
    r = np.where(nan, at_nan, np.clip(x, float(lo), float(hi)))
    return r.astype(I8)


def copysign_bits(a, b):
    """PTX copysign d, a, b: sign of a, magnitude of b (f32 bit images)."""
    return (b & np.uint32(0x7FFFFFFF)) | (a & SIGN32)


def idiv(a, b):
    """Truncating division of equal-typed integer arrays; x/0 = -1 as on NVIDIA."""
    z = b == 0
    bb = np.where(z, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        q = a // bb
        return np.where(z, q.dtype.type(np.iinfo(q.dtype).max), q)
    q = a // bb  # floor
    fix = ((a % bb) != 0) & ((a < 0) != (bb < 0))
    q = q + fix.astype(q.dtype)
    return np.where(z, q.dtype.type(-1), q)


def irem(a, b):
    z = b == 0
    bb = np.where(z, b.dtype.type(1), b)
    r = a - idiv(a, bb) * bb
    return np.where(z, a, r)


def mulhi_u64(a, b):
    m = np.uint64(0xFFFFFFFF)
    s = np.uint64(32)
    al, ah, bl, bh = a & m, a >> s, b & m, b >> s
    t = al * bl
    k = t >> s
    t = ah * bl + k
    w1, w2 = t & m, t >> s
    t = al * bh + w1
    return ah * bh + w2 + (t >> s)


def mulhi_s64(a, b):
    r = mulhi_u64(a.view(U8), b.view(U8))
    r = r - np.where(a < 0, b.view(U8), np.uint64(0)) - np.where(b < 0, a.view(U8), np.uint64(0))
    return r


def bfe(a, pos, ln, signed):
    """a: unsigned container array; pos, ln: python ints or u4 arrays"""
    bits = a.dtype.itemsize * 8
    if isinstance(pos, int) and isinstance(ln, int):
        pos &= 255
        ln &= 255
        if ln == 0 or (pos >= bits and not signed):
            return np.zeros(1, a.dtype)
        if not signed:
            r = a >> a.dtype.type(pos)
            return r if ln >= bits else r & a.dtype.type((1 << ln) - 1)
        it = np.dtype(f"i{a.dtype.itemsize}")
        if pos >= bits:
            return (a.view(it) >> it.type(bits - 1)).view(a.dtype)
        ln = min(ln, bits - pos)
        up = (a << a.dtype.type(bits - pos - ln)).view(it)
        return (up >> it.type(bits - ln)).view(a.dtype)
    pos = (np.asarray(pos) & 255).astype(I8) if not isinstance(pos, int) else np.array([pos & 255], I8)
    ln = (np.asarray(ln) & 255).astype(I8) if not isinstance(ln, int) else np.array([ln & 255], I8)
    pos, ln, a = np.broadcast_arrays(pos, ln, a)
    end = np.minimum(pos + ln, bits)
    w = np.maximum(end - np.minimum(pos, bits), 0)
    sh = np.where(pos < bits, pos, 0).astype(a.dtype)
    r = np.where(pos < bits, a >> sh, a.dtype.type(0))
    full = w >= bits
    mask = np.where(
        full,
        a.dtype.type(~a.dtype.type(0)),
        (a.dtype.type(1) << np.where(full, 0, w).astype(a.dtype)) - a.dtype.type(1),
    )
    r = r & mask
    if signed:
        top = np.minimum(pos + ln - 1, bits - 1)
        sb = ((a >> np.maximum(top, 0).astype(a.dtype)) & a.dtype.type(1)).astype(bool) & (ln > 0)
        r = np.where(sb, r | ~mask, r)
    return np.ascontiguousarray(r)


def bfi(a, b, pos, ln):
    bits = b.dtype.itemsize * 8
    pos = (np.asarray(pos) & 255).astype(I8)
    ln = (np.asarray(ln) & 255).astype(I8)
    a, b, pos, ln = np.broadcast_arrays(a, b, pos, ln)
    ok = (pos < bits) & (ln > 0)
    w = np.minimum(ln, bits - np.minimum(pos, bits))
    p = np.where(ok, pos, 0).astype(b.dtype)
    full = w >= bits
    m = np.where(
        full,
        b.dtype.type(~b.dtype.type(0)),
        (b.dtype.type(1) << np.where(full, 0, np.maximum(w, 0)).astype(b.dtype)) - b.dtype.type(1),
    )
    r = (b & ~(m << p)) | ((a & m) << p)
    return np.where(ok, r, b)


def popc(x):
    return np.bitwise_count(x).astype(U4)


def clz(x):
    bits = x.dtype.itemsize * 8
    n = np.full(x.shape, bits, U4)
    y = x.copy()
    for s in (32, 16, 8, 4, 2, 1):
        if s >= bits:
            continue
        t = y >> y.dtype.type(s)
        nz = t != 0
        n = np.where(nz, n - np.uint32(s), n)
        y = np.where(nz, t, y)
    return np.where(x == 0, np.uint32(bits), n - np.uint32(1)).astype(U4)


def brev(x):
    bits = x.dtype.itemsize * 8
    r = np.zeros_like(x)
    for i in range(bits):
        r |= ((x >> x.dtype.type(i)) & x.dtype.type(1)) << x.dtype.type(bits - 1 - i)
    return r


def prmt(a, b, sel):
    """Generic byte permute (default mode); sel is a python int or a u4 array."""
    a, b = np.broadcast_arrays(a, b)
    n = a.shape[0]
    by = np.empty((n, 8), U1)
    by[:, :4] = np.ascontiguousarray(a).view(U1).reshape(n, 4)
    by[:, 4:] = np.ascontiguousarray(b).view(U1).reshape(n, 4)
    if isinstance(sel, int):
        out = np.empty((n, 4), U1)
        for i in range(4):
            s = (sel >> (4 * i)) & 15
            v = by[:, s & 7]
            out[:, i] = np.where(v & 0x80, np.uint8(255), np.uint8(0)) if s & 8 else v
        return out.view(U4).reshape(n)
    sel = np.broadcast_to(sel, max(n, sel.shape[0]))
    by = np.broadcast_to(by, (sel.shape[0], 8))
    out = np.empty((sel.shape[0], 4), U1)
    rows = np.arange(sel.shape[0])
    for i in range(4):
        s = (sel >> np.uint32(4 * i)) & np.uint32(15)
        v = by[rows, (s & np.uint32(7)).astype(I8)]
        out[:, i] = np.where(s & np.uint32(8), np.where(v & 0x80, np.uint8(255), np.uint8(0)), v)
    return out.view(U4).reshape(-1)


def shf(lo, hi, amt, left, clamp):
    s = np.minimum(amt, np.uint32(32)) if clamp else amt & np.uint32(31)
    w = (hi.astype(U8) << np.uint64(32)) | lo
    if left:
        return ((w << s.astype(U8)) >> np.uint64(32)).astype(U4)
    return (w >> s.astype(U8)).astype(U4)


_TWO = {
    0: "Z",
    1: "~(b|c)",
    2: "~b&c",
    3: "~b",
    4: "b&~c",
    5: "~c",
    6: "b^c",
    7: "~(b&c)",
    8: "b&c",
    9: "~(b^c)",
    10: "c",
    11: "~b|c",
    12: "b",
    13: "b|~c",
    14: "b|c",
    15: "N",
}


def lop3_expr(lut, a, b, c):
    """Python expression for lop3 with the given table. Index = a<<2 | b<<1 | c."""

    def two(t):
        return _TWO[t]

    hi, lo = two((lut >> 4) & 15), two(lut & 15)
    if hi == lo:
        e = {"Z": "(b^b)", "N": "~(b^b)"}.get(hi, hi)
    elif lo == "Z":
        e = "a" if hi == "N" else f"a&({hi})"
    elif lo == "N":
        e = "~a" if hi == "Z" else f"~a|({hi})"
    elif hi == "Z":
        e = f"~a&({lo})"
    elif hi == "N":
        e = f"a|({lo})"
    else:
        e = f"(a&({hi}))|(~a&({lo}))"
    return (
        e.replace("a", "\0a")
        .replace("b", "\0b")
        .replace("c", "\0c")
        .replace("\0a", a)
        .replace("\0b", b)
        .replace("\0c", c)
    )


def full(x, T):
    """Expand a uniform value to one element per thread."""
    if x.shape[0] == T:
        return x
    return np.full(T, x[0], x.dtype)
