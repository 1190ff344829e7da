"""Layer normalisation over the last dimension, alone or after a residual addition.

Forward, per row:  mean = sum(x) / D,  rstd = 1 / sqrt(sum((x - mean)^2) / D + eps),  y = xhat * weight + bias
with xhat = (x - mean) * rstd. One program holds a whole row in registers, so the variance is computed from the centred
row without cancellation. Statistics and arithmetic are float32 for every dtype. (Ba, Kiros, Hinton: Layer
Normalization, arXiv:1607.06450.)

The backward pass saves x, mean and rstd. With g = dy * weight,

    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  dweight = sum over rows of dy * xhat,  dbias = sum of dy.

Each program processes a contiguous range of rows and writes one partial sum of dweight and one of dbias
(:mod:`..sums.sum_parts`). The ranges depend on the shape only, so the result is deterministic.
"""

import torch
import triton
import triton.language as tl

from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import contiguous, launch
from vit_triton.kernels.norm.config import check_layer_norm_width, layer_norm_stretch, pick_layer_norm
from vit_triton.kernels.norm.statistics import row_gradient, row_statistics
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.sums.sum_parts import new_partials, sum_pair

# --- forward -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows"])
def layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, summed_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_xd, stride_rm, stride_rd,
    n_rows, width, eps,
    SAVED_STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of y. With SAVED_STATISTICS, mean and rstd are read; without, they are computed, and stored if
    ``mean_ptr`` is given."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_m = offs_m < n_rows
    mask_d = offs_d < width
    mask = mask_m[:, None] & mask_d[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    cols = offs_d.to(tl.int64)[None, :]
    offs_y = rows * width + cols  # outputs are contiguous

    x = tl.load(x_ptr + rows * stride_xm + cols * stride_xd, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows * stride_rm + cols * stride_rd, mask=mask, other=0.0).to(tl.float32)
        summed = (x + residual).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + offs_y, summed, mask=mask)
        x = summed.to(tl.float32)  # normalise the rounded sum, which the backward pass reads

    if SAVED_STATISTICS:
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        centred = x - mean[:, None]
    else:
        mean, centred, rstd = row_statistics(x, mask_d[None, :], width, eps)

    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask)
    if not SAVED_STATISTICS and mean_ptr is not None:
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


def _layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    out_dtype: torch.dtype | None,
    save: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(y, summed, mean, rstd): the launch shared by the three forward launchers. mean and rstd are ``statistics`` if
    given, new with ``save``, else None."""
    n_rows, width = x.shape
    check_layer_norm_width(width)
    y = x.new_empty((n_rows, width), dtype=out_dtype or x.dtype)
    summed = None if residual is None else x.new_empty((n_rows, width))
    mean, rstd = statistics or (None, None)
    if save:
        mean, rstd = (x.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
    config = pick_layer_norm(width, target_of(x.device))
    launch(
        layer_norm_fwd_kernel,
        (cdiv(n_rows, config.block_m),),
        x,
        x_ptr=x,
        residual_ptr=residual,
        weight_ptr=contiguous(weight),
        bias_ptr=contiguous(bias),
        y_ptr=y,
        summed_ptr=summed,
        mean_ptr=mean,
        rstd_ptr=rstd,
        stride_xm=x.stride(0),
        stride_xd=x.stride(1),
        stride_rm=0 if residual is None else residual.stride(0),
        stride_rd=0 if residual is None else residual.stride(1),
        n_rows=n_rows,
        width=width,
        eps=eps,
        SAVED_STATISTICS=statistics is not None,
        BLOCK_M=config.block_m,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )
    return y, summed, mean, rstd


def layer_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    out_dtype: torch.dtype | None = None,
    save: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Normalise the rows of x (M, D), any strides -> y (M, D), and with ``save`` mean (M,), rstd (M,).

    y has ``out_dtype`` (default: x's dtype); mean and rstd are float32. weight and bias (D,) may have another dtype.
    """
    y, _, mean, rstd = _layer_norm(x, None, weight, bias, None, eps, out_dtype, save)
    return y, mean, rstd


def add_layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    save: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Add and normalise in one pass -> y, summed = x + residual, and with ``save`` mean, rstd.

    summed and y have x's dtype; y is the norm of the rounded sum.
    """
    y, summed, mean, rstd = _layer_norm(x, residual, weight, bias, None, eps, None, save)
    assert summed is not None
    return y, summed, mean, rstd


def layer_norm_apply(
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Recompute y of ``layer_norm_fwd`` from x and the saved statistics."""
    return _layer_norm(x, None, weight, bias, (mean, rstd), 0.0, out_dtype)[0]


