"""Blocks with attention in windows (Swin) in a form common to all libraries, and the functions that compute them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as torch_F
from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.checks import MAX_WINDOW_TOKENS
from vit_triton.integrations.parts import (
    Branch,
    MlpParts,
    Weight,
    check_head_size,
    check_input,
    check_map,
    check_rows,
    check_weight,
    feed_forward,
    layer_norm,
    linear,
    linear_of,
)
from vit_triton.integrations.recipes import UnsupportedModule
from vit_triton.windows import attend_windows, fit_windows, pad_map

__all__ = [
    "MergingParts",
    "WindowBlockParts",
    "WindowParts",
    "compute_merging",
    "compute_window_block",
    "cosine_of",
    "merging_weight",
    "window_of",
]


class WindowParts(NamedTuple):
    """Attention in windows: QKV projection, softmax attention, output projection."""

    heads: int
    window: tuple[int, int]
    shift: tuple[int, int]
    qkv_weight: Weight  # (3 * heads * head_dim, dim)
    qkv_bias: Tensor | None
    out_weight: Weight
    out_bias: Tensor | None
    table: Tensor  # the relative position bias, (offsets, heads)
    logit_scale: Tensor | None = None  # (heads,): cosine attention
    dropout_p: float = 0.0  # for the attention probabilities
    out_dropout_p: float = 0.0
    rolls_first: bool = False  # before padding, as timm; the others pad first
    drops_shift: bool = False  # on an axis that one window covers, as torchvision
    mask_value: float = -100.0  # added to the scores of tokens from different regions of a shifted map


class WindowBlockParts(NamedTuple):
    """A block of (B, H, W, dim). ``norms``: before the branches, or behind them with ``post_norm``; then stochastic
    depth runs as a module."""

    attention: WindowParts
    mlp: MlpParts
    norms: tuple[F.Norm, F.Norm]
    drop_path_p: tuple[float, float] = (0.0, 0.0)
    post_norm: bool = False
    drop_paths: tuple[nn.Module, nn.Module] | None = None


class MergingParts(NamedTuple):
    """Merge 2 x 2 tokens: norm and projection, or projection and norm with ``post_norm``."""

    weight: Weight
    norm: F.Norm
    post_norm: bool = False


def window_of(heads: int, window: Any, shift: Any, table: Tensor, width: int) -> dict[str, Any]:
    """Return heads, window, shift and table as arguments of :class:`WindowParts`.

    Raises:
        UnsupportedModule: The kernels do not support the window, or the table does not fit.
    """
    (h, w), (y, x) = (int(n) for n in window), (int(n) for n in shift)
    if h * w > MAX_WINDOW_TOKENS:
        raise UnsupportedModule(f"window of {h} x {w} tokens exceeds the maximum, {MAX_WINDOW_TOKENS} tokens")
    if not (0 <= y < h and 0 <= x < w):
        raise UnsupportedModule(f"shift {(y, x)} of a window of {h} x {w} tokens")
    check_head_size(width // heads)
    check_weight("relative_position_bias_table", table)
    if table.shape != ((2 * h - 1) * (2 * w - 1), heads):
        raise UnsupportedModule("the table of relative positions does not fit the window")
    return dict(heads=heads, window=(h, w), shift=(y, x), table=table)


def cosine_of(module: Any, mlp: nn.Module, heads: int) -> tuple[Tensor, Tensor]:
    """Return the table of the relative position bias and the logit scale of a Swin V2 attention."""
    table = 16 * torch.sigmoid(mlp(module.relative_coords_table).view(-1, heads))
    return table, module.logit_scale.clamp(max=math.log(100.0)).exp().flatten()


def attend(
    x: Tensor,
    parts: WindowParts,
    norm: F.Norm | None,
    backend: str | None,
    branch: Branch = Branch(),  # noqa: B008
) -> Tensor:
    """Compute attention of norm(x) in windows and its branch: (B, H, W, dim) -> (B, H, W, dim)."""
    check_input(x, parts.qkv_weight, parts.out_weight)
    height, width = x.shape[1:3]
    check_rows(x.shape[0] * height * width * parts.heads)
    pads, shift = fit_windows((height, width), parts.window, parts.shift, drops_shift=parts.drops_shift)
    if any(pads):
        if parts.rolls_first and any(shift):
            raise UnsupportedModule("padding of shifted windows")
        x, norm = pad_map(x if norm is None else layer_norm(x, norm, backend), pads), None
    out = attend_windows(
        linear(x, parts.qkv_weight, parts.qkv_bias, norm=norm, backend=backend),
        parts.table,
        (height, width),
        heads=parts.heads,
        window=parts.window,
        shift=shift,
        mask_value=parts.mask_value,
        logit_scale=parts.logit_scale,
        dropout_p=parts.dropout_p,
        backend=backend,
    )
    return linear(
        out,
        parts.out_weight,
        parts.out_bias,
        dropout_p=parts.out_dropout_p,
        **branch._asdict(),
        backend=backend,
    )


def compute_window_block(x: Tensor, parts: WindowBlockParts, backend: str | None) -> Tensor:
    check_map(x)
    (norm1, norm2), (drop1, drop2) = parts.norms, parts.drop_path_p
    if not parts.post_norm:
        x = attend(x, parts.attention, norm1, backend, Branch(x, None, drop1))
        return feed_forward(x, parts.mlp._replace(norm=norm2), backend, Branch(x, None, drop2))
    assert parts.drop_paths is not None
    drop_path1, drop_path2 = parts.drop_paths
    x = x + drop_path1(layer_norm(attend(x, parts.attention, None, backend), norm1, backend))
    return cast(Tensor, x + drop_path2(layer_norm(feed_forward(x, parts.mlp, backend), norm2, backend)))


def compute_merging(x: Tensor, parts: MergingParts, backend: str | None) -> Tensor:
    """Compute (B, H, W, dim) -> (B, H / 2, W / 2, dim_out); odd sides are padded."""
    check_map(x)
    check_input(x, parts.weight)
    if x.shape[1] % 2 or x.shape[2] % 2:
        x = torch_F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
    if not parts.post_norm:
        return linear(x, parts.weight, None, norm=parts.norm, backend=backend)
    return layer_norm(linear(x, parts.weight, None, backend=backend), parts.norm, backend)


def merging_weight(module: nn.Module) -> Weight:
    """Return the weight of the Linear `reduction`, which has no bias."""
    weight, bias = linear_of(module, "reduction")
    if bias is not None:
        raise UnsupportedModule("reduction: has a bias")
    return weight
