"""Multi-head attention in one pass over the keys, after FlashAttention-2 (Dao 2023, arXiv:2307.08691).

Forward, for one tile of query rows (algorithm 1): ``S = scale * Q K^T`` is made a block of keys at a time; the
running maximum ``m`` and sum ``l`` of each row rescale what was accumulated, so that ``O = softmax(S) V`` needs no
N x N matrix. Saved for the backward pass: ``O`` and ``L = m + log l``, nothing else.

Backward (algorithm 2): ``P = exp(S - L)`` is recomputed; with ``D = rowsum(dO * O)``

    dV = P^T dO        dP = dO V^T        dS = P * (dP - D)        dQ = scale * dS K        dK = scale * dS^T Q

One kernel owns rows of dQ, another rows of dK and dV, so nothing is accumulated by two programs and the result is
the same bit for bit every time. A gradient of ``L`` itself (it is a public output) enters as ``D - dL``.

Dropout zeroes elements of ``P`` after the row sums: ``O = (mask * P / keep) V`` and ``dP = mask / keep * (dO V^T)``;
``D`` is the same expression.

Head sizes between powers of two are covered by two tiles, 72 = 64 + 8 (padded to 16), so that a second product of
width 16 replaces padding to 128.
"""

import math

import torch
import triton
import triton.language as tl

from vit_triton.kernels._config import (
    cdiv,
    attention_tail,
    architecture,
    pick_attention_bwd_dkdv,
    pick_attention_bwd_dq,
    pick_attention_fwd,
    split_head_dim,
)
from vit_triton.kernels._launch import input_precision, keep_scale, launch, side_by_side
from vit_triton.kernels._tiles import LN2, LOG2E, dropout_keep


