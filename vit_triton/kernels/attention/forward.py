"""Multi-head attention in one pass over the keys, after FlashAttention-2 (Dao 2023, arXiv:2307.08691).

Forward, for one tile of query rows (algorithm 1): ``S = scale * Q K^T`` is computed one block of keys at a time. The
running maximum ``m`` and sum ``l`` of each row rescale the accumulator, so ``O = softmax(S) V`` is computed without
an N x N matrix. The backward pass saves ``O`` and the log-sum-exp ``L = m + log l``.

Backward (algorithm 2): ``P = exp(S - L)`` is recomputed; with ``D = rowsum(dO * O)``

    dV = P^T dO        dP = dO V^T        dS = P * (dP - D)        dQ = scale * dS K        dK = scale * dS^T Q

One kernel computes rows of dQ, another one rows of dK and dV. Each output is accumulated by a single program, so the
result is deterministic. The gradient of ``L``, which is a public output, enters as ``D - dL``.

Dropout zeroes elements of ``P`` after the row sums: ``O = (mask * P / keep) V`` and ``dP = mask / keep * (dO V^T)``;
``D`` is unchanged.

A head size between powers of two is covered by two tiles: 72 = 64 + 8, the latter padded to 16. A second product of
width 16 replaces padding to 128.
"""

import torch
import triton
import triton.language as tl

from vit_triton.arguments import NO_DROPOUT, NO_MASK, Dropout, ScoreMask
from vit_triton.kernels.attention.config import (
    attention_tail,
    pick_attention_fwd,
    pick_attention_fwd_bias,
    split_head_dim,
)
from vit_triton.kernels.attention.masking import (
    Sequences,
    head_bias,
    keys_of_rows,
    limit_keys,
    mask_arguments,
    mask_scores,
    power,
    sequence_arguments,
    sequence_of,
)
from vit_triton.kernels.attention.rows import (
    head_align,
    head_of_program,
    head_rows,
    load_main,
    load_tail,
    load_tile,
    scale_tile,
    store_tile,
    strides,
    zero_tile,
)
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import input_precision, launch
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.tiles import LN2, LOG2E, dropout_keep


