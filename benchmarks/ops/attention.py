"""Multi-head self-attention on packed q, k and v: (B, N, 3, H, D) -> (B, N, H * D)."""

import functools
from collections.abc import Mapping

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ops.derivative import Function
from benchmarks.ops.op import Op, installed
from vit_triton import functional as F

KERNELS = {
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
    "cuda": {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    },
}


def inputs(shape):
    return [torch.randn(shape.batch, shape.tokens, 3, shape.size.heads, shape.head_dim)]


def ours(shape, qkv, backend):
    return F.attention_packed(qkv, backend=backend).flatten(2)


def sdpa(shape, qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def sdpa_by(kernel, shape, qkv):
    with sdpa_kernel(kernel):
        return sdpa(shape, qkv)


def explicit(shape, qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def flash_attn(shape, qkv):
    from flash_attn import flash_attn_func

    return flash_attn_func(*qkv.unbind(2)).flatten(2)


def xformers(shape, qkv):
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*qkv.unbind(2)).flatten(2)


def peers(device: str) -> Mapping[str, Function]:
    kernels = {f"sdpa {name}": functools.partial(sdpa_by, kernel) for name, kernel in KERNELS[device].items()}
    others = {"flash-attn": ("flash_attn", flash_attn), "xformers": ("xformers", xformers)}
    return {"sdpa": sdpa, **kernels, "explicit": explicit, **installed(device, others)}


OPS = [Op("attention", inputs, ours, peers, explicit)]
