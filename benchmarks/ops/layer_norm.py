"""LayerNorm, and residual addition followed by LayerNorm."""

import torch

from benchmarks.ops.op import Op, installed
from vit_triton import functional as F


def inputs(shape):
    width = shape.size.width
    return [torch.randn(shape.batch, shape.tokens, width), torch.randn(width), torch.randn(width)]


def ours(shape, x, weight, bias, backend):
    return F.layer_norm(x, weight, bias, backend=backend)


def pytorch(shape, x, weight, bias):
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-5)


def liger(shape, x, weight, bias):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


def fla(shape, x, weight, bias):
    from fla.modules.layernorm import layer_norm

    return layer_norm(x, weight, bias, eps=1e-5)


def inputs_add(shape):
    x, *parameters = inputs(shape)
    return [x, torch.randn_like(x), *parameters]


def ours_add(shape, x, residual, weight, bias, backend):
    return F.layer_norm(x, weight, bias, residual=residual, backend=backend)


def pytorch_add(shape, x, residual, weight, bias):
    total = x + residual
    return pytorch(shape, total, weight, bias), total


def fla_add(shape, x, residual, weight, bias):
    from fla.modules.layernorm import layer_norm

    return layer_norm(x, weight, bias, residual=residual, eps=1e-5, prenorm=True)


def peers(device):
    others = {"liger-kernel": ("liger_kernel", liger), "flash-linear-attention": ("fla", fla)}
    return {"pytorch": pytorch, **installed(device, others)}


def peers_add(device):
    return {"pytorch": pytorch_add, **installed(device, {"flash-linear-attention": ("fla", fla_add)})}


OPS = [
    Op("layer_norm", inputs, ours, peers, pytorch),
    Op("add + layer_norm", inputs_add, ours_add, peers_add, pytorch_add),
]
