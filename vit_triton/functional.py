"""The operators as functions.

All tensors of a call must have one dtype (float32, float16 or bfloat16; backend "torch" also supports float64) and be
on one device, with any strides; only norms may have another dtype. Invalid arguments raise TypeError or ValueError with
the name of the argument. Under autocast, GEMMs run in its dtype and layer_norm in float32, as in PyTorch.

``backend`` is "triton", "torch", "auto" or None, the default set by :func:`vit_triton.use_backend`. Backend "triton"
supports first-order gradients in reverse mode. Other gradients raise an error and require "torch".

A ``norm`` is a tuple (weight, bias, eps). Weight and bias have the size of the last dimension, or are None.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vit_triton import autograd, reference
from vit_triton.arguments import NO_MASK, Block, DecomposedBias, Norm, Packed, Rope, ScoreMask
from vit_triton.autocast import autocast, is_autocast_enabled
from vit_triton.backend import backend_name, fastest_products, resolve_backend
from vit_triton.checks import (
    ACTIVATIONS,
    MAX_WINDOW_TOKENS,
    check_alike,
    check_attention,
    check_branch,
    check_choice,
    check_count,
    check_encoder,
    check_head_norms,
    check_kernel_dtype,
    check_linear,
    check_norm,
    check_number,
    check_packed,
    check_patch_embed,
    check_position_table,
    check_probability,
    check_residual,
    check_rope,
    check_rotated_projection,
    check_rows,
    check_score_mask,
    check_sequences,
    check_tensor,
    check_valid,
    check_window_attention,
    format_value,
    hidden_features,
    shape_of,
)
from vit_triton.recording import active_recorder


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute softmax(scale * q k^T + bias) v per head (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).

    With "triton", the backward pass recomputes the attention weights from the log-sum-exp with a relative error of up
    to 2e-7 times the largest scaled score, so the gradient of v loses all precision at scores near 1e6. The result may
    be inf or NaN for scaled scores above 1e9 in magnitude (float16: 1e8).

    Args:
        q: (B, N_q, H, D); with "triton", D <= 256.
        k, v: (B, N_k, H, D), N_k >= 1. Grouped queries, fewer heads than q has, are not supported.
        bias: broadcasts to (B, H, N_q, N_k) and has any strides. Floating, in the dtype of q or float32: added to the
            scaled scores; differentiable, and the gradient has the shape of ``bias``, so that broadcasting here takes
            less memory than an expanded tensor. On GPUs, a row stride that is divisible by 16 is fastest. Bool: True
            takes part. Or a :class:`.DecomposedBias`.
        key_lengths: (B,), int32 or int64: keys at or past the length do not take part. Values outside 0 to N_k raise
            an error on a CPU; on a GPU, where the check would synchronize, they count as 0 or N_k.
        causal: True: query i attends to keys 0 to i, as in PyTorch. "bottom_right": to keys 0 to i + N_k - N_q, as in
            flash-attn. All masks combine. A row without keys gives zeros, a log-sum-exp of -inf and zero gradients; a
            bias of finfo.min in all columns gives the average of v, as in PyTorch.
        q_norm, k_norm: norms over D, applied to queries and keys (Dehghani et al. 2023, arXiv:2302.05442, section 2).
        norm_type: type of both norms, "layer_norm" or "rms_norm" (Zhang & Sennrich 2019, arXiv:1910.07467).
        rope: tables (cos, sin) of rotary positions (Su et al. 2021, arXiv:2104.09864), applied to q and k after the
            norms, in float32. Each is (B or 1, H or 1, N - rope_prefix, columns) or (N - rope_prefix, columns), float32
            or the dtype of q, with any strides. Tables with more than D / 2 columns have one per channel, others one
            per pair of channels. Channels beyond the tables are not rotated. With "triton", tables have no gradient.
        rope_prefix: number of tokens at the start that are not rotated.
        rope_layout: "half" pairs channel i with i + D' / 2, where D' is the number of rotated channels (DINOv3);
            "interleaved" pairs neighbours (EVA-02).
        scale: default 1 / sqrt(D).
        dropout_p: probability of zeroing an attention weight; the others are scaled by 1 / (1 - p).
        return_lse: also return the log-sum-exp of the scaled scores of each row, (B, H, N_q), float32, differentiable.
            An infinite score gives NaN for the log-sum-exp, the row of the softmax and its gradients.

    Returns:
        (B, N_q, H, D), contiguous with "triton". Saved for backward: q, k, v, the result and the log-sum-exp; with
        ``rope``, also the tables, q and k are the rotated ones, and with norms q and k are saved before the norms, too.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, 4, "(B, N, H, D)")
    check_alike("q", q, k=k, v=v)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {shape_of(k)} and {shape_of(v)}")
    if k.shape[2] != q.shape[2] and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3]):
        raise ValueError(
            f"q has {q.shape[2]} heads, k and v have {k.shape[2]}; they must be equal: repeat the heads of k and v"
        )
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q and k must agree in batch, heads and head size, got {shape_of(q)} and {shape_of(k)}")
    check_attention("q", q.shape, k.shape[1], scale, dropout_p, return_lse)
    check_head_norms(q, q_norm, k_norm, norm_type)
    mask = None
    if bias is not None or key_lengths is not None or causal is not False:
        scores = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
        mask = check_score_mask(q, scores, bias, key_lengths, causal)
    check_rope(q.shape, k.shape[1], q, rope, rope_prefix, rope_layout)
    q, k, v = autocast(q, k, v)
    recorder = active_recorder()
    if recorder is not None:
        masks = dict(bias=bias, key_lengths=key_lengths, causal=causal)
        norms = dict(q_norm=q_norm, k_norm=k_norm, norm_type=norm_type)
        positions: dict[str, Any] = dict(rope=rope, rope_prefix=rope_prefix, rope_layout=rope_layout)
        recorder.attention(q, k, scale=scale, **masks, **norms, **positions)
    if _attention_backend(backend, q, q.numel(), rope) == "torch":
        return reference.attention(
            q,
            k,
            v,
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
            dropout_p=dropout_p,
            return_lse=return_lse,
        )
    check_kernel_dtype("q", q)
    if rope is not None:
        q, k = _rotate(q, k, q_norm, k_norm, norm_type, rope, rope_prefix, rope_layout)
        q_norm = k_norm = None
    if q_norm is not None or k_norm is not None or mask is not None:
        out, lse = _general_attention(q, k, v, mask, q_norm, k_norm, norm_type, scale, dropout_p, return_lse)
        return (out, lse) if return_lse else out
    arguments = (q, k, v, _seed(q, dropout_p), _scale(scale, q), float(dropout_p))
    out, lse = _apply(autograd.AttentionFunction, "attention_fwd", arguments, (q, k, v), return_lse)
    return (out, lse) if return_lse else out


def attention_packed(
    qkv: Tensor,
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute :func:`attention` of packed q, k and v, (B, N, 3, H, D). The gradient is packed, too."""
    check_tensor("qkv", qkv, 5, "(B, N, 3, H, D)")
    if qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, H, D), got {shape_of(qkv)}")
    check_attention("qkv", (*qkv.shape[:2], *qkv.shape[3:]), qkv.shape[1], scale, dropout_p, return_lse)
    check_head_norms(qkv, q_norm, k_norm, norm_type)
    check_rope((*qkv.shape[:2], *qkv.shape[3:]), qkv.shape[1], qkv, rope, rope_prefix, rope_layout)
    mask = None
    if bias is not None or key_lengths is not None or causal is not False:
        batch, n, _, heads, _ = qkv.shape
        mask = check_score_mask(qkv, (batch, heads, n, n), bias, key_lengths, causal)
    (qkv,) = autocast(qkv)
    recording = active_recorder() is not None
    if recording or _attention_backend(backend, qkv, qkv.numel() // 3, rope) == "torch":
        options: dict[str, Any] = dict(bias=bias, key_lengths=key_lengths, causal=causal)
        options |= dict(q_norm=q_norm, k_norm=k_norm, norm_type=norm_type)
        options |= dict(rope=rope, rope_prefix=rope_prefix, rope_layout=rope_layout)
        options |= dict(scale=scale, dropout_p=dropout_p, return_lse=return_lse)
        if recording:
            return attention(*qkv.unbind(2), **options, backend=backend)
        return reference.attention_packed(qkv, **options)
    check_kernel_dtype("qkv", qkv)
    if rope is not None:
        rotary = norm_type, rope, rope_prefix, rope_layout
        if not _needs_autograd(qkv, *_norm_parts(q_norm)[:2], *_norm_parts(k_norm)[:2]):
            q, k, v = qkv.unbind(2)  # v is read where it lies
            q, k = _rotate(q, k, q_norm, k_norm, *rotary)
            masked = functools.partial(attention, bias=bias, key_lengths=key_lengths, causal=causal)
            return masked(q, k, v, scale=scale, dropout_p=dropout_p, return_lse=return_lse, backend="triton")
        qkv = _rotate(qkv, None, q_norm, k_norm, *rotary)
        q_norm = k_norm = None
    if q_norm is not None or k_norm is not None or mask is not None:
        out, lse = _general_attention(
            qkv, None, None, mask, q_norm, k_norm, norm_type, scale, dropout_p, return_lse
        )  # fmt: skip
        return (out, lse) if return_lse else out
    arguments = (qkv, _seed(qkv, dropout_p), _scale(scale, qkv), float(dropout_p))
    out, lse = _apply(autograd.AttentionPackedFunction, "attention_packed_fwd", arguments, (qkv,), return_lse)
    return (out, lse) if return_lse else out


def _attention_backend(backend: str | None, x: Tensor, elements: int, rope: Rope | None) -> str:
    name = resolve_backend(backend, "attention", x, elements=elements, head_dim=x.shape[-1])
    return _supported(name, backend, rope)


def _supported(name: str, backend: str | None, rope: Rope | None) -> str:
    """Return ``name``, to which ``backend`` resolved, or "torch" for a gradient of the tables of ``rope``, which the
    kernels do not compute."""
    if name == "torch" or rope is None or not torch.is_grad_enabled():
        return name
    if not any(table.requires_grad for table in rope):
        return name
    if backend_name(backend) == "auto":
        return "torch"
    raise NotImplementedError(
        'backend "triton" has no gradient of cos and sin of rope; detach them or use backend="torch"'
    )


def _rotate(
    q: Tensor,
    k: Tensor | None,
    q_norm: Norm | None,
    k_norm: Norm | None,
    norm_type: str,
    rope: Rope,
    prefix: int,
    layout: str,
) -> Any:
    """Normalise and rotate q and k -> (q, k); if k is None, q is the packed projection, and so is the result."""
    (q_weight, q_bias, q_eps), (k_weight, k_bias, k_eps) = _norm_parts(q_norm), _norm_parts(k_norm)
    norms = q_weight, q_bias, k_weight, k_bias
    scalars = q_eps, k_eps, norm_type == "rms_norm", prefix, layout == "interleaved"
    if _needs_autograd(q, k, *norms):
        return autograd.RotaryFunction.apply(q, k, *norms, *rope, *scalars)
    return torch.ops.vit_triton.rotary_fwd.default(q, k, *rope, *norms, *scalars)


def _general_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    mask: ScoreMask | None,
    q_norm: Norm | None,
    k_norm: Norm | None,
    norm_type: str,
    scale: float | None,
    dropout_p: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Compute attention with norms, a bias or masks. If k and v are None, q is the packed projection."""
    (q_weight, q_bias, q_eps), (k_weight, k_bias, k_eps) = _norm_parts(q_norm), _norm_parts(k_norm)
    bias, rel, key_lengths, causal = NO_MASK if mask is None else mask
    tensors = q, k, v, q_weight, q_bias, k_weight, k_bias, bias, *(rel or (None, None))
    scalars = q_eps, k_eps, norm_type == "rms_norm", _scale(scale, q), float(dropout_p), causal
    arguments = (*tensors, _seed(q, dropout_p), key_lengths, *scalars)
    out, lse, *_ = _apply(autograd.NormedAttentionFunction, "normed_attention_fwd", arguments, tensors, return_lse)
    return out, lse


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool | str = False,
    rope: Rope | None = None,
    rope_prefix: int = 0,
    rope_layout: str = "half",
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute :func:`attention` of packed sequences: tokens of different sequences do not attend to each other.

    The arguments are those of ``flash_attn_varlen_func``, except that ``causal=True`` aligns the first query with the
    first key, as in PyTorch. :func:`pack` makes packed sequences.

    Args:
        q: (total_q, H, D), the rows of the first sequence, then those of the second, and so on; with "triton",
            D <= 256.
        k, v: (total_k, H, D).
        cu_seqlens_q: (sequences + 1,), int32: the first row of each sequence, and the number of rows. A sequence may be
            empty. The values are checked on a CPU only, since the check would synchronize a GPU.
        max_seqlen_q: the longest length, or more.
        cu_seqlens_k, max_seqlen_k: those of k and v; by default those of q.
        causal, scale, dropout_p: see :func:`attention`. Sequence i draws the dropout mask of sample i in
            :func:`attention`.
        rope, rope_layout: see :func:`attention`; the tables have a row for each of the total_q rows.
        rope_prefix: number of tokens at the start of each sequence that are not rotated; their rows of the tables are
            ignored. Requires keys of the same sequences as the queries.
        return_lse: also return the log-sum-exp of the scaled scores of each row, (H, total_q), float32, differentiable.

    Returns:
        (total_q, H, D), contiguous with "triton".
    """
    if active_recorder() is not None:
        raise ValueError(
            "attention_maps does not support packed sequences (NaViT, padded batches of NaFlexVit, Qwen2-VL): "
            "attention_maps needs images of one size in a tensor (B, C, H, W) and a model that does not pack them"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, 3, "(total, H, D)")
    check_alike("q", q, k=k, v=v)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {shape_of(k)} and {shape_of(v)}")
    if q.shape[1:] != k.shape[1:]:
        raise ValueError(f"q and k must agree in heads and head size, got {shape_of(q)} and {shape_of(k)}")
    check_sequences("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, q, q.shape[0])
    cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    max_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    if cu_seqlens_k is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"cu_seqlens_k is required if q and k differ in rows, got {shape_of(q)} and {shape_of(k)}")
    check_sequences("cu_seqlens_k", cu_k, "max_seqlen_k", max_k, q, k.shape[0])
    if cu_k.shape != cu_seqlens_q.shape:
        shapes = f"{shape_of(cu_seqlens_q)} and {shape_of(cu_k)}"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must have one shape, got {shapes}")
    sequences = cu_k.shape[0] - 1
    check_attention("q", (sequences, max_seqlen_q, *q.shape[1:]), max(1, max_k), scale, dropout_p, return_lse)
    mask = check_score_mask(q, (sequences, q.shape[1], max_seqlen_q, max_k), None, None, causal)
    check_count("rope_prefix", rope_prefix, at_least=0)
    check_rope((1, *q.shape), k.shape[0], q, rope, rope_prefix, rope_layout, prefix_rows=True)
    if rope_prefix and cu_k is not cu_seqlens_q:
        raise ValueError("rope_prefix requires the keys of the queries' sequences; omit cu_seqlens_k")
    q, k, v = autocast(q, k, v)
    if _attention_backend(backend, q, q.numel(), rope) == "torch":
        return reference.attention_varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            max_seqlen_q,
            cu_k,
            max_k,
            causal=causal,
            rope=rope,
            rope_prefix=rope_prefix,
            rope_layout=rope_layout,
            scale=scale,
            dropout_p=dropout_p,
            return_lse=return_lse,
        )
    check_kernel_dtype("q", q)
    if rope is not None:
        rope = _without_prefix(rope, rope_prefix, cu_seqlens_q) if rope_prefix else rope
        q, k = (x[0] for x in _rotate(q[None], k[None], None, None, "layer_norm", rope, 0, rope_layout))
    # Dynamo does not support the same tensor as two arguments of a Function
    cu_k = cu_k.view_as(cu_k) if cu_k is cu_seqlens_q else cu_k
    sizes = max_seqlen_q, max_k, _scale(scale, q), float(dropout_p), mask.causal
    arguments = (q, k, v, cu_seqlens_q, cu_k, _seed(q, dropout_p), *sizes)
    out, lse = _apply(autograd.AttentionVarlenFunction, "attention_varlen_fwd", arguments, (q, k, v), return_lse)
    return (out, lse) if return_lse else out


