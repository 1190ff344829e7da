"""Addresses of the patches of an image in kernels, and the order of the values of a patch."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vit_triton.kernels.launch import contiguous


@triton.jit
def row_offsets(offs_m, n_patches, grid_w, stride_b, stride_h, stride_w, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """64-bit offset of the first element of each patch."""
    batch = offs_m // n_patches
    patch = offs_m - batch * n_patches
    grid_y = patch // grid_w
    y = grid_y * PATCH_H
    x = (patch - grid_y * grid_w) * PATCH_W
    return batch.to(tl.int64) * stride_b + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


@triton.jit
def token_offsets(offs_m, n_patches, stride_b, stride_m):
    """64-bit offset of row m of a (B, patches, dim) view."""
    batch = offs_m // n_patches
    return batch.to(tl.int64) * stride_b + (offs_m - batch * n_patches).to(tl.int64) * stride_m


@triton.jit
def channel_of(offs_k, C: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    return offs_k % C if CHANNELS_LAST else offs_k // (PATCH_H * PATCH_W)


@triton.jit
def column_offsets(
    offs_k,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """64-bit offset of each element of a patch from its first; all divisors are compile-time constants."""
    if CHANNELS_LAST:  # (p1 p2 c)
        x = offs_k // C % PATCH_W
        y = offs_k // (C * PATCH_W)
    else:  # (c p1 p2)
        x = offs_k % PATCH_W
        y = offs_k // PATCH_W % PATCH_H
    channel = channel_of(offs_k, C, PATCH_H, PATCH_W, CHANNELS_LAST)
    return channel.to(tl.int64) * stride_c + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


@triton.jit
def load_patches(ptrs, mask, mean_ptr, std_ptr, channel, mask_k):
    """Load a tile of patches; with mean and std as float32 (a / 255 - mean) / std, one multiply-add."""
    a = tl.load(ptrs, mask=mask, other=0)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + channel, mask=mask_k, other=0.0)
        std = tl.load(std_ptr + channel, mask=mask_k, other=1.0)
        a = a.to(tl.float32) * (1.0 / (255.0 * std))[None, :] - (mean / std)[None, :]
    return a


class PatchLayout(NamedTuple):
    """The patches of an image in its memory order, with conversions from and to the weight's column order."""

    channels: int
    patch_h: int
    patch_w: int
    grid_h: int
    grid_w: int
    order: str
    weight_order: str

    @property
    def n_patches(self) -> int:
        return self.grid_h * self.grid_w

    @property
    def patch_dim(self) -> int:
        return self.channels * self.patch_h * self.patch_w

    @property
    def constants(self) -> dict[str, int | bool]:
        return {
            "C": self.channels,
            "PATCH_H": self.patch_h,
            "PATCH_W": self.patch_w,
            "CHANNELS_LAST": self.order == "p1 p2 c",
        }

    def from_weight(self, columns: torch.Tensor | None) -> torch.Tensor | None:
        """(..., patch_dim) in the weight's order -> contiguous, in the image's order."""
        return None if columns is None else self._reordered(columns, self.weight_order, self.order)

    def to_weight(self, columns: torch.Tensor) -> torch.Tensor:
        """(..., patch_dim) in the image's order -> contiguous, in the weight's order."""
        return self._reordered(columns, self.order, self.weight_order)

    def _reordered(self, columns: torch.Tensor, source: str, target: str) -> torch.Tensor:
        if source == target:
            return columns.contiguous()
        if target == "c p1 p2":
            unflattened = columns.unflatten(-1, (self.patch_h, self.patch_w, self.channels)).movedim(-1, -3)
        else:
            unflattened = columns.unflatten(-1, (self.channels, self.patch_h, self.patch_w)).movedim(-3, -1)
        return unflattened.flatten(-3).contiguous()


def patch_layout(image: torch.Tensor, patch_size: tuple[int, int], weight_order: str) -> PatchLayout:
    _, channels, height, width = image.shape
    patch_h, patch_w = patch_size
    order = "p1 p2 c" if image.stride(1) < image.stride(3) else "c p1 p2"
    return PatchLayout(channels, patch_h, patch_w, height // patch_h, width // patch_w, order, weight_order)


def image_arguments(
    image: torch.Tensor, mean: torch.Tensor | None, std: torch.Tensor | None, layout: PatchLayout
) -> dict[str, Any]:
    """Arguments of the kernels that read all patches of an image."""
    return {
        "image_ptr": image,
        "mean_ptr": contiguous(mean),
        "std_ptr": contiguous(std),
        **image_strides(image),
        "n_rows": image.shape[0] * layout.n_patches,
        "n_patches": layout.n_patches,
        "grid_w": layout.grid_w,
        **layout.constants,
    }


def image_strides(image: torch.Tensor, prefix: str = "stride_i") -> dict[str, int]:
    return {prefix + axis: stride for axis, stride in zip("bchw", image.stride(), strict=True)}
