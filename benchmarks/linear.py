"""LayerNorm and the qkv projection."""

from collections.abc import Iterator

import torch

from benchmarks.derivative import double, forward, forward_backward
from benchmarks.runner import OURS, Case
from benchmarks.shapes import BATCH, TOKENS, WIDTH
from vit_triton import functional as F


def ours(x, weight, bias, g, b):
    return F.linear(x, weight, bias, norm=(g, b, 1e-5), backend="triton")


def pytorch(x, weight, bias, g, b):
    return torch.nn.functional.linear(torch.nn.functional.layer_norm(x, g.shape, g, b), weight, bias)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    inputs = [torch.randn(BATCH, TOKENS, WIDTH), torch.randn(3 * WIDTH, WIDTH) * WIDTH**-0.5, torch.randn(3 * WIDTH)]
    inputs = [x.to(dtype) for x in (*inputs, torch.randn(WIDTH), torch.randn(WIDTH))]
    gradient = torch.randn(BATCH, TOKENS, 3 * WIDTH).to(dtype)
    providers = {OURS: ours, "pytorch": pytorch}
    yield Case(
        "layer_norm + linear forward",
        dtype,
        {name: forward(f, inputs) for name, f in providers.items()},
        forward(pytorch, double(inputs)),
    )
    yield Case(
        "layer_norm + linear forward+backward",
        dtype,
        {name: forward_backward(f, inputs, gradient) for name, f in providers.items()},
        forward_backward(pytorch, double(inputs), gradient.double()),
    )
