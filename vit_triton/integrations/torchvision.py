"""Recipes for torchvision's Vision Transformers and Swin Transformers. The recipe for Conv2d in pytorch.py covers their
patch embedding."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from vit_triton.integrations.encoder import reading_class_token
from vit_triton.integrations.parts import (
    BlockParts,
    MlpParts,
    activation_of,
    compute_block,
    dropout_of,
    feed_forward,
    linear_of,
    norm_of,
)
from vit_triton.integrations.pytorch import read_multihead_attention
from vit_triton.integrations.recipes import (
    Recipe,
    UnsupportedModule,
    check_members,
    register,
    register_container,
    submodule,
    trust,
)
from vit_triton.integrations.windows import (
    MergingParts,
    WindowBlockParts,
    WindowParts,
    compute_merging,
    compute_window_block,
    cosine_of,
    merging_weight,
    window_of,
)

_mlps: list[type[nn.Module]] = []


def register_all() -> None:
    if "torchvision" not in sys.modules:
        return
    from torchvision.models import vision_transformer
    from torchvision.ops import StochasticDepth
    from torchvision.ops.misc import MLP

    register(vision_transformer.EncoderBlock, Recipe(("attention", "mlp", "layer_norm"), read_block, compute_block))
    trust(vision_transformer.Encoder)
    register_container(vision_transformer.VisionTransformer, reading_class_token(class_token_layers))
    from torchvision.models import swin_transformer as swin

    trust(swin.ShiftedWindowAttention, swin.ShiftedWindowAttentionV2, StochasticDepth)
    for cls in (swin.SwinTransformerBlock, swin.SwinTransformerBlockV2):
        register(cls, Recipe(("attention", "mlp", "layer_norm"), read_swin_block, compute_window_block))
    for cls in (swin.PatchMerging, swin.PatchMergingV2):
        register(cls, Recipe(("layer_norm",), read_merging, compute_merging))
    _mlps[:] = MLP, vision_transformer.MLPBlock
    for cls in _mlps:
        register(cls, Recipe(("mlp",), read_mlp, feed_forward))


def read_mlp(module: Any) -> MlpParts:
    check_members(module, "0", "1", "2", "3", "4")
    return MlpParts(
        *linear_of(module, "0"),
        *linear_of(module, "3"),
        activation=activation_of(module, "1"),
        hidden_dropout_p=dropout_of(module, "2"),
        dropout_p=dropout_of(module, "4"),
    )


def read_block(module: Any) -> BlockParts:
    check_members(module, "ln_1", "self_attention", "dropout", "ln_2", "mlp")
    attention = read_multihead_attention(submodule(module, "self_attention", nn.MultiheadAttention))
    return BlockParts(
        attention._replace(
            norm=norm_of(module, "ln_1", nn.LayerNorm),
            out_dropout_p=dropout_of(module, "dropout"),
        ),
        read_mlp(submodule(module, "mlp", *_mlps))._replace(norm=norm_of(module, "ln_2", nn.LayerNorm)),
    )


def read_swin_block(module: Any) -> WindowBlockParts:
    from torchvision.models import swin_transformer as swin
    from torchvision.ops import StochasticDepth

    check_members(module, "norm1", "attn", "stochastic_depth", "norm2", "mlp")
    norms = norm_of(module, "norm1", nn.LayerNorm), norm_of(module, "norm2", nn.LayerNorm)
    depth = submodule(module, "stochastic_depth", StochasticDepth)
    if depth.mode != "row":
        raise UnsupportedModule("stochastic_depth: mode is not row")
    drop_path_p = float(depth.p) if depth.training else 0.0
    attention = submodule(module, "attn", swin.ShiftedWindowAttention, swin.ShiftedWindowAttentionV2)
    mlp = read_mlp(submodule(module, "mlp", *_mlps))
    post_norm = isinstance(module, swin.SwinTransformerBlockV2)
    return WindowBlockParts(
        read_swin_attention(attention), mlp, norms, (drop_path_p, drop_path_p), post_norm, (depth, depth)
    )


def read_swin_attention(module: Any) -> WindowParts:
    check_members(module, "qkv", "proj", "relative_position_bias_table", "logit_scale", "cpb_mlp")
    weight, bias = linear_of(module, "qkv")
    out_weight, out_bias = linear_of(module, "proj")
    logit_scale = None
    if "cpb_mlp" in module._modules:
        if bias is not None:  # keys have no bias
            q_bias, k_bias, v_bias = bias.chunk(3)
            bias = torch.cat((q_bias, torch.zeros_like(k_bias), v_bias))
        table, logit_scale = cosine_of(module, module.cpb_mlp, module.num_heads)
    else:
        table = module.relative_position_bias_table
    return WindowParts(
        **window_of(module.num_heads, module.window_size, module.shift_size, table, weight.shape[0] // 3),
        qkv_weight=weight,
        qkv_bias=bias,
        out_weight=out_weight,
        out_bias=out_bias,
        logit_scale=logit_scale,
        dropout_p=float(module.attention_dropout) if module.training else 0.0,
        out_dropout_p=float(module.dropout) if module.training else 0.0,
        drops_shift=True,
    )


def read_merging(module: Any) -> MergingParts:
    from torchvision.models.swin_transformer import PatchMergingV2

    check_members(module, "norm", "reduction")
    return MergingParts(
        merging_weight(module), norm_of(module, "norm", nn.LayerNorm), isinstance(module, PatchMergingV2)
    )


def class_token_layers(model: Any) -> nn.Module:
    """Return the layers of a VisionTransformer. Its head reads only the class token."""
    from torchvision.models.vision_transformer import Encoder

    encoder = submodule(model, "encoder", Encoder)
    norm_of(encoder, "ln", nn.LayerNorm)
    return submodule(encoder, "layers", nn.Sequential)
