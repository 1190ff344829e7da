"""The operators in plain PyTorch: backend "torch", and the reference of the tests.

Names and arguments are those of :mod:`vit_triton.functional`, without ``backend``. The functions do not check their
arguments. They support every floating dtype, higher-order gradients and forward mode.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_triton.arguments import Block, DecomposedBias, Norm, Rope


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | DecomposedBias | None = None,
    key_lengths: Tensor | None = None,
    causal: bool | str = False,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    norm_type: str = "layer_norm",
    rope: Rope | None = None,
    rope_prefix: int = 0,
    rope_layout: str = "half",
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    # explicit formula: on a CPU, scaled_dot_product_attention returns zeros for NaN queries below 16 rows
    weights, scores, empty = attention_weights(
        q,
        k,
        bias=bias,
        key_lengths=key_lengths,
        causal=causal,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_type=norm_type,
        rope=rope,
        rope_prefix=rope_prefix,
        rope_layout=rope_layout,
        scale=scale,
    )
    weights = weights if empty is None else weights.to(v.dtype)
    out = (_dropout(weights, dropout_p) @ v.transpose(1, 2)).transpose(1, 2)
    if not return_lse:
        return out
    lse = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1)
    return out, lse if empty is None else lse.masked_fill(empty.squeeze(-1), -torch.inf)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | DecomposedBias | None = None,
    key_lengths: Tensor | None = None,
    causal: bool | str = False,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    norm_type: str = "layer_norm",
    rope: Rope | None = None,
    rope_prefix: int = 0,
    rope_layout: str = "half",
    scale: float | None = None,
    rows: slice | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute weights and scores (B, H, N_q, N_k), and mark rows without keys; or only of the queries ``rows``."""
    q, k = _head_norm(q, q_norm, norm_type), _head_norm(k, k_norm, norm_type)
    if rope is not None:
        q, k = (rotate(x, rope, rope_prefix, rope_layout) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scale = float(scale)  # PyTorch's operators do not support every number type
    n_q = q.shape[1]
    q, k = (q if rows is None else q[:, rows]).transpose(1, 2), k.transpose(1, 2)
    scores = q @ k.transpose(-1, -2) * scale
    empty = None
    if bias is not None or key_lengths is not None or causal is not False:
        scores = _mask_scores(scores, bias, key_lengths, causal, rows, n_q)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        scores = scores.masked_fill(empty, 0.0)
    weights = scores.softmax(-1)
    return weights if empty is None else weights.masked_fill(empty, 0.0), scores, empty


def _mask_scores(
    scores: Tensor,
    bias: Tensor | DecomposedBias | None,
    key_lengths: Tensor | None,
    causal: bool | str,
    rows: slice | None,
    n_q: int,
) -> Tensor:
    """Add the bias to scores (B, H, rows, N_k), in the wider dtype, and set those of excluded keys to -inf."""
    n_k = scores.shape[-1]
    if isinstance(bias, DecomposedBias):
        bias = (bias.rel_h.unsqueeze(-1) + bias.rel_w.unsqueeze(-2)).flatten(-2)
    if rows is not None and bias is not None and bias.ndim > 1 and bias.shape[-2] > 1:
        bias = bias[..., rows, :]
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, -torch.inf)
    elif bias is not None:
        scores = scores + bias
    if key_lengths is not None:
        past = torch.arange(n_k, device=scores.device) >= key_lengths[:, None]
        scores = scores.masked_fill(past[:, None, None], -torch.inf)
    if causal is not False:
        offset = n_k - n_q if causal == "bottom_right" else 0
        allowed = torch.ones(n_q, n_k, dtype=torch.bool, device=scores.device).tril(offset)
        scores = scores.masked_fill(~(allowed if rows is None else allowed[rows]), -torch.inf)
    return scores


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    *,
    rope: Rope | None = None,
    rope_prefix: int = 0,
    rope_layout: str = "half",
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    def turn(x: Tensor, rows: slice) -> Tensor:
        if rope is None:
            return x[None, rows]
        n = len(x[rows])
        cos, sin = (table[..., rows, :][..., rope_prefix:, :] for table in rope)
        return rotate(x[None, rows], (cos, sin), min(rope_prefix, n), rope_layout)

    ends_q = cu_seqlens_q.tolist()
    ends_k = ends_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    results = []
    for i in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        results.append(attention(turn(q, rows), turn(k, keys), v[None, keys], **options))
    if not options.get("return_lse"):
        return torch.cat([q.new_empty(0, *q.shape[1:]), *(out[0] for out in results)])
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (
        torch.cat([q.new_empty(0, *q.shape[1:]), *(out[0] for out, _ in results)]),
        torch.cat([q.new_empty(q.shape[1], 0, dtype=dtype), *(lse[0] for _, lse in results)], 1),
    )


