"""Resampling of patch embeddings to another patch size or number of channels, as in timm.

The kernel is multiplied by the pseudo-inverse of the resize matrix, so that its outputs for resized patches are as
close as possible to those for the original patches (Beyer et al. 2023, arXiv:2212.08013, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vit_triton.weights.positions import pair

__all__ = ["adapt_channels", "fit_patches", "patch_of", "resample_kernel"]

MAX_SIDE = 1024  # of a patch, in pixels; a side x side matrix is inverted


def resample_kernel(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample (dim, rows, columns, channels) to rows and columns of `size`, in the same dtype."""
    dim, *old, channels = kernel.shape
    if kernel.is_meta:
        return kernel.new_empty(dim, *size, channels)
    resampled = kernel.double()
    for axis, was, side in zip((1, 2), old, size, strict=True):
        if was != side:
            basis = torch.eye(was, dtype=torch.float64, device=kernel.device)[None, None]
            resized = nn.functional.interpolate(basis, size=(was, side), mode="bicubic", antialias=True)[0, 0]
            resampled = (resampled.movedim(axis, -1) @ torch.linalg.pinv(resized.T)).movedim(-1, axis)
    return resampled.to(kernel.dtype)


def adapt_channels(kernel: Tensor, channels: int) -> Tensor | None:
    """Convert (dim, rows, columns, channels) to `channels`, or return None if timm does not support it.

    For one channel, up to three channels are summed. Otherwise three channels are repeated and scaled by 3 / channels.
    """
    old = kernel.shape[-1]
    if old == channels:
        return kernel
    if channels == 1 and old <= 3:
        return kernel.float().sum(-1, keepdim=True).to(kernel.dtype)
    if old != 3:
        return None
    repeated = kernel.float().repeat(1, 1, 1, -(-channels // 3))[..., :channels]
    return (repeated * (3 / channels)).to(kernel.dtype)


def patch_of(model: nn.Module) -> tuple[int, int] | None:
    """Return rows and columns of a patch of `model`, or None if no module has them as an attribute."""
    for module in model.modules():
        axes = getattr(module, "axes_lengths", None)  # einops' Rearrange in vit_pytorch
        axes = axes if isinstance(axes, Mapping) else {}
        size = pair(getattr(module, "patch_size", None)) or pair((axes.get("p1"), axes.get("p2")))
        if size is not None:
            return size
    return None


def fit_patches(file: dict[str, Tensor], model: dict[str, Tensor], patch: tuple[int, int] | None) -> str | None:
    """Convert ``patch.weight`` of the file to the shape of the model; both dicts have common names.

    The parameters of a norm before the projection cannot be resampled; they are folded into the weight and bias.

    Args:
        patch: rows and columns of the model's patches, or None.

    Returns:
        The reason why it cannot be converted, or None. Shapes that differ without a reason are compared later.
    """
    weight, wanted = file.get("patch.weight"), model.get("patch.weight")
    if weight is None or wanted is None or len(weight) != len(wanted) or not {weight.dim(), wanted.dim()} <= {2, 4}:
        return None
    new_shapes = _shapes(wanted, patch, [3, 1])
    old_shapes = _shapes(weight, None, [shape[2] for shape in new_shapes] + [3, 1])
    if len(old_shapes) != 1 or len(new_shapes) != 1:
        whose = "file" if len(old_shapes) != 1 else "model"
        return f"rows, columns and channels of the {whose}'s patches are ambiguous"
    (old,), (new,) = old_shapes, new_shapes
    if old == new:
        return None
    if max(*old[:2], *new[:2]) > MAX_SIDE:
        return f"patches with sides above {MAX_SIDE} pixels are not resampled"
    kernel = weight.flatten(1)
    scale, shift = (file.get(f"patch.norm_in.{name}") for name in ("weight", "bias"))
    if scale is not None and shift is not None:
        bias, pixels = file.get("patch.bias"), math.prod(new)
        if bias is None or {scale.shape, shift.shape} != {kernel.shape[1:]} or bias.shape != kernel.shape[:1]:
            return None
        file["patch.bias"] = (bias + (kernel.double() @ shift.double())).to(bias.dtype)
        file["patch.norm_in.weight"], file["patch.norm_in.bias"] = scale.new_ones(pixels), shift.new_zeros(pixels)
        kernel = (kernel.double() * scale).to(weight.dtype)
    adapted = adapt_channels(kernel.unflatten(1, old), new[2])
    if adapted is None:
        return f"patches with {old[2]} channels are not resampled to {new[2]}"
    file["patch.weight"] = resample_kernel(adapted, new[:2]).reshape(wanted.shape)
    return None


def _shapes(weight: Tensor, patch: tuple[int, int] | None, channels: list[int]) -> set[tuple[int, int, int]]:
    """Return the possible (rows, columns, channels) of a weight (dim, pixels) or (dim, rows, columns, channels)."""
    if weight.dim() == 4:
        return {(weight.shape[1], weight.shape[2], weight.shape[3])}
    pixels = weight.shape[1]
    if patch is not None:
        rows, columns = patch
        return {(rows, columns, pixels // (rows * columns))} if pixels % (rows * columns) == 0 else set()
    sides = {n: math.isqrt(pixels // n) for n in channels}
    return {(side, side, n) for n, side in sides.items() if side * side * n == pixels}
