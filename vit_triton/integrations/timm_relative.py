"""Recipes for timm's models with relative positions: BEiT, BEiT v2 and SAM."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vit_triton import functional as F
from vit_triton.integrations import timm
from vit_triton.integrations.decomposed import (
    DecomposedBlockParts,
    DecomposedParts,
    attend_decomposed,
    compute_decomposed_block,
)
from vit_triton.integrations.parts import (
    AttentionInput,
    AttentionParts,
    BlockParts,
    Branch,
    attend,
    check_head_size,
    check_input,
    compute_block,
    dropout_of,
    linear_of,
)
from vit_triton.integrations.recipes import (
    Recipe,
    UnsupportedModule,
    check_members,
    kernel_input,
    plain_input,
    register,
    submodule,
)

__all__ = ["register_all"]

BLOCK = ("attention", "mlp", "layer_norm")


def register_all() -> None:
    if "timm" not in sys.modules:
        return
    import timm.models.beit as beit
    import timm.models.vision_transformer_sam as sam

    register(beit.Attention, Recipe(("attention",), read_attention, attend_relative, relative_input))
    register(beit.Block, Recipe(BLOCK, read_block, compute_relative_block, relative_input))
    register(beit.RelativePositionBias, Recipe(("attention",), read_table, compute_bias, no_input))
    register(sam.Attention, Recipe(("attention",), read_sam_attention, attend_decomposed))
    register(sam.Block, Recipe(BLOCK, read_sam_block, compute_decomposed_block))


# --- BEiT --------------------------------------------------------------------------------------------------


class RelativeInput(NamedTuple):
    """Tokens, and a bias that all blocks share."""

    x: Tensor
    shared: Tensor | None


class TableParts(NamedTuple):
    """The table of a relative position bias with a class token, and the height and width of the map of patches."""

    table: Tensor
    window: tuple[int, int]


class RelativeAttentionParts(NamedTuple):
    attention: AttentionParts
    positions: TableParts | None


class RelativeBlockParts(NamedTuple):
    block: BlockParts
    positions: TableParts | None


def relative_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> RelativeInput:
    names = ("x", "shared_rel_pos_bias")
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    shared = call.pop("shared_rel_pos_bias", None)
    x = plain_input((call.pop("x", None), *args[len(names) :]), call)
    return RelativeInput(x, None if shared is None else kernel_input(shared))


def no_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if args or kwargs:
        raise UnsupportedModule("called with arguments")


def read_table(module: Any) -> TableParts:
    check_members(module, "relative_position_bias_table")
    return table_of(module)


def table_of(module: Any) -> TableParts:
    height, width = module.window_size
    table = kernel_input(module.relative_position_bias_table)
    if table.shape[0] != (2 * height - 1) * (2 * width - 1) + 3:
        raise UnsupportedModule("the table of relative positions does not fit the window")
    return TableParts(table, (int(height), int(width)))


def compute_bias(given: None, parts: TableParts, backend: str | None) -> Tensor:
    return F.relative_position_bias(parts.table, parts.window, prefix_tokens=1, backend=backend)


def bias_of(given: RelativeInput, positions: TableParts | None, backend: str | None) -> Tensor | None:
    """Return the bias of a layer."""
    if positions is None:
        return given.shared
    check_input(given.x, positions.table)
    bias = compute_bias(None, positions, backend)[None]
    return bias if given.shared is None else bias + given.shared


def attend_relative(given: RelativeInput, parts: RelativeAttentionParts, backend: str | None) -> Tensor:
    bias = bias_of(given, parts.positions, backend)
    return attend(given.x, parts.attention, backend, bias=bias)


def compute_relative_block(given: RelativeInput, parts: RelativeBlockParts, backend: str | None) -> Tensor:
    return compute_block(AttentionInput(given.x, None, bias_of(given, parts.positions, backend)), parts.block, backend)


def read_attention(module: Any) -> RelativeAttentionParts:
    own = ("q_bias", "v_bias", "relative_position_bias_table")
    check_members(module, *own, "qkv", "attn_drop", "proj", "proj_drop")
    weight, bias = linear_of(module, "qkv")
    if module.q_bias is not None:
        bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    out_weight, out_bias = linear_of(module, "proj")
    if weight.shape[0] != 3 * weight.shape[1]:
        raise UnsupportedModule("the heads do not have the width of the tokens")
    head_dim = weight.shape[1] // module.num_heads
    check_head_size(head_dim)
    attention = AttentionParts(
        heads=module.num_heads,
        scale=head_dim**-0.5 if module.fused_attn else module.scale,
        qkv_weight=weight,
        qkv_bias=bias,
        out_weight=out_weight,
        out_bias=out_bias,
        dropout_p=timm.attention_dropout_of(module),
        out_dropout_p=dropout_of(module, "proj_drop"),
    )
    return RelativeAttentionParts(attention, None if module.relative_position_bias_table is None else table_of(module))


def read_block(module: Any) -> RelativeBlockParts:
    beit: Any = sys.modules["timm.models.beit"]
    check_members(module, "norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2", "gamma_1", "gamma_2")
    attention, positions = read_attention(submodule(module, "attn", beit.Attention))
    block = BlockParts(
        attention._replace(norm=timm.norm_or_module(module, "norm1")),
        timm.read_inner_mlp(module)._replace(norm=timm.norm_or_module(module, "norm2")),
        *(Branch(None, getattr(module, f"gamma_{i}"), timm.drop_path_of(module, i)) for i in "12"),
    )
    return RelativeBlockParts(block, positions)


# --- SAM ---------------------------------------------------------------------------------------------------


def read_sam_attention(module: Any) -> DecomposedParts:
    own = ("rel_pos_h", "rel_pos_w")
    check_members(module, *own, "qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop")
    check_head_size(module.head_dim)
    qkv_weight, qkv_bias = linear_of(module, "qkv")
    out_weight, out_bias = linear_of(module, "proj")
    attention = AttentionParts(
        heads=module.num_heads,
        scale=module.head_dim**-0.5 if module.fused_attn else module.scale,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        out_weight=out_weight,
        out_bias=out_bias,
        **timm.head_norms_of(module),
        dropout_p=timm.attention_dropout_of(module),
        out_dropout_p=dropout_of(module, "proj_drop"),
    )
    return DecomposedParts(attention, (module.rel_pos_h, module.rel_pos_w) if module.use_rel_pos else None)


def read_sam_block(module: Any) -> DecomposedBlockParts:
    sam: Any = sys.modules["timm.models.vision_transformer_sam"]
    check_members(module, "norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    attention, rel_pos = read_sam_attention(submodule(module, "attn", sam.Attention))
    block = BlockParts(
        attention._replace(norm=timm.norm_or_none(module, "norm1")),
        timm.read_inner_mlp(module)._replace(norm=timm.norm_or_none(module, "norm2")),
        timm.branch_of(module, "1"),
        timm.branch_of(module, "2"),
    )
    return DecomposedBlockParts(block, rel_pos, int(module.window_size))
