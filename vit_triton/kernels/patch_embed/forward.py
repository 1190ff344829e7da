"""Patch embedding: image (B, C, H, W) -> tokens (B, prefix + patches, dim) without an unfolded copy of the image.

    a = patch m of the image, flattened                     u = (a - mean_m) * rstd_m * g + b      (pre_norm)
    z = u @ weight.T + bias                                 tokens = post_norm(z) + pos      (after the prefix tokens)

Without the norms u = a and tokens = z + pos. Patches are read in place: element (row m, column k) of a has the address
rows[m] + columns[k], which supports any strides (channels_last, a crop, an expanded image). Columns follow the memory
order of the image; if the weight's order differs, the weight, which is small, is reordered. uint8 images are converted
to (a / 255 - mean_c) / std_c on load. (Dosovitskiy et al.: An Image is Worth 16x16 Words, arXiv:2010.11929.)

Where the target prefers the vendor's GEMM, u is written to memory, in the weight's column order, and multiplied there.

The backward pass saves the image, z with a post_norm, and the statistics of both norms. With xhat = (a - mean_m) *
rstd_m and G = dz.T @ xhat, the gradients of pre_norm do not need du:

    dbias = sum of dz,   dweight = G * g + dbias b.T,   dg = column sums of weight * G,   db = weight.T @ dbias

The gradient of the image, dz @ weight, is stored in the image's layout, because patches do not overlap.
"""

import functools

import torch
import triton
import triton.language as tl

from vit_triton.arguments import Norm
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import contiguous, input_precision, launch
from vit_triton.kernels.linear.config import Epilogue, prefers_vendor
from vit_triton.kernels.norm.config import MAX_LAYER_NORM_WIDTH, check_layer_norm_width, pick_layer_norm
from vit_triton.kernels.norm.statistics import row_statistics
from vit_triton.kernels.patch_embed.config import pick_patch_embed_fwd
from vit_triton.kernels.patch_embed.patches import (
    PatchLayout,
    channel_of,
    column_offsets,
    image_arguments,
    load_patches,
    patch_layout,
    row_offsets,
    token_offsets,
)
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.tiles import grouped_tile


