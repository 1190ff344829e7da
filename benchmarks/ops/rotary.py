"""Attention with rotary positions on packed q, k and v: (B, N, 3, H, D) -> (B, N, H * D). The class token is not
rotated."""

import functools

import torch
import torch.nn.functional as torch_F

from benchmarks.ops.op import Op
from vit_triton import functional as F


def inputs(shape):
    return [torch.randn(shape.batch, shape.tokens, 3, shape.size.heads, shape.head_dim)]


@functools.cache
def tables(tokens, pairs, device):
    """cos and sin, float32; models make them once, outside of the blocks."""
    angles = torch.arange(tokens, device=device)[:, None] * 100.0 ** -torch.linspace(0, 1, pairs, device=device)
    return angles.cos(), angles.sin()


def ours(layout, shape, qkv, backend):
    rope = tables(qkv.shape[1] - 1, qkv.shape[-1] // 2, qkv.device)
    return F.attention_packed(qkv, rope=rope, rope_prefix=1, rope_layout=layout, backend=backend).flatten(2)


@functools.cache
def expanded(layout, *key):
    """The tables with a column per channel."""
    return [x.repeat(1, 2) if layout == "half" else x.repeat_interleave(2, -1) for x in tables(*key)]


def rotated(layout, shape, qkv):
    """Rotate as timm does, then scaled_dot_product_attention."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    cos, sin = (x.to(qkv) for x in expanded(layout, qkv.shape[1] - 1, qkv.shape[-1] // 2, qkv.device))

    def rotate(x):
        first, rest = x[:, :, :1], x[:, :, 1:]
        if layout == "half":
            a, b = rest.chunk(2, -1)
            turned = torch.cat((-b, a), -1)
        else:
            turned = torch.stack((-rest[..., 1::2], rest[..., ::2]), -1).reshape(rest.shape)
        return torch.cat((first, rest * cos + turned * sin), 2)

    return torch_F.scaled_dot_product_attention(rotate(q), rotate(k), v).transpose(1, 2).flatten(2)


OPS = [
    Op(
        f"rotary attention, {layout}",
        inputs,
        functools.partial(ours, layout),
        lambda device, layout=layout: {"sdpa": functools.partial(rotated, layout)},
        functools.partial(rotated, layout),
    )
    for layout in ("half", "interleaved")
]
