"""timm's Vision Transformers (https://github.com/huggingface/pytorch-image-models), as of timm 1.0."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.integrations.parts import (
    AttentionParts,
    Branch,
    MlpParts,
    activation_of,
    attend,
    check_head_size,
    check_input,
    check_tokens,
    dropout_of,
    feed_forward,
    layer_norm_of,
    linear_of,
)
from vit_triton.integrations.pytorch import LAYER_NORM
from vit_triton.integrations.recipes import Recipe, Unknown, know, only, part, teach


class Classes(NamedTuple):
    """timm's classes; None where this timm has none of that name."""

    Attention: Any
    AttentionPoolLatent: Any
    Block: Any
    DropPath: Any
    GELU: Any
    GELUTanh: Any
    GluMlp: Any
    LayerNorm: Any
    LayerScale: Any
    Mlp: Any
    QuickGELU: Any
    RmsNorm: Any
    SwiGLU: Any


_classes = Classes(*(None for _ in Classes._fields))


def teach_all() -> None:
    if "timm" not in sys.modules:
        return
    import timm.layers.activations
    import timm.models.vision_transformer

    global _classes
    homes = (timm.models.vision_transformer, timm.layers, timm.layers.activations)
    _classes = Classes(*(next((vars(m)[name] for m in homes if name in vars(m)), None) for name in Classes._fields))
    know(*_classes)
    block = ("attention", "mlp", "layer_norm")
    teach(_classes.Block, Recipe(block, read_block, compute_block))
    teach(_classes.Attention, Recipe(("attention",), read_attention, attend))
    teach(_classes.AttentionPoolLatent, Recipe(("attention", "mlp", "layer_norm"), read_pool, compute_pool))
    for cls in (_classes.Mlp, _classes.GluMlp, _classes.SwiGLU):
        teach(cls, Recipe(("mlp",), read_mlp, feed_forward))
    teach(_classes.LayerNorm, LAYER_NORM)


# --- parts -------------------------------------------------------------------------------------------------


def norm_part(module: nn.Module, name: str) -> F.Norm | None:
    """The LayerNorm of that name; None for an Identity."""
    norm = part(module, name, _classes.LayerNorm, nn.LayerNorm, nn.Identity)
    return None if isinstance(norm, nn.Identity) else layer_norm_of(norm)


def head_norms(module: nn.Module) -> dict[str, Any]:
    """The norms of queries and keys, both of one kind."""
    norms: dict[str, F.Norm] = {}
    kinds = set()
    for name in ("q_norm", "k_norm"):
        norm = part(module, name, _classes.LayerNorm, nn.LayerNorm, _classes.RmsNorm, nn.Identity)
        if isinstance(norm, nn.Identity):
            continue
        if _classes.RmsNorm is not None and isinstance(norm, _classes.RmsNorm):
            only(norm, "weight")
            if norm._fast_norm or len(norm.normalized_shape) != 1:
                raise Unknown(f"{name}: fast_norm is on, or it is over several dimensions")
            norms[name], kind = (norm.weight, None, norm.eps), "rms_norm"
        else:
            norms[name], kind = layer_norm_of(norm), "layer_norm"
        kinds.add(kind)
    if len(kinds) > 1:
        raise Unknown("q_norm and k_norm are of two kinds")
    return {**norms, "norm_type": kinds.pop()} if kinds else {}


def branch_part(block: nn.Module, number: str) -> Branch:
    """LayerScale and DropPath of a branch, without the residual."""
    scale = part(block, f"ls{number}", _classes.LayerScale, nn.Identity)
    drop = part(block, f"drop_path{number}", _classes.DropPath, nn.Identity)
    drop_path_p = 0.0
    if not isinstance(drop, nn.Identity):
        if not drop.scale_by_keep:
            raise Unknown(f"drop_path{number} does not scale what it keeps")
        drop_path_p = float(drop.drop_prob or 0.0) if drop.training else 0.0
    return Branch(None, None if isinstance(scale, nn.Identity) else scale.gamma, drop_path_p)


# --- modules -----------------------------------------------------------------------------------------------


def read_attention(module: Any) -> AttentionParts:
    only(module, "qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")
    check_head_size(module.head_dim)
    qkv_weight, qkv_bias = linear_of(module, "qkv")
    out_weight, out_bias = linear_of(module, "proj")
    # PyTorch's fused attention looks at the attention's mode, the Dropout at its own
    dropout = part(module, "attn_drop", nn.Dropout)
    dropping = module.training if module.fused_attn else dropout.training
    return AttentionParts(
        heads=module.num_heads,
        scale=module.scale,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        out_weight=out_weight,
        out_bias=out_bias,
        **head_norms(module),
        dropout_p=float(dropout.p) if dropping else 0.0,
        out_norm=norm_part(module, "norm") if "norm" in module._modules else None,
        out_dropout_p=dropout_of(module, "proj_drop"),
    )


