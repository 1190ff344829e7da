"""Attention with normalised queries and keys (Dehghani et al. 2023, arXiv:2302.05442, section 2; Henry et al. 2020,
arXiv:2010.04245).

    q' = norm(q) * weight + bias over the head size, k' likewise      out = softmax(scale * q' k'^T) v

norm is LayerNorm or RMSNorm, which does not subtract the mean (Zhang & Sennrich 2019, arXiv:1910.07467). A separate
kernel normalises q and k: attention reads keys once per tile of queries and would normalise them as often. The backward
pass saves the same tensors as attention, with q and k before the norm; q', k' and the statistics are recomputed. The
backward kernel is a variant of :mod:`..norm.layer_norm` for short rows: it overwrites the gradients of q' and k' in
place and writes partial sums of the gradients of weight and bias.
"""

import torch
import triton
import triton.language as tl

from vit_triton.arguments import NO_DROPOUT, NO_MASK, Dropout, Norm, ScoreMask
from vit_triton.kernels.attention.backward import attention_bwd_into
from vit_triton.kernels.attention.forward import attention_fwd
from vit_triton.kernels.attention.rows import strides
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import contiguous, launch
from vit_triton.kernels.norm.config import layer_norm_stretch, pick_qk_norm
from vit_triton.kernels.norm.statistics import row_gradient, row_statistics
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.sums.sum_parts import new_partials, sum_pair


@triton.jit
def _token_offsets(rows, n_tokens, n_heads, stride_b, stride_n, stride_h):
    """64-bit offsets of the rows of a (B, N, H, D) tensor, numbered in that order."""
    token = rows // n_heads
    batch = token // n_tokens
    return (
        batch.to(tl.int64) * stride_b
        + (token - batch * n_tokens).to(tl.int64) * stride_n
        + (rows - token * n_heads).to(tl.int64) * stride_h
    )


@triton.jit(do_not_specialize=["n_rows"])
def qk_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, stride_xb, stride_xn, stride_xh, stride_xd,
    n_rows, n_tokens, n_heads, head_dim, eps,
    RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_d = offs_d < head_dim
    mask = (offs_m < n_rows)[:, None] & mask_d[None, :]
    offs_x = _token_offsets(offs_m, n_tokens, n_heads, stride_xb, stride_xn, stride_xh)
    x_ptrs = x_ptr + offs_x[:, None] + (offs_d.to(tl.int64) * stride_xd)[None, :]  # [BLOCK_M, BLOCK_D]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    _, centred, rstd = row_statistics(x, mask_d[None, :], head_dim, eps, RMS)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * head_dim + offs_d[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


def qk_norm_fwd(x: torch.Tensor, norm: Norm | None, *, rms: bool) -> torch.Tensor:
    """Normalise x (B, N, H, D), any strides, over the last dimension -> (B, N, H, D), contiguous, in x's dtype. Returns
    x itself without a norm. ``rms``: the norm does not subtract the mean."""
    if norm is None:
        return x
    weight, bias, eps = norm
    batch, n_tokens, n_heads, head_dim = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    config = pick_qk_norm(head_dim, target_of(x.device))
    launch(
        qk_norm_fwd_kernel,
        (cdiv(batch * n_tokens * n_heads, config.block_m),),
        x,
        x_ptr=x,
        weight_ptr=contiguous(weight),
        bias_ptr=contiguous(bias),
        y_ptr=y,
        **strides("x", x),
        n_rows=batch * n_tokens * n_heads,
        n_tokens=n_tokens,
        n_heads=n_heads,
        head_dim=head_dim,
        eps=eps,
        RMS=rms,
        BLOCK_M=config.block_m,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )
    return y


