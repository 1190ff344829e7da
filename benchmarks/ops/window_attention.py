"""Attention in shifted windows of the stages of Swin-T: (B, H, W, 3, heads, 32) -> (B, H, W, heads * 32)."""

import functools

import torch
import torch.nn.functional as torch_F

from benchmarks.ops.op import Op
from vit_triton import functional as F


def sizes(shape, stage):
    """(side of the feature map, heads, side of a window)."""
    side = shape.image // 4 // 2 ** (stage - 1)
    return side, 3 * 2 ** (stage - 1), next(window for window in (7, 8, 6, 4, 2, 1) if side % window == 0)


def inputs(stage, shape):
    side, heads, window = sizes(shape, stage)
    return [torch.randn(shape.batch, side, side, 3, heads, 32), torch.randn(heads, window**2, window**2)]


def ours(stage, shape, qkv, bias, backend):
    side, _, window = sizes(shape, stage)
    shift = window // 2 if window < side else 0
    return F.window_attention(qkv, bias, window=(window, window), shift=(shift, shift), backend=backend).flatten(3)


def partitioned(sdpa, stage, shape, qkv, bias):
    """Roll and partition the feature map and add the mask to the bias, as timm and torchvision do."""
    side, heads, w = sizes(shape, stage)
    shift, n = w // 2 if w < side else 0, side // w
    x = qkv.flatten(3)
    x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
    x = x.view(-1, n, w, n, w, x.shape[-1]).transpose(2, 3).reshape(-1, w * w, 3, heads, 32)
    q, k, v = x.permute(2, 0, 3, 1, 4)
    mask = bias[None]
    if shift:
        mask = mask + shift_mask(side, w, shift).to(bias)[:, None]
        mask = mask.repeat(len(qkv), 1, 1, 1)
    if sdpa:
        out = torch_F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        out = (q * 32**-0.5 @ k.transpose(-1, -2) + mask).softmax(-1) @ v
    out = out.transpose(1, 2).reshape(-1, n, n, w, w, heads * 32).transpose(2, 3).reshape(-1, side, side, heads * 32)
    return torch.roll(out, (shift, shift), (1, 2)) if shift else out


@functools.cache
def shift_mask(side, window, shift):
    """(windows, N, N): -100 between tokens of different regions, else 0."""
    region = torch.zeros(side, device="cpu")
    region[side - window :] += 1
    region[side - shift :] += 1
    code = (3 * region[:, None] + region).view(side // window, window, side // window, window)
    code = code.transpose(1, 2).reshape(-1, window * window)
    return torch.where(code[:, None] == code[:, :, None], 0.0, -100.0)


def peers(stage, device):
    return {
        "explicit": functools.partial(partitioned, False, stage),
        "sdpa": functools.partial(partitioned, True, stage),
    }


OPS = [
    Op(
        f"window attention, Swin-T stage {stage}",
        functools.partial(inputs, stage),
        functools.partial(ours, stage),
        functools.partial(peers, stage),
        functools.partial(partitioned, False, stage),
    )
    for stage in (1, 2, 3)
]
