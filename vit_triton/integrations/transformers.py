"""Hugging Face transformers: ``attn_implementation="vit_triton"``, and recipes for ViT, DeiT, DINOv2 (with registers),
DINOv3, SigLIP, SigLIP 2 and CLIP.

    import vit_triton.integrations.transformers
    model = AutoModel.from_pretrained(name, attn_implementation="vit_triton")

Importing this module registers the name in transformers' AttentionInterface, with the mask function of "sdpa".
:func:`vit_triton.accelerate` requires neither the import nor the name.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, activations
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import output_capturing

from vit_triton import functional as F
from vit_triton.backend import resolve_backend
from vit_triton.checks import KERNEL_DTYPES, MAX_HEAD_DIM
from vit_triton.fallback import count_fallback
from vit_triton.integrations.encoder import iterating, reading_class_token
from vit_triton.integrations.parts import (
    AttentionInput,
    AttentionParts,
    BlockParts,
    Branch,
    MlpParts,
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
    linear_of,
    norm_of,
)
from vit_triton.integrations.pytorch import read_multihead_attention
from vit_triton.integrations.recipes import (
    Recipe,
    UnsupportedModule,
    check_members,
    kernel_input,
    plain_input,
    register,
    register_container,
    submodule,
    trust,
)
from vit_triton.integrations.transformers_qwen import register_qwen

__all__ = [
    "ACTIVATIONS",
    "VIT",
    "Classes",
    "attention_forward",
    "hidden_states_input",
    "read_mlp",
    "records_outputs",
    "register_all",
]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute :func:`vit_triton.functional.attention` as an attention function of transformers' AttentionInterface.

    Falls back to "sdpa" for softcaps, grouped-query attention, head sizes above 256, empty keys, float64 and masks of
    another dtype, and if the backend is "torch". :func:`vit_triton.fallbacks` counts these calls unless the backend is
    "torch".

    Args:
        module: the attention module. Its ``is_causal``, True by default, applies if the argument is None.
        query: (B, H, N_q, D), any strides; key, value: (B, H, N_k, D), any strides.
        attention_mask: the mask that transformers creates for "sdpa", bool or floating; it replaces the causal mask.
        dropout: probability, 0 in evaluation mode.
        scaling: default 1 / sqrt(D).
        position_bias: added to the scaled scores; broadcasts to (B, H, N_q, N_k).

    Returns:
        (B, N_q, H, D), and None: the attention weights are never materialized.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal and attention_mask is None and query.shape[2] > 1)
    other_heads = key.shape != value.shape or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]
    mask_dtypes = torch.bool, torch.float32, query.dtype
    others = [x.dtype for x in (attention_mask, position_bias) if x is not None and x.dtype not in mask_dtypes]
    reasons = {
        f"{others[0] if others else None} mask": bool(others),
        "softcap": bool(kwargs.get("softcap")),
        "output_attentions": bool(kwargs.get("output_attentions")),
        "keys or values have another shape": other_heads,
        f"head size exceeds {MAX_HEAD_DIM}": query.shape[3] > MAX_HEAD_DIM,
        f"{query.dtype} input": query.dtype not in KERNEL_DTYPES,
        "empty keys": key.shape[2] == 0,
    }
    on_kernels = resolve_backend(None, "attention", query) == "triton"
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if on_kernels and reason is not None:
        count_fallback(module, reason)
    if not on_kernels or reason is not None:
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        options = dict(dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    bias = attention_mask
    if position_bias is not None and attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            bias = torch.where(attention_mask, position_bias, torch.finfo(position_bias.dtype).min)
        else:
            bias = position_bias + attention_mask
    elif position_bias is not None:
        bias = position_bias
    return cast(Tensor, F.attention(q, k, v, bias=bias, causal=causal, scale=scaling, dropout_p=dropout)), None


AttentionInterface.register("vit_triton", attention_forward)
AttentionMaskInterface.register("vit_triton", sdpa_mask)


# --- recipes -----------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """Attribute names in the layers of one family of models."""

    attention: str
    norm1: str
    norm2: str
    out: str  # output projection
    scale: str
    dropout: str  # attention dropout probability
    rotary: bool = False  # layers receive tables of rotary positions
    others: tuple[str, ...] = ()  # submodules and parameters of a layer, besides those that all families have


VIT = Family("attention", "layernorm_before", "layernorm_after", "o_proj", "scaling", "attention_dropout")
_DINO = VIT._replace(norm1="norm1", norm2="norm2")
_DINOV3 = _DINO._replace(dropout="dropout", rotary=True)
_CLIP = Family("self_attn", "layer_norm1", "layer_norm2", "out_proj", "scale", "dropout")

# model file: (class prefix, suffix of the layer class, family, suffix of the class that runs the layers, their name)
FILES = {
    "vit": ("ViT", "Layer", VIT, "Model", "layers"),
    "deit": ("DeiT", "Layer", VIT, "Model", "layers"),
    "dinov2": ("Dinov2", "Layer", _DINO, "Encoder", "layer"),
    "dinov2_with_registers": ("Dinov2WithRegisters", "Layer", _DINO, "Encoder", "layer"),
    "dinov3_vit": ("DINOv3ViT", "Layer", _DINOV3, "Encoder", "layer"),
    "siglip": ("Siglip", "EncoderLayer", _CLIP, "Encoder", "layers"),
    "siglip2": ("Siglip2", "EncoderLayer", _CLIP, "Encoder", "layers"),
    "clip": ("CLIP", "EncoderLayer", _CLIP, "Encoder", "layers"),
}

ACTIVATIONS: dict[type[nn.Module], str] = {
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.SiLUActivation: "silu",
}

# Implementations that compute the same attention. Only "eager" returns the attention weights.
IMPLEMENTATIONS = ("eager", "sdpa", "vit_triton", "flash_attention_2", "flash_attention_3", "flash_attention_4")

# layers only pass these on
IRRELEVANT = ("interpolate_pos_encoding", "output_hidden_states", "num_items_in_batch", "return_dict")


def register_all() -> None:
    """Register the recipes for every model file that has been imported."""
    trust(*ACTIVATIONS)
    for file in FILES:
        if f"transformers.models.{file}.modeling_{file}" in sys.modules:
            register_file(file)
    register_qwen(read_mlp, IMPLEMENTATIONS, IRRELEVANT)


def register_file(file: str) -> None:
    module = sys.modules[f"transformers.models.{file}.modeling_{file}"]
    prefix, layer, _, stack, layers = FILES[file]
    classes = classes_of(file)
    trust(*classes[1:])
    block = ("attention", "mlp", "layer_norm")
    find_input: Any = positions_input if classes.family.rotary else hidden_states_input
    attend = attend_input_without_weights
    register(getattr(module, prefix + layer, None), Recipe(block, classes.read_layer, compute_block, find_input))
    register(classes.Attention, Recipe(("attention",), classes.read_attention, attend, find_input))
    for mlp in (classes.MLP, classes.SwiGLUFFN, classes.GatedMLP):
        register(mlp, Recipe(("mlp",), read_mlp, feed_forward))
    head = getattr(module, prefix + "MultiheadAttentionPoolingHead", None)
    register(head, Recipe(block, classes.read_pool, compute_pool, pool_input))
    register_container(getattr(module, prefix + stack, None), iterating(layers, unless=is_idle_recorder))
    if file in ("vit", "deit"):  # the heads of the others read more tokens
        find = functools.partial(class_token_model, name=file, cls=getattr(module, prefix + "Model"))
        register_container(getattr(module, prefix + "ForImageClassification", None), reading_class_token(find))


def hidden_states_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...] = ("hidden_states", "attention_mask")
) -> AttentionInput:
    """Return hidden states, mask and, if it is one of ``names``, position_embeddings, the tables cos and sin, of a call
    without other arguments that affect attention."""
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    call = {name: value for name, value in call.items() if name not in IRRELEVANT}
    mask, rope = call.pop("attention_mask", None), None
    if "position_embeddings" in names:
        positions = call.pop("position_embeddings", None)
        if not isinstance(positions, tuple) or len(positions) != 2:
            raise UnsupportedModule("position_embeddings are not cos and sin")
        rope = kernel_input(positions[0]), kernel_input(positions[1])
    x = plain_input((call.pop("hidden_states", None), *args[len(names) :]), call)
    if mask is not None and kernel_input(mask, torch.bool).ndim != 4:  # flash attention gets (B, N)
        raise UnsupportedModule("attention mask is not 4-D")
    return AttentionInput(x, rope, mask)


positions_input = functools.partial(
    hidden_states_input, names=("hidden_states", "attention_mask", "position_embeddings")
)


def pool_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionInput:
    """Return hidden states and the mask (B, N) of a pooling head as one that is added to the scores."""
    call = {**dict(zip(("hidden_state", "attention_mask"), args, strict=False)), **kwargs}
    mask = call.pop("attention_mask", None)
    x = plain_input((call.pop("hidden_state", None), *args[2:]), call)
    if mask is None:
        return AttentionInput(x)
    if not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
        raise UnsupportedModule("attention mask is not (B, N)")
    # as in the library: a query without keys averages
    zero, minimum = (torch.full((), value, dtype=x.dtype, device=x.device) for value in (0.0, torch.finfo(x.dtype).min))
    return AttentionInput(x, None, torch.where(mask.bool(), zero, minimum)[:, None, None])


def attend_input_without_weights(
    given: AttentionInput, parts: AttentionParts, backend: str | None
) -> tuple[Tensor, None]:
    return attend_input(given, parts, backend), None


def records_outputs(hook: Any) -> bool:
    """Return whether a hook is one with which transformers records outputs, such as attention weights."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def is_idle_recorder(hook: Any) -> bool:
    """Return whether a hook is one of transformers' for recording outputs, and this call does not record any."""
    return records_outputs(hook) and not output_capturing._active_collector.get()


