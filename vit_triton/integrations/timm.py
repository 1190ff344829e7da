"""Recipes for timm's Vision Transformers (https://github.com/huggingface/pytorch-image-models), timm 1.0."""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.integrations.encoder import iterating, reading_class_token
from vit_triton.integrations.parts import (
    AttentionInput,
    AttentionParts,
    BlockParts,
    Branch,
    MlpParts,
    Weight,
    activation_of,
    attend_input,
    check_head_size,
    check_input,
    check_mask,
    check_tokens,
    compute_block,
    dropout_of,
    feed_forward,
    joined_linears,
    layer_norm_of,
    linear,
    linear_of,
)
from vit_triton.integrations.pytorch import LAYER_NORM
from vit_triton.integrations.recipes import (
    Recipe,
    UnsupportedModule,
    check_members,
    check_methods,
    kernel_input,
    plain_input,
    register,
    register_container,
    submodule,
    trust,
)
from vit_triton.integrations.timm_naflex import register_naflex
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


class Classes(NamedTuple):
    """Classes of timm; None if the installed version does not have the class."""

    Attention: Any
    AttentionPoolLatent: Any
    Block: Any
    AttentionRope: Any
    DropPath: Any
    Eva: Any
    EvaAttention: Any
    EvaBlock: Any
    EvaBlockPostNorm: Any
    GELU: Any
    GELUTanh: Any
    GluMlp: Any
    LayerNorm: Any
    LayerScale: Any
    Mlp: Any
    QuickGELU: Any
    RmsNorm: Any
    SwiGLU: Any
    SwinTransformerBlock: Any
    SwinTransformerV2Block: Any
    VisionTransformer: Any
    WindowAttention: Any


_classes = Classes(*(None for _ in Classes._fields))


def register_all() -> None:
    if "timm" not in sys.modules:
        return
    import timm.layers.activations
    import timm.models.eva
    import timm.models.swin_transformer
    import timm.models.swin_transformer_v2
    import timm.models.vision_transformer

    global _classes
    swin, swin_v2 = timm.models.swin_transformer, timm.models.swin_transformer_v2
    homes = (timm.models.vision_transformer, timm.models.eva, swin, swin_v2, timm.layers, timm.layers.activations)
    _classes = Classes(*(next((vars(m)[name] for m in homes if name in vars(m)), None) for name in Classes._fields))
    trust(*_classes)
    block = ("attention", "mlp", "layer_norm")
    register(_classes.Block, Recipe(block, read_block, compute_block, attention_input))
    register(_classes.Attention, Recipe(("attention",), read_attention, attend_input, attention_input))
    register(_classes.EvaBlock, Recipe(block, read_eva_block, compute_block, rotary_input))
    register(_classes.EvaBlockPostNorm, Recipe(block, read_post_norm_block, compute_post_norm_block, rotary_input))
    for cls in (_classes.EvaAttention, _classes.AttentionRope):
        register(cls, Recipe(("attention",), read_rotary_attention, attend_input, rotary_input))
    trust(getattr(swin_v2, "WindowAttention", None))
    for cls in (_classes.SwinTransformerBlock, _classes.SwinTransformerV2Block):
        register(cls, Recipe(block, read_swin_block, compute_window_block))
    for home in (swin, swin_v2):
        register(getattr(home, "PatchMerging", None), Recipe(("layer_norm",), read_merging, compute_merging))
    register(_classes.AttentionPoolLatent, Recipe(block, read_pool, compute_pool, pool_input))
    for cls in (_classes.Mlp, _classes.GluMlp, _classes.SwiGLU):
        register(cls, Recipe(("mlp",), read_mlp, feed_forward))
    register(_classes.LayerNorm, LAYER_NORM)
    register_container(_classes.VisionTransformer, reading_class_token(class_token_blocks), *METHODS)
    register_naflex()
    register_container(_classes.Eva, iterating("blocks", supports=shares_positions), "forward_features")


# --- parts -------------------------------------------------------------------------------------------------


