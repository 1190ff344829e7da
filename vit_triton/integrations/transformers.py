"""Hugging Face transformers: ``attn_implementation="vit_triton"``.

    import vit_triton.integrations.transformers
    model = AutoModel.from_pretrained(name, attn_implementation="vit_triton")

Importing this module registers the name in transformers' AttentionInterface, with sdpa's way of making masks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vit_triton import functional as F
from vit_triton.backend import resolve_backend


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

    Attention that the kernels do not have is transformers' own "sdpa": with a mask, a position bias or a softcap, causal,
    with fewer heads of keys than of queries, with heads above 256; and where the backend of this call is "torch".

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
    plain = (
        attention_mask is None
        and not (causal and query.shape[2] > 1)
        and not any(kwargs.get(name) for name in ("softcap", "output_attentions"))
        and kwargs.get("position_bias") is None
        and key.shape == value.shape
        and query.shape[:2] == key.shape[:2]
        and query.shape[3] == key.shape[3] <= F.MAX_HEAD_DIM
    )
    if not plain or resolve_backend(None, "attention", query) == "torch":
        options = dict(dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.attention(q, k, v, scale=scaling, dropout_p=dropout)
    assert isinstance(out, Tensor)
    return out, None


AttentionInterface.register("vit_triton", attention_forward)
AttentionMaskInterface.register("vit_triton", sdpa_mask)