@triton.jit
def load_rows(
    ptr,
    offs_row,
    n_rows,
    stride_row,
    stride_d,
    FIRST_D: tl.constexpr,
    N_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Columns ``FIRST_D ... FIRST_D + N_D`` of rows of one head, zero past ``HEAD_DIM`` and, if MASKED, past ``n_rows``."""
    offs_d = FIRST_D + tl.arange(0, N_D)
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * stride_row + offs_d.to(tl.int64)[None, :] * stride_d
    if FIRST_D + N_D > HEAD_DIM:
        mask_d = (offs_d < HEAD_DIM)[None, :]
        tile = tl.load(ptrs, mask=(offs_row < n_rows)[:, None] & mask_d if MASKED else mask_d, other=0.0)
    elif MASKED:
        tile = tl.load(ptrs, mask=(offs_row < n_rows)[:, None], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store_rows(
    ptr,
    tile,
    offs_row,
    n_rows,
    stride_row,
    FIRST_D: tl.constexpr,
    N_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    offs_d = FIRST_D + tl.arange(0, N_D)
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * stride_row + offs_d[None, :]
    mask = (offs_row < n_rows)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def head_of_program(n_heads, n_blocks):
    """(block, batch, head, plane) of this program; blocks of one head are neighbours and share its keys in L2."""
    pid = tl.program_id(0)
    plane = pid // n_blocks
    return pid % n_blocks, (plane // n_heads).to(tl.int64), (plane % n_heads).to(tl.int64), plane


@triton.jit
def head_ptr(ptr, batch, stride_b, head, stride_h, HEAD_ALIGN: tl.constexpr):
    """Where a head starts. Triton knows strides that 16 divides; a head of 72 or 88 is a multiple of 8, and 8 numbers
    are one access of 16 bytes."""
    return ptr + batch * stride_b + tl.multiple_of(head * stride_h, HEAD_ALIGN)


@triton.jit
def attention_fwd_step(
    acc,
    acc_tail,
    row_max,
    row_sum,
    q,
    q_tail,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_kd,
    stride_vn,
    stride_vd,
    start_n,
    n_k,
    scale_log2e,
    seed,
    offs_m,
    plane,
    dropout_p,
    HEAD_DIM: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take keys ``start_n ... start_n + BLOCK_N`` into the running softmax; ``scale_log2e`` >= 0."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, offs_n, n_k, stride_kn, stride_kd, 0, D_MAIN, HEAD_DIM, MASKED)  # [BLOCK_N, D_MAIN]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if D_TAIL > 0:
        k_tail = load_rows(k_ptr, offs_n, n_k, stride_kn, stride_kd, D_MAIN, D_TAIL, HEAD_DIM, MASKED)
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
    if NEGATIVE_SCALE:
        scores = -scores
    if MASKED:
        scores = tl.where((offs_n < n_k)[None, :], scores, float("-inf"))

    # the maximum is scaled once a row, the scores inside of the exponent, where it costs a fused multiply-add
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2e)  # [BLOCK_M]
    # a row of -inf so far has no maximum to subtract: -inf - -inf would be NaN where PyTorch goes on
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores * scale_log2e - shift[:, None])  # [BLOCK_M, BLOCK_N]
    if MASKED:
        p = tl.where((offs_n < n_k)[None, :], p, 0.0)  # -inf times a scale of 0 is NaN
    rescale = tl.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(dropout_keep(seed, offs_m[:, None], offs_n[None, :], plane, dropout_p), p, 0.0)

    v = load_rows(v_ptr, offs_n, n_k, stride_vn, stride_vd, 0, D_MAIN, HEAD_DIM, MASKED)  # [BLOCK_N, D_MAIN]
    p = p.to(v.dtype)
    acc = tl.dot(p, v, acc * rescale[:, None], input_precision=PRECISION)
    if D_TAIL > 0:
        v_tail = load_rows(v_ptr, offs_n, n_k, stride_vn, stride_vd, D_MAIN, D_TAIL, HEAD_DIM, MASKED)
        acc_tail = tl.dot(p, v_tail, acc_tail * rescale[:, None], input_precision=PRECISION)
    return acc, acc_tail, new_max, row_sum


@triton.jit
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    seed_ptr,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_vd,
    n_heads,
    n_q,
    n_k,
    scale_log2e,
    dropout_p,
    keep_scale,
    HEAD_ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_m, batch, head, plane = head_of_program(n_heads, tl.cdiv(n_q, BLOCK_M))
    q_ptr = head_ptr(q_ptr, batch, stride_qb, head, stride_qh, HEAD_ALIGN)
    k_ptr = head_ptr(k_ptr, batch, stride_kb, head, stride_kh, HEAD_ALIGN)
    v_ptr = head_ptr(v_ptr, batch, stride_vb, head, stride_vh, HEAD_ALIGN)
    out_ptr += (batch * n_q * n_heads + head) * HEAD_DIM
    seed = tl.load(seed_ptr) if DROPOUT else 0

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, offs_m, n_q, stride_qn, stride_qd, 0, D_MAIN, HEAD_DIM, True)  # [BLOCK_M, D_MAIN]
    q_tail = q
    if D_TAIL > 0:
        q_tail = load_rows(q_ptr, offs_m, n_q, stride_qn, stride_qd, D_MAIN, D_TAIL, HEAD_DIM, True)

    acc = tl.zeros([BLOCK_M, D_MAIN], tl.float32)
    acc_tail = tl.zeros([BLOCK_M, D_TAIL if D_TAIL > 0 else 16], tl.float32)  # without a tail dead, and removed
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    n_full = n_k // BLOCK_N * BLOCK_N
    for start_n in tl.range(0, n_full, BLOCK_N):
        acc, acc_tail, row_max, row_sum = attention_fwd_step(
            acc, acc_tail, row_max, row_sum, q, q_tail, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
            start_n, n_k, scale_log2e, seed, offs_m, plane, dropout_p,
            HEAD_DIM, D_MAIN, D_TAIL, BLOCK_N, False, NEGATIVE_SCALE, DROPOUT, PRECISION,
        )  # fmt: skip
    if TAIL_N > 0:
        acc, acc_tail, row_max, row_sum = attention_fwd_step(
            acc, acc_tail, row_max, row_sum, q, q_tail, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
            n_full, n_k, scale_log2e, seed, offs_m, plane, dropout_p,
            HEAD_DIM, D_MAIN, D_TAIL, TAIL_N, True, NEGATIVE_SCALE, DROPOUT, PRECISION,
        )  # fmt: skip

    # one reciprocal a row: a division per element is some hundred instructions more
    norm = 1.0 / row_sum
    if DROPOUT:
        norm *= keep_scale
    store_rows(out_ptr, acc * norm[:, None], offs_m, n_q, n_heads * HEAD_DIM, 0, D_MAIN, HEAD_DIM)
    if D_TAIL > 0:
        store_rows(out_ptr, acc_tail * norm[:, None], offs_m, n_q, n_heads * HEAD_DIM, D_MAIN, D_TAIL, HEAD_DIM)
    if lse_ptr is not None:
        lse = (row_max + tl.log2(row_sum)) * LN2
        tl.store(lse_ptr + plane.to(tl.int64) * n_q + offs_m, lse, mask=offs_m < n_q)


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    *,
    scale: float,
    dropout_p: float,
    save: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, N_q, H, D), (B, N_k, H, D), (B, N_k, H, D), any strides -> out (B, N_q, H, D) contiguous, and with ``save``
    the log-sum-exp of the scaled scores, float32 (B, H, N_q)."""
    batch, n_q, n_heads, head_dim = q.shape
    n_k = k.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, n_heads, n_q, dtype=torch.float32, device=q.device) if save else None
    arch = architecture(q.device)
    config = pick_attention_fwd(n_q, n_k, head_dim, q.dtype, arch, dropout_p > 0)
    d_main, d_tail = split_head_dim(head_dim, q.dtype, arch)
    launch(
        attention_fwd_kernel,
        (cdiv(n_q, config.block_m) * batch * n_heads,),
        q,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        lse_ptr=lse,
        seed_ptr=seed,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        n_heads=n_heads,
        n_q=n_q,
        n_k=n_k,
        scale_log2e=abs(scale) * LOG2E.value,
        dropout_p=dropout_p,
        keep_scale=keep_scale(dropout_p),
        HEAD_ALIGN=_head_align(q, k, v),
        HEAD_DIM=head_dim,
        D_MAIN=d_main,
        D_TAIL=d_tail,
        NEGATIVE_SCALE=scale < 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TAIL_N=attention_tail(n_k, config.block_n),
        DROPOUT=dropout_p > 0,
        PRECISION=input_precision(q.dtype, arch),
        **config.options,
    )
    return out, lse


