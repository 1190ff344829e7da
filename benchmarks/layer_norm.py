"""LayerNorm, and residual addition with LayerNorm."""

from collections.abc import Iterator

import torch

from benchmarks.derivative import double, forward, forward_backward
from benchmarks.runner import OURS, Case
from benchmarks.shapes import BATCH, TOKENS, WIDTH
from vit_triton import functional as F


def ours(x, weight, bias):
    return F.layer_norm(x, weight, bias, backend="triton")


def pytorch(x, weight, bias):
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-5)


def ours_add(x, residual, weight, bias):
    return F.layer_norm(x, weight, bias, residual=residual, backend="triton")


def pytorch_add(x, residual, weight, bias):
    total = x + residual
    return pytorch(total, weight, bias), total


def cases(dtype: torch.dtype) -> Iterator[Case]:
    x, residual, gradient = (torch.randn(BATCH, TOKENS, WIDTH).to(dtype) for _ in range(3))
    weight, bias = torch.randn(WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
    inputs = [x, weight, bias]
    providers = {OURS: ours, "pytorch": pytorch}
    yield Case(
        "layer_norm forward",
        dtype,
        {name: forward(f, inputs) for name, f in providers.items()},
        forward(pytorch, double(inputs)),
    )
    yield Case(
        "layer_norm forward+backward",
        dtype,
        {name: forward_backward(f, inputs, gradient) for name, f in providers.items()},
        forward_backward(pytorch, double(inputs), gradient.double()),
    )
    inputs = [x, residual, weight, bias]
    yield Case(
        "add + layer_norm forward",
        dtype,
        {OURS: forward(ours_add, inputs), "pytorch": forward(pytorch_add, inputs)},
        forward(pytorch_add, double(inputs)),
    )
