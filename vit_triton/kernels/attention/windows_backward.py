"""The backward pass of attention in windows; the maths is in :mod:`.windows`."""

import torch
import triton
import triton.language as tl

from vit_triton.arguments import NO_DROPOUT, Dropout
from vit_triton.kernels.attention.config import pick_window_bwd, pick_window_bwd_dkdv
from vit_triton.kernels.attention.windows import (
    SIZES,
    count_windows,
    head_and_windows,
    load_bias,
    load_rows,
    normalise,
    normalise_grad,
    programs,
    shared_arguments,
    store_rows,
    strides,
    window_rows,
    window_scores,
)
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import contiguous, launch, maybe_contiguous
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.sums.sum_parts import new_partials, sum_parts
from vit_triton.kernels.tiles import LOG2E, dropout_keep


@triton.jit(do_not_specialize=SIZES)
def window_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, logit_scale_ptr, seed_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,
    dbias_partials_ptr, dlogit_scale_partials_ptr, lse_ptr, delta_ptr,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_ob, stride_oy, stride_ox, stride_oh,
    stride_gb, stride_gy, stride_gx, stride_gh,
    n_heads, n_windows, n_wy, n_wx, height, width, shift_y, shift_x, group, scale, mask_log2e, dropout_p, keep_scale,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOLD: tl.constexpr, SHIFTED: tl.constexpr, COSINE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M rows in a group of windows, and the sum of their dS as a partial of dbias (groups, heads, N, N). If
    the tile holds a window: dK and dV, else the log-sum-exp (base 2) and rowsum(P * dP) (windows, heads, N)."""
    WINDOW: tl.constexpr = (WINDOW_Y, WINDOW_X)
    N: tl.constexpr = WINDOW_Y * WINDOW_X
    N_BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    pid_m, head, which, first, end = head_and_windows(n_heads, n_windows, group, N_BLOCKS)
    sizes = n_wy, n_wx, height, width, shift_y, shift_x
    in_strides = stride_qb, stride_qy, stride_qx, stride_qh
    grad_strides = stride_gb, stride_gy, stride_gx, stride_gh
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < N
    if HOLD:
        bias = load_bias(bias_ptr, head, offs_m, offs_n, N)
    if COSINE:
        scale = tl.load(logit_scale_ptr + head).to(tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dlogit_scale = tl.zeros([BLOCK_M], tl.float32)
    for window in range(first, end):
        q = load_rows(window_rows(q_ptr, in_strides, window, head, sizes, offs_m, WINDOW), offs_m, N, HEAD_DIM, BLOCK_D)
        k = load_rows(window_rows(k_ptr, in_strides, window, head, sizes, offs_n, WINDOW), offs_n, N, HEAD_DIM, BLOCK_D)
        v = load_rows(window_rows(v_ptr, in_strides, window, head, sizes, offs_n, WINDOW), offs_n, N, HEAD_DIM, BLOCK_D)
        do_rows = window_rows(do_ptr, (stride_ob, stride_oy, stride_ox, stride_oh), window, head, sizes, offs_m, WINDOW)
        do = load_rows(do_rows, offs_m, N, HEAD_DIM, BLOCK_D)
        q_normalised, k_normalised = normalise(q, COSINE), normalise(k, COSINE)
        q, k = q_normalised[0], k_normalised[0]
        if not HOLD:
            bias = load_bias(bias_ptr, head, offs_m, offs_n, N)
        scores, products = window_scores(
            q, k, bias, window, sizes, offs_m, offs_n, scale * LOG2E, mask_log2e, WINDOW, SHIFTED, PRECISION
        )
        row_max = tl.max(scores, 1)
        p = tl.exp2(scores - row_max[:, None])
        row_sum = tl.sum(p, 1)
        p = p * (1.0 / row_sum)[:, None]  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        plane = window * n_heads + head
        p_kept = p
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), offs_m[:, None], offs_n[None, :], plane, dropout_p)
            dp = tl.where(keep, dp * keep_scale, 0.0)
            p_kept = tl.where(keep, p * keep_scale, 0.0)
        if N_BLOCKS == 1:
            dv = tl.dot(tl.trans(p_kept.to(do.dtype)), do, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
            dv_rows = window_rows(dv_ptr, grad_strides, window, head, sizes, offs_n, WINDOW)
            store_rows(dv_rows, dv, offs_n, N, HEAD_DIM, BLOCK_D)
        delta = tl.sum(p * dp, 1)
        ds = p * (dp - delta[:, None])  # rows past N have dp = 0
        if dbias_partials_ptr is not None:
            dbias += ds
        along_m, along_n = None, None
        if COSINE:
            along = ds * products
            along_m = tl.sum(along, 1)
            dlogit_scale += along_m
            along_m *= scale
            along_n = tl.sum(along, 0) * scale
        ds = ds.to(k.dtype)
        dq = normalise_grad(tl.dot(ds, k, input_precision=PRECISION) * scale, q_normalised, along_m)
        dq_rows = window_rows(dq_ptr, grad_strides, window, head, sizes, offs_m, WINDOW)
        store_rows(dq_rows, dq, offs_m, N, HEAD_DIM, BLOCK_D)
        if N_BLOCKS == 1:
            dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
            dk_rows = window_rows(dk_ptr, grad_strides, window, head, sizes, offs_n, WINDOW)
            store_rows(dk_rows, normalise_grad(dk, k_normalised, along_n), offs_n, N, HEAD_DIM, BLOCK_D)
        else:
            stats = plane.to(tl.int64) * N + offs_m
            tl.store(lse_ptr + stats, row_max + tl.log2(row_sum), mask=mask_m)
            tl.store(delta_ptr + stats, delta, mask=mask_m)
    if dbias_partials_ptr is not None:
        partials = dbias_partials_ptr + (which.to(tl.int64) * n_heads + head) * (N * N)
        dbias = dbias.to(dbias_partials_ptr.dtype.element_ty)
        tl.store(
            partials + (offs_m * N)[:, None] + offs_n[None, :], dbias, mask=mask_m[:, None] & (offs_n < N)[None, :]
        )
    if COSINE:
        total = tl.sum(dlogit_scale, 0).to(dlogit_scale_partials_ptr.dtype.element_ty)
        tl.store(dlogit_scale_partials_ptr + (which * N_BLOCKS + pid_m) * n_heads + head, total)


@triton.jit(do_not_specialize=SIZES)
def window_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, logit_scale_ptr, seed_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_ob, stride_oy, stride_ox, stride_oh,
    stride_gb, stride_gy, stride_gx, stride_gh,
    n_heads, n_windows, n_wy, n_wx, height, width, shift_y, shift_x, group, scale, mask_log2e, dropout_p, keep_scale,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHIFTED: tl.constexpr, COSINE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N rows in a group of windows; the tile holds all BLOCK_M queries of a window."""
    WINDOW: tl.constexpr = (WINDOW_Y, WINDOW_X)
    N: tl.constexpr = WINDOW_Y * WINDOW_X
    pid_n, head, which, first, end = head_and_windows(n_heads, n_windows, group, (N + BLOCK_N - 1) // BLOCK_N)
    sizes = n_wy, n_wx, height, width, shift_y, shift_x
    in_strides = stride_qb, stride_qy, stride_qx, stride_qh
    grad_strides = stride_gb, stride_gy, stride_gx, stride_gh
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < N
    bias = load_bias(bias_ptr, head, offs_m, offs_n, N)
    if COSINE:
        scale = tl.load(logit_scale_ptr + head).to(tl.float32)
    for window in range(first, end):
        q = load_rows(window_rows(q_ptr, in_strides, window, head, sizes, offs_m, WINDOW), offs_m, N, HEAD_DIM, BLOCK_D)
        k = load_rows(window_rows(k_ptr, in_strides, window, head, sizes, offs_n, WINDOW), offs_n, N, HEAD_DIM, BLOCK_D)
        v = load_rows(window_rows(v_ptr, in_strides, window, head, sizes, offs_n, WINDOW), offs_n, N, HEAD_DIM, BLOCK_D)
        do_rows = window_rows(do_ptr, (stride_ob, stride_oy, stride_ox, stride_oh), window, head, sizes, offs_m, WINDOW)
        do = load_rows(do_rows, offs_m, N, HEAD_DIM, BLOCK_D)
        k_normalised = normalise(k, COSINE)
        q, k = normalise(q, COSINE)[0], k_normalised[0]
        plane = window * n_heads + head
        stats = plane.to(tl.int64) * N + offs_m
        lse = tl.load(lse_ptr + stats, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptr + stats, mask=mask_m, other=0.0)
        scores, products = window_scores(
            q, k, bias, window, sizes, offs_m, offs_n, scale * LOG2E, mask_log2e, WINDOW, SHIFTED, PRECISION
        )
        p = tl.exp2(scores - lse[:, None])  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        p_kept = p
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), offs_m[:, None], offs_n[None, :], plane, dropout_p)
            dp = tl.where(keep, dp * keep_scale, 0.0)
            p_kept = tl.where(keep, p * keep_scale, 0.0)
        dv = tl.dot(tl.trans(p_kept.to(do.dtype)), do, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
        dv_rows = window_rows(dv_ptr, grad_strides, window, head, sizes, offs_n, WINDOW)
        store_rows(dv_rows, dv, offs_n, N, HEAD_DIM, BLOCK_D)
        ds = p * (dp - delta[:, None])  # rows past N have dp = delta = 0
        along_n = None
        if COSINE:
            along_n = tl.sum(ds * products, 0) * scale
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION) * scale
        dk_rows = window_rows(dk_ptr, grad_strides, window, head, sizes, offs_n, WINDOW)
        store_rows(dk_rows, normalise_grad(dk, k_normalised, along_n), offs_n, N, HEAD_DIM, BLOCK_D)


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
    do = maybe_contiguous(do)
    q, k, v = maybe_contiguous(qkv).unbind(3)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dq, dk, dv = dqkv.unbind(3)
    n_tokens, n_heads, n_windows = window[0] * window[1], q.shape[3], count_windows(q, window)
    picked = n_windows * n_heads, n_tokens, q.shape[4], q.dtype, target_of(q.device)
    config = pick_window_bwd(*picked)
    n_groups, n_blocks = cdiv(n_windows, config.group), cdiv(n_tokens, config.block_m)
    dbias = dlogit_scale = lse = delta = None
    if bias is not None and needs_bias:
        dbias = new_partials(q, n_groups, n_heads, n_tokens, n_tokens, dtype=bias.dtype)
    if logit_scale is not None:
        dlogit_scale = new_partials(q, n_groups * n_blocks, n_heads, dtype=logit_scale.dtype)
    if n_blocks > 1:
        lse, delta = q.new_empty(2, n_windows, n_heads, n_tokens, dtype=torch.float32).unbind(0)
    tensors = dict(q_ptr=q, k_ptr=k, v_ptr=v, bias_ptr=contiguous(bias), do_ptr=do, dk_ptr=dk, dv_ptr=dv)
    tensors |= dict(lse_ptr=lse, delta_ptr=delta)
    places = {**strides("q", q), **strides("o", do), **strides("g", dq)}
    options = window, shift, mask_value, scale, dropout
    launch(
        window_attention_bwd_kernel,
        (programs(q, window, config.group, config.block_m),),
        q,
        **tensors,
        dq_ptr=dq,
        dbias_partials_ptr=dbias,
        dlogit_scale_partials_ptr=dlogit_scale,
        **places,
        HOLD=config.hold_bias,
        **shared_arguments(q, logit_scale, *options, config),
    )
    if n_blocks > 1:
        config = pick_window_bwd_dkdv(*picked)
        launch(
            window_attention_bwd_dkdv_kernel,
            (programs(q, window, config.group, config.block_n),),
            q,
            **tensors,
            **places,
            **shared_arguments(q, logit_scale, *options, config),
        )
    return (
        dqkv,
        None if dbias is None or bias is None else sum_parts(dbias, bias.dtype),
        None if dlogit_scale is None or logit_scale is None else sum_parts(dlogit_scale, logit_scale.dtype),
    )
