"""The blocks of a Transformer encoder for inference; nothing is saved for a backward pass.

    x = x + attention(norm(x)),   x = x + mlp(norm(x))            (pre-norm; Xiong et al. 2020, arXiv:2002.04745)

Each branch is multiplied by its LayerScale, if any. All blocks have the same rotary positions, if any.

The kernels are those of :mod:`.attention` and :mod:`.linear`. One operator for all blocks passes PyTorch's dispatcher
once instead of four times per block, and on a CPU the launches are recorded together.
"""

from typing import NamedTuple

import torch

from vit_triton.arguments import Block, Branch, Rope
from vit_triton.kernels.attention.forward import attention_fwd
from vit_triton.kernels.attention.rotary import rotary_fwd_into
from vit_triton.kernels.linear.mlp import mlp_fwd, norm_linear_fwd


class BlockPanels(NamedTuple):
    """The weights of a block packed by `pack_weight`; None if not packed."""

    qkv: torch.Tensor | None = None
    out: torch.Tensor | None = None
    w1: torch.Tensor | None = None
    w2: torch.Tensor | None = None


def encoder_fwd(
    x: torch.Tensor,
    blocks: list[Block],
    panels: list[BlockPanels],
    *,
    rope: Rope | None,
    heads: int,
    scale: float,
    activation: str,
    rope_prefix: int,
    interleaved: bool,
    first_token: bool,
) -> torch.Tensor:
    """Tokens (B, N, D) -> (B, N, D) after the last block. ``first_token``: -> (B, 1, D); the last block computes only
    keys and values of the other tokens. ``rope``: cos and sin, see :func:`.rotary.rotary_fwd_into`; excludes
    ``first_token``."""
    batch, length, dim = x.shape
    if not blocks:  # a copy, because results of an operator must not alias its arguments
        return (x[:, :1] if first_token else x).clone(memory_format=torch.contiguous_format)
    rows = x.reshape(batch * length, dim)
    for i, (block, packed) in enumerate(zip(blocks, panels, strict=True)):
        inner = block.qkv_weight.shape[0] // 3
        head_dim = inner // heads
        if first_token and i == len(blocks) - 1:
            first = rows.view(batch, length, dim)[:, 0]
            q = _project(first, block, packed.qkv, slice(0, inner)).view(batch, 1, heads, head_dim)
            kv = _project(rows, block, packed.qkv, slice(inner, 3 * inner))
            k, v = kv.view(batch, length, 2, heads, head_dim).unbind(2)
            del kv
            rows = first
        else:
            qkv = _project(rows, block, packed.qkv, slice(0, 3 * inner))
            q, k, v = qkv.view(batch, length, 3, heads, head_dim).unbind(2)
            if rope is not None:
                outs = q.new_empty(q.shape), k.new_empty(k.shape), None
                rotary_fwd_into(
                    *(outs, (q, k, None), None, None, *rope), rms=False, prefix=rope_prefix, interleaved=interleaved
                )
                q, k, _ = outs
                del outs
            del qkv
        out, *_ = attention_fwd(q, k, v, scale=scale, save=False)
        rows, _, _ = norm_linear_fwd(
            *(out.view(len(rows), inner), block.out_weight, block.out_bias, None, rows),
            branch=Branch(block.layer_scale1),
            panels=packed.out,
        )
        del q, k, v, out  # frees memory for the MLP
        rows, *_ = mlp_fwd(
            *(rows, block.w1, block.b1, block.w2, block.b2, block.norm2, rows),
            activation=activation,
            branch=Branch(block.layer_scale2),
            save=False,
            panels=(packed.w1, packed.w2),
        )
    return rows.view(batch, 1 if first_token else length, dim)


def _project(rows: torch.Tensor, block: Block, panels: torch.Tensor | None, part: slice) -> torch.Tensor:
    """norm(rows) @ qkv_weight[part].T + qkv_bias[part]."""
    bias = None if block.qkv_bias is None else block.qkv_bias[part]
    if panels is not None:
        width = panels.shape[2]
        whole = part.start % width == 0 and (part.stop % width == 0 or part.stop == block.qkv_weight.shape[0])
        panels = panels[part.start // width : -(-part.stop // width)] if whole else None
    return norm_linear_fwd(rows, block.qkv_weight[part], bias, block.norm1, panels=panels, save=False)[0]
