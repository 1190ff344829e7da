"""Blocks of a Transformer encoder; ``shape.size.depth`` is their number."""

import torch
from torch import nn

from benchmarks.ops.op import Op
from vit_triton import functional as F


def tensors(size):
    """Shapes of a block's parameters."""
    width, hidden = size.width, size.hidden
    norm = [(width,), (width,)]
    return [
        *norm,
        (3 * width, width),
        (width, width),
        (width,),
        *norm,
        (hidden, width),
        (hidden,),
        (width, hidden),
        (width,),
    ]


def inputs(shape):
    x = torch.randn(shape.batch, shape.tokens, shape.size.width)
    blocks = tensors(shape.size) * shape.size.depth
    return [x, *(torch.randn(s) * (s[1] ** -0.5 if len(s) == 2 else 1) for s in blocks)]


def blocks(shape, flat):
    n = len(tensors(shape.size))
    return [flat[i : i + n] for i in range(0, len(flat), n)]


def ours(shape, x, *flat, backend):
    made = [
        F.Block((g1, b1, 1e-5), qkv, None, out, out_bias, (g2, b2, 1e-5), *mlp)
        for g1, b1, qkv, out, out_bias, g2, b2, *mlp in blocks(shape, flat)
    ]
    return F.encoder(x, made, heads=shape.size.heads, backend=backend)


def pytorch(shape, x, *flat):
    f = nn.functional
    for g1, b1, qkv, out, out_bias, g2, b2, w1, b3, w2, b4 in blocks(shape, flat):
        heads = f.linear(f.layer_norm(x, g1.shape, g1, b1), qkv).unflatten(2, (3, shape.size.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        x = x + f.linear(f.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), out, out_bias)
        x = x + f.linear(f.gelu(f.linear(f.layer_norm(x, g2.shape, g2, b2), w1, b3)), w2, b4)
    return x


OPS = [Op("encoder", inputs, ours, lambda device: {"pytorch": pytorch}, pytorch)]
