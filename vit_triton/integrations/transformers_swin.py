"""Recipes for Swin of Hugging Face transformers."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from vit_triton.integrations.parts import MlpParts, dropout_of, linear_of, norm_of
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
from vit_triton.integrations.windows import (
    MergingParts,
    WindowBlockParts,
    WindowParts,
    compute_merging,
    compute_window_block,
    merging_weight,
    window_of,
)

__all__ = ["register_swin"]

FILE = "transformers.models.swin.modeling_swin"


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


def register_swin(read_mlp: Any, read_projections: Any) -> None:
    """Register the recipes if the model file has been imported.

    Args:
        read_mlp: module -> :class:`.parts.MlpParts`.
        read_projections: (module, names) -> joint weight and bias.
    """
    file = sys.modules.get(FILE)
    if file is None:
        return
    trust(*(getattr(file, f"Swin{name}", None) for name in ("Attention", "MLP", "DropPath", "RelativePositionBias")))

    def read(module: Any) -> LayerParts:
        return read_layer(module, read_mlp, read_projections)

    register(file.SwinLayer, Recipe(("attention", "mlp", "layer_norm"), read, compute_layer, map_input))
    register(file.SwinPatchMerging, Recipe(("layer_norm",), read_merging, merge, map_input))


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


def read_layer(module: Any, read_mlp: Any, read_projections: Any) -> LayerParts:
    file: Any = sys.modules[FILE]
    check_members(module, "attention", "layernorm_before", "layernorm_after", "mlp", "dropout", "drop_path")
    attention = submodule(module, "attention", file.SwinAttention)
    if attention.config._attn_implementation not in ("sdpa", "vit_triton"):
        raise UnsupportedModule(f"attn_implementation={attention.config._attn_implementation!r}")
    check_members(attention, "q_proj", "k_proj", "v_proj", "o_proj", "relative_position_bias")
    position_bias = submodule(attention, "relative_position_bias", file.SwinRelativePositionBias)
    qkv_weight, qkv_bias = read_projections(attention, "q_proj", "k_proj", "v_proj")
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
