"""Hugging Face transformers: ``attn_implementation="vit_triton"``, and its ViT, DeiT, DINOv2 (with registers), SigLIP
and CLIP for :func:`vit_triton.accelerate`.

    import vit_triton.integrations.transformers
    model = AutoModel.from_pretrained(name, attn_implementation="vit_triton")

Importing this module registers the name in transformers' AttentionInterface, with sdpa's way of making masks. Models
that are accelerated need neither.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, activations
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vit_triton import functional as F
from vit_triton.backend import resolve_backend
from vit_triton.checks import KERNEL_DTYPES, MAX_HEAD_DIM
from vit_triton.fallback import count
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
    linear_of,
    norm_of,
)
from vit_triton.integrations.pytorch import attend_and_none, read_multihead_attention
from vit_triton.integrations.recipes import Recipe, Unknown, know, only, part, plain_input, teach
from vit_triton.packing import concatenated

__all__ = ["attention_forward", "teach_all"]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' AttentionInterface, on :func:`vit_triton.functional.attention`.

    Attention that the kernels do not have is transformers' own "sdpa": with a mask, a position bias or a softcap,
    causal, with fewer heads of keys than of queries, with heads above 256, without keys, in float64; and where the
    backend of this call is "torch". :func:`vit_triton.fallbacks` counts these calls unless the backend is "torch".

    Args:
        module: the attention module; what it says of ``is_causal`` holds where the argument is None, True if nothing.
        query: (B, H, N_q, D), any strides; key, value: (B, H, N_k, D). They are read where they lie.
        attention_mask: as transformers makes it for "sdpa".
        dropout: probability, already 0 outside training.
        scaling: default 1 / sqrt(D).

    Returns:
        (B, N_q, H, D), and None: the attention weights never exist.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    other_heads = key.shape != value.shape or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]
    reasons = {
        "an attention mask": attention_mask is not None,
        "causal attention": causal and query.shape[2] > 1,
        "a softcap": bool(kwargs.get("softcap")),
        "output_attentions": bool(kwargs.get("output_attentions")),
        "a position bias": kwargs.get("position_bias") is not None,
        "keys or values of another shape": other_heads,
        f"heads wider than {MAX_HEAD_DIM}": query.shape[3] > MAX_HEAD_DIM,
        f"{query.dtype} input": query.dtype not in KERNEL_DTYPES,
        "no keys": key.shape[2] == 0,
    }
    on_kernels = resolve_backend(None, "attention", query) == "triton"
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if on_kernels and reason is not None:
        count(module, reason)
    if not on_kernels or reason is not None:
        options = dict(dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return cast(Tensor, F.attention(q, k, v, scale=scaling, dropout_p=dropout)), None


AttentionInterface.register("vit_triton", attention_forward)
AttentionMaskInterface.register("vit_triton", sdpa_mask)


# --- what accelerate knows ---------------------------------------------------------------------------------


class Family(NamedTuple):
    """What the authors of a kind of model call the parts of its layers."""

    attention: str
    norm1: str
    norm2: str
    out: str  # the output projection of the attention
    scale: str
    dropout: str  # the attention's probability


_VIT = Family("attention", "layernorm_before", "layernorm_after", "o_proj", "scaling", "attention_dropout")
_DINO = _VIT._replace(norm1="norm1", norm2="norm2")
_CLIP = Family("self_attn", "layer_norm1", "layer_norm2", "out_proj", "scale", "dropout")

# file of models: (what its classes' names begin with, the layer's name, the family)
FILES = {
    "vit": ("ViT", "Layer", _VIT),
    "deit": ("DeiT", "Layer", _VIT),
    "dinov2": ("Dinov2", "Layer", _DINO),
    "dinov2_with_registers": ("Dinov2WithRegisters", "Layer", _DINO),
    "siglip": ("Siglip", "EncoderLayer", _CLIP),
    "clip": ("CLIP", "EncoderLayer", _CLIP),
}

ACTIVATIONS: dict[type[nn.Module], str] = {
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.SiLUActivation: "silu",
}

# Kinds of attention that all compute the same. Those but the first give no attention weights.
IMPLEMENTATIONS = ("eager", "sdpa", "vit_triton", "flash_attention_2", "flash_attention_3", "flash_attention_4")

IRRELEVANT = ("output_hidden_states", "num_items_in_batch", "return_dict")  # layers are given them, and hand them on


def teach_all() -> None:
    """Of the files of models that are imported already."""
    know(*ACTIVATIONS)
    for file in FILES:
        if f"transformers.models.{file}.modeling_{file}" in sys.modules:
            teach_file(file)


def teach_file(file: str) -> None:
    module, prefix, layer = sys.modules[f"transformers.models.{file}.modeling_{file}"], *FILES[file][:2]
    classes = classes_of(file)
    know(*classes[1:])
    block = ("attention", "mlp", "layer_norm")
    teach(getattr(module, prefix + layer, None), Recipe(block, classes.read_layer, compute_layer, states))
    teach(classes.Attention, Recipe(("attention",), classes.read_attention, attend_and_none, states))
    for mlp in (classes.MLP, classes.SwiGLUFFN):
        teach(mlp, Recipe(("mlp",), read_mlp, feed_forward))
    head = getattr(module, prefix + "MultiheadAttentionPoolingHead", None)
    teach(head, Recipe(block, classes.read_pool, compute_pool))


def states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states of a call without a mask, or anything else that could change what attention does."""
    return plain_input(args, {name: value for name, value in kwargs.items() if name not in IRRELEVANT})


