"""Recipes for Swin and Swin V2 of Hugging Face transformers."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from vit_triton.integrations.parts import MlpParts, activation_of, dropout_of, joined_linears, linear_of, norm_of
from vit_triton.integrations.recipes import (
    Recipe,
    UnsupportedModule,
    check_members,
    kernel_input,
    plain_input,
    register,
    submodule,
    trust,
)
from vit_triton.integrations.transformers import ACTIVATIONS, read_mlp
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

__all__ = ["register_all"]

SWIN = "transformers.models.swin.modeling_swin"
SWIN_V2 = "transformers.models.swinv2.modeling_swinv2"


class MapInput(NamedTuple):
    """Tokens (B, H * W, dim), and H and W."""

    x: Tensor
    size: tuple[int, int]
    always_partition: bool = False


class LayerParts(NamedTuple):
    """A layer; its window and shift depend on the size of the map."""

    module: Any
    attention: Any
    weights: dict[str, Any]
    mlp: MlpParts
    norms: tuple[Any, Any]
    drop_path_p: float


def register_all() -> None:
    """Register the recipes for every model file that has been imported."""
    block = ("attention", "mlp", "layer_norm")
    file, file_v2 = sys.modules.get(SWIN), sys.modules.get(SWIN_V2)
    if file is not None:
        trust(file.SwinAttention, file.SwinMLP, file.SwinDropPath, file.SwinRelativePositionBias)
        register(file.SwinLayer, Recipe(block, read_layer, compute_layer, map_input))
        register(file.SwinPatchMerging, Recipe(("layer_norm",), read_merging, merge, map_input))
    if file_v2 is not None:
        names = ("Attention", "SelfAttention", "SelfOutput", "Intermediate", "Output", "DropPath")
        trust(*(getattr(file_v2, f"Swinv2{name}") for name in names))
        register(file_v2.Swinv2Layer, Recipe(block, read_layer_v2, compute_layer_v2, map_input_v2))
        register(file_v2.Swinv2PatchMerging, Recipe(("layer_norm",), read_merging_v2, merge, map_input))


def map_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> MapInput:
    names = ("hidden_states", "input_dimensions", "always_partition")
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    x = call.pop("hidden_states", call.pop("input_feature", None))
    size, always_partition = call.pop("input_dimensions", None), bool(call.pop("always_partition", False))
    call.pop("output_hidden_states", None)
    plain_input((x, *args[len(names) :]), call)
    x = kernel_input(x)
    if not isinstance(size, (tuple, list)) or len(size) != 2 or x.ndim != 3 or x.shape[1] != size[0] * size[1]:
        raise UnsupportedModule("input is not (B, H * W, dim)")
    return MapInput(x, (int(size[0]), int(size[1])), always_partition)


def read_layer(module: Any) -> LayerParts:
    file: Any = sys.modules[SWIN]
    check_members(module, "attention", "layernorm_before", "layernorm_after", "mlp", "dropout", "drop_path")
    attention = submodule(module, "attention", file.SwinAttention)
    if attention.config._attn_implementation not in ("sdpa", "vit_triton"):
        raise UnsupportedModule(f"attn_implementation={attention.config._attn_implementation!r}")
    check_members(attention, "q_proj", "k_proj", "v_proj", "o_proj", "relative_position_bias")
    position_bias = submodule(attention, "relative_position_bias", file.SwinRelativePositionBias)
    qkv_weight, qkv_bias = joined_linears(attention, "q_proj", "k_proj", "v_proj")
    out_weight, out_bias = linear_of(attention, "o_proj")
    dropout_p = dropout_of(module, "dropout")
    drop = submodule(module, "drop_path", file.SwinDropPath, nn.Identity)
    dropping = drop.training and not isinstance(drop, nn.Identity)
    return LayerParts(
        module,
        attention,
        dict(
            qkv_weight=qkv_weight,
            qkv_bias=qkv_bias,
            out_weight=out_weight,
            out_bias=out_bias,
            dropout_p=attention.attention_dropout if attention.training else 0.0,
            out_dropout_p=dropout_p,
            table=position_bias.relative_position_bias_table,
        ),
        read_mlp(submodule(module, "mlp", file.SwinMLP))._replace(dropout_p=dropout_p),
        (norm_of(module, "layernorm_before", nn.LayerNorm), norm_of(module, "layernorm_after", nn.LayerNorm)),
        float(drop.drop_prob or 0.0) if dropping else 0.0,
    )


def compute_layer(given: MapInput, parts: LayerParts, backend: str | None) -> tuple[Tensor, None]:
    module, attention = parts.module, parts.attention
    if not given.always_partition:
        module.set_shift_and_window_size(given.size)  # changes the module, as the library's forward does
    window, shift = int(module.window_size), int(module.shift_size)
    weights = dict(parts.weights)
    width = weights["qkv_weight"].shape[0] // 3
    options = window_of(attention.num_attention_heads, (window, window), (shift, shift), weights.pop("table"), width)
    block = WindowBlockParts(WindowParts(**options, **weights), parts.mlp, parts.norms, (parts.drop_path_p, 0.0))
    return compute_window_block(given.x.unflatten(1, given.size), block, backend).flatten(1, 2), None


def read_merging(module: Any) -> MergingParts:
    check_members(module, "norm", "reduction")
    return MergingParts(merging_weight(module), norm_of(module, "norm", nn.LayerNorm))


def merge(given: MapInput, parts: MergingParts, backend: str | None) -> Tensor:
    return compute_merging(given.x.unflatten(1, given.size), parts, backend).flatten(1, 2)


# --- Swin V2 -----------------------------------------------------------------------------------------------


def map_input_v2(args: tuple[Any, ...], kwargs: dict[str, Any]) -> MapInput:
    names = ("hidden_states", "input_dimensions", "output_attentions")
    if len(args) > len(names):
        raise UnsupportedModule("called with more arguments")
    return map_input((), {**dict(zip(names, args, strict=False)), **kwargs})


def read_layer_v2(module: Any) -> WindowBlockParts:
    file: Any = sys.modules[SWIN_V2]
    check_members(module, "attention", "layernorm_before", "drop_path", "intermediate", "output", "layernorm_after")
    attention = submodule(module, "attention", file.Swinv2Attention)
    check_members(attention, "self", "output")
    inner = submodule(attention, "self", file.Swinv2SelfAttention)
    if tuple(inner.window_size) != (module.window_size, module.window_size):
        raise UnsupportedModule("layer and attention have different windows")
    drop_path = submodule(module, "drop_path", file.Swinv2DropPath, nn.Identity)
    return WindowBlockParts(
        read_attention_v2(inner, submodule(attention, "output", file.Swinv2SelfOutput), module.shift_size),
        read_mlp_v2(
            submodule(module, "intermediate", file.Swinv2Intermediate), submodule(module, "output", file.Swinv2Output)
        ),
        (norm_of(module, "layernorm_before", nn.LayerNorm), norm_of(module, "layernorm_after", nn.LayerNorm)),
        post_norm=True,
        drop_paths=(drop_path, drop_path),
    )


def read_attention_v2(module: Any, output: nn.Module, shift: int) -> WindowParts:
    """Read attention, whose key projection has no bias, and its output projection."""
    check_members(module, "logit_scale", "continuous_position_bias_mlp", "query", "key", "value", "dropout")
    check_members(output, "dense", "dropout")
    weight, bias = joined_linears(module, "query", "key", "value")
    out_weight, out_bias = linear_of(output, "dense")
    table, logit_scale = cosine_of(module, module.continuous_position_bias_mlp, module.num_attention_heads)
    return WindowParts(
        **window_of(module.num_attention_heads, module.window_size, (shift, shift), table, weight.shape[0] // 3),
        qkv_weight=weight,
        qkv_bias=bias,
        out_weight=out_weight,
        out_bias=out_bias,
        logit_scale=logit_scale,
        dropout_p=dropout_of(module, "dropout"),
        out_dropout_p=dropout_of(output, "dropout"),
        mask_value=-200.0,  # the library adds its mask of -100 twice
    )


def read_mlp_v2(intermediate: nn.Module, output: nn.Module) -> MlpParts:
    check_members(intermediate, "dense", "intermediate_act_fn")
    check_members(output, "dense", "dropout")
    activation = activation_of(intermediate, "intermediate_act_fn", ACTIVATIONS)
    weights = *linear_of(intermediate, "dense"), *linear_of(output, "dense")
    return MlpParts(*weights, activation, dropout_p=dropout_of(output, "dropout"))


def compute_layer_v2(given: MapInput, parts: WindowBlockParts, backend: str | None) -> tuple[Tensor]:
    return (compute_window_block(given.x.unflatten(1, given.size), parts, backend).flatten(1, 2),)


def read_merging_v2(module: Any) -> MergingParts:
    return read_merging(module)._replace(post_norm=True)