def norm_or_none(module: nn.Module, name: str) -> F.Norm | None:
    """Return (weight, bias, eps) from the LayerNorm called `name`, or None for an Identity."""
    norm = submodule(module, name, _classes.LayerNorm, nn.LayerNorm, nn.Identity)
    return None if isinstance(norm, nn.Identity) else layer_norm_of(norm)


def norm_or_module(module: nn.Module, name: str) -> F.Norm | nn.Module | None:
    """Return (weight, bias, eps) from the LayerNorm called `name`, an RmsNorm itself, or None for an Identity."""
    if _classes.RmsNorm is not None and isinstance(module._modules.get(name), _classes.RmsNorm):
        return cast(nn.Module, submodule(module, name, _classes.RmsNorm))
    return norm_or_none(module, name)


def head_norms_of(module: nn.Module) -> dict[str, Any]:
    """Return q_norm, k_norm and norm_type as arguments; empty without norms."""
    norms: dict[str, F.Norm] = {}
    kinds = set()
    for name in ("q_norm", "k_norm"):
        norm = submodule(module, name, _classes.LayerNorm, nn.LayerNorm, _classes.RmsNorm, nn.Identity)
        if isinstance(norm, nn.Identity):
            continue
        if _classes.RmsNorm is not None and isinstance(norm, _classes.RmsNorm):
            check_members(norm, "weight")
            if norm._fast_norm or len(norm.normalized_shape) != 1:
                raise UnsupportedModule(f"{name}: fast_norm is on, or several dimensions are normalized")
            norms[name], kind = (norm.weight, None, norm.eps), "rms_norm"
        else:
            norms[name], kind = layer_norm_of(norm), "layer_norm"
        kinds.add(kind)
    if len(kinds) > 1:
        raise UnsupportedModule("q_norm and k_norm have different types")
    return {**norms, "norm_type": kinds.pop()} if kinds else {}


def branch_of(block: nn.Module, number: str) -> Branch:
    """Return LayerScale and stochastic depth of a branch, without the residual."""
    scale = submodule(block, f"ls{number}", _classes.LayerScale, nn.Identity)
    return Branch(None, None if isinstance(scale, nn.Identity) else scale.gamma, drop_path_of(block, number))


def drop_path_of(block: nn.Module, number: str) -> float:
    """Return the probability of stochastic depth of a branch in its current mode."""
    drop = submodule(block, f"drop_path{number}", _classes.DropPath, nn.Identity)
    if isinstance(drop, nn.Identity):
        return 0.0
    if not drop.scale_by_keep:
        raise UnsupportedModule(f"drop_path{number} has scale_by_keep=False")
    return float(drop.drop_prob or 0.0) if drop.training else 0.0


def attention_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...] = ("x", "attn_mask", "is_causal")
) -> AttentionInput:
    """Return tokens, tables and mask of a call. timm concatenates sin and cos."""
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    rope, mask = call.pop("rope", None), call.pop("attn_mask", None)
    x = plain_input((call.pop("x", None), *args[len(names) :]), call)
    tables = None
    if rope is not None:
        sin, cos = (table[None] if table.ndim == 3 else table for table in kernel_input(rope).chunk(2, -1))
        tables = cos, sin
    return AttentionInput(x, tables, None if mask is None else kernel_input(mask, torch.bool))


rotary_input = functools.partial(attention_input, names=("x", "rope", "attn_mask", "is_causal"))
pool_input = functools.partial(attention_input, names=("x", "attn_mask"))


# --- modules -----------------------------------------------------------------------------------------------


def read_attention(module: Any) -> AttentionParts:
    check_members(module, "qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")
    check_head_size(module.head_dim)
    qkv_weight, qkv_bias = linear_of(module, "qkv")
    out_weight, out_bias = linear_of(module, "proj")
    return AttentionParts(
        heads=module.num_heads,
        scale=module.scale,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        out_weight=out_weight,
        out_bias=out_bias,
        **head_norms_of(module),
        dropout_p=attention_dropout_of(module),
        out_norm=norm_or_none(module, "norm") if "norm" in module._modules else None,
        out_dropout_p=dropout_of(module, "proj_drop"),
    )