def attention_packed(qkv: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    return attention(*qkv.unbind(2), **options)


def _head_norm(x: Tensor, norm: Norm | None, norm_type: str) -> Tensor:
    if norm is None:
        return x
    if norm_type == "layer_norm":
        return _norm(x, norm).to(x.dtype)
    weight, bias, eps = norm
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * (y.square().mean(-1, keepdim=True) + float(eps)).rsqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def rotate(x: Tensor, rope: Rope, prefix: int, layout: str) -> Tensor:
    """Rotate x (B, N, H, D) by cos and sin, see :func:`.functional.attention`, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    tables = [table.to(wide).transpose(-3, -2) if table.ndim == 4 else table.to(wide)[:, None] for table in rope]
    if 2 * tables[0].shape[-1] <= x.shape[-1]:  # one angle per pair
        tables = [t.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat((t, t), -1) for t in tables]
    width = tables[0].shape[-1]
    channels = x[:, prefix:, :, :width].to(wide)
    if layout == "interleaved":
        a, b = channels.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-b, a), -1).flatten(-2)
    else:
        a, b = channels.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    y = (channels * tables[0] + turned * tables[1]).to(x.dtype)
    y = y if width == x.shape[-1] else torch.cat((y, x[:, prefix:, :, width:]), -1)
    return y if prefix == 0 else torch.cat((x[:, :prefix], y), 1)


def _norm(x: Tensor, norm: Norm | None) -> Tensor:
    """Compute a LayerNorm in the widest dtype of x, weight and bias."""
    if norm is None:
        return x
    weight, bias, eps = norm
    wide = x.dtype
    for part in (weight, bias):
        wide = wide if part is None else torch.promote_types(wide, part.dtype)
    weight, bias = (None if part is None else part.to(wide) for part in (weight, bias))
    width = x.shape[-1]  # a tensor in torch.jit.trace; ONNX supports only constant sizes
    width = int(width) if torch.jit.is_tracing() else width
    return F.layer_norm(x.to(wide), (width,), weight, bias, float(eps))


def _dropout(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, float(p)) if p > 0 else x  # keeps a Dropout with p=0 out of exported graphs


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_path_p: float = 0.0,
    dropout_p: float = 0.0,
    rope: Rope | None = None,
    rope_heads: int | None = None,
    rope_prefix: int = 0,
    rope_layout: str = "half",
) -> Tensor:
    x_normed = x if norm is None else _norm(x, norm).to(weight.dtype)
    y = _dropout(F.linear(x_normed, weight, bias), dropout_p)
    if rope is not None:
        q, k, v = y.unflatten(-1, (3, rope_heads, -1)).unbind(2)
        q, k = (rotate(part, rope, rope_prefix, rope_layout) for part in (q, k))
        return torch.stack((q, k, v), 2).flatten(2)
    if layer_scale is not None:
        y = y * layer_scale
    if drop_path_p > 0:
        y = y * drop_path_factors(x, drop_path_p).to(y.dtype).view(-1, *(1,) * (y.ndim - 1))
    return y if residual is None else y + residual


def drop_path_factors(x: Tensor, drop_path_p: float) -> Tensor:
    """Draw the factors of stochastic depth, (B,): 0 with probability ``drop_path_p``, else 1 / (1 - drop_path_p).

    Draws the same random numbers as timm's DropPath (Huang et al. 2016, arXiv:1603.09382).
    """
    keep = 1.0 - float(drop_path_p)
    dtype = torch.promote_types(x.dtype, torch.float32)
    factors = torch.empty(x.shape[0], dtype=dtype, device=x.device).bernoulli_(keep)
    return factors / keep if keep > 0 else factors


def activate(x: Tensor, activation: str) -> Tensor:
    """Compute exact, tanh or sigmoid GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415), SiLU, ReLU or SwiGLU (Shazeer
    2020, arXiv:2002.05202). For SwiGLU, x is (..., 2 * hidden), gate first."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "swiglu":
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value
    if activation in ("silu", "relu"):
        return F.silu(x) if activation == "silu" else F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    norm: Norm | None = None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_path_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    dropout_p: float = 0.0,
) -> Tensor:
    hidden = _dropout(activate(linear(x, w1, b1, norm=norm), activation), hidden_dropout_p)
    return linear(
        hidden, w2, b2, residual=residual, layer_scale=layer_scale, drop_path_p=drop_path_p, dropout_p=dropout_p
    )


def encoder(
    x: Tensor,
    blocks: Sequence[Block],
    *,
    heads: int,
    scale: float | None = None,
    activation: str = "gelu",
    rope: Rope | None = None,
    rope_prefix: int = 0,
    rope_layout: str = "half",
    first_token: bool = False,
) -> Tensor:
    positions: dict[str, Any] = dict(rope=rope, rope_prefix=rope_prefix, rope_layout=rope_layout)
    return encoder_of((linear, attention, mlp), x, blocks, heads, scale, activation, positions, first_token)


def encoder_of(
    parts: tuple[Callable[..., Any], ...],
    x: Tensor,
    blocks: Sequence[Block],
    heads: int,
    scale: float | None,
    activation: str,
    positions: dict[str, Any],
    first_token: bool,
) -> Tensor:
    """Compute an encoder from the functions linear, attention and mlp."""
    linear, attention, mlp = parts
    for i, block in enumerate(blocks):
        qkv = linear(x, block.qkv_weight, block.qkv_bias, norm=block.norm1)
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        if first_token and i == len(blocks) - 1:
            q, x = q[:, :1], x[:, :1]
        out = attention(q, k, v, scale=scale, **positions).flatten(2)
        x = linear(out, block.out_weight, block.out_bias, residual=x, layer_scale=block.layer_scale1)
        weights = block.w1, block.b1, block.w2, block.b2
        x = mlp(x, *weights, norm=block.norm2, activation=activation, residual=x, layer_scale=block.layer_scale2)
    return x


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    y = _norm(total, (weight, bias, eps)).to(x.dtype)
    return y if residual is None else (y, total)


