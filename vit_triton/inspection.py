"""Attention maps of a model.

The kernels do not materialize the N x N attention matrix; they save one log-sum-exp per query, from which every row can
be recomputed: softmax(s)_j = exp(s_j - logsumexp(s)).
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.checks import check_module, format_value
from vit_triton.modules import Attention

__all__ = ["attention_maps"]


@torch.no_grad()
def attention_maps(model: nn.Module, image: Tensor, *, query: int | None = None) -> Tensor:
    """Return the attention probabilities of every layer, as ``vit_pytorch.recorder.Recorder`` does.

    Runs ``model(image)`` once in the current mode. The maps are the probabilities before dropout; in training mode,
    dropout still affects the input of later layers.

    Args:
        model: a model with :class:`vit_triton.modules.Attention` layers of equal head count, such as
            :class:`vit_triton.ViT`.
        image: the input of the model, (B, C, H, W) for a ViT.
        query: index of one query token, 0 for the class token, to compute only its row. None computes every row.

    Returns:
        (B, layers, heads, N, N), or (B, layers, heads, N) with `query`; float32, without gradient. Rows sum to 1.

    Raises:
        TypeError: `model` is not a Module, or `query` is not an integer.
        ValueError: `model` has or calls no such layer, its layers differ in heads or tokens, or `query` is out of
            range.
    """
    check_module("model", model)
    if query is not None and (isinstance(query, bool) or not isinstance(query, Integral)):
        raise TypeError(f"query must be None or the index of a token, an integer, got {format_value(query)}")
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
        raise ValueError(f"layers of model must have equal heads and tokens, got maps of {shapes[0]} and {shapes[1]}")
    return torch.stack(maps, dim=1)


def _probabilities(attention: Attention, x: Tensor, query: int | None) -> Tensor:
    """Compute tokens (B, N, dim) -> (B, heads, N, N) or (B, heads, N) from q, k and the log-sum-exp of the kernel."""
    qkv = attention.project_qkv(x).float()
    q, k, _ = qkv.transpose(1, 3).unbind(2)  # (B, heads, N, dim_head) each
    # float32 without autocast: scores and log-sum-exp have the same rounding, so that rows sum to 1
    with torch.autocast(x.device.type, enabled=False):
        _, lse = F.attention_packed(qkv, scale=attention.scale, return_lse=True, backend=attention.backend)
        if query is not None:
            tokens = q.shape[2]
            if not -tokens <= query < tokens:
                raise ValueError(f"query must be one of the model's {tokens} tokens, got {query}")
            q, lse = q[:, :, query, None], lse[:, :, query, None]
        maps = torch.exp(q @ k.transpose(-1, -2) * attention.scale - lse[..., None])
    return maps if query is None else maps[:, :, 0]