def records_weights(hook: Any) -> bool:
    """Whether a hook is the one by which transformers keeps attention weights, where there are any."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


# --- reading modules ---------------------------------------------------------------------------------------


class LayerParts(NamedTuple):
    attention: AttentionParts
    branch1: Branch
    mlp: MlpParts
    branch2: Branch


class PoolParts(NamedTuple):
    probe: Tensor
    attention: AttentionParts
    mlp: MlpParts


class Classes(NamedTuple):
    """The classes of one file of models; None where it has none of that name."""

    family: Family
    Attention: Any
    MLP: Any
    SwiGLUFFN: Any
    LayerScale: Any
    DropPath: Any

    def read_attention(self, module: Any) -> AttentionParts:
        if module.config._attn_implementation == "eager":
            raise Unknown('attn_implementation="eager" gives the attention weights')
        return self.attention_of(module)

    def attention_of(self, module: Any) -> AttentionParts:
        """Of a module whose attention weights nobody wants."""
        implementation = module.config._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            raise Unknown(f"attn_implementation={implementation!r} is not known here")
        if module.is_causal:
            raise Unknown("is causal")
        check_head_size(module.head_dim)
        only(module, "q_proj", "k_proj", "v_proj", self.family.out)
        weight, bias = stacked(module, "q_proj", "k_proj", "v_proj")
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

    def read_layer(self, module: Any) -> LayerParts:
        family = self.family
        own = (family.attention, family.norm1, family.norm2)
        only(module, *own, "mlp", "dropout", "layer_scale1", "layer_scale2", "drop_path")
        norm1, norm2 = (norm_of(module, name, nn.LayerNorm) for name in (family.norm1, family.norm2))
        dropout_p = dropout_of(module, "dropout")
        attention = part(module, family.attention, self.Attention, unless=records_weights)
        if attention._forward_hooks and attention.config._attn_implementation == "eager":
            raise Unknown(f"{family.attention}: its attention weights may be asked for")
        mlp = read_mlp(part(module, "mlp", self.MLP, self.SwiGLUFFN))
        return LayerParts(
            self.attention_of(attention)._replace(norm=norm1, out_dropout_p=dropout_p),
            self.branch_of(module, "layer_scale1"),
            mlp._replace(norm=norm2, dropout_p=dropout_p),
            self.branch_of(module, "layer_scale2"),
        )

    def branch_of(self, module: nn.Module, scale: str) -> Branch:
        """LayerScale and DropPath of a branch, without the residual."""
        if self.LayerScale is None:
            return Branch()
        drop = part(module, "drop_path", self.DropPath, nn.Identity)
        dropping = drop.training and not isinstance(drop, nn.Identity)
        drop_path_p = float(drop.drop_prob or 0.0) if dropping else 0.0
        return Branch(None, part(module, scale, self.LayerScale).lambda1, drop_path_p)

    def read_pool(self, module: Any) -> PoolParts:
        """SigLIP's head: attention of a learned query, and an MLP."""
        only(module, "probe", "attention", "layernorm", "mlp")
        attention = read_multihead_attention(part(module, "attention", nn.MultiheadAttention))
        if attention.qkv_bias is None:
            raise Unknown("attention: has no bias")
        return PoolParts(
            module.probe,
            attention,
            read_mlp(part(module, "mlp", self.MLP))._replace(norm=norm_of(module, "layernorm", nn.LayerNorm)),
        )


