"""Attention and blocks on packed sequences, in which no token is padding."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch.nn.functional as torch_F
from torch import Tensor

from vit_triton import functional as F
from vit_triton.checks import check_rope
from vit_triton.integrations.parts import (
    AttentionParts,
    BlockParts,
    Branch,
    apply_module,
    check_input,
    check_rows,
    feed_forward,
    layer_norm,
    linear,
    project_out,
)
from vit_triton.integrations.recipes import UnsupportedModule

__all__ = ["Sequences", "attend_packed", "compute_packed_block"]


class Sequences(NamedTuple):
    """Packed sequences: the first row of each and the number of rows, int32, and the longest length.

    ``rope`` has a row for each token. ``samples`` is the sequence of each token, for stochastic depth.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    rope: F.Rope | None = None
    samples: Tensor | None = None


def attend_packed(
    x: Tensor,
    parts: AttentionParts,
    sequences: Sequences,
    backend: str | None,
    branch: Branch = Branch(),  # noqa: B008 - a tuple
) -> Tensor:
    """Compute attention within each sequence and its branch: (total, dim) -> (total, dim)."""
    check_input(x, parts.qkv_weight, parts.out_weight, branch.layer_scale)
    check_rows(x.shape[0] * parts.heads)
    head_dim = parts.qkv_weight.shape[0] // 3 // parts.heads
    if sequences.rope is not None:
        try:
            check_rope((1, len(x), parts.heads, head_dim), len(x), x, sequences.rope, 0, parts.rope_layout)
        except (TypeError, ValueError) as error:
            raise UnsupportedModule(str(error)) from error
    normed, norm = apply_module(x, parts.norm)
    qkv = linear(normed, parts.qkv_weight, parts.qkv_bias, norm=norm, backend=backend)
    q, k, v = qkv.unflatten(-1, (3, parts.heads, head_dim)).unbind(1)
    out = F.attention_varlen(
        normalize_heads(q, parts.q_norm, parts.norm_type, backend),
        normalize_heads(k, parts.k_norm, parts.norm_type, backend),
        v,
        sequences.cu_seqlens,
        sequences.max_seqlen,
        rope=sequences.rope,
        rope_layout=parts.rope_layout,
        scale=parts.scale,
        dropout_p=parts.dropout_p,
        backend=backend,
    )
    return project_out(cast(Tensor, out).flatten(1), parts, backend, branch)


def normalize_heads(x: Tensor, norm: F.Norm | None, norm_type: str, backend: str | None) -> Tensor:
    """Normalize queries or keys (total, heads, head_dim)."""
    if norm is None:
        return x
    if norm_type == "layer_norm":
        return layer_norm(x, norm, backend)
    weight, _, eps = norm
    return torch_F.rms_norm(x, x.shape[-1:], weight, eps)


def compute_packed_block(x: Tensor, parts: BlockParts, sequences: Sequences, backend: str | None) -> Tensor:
    """Compute a block: (total, dim) -> (total, dim)."""
    attention, mlp, branch1, branch2 = parts
    residual = fused_branch(x, branch1)
    x = add_branch(x, attend_packed(x, attention, sequences, backend, residual), branch1, sequences)
    residual = fused_branch(x, branch2)
    return add_branch(x, feed_forward(x, mlp, backend, residual), branch2, sequences)


def fused_branch(x: Tensor, branch: Branch) -> Branch:
    """Return the branch that the product computes: all but stochastic depth, whose samples are not rows."""
    return Branch() if branch.drop_path_p > 0 else branch._replace(residual=x)


def add_branch(x: Tensor, out: Tensor, branch: Branch, sequences: Sequences) -> Tensor:
    """Compute x + drop_path(layer_scale * out), unless `out` is already the sum."""
    if branch.drop_path_p == 0:
        return out
    keep = 1.0 - branch.drop_path_p
    # the random numbers are those of the padded batch
    factors = out.new_empty(len(sequences.cu_seqlens) - 1, 1).bernoulli_(keep)
    factors = factors / keep if keep > 0 else factors
    out = out if branch.layer_scale is None else out * branch.layer_scale
    return x + out * factors[cast(Tensor, sequences.samples)]
