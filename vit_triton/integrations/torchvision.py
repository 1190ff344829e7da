"""Recipes for torchvision's Vision Transformers. The recipe for Conv2d in pytorch.py covers their patch embedding."""

from __future__ import annotations

import sys
from typing import Any

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
from vit_triton.integrations.recipes import Recipe, check_members, register, register_container, submodule, trust

_mlps: list[type[nn.Module]] = []


def register_all() -> None:
    if "torchvision" not in sys.modules:
        return
    from torchvision.models import vision_transformer
    from torchvision.ops.misc import MLP

    register(vision_transformer.EncoderBlock, Recipe(("attention", "mlp", "layer_norm"), read_block, compute_block))
    trust(vision_transformer.Encoder)
    register_container(vision_transformer.VisionTransformer, reading_class_token(class_token_layers))
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


def class_token_layers(model: Any) -> nn.Module:
    """Return the layers of a VisionTransformer. Its head reads only the class token."""
    from torchvision.models.vision_transformer import Encoder

    encoder = submodule(model, "encoder", Encoder)
    norm_of(encoder, "ln", nn.LayerNorm)
    return submodule(encoder, "layers", nn.Sequential)
