"""The backward pass of attention in windows; the maths is in :mod:`.windows`."""

import torch
import triton
import triton.language as tl

from vit_triton.arguments import NO_DROPOUT, Dropout
from vit_triton.kernels.attention.config import pick_window_bwd, pick_window_bwd_dkdv
from vit_triton.kernels.attention.windows import (
    SIZES,
    count_programs,
    count_windows,
    exponential,
    head_and_windows,
    load_bias,
    load_rows,
    normalise,
    normalise_grad,
    picker_arguments,
    shared_arguments,
    store_rows,
    token_rows,
    window_scores,
    window_tokens,
)
from vit_triton.kernels.launch import launch
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.sums.sum_parts import new_partials, sum_parts
from vit_triton.kernels.tiles import LOG2E, dropout_keep


@triton.jit(do_not_specialize=SIZES)
def window_attention_bwd_kernel(
    qkv_ptr, bias_ptr, logit_scale_ptr, seed_ptr, do_ptr, dqkv_ptr,
    dbias_partials_ptr, dlogit_scale_partials_ptr, lse_ptr, delta_ptr,
    n_heads, n_windows, height, width, shift_y, shift_x, group, scale, mask_log2e, dropout_p, keep_scale,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHIFTED: tl.constexpr, COSINE: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FLUSH: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M rows in a group of windows, and the sum of their dS as a partial of dbias (groups, heads, N, N). If
    the tile holds a window: dK and dV, else the log-sum-exp (base 2) and rowsum(P * dP) (windows, heads, N)."""
    WINDOW: tl.constexpr = (WINDOW_Y, WINDOW_X)
    N: tl.constexpr = WINDOW_Y * WINDOW_X
    N_BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    pid_m, head, which, first, end = head_and_windows(n_heads, n_windows, group, N_BLOCKS)
    sizes = height, width, shift_y, shift_x
    part = n_heads * HEAD_DIM  # from q to k, from k to v
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < N
    bias = load_bias(bias_ptr, head, offs_m, offs_n, N)
    if COSINE:
        scale = tl.load(logit_scale_ptr + head).to(tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dlogit_scale = tl.zeros([BLOCK_M], tl.float32)
    for window in range(first, end):
        tokens_m = window_tokens(window, sizes, offs_m, WINDOW, WIDE)
        tokens_n = window_tokens(window, sizes, offs_n, WINDOW, WIDE)
        q_rows = token_rows(qkv_ptr, window, head, sizes, tokens_m, 3 * part, WINDOW, HEAD_DIM)
        k_rows = token_rows(qkv_ptr + part, window, head, sizes, tokens_n, 3 * part, WINDOW, HEAD_DIM)
        do_rows = token_rows(do_ptr, window, head, sizes, tokens_m, part, WINDOW, HEAD_DIM)
        q = load_rows(q_rows, offs_m, N, HEAD_DIM, BLOCK_D)
        k = load_rows(k_rows, offs_n, N, HEAD_DIM, BLOCK_D)
        v = load_rows(k_rows + part, offs_n, N, HEAD_DIM, BLOCK_D)
        do = load_rows(do_rows, offs_m, N, HEAD_DIM, BLOCK_D)
        q_normalised, k_normalised = normalise(q, COSINE), normalise(k, COSINE)
        q, k = q_normalised[0], k_normalised[0]
        hidden = window >> 31  # 0: keeps the regions of all columns from staying in registers between windows
        scores = window_scores(
            q,
            k,
            bias,
            window,
            sizes,
            offs_m + hidden,
            offs_n + hidden,
            scale * LOG2E,
            mask_log2e,
            WINDOW,
            SHIFTED,
            PRECISION,
        )
        row_max = tl.max(scores, 1)
        p = exponential(scores - row_max[:, None], FLUSH)
        row_sum = tl.sum(p, 1)
        p = p * (1.0 / row_sum)[:, None]  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        plane = window * n_heads + head
        p_kept = p
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), offs_m, offs_n, plane, dropout_p)
            dp = tl.where(keep, dp * keep_scale, 0.0)
            p_kept = tl.where(keep, p * keep_scale, 0.0)
        if N_BLOCKS == 1:
            dv = tl.dot(tl.trans(p_kept.to(do.dtype)), do, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
            dk_rows = token_rows(dqkv_ptr + part, window, head, sizes, tokens_n, 3 * part, WINDOW, HEAD_DIM)
            store_rows(dk_rows + part, dv, offs_n, N, HEAD_DIM, BLOCK_D)
        delta = tl.sum(p * dp, 1)
        ds = p * (dp - delta[:, None])  # rows past N have dp = 0
        if dbias_partials_ptr is not None:
            dbias += ds
        ds = ds.to(k.dtype)
        dq, along = normalise_grad(tl.dot(ds, k, input_precision=PRECISION), q_normalised)
        if COSINE:
            dlogit_scale += along
        dq_rows = token_rows(dqkv_ptr, window, head, sizes, tokens_m, 3 * part, WINDOW, HEAD_DIM)
        store_rows(dq_rows, dq * scale, offs_m, N, HEAD_DIM, BLOCK_D)
        if N_BLOCKS == 1:
            dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
            store_rows(dk_rows, normalise_grad(dk, k_normalised)[0], offs_n, N, HEAD_DIM, BLOCK_D)
        else:
            stats = plane.to(tl.int64) * N + offs_m
            tl.store(lse_ptr + stats, row_max + tl.log2(row_sum), mask=mask_m)
            tl.store(delta_ptr + stats, delta, mask=mask_m)
    if dbias_partials_ptr is not None:
        partials = dbias_partials_ptr + (which.to(tl.int64) * n_heads + head) * (N * N)
        dbias = dbias.to(dbias_partials_ptr.dtype.element_ty)
        partial_ptrs = partials + (offs_m * N)[:, None] + offs_n[None, :]
        tl.store(partial_ptrs, dbias, mask=mask_m[:, None] & (offs_n < N)[None, :])
    if COSINE:
        total = tl.sum(dlogit_scale, 0).to(dlogit_scale_partials_ptr.dtype.element_ty)
        tl.store(dlogit_scale_partials_ptr + (which * N_BLOCKS + pid_m) * n_heads + head, total)


@triton.jit(do_not_specialize=SIZES)
def window_attention_bwd_dkdv_kernel(
    qkv_ptr, bias_ptr, logit_scale_ptr, seed_ptr, do_ptr, dqkv_ptr, lse_ptr, delta_ptr,
    n_heads, n_windows, height, width, shift_y, shift_x, group, scale, mask_log2e, dropout_p, keep_scale,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHIFTED: tl.constexpr, COSINE: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FLUSH: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N rows in a group of windows; the tile holds all BLOCK_M queries of a window."""
    WINDOW: tl.constexpr = (WINDOW_Y, WINDOW_X)
    N: tl.constexpr = WINDOW_Y * WINDOW_X
    pid_n, head, which, first, end = head_and_windows(n_heads, n_windows, group, (N + BLOCK_N - 1) // BLOCK_N)
    sizes = height, width, shift_y, shift_x
    part = n_heads * HEAD_DIM  # from q to k, from k to v
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < N
    bias = load_bias(bias_ptr, head, offs_m, offs_n, N)
    if COSINE:
        scale = tl.load(logit_scale_ptr + head).to(tl.float32)
    for window in range(first, end):
        tokens_m = window_tokens(window, sizes, offs_m, WINDOW, WIDE)
        tokens_n = window_tokens(window, sizes, offs_n, WINDOW, WIDE)
        q_rows = token_rows(qkv_ptr, window, head, sizes, tokens_m, 3 * part, WINDOW, HEAD_DIM)
        k_rows = token_rows(qkv_ptr + part, window, head, sizes, tokens_n, 3 * part, WINDOW, HEAD_DIM)
        do_rows = token_rows(do_ptr, window, head, sizes, tokens_m, part, WINDOW, HEAD_DIM)
        q = load_rows(q_rows, offs_m, N, HEAD_DIM, BLOCK_D)
        k = load_rows(k_rows, offs_n, N, HEAD_DIM, BLOCK_D)
        v = load_rows(k_rows + part, offs_n, N, HEAD_DIM, BLOCK_D)
        do = load_rows(do_rows, offs_m, N, HEAD_DIM, BLOCK_D)
        k_normalised = normalise(k, COSINE)
        q, k = normalise(q, COSINE)[0], k_normalised[0]
        plane = window * n_heads + head
        stats = plane.to(tl.int64) * N + offs_m
        lse = tl.load(lse_ptr + stats, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptr + stats, mask=mask_m, other=0.0)
        hidden = window >> 31  # as above
        scores = window_scores(
            q,
            k,
            bias,
            window,
            sizes,
            offs_m + hidden,
            offs_n + hidden,
            scale * LOG2E,
            mask_log2e,
            WINDOW,
            SHIFTED,
            PRECISION,
        )
        p = exponential(scores - lse[:, None], FLUSH)  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        p_kept = p
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), offs_m, offs_n, plane, dropout_p)
            dp = tl.where(keep, dp * keep_scale, 0.0)
            p_kept = tl.where(keep, p * keep_scale, 0.0)
        dv = tl.dot(tl.trans(p_kept.to(do.dtype)), do, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
        dk_rows = token_rows(dqkv_ptr + part, window, head, sizes, tokens_n, 3 * part, WINDOW, HEAD_DIM)
        store_rows(dk_rows + part, dv, offs_n, N, HEAD_DIM, BLOCK_D)
        ds = p * (dp - delta[:, None])  # rows past N have dp = delta = 0
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION) * scale
        store_rows(dk_rows, normalise_grad(dk, k_normalised)[0], offs_n, N, HEAD_DIM, BLOCK_D)