def unfold_patches(image: Tensor, patch_size: tuple[int, int], patch_order: str = "p1 p2 c") -> Tensor:
    """Rearrange (B, C, H, W) to (B, patches, C * p1 * p2), the pixels of a patch in ``patch_order``."""
    batch, channels, height, width = image.shape
    p1, p2 = patch_size
    grid = image.reshape(batch, channels, height // p1, p1, width // p2, p2)
    axes = (0, 2, 4, 3, 5, 1) if patch_order == "p1 p2 c" else (0, 2, 4, 1, 3, 5)
    return grid.permute(axes).reshape(batch, (height // p1) * (width // p2), channels * p1 * p2)


def normalize_image(image: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    per_channel = (-1, 1, 1)
    return ((image.to(mean.dtype) / 255 - mean.view(per_channel)) / std.view(per_channel)).to(dtype)


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch_size: int | tuple[int, int],
    patch_order: str = "p1 p2 c",
    pre_norm: Norm | None = None,
    post_norm: Norm | None = None,
    pos: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    p1, p2 = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if mean is not None and std is not None:
        image = normalize_image(image, mean, std, weight.dtype)
    tokens = linear(unfold_patches(image, (p1, p2), patch_order), weight, bias, norm=pre_norm)
    tokens = _norm(tokens, post_norm)
    if pos is not None:
        tokens = tokens + pos[: tokens.shape[1]]
    if prefix is not None:
        tokens = torch.cat((prefix.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens), dim=1)
    return tokens


# --- windows -----------------------------------------------------------------------------------------------


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    mask_value: float = -100.0,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    weights, v = window_weights(
        qkv, bias, window=window, shift=shift, mask_value=mask_value, logit_scale=logit_scale, scale=scale
    )
    batch, height, width, _, heads, head_dim = qkv.shape
    out = _dropout(weights, dropout_p).to(v.dtype) @ v
    out = out.view(batch, height // window[0], width // window[1], heads, *window, head_dim).permute(
        0, 1, 4, 2, 5, 3, 6
    )
    out = out.reshape(batch, height, width, heads, head_dim)
    return out.roll(tuple(shift), (1, 2)) if any(shift) else out


def window_weights(
    qkv: Tensor,
    bias: Tensor | None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    mask_value: float = -100.0,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute weights (B * windows, heads, N, N) of the windows of the rolled map, and v."""
    batch, height, width, _, heads, head_dim = qkv.shape
    rows, columns = height // window[0], width // window[1]
    n_tokens = window[0] * window[1]
    if any(shift):
        qkv = qkv.roll((-shift[0], -shift[1]), (1, 2))
    qkv = qkv.view(batch, rows, window[0], columns, window[1], 3, heads, head_dim)
    q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, heads, n_tokens, head_dim).unbind(0)
    if logit_scale is not None:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = q @ k.transpose(-1, -2) * logit_scale[:, None, None]
    else:
        scores = q @ k.transpose(-1, -2) * float(head_dim**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if any(shift):
        # the last rows and columns of the rolled map come from the other side
        below, right = (
            (torch.arange(n, device=qkv.device) >= n - by).long() for n, by in zip((height, width), shift, strict=True)
        )
        codes = 2 * below[:, None] + right
        codes = codes.view(rows, window[0], columns, window[1]).transpose(1, 2).reshape(-1, 1, n_tokens)
        other = codes.unsqueeze(-1) != codes.unsqueeze(-2)  # (windows of an image, 1, N, N)
        mask = torch.zeros(other.shape, dtype=scores.dtype, device=qkv.device).masked_fill(other, float(mask_value))
        scores = (scores.view(batch, rows * columns, *scores.shape[1:]) + mask).view(scores.shape)
    return scores.softmax(-1), v


def relative_position_bias(table: Tensor, window: tuple[int, int], *, prefix_tokens: int = 0) -> Tensor:
    index = _relative_position_index(window, prefix_tokens, table.device)
    return table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1)


def _relative_position_index(window: tuple[int, int], prefix_tokens: int, device: torch.device) -> Tensor:
    """The row of the table for each pair of tokens, (N, N)."""
    y, x = (torch.arange(n, device=device) for n in window)
    y, x = y.repeat_interleave(window[1]), x.repeat(window[0])
    dy, dx = y[:, None] - y + window[0] - 1, x[:, None] - x + window[1] - 1
    index = dy * (2 * window[1] - 1) + dx
    if prefix_tokens:
        offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
        index = F.pad(index, (1, 0, 1, 0), value=offsets + 1)
        index[0] = offsets
        index[0, 0] = offsets + 2
    return index
