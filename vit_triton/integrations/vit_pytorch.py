"""Recipes for lucidrains' vit_pytorch (https://github.com/lucidrains/vit-pytorch): ViT, SimpleViT, and models built
from their modules, such as DistillableViT."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.integrations.encoder import reading_class_token, reads_class_token, run_parts
from vit_triton.integrations.parts import (
    AttentionParts,
    BlockParts,
    MlpParts,
    activation_of,
    attend,
    check_head_size,
    check_input,
    check_rows,
    dropout_of,
    feed_forward,
    linear_of,
    norm_of,
)
from vit_triton.integrations.pytorch import compute_layer_norm
from vit_triton.integrations.recipes import (
    Recipe,
    UnsupportedModule,
    check_members,
    register,
    register_container,
    submodule,
    trust,
)
from vit_triton.modules import may_fuse_blocks


class Classes(NamedTuple):
    """Classes of one file of vit_pytorch."""

    Attention: Any
    FeedForward: Any
    Transformer: Any


_files: list[Classes] = []


def register_all() -> None:
    if "vit_pytorch" not in sys.modules:
        return
    from einops.layers.torch import Rearrange
    from vit_pytorch import simple_vit, vit

    _files[:] = [Classes(*(getattr(file, name) for name in Classes._fields)) for file in (vit, simple_vit)]
    trust(Rearrange)
    register(nn.Sequential, Recipe(("patch_embedding", "layer_norm"), read_patch_embedding, compute_patch_embedding))
    for classes in _files:
        register(classes.Attention, Recipe(("attention", "layer_norm"), read_attention, attend))
        register(classes.FeedForward, Recipe(("mlp", "layer_norm"), read_feed_forward, feed_forward))
        register(classes.Transformer, Recipe(("attention", "mlp", "layer_norm"), read_transformer, compute_transformer))
    register_container(vit.ViT, reading_class_token(class_token_transformer))


PATCHES = "b c (h p1) (w p2) -> b (h w) (p1 p2 c)"


class PatchEmbeddingParts(NamedTuple):
    patch_size: tuple[int, int]
    pre_norm: F.Norm
    linear: tuple[Tensor, Tensor | None]
    post_norm: F.Norm


def read_patch_embedding(module: nn.Sequential) -> PatchEmbeddingParts | None:
    from einops.layers.torch import Rearrange

    if [type(child).__name__ for child in module] != ["Rearrange", "LayerNorm", "Linear", "LayerNorm"]:
        return None
    cut = submodule(module, "0", Rearrange)
    sides = dict(cut.axes_lengths)
    if cut.pattern != PATCHES or sides.keys() != {"p1", "p2"}:
        raise UnsupportedModule(f"pattern of Rearrange is not {PATCHES!r}")
    return PatchEmbeddingParts(
        (sides["p1"], sides["p2"]),
        norm_of(module, "1", nn.LayerNorm),
        linear_of(module, "2"),
        norm_of(module, "3", nn.LayerNorm),
    )


def compute_patch_embedding(image: Tensor, parts: PatchEmbeddingParts, backend: str | None) -> Tensor:
    """Compute (B, C, H, W) -> (B, patches, dim)."""
    height, width = image.shape[-2:]
    patch_h, patch_w = parts.patch_size
    weight, bias = parts.linear
    check_input(image, weight)
    if image.ndim != 4 or height % patch_h or width % patch_w or 0 in image.shape[1:]:
        raise UnsupportedModule("input is not a batch of images whose size is divisible by the patch size")
    check_rows(image.shape[0] * (height // patch_h) * (width // patch_w))
    return F.patch_embed(
        image,
        weight,
        bias,
        patch_size=parts.patch_size,
        patch_order="p1 p2 c",
        pre_norm=parts.pre_norm,
        post_norm=parts.post_norm,
        backend=backend,
    )


def read_attention(module: Any) -> AttentionParts:
    check_members(module, "norm", "attend", "dropout", "to_qkv", "to_out")
    submodule(module, "attend", nn.Softmax)
    qkv_weight, qkv_bias = linear_of(module, "to_qkv")
    check_head_size(qkv_weight.shape[0] // 3 // module.heads)
    out = submodule(module, "to_out", nn.Sequential, nn.Linear, nn.Identity)
    projection: tuple[Tensor | None, Tensor | None] = None, None
    out_dropout_p = 0.0
    if isinstance(out, nn.Sequential):
        check_members(out, "0", "1")
        projection, out_dropout_p = linear_of(out, "0"), dropout_of(out, "1")
    elif isinstance(out, nn.Linear):
        projection = linear_of(module, "to_out")
    return AttentionParts(
        heads=module.heads,
        scale=module.scale,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        out_weight=projection[0],
        out_bias=projection[1],
        norm=norm_of(module, "norm", nn.LayerNorm),
        dropout_p=dropout_of(module, "dropout"),
        out_dropout_p=out_dropout_p,
    )


def read_feed_forward(module: Any) -> MlpParts:
    check_members(module, "net")
    net = submodule(module, "net", nn.Sequential)
    check_members(net, "0", "1", "2", "3", "4", "5")
    if len(net) not in (4, 6):
        raise UnsupportedModule(f"net has {len(net)} modules, expected 4 or 6")
    last = "4" if len(net) == 6 else "3"  # SimpleViT has no Dropout
    return MlpParts(
        *linear_of(net, "1"),
        *linear_of(net, last),
        activation=activation_of(net, "2"),
        norm=norm_of(net, "0", nn.LayerNorm),
        hidden_dropout_p=dropout_of(net, "3") if len(net) == 6 else 0.0,
        dropout_p=dropout_of(net, "5"),
    )


class TransformerParts(NamedTuple):
    blocks: list[BlockParts]
    norm: F.Norm
    first_token: bool  # the output may have only the first token


def read_transformer(module: Any) -> TransformerParts:
    check_members(module, "norm", "layers")
    blocks = []
    for block in module.layers:
        check_members(block, "0", "1")
        attention = submodule(block, "0", *(file.Attention for file in _files))
        mlp = submodule(block, "1", *(file.FeedForward for file in _files))
        blocks.append(BlockParts(read_attention(attention), read_feed_forward(mlp)))
    first_token = may_fuse_blocks() and reads_class_token(module)
    return TransformerParts(blocks, norm_of(module, "norm", nn.LayerNorm), first_token)


def compute_transformer(x: Tensor, parts: TransformerParts, backend: str | None) -> Tensor:
    x = run_parts(x, parts.blocks, backend, parts.first_token)
    return compute_layer_norm(x, parts.norm, backend)


def class_token_transformer(model: Any) -> nn.Module:
    """Return the Transformer of a ViT whose head reads only the class token."""
    if model.pool != "cls" or model.mlp_head is None:
        raise UnsupportedModule("the head reads other tokens")
    return submodule(model, "transformer", *(file.Transformer for file in _files))
