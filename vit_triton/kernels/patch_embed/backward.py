"""The backward pass of the patch embedding; the maths is in :mod:`.forward`."""

import torch
import triton
import triton.language as tl

from vit_triton.arguments import Norm
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import TRITON_DTYPE, input_precision, launch, maybe_contiguous
from vit_triton.kernels.linear.config import Epilogue, prefers_vendor
from vit_triton.kernels.norm.config import MAX_LAYER_NORM_WIDTH, pick_layer_norm
from vit_triton.kernels.norm.layer_norm import layer_norm_bwd
from vit_triton.kernels.norm.statistics import row_gradient
from vit_triton.kernels.patch_embed.config import pick_patch_embed_bwd_image, pick_patch_embed_bwd_weight
from vit_triton.kernels.patch_embed.forward import gather_patches
from vit_triton.kernels.patch_embed.patches import (
    PatchLayout,
    channel_of,
    column_offsets,
    image_arguments,
    image_strides,
    load_patches,
    patch_layout,
    row_offsets,
    token_offsets,
)
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.sums.sum_parts import new_partials, sum_pair
from vit_triton.kernels.tiles import grouped_tile


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def patch_embed_bwd_weight_kernel(
    dz_ptr, image_ptr, pre_mean_ptr, pre_rstd_ptr, mean_ptr, std_ptr, dweight_partials_ptr, dbias_partials_ptr,
    stride_ib, stride_ic, stride_ih, stride_iw, stride_zb, stride_zm, stride_zn,
    n_rows, n_patches, grid_w, dim, n_splits,
    C: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of G = dz.T @ xhat over one of n_splits ranges of rows; the tiles of the first column sum dz too."""
    K: tl.constexpr = C * PATCH_H * PATCH_W
    n_tiles = tl.cdiv(dim, BLOCK_N) * tl.cdiv(K, BLOCK_K)
    split = tl.program_id(0) // n_tiles
    pid_n, pid_k = grouped_tile(tl.program_id(0) % n_tiles, tl.cdiv(dim, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < dim
    mask_k = offs_k < K
    columns = column_offsets(offs_k, stride_ic, stride_ih, stride_iw, C, PATCH_H, PATCH_W, CHANNELS_LAST)
    channel = channel_of(offs_k, C, PATCH_H, PATCH_W, CHANNELS_LAST)
    dz_columns = offs_n.to(tl.int64) * stride_zn

    dweight = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_N], dtype=tl.float32)
    stretch = tl.cdiv(tl.cdiv(n_rows, BLOCK_M), n_splits) * BLOCK_M
    for m in range(split * stretch, min((split + 1) * stretch, n_rows), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < n_rows
        dz_rows = token_offsets(offs_m, n_patches, stride_zb, stride_zm)
        dz_ptrs = dz_ptr + dz_rows[:, None] + dz_columns[None, :]
        dz = tl.load(dz_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        rows = row_offsets(offs_m, n_patches, grid_w, stride_ib, stride_ih, stride_iw, PATCH_H, PATCH_W)
        mask = mask_m[:, None] & mask_k[None, :]
        # past the last row, a is finite and dz is 0
        a = load_patches(image_ptr + rows[:, None] + columns[None, :], mask, mean_ptr, std_ptr, channel, mask_k)
        if pre_mean_ptr is not None:
            pre_mean = tl.load(pre_mean_ptr + offs_m, mask=mask_m, other=0.0)
            pre_rstd = tl.load(pre_rstd_ptr + offs_m, mask=mask_m, other=0.0)
            a = (a.to(tl.float32) - pre_mean[:, None]) * pre_rstd[:, None]
        dweight = tl.dot(tl.trans(dz.to(DTYPE)), a.to(DTYPE), dweight, input_precision=PRECISION)
        if pid_k == 0:
            dbias += tl.sum(dz.to(tl.float32), axis=0)

    first = split.to(tl.int64) * dim  # partials are stacked
    dweight_ptrs = dweight_partials_ptr + (first + offs_n)[:, None] * K + offs_k[None, :]
    tl.store(dweight_ptrs, dweight, mask=mask_n[:, None] & mask_k[None, :])
    if pid_k == 0:
        tl.store(dbias_partials_ptr + first + offs_n, dbias, mask=mask_n)


@triton.jit(do_not_specialize=["n_rows"])
def patch_embed_bwd_image_kernel(
    dz_ptr, weight_ptr, dimage_ptr,
    stride_zb, stride_zm, stride_zn, stride_db, stride_dc, stride_dh, stride_dw,
    n_rows, n_patches, grid_w, dim,
    C: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of du = dz @ weight, stored in the layout of the image."""
    K: tl.constexpr = C * PATCH_H * PATCH_W
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    pid_m, pid_k = grouped_tile(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m = offs_m < n_rows
    mask_k = offs_k < K
    dz_rows = token_offsets(offs_m, n_patches, stride_zb, stride_zm)

    du = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for n in range(0, dim, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < dim
        dz_ptrs = dz_ptr + dz_rows[:, None] + (offs_n.to(tl.int64) * stride_zn)[None, :]
        dz = tl.load(dz_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        weight_ptrs = weight_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
        w = tl.load(weight_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        du = tl.dot(dz.to(dtype), w, du, input_precision=PRECISION)

    rows = row_offsets(offs_m, n_patches, grid_w, stride_db, stride_dh, stride_dw, PATCH_H, PATCH_W)
    columns = column_offsets(offs_k, stride_dc, stride_dh, stride_dw, C, PATCH_H, PATCH_W, CHANNELS_LAST)
    dimage_ptrs = dimage_ptr + rows[:, None] + columns[None, :]
    tl.store(dimage_ptrs, du.to(dimage_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def patch_embed_bwd_norm_kernel(
    image_ptr, pre_weight_ptr, pre_mean_ptr, pre_rstd_ptr, dimage_ptr,
    stride_ib, stride_ic, stride_ih, stride_iw, stride_db, stride_dc, stride_dh, stride_dw,
    n_rows, n_patches, grid_w,
    C: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Replace du, stored in dimage, by the gradient of BLOCK_M patches before pre_norm, in place."""
    K: tl.constexpr = C * PATCH_H * PATCH_W
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < n_rows
    mask_k = offs_k < K
    mask = mask_m[:, None] & mask_k[None, :]
    rows = row_offsets(offs_m, n_patches, grid_w, stride_ib, stride_ih, stride_iw, PATCH_H, PATCH_W)
    columns = column_offsets(offs_k, stride_ic, stride_ih, stride_iw, C, PATCH_H, PATCH_W, CHANNELS_LAST)
    a = tl.load(image_ptr + rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(pre_mean_ptr + offs_m, mask=mask_m, other=0.0)
    rstd = tl.load(pre_rstd_ptr + offs_m, mask=mask_m, other=0.0)
    xhat = tl.where(mask, (a - mean[:, None]) * rstd[:, None], 0.0)  # [BLOCK_M, BLOCK_K]

    rows = row_offsets(offs_m, n_patches, grid_w, stride_db, stride_dh, stride_dw, PATCH_H, PATCH_W)
    columns = column_offsets(offs_k, stride_dc, stride_dh, stride_dw, C, PATCH_H, PATCH_W, CHANNELS_LAST)
    dimage_ptrs = dimage_ptr + rows[:, None] + columns[None, :]
    grad = tl.load(dimage_ptrs, mask=mask, other=0.0).to(tl.float32)
    if pre_weight_ptr is not None:
        grad *= tl.load(pre_weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    da = row_gradient(grad, xhat, rstd, K)
    tl.store(dimage_ptrs, da.to(dimage_ptr.dtype.element_ty), mask=mask)


def patch_embed_bwd(
    dtokens: torch.Tensor,
    image: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor | None,
    pre_mean: torch.Tensor | None,
    pre_rstd: torch.Tensor | None,
    post_mean: torch.Tensor | None,
    post_rstd: torch.Tensor | None,
    pre_norm: Norm | None,
    post_norm: Norm | None,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    *,
    patch_size: tuple[int, int],
    patch_order: str,
    needs_image: bool,
) -> tuple[
    torch.Tensor | None,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor,
    torch.Tensor,
]:
    """Gradients of ``patch_embed_fwd`` -> dimage, dweight, dbias, dpre_weight, dpre_bias, dpost_weight, dpost_bias,
    dpos, dprefix.

    dtokens (B, n + patches, dim) has any strides; z and the statistics are results of the forward pass. dimage is
    contiguous, in the image's dtype, and None unless ``needs_image``. The gradients of a norm have its weight's dtype
    and are None without it; all others have the weight's dtype. dpos (patches, dim) and dprefix (n, dim) are sums over
    the batch, computed with and without pos.
    """
    layout = patch_layout(image, patch_size, patch_order)
    dtype = weight.dtype
    n_prefix = dtokens.shape[1] - layout.n_patches
    dtokens = maybe_contiguous(dtokens)
    dz = dtokens[:, n_prefix:]
    dpost_weight = dpost_bias = None
    if post_norm is not None:
        assert z is not None and post_mean is not None and post_rstd is not None
        dz, dpost_weight, dpost_bias = layer_norm_bwd(dz, z, post_norm[0], post_mean, post_rstd)
        dz = dz.view(-1, layout.n_patches, weight.shape[0])
    if pre_norm is None:
        pre_mean = pre_rstd = None

    target = target_of(image.device)
    fits = layout.patch_dim <= MAX_LAYER_NORM_WIDTH and target.is_gpu  # not measured on CPUs
    if fits and prefers_vendor("patches", dtype, target, Epilogue.ELEMENTWISE):
        patches = gather_patches(image, mean, std, layout, dtype, (None, None), pre_mean, pre_rstd)
        rows = dz.reshape(-1, weight.shape[0]).to(dtype)
        grad, dbias = torch.mm(rows.T, patches).float(), torch.sum(rows, 0, dtype=torch.float32)
        del patches
    else:
        grad, dbias = _bwd_weight(dz, image, pre_mean, pre_rstd, mean, std, layout, dtype)
    dpre_weight = dpre_bias = None
    if pre_norm is not None:
        pre_weight, pre_bias, _ = pre_norm
        if pre_weight is not None:
            # elementwise in float32: a GEMM would use TF32 where PyTorch allows it
            dpre_weight = (weight * grad).sum(0).to(pre_weight.dtype)
            dpre_bias = (weight * dbias[:, None]).sum(0).to(pre_weight.dtype)
            grad = grad * pre_weight
        if pre_bias is not None:
            grad = grad + dbias[:, None] * pre_bias
    dimage = None
    if needs_image:
        dimage = _bwd_image(dz, image, weight, pre_norm, pre_mean, pre_rstd, patch_size, patch_order)
    dprefix = dtokens[:, :n_prefix].sum(0, dtype=torch.float32).to(dtokens.dtype)
    dpos = dtokens[:, n_prefix:].sum(0, dtype=torch.float32).to(dtokens.dtype)
    norm_grads = (dpre_weight, dpre_bias, dpost_weight, dpost_bias)
    return dimage, grad.to(dtype), dbias.to(dtype), *norm_grads, dpos, dprefix


def _bwd_weight(
    dz: torch.Tensor,
    image: torch.Tensor,
    pre_mean: torch.Tensor | None,
    pre_rstd: torch.Tensor | None,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    layout: PatchLayout,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """G (dim, patch_dim) with its columns in the weight's order, and the sum of dz (dim,), in float32."""
    dim, n_rows = dz.shape[2], dz.shape[0] * dz.shape[1]
    target = target_of(image.device)
    precision = input_precision(dtype, target)
    config = pick_patch_embed_bwd_weight(n_rows, dim, layout.patch_dim, dtype, target, precision)
    dweight_partials = new_partials(image, config.split, dim, layout.patch_dim, dtype=torch.float32)
    dbias_partials = new_partials(image, config.split, dim, dtype=torch.float32)
    launch(
        patch_embed_bwd_weight_kernel,
        (cdiv(dim, config.block_m) * cdiv(layout.patch_dim, config.block_n) * config.split,),
        image,
        **image_arguments(image, mean, std, layout),
        dz_ptr=dz,
        pre_mean_ptr=pre_mean,
        pre_rstd_ptr=pre_rstd,
        dweight_partials_ptr=dweight_partials,
        dbias_partials_ptr=dbias_partials,
        stride_zb=dz.stride(0),
        stride_zm=dz.stride(1),
        stride_zn=dz.stride(2),
        dim=dim,
        n_splits=config.split,
        DTYPE=TRITON_DTYPE[dtype],
        PRECISION=precision,
        BLOCK_N=config.block_m,
        BLOCK_K=config.block_n,
        BLOCK_M=config.block_k,
        GROUP=config.group,
        **config.options,
    )
    dweight, dbias = sum_pair(dweight_partials, dbias_partials, torch.float32)
    return layout.to_weight(dweight), dbias


def _bwd_image(
    dz: torch.Tensor,
    image: torch.Tensor,
    weight: torch.Tensor,
    pre_norm: Norm | None,
    pre_mean: torch.Tensor | None,
    pre_rstd: torch.Tensor | None,
    patch_size: tuple[int, int],
    patch_order: str,
) -> torch.Tensor:
    dimage = torch.empty_like(image, memory_format=torch.contiguous_format)
    layout = patch_layout(dimage, patch_size, patch_order)  # not the layout of the image, which may be channels_last
    n_rows, dim = dz.shape[0] * dz.shape[1], dz.shape[2]
    target = target_of(image.device)
    precision = input_precision(weight.dtype, target)
    config = pick_patch_embed_bwd_image(n_rows, dim, layout.patch_dim, weight.dtype, target, precision)
    dimage_args = {"dimage_ptr": dimage, **image_strides(dimage, "stride_d"), **layout.constants}
    dimage_args |= {"n_rows": n_rows, "n_patches": layout.n_patches, "grid_w": layout.grid_w}
    launch(
        patch_embed_bwd_image_kernel,
        (cdiv(n_rows, config.block_m) * cdiv(layout.patch_dim, config.block_n),),
        image,
        **dimage_args,
        dz_ptr=dz,
        weight_ptr=layout.from_weight(weight),
        stride_zb=dz.stride(0),
        stride_zm=dz.stride(1),
        stride_zn=dz.stride(2),
        dim=dim,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_n,
        BLOCK_N=config.block_k,
        GROUP=config.group,
        **config.options,
    )
    if pre_norm is not None:
        rows = pick_layer_norm(layout.patch_dim, target)
        launch(
            patch_embed_bwd_norm_kernel,
            (cdiv(n_rows, rows.block_m),),
            image,
            **dimage_args,
            image_ptr=image,
            **image_strides(image),
            pre_weight_ptr=layout.from_weight(pre_norm[0]),
            pre_mean_ptr=pre_mean,
            pre_rstd_ptr=pre_rstd,
            BLOCK_M=rows.block_m,
            BLOCK_K=rows.block_d,
            num_warps=rows.num_warps,
        )
    return dimage
