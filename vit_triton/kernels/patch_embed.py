"""Patch embedding: image (B, C, H, W) -> tokens (B, prefix + patches, dim) with no unfolded copy of the image.

    a = patch m of the image, flattened                     u = (a - mean_m) * rstd_m * g + b      (pre_norm)
    z = u @ weight.T + bias                                 tokens = post_norm(z) + pos            (behind the prefix)

Without the norms u = a and tokens = z + pos. A patch is read where it lies: the element (row m, column k) of the
matrix a has the address rows[m] + columns[k], a sum, so that any strides do: channels_last, a crop, an expanded
image. Columns are walked in the order in which the image lies in memory, not in the weight's: it is the weight, which
is small, that is reordered. uint8 images become (a / 255 - mean_c) / std_c in the load.
(Dosovitskiy et al.: An Image is Worth 16x16 Words, arXiv:2010.11929.)

Backward saves the image, z where there is a post_norm, and the statistics of both norms. With xhat the patches
normalised but without g and b, and G = dz.T @ xhat, the gradients of pre_norm follow without du ever existing:

    dbias = sum of dz,   dweight = G * g + dbias b.T,   dg = column sums of weight * G,   db = weight.T @ dbias

The gradient of the image, dz @ weight, goes straight into the image's layout: patches do not overlap.
"""

import functools

import torch
import triton
import triton.language as tl

from vit_triton.kernels._config import (
    cdiv,
    architecture,
    check_layer_norm_width,
    pick_layer_norm,
    pick_patch_embed_bwd_image,
    pick_patch_embed_bwd_weight,
    pick_patch_embed_fwd,
)
from vit_triton.kernels._launch import TRITON_DTYPE, input_precision, launch, side_by_side
from vit_triton.kernels._patches import (
    PatchLayout,
    channel_of,
    column_offsets,
    image_strides,
    load_patches,
    patch_layout,
    row_offsets,
    token_offsets,
)
from vit_triton.kernels._tiles import grouped_tile
from vit_triton.kernels.layer_norm import layer_norm_bwd

Norm = tuple[torch.Tensor | None, torch.Tensor | None, float]


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