def class_token_model(model: Any, name: str, cls: Any) -> nn.Module:
    """Return the model called `name` inside a classifier that reads only the class token."""
    inner: Any = submodule(model, name, cls)
    if inner.pooler is not None:
        raise UnsupportedModule("the model has a pooler")
    norm_of(inner, "layernorm", nn.LayerNorm)
    return cast(nn.Module, inner)


# --- reading modules ---------------------------------------------------------------------------------------


class PoolParts(NamedTuple):
    probe: Tensor
    attention: AttentionParts
    mlp: MlpParts


class Classes(NamedTuple):
    """Classes of one model file; None if the file does not have the class."""

    family: Family
    Attention: Any
    MLP: Any
    SwiGLUFFN: Any
    GatedMLP: Any
    LayerScale: Any
    DropPath: Any

    def read_attention(self, module: Any) -> AttentionParts:
        if module.config._attn_implementation == "eager":
            raise UnsupportedModule('attn_implementation="eager" returns the attention weights')
        return self.attention_of(module)

    def attention_of(self, module: Any) -> AttentionParts:
        """Read an attention module whose attention weights are not used."""
        implementation = module.config._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            raise UnsupportedModule(f"attn_implementation={implementation!r} is not supported")
        if module.is_causal:
            raise UnsupportedModule("causal attention")
        check_head_size(module.head_dim)
        check_members(module, "q_proj", "k_proj", "v_proj", self.family.out)
        weight, bias = joined_linears(module, "q_proj", "k_proj", "v_proj")
        out_weight, out_bias = linear_of(module, self.family.out)
        return AttentionParts(
            heads=out_weight.shape[1] // module.head_dim,
            scale=getattr(module, self.family.scale),
            qkv_weight=weight,
            qkv_bias=bias,
            out_weight=out_weight,
            out_bias=out_bias,
            dropout_p=getattr(module, self.family.dropout) if module.training else 0.0,
        )

    def read_layer(self, module: Any) -> BlockParts:
        family = self.family
        own = (family.attention, family.norm1, family.norm2)
        check_members(module, *own, "mlp", "dropout", "layer_scale1", "layer_scale2", "drop_path", *family.others)
        norm1, norm2 = (norm_of(module, name, nn.LayerNorm) for name in (family.norm1, family.norm2))
        dropout_p = dropout_of(module, "dropout")
        attention = submodule(module, family.attention, self.Attention, unless=records_outputs)
        if attention._forward_hooks and attention.config._attn_implementation == "eager":
            raise UnsupportedModule(f"{family.attention}: a hook may record the attention weights")
        mlp = read_mlp(submodule(module, "mlp", self.MLP, self.SwiGLUFFN, self.GatedMLP))
        return BlockParts(
            self.attention_of(attention)._replace(norm=norm1, out_dropout_p=dropout_p),
            mlp._replace(norm=norm2, dropout_p=dropout_p),
            self.branch_of(module, "1"),
            self.branch_of(module, "2"),
        )

    def branch_of(self, module: nn.Module, number: str) -> Branch:
        """Return LayerScale and stochastic depth of a branch, without the residual."""
        if self.DropPath is None:
            return Branch()
        drop = submodule(module, "drop_path", self.DropPath, nn.Identity)
        dropping = drop.training and not isinstance(drop, nn.Identity)
        drop_path_p = float(drop.drop_prob or 0.0) if dropping else 0.0
        if self.LayerScale is not None:
            return Branch(None, submodule(module, f"layer_scale{number}", self.LayerScale).lambda1, drop_path_p)
        scale = getattr(module, f"lambda_{number}")
        if not isinstance(scale, Tensor) and scale != 1.0:
            raise UnsupportedModule(f"lambda_{number} is a number other than 1")
        return Branch(None, scale if isinstance(scale, Tensor) else None, drop_path_p)

    def read_pool(self, module: Any) -> PoolParts:
        """Read SigLIP's pooling head: attention with a learned query, and an MLP."""
        check_members(module, "probe", "attention", "layernorm", "mlp")
        attention = read_multihead_attention(submodule(module, "attention", nn.MultiheadAttention))
        if attention.qkv_bias is None:
            raise UnsupportedModule("attention: no bias")
        return PoolParts(
            module.probe,
            attention,
            read_mlp(submodule(module, "mlp", self.MLP))._replace(norm=norm_of(module, "layernorm", nn.LayerNorm)),
        )