def attention_dropout_of(module: Any) -> float:
    # fused attention uses the mode of the attention module; otherwise the Dropout uses its own
    dropout = submodule(module, "attn_drop", nn.Dropout)
    dropping = module.training if module.fused_attn else dropout.training
    return float(dropout.p) if dropping else 0.0


def read_rotary_attention(module: Any) -> AttentionParts:
    """Read an EvaAttention or AttentionRope, with one or three projections."""
    projections = ("qkv", "q_proj", "k_proj", "v_proj", "q_bias", "v_bias")
    check_members(module, *projections, "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")
    if module._modules.get("gate") is not None:
        raise UnsupportedModule("gate: gated attention")
    if getattr(module, "num_kv_groups", 1) != 1:
        raise UnsupportedModule("fewer heads of keys than of queries")
    check_head_size(module.head_dim)
    if module._modules.get("qkv") is None:
        weight, bias = joined_linears(module, "q_proj", "k_proj", "v_proj")
    else:
        weight, bias = linear_of(module, "qkv")
        if getattr(module, "q_bias", None) is not None:
            if bias is not None:
                raise UnsupportedModule("qkv: two biases")
            bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    out_weight, out_bias = linear_of(module, "proj")
    return AttentionParts(
        heads=module.num_heads,
        scale=module.head_dim**-0.5 if module.fused_attn else module.scale,
        qkv_weight=weight,
        qkv_bias=bias,
        out_weight=out_weight,
        out_bias=out_bias,
        **head_norms_of(module),
        dropout_p=attention_dropout_of(module),
        out_norm=norm_or_module(module, "norm"),
        out_dropout_p=dropout_of(module, "proj_drop"),
        rope_layout="half" if getattr(module, "rotate_half", False) else "interleaved",
        rope_prefix=module.num_prefix_tokens,
    )


def read_mlp(module: Any) -> MlpParts:
    """Read an Mlp, a GluMlp with gate_last=False, or a SwiGLU."""
    check_members(module, "fc1", "fc1_g", "fc1_x", "act", "drop1", "norm", "fc2", "drop2")
    inner_norm = norm_or_module(module, "norm") if "norm" in module._modules else None
    activation = activation_of(
        module,
        "act",
        {_classes.GELU: "gelu", _classes.GELUTanh: "gelu_tanh", _classes.QuickGELU: "quick_gelu"},
    )
    if isinstance(module, _classes.Mlp):
        w1, b1 = linear_of(module, "fc1")
    else:
        if activation != "silu" or getattr(module, "gate_last", False):
            raise UnsupportedModule("gate activation is not SiLU, or gate_last is True")
        activation = "swiglu"
        if isinstance(module, _classes.GluMlp):
            w1, b1 = linear_of(module, "fc1")
        else:
            w1, b1 = joined_linears(module, "fc1_g", "fc1_x")
    w2, b2 = linear_of(module, "fc2")
    hidden_dropout_p, dropout_p = dropout_of(module, "drop1"), dropout_of(module, "drop2")
    return MlpParts(
        *(w1, b1, w2, b2, activation),
        hidden_dropout_p=hidden_dropout_p,
        dropout_p=dropout_p,
        inner_norm=inner_norm,
    )


def read_inner_mlp(block: nn.Module) -> MlpParts:
    return read_mlp(submodule(block, "mlp", _classes.Mlp, _classes.GluMlp, _classes.SwiGLU))


