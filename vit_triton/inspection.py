"""What a trained model looked at.

The kernels never keep the N x N attention matrix; they keep one log-sum-exp per query. That is enough to get
any row of it back exactly: softmax(s)_j = exp(s_j - logsumexp(s)).
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.checks import check_module, given
from vit_triton.modules import Attention

__all__ = ["attention_maps"]


@torch.no_grad()
def attention_maps(model: nn.Module, image: Tensor, *, query: int | None = None) -> Tensor:
    """The attention probabilities of every layer, as ``vit_pytorch.recorder.Recorder`` gives them.

    Runs ``model(image)`` once in the mode the model is in. The maps are the probabilities before dropout; in
    training mode the layers after the first still see what dropout left of the ones before.

    Args:
        model: a model built from :class:`vit_triton.modules.Attention` layers of equal head count, such as
            :class:`vit_triton.ViT`.
        image: what the model takes, for a ViT (B, C, H, W).
        query: the index of one query token, 0 for the class token: only that row is computed, at a cost of N
            instead of N x N. None computes every row.

    Returns:
        (B, layers, heads, N, N) in float32, rows summing to 1; with `query`, (B, layers, heads, N). No gradient.

    Raises:
        TypeError: `model` is no module, or `query` no integer.
        ValueError: `model` contains or runs no such layer, its layers differ in heads or tokens, or `query` is not one
            of the N tokens.
    """
    check_module("model", model)
    if query is not None and (isinstance(query, bool) or not isinstance(query, Integral)):
        raise TypeError(f"query must be None or the index of a token, an integer, got {given(query)}")
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers:
        raise ValueError(
            f"model must contain vit_triton.modules.Attention layers, got a {type(model).__name__} without any"
        )
    maps: list[Tensor] = []

    def record(attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(attention, Attention)
        maps.append(_probabilities(attention, inputs[0], query))

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not maps:
        raise ValueError(f"model, a {type(model).__name__}, called none of its vit_triton.modules.Attention layers")
    shapes = list(dict.fromkeys(tuple(each.shape[1:]) for each in maps))
    if len(shapes) > 1:
        raise ValueError(f"model must have layers of as many heads and tokens, got maps of {shapes[0]} and {shapes[1]}")
    return torch.stack(maps, dim=1)


def _probabilities(attention: Attention, x: Tensor, query: int | None) -> Tensor:
    """Tokens (B, N, dim) -> (B, heads, N, N) or (B, heads, N), from q, k and the kernel's log-sum-exp."""
    qkv = attention.project_qkv(x).float()
    q, k, _ = qkv.transpose(1, 3).unbind(2)  # (B, heads, N, dim_head) each
    # In float32 and out of autocast, so that scores and log-sum-exp are rounded alike and the rows sum to 1.
    with torch.autocast(x.device.type, enabled=False):
        _, lse = F.attention_packed(qkv, scale=attention.scale, return_lse=True, backend=attention.backend)
        if query is not None:
            tokens = q.shape[2]
            if not -tokens <= query < tokens:
                raise ValueError(f"query must be one of the model's {tokens} tokens, got {query}")
            q, lse = q[:, :, query, None], lse[:, :, query, None]
        maps = torch.exp(q @ k.transpose(-1, -2) * attention.scale - lse[..., None])
    return maps if query is None else maps[:, :, 0]