def strides(name: str, x: torch.Tensor) -> dict[str, int]:
    """The strides of a (B, N, H, D) tensor as kernel arguments: stride_qb, stride_qn, stride_qh, stride_qd."""
    return {f"stride_{name}{axis}": stride for axis, stride in zip("bnhd", x.stride(), strict=True)}


def _head_align(*tensors: torch.Tensor) -> int:
    """The power of two up to 16 that divides the stride from head to head of every (B, N, H, D) tensor."""
    return math.gcd(16, *(x.stride(2) for x in tensors))


@triton.jit
def attention_bwd_delta_kernel(
    out_ptr,
    do_ptr,
    dlse_ptr,
    delta_ptr,
    stride_dob,
    stride_don,
    stride_doh,
    stride_dod,
    stride_dlseb,
    stride_dlseh,
    stride_dlsen,
    n_heads,
    n_q,
    HEAD_ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """delta = rowsum(dO * O) - dL, float32 (B, H, N_q)."""
    pid_m, batch, head, plane = head_of_program(n_heads, tl.cdiv(n_q, BLOCK_M))
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_q
    out_ptr += (batch * n_q * n_heads + head) * HEAD_DIM
    do_ptr = head_ptr(do_ptr, batch, stride_dob, head, stride_doh, HEAD_ALIGN)
    out = load_rows(out_ptr, offs_m, n_q, n_heads * HEAD_DIM, 1, 0, BLOCK_D, HEAD_DIM, True)  # [BLOCK_M, BLOCK_D]
    do = load_rows(do_ptr, offs_m, n_q, stride_don, stride_dod, 0, BLOCK_D, HEAD_DIM, True)  # [BLOCK_M, BLOCK_D]
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        dlse_ptr += batch * stride_dlseb + head * stride_dlseh
        delta -= tl.load(dlse_ptr + offs_m.to(tl.int64) * stride_dlsen, mask=mask_m, other=0.0)
    tl.store(delta_ptr + plane.to(tl.int64) * n_q + offs_m, delta, mask=mask_m)


@triton.jit
def attention_bwd_dq_step(
    dq,
    dq_tail,
    q,
    q_tail,
    do,
    do_tail,
    lse_log2e,
    delta,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_kd,
    stride_vn,
    stride_vd,
    start_n,
    n_k,
    scale_log2e,
    seed,
    offs_m,
    plane,
    dropout_p,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what keys ``start_n ... start_n + BLOCK_N`` give to dQ, still without ``scale``."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, offs_n, n_k, stride_kn, stride_kd, 0, D_MAIN, HEAD_DIM, MASKED)  # [BLOCK_N, D_MAIN]
    v = load_rows(v_ptr, offs_n, n_k, stride_vn, stride_vd, 0, D_MAIN, HEAD_DIM, MASKED)  # [BLOCK_N, D_MAIN]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if D_TAIL > 0:
        k_tail = load_rows(k_ptr, offs_n, n_k, stride_kn, stride_kd, D_MAIN, D_TAIL, HEAD_DIM, MASKED)
        v_tail = load_rows(v_ptr, offs_n, n_k, stride_vn, stride_vd, D_MAIN, D_TAIL, HEAD_DIM, MASKED)
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
        dp = tl.dot(do_tail, tl.trans(v_tail), dp, input_precision=PRECISION)
    p = tl.exp2(scores * scale_log2e - lse_log2e[:, None])
    if MASKED:
        p = tl.where((offs_n < n_k)[None, :], p, 0.0)  # exp(0 - L) of a column that is not there may be inf
    if DROPOUT:
        keep = dropout_keep(seed, offs_m[:, None], offs_n[None, :], plane, dropout_p)
        dp = tl.where(keep, dp * keep_scale, 0.0)  # NaN in dp is NaN in delta too
    ds = (p * (dp - delta[:, None])).to(k.dtype)  # [BLOCK_M, BLOCK_N]
    dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    if D_TAIL > 0:
        dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision=PRECISION)
    return dq, dq_tail


@triton.jit
def attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    dq_ptr,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_vd,
    stride_dob,
    stride_don,
    stride_doh,
    stride_dod,
    stride_dqb,
    stride_dqn,
    stride_dqh,
    n_heads,
    n_q,
    n_k,
    scale,
    scale_log2e,
    dropout_p,
    keep_scale,
    HEAD_ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_m, batch, head, plane = head_of_program(n_heads, tl.cdiv(n_q, BLOCK_M))
    q_ptr = head_ptr(q_ptr, batch, stride_qb, head, stride_qh, HEAD_ALIGN)
    k_ptr = head_ptr(k_ptr, batch, stride_kb, head, stride_kh, HEAD_ALIGN)
    v_ptr = head_ptr(v_ptr, batch, stride_vb, head, stride_vh, HEAD_ALIGN)
    do_ptr = head_ptr(do_ptr, batch, stride_dob, head, stride_doh, HEAD_ALIGN)
    dq_ptr = head_ptr(dq_ptr, batch, stride_dqb, head, stride_dqh, HEAD_ALIGN)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_q
    q = load_rows(q_ptr, offs_m, n_q, stride_qn, stride_qd, 0, D_MAIN, HEAD_DIM, True)  # [BLOCK_M, D_MAIN]
    do = load_rows(do_ptr, offs_m, n_q, stride_don, stride_dod, 0, D_MAIN, HEAD_DIM, True)  # [BLOCK_M, D_MAIN]
    q_tail = q
    do_tail = do
    if D_TAIL > 0:
        q_tail = load_rows(q_ptr, offs_m, n_q, stride_qn, stride_qd, D_MAIN, D_TAIL, HEAD_DIM, True)
        do_tail = load_rows(do_ptr, offs_m, n_q, stride_don, stride_dod, D_MAIN, D_TAIL, HEAD_DIM, True)
    stats = plane.to(tl.int64) * n_q + offs_m
    lse_log2e = tl.load(lse_ptr + stats, mask=mask_m, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + stats, mask=mask_m, other=0.0)

    dq = tl.zeros([BLOCK_M, D_MAIN], tl.float32)
    dq_tail = tl.zeros([BLOCK_M, D_TAIL if D_TAIL > 0 else 16], tl.float32)
    n_full = n_k // BLOCK_N * BLOCK_N
    for start_n in tl.range(0, n_full, BLOCK_N):
        dq, dq_tail = attention_bwd_dq_step(
            dq, dq_tail, q, q_tail, do, do_tail, lse_log2e, delta, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn,
            stride_vd, start_n, n_k, scale_log2e, seed, offs_m, plane, dropout_p, keep_scale,
            HEAD_DIM, D_MAIN, D_TAIL, BLOCK_N, False, DROPOUT, PRECISION,
        )  # fmt: skip
    if TAIL_N > 0:
        dq, dq_tail = attention_bwd_dq_step(
            dq, dq_tail, q, q_tail, do, do_tail, lse_log2e, delta, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn,
            stride_vd, n_full, n_k, scale_log2e, seed, offs_m, plane, dropout_p, keep_scale,
            HEAD_DIM, D_MAIN, D_TAIL, TAIL_N, True, DROPOUT, PRECISION,
        )  # fmt: skip
    store_rows(dq_ptr, dq * scale, offs_m, n_q, stride_dqn, 0, D_MAIN, HEAD_DIM)
    if D_TAIL > 0:
        store_rows(dq_ptr, dq_tail * scale, offs_m, n_q, stride_dqn, D_MAIN, D_TAIL, HEAD_DIM)


@triton.jit
def attention_bwd_dkdv_step(
    dk,
    dk_tail,
    dv,
    dv_tail,
    k,
    k_tail,
    v,
    v_tail,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    stride_qn,
    stride_qd,
    stride_don,
    stride_dod,
    start_m,
    n_q,
    scale_log2e,
    seed,
    offs_n,
    plane,
    dropout_p,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what query rows ``start_m ... start_m + BLOCK_M`` give to dK (without ``scale``) and dV; tiles are transposed,
    dS, which is returned too, among them."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    if MASKED:
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < n_q, other=float("inf"))  # a row that is not there has P = 0
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < n_q, other=0.0)
    else:
        lse = tl.load(lse_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)
    q = load_rows(q_ptr, offs_m, n_q, stride_qn, stride_qd, 0, D_MAIN, HEAD_DIM, MASKED)  # [BLOCK_M, D_MAIN]
    do = load_rows(do_ptr, offs_m, n_q, stride_don, stride_dod, 0, D_MAIN, HEAD_DIM, MASKED)  # [BLOCK_M, D_MAIN]
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    if D_TAIL > 0:
        q_tail = load_rows(q_ptr, offs_m, n_q, stride_qn, stride_qd, D_MAIN, D_TAIL, HEAD_DIM, MASKED)
        do_tail = load_rows(do_ptr, offs_m, n_q, stride_don, stride_dod, D_MAIN, D_TAIL, HEAD_DIM, MASKED)
        scores = tl.dot(k_tail, tl.trans(q_tail), scores, input_precision=PRECISION)
        dp = tl.dot(v_tail, tl.trans(do_tail), dp, input_precision=PRECISION)
    p = tl.exp2(scores * scale_log2e - (lse * LOG2E)[None, :])
    p_dropped = p
    if DROPOUT:
        keep = dropout_keep(seed, offs_m[None, :], offs_n[:, None], plane, dropout_p)
        dropped = tl.where(keep, keep_scale, 0.0)  # a factor: NaN stays NaN where it is dropped
        p_dropped = p * dropped
        dp *= dropped
    p_dropped = p_dropped.to(do.dtype)
    ds = (p * (dp - delta[None, :])).to(q.dtype)  # [BLOCK_N, BLOCK_M]
    dv = tl.dot(p_dropped, do, dv, input_precision=PRECISION)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    if D_TAIL > 0:
        dv_tail = tl.dot(p_dropped, do_tail, dv_tail, input_precision=PRECISION)
        dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision=PRECISION)
    return dk, dk_tail, dv, dv_tail, ds