@triton.jit
def attention_fwd_step(
    acc, row_max, row_sum, q, k_rows, v_rows, start_n, n_q, n_k, score_scale, offs_m, dropout, mask,
    DIMS: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, NEGATIVE_SCALE: tl.constexpr,
    FLOAT_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add keys ``start_n ... start_n + BLOCK_N`` to the running softmax; ``score_scale`` >= 0."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_main(k_rows, offs_n, n_k, DIMS, MASKED)  # [BLOCK_N, D_MAIN]
    scores = tl.dot(q[0], tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if DIMS[2] > 0:
        k_tail = load_tail(k_rows, offs_n, n_k, DIMS, MASKED)
        scores = tl.dot(q[1], tl.trans(k_tail), scores, input_precision=PRECISION)
    if NEGATIVE_SCALE:
        scores = -scores
    if mask is None:
        if MASKED:
            scores = tl.where((offs_n < n_k)[None, :], scores, float("-inf"))
        # the maximum is scaled once per row; scaling the scores inside the exponent is a fused multiply-add
        new_max = tl.maximum(row_max, tl.max(scores, 1) * score_scale)  # [BLOCK_M]
        # avoids -inf - -inf = NaN in rows whose scores are all -inf so far
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(scores * score_scale - shift[:, None])  # [BLOCK_M, BLOCK_N]
        if MASKED:
            p = tl.where((offs_n < n_k)[None, :], p, 0.0)  # -inf times a scale of 0 is NaN
    else:
        scores = mask_scores(scores, score_scale, mask, offs_m[:, None], offs_n[None, :], n_q, n_k, True, MASKED)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = power(scores - shift[:, None], FLOAT_BIAS)
    rescale = power(row_max - shift, FLOAT_BIAS)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    if dropout is not None:
        seed, off_bh, dropout_p, _ = dropout
        p = tl.where(dropout_keep(seed, offs_m, offs_n, off_bh, dropout_p), p, 0.0)

    v = load_main(v_rows, offs_n, n_k, DIMS, MASKED)  # [BLOCK_N, D_MAIN]
    p = p.to(v.dtype)
    acc = scale_tile(acc, rescale[:, None])
    main = tl.dot(p, v, acc[0], input_precision=PRECISION)
    if DIMS[2] > 0:
        # loading the tail before the product with the main tile takes more registers (benchmarks codegen)
        v_tail = load_tail(v_rows, offs_n, n_k, DIMS, MASKED)
        return (main, tl.dot(p, v_tail, acc[1], input_precision=PRECISION)), new_max, row_sum
    else:
        return (main,), new_max, row_sum


@triton.jit
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, max_ptr, log2_sum_ptr, seed_ptr, cu_q_ptr, cu_k_ptr, key_lengths_ptr,
    bias_ptr, rel_h_ptr, rel_w_ptr,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_biasb, stride_biash, stride_biasm, stride_biasn,
    stride_rel_hb, stride_rel_hh, stride_rel_hm, stride_rel_hn,
    stride_rel_wb, stride_rel_wh, stride_rel_wm, stride_rel_wn,
    n_heads, n_q, n_k, n_tokens, rel_width, score_scale, dropout_p, keep_scale,
    HEAD_ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, NEGATIVE_SCALE: tl.constexpr,
    FLOAT_BIAS: tl.constexpr, EMPTY_ROWS: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``score_scale`` is the absolute scale, times log2(e) unless FLOAT_BIAS. ``cu_q_ptr``: packed sequences of up to
    n_q rows and n_k keys."""
    DIMS: tl.constexpr = (HEAD_DIM, D_MAIN, D_TAIL)
    pid_m, batch, head, off_bh = head_of_program(n_heads, tl.cdiv(n_q, BLOCK_M))
    if cu_q_ptr is not None:
        first_q, n_q = sequence_of(cu_q_ptr, batch)
        first_k, n_k = sequence_of(cu_k_ptr, batch)
        q_ptr += first_q * stride_qn
        k_ptr += first_k * stride_kn
        v_ptr += first_k * stride_vn
    q_rows = head_rows(q_ptr, (stride_qb, stride_qn, stride_qh, stride_qd), batch, head, HEAD_ALIGN)
    k_rows = head_rows(k_ptr, (stride_kb, stride_kn, stride_kh, stride_kd), batch, head, HEAD_ALIGN)
    v_rows = head_rows(v_ptr, (stride_vb, stride_vn, stride_vh, stride_vd), batch, head, HEAD_ALIGN)
    first_out = batch * n_q if cu_q_ptr is None else first_q
    out_rows = (out_ptr + (first_out * n_heads + head) * HEAD_DIM, n_heads * HEAD_DIM, 1)
    dropout = (tl.load(seed_ptr), off_bh, dropout_p, keep_scale) if DROPOUT else None
    bias = head_bias(bias_ptr, (stride_biasb, stride_biash, stride_biasm, stride_biasn), batch, head)
    rel_h = head_bias(rel_h_ptr, (stride_rel_hb, stride_rel_hh, stride_rel_hm, stride_rel_hn), batch, head)
    rel_w = head_bias(rel_w_ptr, (stride_rel_wb, stride_rel_wh, stride_rel_wm, stride_rel_wn), batch, head)
    rel = () if rel_h_ptr is None else rel_h + rel_w + (rel_width,)
    mask = None if bias_ptr is None and rel_h_ptr is None else (bias, rel, ())

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_tile(q_rows, offs_m, n_q, DIMS, True)  # [BLOCK_M, D]
    acc = zero_tile(BLOCK_M, DIMS)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    n_keys = n_k if key_lengths_ptr is None else limit_keys(n_k, key_lengths_ptr, batch)
    if cu_q_ptr is not None:
        n_keys = tl.where(pid_m * BLOCK_M < n_q, n_keys, 0)  # no rows: the sequence is shorter than the longest
    if CAUSAL != "":
        diagonal, n_first, n_keys = keys_of_rows(pid_m * BLOCK_M, n_q, n_k, n_keys, CAUSAL, BLOCK_M)
        n_full = n_first // BLOCK_N * BLOCK_N
    else:
        n_full = n_keys // BLOCK_N * BLOCK_N
    edge_mask = (bias, rel, (diagonal,)) if CAUSAL != "" else mask
    for start_n in tl.range(0, n_full, BLOCK_N):
        acc, row_max, row_sum = attention_fwd_step(
            acc, row_max, row_sum, q, k_rows, v_rows, start_n, n_q, n_keys, score_scale, offs_m, dropout, mask,
            DIMS, BLOCK_N, False, NEGATIVE_SCALE, FLOAT_BIAS, PRECISION,
        )  # fmt: skip
    if CAUSAL != "" or key_lengths_ptr is not None or cu_q_ptr is not None:
        for start_n in tl.range(n_full, n_keys, BLOCK_N, num_stages=1):
            acc, row_max, row_sum = attention_fwd_step(
                acc, row_max, row_sum, q, k_rows, v_rows, start_n, n_q, n_keys, score_scale, offs_m, dropout,
                edge_mask, DIMS, BLOCK_N, True, NEGATIVE_SCALE, FLOAT_BIAS, PRECISION,
            )  # fmt: skip
    elif TAIL_N > 0:
        acc, row_max, row_sum = attention_fwd_step(
            acc, row_max, row_sum, q, k_rows, v_rows, n_full, n_q, n_keys, score_scale, offs_m, dropout, mask,
            DIMS, TAIL_N, True, NEGATIVE_SCALE, FLOAT_BIAS, PRECISION,
        )  # fmt: skip

    # one reciprocal per row instead of one division per element
    norm = 1.0 / row_sum
    if EMPTY_ROWS:
        norm = tl.where(row_sum == 0.0, 0.0, norm)
    if DROPOUT:
        norm *= keep_scale
    store_tile(out_rows, scale_tile(acc, norm[:, None]), offs_m, n_q, DIMS)
    if lse_ptr is not None:
        if FLOAT_BIAS:
            lse = row_max + tl.log2(row_sum) * LN2
        else:
            lse = (row_max + tl.log2(row_sum)) * LN2
        first_lse = off_bh.to(tl.int64) * n_q if cu_q_ptr is None else head * n_tokens + first_q
        tl.store(lse_ptr + first_lse + offs_m, lse, mask=offs_m < n_q)
        if max_ptr is not None:
            log2_sum = tl.where(row_sum == 0.0, 0.0, tl.log2(row_sum))
            tl.store(max_ptr + first_lse + offs_m, row_max, mask=offs_m < n_q)
            tl.store(log2_sum_ptr + first_lse + offs_m, log2_sum, mask=offs_m < n_q)


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    dropout: Dropout = NO_DROPOUT,
    mask: ScoreMask = NO_MASK,
    save: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(B, N_q, H, D), (B, N_k, H, D), (B, N_k, H, D), any strides -> out (B, N_q, H, D), contiguous, and with ``save``
    the log-sum-exp of the scores, float32 (B, H, N_q), and with a floating bias what the backward pass needs instead,
    float32 (2, B, H, N_q)."""
    batch, n_q, n_heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, n_heads, n_q, dtype=torch.float32, device=q.device) if save else None
    stats = None
    if save and mask.floating:
        stats = torch.empty(2, batch, n_heads, n_q, dtype=torch.float32, device=q.device)
    launch_attention_fwd(out, lse, stats, q, k, v, None, scale=scale, dropout=dropout, mask=mask)
    return out, lse, stats


def attention_varlen_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    causal: str = "",
    dropout: Dropout = NO_DROPOUT,
    save: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packed sequences q (total_q, H, D), k and v (total_k, H, D), any strides -> out (total_q, H, D), contiguous, and
    with ``save`` the log-sum-exp, float32 (H, total_q). ``cu_q``, ``cu_k``: first row of each sequence, and the end;
    int32."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device) if save else None
    sequences = Sequences(cu_q, cu_k, max_q, max_k)
    mask = ScoreMask(causal=causal)
    q, k, v = sequences.views(q, k, v)
    launch_attention_fwd(out, lse, None, q, k, v, sequences, scale=scale, dropout=dropout, mask=mask)
    return out, lse


def launch_attention_fwd(out, lse, stats, q, k, v, sequences, *, scale: float, dropout: Dropout, mask: ScoreMask):
    batch, n_q, n_heads, head_dim = q.shape
    n_k = k.shape[1]
    if sequences is not None:
        n_q, n_k = sequences.max_q, sequences.max_k
    target = target_of(q.device)
    masked = mask.empty_rows or sequences is not None
    if mask.biased:
        dropped = dropout.p > 0 or mask.rel is not None
        config = pick_attention_fwd_bias(batch * n_heads, n_q, n_k, head_dim, q.dtype, target, dropped)
    else:
        config = pick_attention_fwd(batch * n_heads, n_q, n_k, head_dim, q.dtype, target, dropout.p > 0 or masked)
    d_main, d_tail = split_head_dim(head_dim, q.dtype, target)
    launch(
        attention_fwd_kernel,
        (cdiv(n_q, config.block_m) * batch * n_heads,),
        q,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        lse_ptr=lse,
        max_ptr=None if stats is None else stats[0],
        log2_sum_ptr=None if stats is None else stats[1],
        seed_ptr=dropout.seed,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **sequence_arguments(sequences, q),
        **mask_arguments(mask, (batch, n_heads, n_q, n_k)),
        n_heads=n_heads,
        n_q=n_q,
        n_k=n_k,
        score_scale=abs(scale) * (1.0 if mask.floating else LOG2E.value),
        dropout_p=dropout.p,
        keep_scale=dropout.scale,
        HEAD_ALIGN=head_align(q, k, v),
        HEAD_DIM=head_dim,
        D_MAIN=d_main,
        D_TAIL=d_tail,
        NEGATIVE_SCALE=scale < 0,
        FLOAT_BIAS=mask.floating,
        EMPTY_ROWS=masked,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TAIL_N=attention_tail(n_k, config.block_n),
        DROPOUT=dropout.p > 0,
        PRECISION=input_precision(q.dtype, target),
        **config.options,
    )
