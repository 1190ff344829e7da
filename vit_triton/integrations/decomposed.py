"""Blocks with decomposed relative positions (SAM) in a form common to all libraries, and the functions that compute
them.

The bias of a query is the sum of its products with a vector for the row and one for the column of each key, relative to
its own (Li et al. 2022, arXiv:2112.01526, section 4.1). Windows are partitioned in PyTorch.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from vit_triton import functional as F
from vit_triton.integrations.parts import (
    AttentionParts,
    BlockParts,
    Branch,
    Weight,
    apply_module,
    check_input,
    check_map,
    check_rows,
    feed_forward,
    layer_norm,
    linear,
)
from vit_triton.integrations.recipes import UnsupportedModule
from vit_triton.recording import active_recorder

__all__ = ["DecomposedBlockParts", "DecomposedParts", "attend_decomposed", "compute_decomposed_block"]


class DecomposedParts(NamedTuple):
    """Self-attention on a feature map. ``rel_pos``: vectors of row offsets, (2 * H - 1, head_dim), and of column
    offsets; those of another size are resampled."""

    attention: AttentionParts
    rel_pos: tuple[Tensor, Tensor] | None


class DecomposedBlockParts(NamedTuple):
    """A pre-norm block of (B, H, W, dim); the branches have no residual."""

    block: BlockParts
    rel_pos: tuple[Tensor, Tensor] | None
    window: int = 0  # side of the windows; 0: attention on the whole map


def offsets_of(rel_pos: Tensor, size: int) -> Tensor:
    """Return rel_pos[i - j + size - 1] of queries i and keys j on an axis of ``size``, as (i, head_dim, j)."""
    if rel_pos.shape[0] != 2 * size - 1:
        rel_pos = torch_F.interpolate(rel_pos.t()[None], size=2 * size - 1, mode="linear")[0].t()
    return rel_pos.unfold(0, size, 1).flip(-1)


def attend_decomposed(
    x: Tensor,
    parts: DecomposedParts,
    backend: str | None,
    branch: Branch = Branch(),  # noqa: B008 - a tuple
) -> Tensor:
    """Compute attention and its branch: (B, H, W, dim) -> (B, H, W, dim)."""
    attention, rel_pos = parts
    check_map(x)
    check_input(x, attention.qkv_weight, attention.out_weight, branch.layer_scale, *(rel_pos or ()))
    sides, head_dim = x.shape[1:3], attention.qkv_weight.shape[0] // 3 // attention.heads
    check_rows(x.shape[0] * sides.numel() * attention.heads)
    if rel_pos is not None and any(table.ndim != 2 or table.shape[1] != head_dim for table in rel_pos):
        raise UnsupportedModule("the vectors of relative positions do not have the head size")
    if attention.norm_type != "layer_norm":
        raise UnsupportedModule("RMSNorm of queries and keys")
    normed, norm = apply_module(x, attention.norm)
    qkv = linear(normed, attention.qkv_weight, attention.qkv_bias, norm=norm, backend=backend)
    q, k, v = qkv.unflatten(-1, (3, attention.heads, -1)).flatten(1, 2).unbind(2)
    # not in the operator, because the bias reads the normalized queries
    q = q if attention.q_norm is None else layer_norm(q, attention.q_norm, backend)
    k = k if attention.k_norm is None else layer_norm(k, attention.k_norm, backend)
    bias = None
    if rel_pos is not None:
        query = q.unflatten(1, sides)
        rel_h = torch.einsum("bhwnc,hck->bnhwk", query, offsets_of(rel_pos[0], sides[0]))
        rel_w = torch.einsum("bhwnc,wck->bnhwk", query, offsets_of(rel_pos[1], sides[1]))
        bias = F.DecomposedBias(rel_h.flatten(2, 3), rel_w.flatten(2, 3))
    scale, dropout_p = attention.scale, attention.dropout_p
    out = F.attention(q, k, v, bias=bias, scale=scale, dropout_p=dropout_p, backend=backend)
    return linear(
        cast(Tensor, out).flatten(2).unflatten(1, sides),
        cast(Weight, attention.out_weight),
        attention.out_bias,
        dropout_p=attention.out_dropout_p,
        **branch._asdict(),
        backend=backend,
    )


def compute_decomposed_block(x: Tensor, parts: DecomposedBlockParts, backend: str | None) -> Tensor:
    """Compute a block: (B, H, W, dim) -> (B, H, W, dim)."""
    check_map(x)
    attention, mlp, branch1, branch2 = parts.block
    if parts.window == 0:
        given = DecomposedParts(attention, parts.rel_pos)
        x = attend_decomposed(x, given, backend, branch1._replace(residual=x))
    else:
        x = attend_partitioned(x, parts, backend)
    return feed_forward(x, mlp, backend, branch2._replace(residual=x))


def attend_partitioned(x: Tensor, parts: DecomposedBlockParts, backend: str | None) -> Tensor:
    """Compute attention in windows and its branch, in which each window is a sample: (B, H, W, dim) -> the same."""
    size, (height, width) = parts.window, x.shape[1:3]
    recorder = active_recorder()
    if recorder is not None and size > max(height, width):  # one window, whose tokens are not those of the map
        raise ValueError(
            f"attention_maps does not support the windowed layers of SAM: layer {len(recorder.maps)} pads "
            f"{height} x {width} tokens to a window of {size} x {size}"
        )
    attention, branch = parts.block.attention, parts.block.branch1
    residual = windows_of(x, size)
    given = residual
    if attention.norm is not None and (height % size or width % size):  # padded tokens take part as zeros
        given = windows_of(layer_norm(x, cast(F.Norm, attention.norm), backend), size)
        attention = attention._replace(norm=None)
    grid = -(-height // size), -(-width // size)
    branch = branch._replace(residual=residual)
    out = attend_decomposed(given, DecomposedParts(attention, parts.rel_pos), backend, branch)
    out = out.unflatten(0, (x.shape[0], *grid)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out[:, :height, :width]


def windows_of(x: Tensor, size: int) -> Tensor:
    """Partition (B, H, W, dim), padded with zeros, into windows (B * rows * columns, size, size, dim)."""
    height, width = x.shape[1:3]
    if height % size or width % size:
        x = torch_F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(0, 2)
