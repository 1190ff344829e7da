"""Two blocks of an encoder, in inference."""

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.derivative import double, forward
from benchmarks.runner import OURS, Case
from benchmarks.shapes import BATCH, HEADS, HIDDEN, TOKENS, WIDTH
from vit_triton import functional as F

SIZES = [(WIDTH,), (WIDTH,), (3 * WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH,), (WIDTH,), (WIDTH,)]
SIZES += [(HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,)]


def ours(x, *tensors):
    blocks = []
    for i in range(0, len(tensors), len(SIZES)):
        g1, b1, qkv, out, out_bias, g2, b2, *mlp = tensors[i : i + len(SIZES)]
        blocks.append(F.Block((g1, b1, 1e-5), qkv, None, out, out_bias, (g2, b2, 1e-5), *mlp))
    return F.encoder(x, blocks, heads=HEADS, backend="triton")


def pytorch(x, *tensors):
    f = nn.functional
    for i in range(0, len(tensors), len(SIZES)):
        g1, b1, qkv, out, out_bias, g2, b2, w1, b3, w2, b4 = tensors[i : i + len(SIZES)]
        q, k, v = f.linear(f.layer_norm(x, g1.shape, g1, b1), qkv).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + f.linear(f.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), out, out_bias)
        x = x + f.linear(f.gelu(f.linear(f.layer_norm(x, g2.shape, g2, b2), w1, b3)), w2, b4)
    return x


def cases(dtype: torch.dtype) -> Iterator[Case]:
    inputs = [torch.randn(BATCH, TOKENS, WIDTH)]
    inputs += [torch.randn(size) * (size[1] ** -0.5 if len(size) == 2 else 1) for size in SIZES * 2]
    inputs = [x.to(dtype) for x in inputs]
    providers = {OURS: ours, "pytorch": pytorch}
    yield Case(
        "encoder forward, 2 blocks",
        dtype,
        {name: forward(f, inputs) for name, f in providers.items()},
        forward(pytorch, double(inputs)),
    )