def read_block(module: Any) -> BlockParts:
    check_members(module, "norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    attention = submodule(module, "attn", _classes.Attention)
    return BlockParts(
        read_attention(attention)._replace(norm=norm_or_none(module, "norm1")),
        read_inner_mlp(module)._replace(norm=norm_or_none(module, "norm2")),
        branch_of(module, "1"),
        branch_of(module, "2"),
    )


def read_eva_block(module: Any) -> BlockParts:
    attention, mlp = eva_branches(module, "gamma_1", "gamma_2")
    return BlockParts(
        attention._replace(norm=norm_or_module(module, "norm1")),
        mlp._replace(norm=norm_or_module(module, "norm2")),
        Branch(None, module.gamma_1, drop_path_of(module, "1")),
        Branch(None, module.gamma_2, drop_path_of(module, "2")),
    )


def eva_branches(module: Any, *others: str) -> tuple[AttentionParts, MlpParts]:
    """Read attention and MLP of an EvaBlock or EvaBlockPostNorm; ``others``: its other members."""
    check_members(module, "norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2", *others)
    attention = submodule(module, "attn", _classes.EvaAttention, _classes.AttentionRope)
    return read_rotary_attention(attention), read_inner_mlp(module)


class PostNormParts(NamedTuple):
    """A block that normalizes the output of its branches; norms and stochastic depth run as modules."""

    attention: AttentionParts
    mlp: MlpParts
    norm1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    drop_path2: nn.Module


def read_post_norm_block(module: Any) -> PostNormParts:
    modules = [
        submodule(module, name + number, *classes)
        for number in "12"
        for name, classes in (
            ("norm", (_classes.LayerNorm, nn.LayerNorm, _classes.RmsNorm, nn.Identity)),
            ("drop_path", (_classes.DropPath, nn.Identity)),
        )
    ]
    return PostNormParts(*eva_branches(module), *modules)


def compute_post_norm_block(given: AttentionInput, parts: PostNormParts, backend: str | None) -> Tensor:
    x = given.x
    x = x + parts.drop_path1(parts.norm1(attend_input(given, parts.attention, backend)))
    return cast(Tensor, x + parts.drop_path2(parts.norm2(feed_forward(x, parts.mlp, backend))))


def read_swin_block(module: Any) -> WindowBlockParts:
    from timm.models import swin_transformer_v2

    check_members(module, "norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")
    norms = norm_or_none(module, "norm1"), norm_or_none(module, "norm2")
    if norms[0] is None or norms[1] is None:
        raise UnsupportedModule("a norm is missing")
    post_norm = _classes.SwinTransformerV2Block is not None and isinstance(module, _classes.SwinTransformerV2Block)
    attention = submodule(
        module, "attn", swin_transformer_v2.WindowAttention if post_norm else _classes.WindowAttention
    )
    if tuple(attention.window_size) != tuple(module.window_size):
        raise UnsupportedModule("block and attention have different windows")
    drop_path_p = drop_path_of(module, "1"), drop_path_of(module, "2")
    return WindowBlockParts(
        read_window_attention(attention, module.shift_size),
        read_mlp(submodule(module, "mlp", _classes.Mlp)),
        cast(tuple[F.Norm, F.Norm], norms),
        drop_path_p,
        post_norm,
        (module.drop_path1, module.drop_path2),
    )


def read_window_attention(module: Any, shift: tuple[int, int]) -> WindowParts:
    """Read the attention of Swin or Swin V2."""
    check_members(
        *(module, "relative_position_bias_table", "logit_scale", "cpb_mlp", "q_bias", "v_bias"),
        *("qkv", "attn_drop", "proj", "proj_drop", "softmax"),
    )
    submodule(module, "softmax", nn.Softmax)
    weight, bias = linear_of(module, "qkv")
    out_weight, out_bias = linear_of(module, "proj")
    if "cpb_mlp" in module._modules:
        table, logit_scale = cosine_of(module, module.cpb_mlp, module.num_heads)
        if module.q_bias is not None:
            bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
        dropout_p = dropout_of(module, "attn_drop")
    else:
        table, logit_scale = module.relative_position_bias_table, None
        dropout_p = attention_dropout_of(module)
    return WindowParts(
        **window_of(module.num_heads, module.window_size, shift, table, weight.shape[0] // 3),
        qkv_weight=weight,
        qkv_bias=bias,
        out_weight=out_weight,
        out_bias=out_bias,
        logit_scale=logit_scale,
        dropout_p=dropout_p,
        out_dropout_p=dropout_of(module, "proj_drop"),
        rolls_first=True,
    )


def read_merging(module: Any) -> MergingParts:
    check_members(module, "norm", "reduction")
    norm = norm_or_none(module, "norm")
    if norm is None:
        raise UnsupportedModule("norm: missing")
    # in V2, the norm has the width of the result
    return MergingParts(merging_weight(module), norm, module.norm.normalized_shape[0] != module.reduction.in_features)


METHODS = ("forward_features", "forward_head", "pool")


def class_token_blocks(model: Any) -> nn.Module:
    """Return the blocks of a VisionTransformer whose head reads only the class token."""
    check_methods(model, _classes.VisionTransformer, *METHODS)
    if model.global_pool != "token" or model.attn_pool is not None:
        raise UnsupportedModule("the head reads other tokens")
    norm_or_none(model, "norm")
    return submodule(model, "blocks", nn.Sequential)


def shares_positions(model: Any) -> bool:
    """Return whether all blocks of an Eva model receive the same rotary positions."""
    try:
        check_methods(model, _classes.Eva, "forward_features")
    except UnsupportedModule:
        return False
    return not getattr(model, "rope_mixed", False)


class PoolParts(NamedTuple):
    latent: Tensor
    pos_embed: Tensor | None
    q: tuple[Weight, Tensor | None]
    kv: tuple[Weight, Tensor | None]
    proj: tuple[Weight, Tensor | None]
    attention: dict[str, Any]
    heads: int
    out_dropout_p: float
    mlp: MlpParts | None
    pool: str
    fused: bool


def read_pool(module: Any) -> PoolParts:
    """Read an attention pooling layer, as in SigLIP: attention with learned queries, and an MLP."""
    check_members(module, "latent", "pos_embed", "q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp")
    check_head_size(module.head_dim)
    mlp = None if module.mlp is None else read_mlp(submodule(module, "mlp", _classes.Mlp))
    return PoolParts(
        latent=module.latent,
        pos_embed=module.pos_embed,
        q=linear_of(module, "q"),
        kv=linear_of(module, "kv"),
        proj=linear_of(module, "proj"),
        attention=dict(scale=module.scale, **head_norms_of(module)),
        heads=module.num_heads,
        out_dropout_p=dropout_of(module, "proj_drop"),
        mlp=None if mlp is None else mlp._replace(norm=norm_or_none(module, "norm")),
        pool=module.pool,
        fused=module.fused_attn,
    )


def compute_pool(given: AttentionInput, parts: PoolParts, backend: str | None) -> Tensor:
    x, _, mask = given
    if mask is not None and mask.dtype == torch.bool and not parts.fused:
        raise UnsupportedModule("timm adds a bool mask to the scores")
    check_mask(x, parts.heads, parts.latent.shape[1], mask)
    check_input(x, parts.latent, parts.q[0], parts.kv[0], parts.proj[0], parts.pos_embed)
    check_tokens(x)
    if parts.pos_embed is not None:
        x = x + parts.pos_embed.unsqueeze(0).to(x.dtype)
    q = linear(parts.latent.expand(x.shape[0], -1, -1), *parts.q, backend=backend)
    kv = linear(x, *parts.kv, backend=backend)
    q, kv = q.unflatten(-1, (parts.heads, -1)), kv.unflatten(-1, (2, parts.heads, -1))
    out = F.attention(q, *kv.unbind(2), bias=mask, **parts.attention, backend=backend)
    x = linear(cast(Tensor, out).flatten(2), *parts.proj, dropout_p=parts.out_dropout_p, backend=backend)
    if parts.mlp is not None:
        x = feed_forward(x, parts.mlp, backend, Branch(residual=x))
    if parts.pool == "token":
        return x[:, 0]
    return x.mean(1) if parts.pool == "avg" else x