def read_mlp(module: Any) -> MlpParts:
    """Of Mlp, of GluMlp with its gate first, of SwiGLU."""
    only(module, "fc1", "fc1_g", "fc1_x", "act", "drop1", "norm", "fc2", "drop2")
    if "norm" in module._modules:
        part(module, "norm", nn.Identity)
    activation = activation_of(
        module,
        "act",
        {_classes.GELU: "gelu", _classes.GELUTanh: "gelu_tanh", _classes.QuickGELU: "quick_gelu"},
    )
    if isinstance(module, _classes.Mlp):
        w1, b1 = linear_of(module, "fc1")
    else:
        if activation != "silu" or getattr(module, "gate_last", False):
            raise Unknown("a gate that is not SiLU, or behind the values")
        activation = "swiglu"
        if isinstance(module, _classes.GluMlp):
            w1, b1 = linear_of(module, "fc1")
        else:
            (gate, gate_bias), (value, value_bias) = linear_of(module, "fc1_g"), linear_of(module, "fc1_x")
            w1 = torch.cat((gate, value))
            b1 = None if gate_bias is None or value_bias is None else torch.cat((gate_bias, value_bias))
    w2, b2 = linear_of(module, "fc2")
    hidden_dropout_p, dropout_p = dropout_of(module, "drop1"), dropout_of(module, "drop2")
    return MlpParts(w1, b1, w2, b2, activation, hidden_dropout_p=hidden_dropout_p, dropout_p=dropout_p)


class BlockParts(NamedTuple):
    attention: AttentionParts
    branch1: Branch
    mlp: MlpParts
    branch2: Branch


def read_block(module: Any) -> BlockParts:
    only(module, "norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    attention = part(module, "attn", _classes.Attention)
    mlp = part(module, "mlp", _classes.Mlp, _classes.GluMlp, _classes.SwiGLU)
    return BlockParts(
        read_attention(attention)._replace(norm=norm_part(module, "norm1")),
        branch_part(module, "1"),
        read_mlp(mlp)._replace(norm=norm_part(module, "norm2")),
        branch_part(module, "2"),
    )


def compute_block(x: Tensor, found: BlockParts, backend: str | None) -> Tensor:
    x = attend(x, found.attention, backend, found.branch1._replace(residual=x))
    return feed_forward(x, found.mlp, backend, found.branch2._replace(residual=x))


class PoolParts(NamedTuple):
    latent: Tensor
    pos_embed: Tensor | None
    q: tuple[Tensor, Tensor | None]
    kv: tuple[Tensor, Tensor | None]
    proj: tuple[Tensor, Tensor | None]
    attention: dict[str, Any]
    heads: int
    out_dropout_p: float
    mlp: MlpParts | None
    pool: str


def read_pool(module: Any) -> PoolParts:
    """Of SigLIP's map pooling: attention of learned queries, and an MLP."""
    only(module, "latent", "pos_embed", "q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp")
    check_head_size(module.head_dim)
    mlp = None if module.mlp is None else read_mlp(part(module, "mlp", _classes.Mlp))
    return PoolParts(
        latent=module.latent,
        pos_embed=module.pos_embed,
        q=linear_of(module, "q"),
        kv=linear_of(module, "kv"),
        proj=linear_of(module, "proj"),
        attention=dict(scale=module.scale, **head_norms(module)),
        heads=module.num_heads,
        out_dropout_p=dropout_of(module, "proj_drop"),
        mlp=None if mlp is None else mlp._replace(norm=norm_part(module, "norm")),
        pool=module.pool,
    )


def compute_pool(x: Tensor, found: PoolParts, backend: str | None) -> Tensor:
    check_input(x, found.latent, found.q[0], found.kv[0], found.proj[0], found.pos_embed)
    check_tokens(x)
    if found.pos_embed is not None:
        x = x + found.pos_embed.unsqueeze(0).to(x.dtype)
    q = F.linear(found.latent.expand(x.shape[0], -1, -1), *found.q, backend=backend)
    kv = F.linear(x, *found.kv, backend=backend)
    q, kv = q.unflatten(-1, (found.heads, -1)), kv.unflatten(-1, (2, found.heads, -1))
    out = F.attention(q, *kv.unbind(2), **found.attention, backend=backend)
    x = F.linear(cast(Tensor, out).flatten(2), *found.proj, dropout_p=found.out_dropout_p, backend=backend)
    if found.mlp is not None:
        x = feed_forward(x, found.mlp, backend, Branch(residual=x))
    if found.pool == "token":
        return x[:, 0]
    return x.mean(1) if found.pool == "avg" else x
