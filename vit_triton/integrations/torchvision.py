"""Recipes for torchvision's Vision Transformers. The recipe for Conv2d in pytorch.py covers their patch embedding."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from vit_triton.integrations.parts import (
    AttentionParts,
    Branch,
    MlpParts,
    activation_of,
    attend,
    dropout_of,
    feed_forward,
    linear_of,
    norm_of,
)
from vit_triton.integrations.pytorch import read_multihead_attention
from vit_triton.integrations.recipes import Recipe, check_members, register, submodule

_mlps: list[type[nn.Module]] = []


def register_all() -> None:
    if "torchvision" not in sys.modules:
        return
    from torchvision.models import vision_transformer
    from torchvision.ops.misc import MLP

    register(vision_transformer.EncoderBlock, Recipe(("attention", "mlp", "layer_norm"), read_block, compute_block))
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


class BlockParts(NamedTuple):
    attention: AttentionParts
    mlp: MlpParts


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


def compute_block(x: Tensor, parts: BlockParts, backend: str | None) -> Tensor:
    x = attend(x, parts.attention, backend, Branch(residual=x))
    return feed_forward(x, parts.mlp, backend, Branch(residual=x))
