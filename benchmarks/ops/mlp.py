"""The MLP of a Transformer block: two linear layers with an exact GELU between them."""

import torch

from benchmarks.ops.op import Op
from vit_triton import functional as F


def inputs(shape):
    width, hidden = shape.size.width, shape.size.hidden
    return [
        torch.randn(shape.batch, shape.tokens, width),
        torch.randn(hidden, width) * width**-0.5,
        torch.randn(hidden),
        torch.randn(width, hidden) * hidden**-0.5,
        torch.randn(width),
    ]


def ours(shape, x, w1, b1, w2, b2, backend):
    return F.mlp(x, w1, b1, w2, b2, backend=backend)


def pytorch(shape, x, w1, b1, w2, b2):
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, w1, b1))
    return torch.nn.functional.linear(hidden, w2, b2)


OPS = [Op("mlp", inputs, ours, lambda device: {"pytorch": pytorch}, pytorch)]
