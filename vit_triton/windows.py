"""Attention in windows of feature maps of any size (Liu et al. 2021, arXiv:2103.14030): padding and shift."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as torch_F
from torch import Tensor

from vit_triton import functional as F
from vit_triton.recording import active_recorder

__all__ = ["attend_windows", "fit_windows", "pad_map"]


def fit_windows(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], *, drops_shift: bool = True
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the padding of a map of H x W tokens at the bottom and the right, and the shift.

    Args:
        drops_shift: no shift on an axis that one window covers, as in torchvision.
    """
    (height, width), (h, w), (y, x) = size, window, shift
    pads = -height % h, -width % w
    if drops_shift:
        y, x = 0 if height <= h else y, 0 if width <= w else x
    return pads, (y, x)


def pad_map(x: Tensor, pads: tuple[int, int]) -> Tensor:
    """Pad (B, H, W, C) with zeros at the bottom and the right. Padded tokens take part in attention: pad behind a norm,
    in front of the projection."""
    return torch_F.pad(x, (0, 0, 0, pads[1], 0, pads[0]))


def attend_windows(
    qkv: Tensor,
    table: Tensor,
    size: tuple[int, int],
    *,
    heads: int,
    window: tuple[int, int],
    backend: str | None,
    dropout_p: float,
    **options: Any,
) -> Tensor:
    """Compute attention of a projected, padded map: (B, H', W', 3 * C) -> (B, H, W, C).

    Args:
        table: the table of :func:`vit_triton.functional.relative_position_bias`.
        size: H and W, without padding.
        options: ``shift``, ``logit_scale`` and others of :func:`vit_triton.functional.window_attention`.
    """
    qkv = qkv.unflatten(-1, (3, heads, -1))
    bias = F.relative_position_bias(table, window, backend=backend)
    recorder = active_recorder()
    if recorder is not None:
        recorder.windows(qkv, bias, size, window=window, **options)
    out = F.window_attention(qkv, bias, window=window, dropout_p=dropout_p, backend=backend, **options)
    return out[:, : size[0], : size[1]].flatten(-2)
