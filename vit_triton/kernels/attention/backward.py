"""The backward pass of attention; the maths is in :mod:`.forward`."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vit_triton.arguments import NO_DROPOUT, NO_MASK, Dropout, ScoreMask
from vit_triton.kernels.attention.backward_bias import attention_bwd_bias, attention_bwd_rel
from vit_triton.kernels.attention.config import (
    attention_tail,
    pick_attention_bwd_dkdv,
    pick_attention_bwd_dkdv_bias,
    pick_attention_bwd_dq,
    pick_attention_bwd_dq_bias,
    split_head_dim,
)
from vit_triton.kernels.attention.gradient import load_statistics, score_gradient, scores_and_dp
from vit_triton.kernels.attention.masking import (
    Sequences,
    head_bias,
    keys_of_rows,
    limit_keys,
    mask_arguments,
    mask_scores,
    sequence_arguments,
    sequence_of,
    softmax_of,
    without_empty,
)
from vit_triton.kernels.attention.rows import (
    add_dot,
    head_align,
    head_of_program,
    head_rows,
    load_columns,
    load_tile,
    scale_tile,
    store_tile,
    strides,
    zero_tile,
)
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import input_precision, launch, maybe_contiguous
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.sums.sum_parts import sum_parts
from vit_triton.kernels.tiles import LOG2E, dropout_keep

DBIAS_PROGRAMS = 32  # that compute dS at a time, each with a buffer of N_q * N_k elements


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
def attention_bwd_dq_step(
    dq, q, do, lse, log2_sum, delta, k_rows, v_rows, start_n, n_q, n_k, score_scale, offs_m, dropout, mask,
    DIMS: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of keys ``start_n ... start_n + BLOCK_N`` to dQ, not yet multiplied by ``scale``."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    ds, k = score_gradient(
        q, do, lse, log2_sum, delta, k_rows, v_rows, offs_n, n_q, n_k, score_scale, offs_m, dropout, mask,
        DIMS, MASKED, PRECISION,
    )  # fmt: skip
    return add_dot(dq, ds.to(k[0].dtype), k, PRECISION)


@triton.jit
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, log2_sum_ptr, delta_ptr, seed_ptr, cu_q_ptr, cu_k_ptr, key_lengths_ptr,
    bias_ptr, rel_h_ptr, rel_w_ptr, dq_ptr,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_dob, stride_don, stride_doh, stride_dod,
    stride_biasb, stride_biash, stride_biasm, stride_biasn,
    stride_rel_hb, stride_rel_hh, stride_rel_hm, stride_rel_hn,
    stride_rel_wb, stride_rel_wh, stride_rel_wm, stride_rel_wn,
    stride_dqb, stride_dqn, stride_dqh,
    n_heads, n_q, n_k, n_tokens, rel_width, scale, score_scale, dropout_p, keep_scale,
    HEAD_ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, EMPTY_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``log2_sum_ptr``: the bias is floating, ``lse_ptr`` contains the maxima, and ``score_scale`` is ``scale``;
    otherwise it is multiplied by log2(e)."""
    DIMS: tl.constexpr = (HEAD_DIM, D_MAIN, D_TAIL)
    pid_m, batch, head, off_bh = head_of_program(n_heads, tl.cdiv(n_q, BLOCK_M))
    if cu_q_ptr is not None:
        first_q, n_q = sequence_of(cu_q_ptr, batch)
        first_k, n_k = sequence_of(cu_k_ptr, batch)
        q_ptr += first_q * stride_qn
        k_ptr += first_k * stride_kn
        v_ptr += first_k * stride_vn
        do_ptr += first_q * stride_don
        dq_ptr += first_q * stride_dqn
    q_rows = head_rows(q_ptr, (stride_qb, stride_qn, stride_qh, stride_qd), batch, head, HEAD_ALIGN)
    k_rows = head_rows(k_ptr, (stride_kb, stride_kn, stride_kh, stride_kd), batch, head, HEAD_ALIGN)
    v_rows = head_rows(v_ptr, (stride_vb, stride_vn, stride_vh, stride_vd), batch, head, HEAD_ALIGN)
    do_rows = head_rows(do_ptr, (stride_dob, stride_don, stride_doh, stride_dod), batch, head, HEAD_ALIGN)
    dq_rows = head_rows(dq_ptr, (stride_dqb, stride_dqn, stride_dqh, 1), batch, head, HEAD_ALIGN)
    dropout = (tl.load(seed_ptr), off_bh, dropout_p, keep_scale) if DROPOUT else None
    bias = head_bias(bias_ptr, (stride_biasb, stride_biash, stride_biasm, stride_biasn), batch, head)
    rel_h = head_bias(rel_h_ptr, (stride_rel_hb, stride_rel_hh, stride_rel_hm, stride_rel_hn), batch, head)
    rel_w = head_bias(rel_w_ptr, (stride_rel_wb, stride_rel_wh, stride_rel_wm, stride_rel_wn), batch, head)
    rel = () if rel_h_ptr is None else rel_h + rel_w + (rel_width,)
    mask = None if bias_ptr is None and rel_h_ptr is None else (bias, rel, ())

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_q
    q = load_tile(q_rows, offs_m, n_q, DIMS, True)  # [BLOCK_M, D]
    do = load_tile(do_rows, offs_m, n_q, DIMS, True)  # [BLOCK_M, D]
    first_lse = off_bh.to(tl.int64) * n_q if cu_q_ptr is None else head * n_tokens + first_q
    lse, log2_sum, delta = load_statistics(
        lse_ptr, log2_sum_ptr, delta_ptr, first_lse + offs_m, mask_m, EMPTY_ROWS
    )  # fmt: skip
    sums = None if log2_sum_ptr is None else log2_sum

    dq = zero_tile(BLOCK_M, DIMS)
    n_keys = n_k if key_lengths_ptr is None else limit_keys(n_k, key_lengths_ptr, batch)
    if cu_q_ptr is not None:
        n_keys = tl.where(pid_m * BLOCK_M < n_q, n_keys, 0)
    if CAUSAL != "":
        diagonal, n_first, n_keys = keys_of_rows(pid_m * BLOCK_M, n_q, n_k, n_keys, CAUSAL, BLOCK_M)
        n_full = n_first // BLOCK_N * BLOCK_N
    else:
        n_full = n_keys // BLOCK_N * BLOCK_N
    edge_mask = (bias, rel, (diagonal,)) if CAUSAL != "" else mask
    for start_n in tl.range(0, n_full, BLOCK_N):
        dq = attention_bwd_dq_step(
            dq, q, do, lse, sums, delta, k_rows, v_rows, start_n, n_q, n_keys, score_scale, offs_m, dropout, mask,
            DIMS, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    if CAUSAL != "" or key_lengths_ptr is not None or cu_q_ptr is not None:
        for start_n in tl.range(n_full, n_keys, BLOCK_N, num_stages=1):
            dq = attention_bwd_dq_step(
                dq, q, do, lse, sums, delta, k_rows, v_rows, start_n, n_q, n_keys, score_scale, offs_m, dropout,
                edge_mask, DIMS, BLOCK_N, True, PRECISION,
            )  # fmt: skip
    elif TAIL_N > 0:
        dq = attention_bwd_dq_step(
            dq, q, do, lse, sums, delta, k_rows, v_rows, n_full, n_q, n_keys, score_scale, offs_m, dropout, mask,
            DIMS, TAIL_N, True, PRECISION,
        )  # fmt: skip
    store_tile(dq_rows, scale_tile(dq, scale), offs_m, n_q, DIMS)


@triton.jit
def attention_bwd_dkdv_step(
    sums, k, v, q_rows, do_rows, dq_rows, dbias, lse_ptr, log2_sum_ptr, delta_ptr, start_m, n_q, n_k, scale,
    score_scale, offs_n, dropout, mask,
    DIMS: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, ADD_DBIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of query rows ``start_m ... start_m + BLOCK_M`` to dK (without ``scale``) and dV; tiles are
    transposed. ``dq_rows``: store dQ of these rows too, which requires that ``k`` holds all keys. ``dbias``: (pointer,
    columns) to store dS of these rows, or to add it with ADD_DBIAS."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    if MASKED:
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < n_q, other=float("inf"))  # P = 0 in masked rows
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < n_q, other=0.0)
    else:
        lse = tl.load(lse_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)
    scores, dp, q, do = scores_and_dp(k, v, q_rows, do_rows, offs_m, n_q, DIMS, MASKED, PRECISION)
    if mask is None:
        p = tl.exp2(scores * score_scale - (lse * LOG2E)[None, :])
    else:
        lse = without_empty(lse)
        scores = mask_scores(scores, score_scale, mask, offs_m[None, :], offs_n[:, None], n_q, n_k, MASKED, True)
        if log2_sum_ptr is None:
            p = softmax_of(scores, (lse * LOG2E)[None, :], None)
        else:
            log2_sum = tl.load(log2_sum_ptr + offs_m, mask=offs_m < n_q, other=0.0)
            p = softmax_of(scores, lse[None, :], log2_sum[None, :])
    p_dropped = p
    if dropout is not None:
        seed, off_bh, dropout_p, keep_scale = dropout
        keep = dropout_keep(seed, offs_n, offs_m, off_bh, dropout_p, True)
        dropped = tl.where(keep, keep_scale, 0.0)  # a factor, so that dropped NaN stays NaN
        p_dropped = p * dropped
        dp *= dropped
    p_dropped = p_dropped.to(do[0].dtype)
    ds = p * (dp - delta[None, :])  # [BLOCK_N, BLOCK_M]
    if dbias is not None:
        ptrs = (dbias[0] + offs_m.to(tl.int64)[:, None] * dbias[1]) + offs_n[None, :]
        inside = (offs_m < n_q)[:, None] & (offs_n < dbias[1])[None, :]
        of_bias = tl.trans(ds)
        if ADD_DBIAS:
            of_bias += tl.load(ptrs, mask=inside, other=0.0)
        tl.store(ptrs, of_bias.to(dbias[0].dtype.element_ty), mask=inside)
    ds = ds.to(q[0].dtype)
    dv = add_dot(sums[1::2], p_dropped, do, PRECISION)
    dk = add_dot(sums[0::2], ds, q, PRECISION)
    if dq_rows is not None:
        dq = add_dot(zero_tile(BLOCK_M, DIMS), tl.trans(ds), k, PRECISION)
        store_tile(dq_rows, scale_tile(dq, scale), offs_m, n_q, DIMS)
    return dk[:1] + dv[:1] + dk[1:] + dv[1:]