@functools.cache  # one object, so that a recipe that is taught again is the same
def classes_of(file: str) -> Classes:
    prefix, _, family = FILES[file]
    module = sys.modules[f"transformers.models.{file}.modeling_{file}"]
    return Classes(family, *(getattr(module, prefix + name, None) for name in Classes._fields[1:]))


def stacked(module: nn.Module, *names: str) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of several Linears as those of one, for one pass over all tokens instead of several, with the
    norm inside. They are concatenated in every call of a model that is not prepacked."""
    weights, biases = zip(*(linear_of(module, name) for name in names), strict=True)
    if len({bias is None for bias in biases}) > 1:
        raise Unknown("only some of the projections have a bias")
    return concatenated(weights), None if biases[0] is None else concatenated(biases)


def read_mlp(module: Any) -> MlpParts:
    if "gate_proj" not in module._modules:
        only(module, "fc1", "fc2", "activation_fn")
        activation = activation_of(module, "activation_fn", ACTIVATIONS)
        return MlpParts(*linear_of(module, "fc1"), *linear_of(module, "fc2"), activation)
    only(module, "gate_proj", "up_proj", "down_proj", "act_fn")
    if activation_of(module, "act_fn", ACTIVATIONS) != "silu":
        raise Unknown("act_fn: a gate that is not SiLU")
    return MlpParts(*stacked(module, "gate_proj", "up_proj"), *linear_of(module, "down_proj"), "swiglu")


# --- computing ---------------------------------------------------------------------------------------------


def compute_layer(x: Tensor, found: LayerParts, backend: str | None) -> Tensor:
    x = attend(x, found.attention, backend, found.branch1._replace(residual=x))
    return feed_forward(x, found.mlp, backend, found.branch2._replace(residual=x))


def compute_pool(x: Tensor, found: PoolParts, backend: str | None) -> Tensor:
    """(B, N, dim) -> (B, dim). The one query is projected once, not for every image."""
    probe, attention, mlp = found
    check_input(x, attention.qkv_weight, attention.out_weight, probe)
    check_tokens(x)
    q_weight, kv_weight = attention.qkv_weight.tensor_split([x.shape[-1]])
    q_bias, kv_bias = cast(Tensor, attention.qkv_bias).tensor_split([x.shape[-1]])
    q = F.linear(probe, q_weight, q_bias, backend=backend).unflatten(-1, (attention.heads, -1))
    kv = F.linear(x, kv_weight, kv_bias, backend=backend).unflatten(-1, (2, attention.heads, -1))
    out = F.attention(
        q.expand(x.shape[0], -1, -1, -1),
        *kv.unbind(2),
        scale=attention.scale,
        dropout_p=attention.dropout_p,
        backend=backend,
    )
    out_weight = cast(Tensor, attention.out_weight)
    x = F.linear(cast(Tensor, out).flatten(2), out_weight, attention.out_bias, backend=backend)
    return feed_forward(x, mlp, backend, Branch(residual=x))[:, 0]
