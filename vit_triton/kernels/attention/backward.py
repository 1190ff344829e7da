"""The backward pass of attention; the maths is in :mod:`.forward`."""

import torch
import triton
import triton.language as tl

from vit_triton.kernels.attention.config import (
    attention_tail,
    pick_attention_bwd_dkdv,
    pick_attention_bwd_dq,
    split_head_dim,
)
from vit_triton.kernels.attention.rows import head_align, head_of_program, head_ptr, load_rows, store_rows, strides
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import input_precision, keep_scale, launch, side_by_side
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.tiles import LOG2E, dropout_keep


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
    """Add what query rows ``start_m ... start_m + BLOCK_M`` give to dK (without ``scale``) and dV; tiles are
    transposed, dS, which is returned too, among them."""
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
    target = target_of(q.device)
    d_main, d_tail = split_head_dim(head_dim, q.dtype, target)
    do = side_by_side(do)

    delta = torch.empty_like(lse)
    block_d = d_main if d_tail == 0 else 2 * d_main
    block_m = max(1, 2048 // block_d) if target.family != "interpreter" else 256
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
        HEAD_ALIGN=head_align(do),
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
        HEAD_ALIGN=head_align(q, k, v, do, dq, dk, dv),
        HEAD_DIM=head_dim,
        D_MAIN=d_main,
        D_TAIL=d_tail,
        DROPOUT=dropout_p > 0,
        PRECISION=input_precision(q.dtype, target),
    )
    dq_strides = dict(stride_dqb=dq.stride(0), stride_dqn=dq.stride(1), stride_dqh=dq.stride(2))
    config = pick_attention_bwd_dq(n_q, n_k, head_dim, q.dtype, target, dropout_p > 0)
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
    config = pick_attention_bwd_dkdv(n_q, n_k, head_dim, q.dtype, target, dropout_p > 0)
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