def _without_prefix(rope: Rope, prefix: int, cu_seqlens: Tensor) -> Rope:
    """Return tables (..., total, columns) that do not rotate the first rows of each sequence."""
    cos, sin = rope
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=cos.shape[-2])
    rotated = (torch.arange(cos.shape[-2], device=cos.device) - starts >= prefix)[:, None]
    return torch.where(rotated, cos, 1.0), torch.where(rotated, sin, 0.0)


def pack(x: Tensor, valid: Tensor) -> Packed:
    """Pack the valid tokens of padded sequences for :func:`attention_varlen`.

    Synchronizes a GPU once, so pack before the first block of a model. The valid tokens need not come first.

    Args:
        x: (B, N, ...).
        valid: (B, N), bool.
    """
    check_valid(x, valid)
    indices = valid.flatten().nonzero().squeeze(1)
    lengths = valid.sum(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return Packed(x.flatten(0, 1)[indices], indices, cu_seqlens, int(lengths.max()) if len(lengths) else 0)


def unpack(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    """Put tokens packed by :func:`pack` back into padded sequences.

    Args:
        x: (total, ...).
        indices: those of :class:`.Packed`.

    Returns:
        (batch, length, ...), zero where no token is valid.
    """
    check_packed(x, indices, batch, length)
    padded = x.new_zeros(batch * length, *x.shape[1:])
    return padded.index_copy(0, indices, x).unflatten(0, (batch, length))


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
    backend: str | None = None,
) -> Tensor:
    """Compute drop_path(layer_scale * dropout(norm(x) @ weight.T + bias)) + residual.

    With ``rope``, the result is a packed projection to q, k and v, and q and k are rotated: the input of
    :func:`attention_packed`, reshaped to (B, N, 3, H, D). On a GPU, the kernel of the projection rotates in
    its epilogue where D is a power of two, all heads share the tables, and these have D / 2 columns, or D columns in 16
    bits with the layout "half". Otherwise a second kernel rotates q and k in place.

    Args:
        x: (..., K); weight: (N, K), as in ``nn.Linear``; bias: (N,); residual: (..., N).
        layer_scale: (N,); requires ``residual`` (Touvron et al. 2021, arXiv:2103.17239).
        drop_path_p: stochastic depth, the probability of dropping the branch of a sample (first dimension of x); the
            others are scaled by 1 / (1 - p). Requires ``residual``. Draws the same random numbers as timm's DropPath
            (Huang et al. 2016, arXiv:1603.09382).
        rope: tables (cos, sin) of rotary positions, see :func:`attention`. x is (B, N, K), and weight has
            3 * rope_heads * D rows, those of q, then k, then v. Cannot be combined with ``residual``, ``layer_scale``,
            ``drop_path_p`` or ``dropout_p``.
        rope_heads: number of heads; required with ``rope``, ignored without.
        rope_prefix, rope_layout: see :func:`attention`.

    Returns:
        (..., N). Saved for backward: x, and with ``norm`` mean and 1/std of its rows; with ``rope`` also the tables.
    """
    options = layer_scale, drop_path_p, dropout_p, rope, rope_heads, rope_prefix, rope_layout
    return _linear(x, weight, bias, norm, residual, backend, *options)[0]


def linear_and_input(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Norm | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the pair (:func:`linear`, x) of the first layer of a branch with a residual.

    The returned x is the residual of the branch's last layer: the gradients of both uses of x are then added by the
    backward kernel of ``norm`` instead of in a pass of their own.
    """
    return _linear(x, weight, bias, norm, None, backend, returns_x=True)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    backend: str | None,
    layer_scale: Tensor | None = None,
    drop_path_p: float = 0.0,
    dropout_p: float = 0.0,
    rope: Rope | None = None,
    rope_heads: int | None = None,
    rope_prefix: int = 0,
    rope_layout: str = "half",
    returns_x: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return :func:`linear` and x; ``returns_x`` as in :class:`.LinearFunction`."""
    check_tensor("x", x)
    check_linear("x", x.shape[-1:], "weight", weight, "bias", bias)
    check_norm("norm", norm, x.shape[-1], x)
    if rope is not None:
        branch = dict(residual=residual, layer_scale=layer_scale, drop_path_p=drop_path_p, dropout_p=dropout_p)
        check_rotated_projection(x, weight, rope, rope_heads, rope_prefix, rope_layout, **branch)
    check_residual(residual, (*x.shape[:-1], weight.shape[0]))
    check_branch(x, "weight", weight, residual, layer_scale, drop_path_p)
    check_probability("dropout_p", dropout_p)
    check_alike("x", x, weight=weight, bias=bias, residual=residual, layer_scale=layer_scale)
    check_rows(x)
    weight, bias = autocast(weight, bias, device=x.device)
    head_dim = 0 if rope is None or rope_heads is None else weight.shape[0] // (3 * rope_heads)
    name = resolve_backend(backend, "linear", x, _width(norm, x), weight=weight, head_dim=head_dim)
    if _supported(name, backend, rope) == "torch":
        y = reference.linear(
            x,
            weight,
            bias,
            norm=norm,
            residual=residual,
            layer_scale=layer_scale,
            drop_path_p=drop_path_p,
            dropout_p=dropout_p,
            rope=rope,
            rope_heads=rope_heads,
            rope_prefix=rope_prefix,
            rope_layout=rope_layout,
        )
        return y, x
    check_kernel_dtype("x", x)
    norm_weight, norm_bias, eps = _norm_parts(norm)
    fastest = fastest_products(backend, x)
    if rope is not None:
        given = x, weight, bias, norm_weight, norm_bias
        scalars = eps, rope_heads, rope_prefix, rope_layout == "interleaved"
        if _needs_autograd(*given):
            return autograd.LinearRopeFunction.apply(*given, *rope, *scalars, fastest), x
        return torch.ops.vit_triton.linear_rope_fwd.default(*given, *rope, *scalars, False, fastest)[0], x
    residual_is_x = residual is x
    tensors = (x, weight, bias, norm_weight, norm_bias, None if residual_is_x else residual, layer_scale)
    drawn = _drop_path_factors(x, drop_path_p), _seed(x, dropout_p)
    if _needs_autograd(*tensors):
        returns_x = returns_x and x.requires_grad
        switches = residual_is_x, returns_x, fastest
        made = autograd.LinearFunction.apply(*tensors, *drawn, eps, float(dropout_p), *switches)
        return made if returns_x else (made, x)
    y, *_ = torch.ops.vit_triton.linear_fwd.default(
        *tensors[:5], residual, layer_scale, *drawn, eps, float(dropout_p), False, fastest
    )
    return y, x


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
    backend: str | None = None,
) -> Tensor:
    """Compute drop_path(layer_scale * dropout(dropout(activation(norm(x) @ w1.T + b1)) @ w2.T + b2)) + residual.

    Args:
        x: (..., K); w1: (N, K); b1: (N,); w2: (L, N); b2: (L,); residual: (..., L).
        activation: "gelu" (exact), "gelu_tanh", "quick_gelu" (x * sigmoid(1.702 x)), "silu", "relu" or "swiglu",
            silu(gate) * value (Shazeer 2020, arXiv:2002.05202). For "swiglu", w1 is (2 N, K) and b1 (2 N,), the rows of
            the gate first; concatenate the weights if a model has two layers.
        layer_scale: (L,); drop_path_p: see :func:`linear`.
        hidden_dropout_p: dropout after the activation; dropout_p: dropout after the second GEMM.

    Returns:
        (..., L). Saved for backward: x, the pre-activation, and with ``norm`` mean and 1/std of the rows of x.
    """
    check_tensor("x", x)
    check_linear("x", x.shape[-1:], "w1", w1, "b1", b1)
    check_choice("activation", activation, ACTIVATIONS)
    check_linear("w1", hidden_features("w1", w1, activation), "w2", w2, "b2", b2)
    check_norm("norm", norm, x.shape[-1], x)
    check_residual(residual, (*x.shape[:-1], w2.shape[0]))
    check_branch(x, "w2", w2, residual, layer_scale, drop_path_p)
    check_probability("hidden_dropout_p", hidden_dropout_p)
    check_probability("dropout_p", dropout_p)
    check_alike("x", x, w1=w1, b1=b1, w2=w2, b2=b2, residual=residual, layer_scale=layer_scale)
    check_rows(x)
    w1, b1, w2, b2 = autocast(w1, b1, w2, b2, device=x.device)
    if resolve_backend(backend, "mlp", x, _width(norm, x), weight=w1) == "torch":
        return reference.mlp(
            x,
            w1,
            b1,
            w2,
            b2,
            norm=norm,
            activation=activation,
            residual=residual,
            layer_scale=layer_scale,
            drop_path_p=drop_path_p,
            hidden_dropout_p=hidden_dropout_p,
            dropout_p=dropout_p,
        )
    check_kernel_dtype("x", x)
    norm_weight, norm_bias, eps = _norm_parts(norm)
    residual_is_x = residual is x
    tensors = x, w1, b1, w2, b2, norm_weight, norm_bias, None if residual_is_x else residual, layer_scale
    drawn = _drop_path_factors(x, drop_path_p), _seed(x, hidden_dropout_p), _seed(x, dropout_p)
    scalars = eps, activation, float(hidden_dropout_p), float(dropout_p)
    fastest = fastest_products(backend, x)
    if _needs_autograd(*tensors):
        return autograd.MlpFunction.apply(*tensors, *drawn, *scalars, residual_is_x, fastest)
    given = *tensors[:7], residual, layer_scale, *drawn, *scalars
    return torch.ops.vit_triton.mlp_fwd.default(*given, False, fastest)[0]


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
    backend: str | None = None,
) -> Tensor:
    """Compute the blocks of a Transformer encoder in sequence (Dosovitskiy et al. 2020, arXiv:2010.11929, eq. 2, 3).

    Args:
        x: (B, N, D).
        blocks: the weights of each block, in the dtype of x.
        heads: number of attention heads.
        scale: default 1 / sqrt(head size).
        activation: see :func:`mlp`.
        rope, rope_prefix, rope_layout: rotary positions of all blocks, see :func:`attention`.
        first_token: compute only the first token of the result. Requires that ``rope`` is None.

    Returns:
        (B, N, D), or (B, 1, D) with ``first_token``. Without gradients this is one operator. With gradients it is one
        autograd Function per block, which saves what :func:`linear`, :func:`attention` and :func:`mlp` save. It is
        composed of these three with ``torch.compile``, for a last block with ``first_token`` and gradients, with
        gradients and ``rope``, and with autocast without gradients.
    """
    parts = check_encoder(x, blocks, heads, scale, activation, rope, rope_prefix, rope_layout, first_token)
    tensors = [x, *(part for part in parts if isinstance(part, Tensor)), *(rope or ())]
    positions: dict[str, Any] = dict(rope=rope, rope_prefix=rope_prefix, rope_layout=rope_layout)
    functions = tuple(functools.partial(op, backend=backend) for op in (linear, attention, mlp))
    differentiated = _needs_autograd(*tensors)
    composed = any(block.norm1 is None or block.norm2 is None for block in blocks) or torch.compiler.is_compiling()
    composed = composed or active_recorder() is not None
    composed = composed or (rope is not None if differentiated else is_autocast_enabled(x.device.type))
    # PyTorch does not resolve lazy negation in lists of optional tensors
    if composed or any(map(Tensor.is_neg, tensors)):
        return reference.encoder_of(functions, x, blocks, heads, scale, activation, positions, first_token)
    qkv_weight = blocks[0].qkv_weight if blocks else None
    head_dim = 1 if qkv_weight is None else qkv_weight.shape[0] // 3 // heads
    if resolve_backend(backend, "encoder", x, x.shape[-1], weight=qkv_weight, head_dim=head_dim) == "torch":
        options: dict[str, Any] = dict(heads=heads, scale=scale, activation=activation, first_token=first_token)
        return reference.encoder(x, blocks, **options, **positions)
    check_kernel_dtype("x", x)
    scale = head_dim**-0.5 if scale is None else float(scale)
    fastest = fastest_products(backend, x)
    if differentiated:
        whole = blocks[:-1] if first_token else blocks
        for block in whole:
            x = _block(x, block, heads, scale, activation, fastest)
        return reference.encoder_of(
            functions, x, blocks[len(whole) :], heads, scale, activation, positions, first_token
        )
    arguments: list[Tensor | None] = []
    eps = []
    for block in blocks:
        (weight1, bias1, eps1), (weight2, bias2, eps2) = _norm_parts(block.norm1), _norm_parts(block.norm2)
        eps += [eps1, eps2]
        arguments += (weight1, bias1, *block[1:5], weight2, bias2, *block[6:])
    tables = rope or (None, None)
    scalars = heads, scale, activation, rope_prefix, rope_layout == "interleaved", first_token
    return torch.ops.vit_triton.encoder_fwd.default(x, arguments, eps, *tables, *scalars, fastest)