def window_attention_bwd(
    do: torch.Tensor,
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: torch.Tensor | None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int],
    mask_value: float,
    scale: float,
    dropout: Dropout = NO_DROPOUT,
    needs_bias: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of qkv, bias and logit_scale in their dtypes; None for a missing one and without ``needs_bias``."""
    do, qkv = do.contiguous(), qkv.contiguous()
    dqkv = torch.empty_like(qkv)
    n_tokens, n_heads, n_windows = window[0] * window[1], qkv.shape[4], count_windows(qkv, window)
    picked = picker_arguments(qkv, window, logit_scale is not None)
    config = pick_window_bwd(*picked)
    n_groups, n_blocks = cdiv(n_windows, config.group), cdiv(n_tokens, config.block_m)
    dbias = dlogit_scale = lse = delta = None
    if bias is not None and needs_bias:
        dbias = new_partials(qkv, n_groups, n_heads, n_tokens, n_tokens, dtype=bias.dtype)
    if logit_scale is not None:
        dlogit_scale = new_partials(qkv, n_groups * n_blocks, n_heads, dtype=logit_scale.dtype)
    if n_blocks > 1:
        lse, delta = qkv.new_empty(2, n_windows, n_heads, n_tokens, dtype=torch.float32).unbind(0)
    tensors = dict(do_ptr=do, dqkv_ptr=dqkv, lse_ptr=lse, delta_ptr=delta)
    options = qkv, bias, logit_scale, window, shift, mask_value, scale, dropout
    launch(
        window_attention_bwd_kernel,
        (count_programs(qkv, window, config.group, config.block_m),),
        qkv,
        **tensors,
        dbias_partials_ptr=dbias,
        dlogit_scale_partials_ptr=dlogit_scale,
        **shared_arguments(*options, config),
    )
    if n_blocks > 1:
        config = pick_window_bwd_dkdv(*picked)
        launch(
            window_attention_bwd_dkdv_kernel,
            (count_programs(qkv, window, config.group, config.block_n),),
            qkv,
            **tensors,
            **shared_arguments(*options, config),
        )
    return (
        dqkv,
        None if dbias is None or bias is None else sum_parts(dbias, bias.dtype),
        None if dlogit_scale is None or logit_scale is None else sum_parts(dlogit_scale, logit_scale.dtype),
    )
