"""LayerNorm followed by the qkv projection, and the MLP's first product alone."""

import torch

from benchmarks.ops.op import Op
from vit_triton import functional as F


def inputs(shape):
    width = shape.size.width
    weight = torch.randn(3 * width, width) * width**-0.5
    return [torch.randn(shape.batch, shape.tokens, width), weight, *(torch.randn(n) for n in (3 * width, width, width))]


def ours(shape, x, weight, bias, g, b, backend):
    return F.linear(x, weight, bias, norm=(g, b, 1e-5), backend=backend)


def pytorch(shape, x, weight, bias, g, b):
    return torch.nn.functional.linear(torch.nn.functional.layer_norm(x, g.shape, g, b), weight, bias)


def inputs_plain(shape):
    width, hidden = shape.size.width, shape.size.hidden
    return [
        torch.randn(shape.batch, shape.tokens, width),
        torch.randn(hidden, width) * width**-0.5,
        torch.randn(hidden),
    ]


def ours_plain(shape, x, weight, bias, backend):
    return F.linear(x, weight, bias, backend=backend)


def pytorch_plain(shape, x, weight, bias):
    return torch.nn.functional.linear(x, weight, bias)


OPS = [
    Op("layer_norm + linear", inputs, ours, lambda device: {"pytorch": pytorch}, pytorch),
    Op("linear", inputs_plain, ours_plain, lambda device: {"pytorch": pytorch_plain}, pytorch_plain),
]