@triton.jit(do_not_specialize=["n_rows"])
def patch_embed_statistics_kernel(
    image_ptr, mean_ptr, std_ptr, pre_mean_ptr, pre_rstd_ptr,
    stride_ib, stride_ic, stride_ih, stride_iw,
    n_rows, n_patches, grid_w, eps,
    C: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of BLOCK_M whole patches."""
    K: tl.constexpr = C * PATCH_H * PATCH_W
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < n_rows
    mask_k = offs_k < K
    rows = row_offsets(offs_m, n_patches, grid_w, stride_ib, stride_ih, stride_iw, PATCH_H, PATCH_W)
    columns = column_offsets(offs_k, stride_ic, stride_ih, stride_iw, C, PATCH_H, PATCH_W, CHANNELS_LAST)
    channel = channel_of(offs_k, C, PATCH_H, PATCH_W, CHANNELS_LAST)
    mask = mask_m[:, None] & mask_k[None, :]
    a = load_patches(image_ptr + rows[:, None] + columns[None, :], mask, mean_ptr, std_ptr, channel, mask_k)
    a = tl.where(mask, a.to(tl.float32), 0.0)  # [BLOCK_M, BLOCK_K]; a masked byte is -mean / std, not 0
    mean, _, rstd = row_statistics(a, mask, K, eps)
    tl.store(pre_mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(pre_rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit(do_not_specialize=["n_rows"])
def patch_embed_fwd_kernel(
    image_ptr, weight_ptr, bias_ptr, pos_ptr, pre_weight_ptr, pre_bias_ptr, pre_mean_ptr, pre_rstd_ptr, mean_ptr,
    std_ptr, out_ptr,
    stride_ib, stride_ic, stride_ih, stride_iw, stride_ob,
    n_rows, n_patches, grid_w, dim,
    C: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile (patches x features) of out = u @ weight.T + bias + pos."""
    K: tl.constexpr = C * PATCH_H * PATCH_W
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(dim, BLOCK_N), GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < n_rows
    mask_n = offs_n < dim
    rows = row_offsets(offs_m, n_patches, grid_w, stride_ib, stride_ih, stride_iw, PATCH_H, PATCH_W)
    if pre_mean_ptr is not None:
        pre_mean = tl.load(pre_mean_ptr + offs_m, mask=mask_m, other=0.0)
        pre_rstd = tl.load(pre_rstd_ptr + offs_m, mask=mask_m, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        columns = column_offsets(offs_k, stride_ic, stride_ih, stride_iw, C, PATCH_H, PATCH_W, CHANNELS_LAST)
        channel = channel_of(offs_k, C, PATCH_H, PATCH_W, CHANNELS_LAST)
        mask = mask_m[:, None] & mask_k[None, :]
        a = load_patches(image_ptr + rows[:, None] + columns[None, :], mask, mean_ptr, std_ptr, channel, mask_k)
        if pre_mean_ptr is not None:
            a = (a.to(tl.float32) - pre_mean[:, None]) * pre_rstd[:, None]
            if pre_weight_ptr is not None:
                a *= tl.load(pre_weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
            if pre_bias_ptr is not None:
                a += tl.load(pre_bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        # past K, a is finite and the weight is 0
        weight_ptrs = weight_ptr + offs_n.to(tl.int64)[None, :] * K + offs_k[:, None]
        w = tl.load(weight_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a.to(dtype), w, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if pos_ptr is not None:
        pos_ptrs = pos_ptr + (offs_m % n_patches).to(tl.int64)[:, None] * dim + offs_n[None, :]
        acc += tl.load(pos_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + token_offsets(offs_m, n_patches, stride_ob, dim)[:, None] + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def patch_embed_gather_kernel(
    image_ptr, pre_weight_ptr, pre_bias_ptr, pre_mean_ptr, pre_rstd_ptr, mean_ptr, std_ptr, out_ptr,
    stride_ib, stride_ic, stride_ih, stride_iw,
    n_rows, n_patches, grid_w,
    C: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of u; CHANNELS_LAST is the order of its columns."""
    K: tl.constexpr = C * PATCH_H * PATCH_W
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < n_rows
    mask_k = offs_k < K
    rows = row_offsets(offs_m, n_patches, grid_w, stride_ib, stride_ih, stride_iw, PATCH_H, PATCH_W)
    columns = column_offsets(offs_k, stride_ic, stride_ih, stride_iw, C, PATCH_H, PATCH_W, CHANNELS_LAST)
    channel = channel_of(offs_k, C, PATCH_H, PATCH_W, CHANNELS_LAST)
    mask = mask_m[:, None] & mask_k[None, :]
    u = load_patches(image_ptr + rows[:, None] + columns[None, :], mask, mean_ptr, std_ptr, channel, mask_k)
    u = u.to(tl.float32)  # [BLOCK_M, BLOCK_K]
    if pre_mean_ptr is not None:
        pre_mean = tl.load(pre_mean_ptr + offs_m, mask=mask_m, other=0.0)
        pre_rstd = tl.load(pre_rstd_ptr + offs_m, mask=mask_m, other=0.0)
        u = (u - pre_mean[:, None]) * pre_rstd[:, None]
    if pre_weight_ptr is not None:
        u *= tl.load(pre_weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    if pre_bias_ptr is not None:
        u += tl.load(pre_bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(out_ptrs, u.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def patch_embed_norm_kernel(
    z_ptr, weight_ptr, bias_ptr, pos_ptr, out_ptr, post_mean_ptr, post_rstd_ptr,
    stride_ob,
    n_rows, n_patches, dim, eps,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr = True,
):  # fmt: skip
    """BLOCK_M rows of tokens = layer_norm(z) + pos, without NORM z + pos."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < n_rows
    mask_d = offs_d < dim
    mask = mask_m[:, None] & mask_d[None, :]
    z = tl.load(z_ptr + offs_m.to(tl.int64)[:, None] * dim + offs_d[None, :], mask=mask, other=0.0)
    z = z.to(tl.float32)  # [BLOCK_M, BLOCK_D]
    y = z
    if NORM:
        mean, centred, rstd = row_statistics(z, mask_d[None, :], dim, eps)
        y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if pos_ptr is not None:
        pos_ptrs = pos_ptr + (offs_m % n_patches).to(tl.int64)[:, None] * dim + offs_d[None, :]
        y += tl.load(pos_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + token_offsets(offs_m, n_patches, stride_ob, dim)[:, None] + offs_d[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
    if post_mean_ptr is not None:
        tl.store(post_mean_ptr + offs_m, mean, mask=mask_m)
        tl.store(post_rstd_ptr + offs_m, rstd, mask=mask_m)


def token_dtype(
    weight: torch.Tensor, pos: torch.Tensor | None, prefix: torch.Tensor | None, post_norm: Norm | None
) -> torch.dtype:
    """The widest dtype of the tensors that tokens are computed from; under autocast they differ."""
    parts = (weight, pos, prefix, post_norm[0] if post_norm else None)
    return functools.reduce(torch.promote_types, (x.dtype for x in parts if x is not None))


def gather_patches(
    image: torch.Tensor,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    layout: PatchLayout,
    dtype: torch.dtype,
    pre_norm: tuple[torch.Tensor | None, torch.Tensor | None],
    pre_mean: torch.Tensor | None,
    pre_rstd: torch.Tensor | None,
) -> torch.Tensor:
    """The normalised patches (B * patches, patch_dim) with their columns in the weight's order; ``pre_norm`` is a
    weight and a bias, mean and rstd are None without a norm."""
    image_args = image_arguments(image, mean, std, layout)
    patches = image.new_empty((image_args["n_rows"], layout.patch_dim), dtype=dtype)
    rows = pick_layer_norm(layout.patch_dim, target_of(image.device))
    launch(
        patch_embed_gather_kernel,
        (cdiv(len(patches), rows.block_m),),
        image,
        **image_args | {"CHANNELS_LAST": layout.weight_order == "p1 p2 c"},
        pre_weight_ptr=contiguous(pre_norm[0]),
        pre_bias_ptr=contiguous(pre_norm[1]),
        pre_mean_ptr=pre_mean,
        pre_rstd_ptr=pre_rstd,
        out_ptr=patches,
        BLOCK_M=rows.block_m,
        BLOCK_K=rows.block_d,
        num_warps=rows.num_warps,
    )
    return patches


def patch_embed_fwd(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pos: torch.Tensor | None,
    prefix: torch.Tensor | None,
    pre_norm: Norm | None,
    post_norm: Norm | None,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    *,
    patch_size: tuple[int, int],
    patch_order: str,
    arranged: torch.Tensor | None = None,
    save: bool = True,
) -> tuple[
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]:
    """Embed an image (B, C, H, W), any strides -> tokens, and with ``save`` z, pre_mean, pre_rstd, post_mean,
    post_rstd.

    weight (dim, patch_dim) has its columns in ``patch_order``, "p1 p2 c" or "c p1 p2"; bias (dim,), pos (patches, dim),
    prefix (n, dim); pre_norm and post_norm are (weight, bias, eps) over patch_dim and dim. z (B * patches, dim) has the
    weight's dtype, the dtype of the GEMM; tokens (B, n + patches, dim) have :func:`token_dtype`; statistics (B *
    patches,) are float32. A uint8 image requires float32 mean and std (C,), on the scale 0 to 1; other dtypes take
    none. ``arranged``: the weight with its columns in the image's order, read instead of ``weight``. z is None without
    post_norm, statistics are None without their norm. The image size must be divisible by the patch size.
    """
    layout = patch_layout(image, patch_size, patch_order)
    batch, dim, n_patches = image.shape[0], weight.shape[0], layout.n_patches
    n_rows = batch * n_patches
    n_prefix = 0 if prefix is None else prefix.shape[0]
    target = target_of(image.device)
    tokens = weight.new_empty((batch, n_prefix + n_patches, dim), dtype=token_dtype(weight, pos, prefix, post_norm))
    if prefix is not None:
        tokens[:, :n_prefix] = prefix
    behind_prefix = tokens[:, n_prefix:]
    image_args = image_arguments(image, mean, std, layout)

    pre_weight = pre_bias = pre_mean = pre_rstd = None
    if pre_norm is not None:
        check_layer_norm_width(layout.patch_dim)
        pre_weight, pre_bias = layout.from_weight(pre_norm[0]), layout.from_weight(pre_norm[1])
        pre_mean, pre_rstd = (image.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
        rows = pick_layer_norm(layout.patch_dim, target)
        launch(
            patch_embed_statistics_kernel,
            (cdiv(n_rows, rows.block_m),),
            image,
            **image_args,
            pre_mean_ptr=pre_mean,
            pre_rstd_ptr=pre_rstd,
            eps=pre_norm[2],
            BLOCK_M=rows.block_m,
            BLOCK_K=rows.block_d,
            num_warps=rows.num_warps,
        )

    z: torch.Tensor | None
    fits = max(layout.patch_dim, dim) <= MAX_LAYER_NORM_WIDTH  # a program holds a whole row
    vendor = fits and prefers_vendor("patches", weight.dtype, target, Epilogue.NONE)
    if vendor:
        norm = pre_norm[:2] if pre_norm else (None, None)
        patches = gather_patches(image, mean, std, layout, weight.dtype, norm, pre_mean, pre_rstd)
        z = torch.mm(patches, weight.T) if bias is None else torch.addmm(bias.to(weight.dtype), patches, weight.T)
        del patches
    else:
        z = None if post_norm is None else weight.new_empty((n_rows, dim))
        out = behind_prefix if z is None else z.view(batch, n_patches, dim)
        precision = input_precision(weight.dtype, target)
        config = pick_patch_embed_fwd(n_rows, dim, layout.patch_dim, weight.dtype, target, precision)
        launch(
            patch_embed_fwd_kernel,
            (cdiv(n_rows, config.block_m) * cdiv(dim, config.block_n),),
            image,
            **image_args,
            weight_ptr=layout.from_weight(weight) if arranged is None else arranged,
            bias_ptr=contiguous(bias),
            pos_ptr=contiguous(pos) if post_norm is None else None,
            pre_weight_ptr=pre_weight,
            pre_bias_ptr=pre_bias,
            pre_mean_ptr=pre_mean,
            pre_rstd_ptr=pre_rstd,
            out_ptr=out,
            stride_ob=out.stride(0),
            dim=dim,
            PRECISION=precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP=config.group,
            **config.options,
        )

    post_mean = post_rstd = None
    if post_norm is not None or vendor:
        check_layer_norm_width(dim)
        if save and post_norm is not None:
            post_mean, post_rstd = (image.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
        rows = pick_layer_norm(dim, target)
        launch(
            patch_embed_norm_kernel,
            (cdiv(n_rows, rows.block_m),),
            image,
            z_ptr=z,
            weight_ptr=contiguous(post_norm[0]) if post_norm else None,
            bias_ptr=contiguous(post_norm[1]) if post_norm else None,
            pos_ptr=contiguous(pos),
            out_ptr=behind_prefix,
            post_mean_ptr=post_mean,
            post_rstd_ptr=post_rstd,
            stride_ob=behind_prefix.stride(0),
            n_rows=n_rows,
            n_patches=n_patches,
            dim=dim,
            eps=post_norm[2] if post_norm else 0.0,
            BLOCK_M=rows.block_m,
            BLOCK_D=rows.block_d,
            NORM=post_norm is not None,
            num_warps=rows.num_warps,
        )
    if not save:
        return tokens, None, None, None, None, None
    if post_norm is None:
        z = None
    return tokens, z, pre_mean, pre_rstd, post_mean, post_rstd