@functools.cache  # recipes registered again compare equal
def classes_of(file: str) -> Classes:
    prefix, _, family, *_ = FILES[file]
    module = sys.modules[f"transformers.models.{file}.modeling_{file}"]
    named = {name.lower(): value for name, value in vars(module).items()}  # DINOv3ViTLayer, but Dinov3ViTDropPath
    return Classes(family, *(named.get((prefix + name).lower()) for name in Classes._fields[1:]))


def read_mlp(module: Any) -> MlpParts:
    if "gate_proj" not in module._modules:
        names = ("up_proj", "down_proj", "act_fn") if "up_proj" in module._modules else ("fc1", "fc2", "activation_fn")
        names = (*names[:2], "act") if "act" in module._modules else names
        check_members(module, *names)
        activation = activation_of(module, names[2], ACTIVATIONS)
        return MlpParts(*linear_of(module, names[0]), *linear_of(module, names[1]), activation)
    check_members(module, "gate_proj", "up_proj", "down_proj", "act_fn")
    if activation_of(module, "act_fn", ACTIVATIONS) != "silu":
        raise UnsupportedModule("act_fn: gate activation is not SiLU")
    return MlpParts(*joined_linears(module, "gate_proj", "up_proj"), *linear_of(module, "down_proj"), "swiglu")


