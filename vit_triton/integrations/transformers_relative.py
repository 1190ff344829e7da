"""Recipes for models of Hugging Face transformers with relative positions: BEiT and SAM's image encoder."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from vit_triton import functional as F
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
    MlpParts,
    activation_of,
    attend,
    check_head_size,
    check_input,
    compute_block,
    feed_forward,
    linear_of,
    norm_of,
)
from vit_triton.integrations.recipes import (
    Recipe,
    UnsupportedModule,
    check_members,
    kernel_input,
    register,
    submodule,
    trust,
)
from vit_triton.integrations.transformers import (
    ACTIVATIONS,
    VIT,
    Classes,
    hidden_states_input,
    read_mlp,
    records_outputs,
)

__all__ = ["register_all"]

BEIT = "transformers.models.beit.modeling_beit"
SAM = "transformers.models.sam.modeling_sam"
BLOCK = ("attention", "mlp", "layer_norm")


def register_all() -> None:
    """Register the recipes for every model file that has been imported."""
    beit, sam = sys.modules.get(BEIT), sys.modules.get(SAM)
    if beit is not None:
        trust(beit.BeitDropPath, beit.BeitRelativePositionBias)
        register(beit.BeitLayer, Recipe(BLOCK, read_beit_layer, compute_beit_layer, beit_input))
        register(beit.BeitAttention, Recipe(("attention",), read_beit_attention, attend_masked, beit_input))
        register(beit.BeitMLP, Recipe(("mlp",), read_mlp, feed_forward))
    if sam is not None:
        register(sam.SamVisionLayer, Recipe(BLOCK, read_sam_layer, compute_decomposed_block))
        for cls in (sam.SamVisionAttention, sam.SamVisionSdpaAttention):
            register(cls, Recipe(("attention",), read_sam_attention, attend_without_weights, tokens_input))
        register(sam.SamMLPBlock, Recipe(("mlp",), read_sam_mlp, feed_forward))


def tokens_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states of a call without other arguments that affect attention."""
    return hidden_states_input(args, kwargs, ("hidden_states",)).x


# --- BEiT --------------------------------------------------------------------------------------------------


class BeitInput(NamedTuple):
    """Tokens, a bias or mask of all layers, and the arguments of the layer's own bias."""

    x: Tensor
    mask: Tensor | None
    interpolate: bool
    resolution: tuple[int, int] | None


class BeitLayerParts(NamedTuple):
    block: BlockParts
    position_bias: Any
    patch_size: int


def beit_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> BeitInput:
    names = ("hidden_states", "attention_mask", "interpolate_pos_encoding", "resolution")
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    mask, interpolate, resolution = (call.pop(name, None) for name in names[1:])
    x = tokens_input((call.pop("hidden_states", None), *args[len(names) :]), call)
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedModule("attention_mask is not a tensor")
    return BeitInput(x, mask, bool(interpolate), resolution)


def beit_classes() -> Classes:
    beit: Any = sys.modules[BEIT]
    family = VIT._replace(others=("lambda_1", "lambda_2", "relative_position_bias"))
    return Classes(family, beit.BeitAttention, beit.BeitMLP, None, None, None, beit.BeitDropPath)


def read_beit_attention(module: Any) -> AttentionParts:
    return beit_classes().read_attention(module)


def read_beit_layer(module: Any) -> BeitLayerParts:
    position_bias = module._modules.get("relative_position_bias")
    if position_bias is not None:
        submodule(module, "relative_position_bias", sys.modules[BEIT].BeitRelativePositionBias)
    return BeitLayerParts(beit_classes().read_layer(module), position_bias, module.patch_size)


def attend_masked(given: BeitInput, parts: AttentionParts, backend: str | None) -> tuple[Tensor, None]:
    return attend(given.x, parts, backend, bias=given.mask), None


def compute_beit_layer(given: BeitInput, parts: BeitLayerParts, backend: str | None) -> Tensor:
    bias = given.mask
    if parts.position_bias is not None:
        own = position_bias_of(given, parts, backend)
        bias = own if bias is None else own + bias
    return compute_block(AttentionInput(given.x, None, bias), parts.block, backend)


def position_bias_of(given: BeitInput, parts: BeitLayerParts, backend: str | None) -> Tensor:
    """Return the bias of a layer's relative positions. The library computes it for maps of another size or shape."""
    module, resolution = parts.position_bias, given.resolution
    if resolution is None:
        raise UnsupportedModule("called without resolution")
    check_input(given.x, module.relative_position_bias_table)
    window = resolution[0] // parts.patch_size, resolution[1] // parts.patch_size
    if given.interpolate or window != tuple(module.window_size) or window[0] != window[1]:
        bias: Tensor = module(window, given.interpolate, dim_size=given.x.shape[1])
        return bias
    table = kernel_input(module.relative_position_bias_table)
    return F.relative_position_bias(table, window, prefix_tokens=1, backend=backend)[None]


# --- SAM ---------------------------------------------------------------------------------------------------


def read_sam_mlp(module: Any) -> MlpParts:
    check_members(module, "lin1", "lin2", "act")
    activation = activation_of(module, "act", ACTIVATIONS)
    return MlpParts(*linear_of(module, "lin1"), *linear_of(module, "lin2"), activation)


def read_sam_attention(module: Any) -> DecomposedParts:
    if returns_weights(module):
        raise UnsupportedModule('attn_implementation="eager" returns the attention weights')
    return sam_attention_of(module)


def returns_weights(module: nn.Module) -> bool:
    return not isinstance(module, sys.modules[SAM].SamVisionSdpaAttention)


def sam_attention_of(module: Any) -> DecomposedParts:
    """Read an attention module whose attention weights are not used."""
    check_members(module, "qkv", "proj", "rel_pos_h", "rel_pos_w")
    qkv_weight, qkv_bias = linear_of(module, "qkv")
    out_weight, out_bias = linear_of(module, "proj")
    head_dim = qkv_weight.shape[0] // 3 // module.num_attention_heads
    check_head_size(head_dim)
    attention = AttentionParts(
        heads=module.num_attention_heads,
        scale=module.scale if returns_weights(module) else head_dim**-0.5,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        out_weight=out_weight,
        out_bias=out_bias,
        dropout_p=module.dropout if module.training and returns_weights(module) else 0.0,  # "sdpa" ignores it
    )
    return DecomposedParts(attention, (module.rel_pos_h, module.rel_pos_w) if module.use_rel_pos else None)


def attend_without_weights(x: Tensor, parts: DecomposedParts, backend: str | None) -> tuple[Tensor, None]:
    return attend_decomposed(x, parts, backend), None


def read_sam_layer(module: Any) -> DecomposedBlockParts:
    sam: Any = sys.modules[SAM]
    check_members(module, "layer_norm1", "attn", "layer_norm2", "mlp")
    inner = submodule(module, "attn", sam.SamVisionAttention, sam.SamVisionSdpaAttention, unless=records_outputs)
    if inner._forward_hooks and returns_weights(inner):
        raise UnsupportedModule("attn: a hook may record the attention weights")
    attention, rel_pos = sam_attention_of(inner)
    mlp = read_sam_mlp(submodule(module, "mlp", sam.SamMLPBlock))
    block = BlockParts(
        attention._replace(norm=norm_of(module, "layer_norm1", nn.LayerNorm)),
        mlp._replace(norm=norm_of(module, "layer_norm2", nn.LayerNorm)),
    )
    return DecomposedBlockParts(block, rel_pos, int(module.window_size))
