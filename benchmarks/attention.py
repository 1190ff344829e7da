"""Multi-head self-attention of a packed projection (B, N, 3, H, D) -> (B, N, H * D)."""

from collections.abc import Iterator

import torch

from benchmarks.derivative import double, forward, forward_backward
from benchmarks.runner import OURS, Case
from benchmarks.shapes import BATCH, HEAD_DIM, HEADS, TOKENS
from vit_triton import functional as F


def ours(qkv):
    return F.attention_packed(qkv, backend="triton").flatten(2)


def sdpa(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def explicit(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    inputs = [torch.randn(BATCH, TOKENS, 3, HEADS, HEAD_DIM).to(dtype)]
    gradient = torch.randn(BATCH, TOKENS, HEADS * HEAD_DIM).to(dtype)
    providers = {OURS: ours, "sdpa": sdpa, "explicit": explicit}
    yield Case(
        "attention forward",
        dtype,
        {name: forward(f, inputs) for name, f in providers.items()},
        forward(explicit, double(inputs)),
    )
    yield Case(
        "attention forward+backward",
        dtype,
        {name: forward_backward(f, inputs, gradient) for name, f in providers.items()},
        forward_backward(explicit, double(inputs), gradient.double()),
    )