@triton.jit(do_not_specialize=["n_rows", "n_steps"])
def qk_norm_bwd_kernel(
    dx_ptr, x_ptr, weight_ptr, dweight_partials_ptr, dbias_partials_ptr,
    stride_dxb, stride_dxn, stride_dxh, stride_xb, stride_xn, stride_xh, stride_xd,
    n_rows, n_tokens, n_heads, head_dim, n_steps, eps,
    RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Overwrite n_steps * BLOCK_M rows of dy with dx, and store their sums of dy * xhat and dy as row pid of the
    partials (programs, D)."""
    pid = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_d = offs_d < head_dim
    dweight = tl.zeros([BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_D], dtype=tl.float32)
    for step in range(n_steps):
        offs_m = (pid * n_steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (offs_m < n_rows)[:, None] & mask_d[None, :]
        offs_dx = _token_offsets(offs_m, n_tokens, n_heads, stride_dxb, stride_dxn, stride_dxh)
        offs_x = _token_offsets(offs_m, n_tokens, n_heads, stride_xb, stride_xn, stride_xh)
        x_ptrs = x_ptr + offs_x[:, None] + (offs_d.to(tl.int64) * stride_xd)[None, :]  # [BLOCK_M, BLOCK_D]
        dx_ptrs = dx_ptr + offs_dx[:, None] + offs_d[None, :]
        grad = tl.load(dx_ptrs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        _, centred, rstd = row_statistics(x, mask_d[None, :], head_dim, eps, RMS)
        xhat = centred * rstd[:, None]
        if weight_ptr is not None:
            dweight += tl.sum(grad * xhat, axis=0)
            dbias += tl.sum(grad, axis=0)
            grad *= tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        dx = row_gradient(grad, xhat, rstd, head_dim, RMS)
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if weight_ptr is not None:
        dtype: tl.constexpr = dweight_partials_ptr.dtype.element_ty
        tl.store(dweight_partials_ptr + pid * head_dim + offs_d, dweight.to(dtype), mask=mask_d)
        tl.store(dbias_partials_ptr + pid * head_dim + offs_d, dbias.to(dtype), mask=mask_d)


def qk_norm_bwd_into(
    dx: torch.Tensor, x: torch.Tensor, norm: Norm | None, *, rms: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dweight (D,) and dbias (D,) of `qk_norm_fwd` in the weight's dtype; None without a weight. dx (B, N, H, D), whose
    last stride is 1, holds the gradient of the result and is overwritten with the gradient of x."""
    if norm is None:
        return None, None
    weight, _, eps = norm
    batch, n_tokens, n_heads, head_dim = x.shape
    n_rows = batch * n_tokens * n_heads
    config = pick_qk_norm(head_dim, target_of(x.device))
    n_programs, n_steps = layer_norm_stretch(n_rows, config)
    dweight_partials, dbias_partials = (
        None if weight is None else new_partials(x, n_programs, head_dim, dtype=weight.dtype) for _ in range(2)
    )
    launch(
        qk_norm_bwd_kernel,
        (n_programs,),
        x,
        dx_ptr=dx,
        x_ptr=x,
        weight_ptr=contiguous(weight),
        dweight_partials_ptr=dweight_partials,
        dbias_partials_ptr=dbias_partials,
        stride_dxb=dx.stride(0),
        stride_dxn=dx.stride(1),
        stride_dxh=dx.stride(2),
        **strides("x", x),
        n_rows=n_rows,
        n_tokens=n_tokens,
        n_heads=n_heads,
        head_dim=head_dim,
        n_steps=n_steps,
        eps=eps,
        RMS=rms,
        BLOCK_M=config.block_m,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )
    if weight is None or dweight_partials is None or dbias_partials is None:
        return None, None
    return sum_pair(dweight_partials, dbias_partials, weight.dtype)


def normed_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_norm: Norm | None,
    k_norm: Norm | None,
    *,
    rms: bool,
    scale: float,
    dropout: Dropout = NO_DROPOUT,
    mask: ScoreMask = NO_MASK,
    save: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """:func:`attention_fwd` of the normalised q and k."""
    q, k = qk_norm_fwd(q, q_norm, rms=rms), qk_norm_fwd(k, k_norm, rms=rms)
    return attention_fwd(q, k, v, scale=scale, dropout=dropout, mask=mask, save=save)


def normed_attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_norm: Norm | None,
    k_norm: Norm | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    rms: bool,
    scale: float,
    dropout: Dropout = NO_DROPOUT,
    mask: ScoreMask = NO_MASK,
    needs_bias: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Write the gradients of q, k and v into ``grads``, whose last strides are 1 -> gradients of q_norm's weight and
    bias, of k_norm's weight and bias, and with ``needs_bias`` those of the mask's bias, rel_h and rel_w; None for a
    missing tensor."""
    normed = qk_norm_fwd(q, q_norm, rms=rms), qk_norm_fwd(k, k_norm, rms=rms)
    of_bias = attention_bwd_into(
        *(*grads, do, *normed, v, out, lse, dlse), scale=scale, dropout=dropout, mask=mask, needs_bias=needs_bias
    )
    of_norms = *qk_norm_bwd_into(grads[0], q, q_norm, rms=rms), *qk_norm_bwd_into(grads[1], k, k_norm, rms=rms)
    return *of_norms, *of_bias
