"""Recipes for the vision attention and MLP of Qwen2-VL and Qwen2.5-VL of Hugging Face transformers.

The images and windows of a call are packed sequences. Without flash-attn, the library runs them one by one and reads
their lengths from the GPU in every layer.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vit_triton import functional as F
from vit_triton.integrations.packed import Sequences, attend_packed
from vit_triton.integrations.parts import AttentionParts, check_head_size, feed_forward, linear_of
from vit_triton.integrations.recipes import (
    Recipe,
    UnsupportedModule,
    check_members,
    kernel_input,
    plain_input,
    register,
)

__all__ = ["register_qwen"]

# model file: classes of vision attention and MLP
FILES = {
    "qwen2_vl": ("VisionAttention", "VisionMlp"),
    "qwen2_5_vl": ("Qwen2_5_VLVisionAttention", "Qwen2_5_VLMLP"),
}


class PackedInput(NamedTuple):
    """Tokens (total, dim), and what a layer gets with them."""

    x: Tensor
    cu_seqlens: Tensor
    max_seqlen: int | None
    rope: F.Rope


def register_qwen(read_mlp: Any, implementations: tuple[str, ...], irrelevant: tuple[str, ...]) -> None:
    """Register the recipes for every model file that has been imported.

    Args:
        read_mlp: module -> :class:`.parts.MlpParts`.
        implementations: values of ``attn_implementation`` that compute the same attention.
        irrelevant: arguments of a call that do not affect attention.
    """

    def read(module: Any) -> AttentionParts:
        if module.config._attn_implementation not in implementations:
            raise UnsupportedModule(f"attn_implementation={module.config._attn_implementation!r} is not supported")
        return read_attention(module)

    def find_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> PackedInput:
        return packed_input(args, {name: value for name, value in kwargs.items() if name not in irrelevant})

    for file, (attention, mlp) in FILES.items():
        module = sys.modules.get(f"transformers.models.{file}.modeling_{file}")
        register(getattr(module, attention, None), Recipe(("attention",), read, attend, find_input))
        register(getattr(module, mlp, None), Recipe(("mlp",), read_mlp, feed_forward))


def packed_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> PackedInput:
    names = ("hidden_states", "cu_seqlens", "position_embeddings", "max_seqlen")
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    x, cu_seqlens, positions, max_seqlen = (call.pop(name, None) for name in names)
    x = plain_input((x, *args[len(names) :]), call)
    if x.ndim != 2 or not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise UnsupportedModule("hidden_states are not (total, dim), or cu_seqlens are not integers")
    if not isinstance(positions, tuple) or len(positions) != 2:
        raise UnsupportedModule("position_embeddings are not cos and sin")
    if max_seqlen is None and torch.compiler.is_compiling():
        raise UnsupportedModule("torch.compile without max_seqlen")
    return PackedInput(x, cu_seqlens, max_seqlen, (kernel_input(positions[0]), kernel_input(positions[1])))


def read_attention(module: Any) -> AttentionParts:
    check_members(module, "qkv", "proj")
    check_head_size(module.head_dim)
    qkv_weight, qkv_bias = linear_of(module, "qkv")
    out_weight, out_bias = linear_of(module, "proj")
    return AttentionParts(
        heads=module.num_heads,
        scale=module.scaling,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        out_weight=out_weight,
        out_bias=out_bias,
        dropout_p=module.attention_dropout if module.training else 0.0,
    )


def attend(given: PackedInput, parts: AttentionParts, backend: str | None) -> Tensor:
    cu_seqlens = given.cu_seqlens.to(torch.int32)
    longest = longest_of(given.cu_seqlens) if given.max_seqlen is None else int(given.max_seqlen)
    return attend_packed(given.x, parts, Sequences(cu_seqlens, longest, given.rope), backend)


_longest: WeakIdKeyDictionary = WeakIdKeyDictionary()


def longest_of(cu_seqlens: Tensor) -> int:
    """Return the longest length; on a GPU, only the first layer of a call of the model synchronizes."""
    if cu_seqlens.device.type == "cpu":
        return int(cu_seqlens.diff().max())
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    known = _longest.get(cu_seqlens)
    if known is None or known[0] != version:
        known = _longest[cu_seqlens] = version, int(cu_seqlens.diff().max())
    return int(known[1])