# --- computing ---------------------------------------------------------------------------------------------


def compute_pool(given: AttentionInput, parts: PoolParts, backend: str | None) -> Tensor:
    """Compute (B, N, dim) -> (B, dim). The learned query is projected once for the whole batch."""
    (x, _, mask), (probe, attention, mlp) = given, parts
    check_mask(x, attention.heads, 1, mask)
    check_input(x, attention.qkv_weight, attention.out_weight, probe)
    check_tokens(x)
    q_weight, kv_weight = cast(Tensor, attention.qkv_weight).tensor_split([x.shape[-1]])
    q_bias, kv_bias = cast(Tensor, attention.qkv_bias).tensor_split([x.shape[-1]])
    q = F.linear(probe, q_weight, q_bias, backend=backend).unflatten(-1, (attention.heads, -1))
    kv = F.linear(x, kv_weight, kv_bias, backend=backend).unflatten(-1, (2, attention.heads, -1))
    out = F.attention(
        q.expand(x.shape[0], -1, -1, -1),
        *kv.unbind(2),
        bias=mask,
        scale=attention.scale,
        dropout_p=attention.dropout_p,
        backend=backend,
    )
    out_weight = cast(Tensor, attention.out_weight)
    x = F.linear(cast(Tensor, out).flatten(2), out_weight, attention.out_bias, backend=backend)
    return feed_forward(x, mlp, backend, Branch(residual=x))[:, 0]
