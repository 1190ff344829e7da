"""Recipes for PyTorch modules: LayerNorm, Conv2d as a patch embedding, MultiheadAttention."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.integrations.encoder import SEQUENCE
from vit_triton.integrations.parts import (
    AttentionParts,
    attend,
    check_head_size,
    check_input,
    check_rows,
    check_weight,
    layer_norm,
    layer_norm_of,
)
from vit_triton.integrations.recipes import (
    Recipe,
    UnsupportedModule,
    check_members,
    kernel_input,
    register,
    register_container,
    trust,
)


def register_all() -> None:
    trust(nn.Linear, nn.Dropout, nn.Identity, nn.Softmax, nn.GELU, nn.SiLU, nn.ReLU)
    register_container(nn.Sequential, SEQUENCE)
    register(nn.LayerNorm, LAYER_NORM)
    register(nn.Conv2d, Recipe(("patch_embedding",), read_convolution, compute_convolution))
    register(
        nn.MultiheadAttention,
        Recipe(("attention",), read_multihead_attention, attend_without_weights, self_attention_input),
    )


def compute_layer_norm(x: Tensor, norm: F.Norm, backend: str | None) -> Tensor:
    check_input(x)
    return layer_norm(x, norm, backend)


LAYER_NORM = Recipe(("layer_norm",), layer_norm_of, compute_layer_norm)


class Convolution(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    patch_size: tuple[int, int]


def read_convolution(module: nn.Conv2d) -> Convolution:
    check_members(module, "weight", "bias")
    check_weight("weight", module.weight)
    size = module.kernel_size
    if module.stride != size or size == (1, 1):
        raise UnsupportedModule("convolution is not a patch embedding: stride differs from kernel_size, or both are 1")
    if module.padding not in ((0, 0), "valid") or module.dilation != (1, 1) or module.groups != 1:
        raise UnsupportedModule("convolution has padding, dilation or groups")
    return Convolution(module.weight, module.bias, cast(tuple[int, int], size))


def compute_convolution(image: Tensor, parts: Convolution, backend: str | None) -> Tensor:
    """Compute (B, C, H, W) -> (B, dim, H/ph, W/pw), in channels-last memory format."""
    patch_h, patch_w = parts.patch_size
    check_input(image, parts.weight)
    if image.ndim != 4 or 0 in image.shape[1:]:
        raise UnsupportedModule("input is not a batch of images")
    height, width = image.shape[-2:]
    if height % patch_h or width % patch_w:
        raise UnsupportedModule("image size is not divisible by the patch size")
    check_rows(image.shape[0] * (height // patch_h) * (width // patch_w))
    tokens = F.patch_embed(
        image,
        parts.weight.flatten(1),
        parts.bias,
        patch_size=parts.patch_size,
        patch_order="c p1 p2",
        backend=backend,
    )
    return tokens.transpose(1, 2).unflatten(2, (height // patch_h, width // patch_w))


def self_attention_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a self-attention call without masks and with ``need_weights=False``."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    x = kernel_input(call.get("query"))
    reasons = {
        "unbatched input": x.ndim != 3,
        "query, key and value differ": call.get("key") is not x or call.get("value") is not x,
        "need_weights": call.get("need_weights", True) is not False,
        "key_padding_mask": call.get("key_padding_mask") is not None,
        "attn_mask": call.get("attn_mask") is not None,
        "is_causal": bool(call.get("is_causal", False)) or len(args) > len(names),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModule(reason)
    return x


def read_multihead_attention(module: nn.MultiheadAttention) -> AttentionParts:
    check_members(module, "in_proj_weight", "in_proj_bias", "out_proj")
    if module.in_proj_weight is None or not module.batch_first or module.add_zero_attn:
        raise UnsupportedModule("requires batch_first=True, kdim and vdim equal to embed_dim, and add_zero_attn=False")
    check_head_size(module.head_dim)
    check_weight("in_proj_weight", module.in_proj_weight)
    check_weight("out_proj", module.out_proj.weight)
    return AttentionParts(
        heads=module.num_heads,
        scale=module.head_dim**-0.5,
        qkv_weight=module.in_proj_weight,
        qkv_bias=module.in_proj_bias,
        out_weight=module.out_proj.weight,  # PyTorch also reads the weight without calling the module
        out_bias=module.out_proj.bias,
        dropout_p=module.dropout if module.training else 0.0,
    )


def attend_without_weights(x: Tensor, parts: AttentionParts, backend: str | None) -> tuple[Tensor, None]:
    return attend(x, parts, backend), None