@triton.jit
def attention_bwd_store_dq(
    ds, k, k_tail, dq_ptr, start_m, n_q, stride_dqn, scale,
    HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of query rows ``start_m ... start_m + BLOCK_M`` where ``k`` holds every key."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)  # [BLOCK_M, D_MAIN]
    store_rows(dq_ptr, dq * scale, offs_m, n_q, stride_dqn, 0, D_MAIN, HEAD_DIM)
    if D_TAIL > 0:
        dq_tail = tl.dot(tl.trans(ds), k_tail, input_precision=PRECISION)
        store_rows(dq_ptr, dq_tail * scale, offs_m, n_q, stride_dqn, D_MAIN, D_TAIL, HEAD_DIM)


@triton.jit
def attention_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_vd,
    stride_dob,
    stride_don,
    stride_doh,
    stride_dod,
    stride_dqb,
    stride_dqn,
    stride_dqh,
    stride_dkb,
    stride_dkn,
    stride_dkh,
    stride_dvb,
    stride_dvn,
    stride_dvh,
    n_heads,
    n_q,
    n_k,
    scale,
    scale_log2e,
    dropout_p,
    keep_scale,
    HEAD_ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_M: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_N rows of dK and dV; with ``dq_ptr``, which is where BLOCK_N holds all keys, dQ too: the scores, their
    exponentials and dP are then computed once instead of twice."""
    pid_n, batch, head, plane = head_of_program(n_heads, tl.cdiv(n_k, BLOCK_N))
    q_ptr = head_ptr(q_ptr, batch, stride_qb, head, stride_qh, HEAD_ALIGN)
    k_ptr = head_ptr(k_ptr, batch, stride_kb, head, stride_kh, HEAD_ALIGN)
    v_ptr = head_ptr(v_ptr, batch, stride_vb, head, stride_vh, HEAD_ALIGN)
    do_ptr = head_ptr(do_ptr, batch, stride_dob, head, stride_doh, HEAD_ALIGN)
    if dq_ptr is not None:
        dq_ptr = head_ptr(dq_ptr, batch, stride_dqb, head, stride_dqh, HEAD_ALIGN)
    dk_ptr = head_ptr(dk_ptr, batch, stride_dkb, head, stride_dkh, HEAD_ALIGN)
    dv_ptr = head_ptr(dv_ptr, batch, stride_dvb, head, stride_dvh, HEAD_ALIGN)
    lse_ptr += plane.to(tl.int64) * n_q
    delta_ptr += plane.to(tl.int64) * n_q
    seed = tl.load(seed_ptr) if DROPOUT else 0

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, offs_n, n_k, stride_kn, stride_kd, 0, D_MAIN, HEAD_DIM, True)  # [BLOCK_N, D_MAIN]
    v = load_rows(v_ptr, offs_n, n_k, stride_vn, stride_vd, 0, D_MAIN, HEAD_DIM, True)  # [BLOCK_N, D_MAIN]
    k_tail = k
    v_tail = v
    if D_TAIL > 0:
        k_tail = load_rows(k_ptr, offs_n, n_k, stride_kn, stride_kd, D_MAIN, D_TAIL, HEAD_DIM, True)
        v_tail = load_rows(v_ptr, offs_n, n_k, stride_vn, stride_vd, D_MAIN, D_TAIL, HEAD_DIM, True)

    dk = tl.zeros([BLOCK_N, D_MAIN], tl.float32)
    dv = tl.zeros([BLOCK_N, D_MAIN], tl.float32)
    dk_tail = tl.zeros([BLOCK_N, D_TAIL if D_TAIL > 0 else 16], tl.float32)
    dv_tail = tl.zeros([BLOCK_N, D_TAIL if D_TAIL > 0 else 16], tl.float32)
    m_full = n_q // BLOCK_M * BLOCK_M
    for start_m in tl.range(0, m_full, BLOCK_M):
        dk, dk_tail, dv, dv_tail, ds = attention_bwd_dkdv_step(
            dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qn, stride_qd,
            stride_don, stride_dod, start_m, n_q, scale_log2e, seed, offs_n, plane, dropout_p, keep_scale,
            HEAD_DIM, D_MAIN, D_TAIL, BLOCK_M, False, DROPOUT, PRECISION,
        )  # fmt: skip
        if dq_ptr is not None:
            attention_bwd_store_dq(
                ds, k, k_tail, dq_ptr, start_m, n_q, stride_dqn, scale, HEAD_DIM, D_MAIN, D_TAIL, BLOCK_M, PRECISION
            )
    if TAIL_M > 0:
        dk, dk_tail, dv, dv_tail, ds = attention_bwd_dkdv_step(
            dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qn, stride_qd,
            stride_don, stride_dod, m_full, n_q, scale_log2e, seed, offs_n, plane, dropout_p, keep_scale,
            HEAD_DIM, D_MAIN, D_TAIL, TAIL_M, True, DROPOUT, PRECISION,
        )  # fmt: skip
        if dq_ptr is not None:
            attention_bwd_store_dq(
                ds, k, k_tail, dq_ptr, m_full, n_q, stride_dqn, scale, HEAD_DIM, D_MAIN, D_TAIL, TAIL_M, PRECISION
            )
    store_rows(dk_ptr, dk * scale, offs_n, n_k, stride_dkn, 0, D_MAIN, HEAD_DIM)
    store_rows(dv_ptr, dv, offs_n, n_k, stride_dvn, 0, D_MAIN, HEAD_DIM)
    if D_TAIL > 0:
        store_rows(dk_ptr, dk_tail * scale, offs_n, n_k, stride_dkn, D_MAIN, D_TAIL, HEAD_DIM)
        store_rows(dv_ptr, dv_tail, offs_n, n_k, stride_dvn, D_MAIN, D_TAIL, HEAD_DIM)


def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    seed: torch.Tensor | None,
    *,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`attention_fwd` by q, k and v, each contiguous; ``do`` and ``dlse`` with any strides."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    attention_bwd_into(dq, dk, dv, do, q, k, v, out, lse, dlse, seed, scale=scale, dropout_p=dropout_p)
    return dq, dk, dv


def attention_packed_bwd(
    do: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    seed: torch.Tensor | None,
    *,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """The same by a packed (B, N, 3, H, D) projection: the three gradients are written into one such tensor."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    q, k, v = qkv.unbind(2)
    dq, dk, dv = dqkv.unbind(2)
    attention_bwd_into(dq, dk, dv, do, q, k, v, out, lse, dlse, seed, scale=scale, dropout_p=dropout_p)
    return dqkv


def attention_bwd_into(dq, dk, dv, do, q, k, v, out, lse, dlse, seed, *, scale: float, dropout_p: float) -> None:
    """The same, written into dq, dk and dv, whose last strides are 1."""
    batch, n_q, n_heads, head_dim = q.shape
    n_k = k.shape[1]
    arch = architecture(q.device)
    d_main, d_tail = split_head_dim(head_dim, q.dtype, arch)
    do = side_by_side(do)

    delta = torch.empty_like(lse)
    block_d = d_main if d_tail == 0 else 2 * d_main
    block_m = max(1, 2048 // block_d) if arch != "interpreter" else 256
    launch(
        attention_bwd_delta_kernel,
        (cdiv(n_q, block_m) * batch * n_heads,),
        q,
        out_ptr=out,
        do_ptr=do,
        dlse_ptr=dlse,
        delta_ptr=delta,
        **strides("do", do),
        stride_dlseb=0 if dlse is None else dlse.stride(0),
        stride_dlseh=0 if dlse is None else dlse.stride(1),
        stride_dlsen=0 if dlse is None else dlse.stride(2),
        n_heads=n_heads,
        n_q=n_q,
        HEAD_ALIGN=_head_align(do),
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        HAS_DLSE=dlse is not None,
    )

    shared = dict(
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        do_ptr=do,
        lse_ptr=lse,
        delta_ptr=delta,
        seed_ptr=seed,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("do", do),
        n_heads=n_heads,
        n_q=n_q,
        n_k=n_k,
        scale=scale,
        scale_log2e=scale * LOG2E.value,
        dropout_p=dropout_p,
        keep_scale=keep_scale(dropout_p),
        HEAD_ALIGN=_head_align(q, k, v, do, dq, dk, dv),
        HEAD_DIM=head_dim,
        D_MAIN=d_main,
        D_TAIL=d_tail,
        DROPOUT=dropout_p > 0,
        PRECISION=input_precision(q.dtype, arch),
    )
    dq_strides = dict(stride_dqb=dq.stride(0), stride_dqn=dq.stride(1), stride_dqh=dq.stride(2))
    config = pick_attention_bwd_dq(n_q, n_k, head_dim, q.dtype, arch, dropout_p > 0)
    if config is not None:
        launch(
            attention_bwd_dq_kernel,
            (cdiv(n_q, config.block_m) * batch * n_heads,),
            q,
            dq_ptr=dq,
            **dq_strides,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            TAIL_N=attention_tail(n_k, config.block_n),
            **config.options,
            **shared,
        )
    with_dq = config is None
    config = pick_attention_bwd_dkdv(n_q, n_k, head_dim, q.dtype, arch, dropout_p > 0)
    launch(
        attention_bwd_dkdv_kernel,
        (cdiv(n_k, config.block_n) * batch * n_heads,),
        q,
        dq_ptr=dq if with_dq else None,
        dk_ptr=dk,
        dv_ptr=dv,
        **dq_strides,
        stride_dkb=dk.stride(0),
        stride_dkn=dk.stride(1),
        stride_dkh=dk.stride(2),
        stride_dvb=dv.stride(0),
        stride_dvn=dv.stride(1),
        stride_dvh=dv.stride(2),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TAIL_M=attention_tail(n_q, config.block_m),
        **config.options,
        **shared,
    )
