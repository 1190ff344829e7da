"""The backward pass of attention; the maths is in :mod:`.forward`."""

import torch
import triton
import triton.language as tl

from vit_triton.arguments import NO_DROPOUT, Dropout
from vit_triton.kernels.attention.config import (
    attention_tail,
    pick_attention_bwd_dkdv,
    pick_attention_bwd_dq,
    split_head_dim,
)
from vit_triton.kernels.attention.rows import (
    add_dot,
    head_align,
    head_of_program,
    head_rows,
    load_columns,
    load_main,
    load_tail,
    load_tile,
    scale_tile,
    store_tile,
    strides,
    zero_tile,
)
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import input_precision, launch, maybe_contiguous
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.tiles import LOG2E, dropout_keep


@triton.jit
def attention_bwd_delta_kernel(
    out_ptr, do_ptr, dlse_ptr, delta_ptr,
    stride_dob, stride_don, stride_doh, stride_dod, stride_dlseb, stride_dlseh, stride_dlsen,
    n_heads, n_q,
    HEAD_ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dL, float32 (B, H, N_q)."""
    pid_m, batch, head, off_bh = head_of_program(n_heads, tl.cdiv(n_q, BLOCK_M))
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_q
    out_rows = (out_ptr + (batch * n_q * n_heads + head) * HEAD_DIM, n_heads * HEAD_DIM, 1)
    do_rows = head_rows(do_ptr, (stride_dob, stride_don, stride_doh, stride_dod), batch, head, HEAD_ALIGN)
    out = load_columns(out_rows, offs_m, n_q, 0, BLOCK_D, HEAD_DIM, True)  # [BLOCK_M, BLOCK_D]
    do = load_columns(do_rows, offs_m, n_q, 0, BLOCK_D, HEAD_DIM, True)  # [BLOCK_M, BLOCK_D]
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        dlse_ptr += batch * stride_dlseb + head * stride_dlseh
        delta -= tl.load(dlse_ptr + offs_m.to(tl.int64) * stride_dlsen, mask=mask_m, other=0.0)
    tl.store(delta_ptr + off_bh.to(tl.int64) * n_q + offs_m, delta, mask=mask_m)


@triton.jit
def scores_and_dp(
    a, b, c_rows, d_rows, offs_n, n_rows, DIMS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """(a @ c.T, b @ d.T, c, d) with tiles c and d of ``c_rows`` and ``d_rows``. Tails come after the products of the
    main tiles: other orders take more registers on some architectures (benchmarks codegen)."""
    c = load_main(c_rows, offs_n, n_rows, DIMS, MASKED)  # [BLOCK_N, D_MAIN]
    d = load_main(d_rows, offs_n, n_rows, DIMS, MASKED)  # [BLOCK_N, D_MAIN]
    scores = tl.dot(a[0], tl.trans(c), input_precision=PRECISION)
    dp = tl.dot(b[0], tl.trans(d), input_precision=PRECISION)
    if DIMS[2] > 0:
        c_tail = load_tail(c_rows, offs_n, n_rows, DIMS, MASKED)
        d_tail = load_tail(d_rows, offs_n, n_rows, DIMS, MASKED)
        scores = tl.dot(a[1], tl.trans(c_tail), scores, input_precision=PRECISION)
        dp = tl.dot(b[1], tl.trans(d_tail), dp, input_precision=PRECISION)
        return scores, dp, (c, c_tail), (d, d_tail)
    else:
        return scores, dp, (c,), (d,)


@triton.jit
def attention_bwd_dq_step(
    dq, q, do, lse_log2e, delta, k_rows, v_rows, start_n, n_k, scale_log2e, offs_m, dropout,
    DIMS: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of keys ``start_n ... start_n + BLOCK_N`` to dQ, not yet multiplied by ``scale``."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    scores, dp, k, v = scores_and_dp(q, do, k_rows, v_rows, offs_n, n_k, DIMS, MASKED, PRECISION)
    p = tl.exp2(scores * scale_log2e - lse_log2e[:, None])
    if MASKED:
        p = tl.where((offs_n < n_k)[None, :], p, 0.0)  # exp(0 - L) of a masked column may be inf
    if dropout is not None:
        seed, off_bh, dropout_p, keep_scale = dropout
        keep = dropout_keep(seed, offs_m[:, None], offs_n[None, :], off_bh, dropout_p)
        dp = tl.where(keep, dp * keep_scale, 0.0)  # NaN in dp is NaN in delta too
    ds = (p * (dp - delta[:, None])).to(k[0].dtype)  # [BLOCK_M, BLOCK_N]
    return add_dot(dq, ds, k, PRECISION)


@triton.jit
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, seed_ptr, dq_ptr,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_dob, stride_don, stride_doh, stride_dod,
    stride_dqb, stride_dqn, stride_dqh,
    n_heads, n_q, n_k, scale, scale_log2e, dropout_p, keep_scale,
    HEAD_ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DIMS: tl.constexpr = (HEAD_DIM, D_MAIN, D_TAIL)
    pid_m, batch, head, off_bh = head_of_program(n_heads, tl.cdiv(n_q, BLOCK_M))
    q_rows = head_rows(q_ptr, (stride_qb, stride_qn, stride_qh, stride_qd), batch, head, HEAD_ALIGN)
    k_rows = head_rows(k_ptr, (stride_kb, stride_kn, stride_kh, stride_kd), batch, head, HEAD_ALIGN)
    v_rows = head_rows(v_ptr, (stride_vb, stride_vn, stride_vh, stride_vd), batch, head, HEAD_ALIGN)
    do_rows = head_rows(do_ptr, (stride_dob, stride_don, stride_doh, stride_dod), batch, head, HEAD_ALIGN)
    dq_rows = head_rows(dq_ptr, (stride_dqb, stride_dqn, stride_dqh, 1), batch, head, HEAD_ALIGN)
    dropout = (tl.load(seed_ptr), off_bh, dropout_p, keep_scale) if DROPOUT else None

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_q
    q = load_tile(q_rows, offs_m, n_q, DIMS, True)  # [BLOCK_M, D]
    do = load_tile(do_rows, offs_m, n_q, DIMS, True)  # [BLOCK_M, D]
    stats = off_bh.to(tl.int64) * n_q + offs_m
    lse_log2e = tl.load(lse_ptr + stats, mask=mask_m, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + stats, mask=mask_m, other=0.0)

    dq = zero_tile(BLOCK_M, DIMS)
    n_full = n_k // BLOCK_N * BLOCK_N
    for start_n in tl.range(0, n_full, BLOCK_N):
        dq = attention_bwd_dq_step(
            dq, q, do, lse_log2e, delta, k_rows, v_rows, start_n, n_k, scale_log2e, offs_m, dropout,
            DIMS, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    if TAIL_N > 0:
        dq = attention_bwd_dq_step(
            dq, q, do, lse_log2e, delta, k_rows, v_rows, n_full, n_k, scale_log2e, offs_m, dropout,
            DIMS, TAIL_N, True, PRECISION,
        )  # fmt: skip
    store_tile(dq_rows, scale_tile(dq, scale), offs_m, n_q, DIMS)


@triton.jit
def attention_bwd_dkdv_step(
    sums, k, v, q_rows, do_rows, dq_rows, lse_ptr, delta_ptr, start_m, n_q, scale, scale_log2e, offs_n, dropout,
    DIMS: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of query rows ``start_m ... start_m + BLOCK_M`` to dK (without ``scale``) and dV; tiles are
    transposed. ``dq_rows``: store dQ of these rows too, which requires that ``k`` holds all keys."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    if MASKED:
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < n_q, other=float("inf"))  # P = 0 in masked rows
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < n_q, other=0.0)
    else:
        lse = tl.load(lse_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)
    scores, dp, q, do = scores_and_dp(k, v, q_rows, do_rows, offs_m, n_q, DIMS, MASKED, PRECISION)
    p = tl.exp2(scores * scale_log2e - (lse * LOG2E)[None, :])
    p_dropped = p
    if dropout is not None:
        seed, off_bh, dropout_p, keep_scale = dropout
        keep = dropout_keep(seed, offs_m[None, :], offs_n[:, None], off_bh, dropout_p)
        dropped = tl.where(keep, keep_scale, 0.0)  # a factor, so that dropped NaN stays NaN
        p_dropped = p * dropped
        dp *= dropped
    p_dropped = p_dropped.to(do[0].dtype)
    ds = (p * (dp - delta[None, :])).to(q[0].dtype)  # [BLOCK_N, BLOCK_M]
    dv = add_dot(sums[1::2], p_dropped, do, PRECISION)
    dk = add_dot(sums[0::2], ds, q, PRECISION)
    if dq_rows is not None:
        dq = add_dot(zero_tile(BLOCK_M, DIMS), tl.trans(ds), k, PRECISION)
        store_tile(dq_rows, scale_tile(dq, scale), offs_m, n_q, DIMS)
    return dk[:1] + dv[:1] + dk[1:] + dv[1:]


@triton.jit
def attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, seed_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_dob, stride_don, stride_doh, stride_dod,
    stride_dqb, stride_dqn, stride_dqh,
    stride_dkb, stride_dkn, stride_dkh,
    stride_dvb, stride_dvn, stride_dvh,
    n_heads, n_q, n_k, scale, scale_log2e, dropout_p, keep_scale,
    HEAD_ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_M: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of dK and dV. ``dq_ptr``: dQ too, which requires that BLOCK_N covers all keys; the scores, their
    exponentials and dP are then computed once instead of twice."""
    DIMS: tl.constexpr = (HEAD_DIM, D_MAIN, D_TAIL)
    pid_n, batch, head, off_bh = head_of_program(n_heads, tl.cdiv(n_k, BLOCK_N))
    q_rows = head_rows(q_ptr, (stride_qb, stride_qn, stride_qh, stride_qd), batch, head, HEAD_ALIGN)
    k_rows = head_rows(k_ptr, (stride_kb, stride_kn, stride_kh, stride_kd), batch, head, HEAD_ALIGN)
    v_rows = head_rows(v_ptr, (stride_vb, stride_vn, stride_vh, stride_vd), batch, head, HEAD_ALIGN)
    do_rows = head_rows(do_ptr, (stride_dob, stride_don, stride_doh, stride_dod), batch, head, HEAD_ALIGN)
    dq_rows = None
    if dq_ptr is not None:
        dq_rows = head_rows(dq_ptr, (stride_dqb, stride_dqn, stride_dqh, 1), batch, head, HEAD_ALIGN)
    dk_rows = head_rows(dk_ptr, (stride_dkb, stride_dkn, stride_dkh, 1), batch, head, HEAD_ALIGN)
    dv_rows = head_rows(dv_ptr, (stride_dvb, stride_dvn, stride_dvh, 1), batch, head, HEAD_ALIGN)
    lse_ptr += off_bh.to(tl.int64) * n_q
    delta_ptr += off_bh.to(tl.int64) * n_q
    dropout = (tl.load(seed_ptr), off_bh, dropout_p, keep_scale) if DROPOUT else None

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_tile(k_rows, offs_n, n_k, DIMS, True)  # [BLOCK_N, D]
    v = load_tile(v_rows, offs_n, n_k, DIMS, True)  # [BLOCK_N, D]
    zero = zero_tile(BLOCK_N, DIMS)
    # dK, dV and their tails in one tuple: two tuples take more registers on sm_90 (benchmarks codegen)
    sums = zero[:1] + zero[:1] + zero[1:] + zero[1:]
    m_full = n_q // BLOCK_M * BLOCK_M
    for start_m in tl.range(0, m_full, BLOCK_M):
        sums = attention_bwd_dkdv_step(
            sums, k, v, q_rows, do_rows, dq_rows, lse_ptr, delta_ptr, start_m, n_q, scale, scale_log2e, offs_n,
            dropout, DIMS, BLOCK_M, False, PRECISION,
        )  # fmt: skip
    if TAIL_M > 0:
        sums = attention_bwd_dkdv_step(
            sums, k, v, q_rows, do_rows, dq_rows, lse_ptr, delta_ptr, m_full, n_q, scale, scale_log2e, offs_n,
            dropout, DIMS, TAIL_M, True, PRECISION,
        )  # fmt: skip
    store_tile(dk_rows, scale_tile(sums[0::2], scale), offs_n, n_k, DIMS)
    store_tile(dv_rows, sums[1::2], offs_n, n_k, DIMS)


def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    *,
    scale: float,
    dropout: Dropout = NO_DROPOUT,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous gradients of :func:`attention_fwd` for q, k and v; ``do`` and ``dlse`` have any strides."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    attention_bwd_into(dq, dk, dv, do, q, k, v, out, lse, dlse, scale=scale, dropout=dropout)
    return dq, dk, dv


def attention_packed_bwd(
    do: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    *,
    scale: float,
    dropout: Dropout = NO_DROPOUT,
) -> torch.Tensor:
    """:func:`attention_bwd` for a packed (B, N, 3, H, D) projection; the result is packed in the same way."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    q, k, v = qkv.unbind(2)
    dq, dk, dv = dqkv.unbind(2)
    attention_bwd_into(dq, dk, dv, do, q, k, v, out, lse, dlse, scale=scale, dropout=dropout)
    return dqkv


def attention_bwd_into(dq, dk, dv, do, q, k, v, out, lse, dlse, *, scale: float, dropout: Dropout) -> None:
    """:func:`attention_bwd`, written into dq, dk and dv, whose last strides are 1."""
    batch, n_q, n_heads, head_dim = q.shape
    n_k = k.shape[1]
    target = target_of(q.device)
    d_main, d_tail = split_head_dim(head_dim, q.dtype, target)
    do = maybe_contiguous(do)

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
        seed_ptr=dropout.seed,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("do", do),
        n_heads=n_heads,
        n_q=n_q,
        n_k=n_k,
        scale=scale,
        scale_log2e=scale * LOG2E.value,
        dropout_p=dropout.p,
        keep_scale=dropout.scale,
        HEAD_ALIGN=head_align(q, k, v, do, dq, dk, dv),
        HEAD_DIM=head_dim,
        D_MAIN=d_main,
        D_TAIL=d_tail,
        DROPOUT=dropout.p > 0,
        PRECISION=input_precision(q.dtype, target),
    )
    dq_strides = dict(stride_dqb=dq.stride(0), stride_dqn=dq.stride(1), stride_dqh=dq.stride(2))
    config = pick_attention_bwd_dq(n_q, n_k, head_dim, q.dtype, target, dropout.p > 0)
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
    config = pick_attention_bwd_dkdv(n_q, n_k, head_dim, q.dtype, target, dropout.p > 0)
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