@triton.jit
def attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, log2_sum_ptr, delta_ptr, seed_ptr, cu_q_ptr, cu_k_ptr, key_lengths_ptr,
    bias_ptr, rel_h_ptr, rel_w_ptr, dq_ptr, dk_ptr, dv_ptr, dbias_ptr,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_dob, stride_don, stride_doh, stride_dod,
    stride_biasb, stride_biash, stride_biasm, stride_biasn,
    stride_rel_hb, stride_rel_hh, stride_rel_hm, stride_rel_hn,
    stride_rel_wb, stride_rel_wh, stride_rel_wm, stride_rel_wn,
    stride_dqb, stride_dqn, stride_dqh,
    stride_dkb, stride_dkn, stride_dkh,
    stride_dvb, stride_dvn, stride_dvh,
    n_heads, n_q, n_k, n_tokens, rel_width, scale, score_scale, dropout_p, keep_scale,
    HEAD_ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_M: tl.constexpr, EMPTY_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, ADD_DBIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of dK and dV. ``dq_ptr``: dQ too, which requires that BLOCK_N covers all keys; the scores, their
    exponentials and dP are then computed once instead of twice. ``dbias_ptr``: dS too, (B, H, N_q, N_k), which requires
    the same; with ADD_DBIAS it is added to what is there."""
    DIMS: tl.constexpr = (HEAD_DIM, D_MAIN, D_TAIL)
    pid_n, batch, head, off_bh = head_of_program(n_heads, tl.cdiv(n_k, BLOCK_N))
    if cu_q_ptr is not None:
        first_q, n_q = sequence_of(cu_q_ptr, batch)
        first_k, n_k = sequence_of(cu_k_ptr, batch)
        q_ptr += first_q * stride_qn
        k_ptr += first_k * stride_kn
        v_ptr += first_k * stride_vn
        do_ptr += first_q * stride_don
        dk_ptr += first_k * stride_dkn
        dv_ptr += first_k * stride_dvn
    q_rows = head_rows(q_ptr, (stride_qb, stride_qn, stride_qh, stride_qd), batch, head, HEAD_ALIGN)
    k_rows = head_rows(k_ptr, (stride_kb, stride_kn, stride_kh, stride_kd), batch, head, HEAD_ALIGN)
    v_rows = head_rows(v_ptr, (stride_vb, stride_vn, stride_vh, stride_vd), batch, head, HEAD_ALIGN)
    do_rows = head_rows(do_ptr, (stride_dob, stride_don, stride_doh, stride_dod), batch, head, HEAD_ALIGN)
    dq_rows = None
    if dq_ptr is not None:
        if cu_q_ptr is not None:
            dq_ptr += first_q * stride_dqn
        dq_rows = head_rows(dq_ptr, (stride_dqb, stride_dqn, stride_dqh, 1), batch, head, HEAD_ALIGN)
    dbias = None if dbias_ptr is None else (dbias_ptr + off_bh.to(tl.int64) * n_q * n_k, n_k)
    dk_rows = head_rows(dk_ptr, (stride_dkb, stride_dkn, stride_dkh, 1), batch, head, HEAD_ALIGN)
    dv_rows = head_rows(dv_ptr, (stride_dvb, stride_dvn, stride_dvh, 1), batch, head, HEAD_ALIGN)
    first_lse = off_bh.to(tl.int64) * n_q if cu_q_ptr is None else head * n_tokens + first_q
    lse_ptr += first_lse
    if log2_sum_ptr is not None:
        log2_sum_ptr += first_lse
    delta_ptr += first_lse
    dropout = (tl.load(seed_ptr), off_bh, dropout_p, keep_scale) if DROPOUT else None
    bias = head_bias(bias_ptr, (stride_biasb, stride_biash, stride_biasm, stride_biasn), batch, head)
    rel_h = head_bias(rel_h_ptr, (stride_rel_hb, stride_rel_hh, stride_rel_hm, stride_rel_hn), batch, head)
    rel_w = head_bias(rel_w_ptr, (stride_rel_wb, stride_rel_wh, stride_rel_wm, stride_rel_wn), batch, head)
    rel = () if rel_h_ptr is None else rel_h + rel_w + (rel_width,)

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_tile(k_rows, offs_n, n_k, DIMS, True)  # [BLOCK_N, D]
    v = load_tile(v_rows, offs_n, n_k, DIMS, True)  # [BLOCK_N, D]
    zero = zero_tile(BLOCK_N, DIMS)
    # dK, dV and their tails in one tuple: two tuples take more registers on sm_90 (benchmarks codegen)
    sums = zero[:1] + zero[:1] + zero[1:] + zero[1:]
    n_keys = n_k if key_lengths_ptr is None else limit_keys(n_k, key_lengths_ptr, batch)
    first_m = 0
    n_rows = n_q
    if CAUSAL != "":
        diagonal, _, _ = keys_of_rows(0, n_q, n_k, n_keys, CAUSAL, BLOCK_M)
        if dq_ptr is None:
            first_m = tl.maximum(pid_n * BLOCK_N - diagonal, 0) // BLOCK_M * BLOCK_M
    mask = (bias, rel, (diagonal,)) if CAUSAL != "" else (bias, rel, ()) if EMPTY_ROWS else None
    if EMPTY_ROWS and dq_ptr is None:
        n_rows = tl.where(pid_n * BLOCK_N < n_keys, n_q, 0)
    if CAUSAL == "":
        m_full = n_rows // BLOCK_M * BLOCK_M
        for start_m in tl.range(0, m_full, BLOCK_M):
            sums = attention_bwd_dkdv_step(
                sums, k, v, q_rows, do_rows, dq_rows, dbias, lse_ptr, log2_sum_ptr, delta_ptr, start_m, n_q, n_keys,
                scale, score_scale, offs_n, dropout, mask, DIMS, BLOCK_M, False, ADD_DBIAS, PRECISION,
            )  # fmt: skip
        first_m = m_full
    if CAUSAL != "" or cu_q_ptr is not None:
        for start_m in tl.range(first_m, n_rows, BLOCK_M):
            sums = attention_bwd_dkdv_step(
                sums, k, v, q_rows, do_rows, dq_rows, dbias, lse_ptr, log2_sum_ptr, delta_ptr, start_m, n_q, n_keys,
                scale, score_scale, offs_n, dropout, mask, DIMS, BLOCK_M, True, ADD_DBIAS, PRECISION,
            )  # fmt: skip
    elif TAIL_M > 0:
        sums = attention_bwd_dkdv_step(
            sums, k, v, q_rows, do_rows, dq_rows, dbias, lse_ptr, log2_sum_ptr, delta_ptr, first_m, n_q, n_keys,
            scale, score_scale, offs_n, dropout, mask, DIMS, TAIL_M, True, ADD_DBIAS, PRECISION,
        )  # fmt: skip
    store_tile(dk_rows, scale_tile(sums[0::2], scale), offs_n, n_k, DIMS)
    store_tile(dv_rows, sums[1::2], offs_n, n_k, DIMS)


class BiasGradients(NamedTuple):
    """Gradients of the tensors of a :class:`ScoreMask`; None if there is no such tensor or none is wanted."""

    bias: torch.Tensor | None = None
    rel_h: torch.Tensor | None = None
    rel_w: torch.Tensor | None = None


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


def attention_varlen_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    causal: str = "",
    dropout: Dropout = NO_DROPOUT,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous gradients of :func:`attention_varlen_fwd` for q, k and v."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    do = maybe_contiguous(do)
    delta = attention_bwd_delta(out[None], do[None], None if dlse is None else dlse[None])
    sequences = Sequences(cu_q, cu_k, max_q, max_k)
    operands = sequences.views(do, q, k, v)
    grads = sequences.views(dq, dk, dv)
    mask = ScoreMask(causal=causal)
    launch_attention_bwd(grads, operands, lse, None, delta, sequences, None, scale=scale, dropout=dropout, mask=mask)
    return dq, dk, dv


def attention_bwd_into(
    dq, dk, dv, do, q, k, v, out, lse, dlse,
    *, scale: float, dropout: Dropout, mask: ScoreMask = NO_MASK, needs_bias: bool = False,
) -> BiasGradients:  # fmt: skip
    """:func:`attention_bwd`, written into dq, dk and dv, whose last strides are 1. ``lse``: with a floating bias, what
    :func:`attention_fwd` saves instead."""
    do = maybe_contiguous(do)
    delta = attention_bwd_delta(out, do, dlse)
    lse, log2_sum = lse.unbind(0) if mask.floating else (lse, None)
    bias = mask.bias if needs_bias and mask.floating else None
    # dropout draws by the index of the sample, which launches for a part of the batch do not have
    partials = None if bias is None or dropout.p > 0 else partial_dbias(q, k, bias)
    arguments = launch_attention_bwd(
        [dq, dk, dv], [do, q, k, v], lse, log2_sum, delta, None, partials, scale=scale, dropout=dropout, mask=mask
    )
    if needs_bias and mask.rel is not None:
        return BiasGradients(None, *attention_bwd_rel(arguments, mask.rel))
    if bias is None:
        return BiasGradients()
    if partials is not None:
        return BiasGradients(sum_parts(partials, bias.dtype)[None])
    return BiasGradients(attention_bwd_bias(arguments, bias))


def partial_dbias(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor | None:
    """Buffers (samples, H, N_q, N_k) for dS of a few samples at a time, if the kernel of dK and dV can compute the
    gradient of the bias: on a CPU, where it computes dQ too, and if the bias is broadcast over the batch only."""
    (batch, n_q, n_heads, head_dim), n_k = q.shape, k.shape[1]
    target = target_of(q.device)
    if batch == 0 or bias.shape != (1, n_heads, n_q, n_k):
        return None
    if pick_attention_bwd_dq_bias(n_q, n_k, head_dim, q.dtype, target, False) is not None:
        return None
    samples = min(batch, max(1, DBIAS_PROGRAMS // n_heads))
    dtype = bias.dtype if batch == 1 else torch.float32
    return torch.empty(samples, n_heads, n_q, n_k, dtype=dtype, device=q.device)


def attention_bwd_delta(out: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor | None) -> torch.Tensor:
    """delta of the backward kernels, float32 (B, H, N_q); the last stride of ``do`` is 1."""
    batch, n_q, n_heads, head_dim = out.shape
    target = target_of(out.device)
    d_main, d_tail = split_head_dim(head_dim, out.dtype, target)
    delta = torch.empty(batch, n_heads, n_q, dtype=torch.float32, device=out.device)
    block_d = d_main if d_tail == 0 else 2 * d_main
    block_m = max(1, 2048 // block_d) if target.family != "interpreter" else 256
    launch(
        attention_bwd_delta_kernel,
        (cdiv(n_q, block_m) * batch * n_heads,),
        out,
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
    return delta


def launch_attention_bwd(
    grads: list[torch.Tensor],
    operands: list[torch.Tensor],
    lse: torch.Tensor,
    log2_sum: torch.Tensor | None,
    delta: torch.Tensor,
    sequences: Sequences | None,
    dbias: torch.Tensor | None,
    *,
    scale: float,
    dropout: Dropout,
    mask: ScoreMask,
) -> dict[str, Any]:
    """Launch the kernels that compute ``grads`` (dq, dk, dv) from ``operands`` (do, q, k, v), and ``dbias``, see
    :func:`partial_dbias`. Return the arguments that the kernels of a bias's gradient share with them."""
    (dq, dk, dv), (do, q, k, v) = grads, operands
    batch, n_q, n_heads, head_dim = q.shape
    n_k = k.shape[1]
    if sequences is not None:
        n_q, n_k = sequences.max_q, sequences.max_k
    target = target_of(q.device)
    d_main, d_tail = split_head_dim(head_dim, q.dtype, target)
    arguments: dict[str, Any] = dict(
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        do_ptr=do,
        lse_ptr=lse,
        log2_sum_ptr=log2_sum,
        delta_ptr=delta,
        seed_ptr=dropout.seed,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("do", do),
        **mask_arguments(mask, (batch, n_heads, n_q, n_k)),
        n_heads=n_heads,
        n_q=n_q,
        n_k=n_k,
        score_scale=scale * (1.0 if mask.floating else LOG2E.value),
        dropout_p=dropout.p,
        keep_scale=dropout.scale,
        HEAD_ALIGN=head_align(q, k, v, do, dq, dk, dv),
        HEAD_DIM=head_dim,
        D_MAIN=d_main,
        D_TAIL=d_tail,
        DROPOUT=dropout.p > 0,
        PRECISION=input_precision(q.dtype, target),
    )
    shared = arguments | sequence_arguments(sequences, q)
    shared |= dict(scale=scale, EMPTY_ROWS=mask.empty_rows or sequences is not None)
    dq_strides = dict(stride_dqb=dq.stride(0), stride_dqn=dq.stride(1), stride_dqh=dq.stride(2))
    pick_dq = pick_attention_bwd_dq_bias if mask.biased else pick_attention_bwd_dq
    dropped = dropout.p > 0 or mask.rel is not None
    config = pick_dq(n_q, n_k, head_dim, q.dtype, target, dropped)
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
    pick_dkdv = pick_attention_bwd_dkdv_bias if mask.biased else pick_attention_bwd_dkdv
    config = pick_dkdv(n_q, n_k, head_dim, q.dtype, target, dropped)
    of_batch = shared | dict(dq_ptr=dq if with_dq else None, dk_ptr=dk, dv_ptr=dv)
    samples = batch if dbias is None else dbias.shape[0]
    for first in range(0, max(1, batch), max(1, samples)):
        rows = slice(first, first + samples)
        of_rows = of_batch
        if samples < batch:
            of_rows = {name: x[rows] if isinstance(x, torch.Tensor) else x for name, x in of_batch.items()}
        launch(
            attention_bwd_dkdv_kernel,
            (cdiv(n_k, config.block_n) * min(samples, batch - first) * n_heads,),
            q,
            dbias_ptr=dbias,
            ADD_DBIAS=first > 0,
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
            **of_rows,
        )
    return arguments
