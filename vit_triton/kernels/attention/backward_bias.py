"""The gradient of a bias of attention scores: the sum of dS over the dimensions along which the bias is broadcast.

One program owns a tile of the gradient and loops over what the tile is broadcast over, in a fixed order. dS of all
scores is never stored. The programs of a split compute partial sums, which :func:`sum_parts` adds in a fixed order.
On a CPU, ``attention_bwd_dkdv_kernel`` computes the gradient of a bias that is broadcast over the batch only.

The gradient of a decomposed bias is the sum of dS over a row, or a column, of the grid of keys: a program owns BLOCK_M
queries and reads the keys of one row of the grid per step.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vit_triton.arguments import DecomposedBias
from vit_triton.kernels.attention.config import bias_splits, pick_attention_bwd_bias, pick_attention_bwd_rel
from vit_triton.kernels.attention.gradient import load_statistics, score_gradient
from vit_triton.kernels.attention.masking import head_bias, keys_of_rows, limit_keys, load_bias
from vit_triton.kernels.attention.rows import head_of_program, head_rows, load_tile
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import launch
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.sums.sum_parts import new_partials, sum_parts


@triton.jit
def attention_bwd_bias_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, log2_sum_ptr, delta_ptr, seed_ptr, key_lengths_ptr, bias_ptr,
    dbias_partials_ptr,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_dob, stride_don, stride_doh, stride_dod,
    stride_biasb, stride_biash, stride_biasm, stride_biasn,
    n_heads, n_q, n_k, score_scale, dropout_p, keep_scale,
    size_b, size_h, size_m, size_n, sum_b, sum_h, sum_m, sum_n, n_steps,
    HEAD_ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUM_M: tl.constexpr, SUM_N: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dbias_partials (splits, size_b, size_h, size_m, size_n), the shape of the bias. A tile is summed over sum_b
    samples, sum_h heads, sum_m blocks of queries and sum_n blocks of keys, ``n_steps`` of these per program. SUM_M,
    SUM_N: the bias has one row, one column."""
    DIMS: tl.constexpr = (HEAD_DIM, D_MAIN, D_TAIL)
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(size_n, BLOCK_N)
    blocks_m = tl.cdiv(size_m, BLOCK_M)
    pid_n = pid % blocks_n
    pid_m = pid // blocks_n % blocks_m
    plane = pid // (blocks_n * blocks_m)  # of the partials
    own_head = plane % size_h
    own_batch = plane // size_h % size_b
    split = plane // (size_h * size_b)
    own_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    own_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    bias_strides = (stride_biasb, stride_biash, stride_biasm, stride_biasn)
    bias_rows = head_bias(bias_ptr, bias_strides, own_batch.to(tl.int64), own_head.to(tl.int64))
    bias = (load_bias(bias_rows, own_m[:, None], own_n[None, :], n_q, n_k, True, True),)  # the same in every step
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = tl.minimum((split + 1) * n_steps, sum_b * sum_h * sum_m * sum_n)
    for step in tl.range(split * n_steps, last):
        offs_n = (pid_n + step % sum_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        first_m = (pid_m + step // sum_n % sum_m) * BLOCK_M
        offs_m = first_m + tl.arange(0, BLOCK_M)
        head = (own_head + step // (sum_n * sum_m) % sum_h).to(tl.int64)
        batch = (own_batch + step // (sum_n * sum_m * sum_h)).to(tl.int64)
        off_bh = (batch * n_heads + head).to(tl.int32)
        q_rows = head_rows(q_ptr, (stride_qb, stride_qn, stride_qh, stride_qd), batch, head, HEAD_ALIGN)
        k_rows = head_rows(k_ptr, (stride_kb, stride_kn, stride_kh, stride_kd), batch, head, HEAD_ALIGN)
        v_rows = head_rows(v_ptr, (stride_vb, stride_vn, stride_vh, stride_vd), batch, head, HEAD_ALIGN)
        do_rows = head_rows(do_ptr, (stride_dob, stride_don, stride_doh, stride_dod), batch, head, HEAD_ALIGN)
        n_keys = n_k if key_lengths_ptr is None else limit_keys(n_k, key_lengths_ptr, batch)
        if CAUSAL != "":
            diagonal, n_first, n_keys = keys_of_rows(first_m, n_q, n_k, n_keys, CAUSAL, BLOCK_M)
        after = (diagonal,) if CAUSAL != "" else ()
        dropout = (tl.load(seed_ptr), off_bh, dropout_p, keep_scale) if DROPOUT else None
        q = load_tile(q_rows, offs_m, n_q, DIMS, True)  # [BLOCK_M, D]
        do = load_tile(do_rows, offs_m, n_q, DIMS, True)  # [BLOCK_M, D]
        lse, log2_sum, delta = load_statistics(
            lse_ptr, log2_sum_ptr, delta_ptr, off_bh.to(tl.int64) * n_q + offs_m, offs_m < n_q, True
        )
        ds, keys = score_gradient(
            q, do, lse, log2_sum, delta, k_rows, v_rows, offs_n, n_q, n_keys, score_scale, offs_m, dropout,
            (bias, (), after), DIMS, True, PRECISION,
        )  # fmt: skip
        acc += tl.where((offs_m < n_q)[:, None], ds, 0.0)

    out_ptr = dbias_partials_ptr + plane.to(tl.int64) * size_m * size_n
    dtype: tl.constexpr = dbias_partials_ptr.dtype.element_ty
    if SUM_M and SUM_N:
        tl.store(out_ptr, tl.sum(tl.sum(acc, 0), 0).to(dtype))
    elif SUM_M:
        tl.store(out_ptr + own_n, tl.sum(acc, 0).to(dtype), mask=own_n < size_n)
    elif SUM_N:
        tl.store(out_ptr + own_m, tl.sum(acc, 1).to(dtype), mask=own_m < size_m)
    else:
        ptrs = out_ptr + own_m.to(tl.int64)[:, None] * size_n + own_n[None, :]
        tl.store(ptrs, acc.to(dtype), mask=(own_m < size_m)[:, None] & (own_n < size_n)[None, :])


def attention_bwd_bias(arguments: dict[str, Any], bias: torch.Tensor) -> torch.Tensor:
    """The gradient of ``bias`` (B or 1, H or 1, N_q or 1, N_k or 1), contiguous, in its dtype. ``arguments``: those
    that the backward kernels share."""
    q = arguments["q_ptr"]
    batch, n_q, n_heads, head_dim = q.shape
    n_k = arguments["n_k"]
    target = target_of(q.device)
    config = pick_attention_bwd_bias(n_q, n_k, head_dim, q.dtype, target, arguments["DROPOUT"])
    sizes = dict(zip(("size_b", "size_h", "size_m", "size_n"), bias.shape, strict=True))
    counts = (
        batch // max(1, bias.shape[0]),
        n_heads // bias.shape[1],
        cdiv(n_q, config.block_m) if bias.shape[2] == 1 else 1,
        cdiv(n_k, config.block_n) if bias.shape[3] == 1 else 1,
    )
    tiles = bias.shape[0] * bias.shape[1] * cdiv(bias.shape[2], config.block_m) * cdiv(bias.shape[3], config.block_n)
    total = counts[0] * counts[1] * counts[2] * counts[3]
    if not total:
        return torch.zeros_like(bias, memory_format=torch.contiguous_format)
    n_steps = cdiv(total, bias_splits(tiles, total, target))
    n_splits = cdiv(total, n_steps)
    partials = new_partials(q, n_splits, *bias.shape, dtype=bias.dtype)
    launch(
        attention_bwd_bias_kernel,
        (n_splits * tiles,),
        q,
        dbias_partials_ptr=partials,
        **sizes,
        **dict(zip(("sum_b", "sum_h", "sum_m", "sum_n"), counts, strict=True)),
        n_steps=n_steps,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SUM_M=bias.shape[2] == 1 and n_q > 1,
        SUM_N=bias.shape[3] == 1 and n_k > 1,
        **config.options,
        **{name: value for name, value in arguments.items() if "rel_" not in name},
    )
    return sum_parts(partials, bias.dtype)


@triton.jit
def attention_bwd_rel_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, log2_sum_ptr, delta_ptr, seed_ptr, key_lengths_ptr, rel_h_ptr, rel_w_ptr,
    drel_h_ptr, drel_w_ptr,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_dob, stride_don, stride_doh, stride_dod,
    stride_rel_hb, stride_rel_hh, stride_rel_hm, stride_rel_hn,
    stride_rel_wb, stride_rel_wh, stride_rel_wm, stride_rel_wn,
    n_heads, n_q, n_k, rel_width, score_scale, dropout_p, keep_scale,
    HEAD_ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of drel_h (B, H, N_q, N_k / rel_width) and drel_w (B, H, N_q, rel_width); BLOCK_N covers a row of
    the grid of keys."""
    DIMS: tl.constexpr = (HEAD_DIM, D_MAIN, D_TAIL)
    pid_m, batch, head, off_bh = head_of_program(n_heads, tl.cdiv(n_q, BLOCK_M))
    q_rows = head_rows(q_ptr, (stride_qb, stride_qn, stride_qh, stride_qd), batch, head, HEAD_ALIGN)
    k_rows = head_rows(k_ptr, (stride_kb, stride_kn, stride_kh, stride_kd), batch, head, HEAD_ALIGN)
    v_rows = head_rows(v_ptr, (stride_vb, stride_vn, stride_vh, stride_vd), batch, head, HEAD_ALIGN)
    do_rows = head_rows(do_ptr, (stride_dob, stride_don, stride_doh, stride_dod), batch, head, HEAD_ALIGN)
    rel_h = head_bias(rel_h_ptr, (stride_rel_hb, stride_rel_hh, stride_rel_hm, stride_rel_hn), batch, head)
    rel_w = head_bias(rel_w_ptr, (stride_rel_wb, stride_rel_wh, stride_rel_wm, stride_rel_wn), batch, head)
    dropout = (tl.load(seed_ptr), off_bh, dropout_p, keep_scale) if DROPOUT else None
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_q
    q = load_tile(q_rows, offs_m, n_q, DIMS, True)  # [BLOCK_M, D]
    do = load_tile(do_rows, offs_m, n_q, DIMS, True)  # [BLOCK_M, D]
    rows = off_bh.to(tl.int64) * n_q + offs_m
    lse, log2_sum, delta = load_statistics(lse_ptr, log2_sum_ptr, delta_ptr, rows, mask_m, True)
    n_keys = n_k if key_lengths_ptr is None else limit_keys(n_k, key_lengths_ptr, batch)
    if CAUSAL != "":
        diagonal, n_first, n_keys = keys_of_rows(pid_m * BLOCK_M, n_q, n_k, n_keys, CAUSAL, BLOCK_M)
    after = (diagonal,) if CAUSAL != "" else ()
    mask = ((), rel_h + rel_w + (rel_width,), after)
    height = n_k // rel_width
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for row in tl.range(0, height):
        offs_n = row * rel_width + tl.arange(0, BLOCK_N)
        end = tl.minimum((row + 1) * rel_width, n_keys)  # keys of the next row of the grid do not count
        ds, keys = score_gradient(
            q, do, lse, log2_sum, delta, k_rows, v_rows, offs_n, n_q, end, score_scale, offs_m, dropout, mask,
            DIMS, True, PRECISION, False,  # a row of the grid starts at any key
        )  # fmt: skip
        acc += ds
        tl.store(drel_h_ptr + rows * height + row, tl.sum(ds, 1).to(drel_h_ptr.dtype.element_ty), mask=mask_m)
    offs_w = tl.arange(0, BLOCK_N)
    ptrs = drel_w_ptr + rows[:, None] * rel_width + offs_w[None, :]
    tl.store(ptrs, acc.to(drel_w_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_w < rel_width)[None, :])


def attention_bwd_rel(arguments: dict[str, Any], rel: DecomposedBias) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of rel_h and rel_w, contiguous, in their dtypes. ``arguments``: those that the backward kernels
    share."""
    q = arguments["q_ptr"]
    batch, n_q, n_heads, head_dim = q.shape
    drel_h, drel_w = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in rel)
    config = pick_attention_bwd_rel(
        n_q, rel.rel_w.shape[-1], head_dim, q.dtype, target_of(q.device), arguments["DROPOUT"]
    )
    launch(
        attention_bwd_rel_kernel,
        (cdiv(n_q, config.block_m) * batch * n_heads,),
        q,
        drel_h_ptr=drel_h,
        drel_w_ptr=drel_w,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **config.options,
        **{name: value for name, value in arguments.items() if "bias" not in name},
    )
    return drel_h, drel_w
