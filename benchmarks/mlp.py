"""The MLP of a transformer block: two products with an exact GELU between them."""

from collections.abc import Iterator

import torch

from benchmarks.derivative import double, forward, forward_backward
from benchmarks.runner import OURS, Case
from benchmarks.shapes import BATCH, HIDDEN, TOKENS, WIDTH
from vit_triton import functional as F


def ours(x, w1, b1, w2, b2):
    return F.mlp(x, w1, b1, w2, b2, backend="triton")


def pytorch(x, w1, b1, w2, b2):
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, w1, b1))
    return torch.nn.functional.linear(hidden, w2, b2)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    inputs = [
        torch.randn(BATCH, TOKENS, WIDTH),
        torch.randn(HIDDEN, WIDTH) * WIDTH**-0.5,
        torch.randn(HIDDEN),
        torch.randn(WIDTH, HIDDEN) * HIDDEN**-0.5,
        torch.randn(WIDTH),
    ]
    inputs = [x.to(dtype) for x in inputs]
    gradient = torch.randn(BATCH, TOKENS, WIDTH).to(dtype)
    providers = {OURS: ours, "pytorch": pytorch}
    yield Case(
        "mlp forward",
        dtype,
        {name: forward(f, inputs) for name, f in providers.items()},
        forward(pytorch, double(inputs)),
    )
    yield Case(
        "mlp forward+backward",
        dtype,
        {name: forward_backward(f, inputs, gradient) for name, f in providers.items()},
        forward_backward(pytorch, double(inputs), gradient.double()),
    )
