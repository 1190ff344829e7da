"""PyTorch's own modules: LayerNorm, the convolution that is a patch embedding, MultiheadAttention."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.integrations.parts import (
    AttentionParts,
    attend,
    check_head_size,
    check_input,
    check_rows,
    check_weight,
    layer_norm_of,
)
from vit_triton.integrations.recipes import Recipe, Unknown, kernel_input, know, only, teach


def teach_all() -> None:
    know(nn.Linear, nn.Dropout, nn.Identity, nn.Softmax, nn.Sequential, nn.GELU, nn.SiLU, nn.ReLU)
    teach(nn.LayerNorm, LAYER_NORM)
    teach(nn.Conv2d, Recipe(("patch_embedding",), read_convolution, convolve))
    teach(
        nn.MultiheadAttention, Recipe(("attention",), read_multihead_attention, attend_and_none, self_attention_input)
    )


def normalise(x: Tensor, norm: F.Norm, backend: str | None) -> Tensor:
    weight, bias, eps = norm
    check_input(x)
    return cast(Tensor, F.layer_norm(x, weight, bias, eps=eps, backend=backend))


LAYER_NORM = Recipe(("layer_norm",), layer_norm_of, normalise)


class Convolution(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    patch_size: tuple[int, int]


def read_convolution(module: nn.Conv2d) -> Convolution:
    only(module, "weight", "bias")
    check_weight("weight", module.weight)
    size = module.kernel_size
    if module.stride != size or size == (1, 1):
        raise Unknown("a convolution whose patches overlap, or of single pixels")
    if module.padding not in ((0, 0), "valid") or module.dilation != (1, 1) or module.groups != 1:
        raise Unknown("a convolution with padding, dilation or groups")
    return Convolution(module.weight, module.bias, cast(tuple[int, int], size))


def convolve(image: Tensor, found: Convolution, backend: str | None) -> Tensor:
    """(B, C, H, W) -> (B, dim, H/ph, W/pw), the tokens of every patch next to one another in memory."""
    patch_h, patch_w = found.patch_size
    check_input(image, found.weight)
    if image.ndim != 4 or 0 in image.shape:
        raise Unknown("no batch of images")
    height, width = image.shape[-2:]
    if height % patch_h or width % patch_w:
        raise Unknown("the image does not divide into patches")
    check_rows(image.shape[0] * (height // patch_h) * (width // patch_w))
    tokens = F.patch_embed(
        image,
        found.weight.flatten(1),
        found.bias,
        patch_size=found.patch_size,
        patch_order="c p1 p2",
        backend=backend,
    )
    return tokens.transpose(1, 2).unflatten(2, (height // patch_h, width // patch_w))


def self_attention_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one tensor that is query, key and value of a call without masks that asks for no weights."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    x = kernel_input(call.get("query"))
    reasons = {
        "an unbatched input": x.ndim != 3,
        "no self-attention": call.get("key") is not x or call.get("value") is not x,
        "need_weights": call.get("need_weights", True) is not False,
        "key_padding_mask": call.get("key_padding_mask") is not None,
        "attn_mask": call.get("attn_mask") is not None,
        "is_causal": bool(call.get("is_causal", False)) or len(args) > len(names),
    }
    for reason, holds in reasons.items():
        if holds:
            raise Unknown(reason)
    return x


def read_multihead_attention(module: nn.MultiheadAttention) -> AttentionParts:
    only(module, "in_proj_weight", "in_proj_bias", "out_proj")
    if module.in_proj_weight is None or not module.batch_first or module.add_zero_attn:
        raise Unknown("needs batch_first, keys and values of the queries' width, and no added token")
    check_head_size(module.head_dim)
    check_weight("in_proj_weight", module.in_proj_weight)
    check_weight("out_proj", module.out_proj.weight)
    return AttentionParts(
        heads=module.num_heads,
        scale=module.head_dim**-0.5,
        qkv_weight=module.in_proj_weight,
        qkv_bias=module.in_proj_bias,
        out_weight=module.out_proj.weight,  # PyTorch, too, reads it without calling the module
        out_bias=module.out_proj.bias,
        dropout_p=module.dropout if module.training else 0.0,
    )


def attend_and_none(x: Tensor, found: AttentionParts, backend: str | None) -> tuple[Tensor, None]:
    return attend(x, found, backend), None