# --- backward ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows", "rows_per_batch", "n_steps"])
def layer_norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dsum_ptr, dx_ptr, dweight_partials_ptr, dbias_partials_ptr,
    stride_dyb, stride_dym, stride_dyd, stride_xm, stride_xd, stride_sm, stride_sd,
    rows_per_batch, n_rows, width, n_steps,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """n_steps * BLOCK_M rows of dx; their sums of dy * xhat and dy are row pid of the partials (programs, D)."""
    pid = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_d = offs_d < width
    cols = offs_d.to(tl.int64)[None, :]
    dweight = tl.zeros([BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_D], dtype=tl.float32)

    for step in range(n_steps):
        offs_m = (pid * n_steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask_m = offs_m < n_rows
        mask = mask_m[:, None] & mask_d[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        batch = offs_m // rows_per_batch
        offs_dy = batch.to(tl.int64) * stride_dyb + (offs_m - batch * rows_per_batch).to(tl.int64) * stride_dym

        # [BLOCK_M, BLOCK_D]
        dy = tl.load(dy_ptr + offs_dy[:, None] + cols * stride_dyd, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows * stride_xm + cols * stride_xd, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        # xhat is not masked past the width, because dy is 0 there; a non-finite xhat means that the whole row is NaN
        xhat = (x - mean[:, None]) * rstd[:, None]

        grad = dy
        if weight_ptr is not None:
            dweight += tl.sum(dy * xhat, axis=0)
            dbias += tl.sum(dy, axis=0)
            grad *= tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        dx = row_gradient(grad, xhat, rstd, width)
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + rows * stride_sm + cols * stride_sd, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows * width + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if weight_ptr is not None:
        dtype: tl.constexpr = dweight_partials_ptr.dtype.element_ty
        tl.store(dweight_partials_ptr + pid.to(tl.int64) * width + offs_d, dweight.to(dtype), mask=mask_d)
        tl.store(dbias_partials_ptr + pid.to(tl.int64) * width + offs_d, dbias.to(dtype), mask=mask_d)


def layer_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    *,
    dsum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of ``layer_norm_fwd`` -> dx (M, D) in x's dtype, dweight (D,), dbias (D,).

    dy is (M, D), or (B, M / B, D) for a slice of longer sequences, with any strides, including 0, and any dtype. dsum
    (M, D) is added to dx before rounding: the gradient of the residual branch, or of ``summed`` after
    ``add_layer_norm_fwd``. dweight and dbias have the weight's dtype; without a weight both are None.
    """
    n_rows, width = x.shape
    check_layer_norm_width(width)
    if dy.dim() == 2:
        dy = dy.unsqueeze(0)
    config = pick_layer_norm(width, target_of(x.device))
    n_programs, n_steps = layer_norm_stretch(n_rows, config)
    dx = x.new_empty((n_rows, width))
    # two allocations: the partials of a single program are the results, which must not share a storage
    dweight_partials, dbias_partials = (
        None if weight is None else new_partials(x, n_programs, width, dtype=weight.dtype) for _ in range(2)
    )
    launch(
        layer_norm_bwd_kernel,
        (n_programs,),
        x,
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=contiguous(weight),
        mean_ptr=mean,
        rstd_ptr=rstd,
        dsum_ptr=dsum,
        dx_ptr=dx,
        dweight_partials_ptr=dweight_partials,
        dbias_partials_ptr=dbias_partials,
        stride_dyb=dy.stride(0),
        stride_dym=dy.stride(1),
        stride_dyd=dy.stride(2),
        stride_xm=x.stride(0),
        stride_xd=x.stride(1),
        stride_sm=0 if dsum is None else dsum.stride(0),
        stride_sd=0 if dsum is None else dsum.stride(1),
        rows_per_batch=dy.shape[1],
        n_rows=n_rows,
        width=width,
        n_steps=n_steps,
        BLOCK_M=config.block_m,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )
    if weight is None or dweight_partials is None or dbias_partials is None:
        return dx, None, None
    return dx, *sum_pair(dweight_partials, dbias_partials, weight.dtype)
