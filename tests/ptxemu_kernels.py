"""Kernels for the tests of the PTX emulator."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def vadd(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(z + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@triton.jit
def vadd_oob(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(z + i, tl.load(x + i) + tl.load(y + i), mask=i < n)


@triton.jit
def no_other(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n)
    tl.store(y, tl.sum(a))


@triton.jit
def racy(z, n, BLOCK: tl.constexpr):
    p = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    tl.store(z + i, (i * 0 + p).to(tl.float32))


@triton.jit
def racy_rmw(z, BLOCK: tl.constexpr):
    p = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    tl.store(z + i, tl.load(z + i) * 2 + p)


@triton.jit
def softmax(x, y, n, s, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    a = tl.load(x + r * s + c, mask=c < n, other=-float("inf")).to(tl.float32)
    a = a - tl.max(a, 0)
    e = tl.exp(a)
    tl.store(y + r * s + c, (e / tl.sum(e, 0)).to(y.dtype.element_ty), mask=c < n)


@triton.jit
def layernorm(x, w, b, y, mean, rstd, n, eps, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    m = c < n
    a = tl.load(x + r * n + c, mask=m, other=0.0).to(tl.float32)
    mu = tl.sum(a, 0) / n
    d = tl.where(m, a - mu, 0.0)
    rs = 1 / tl.sqrt(tl.sum(d * d, 0) / n + eps)
    tl.store(mean + r, mu)
    tl.store(rstd + r, rs)
    o = d * rs * tl.load(w + c, mask=m).to(tl.float32) + tl.load(b + c, mask=m).to(tl.float32)
    tl.store(y + r * n + c, o.to(y.dtype.element_ty), mask=m)


@triton.jit
def gemm(
    a,
    b,
    c,
    M,
    N,
    K,
    sam,
    sak,
    sbk,
    sbn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PREC: tl.constexpr = "tf32",
):
    pm = tl.program_id(0)
    pn = tl.program_id(1)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    if a.dtype.element_ty == tl.float64:
        acc = tl.zeros((BM, BN), tl.float64)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        kk = k + rk
        x = tl.load(a + rm[:, None] * sam + kk[None, :] * sak, mask=(rm[:, None] < M) & (kk[None, :] < K), other=0.0)
        y = tl.load(b + kk[:, None] * sbk + rn[None, :] * sbn, mask=(kk[:, None] < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PREC)
    tl.store(c + rm[:, None] * N + rn[None, :], acc.to(c.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def gemm_i8(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.int32)
    for k in range(0, K, BK):
        x = tl.load(a + rm[:, None] * K + (k + rk)[None, :])
        y = tl.load(b + (k + rk)[:, None] * BN + rn[None, :])
        acc += tl.dot(x, y, out_dtype=tl.int32)
    tl.store(c + rm[:, None] * BN + rn[None, :], acc)


@triton.jit
def fa_fwd(
    q,
    k,
    v,
    o,
    lse,
    sm,
    N,
    sb,
    sn,
    sh,
    ob,
    on,
    oh,
    H,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr = False,
):
    m = tl.program_id(0)
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    q += b.to(tl.int64) * sb + h * sh
    k += b.to(tl.int64) * sb + h * sh
    v += b.to(tl.int64) * sb + h * sh
    o += b.to(tl.int64) * ob + h * oh
    rm = m * BM + tl.arange(0, BM)
    rd = tl.arange(0, D)
    rn = tl.arange(0, BN)
    Q = tl.load(q + rm[:, None] * sn + rd[None, :], mask=rm[:, None] < N, other=0.0)
    mi = tl.full((BM,), -float("inf"), tl.float32)
    li = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    qs = sm * 1.44269504
    hi = N
    if CAUSAL:
        hi = tl.minimum(N, (m + 1) * BM)
    for s in range(0, hi, BN):
        n = s + rn
        K = tl.load(k + n[None, :] * sn + rd[:, None], mask=n[None, :] < N, other=0.0)
        S = tl.dot(Q, K) * qs
        S = tl.where(n[None, :] < N, S, -float("inf"))
        if CAUSAL:
            S = tl.where(n[None, :] <= rm[:, None], S, -float("inf"))
        mn = tl.maximum(mi, tl.max(S, 1))
        a = tl.exp2(mi - mn)
        P = tl.exp2(S - mn[:, None])
        li = li * a + tl.sum(P, 1)
        acc = acc * a[:, None]
        mi = mn
        V = tl.load(v + n[:, None] * sn + rd[None, :], mask=n[:, None] < N, other=0.0)
        acc = tl.dot(P.to(V.dtype), V, acc)
    acc = acc / li[:, None]
    tl.store(o + rm[:, None] * on + rd[None, :], acc.to(o.dtype.element_ty), mask=rm[:, None] < N)
    tl.store(lse + bh * N + rm, mi + tl.log2(li), mask=rm < N)


@triton.jit
def fa_bwd_dkdv(q, k, v, do, lse, delta, dk, dv, sm, N, s_bh, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """One CTA per key block: S^T = K Q^T, dV += P^T dO, dK += dS^T Q."""
    nb = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    q += bh * s_bh
    k += bh * s_bh
    v += bh * s_bh
    do += bh * s_bh
    dk += bh * s_bh
    dv += bh * s_bh
    lse += bh * N
    delta += bh * N
    rn = nb * BN + tl.arange(0, BN)
    rd = tl.arange(0, D)
    mn = rn[:, None] < N
    K = tl.load(k + rn[:, None] * D + rd[None, :], mask=mn, other=0.0)
    V = tl.load(v + rn[:, None] * D + rd[None, :], mask=mn, other=0.0)
    DK = tl.zeros((BN, D), tl.float32)
    DV = tl.zeros((BN, D), tl.float32)
    for s in range(0, N, BM):
        rm = s + tl.arange(0, BM)
        mm = rm[:, None] < N
        Q = tl.load(q + rm[:, None] * D + rd[None, :], mask=mm, other=0.0)
        DO = tl.load(do + rm[:, None] * D + rd[None, :], mask=mm, other=0.0)
        L = tl.load(lse + rm, mask=rm < N, other=float("inf"))
        Dl = tl.load(delta + rm, mask=rm < N, other=0.0)
        ST = tl.dot(K, tl.trans(Q)) * (sm * 1.44269504)
        PT = tl.exp2(ST - L[None, :])
        DV = tl.dot(PT.to(DO.dtype), DO, DV)
        DPT = tl.dot(V, tl.trans(DO))
        DST = PT * (DPT - Dl[None, :])
        DK = tl.dot(DST.to(Q.dtype), Q, DK)
    tl.store(dk + rn[:, None] * D + rd[None, :], (DK * sm).to(dk.dtype.element_ty), mask=mn)
    tl.store(dv + rn[:, None] * D + rd[None, :], DV.to(dv.dtype.element_ty), mask=mn)


@triton.jit
def ln_bwd_lock(dy, x, dw, lock, count, n, R: tl.constexpr, BLOCK: tl.constexpr):
    """Partial sums under a spin lock, as in the layer-norm tutorial."""
    r = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    m = c < n
    p = tl.load(dy + r * n + c, mask=m, other=0) * tl.load(x + r * n + c, mask=m, other=0)
    g = r % R
    lk = lock + g
    ct = count + g
    ptr = dw + g * n + c
    while tl.atomic_cas(lk, 0, 1) == 1:
        pass
    first = tl.load(ct)
    if first == 0:
        tl.atomic_xchg(ct, 1)
    else:
        p += tl.load(ptr, mask=m)
    tl.store(ptr, p, mask=m)
    tl.debug_barrier()
    tl.atomic_xchg(lk, 0)


@triton.jit
def atomics(x, cnt, mx, mn, fsum, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    a = tl.load(x + i, mask=m, other=0)
    tl.atomic_add(cnt + a % 7, 1, mask=m)
    tl.atomic_max(mx + a % 7, a, mask=m)
    tl.atomic_min(mn + a % 7, a, mask=m)
    tl.atomic_add(fsum, tl.sum(tl.where(m, a, 0).to(tl.float32)))


@triton.jit
def atomic_ticket(t, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    old = tl.atomic_add(t + i * 0, 1)
    tl.store(out + tl.program_id(0) * BLOCK + i, old)


@triton.jit
def atomic_half(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.atomic_add(y + i % 64, tl.load(x + i, mask=m, other=0), mask=m)


@triton.jit
def unary(x, y, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    a = tl.load(x + i, mask=m, other=1.0)
    if OP == "erf":
        r = tl.math.erf(a)
    elif OP == "tanh":
        r = libdevice.tanh(a)
    elif OP == "exp":
        r = tl.exp(a)
    elif OP == "log":
        r = tl.log(tl.abs(a) + 1e-3)
    elif OP == "sin":
        r = tl.sin(a)
    elif OP == "cos":
        r = tl.cos(a)
    elif OP == "sqrt":
        r = tl.sqrt(tl.abs(a))
    elif OP == "rsqrt":
        r = tl.rsqrt(tl.abs(a) + 0.1)
    elif OP == "sigmoid":
        r = tl.sigmoid(a)
    elif OP == "floor":
        r = tl.floor(a)
    elif OP == "ceil":
        r = tl.ceil(a)
    elif OP == "expm1":
        r = libdevice.expm1(a)
    elif OP == "log1p":
        r = libdevice.log1p(tl.abs(a))
    elif OP == "pow":
        r = libdevice.pow(tl.abs(a), a * 0.1)
    elif OP == "gelu":
        r = 0.5 * a * (1 + tl.math.erf(a * 0.7071067811865476))
    elif OP == "rint":
        r = libdevice.rint(a)
    elif OP == "div":
        r = 1.0 / a
    elif OP == "div_rn":
        r = tl.div_rn(a, a + 3.0)
    elif OP == "sqrt_rn":
        r = tl.sqrt_rn(tl.abs(a))
    elif OP == "lgamma":
        r = libdevice.lgamma(tl.abs(a) + 0.5)
    elif OP == "erfinv":
        r = libdevice.erfinv(a / 1000.0)
    elif OP == "atan2":
        r = libdevice.atan2(a, a * a - 1)
    tl.store(y + i, r, mask=m)


@triton.jit
def dropout(x, y, p, seed, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    r = tl.rand(seed, i)
    a = tl.load(x + i, mask=m, other=0)
    tl.store(y + i, tl.where(r > p, a / (1 - p), 0.0), mask=m)


@triton.jit
def cast(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(y + i, tl.load(x + i, mask=m, other=0).to(y.dtype.element_ty), mask=m)


@triton.jit
def scan_sort(x, y, z, n, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    a = tl.load(x + c, mask=c < n, other=0)
    tl.store(y + c, tl.cumsum(a, 0), mask=c < n)
    tl.store(z + c, tl.sort(a))


@triton.jit
def argmaxrow(x, y, v, n, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    a = tl.load(x + r * n + c, mask=c < n, other=-float("inf"))
    tl.store(y + r, tl.argmax(a, 0))
    tl.store(v + r, tl.max(a, 0))


@triton.jit
def transpose(x, y, M, N, BM: tl.constexpr, BN: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    a = tl.load(x + rm[:, None] * N + rn[None, :], mask=(rm[:, None] < M) & (rn[None, :] < N), other=0)
    tl.store(y + rn[:, None] * M + rm[None, :], tl.trans(a), mask=(rn[:, None] < N) & (rm[None, :] < M))


@triton.jit
def hist(x, y, n, BLOCK: tl.constexpr, BINS: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i)
    tl.store(y + tl.arange(0, BINS), tl.histogram(a, BINS))


@triton.jit
def gather_idx(x, idx, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    j = tl.load(idx + i, mask=m, other=0)
    tl.store(y + i, tl.load(x + j, mask=m), mask=m)


@triton.jit
def asserting(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=0)
    tl.device_assert(a >= 0, "negative")


@triton.jit
def int_math(x, y, q, r, s, h, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    m = i < n
    a = tl.load(x + i, mask=m, other=1)
    b = tl.load(y + i, mask=m, other=1)
    tl.store(q + i, a // b, mask=m)
    tl.store(r + i, a % b, mask=m)
    tl.store(s + i, (a << 3) ^ (b >> 2) | (a & b), mask=m)
    tl.store(
        h + i,
        tl.umulhi(a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True),
        mask=m,
    )


@triton.jit
def varloop(x, y, lens, BLOCK: tl.constexpr):
    """Trip count differs between CTAs."""
    p = tl.program_id(0)
    n = tl.load(lens + p)
    acc = tl.zeros((BLOCK,), tl.float32)
    i = tl.arange(0, BLOCK)
    for k in range(0, n):
        acc += tl.load(x + k * BLOCK + i)
    tl.store(y + p * BLOCK + i, acc)
    if p % 2 == 0:
        tl.store(y + p * BLOCK + i, acc * 2)


@triton.jit
def cast_plain(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def via_table(ptrs, y, n, BLOCK: tl.constexpr):
    """Pointers read from memory."""
    p = tl.program_id(0)
    src = tl.load(ptrs + p).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, BLOCK)
    tl.store(y + p * n + i, tl.load(src + i, mask=i < n), mask=i < n)


@triton.jit
def desc_copy(x, y, M, N, BM: tl.constexpr, BN: tl.constexpr):
    d = tl.make_tensor_descriptor(x, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    e = tl.make_tensor_descriptor(y, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    r = tl.program_id(0) * BM
    c = tl.program_id(1) * BN
    e.store([r, c], d.load([r, c]) * 2)


@triton.jit
def host_desc_copy(d, e, BM: tl.constexpr, BN: tl.constexpr):
    r = tl.program_id(0) * BM
    c = tl.program_id(1) * BN
    e.store([r, c], d.load([r, c]) + 1)


@triton.autotune([triton.Config(dict(BLOCK=b), num_warps=w) for b, w in ((64, 2), (256, 4), (1024, 8))], key=["n"])
@triton.jit
def tuned(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


@triton.autotune([triton.Config(dict(BLOCK=b)) for b in (64, 256)], key=["n"], reset_to_zero=["s"])
@triton.jit
def tuned_sum(x, s, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(s, tl.sum(tl.load(x + i, mask=i < n, other=0)))


@triton.heuristics({"EVEN": lambda a: a["n"] % a["BLOCK"] == 0})
@triton.jit
def heur(x, y, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(y + i, tl.load(x + i) + 1)
    else:
        tl.store(y + i, tl.load(x + i, mask=i < n) + 2, mask=i < n)


@triton.jit
def args_kernel(out, f, h, i8v, big, flag, t, one, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = f + h.to(tl.float32) + i8v + (big // 1000000007).to(tl.float32) + one
    v += t[0] + t[1]
    if flag:
        v += 0.5
    tl.store(out + i, v + i * 0)


@triton.jit
def _tail(x):
    return x * x + 1


@triton.jit
def reduce_2d(x, y, z, M: tl.constexpr, N: tl.constexpr):
    r = tl.arange(0, M)
    c = tl.arange(0, N)
    a = tl.load(x + r[:, None] * N + c[None, :])
    tl.store(y + c, tl.sum(_tail(a), 0))
    tl.store(z + r, tl.max(a, 1))


@triton.jit
def semaphore(x, y, flag, BLOCK: tl.constexpr):
    """CTA 0 publishes; the others wait for its flag."""
    p = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if p == 0:
        tl.store(y + i, tl.load(x + i) * 3)
        tl.debug_barrier()
        tl.atomic_xchg(flag, 1, sem="release")
    else:
        while tl.atomic_add(flag, 0, sem="acquire") == 0:
            pass
        tl.store(y + p * BLOCK + i, tl.load(y + i, volatile=True) + p)


@triton.jit
def other_zero(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0))


@triton.jit
def _helper_load(p, m):
    return tl.load(p, mask=m)


@triton.jit
def other_none(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, _helper_load(x + i, i < n))


@triton.jit
def printing(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.device_print("val", tl.load(x + i))


@triton.jit
def piped_no_other(a, b, c, K, BM: tl.constexpr, BK: tl.constexpr, OTHER: tl.constexpr):
    """The mask covers only part of the last K block."""
    r = tl.arange(0, BM)
    acc = tl.zeros((BM, BM), tl.float32)
    for k in range(0, K, BK):
        kk = k + tl.arange(0, BK)
        if OTHER:
            x = tl.load(a + r[:, None] * 128 + kk[None, :], mask=kk[None, :] < K, other=0.0)
            y = tl.load(b + kk[:, None] * BM + r[None, :], mask=kk[:, None] < K, other=0.0)
        else:
            x = tl.load(a + r[:, None] * 128 + kk[None, :], mask=kk[None, :] < K)
            y = tl.load(b + kk[:, None] * BM + r[None, :], mask=kk[:, None] < K)
        acc = tl.dot(x, y, acc)
    tl.store(c + r[:, None] * BM + r[None, :], acc)


@triton.jit
def erf_matmul(a_ptr, b_ptr, out_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0).to(
            tl.float32
        )
        g = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
        b = tl.load(b_ptr + n[None, :] * K + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        acc = tl.dot(g.to(b.dtype), b, acc)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc, mask=(m[:, None] < M) & (n[None, :] < N))