def _block(x: Tensor, block: Block, heads: int, scale: float, activation: str, fastest: bool) -> Tensor:
    """A block of :func:`encoder` with gradients."""
    (weight1, bias1, eps1), (weight2, bias2, eps2) = _norm_parts(block.norm1), _norm_parts(block.norm2)
    weights = autocast(*block[1:5], *block[6:10], device=x.device)
    given = weight1, bias1, *weights[:4], weight2, bias2, *weights[4:], *block[10:]
    return autograd.BlockFunction.apply(x, *given, eps1, eps2, heads, scale, activation, fastest)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute (x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: (..., D); weight, bias: (D,) or None; residual: shape and dtype of x.

    Returns:
        (..., D), or with ``residual`` the pair (norm(x + residual), x + residual).
    """
    check_tensor("x", x)
    check_norm("the norm", (weight, bias, eps), x.shape[-1], x)
    check_residual(residual, tuple(x.shape))
    check_alike("x", x, residual=residual)
    check_rows(x)
    x, weight, bias, residual = autocast(x, weight, bias, residual, dtype=torch.float32)
    op = "layer_norm" if residual is None else "add_layer_norm"
    if resolve_backend(backend, op, x, x.shape[-1]) == "torch":
        return reference.layer_norm(x, weight, bias, eps=eps, residual=residual)
    check_kernel_dtype("x", x)
    weight, bias, _ = _norm_parts((weight, bias, eps))
    if residual is None:
        y = _apply(autograd.LayerNormFunction, "layer_norm_fwd", (x, weight, bias, float(eps)), (x, weight, bias))
        return y if isinstance(y, Tensor) else y[0]
    # Dynamo does not support the same tensor as two arguments of a Function
    other = x.view_as(x) if residual is x else residual
    y, total, *_ = _apply(
        autograd.AddLayerNormFunction,
        "add_layer_norm_fwd",
        (x, other, weight, bias, float(eps)),
        (x, residual, weight, bias),
    )
    return y, total


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
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Project the patches of an image, add positions and prepend prefix tokens (Dosovitskiy et al. 2020,
    arXiv:2010.11929, section 3.1).

    Args:
        image: (B, C, H, W), floating point, or uint8 with ``mean`` and ``std``.
        weight: (dim, C * p1 * p2), columns in ``patch_order``: "p1 p2 c" (vit-pytorch) or "c p1 p2" (flattened Conv2d
            weight).
        bias: (dim,).
        patch_size: (p1, p2), or an int for both. They must divide H and W.
        pre_norm: LayerNorm over the pixels of a patch; post_norm: LayerNorm over dim, after the projection.
        pos: (rows, dim), rows >= number of patches. The first rows are added to the patches.
        prefix: (n, dim), prefix tokens such as class and register tokens.
        mean, std: C values on the 0..1 scale, to normalize a uint8 image as (x / 255 - mean) / std. Zeros in a sequence
            ``std`` raise ValueError. Zeros in a tensor give NaN or inf, since a check would synchronize the GPU.

    Returns:
        (B, n + patches, dim).
    """
    p1, p2, patches = check_patch_embed(
        image, weight, bias, patch_size, patch_order, pre_norm, post_norm, pos, prefix, mean, std
    )
    image_mean = image_std = None
    if image.dtype == torch.uint8:
        image_mean, image_std = _channel_values("mean", mean, image), _channel_values("std", std, image)
    weight, bias = autocast(weight, bias, device=image.device)
    if pos is not None:
        pos = pos[:patches]
    widest = max(_width(pre_norm, weight), 0 if post_norm is None else weight.shape[0])
    if resolve_backend(backend, "patch_embed", weight, widest, elements=image.numel(), weight=weight) == "torch":
        return reference.patch_embed(
            image,
            weight,
            bias,
            patch_size=(p1, p2),
            patch_order=patch_order,
            pre_norm=pre_norm,
            post_norm=post_norm,
            pos=pos,
            prefix=prefix,
            mean=image_mean,
            std=image_std,
        )
    check_kernel_dtype("weight", weight)
    if image_mean is not None and image_std is not None and _needs_autograd(image_mean, image_std):
        # the kernels do not compute gradients of mean and std
        image = reference.normalize_image(image, image_mean, image_std, weight.dtype)
        image_mean = image_std = None
    pre_weight, pre_bias, pre_eps = _norm_parts(pre_norm)
    post_weight, post_bias, post_eps = _norm_parts(post_norm)
    tensors = (image, weight, bias, pos, prefix, pre_weight, pre_bias, post_weight, post_bias)
    fastest = fastest_products(backend, weight)
    if _needs_autograd(*tensors):
        return autograd.PatchEmbedFunction.apply(
            *tensors, image_mean, image_std, pre_eps, post_eps, (p1, p2), patch_order, fastest
        )
    tokens, *_ = torch.ops.vit_triton.patch_embed_fwd.default(
        *tensors[:7], pre_eps, post_weight, post_bias, post_eps, image_mean, image_std, (p1, p2), patch_order, False,
        fastest,
    )  # fmt: skip
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
    backend: str | None = None,
) -> Tensor:
    """Compute attention inside the windows of a feature map (Liu et al. 2021, arXiv:2103.14030, section 3.2).

    The caller neither rolls nor partitions the map. With a ``shift``, the windows are those of the map rolled by
    -shift, ``mask_value`` is added to the scores of tokens that are not neighbours on the map, and the result is rolled
    back.

    Args:
        qkv: (B, H, W, 3, heads, D); with "triton", D <= 256. The window must divide H and W.
        bias: (heads, N, N), N = tokens of a window, added to the scores, see :func:`relative_position_bias`; or None.
        window: height and width of a window. With "triton", at most 256 tokens.
        shift: rows and columns of the shift, at least 0 and less than the window.
        mask_value: added to the scores of tokens from different regions of the map.
        logit_scale: (heads,), selects cosine attention (Liu et al. 2022, arXiv:2111.09883, section 3.3): queries and
            keys are divided by their lengths, and the scores are multiplied by this factor.
        scale: default 1 / sqrt(D). Must be None with ``logit_scale``.
        dropout_p: see :func:`attention`.

    ``bias`` and ``logit_scale`` have the dtype of qkv or float32.

    Returns:
        (B, H, W, heads, D). Saved for backward: qkv, bias and logit_scale.
    """
    check_window_attention(qkv, bias, window, shift, mask_value, logit_scale, scale, dropout_p)
    (qkv,) = autocast(qkv)
    if qkv.dtype in (torch.float16, torch.bfloat16):  # autocast to the other 16-bit dtype
        bias, logit_scale = (_in_dtype_or_float32(x, qkv) for x in (bias, logit_scale))
    too_large = window[0] * window[1] > MAX_WINDOW_TOKENS
    # the speed of attention, until the tables contain this operator
    if (too_large and backend_name(backend) == "auto") or (
        resolve_backend(backend, "attention", qkv, elements=qkv.numel() // 3, head_dim=qkv.shape[-1]) == "torch"
    ):
        return reference.window_attention(
            qkv,
            bias,
            window=window,
            shift=shift,
            mask_value=mask_value,
            logit_scale=logit_scale,
            scale=scale,
            dropout_p=dropout_p,
        )
    check_kernel_dtype("qkv", qkv)
    if too_large:
        raise ValueError(
            f'window must have at most {MAX_WINDOW_TOKENS} tokens with backend "triton", got '
            f'{window[0]} x {window[1]}; use backend="torch"'
        )
    tensors = qkv, bias, logit_scale
    scalars = tuple(window), tuple(shift), float(mask_value), _scale(scale, qkv), float(dropout_p)
    arguments = *tensors, _seed(qkv, dropout_p), *scalars
    if _needs_autograd(*tensors):
        return autograd.WindowAttentionFunction.apply(*arguments)
    return torch.ops.vit_triton.window_attention_fwd.default(*arguments)


def relative_position_bias(
    table: Tensor, window: tuple[int, int], *, prefix_tokens: int = 0, backend: str | None = None
) -> Tensor:
    """Gather the relative position bias of a window from a table (Liu et al. 2021, arXiv:2103.14030, section 3.2).

    With "triton", the gradient is a sum in a fixed order, and bitwise reproducible.

    Args:
        table: (offsets, heads). Row (y_i - y_j + wh - 1) * (2 * ww - 1) + x_i - x_j + ww - 1 is the bias of query i and
            key j. With a prefix token, three more rows: its bias to the patches, theirs to it, and its own to itself,
            as in BEiT (arXiv:2106.08254).
        window: (wh, ww).
        prefix_tokens: 0 or 1.

    Returns:
        (heads, N, N) with N = prefix_tokens + wh * ww.
    """
    check_position_table(table, window, prefix_tokens)
    if resolve_backend(backend, "attention", table) == "torch":
        return reference.relative_position_bias(table, window, prefix_tokens=prefix_tokens)
    check_kernel_dtype("table", table)
    arguments = table, tuple(window), prefix_tokens
    if _needs_autograd(table):
        return autograd.RelativePositionBiasFunction.apply(*arguments)
    return torch.ops.vit_triton.relative_position_bias_fwd.default(*arguments)


# --- running -----------------------------------------------------------------------------------------------


def _needs_autograd(*tensors: Tensor | None) -> bool:
    """Return whether autograd must see this call; a Function raises in forward mode."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    for x in tensors:
        if x is not None and x.requires_grad:
            return True
    return False


def _apply(
    function: Any, op: str, arguments: tuple, differentiable: tuple[Tensor | None, ...], save: bool = False
) -> Any:
    """Call the Function if autograd is needed, else the operator; ``save`` makes it return the tensors for backward."""
    if _needs_autograd(*differentiable):
        return function.apply(*arguments)
    return autograd.OPS[op](*arguments, save)


def _seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """Draw a dropout seed on the device of ``x``: without synchronization, and anew on every CUDA graph replay."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if dropout_p > 0 else None


def _drop_path_factors(x: Tensor, drop_path_p: float) -> Tensor | None:
    return reference.drop_path_factors(x, drop_path_p) if drop_path_p > 0 else None


def _width(norm: Norm | None, x: Tensor) -> int:
    """Return the width of ``norm``, or 0 for None."""
    return 0 if norm is None else x.shape[-1]


def _scale(scale: float | None, x: Tensor) -> float:
    return float(x.shape[-1] ** -0.5 if scale is None else scale)


def _in_dtype_or_float32(x: Tensor | None, like: Tensor) -> Tensor | None:
    return x if x is None or x.dtype in (like.dtype, torch.float32) else x.to(like.dtype)


def _norm_parts(norm: Norm | None) -> tuple[Tensor | None, Tensor | None, float | None]:
    if norm is None:
        return None, None, None
    weight, bias, eps = norm
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # the kernels require a weight with a bias
    return weight, bias, float(eps)


def _channel_values(name: str, values: Tensor | Sequence[float] | None, image: Tensor) -> Tensor:
    if isinstance(values, Tensor):
        check_tensor(name, values, 1, "(C,)", also=(torch.uint8, torch.int32, torch.int64))
        if values.is_meta and not image.is_meta:
            raise ValueError(f"image and {name} must be on one device, got {image.device} and {values.device}")
    else:
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            raise TypeError(
                f"{name} must be a tensor or a sequence of numbers, one per channel, got {format_value(values)}"
            )
        values = tuple(values)
        for i, value in enumerate(values):
            check_number(f"{name}[{i}]", value)
        if name == "std" and not all(values):
            raise ValueError(f"std must not contain 0, got {values}")
        traced = torch.compiler.is_compiling() or torch._guards.detect_fake_mode(image) is not None
        if traced:  # fake tensors must not be cached; a copy from the host would prevent CUDA graphs
            values = torch.cat([torch.full((1,), x, dtype=torch.float32, device=image.device) for x in values])
        else:
            values = _channel_constant(values, image.device)
    if values.shape != image.shape[1:2]:
        raise ValueError(f"{name} must have one value per channel, {image.shape[1]} channels, got {shape_of(values)}")
    return values.to(image.device, torch.promote_types(values.dtype, torch.float32))


@functools.lru_cache(maxsize=64)
def _channel_constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copy ``values`` to the device once, since the copy waits for the GPU."""
    with torch.inference_mode(False):  # autograd cannot save an inference tensor, and a later call may train
        return torch.tensor(values, dtype=torch.float32, device=device)