# --- forward -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows"])
def patch_embed_statistics_kernel(
    image_ptr, mean_ptr, std_ptr, pre_mean_ptr, pre_rstd_ptr,
    stride_ib, stride_ic, stride_ih, stride_iw,
    n_rows, n_patches, grid_w, eps,
    C: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of BLOCK_M patches, each held whole."""
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
    mean = tl.sum(a, axis=1) / K
    centred = tl.where(mask, a - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / K + eps)
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
    """One tile of out = u @ weight.T + bias + pos: patches by features."""
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
        # columns beyond K may hold anything finite: the weight is 0 there
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
def patch_embed_norm_kernel(
    z_ptr, weight_ptr, bias_ptr, pos_ptr, out_ptr, post_mean_ptr, post_rstd_ptr,
    stride_ob,
    n_rows, n_patches, dim, eps,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of tokens = layer_norm(z) + pos."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < n_rows
    mask_d = offs_d < dim
    mask = mask_m[:, None] & mask_d[None, :]
    z = tl.load(z_ptr + offs_m.to(tl.int64)[:, None] * dim + offs_d[None, :], mask=mask, other=0.0)
    z = z.to(tl.float32)  # [BLOCK_M, BLOCK_D]
    mean = tl.sum(z, axis=1) / dim
    centred = tl.where(mask_d[None, :], z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / dim + eps)
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
    """The widest dtype of what makes a token: under autocast the product is 16 bits, norm and positions are float32."""
    parts = (weight, pos, prefix, post_norm[0] if post_norm else None)
    return functools.reduce(torch.promote_types, (x.dtype for x in parts if x is not None))


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
    """Embed an image (B, C, H, W), any strides -> tokens, and with ``save`` z, pre_mean, pre_rstd, post_mean, post_rstd.

    weight (dim, patch_dim) has its columns in ``patch_order``, "p1 p2 c" or "c p1 p2"; bias (dim,), pos (patches, dim),
    prefix (n, dim); pre_norm and post_norm are (weight, bias, eps) over patch_dim and dim. z (B * patches, dim) has the
    weight's dtype, in which the product is taken; tokens (B, n + patches, dim) have :func:`token_dtype`; statistics
    (B * patches,) are float32. A uint8 image needs mean and std (C,), float32, on the scale 0 to 1; others take none.
    ``arranged``: the weight once more, with its columns in the image's order, and then that is read.
    z is None without post_norm, the statistics are None without their norm. The image divides into patches.
    """
    layout = patch_layout(image, patch_size, patch_order)
    batch, dim, n_patches = image.shape[0], weight.shape[0], layout.n_patches
    n_rows = batch * n_patches
    n_prefix = 0 if prefix is None else prefix.shape[0]
    arch = architecture(image.device)
    tokens = weight.new_empty((batch, n_prefix + n_patches, dim), dtype=token_dtype(weight, pos, prefix, post_norm))
    if prefix is not None:
        tokens[:, :n_prefix] = prefix
    behind_prefix = tokens[:, n_prefix:]
    image_args = {"image_ptr": image, **image_strides(image), **layout.constants}
    image_args |= {"mean_ptr": _contiguous(mean), "std_ptr": _contiguous(std)}
    image_args |= {"n_rows": n_rows, "n_patches": n_patches, "grid_w": layout.grid_w}

    pre_weight = pre_bias = pre_mean = pre_rstd = None
    if pre_norm is not None:
        check_layer_norm_width(layout.patch_dim)
        pre_weight, pre_bias = layout.from_weight(pre_norm[0]), layout.from_weight(pre_norm[1])
        pre_mean, pre_rstd = (image.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
        rows = pick_layer_norm(layout.patch_dim, arch)
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

    z = None if post_norm is None else weight.new_empty((n_rows, dim))
    out = behind_prefix if z is None else z.view(batch, n_patches, dim)
    precision = input_precision(weight.dtype, arch)
    config = pick_patch_embed_fwd(n_rows, dim, layout.patch_dim, weight.dtype, arch, precision)
    launch(
        patch_embed_fwd_kernel,
        (cdiv(n_rows, config.rows) * cdiv(dim, config.cols),),
        image,
        **image_args,
        weight_ptr=layout.from_weight(weight) if arranged is None else arranged,
        bias_ptr=_contiguous(bias),
        pos_ptr=_contiguous(pos) if post_norm is None else None,
        pre_weight_ptr=pre_weight,
        pre_bias_ptr=pre_bias,
        pre_mean_ptr=pre_mean,
        pre_rstd_ptr=pre_rstd,
        out_ptr=out,
        stride_ob=out.stride(0),
        dim=dim,
        PRECISION=precision,
        BLOCK_M=config.rows,
        BLOCK_N=config.cols,
        BLOCK_K=config.depth,
        GROUP=config.group,
        **config.options,
    )

    post_mean = post_rstd = None
    if post_norm is not None:
        check_layer_norm_width(dim)
        if save:
            post_mean, post_rstd = (image.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
        rows = pick_layer_norm(dim, arch)
        launch(
            patch_embed_norm_kernel,
            (cdiv(n_rows, rows.block_m),),
            image,
            z_ptr=z,
            weight_ptr=_contiguous(post_norm[0]),
            bias_ptr=_contiguous(post_norm[1]),
            pos_ptr=_contiguous(pos),
            out_ptr=behind_prefix,
            post_mean_ptr=post_mean,
            post_rstd_ptr=post_rstd,
            stride_ob=behind_prefix.stride(0),
            n_rows=n_rows,
            n_patches=n_patches,
            dim=dim,
            eps=post_norm[2],
            BLOCK_M=rows.block_m,
            BLOCK_D=rows.block_d,
            num_warps=rows.num_warps,
        )
    if not save:
        return tokens, None, None, None, None, None
    return tokens, z, pre_mean, pre_rstd, post_mean, post_rstd


# --- backward ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows"])
def patch_embed_bwd_weight_kernel(
    dz_ptr, image_ptr, pre_mean_ptr, pre_rstd_ptr, mean_ptr, std_ptr, dweight_ptr, dbias_ptr,
    stride_ib, stride_ic, stride_ih, stride_iw, stride_zb, stride_zm, stride_zn,
    n_rows, n_patches, grid_w, dim,
    C: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of G = dz.T @ xhat over one of SPLIT stretches of rows; the tiles of the first column sum dz too."""
    K: tl.constexpr = C * PATCH_H * PATCH_W
    n_tiles = tl.cdiv(dim, BLOCK_N) * tl.cdiv(K, BLOCK_K)
    part = tl.program_id(0) // n_tiles
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
    stretch = tl.cdiv(tl.cdiv(n_rows, BLOCK_M), SPLIT) * BLOCK_M
    for m in range(part * stretch, min((part + 1) * stretch, n_rows), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < n_rows
        dz_rows = token_offsets(offs_m, n_patches, stride_zb, stride_zm)
        dz_ptrs = dz_ptr + dz_rows[:, None] + dz_columns[None, :]
        dz = tl.load(dz_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        rows = row_offsets(offs_m, n_patches, grid_w, stride_ib, stride_ih, stride_iw, PATCH_H, PATCH_W)
        mask = mask_m[:, None] & mask_k[None, :]
        # rows beyond the last may hold anything finite: dz is 0 there
        a = load_patches(image_ptr + rows[:, None] + columns[None, :], mask, mean_ptr, std_ptr, channel, mask_k)
        if pre_mean_ptr is not None:
            pre_mean = tl.load(pre_mean_ptr + offs_m, mask=mask_m, other=0.0)
            pre_rstd = tl.load(pre_rstd_ptr + offs_m, mask=mask_m, other=0.0)
            a = (a.to(tl.float32) - pre_mean[:, None]) * pre_rstd[:, None]
        dweight = tl.dot(tl.trans(dz.to(DTYPE)), a.to(DTYPE), dweight, input_precision=PRECISION)
        if pid_k == 0:
            dbias += tl.sum(dz.to(tl.float32), axis=0)

    first = part.to(tl.int64) * dim  # parts are stacked
    dweight_ptrs = dweight_ptr + (first + offs_n)[:, None] * K + offs_k[None, :]
    tl.store(dweight_ptrs, dweight, mask=mask_n[:, None] & mask_k[None, :])
    if pid_k == 0:
        tl.store(dbias_ptr + first + offs_n, dbias, mask=mask_n)


@triton.jit(do_not_specialize=["n_rows"])
def patch_embed_bwd_image_kernel(
    dz_ptr, weight_ptr, dimage_ptr,
    stride_zb, stride_zm, stride_zn, stride_db, stride_dc, stride_dh, stride_dw,
    n_rows, n_patches, grid_w, dim,
    C: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of du = dz @ weight, stored where the patches lie."""
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
    """Turn du, which lies in dimage, into the gradient of BLOCK_M patches before pre_norm, in place."""
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
    along_ones = tl.sum(grad, axis=1) / K
    along_xhat = tl.sum(grad * xhat, axis=1) / K
    grad = (grad - along_ones[:, None] - xhat * along_xhat[:, None]) * rstd[:, None]
    tl.store(dimage_ptrs, grad.to(dimage_ptr.dtype.element_ty), mask=mask)


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

    dtokens (B, n + patches, dim) with any strides; z and the statistics are what the forward pass returned. dimage is
    contiguous, in the image's dtype, and None unless ``needs_image``; the gradients of a norm have its weight's dtype
    and are both None without one; all others have the weight's dtype. dpos (patches, dim) and dprefix (n, dim) are
    sums over the batch, made whether or not there was a pos.
    """
    layout = patch_layout(image, patch_size, patch_order)
    dtype = weight.dtype
    n_prefix = dtokens.shape[1] - layout.n_patches
    dtokens = side_by_side(dtokens)
    dz = dtokens[:, n_prefix:]
    dpost_weight = dpost_bias = None
    if post_norm is not None:
        assert z is not None and post_mean is not None and post_rstd is not None
        dz, dpost_weight, dpost_bias = layer_norm_bwd(dz, z, post_norm[0], post_mean, post_rstd)
        dz = dz.view(-1, layout.n_patches, weight.shape[0])
    if pre_norm is None:
        pre_mean = pre_rstd = None

    grad, dbias = _bwd_weight(dz, image, pre_mean, pre_rstd, mean, std, layout, dtype)
    dpre_weight = dpre_bias = None
    if pre_norm is not None:
        pre_weight, pre_bias, _ = pre_norm
        if pre_weight is not None:
            # elementwise, in float32 and in this order: a matrix product would follow the TF32 switch
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
    """G (dim, patch_dim), its columns in the weight's order, and the sum of dz (dim,), in float32."""
    dim, n_rows = dz.shape[2], dz.shape[0] * dz.shape[1]
    arch = architecture(image.device)
    precision = input_precision(dtype, arch)
    config = pick_patch_embed_bwd_weight(n_rows, dim, layout.patch_dim, dtype, arch, precision)
    grads = image.new_empty((config.split, dim, layout.patch_dim), dtype=torch.float32)
    dbiases = image.new_empty((config.split, dim), dtype=torch.float32)
    launch(
        patch_embed_bwd_weight_kernel,
        (cdiv(dim, config.rows) * cdiv(layout.patch_dim, config.cols) * config.split,),
        image,
        dz_ptr=dz,
        image_ptr=image,
        pre_mean_ptr=pre_mean,
        pre_rstd_ptr=pre_rstd,
        mean_ptr=_contiguous(mean),
        std_ptr=_contiguous(std),
        dweight_ptr=grads,
        dbias_ptr=dbiases,
        **image_strides(image),
        stride_zb=dz.stride(0),
        stride_zm=dz.stride(1),
        stride_zn=dz.stride(2),
        n_rows=n_rows,
        n_patches=layout.n_patches,
        grid_w=layout.grid_w,
        dim=dim,
        **layout.constants,
        DTYPE=TRITON_DTYPE[dtype],
        PRECISION=precision,
        SPLIT=config.split,
        BLOCK_N=config.rows,
        BLOCK_K=config.cols,
        BLOCK_M=config.depth,
        GROUP=config.group,
        **config.options,
    )
    return layout.to_weight(grads.sum(0)), dbiases.sum(0)


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
    layout = patch_layout(dimage, patch_size, patch_order)  # the gradient's own: an image may be channels_last
    n_rows, dim = dz.shape[0] * dz.shape[1], dz.shape[2]
    arch = architecture(image.device)
    precision = input_precision(weight.dtype, arch)
    config = pick_patch_embed_bwd_image(n_rows, dim, layout.patch_dim, weight.dtype, arch, precision)
    dimage_args = {"dimage_ptr": dimage, **image_strides(dimage, "stride_d"), **layout.constants}
    dimage_args |= {"n_rows": n_rows, "n_patches": layout.n_patches, "grid_w": layout.grid_w}
    launch(
        patch_embed_bwd_image_kernel,
        (cdiv(n_rows, config.rows) * cdiv(layout.patch_dim, config.cols),),
        image,
        **dimage_args,
        dz_ptr=dz,
        weight_ptr=layout.from_weight(weight),
        stride_zb=dz.stride(0),
        stride_zm=dz.stride(1),
        stride_zn=dz.stride(2),
        dim=dim,
        PRECISION=precision,
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        BLOCK_N=config.depth,
        GROUP=config.group,
        **config.options,
    )
    if pre_norm is not None:
        rows = pick_layer_norm(layout.patch_dim, arch)
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
