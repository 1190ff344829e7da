"""The ops as functions: check the arguments, follow autocast, choose the backend.

Every function takes float32, float16 or bfloat16 tensors (backend "torch" takes float64 too) of one dtype on one
device, with any strides, and raises TypeError or ValueError, naming the argument, before anything runs. With autocast
on, matrix products run in its dtype, layer_norm in float32, as PyTorch's own do. ``backend`` is None (the default of
:func:`vit_triton.use_backend`), "triton", "torch" or "auto". Gradients are first order and reverse mode with "triton";
anything else raises there and works with "torch".

A ``norm`` is (weight, bias, eps), weight and bias of the last dimension or None.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vit_triton import autograd, reference
from vit_triton.arguments import Block, Norm
from vit_triton.autocast import autocast, autocasting
from vit_triton.backend import resolve_backend
from vit_triton.checks import (
    ACTIVATIONS,
    check_alike,
    check_attention,
    check_branch,
    check_choice,
    check_encoder,
    check_head_norms,
    check_kernel_dtype,
    check_linear,
    check_norm,
    check_number,
    check_patch_embed,
    check_probability,
    check_residual,
    check_rows,
    check_tensor,
    given,
    hidden_features,
    shape_of,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    norm_type: str = "layer_norm",
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v for every head (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).

    Args:
        q: (B, N_q, H, D), D at most 256.
        k, v: (B, N_k, H, D), N_k at least 1.
        q_norm, k_norm: over D, of every query and key before (Dehghani et al. 2023, arXiv:2302.05442, section 2).
        norm_type: of both norms, "layer_norm" or "rms_norm" (Zhang & Sennrich 2019, arXiv:1910.07467).
        scale: default 1 / sqrt(D).
        dropout_p: probability that a softmax weight is zeroed; the others grow by 1 / (1 - p).
        return_lse: also return the log-sum-exp of each row's scaled scores, float32 (B, H, N_q), differentiable. It is
            NaN, not inf, where a score is inf: the row of softmax is NaN, and so are its gradients. With "triton" the
            backward pass computes the weights from it again, each with a relative error of up to 2e-7 times the largest
            scaled score: a gradient of v has lost its digits at scores of 1e6.

    With "triton" the result may be inf or NaN where a scaled score is beyond 1e9 in size, 1e8 with float16.

    Returns:
        (B, N_q, H, D), contiguous with "triton". Kept for the backward pass: q, k, v as they came, the result and the
        log-sum-exp.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, 4, "(B, N, H, D)")
    check_alike("q", q, k=k, v=v)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {shape_of(k)} and {shape_of(v)}")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q and k must agree in batch, heads and head size, got {shape_of(q)} and {shape_of(k)}")
    check_attention("q", q.shape, k.shape[1], scale, dropout_p, return_lse)
    check_head_norms(q, q_norm, k_norm, norm_type)
    q, k, v = autocast(q, k, v)
    if resolve_backend(backend, "attention", q) == "torch":
        return reference.attention(
            q,
            k,
            v,
            q_norm=q_norm,
            k_norm=k_norm,
            norm_type=norm_type,
            scale=scale,
            dropout_p=dropout_p,
            return_lse=return_lse,
        )
    check_kernel_dtype("q", q)
    if q_norm is not None or k_norm is not None:
        out, lse = _normed_attention(q, k, v, q_norm, k_norm, norm_type, scale, dropout_p, return_lse)
        return (out, lse) if return_lse else out
    arguments = (q, k, v, _seed(q, dropout_p), _scale(scale, q), float(dropout_p))
    out, lse = _apply(autograd.AttentionFunction, "attention_fwd", arguments, (q, k, v), return_lse)
    return (out, lse) if return_lse else out


def attention_packed(
    qkv: Tensor,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    norm_type: str = "layer_norm",
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` of the three slices of one projection (B, N, 3, H, D); its gradient is packed like it."""
    check_tensor("qkv", qkv, 5, "(B, N, 3, H, D)")
    if qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, H, D), got {shape_of(qkv)}")
    check_attention("qkv", (*qkv.shape[:2], *qkv.shape[3:]), qkv.shape[1], scale, dropout_p, return_lse)
    check_head_norms(qkv, q_norm, k_norm, norm_type)
    (qkv,) = autocast(qkv)
    if resolve_backend(backend, "attention", qkv) == "torch":
        norms = dict(q_norm=q_norm, k_norm=k_norm, norm_type=norm_type)
        return reference.attention_packed(qkv, **norms, scale=scale, dropout_p=dropout_p, return_lse=return_lse)
    check_kernel_dtype("qkv", qkv)
    if q_norm is not None or k_norm is not None:
        out, lse = _normed_attention(qkv, None, None, q_norm, k_norm, norm_type, scale, dropout_p, return_lse)
        return (out, lse) if return_lse else out
    arguments = (qkv, _seed(qkv, dropout_p), _scale(scale, qkv), float(dropout_p))
    out, lse = _apply(autograd.AttentionPackedFunction, "attention_packed_fwd", arguments, (qkv,), return_lse)
    return (out, lse) if return_lse else out


def _normed_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_norm: Norm | None,
    k_norm: Norm | None,
    norm_type: str,
    scale: float | None,
    dropout_p: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    (q_weight, q_bias, q_eps), (k_weight, k_bias, k_eps) = _norm_parts(q_norm), _norm_parts(k_norm)
    tensors = q, k, v, q_weight, q_bias, k_weight, k_bias
    scalars = q_eps, k_eps, norm_type == "rms_norm", _scale(scale, q), float(dropout_p)
    arguments = (*tensors, _seed(q, dropout_p), *scalars)
    return _apply(autograd.NormedAttentionFunction, "normed_attention_fwd", arguments, tensors, return_lse)


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
    backend: str | None = None,
) -> Tensor:
    """drop_path(layer_scale * dropout(norm(x) @ weight.T + bias)) + residual.

    Args:
        x: (..., K); weight: (N, K), as in ``nn.Linear``; bias: (N,); residual: (..., N).
        layer_scale: (N,), of a branch that is added to a ``residual`` (Touvron et al. 2021, arXiv:2103.17239).
        drop_path_p: probability that a sample, an index of x's first dimension, gets its ``residual`` alone (stochastic
            depth, Huang et al. 2016, arXiv:1603.09382); the others grow by 1 / (1 - p). Drawn as timm's DropPath draws.

    Returns:
        (..., N). Kept for the backward pass: x, and mean and 1/std of its rows if there is a ``norm``.
    """
    check_tensor("x", x)
    check_linear("x", x.shape[-1:], "weight", weight, "bias", bias)
    check_norm("norm", norm, x.shape[-1], x)
    check_residual(residual, (*x.shape[:-1], weight.shape[0]))
    check_branch(x, "weight", weight, residual, layer_scale, drop_path_p)
    check_probability("dropout_p", dropout_p)
    check_alike("x", x, weight=weight, bias=bias, residual=residual, layer_scale=layer_scale)
    check_rows(x)
    weight, bias = autocast(weight, bias, device=x.device)
    if resolve_backend(backend, "linear", x, _width(norm, x)) == "torch":
        return reference.linear(
            x,
            weight,
            bias,
            norm=norm,
            residual=residual,
            layer_scale=layer_scale,
            drop_path_p=drop_path_p,
            dropout_p=dropout_p,
        )
    check_kernel_dtype("x", x)
    norm_weight, norm_bias, eps = _norm_parts(norm)
    residual_is_x = residual is x
    tensors = (x, weight, bias, norm_weight, norm_bias, None if residual_is_x else residual, layer_scale)
    drawn = _samples(x, drop_path_p), _seed(x, dropout_p)
    if _differentiating(*tensors):
        return autograd.LinearFunction.apply(*tensors, *drawn, eps, float(dropout_p), residual_is_x)
    return torch.ops.vit_triton.linear_fwd.default(
        *tensors[:5], residual, layer_scale, *drawn, eps, float(dropout_p), False
    )[0]


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
    """drop_path(layer_scale * dropout(dropout(activation(norm(x) @ w1.T + b1)) @ w2.T + b2)) + residual.

    Args:
        x: (..., K); w1: (N, K); b1: (N,); w2: (L, N); b2: (L,); residual: (..., L).
        activation: "gelu" (exact), "gelu_tanh", "quick_gelu" (x * sigmoid(1.702 x)), "silu", "relu"; or "swiglu",
            silu(gate) * value (Shazeer 2020, arXiv:2002.05202), where w1 is (2 N, K) and b1 (2 N,), the gate's rows
            first: ``torch.cat`` of two layers where a model has two.
        layer_scale: (L,); drop_path_p: as for :func:`linear`.
        hidden_dropout_p: after the activation. dropout_p: after the second product.

    Returns:
        (..., L). Kept for the backward pass: x, its row statistics if there is a ``norm``, and the pre-activation, w1's
        rows wide.
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
    if resolve_backend(backend, "mlp", x, _width(norm, x)) == "torch":
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
    drawn = _samples(x, drop_path_p), _seed(x, hidden_dropout_p), _seed(x, dropout_p)
    scalars = eps, activation, float(hidden_dropout_p), float(dropout_p)
    if _differentiating(*tensors):
        return autograd.MlpFunction.apply(*tensors, *drawn, *scalars, residual_is_x)
    return torch.ops.vit_triton.mlp_fwd.default(*tensors[:7], residual, layer_scale, *drawn, *scalars, False)[0]


def encoder(
    x: Tensor,
    blocks: Sequence[Block],
    *,
    heads: int,
    scale: float | None = None,
    activation: str = "gelu",
    first_token: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The blocks of a Transformer encoder, one after the other (Dosovitskiy et al. 2020, arXiv:2010.11929, eq. 2, 3).

    Args:
        x: (B, N, D).
        blocks: what each is made of, all in x's dtype.
        heads: attention heads; they divide the rows of each third of ``qkv_weight``.
        scale: default 1 / sqrt(head size).
        activation: as for :func:`mlp`.
        first_token: of the last block compute only what the first token needs.

    Returns:
        (B, N, D), with ``first_token`` (B, 1, D). Without gradients it is one operator that keeps nothing; with them,
        and under autocast or ``torch.compile``, it is made of :func:`linear`, :func:`attention` and :func:`mlp`.
    """
    parts = check_encoder(x, blocks, heads, scale, activation, first_token)
    tensors = [x, *(part for part in parts if isinstance(part, Tensor))]
    apart = any(block.norm1 is None or block.norm2 is None for block in blocks) or _differentiating(*tensors)
    apart = apart or torch.compiler.is_compiling() or autocasting(x.device.type)
    # PyTorch resolves a lazy negation in a tensor, but not in a list of optional ones, which the operator takes
    if apart or any(map(Tensor.is_neg, tensors)):
        functions = tuple(functools.partial(op, backend=backend) for op in (linear, attention, mlp))
        return reference.encoder_of(functions, x, blocks, heads, scale, activation, first_token)
    if resolve_backend(backend, "encoder", x, x.shape[-1]) == "torch":
        return reference.encoder(x, blocks, heads=heads, scale=scale, activation=activation, first_token=first_token)
    check_kernel_dtype("x", x)
    arguments: list[Tensor | None] = []
    eps = []
    for block in blocks:
        (weight1, bias1, eps1), (weight2, bias2, eps2) = _norm_parts(block.norm1), _norm_parts(block.norm2)
        eps += [eps1, eps2]
        arguments += (weight1, bias1, *block[1:5], weight2, bias2, *block[6:])
    head_dim = blocks[0].qkv_weight.shape[0] // 3 // heads if blocks else 1
    scale = head_dim**-0.5 if scale is None else float(scale)
    return torch.ops.vit_triton.encoder_fwd.default(x, arguments, eps, heads, scale, activation, first_token)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: (..., D); weight, bias: (D,) or None; residual: the shape and dtype of x.

    Returns:
        The shape of x; with ``residual`` the pair (norm(x + residual), x + residual), in one pass.
    """
    check_tensor("x", x)
    check_norm("the norm", (weight, bias, eps), x.shape[-1], x)
    check_residual(residual, tuple(x.shape))
    check_alike("x", x, residual=residual)
    check_rows(x)
    x, weight, bias, residual = autocast(x, weight, bias, residual, dtype=torch.float32)
    if resolve_backend(backend, "layer_norm", x, x.shape[-1]) == "torch":
        return reference.layer_norm(x, weight, bias, eps=eps, residual=residual)
    check_kernel_dtype("x", x)
    weight, bias, _ = _norm_parts((weight, bias, eps))
    if residual is None:
        y = _apply(autograd.LayerNormFunction, "layer_norm_fwd", (x, weight, bias, float(eps)), (x, weight, bias))
        return y if isinstance(y, Tensor) else y[0]
    # one tensor as two arguments of a Function: Dynamo needs two objects
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
    """Patches of an image, projected, with positions, behind the prefix tokens (Dosovitskiy et al. 2020,
    arXiv:2010.11929, section 3.1).

    Args:
        image: (B, C, H, W), floating, or uint8 with ``mean`` and ``std``.
        weight: (dim, C * p1 * p2); its columns are ordered by ``patch_order``: "p1 p2 c" (vit-pytorch) or "c p1 p2"
            (a flattened Conv2d weight).
        bias: (dim,).
        patch_size: (p1, p2) or one number for both; they divide H and W.
        pre_norm, post_norm: LayerNorm over the values of a patch, and over dim behind the projection.
        pos: (rows, dim) with at least as many rows as there are patches; the first ones are added to the patches.
        prefix: (n, dim), the class and register tokens, put first as they are.
        mean, std: C values on the 0..1 scale: (x / 255 - mean) / std is computed where the uint8 image is read, and
            before the kernels where mean or std wants a gradient. The values of a tensor are never checked, since that
            would synchronise a GPU: a 0 in a tensor ``std`` gives NaN or inf.

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
    if resolve_backend(backend, "patch_embed", weight, widest) == "torch":
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
    if image_mean is not None and image_std is not None and _differentiating(image_mean, image_std):
        # the kernels give mean and std no gradient
        image = reference.normalize_image(image, image_mean, image_std, weight.dtype)
        image_mean = image_std = None
    pre_weight, pre_bias, pre_eps = _norm_parts(pre_norm)
    post_weight, post_bias, post_eps = _norm_parts(post_norm)
    tensors = (image, weight, bias, pos, prefix, pre_weight, pre_bias, post_weight, post_bias)
    if _differentiating(*tensors):
        return autograd.PatchEmbedFunction.apply(
            *tensors, image_mean, image_std, pre_eps, post_eps, (p1, p2), patch_order
        )
    tokens, *_ = torch.ops.vit_triton.patch_embed_fwd.default(
        *tensors[:7], pre_eps, post_weight, post_bias, post_eps, image_mean, image_std, (p1, p2), patch_order, False,
    )  # fmt: skip
    return tokens


# --- running -----------------------------------------------------------------------------------------------


def _differentiating(*tensors: Tensor | None) -> bool:
    """Whether a gradient, or a forward-mode tangent (which the Function refuses), may pass through."""
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
    """Through autograd if needed; else the bare operator, which makes what backward would read only to ``save`` it."""
    if _differentiating(*differentiable):
        return function.apply(*arguments)
    return getattr(torch.ops.vit_triton, op).default(*arguments, save)


def _seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """A seed drawn on the device of ``x`` from torch's generator: no synchronisation, fresh in every graph replay."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if dropout_p > 0 else None


def _samples(x: Tensor, drop_path_p: float) -> Tensor | None:
    return reference.kept_samples(x, drop_path_p) if drop_path_p > 0 else None


def _width(norm: Norm | None, x: Tensor) -> int:
    """How wide a norm over the last dimension of ``x`` is; 0 where there is none."""
    return 0 if norm is None else x.shape[-1]


def _scale(scale: float | None, x: Tensor) -> float:
    return float(x.shape[-1] ** -0.5 if scale is None else scale)


def _norm_parts(norm: Norm | None) -> tuple[Tensor | None, Tensor | None, float | None]:
    if norm is None:
        return None, None, None
    weight, bias, eps = norm
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # the kernels have both or neither
    return weight, bias, float(eps)


def _channel_values(name: str, values: Tensor | Sequence[float] | None, image: Tensor) -> Tensor:
    if isinstance(values, Tensor):
        check_tensor(name, values, 1, "(C,)", also=(torch.uint8, torch.int32, torch.int64))
        if values.is_meta and not image.is_meta:
            raise ValueError(f"image and {name} must be on one device, got {image.device} and {values.device}")
    else:
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            raise TypeError(f"{name} must be a tensor or a sequence of numbers, one a channel, got {given(values)}")
        values = tuple(values)
        for i, value in enumerate(values):
            check_number(f"{name}[{i}]", value)
        if name == "std" and not all(values):
            raise ValueError(f"std divides and must not be 0, got {values}")
        traced = torch.compiler.is_compiling() or torch._guards.detect_fake_mode(image) is not None
        if traced:  # a fake tensor is of no use to a later call
            values = torch.tensor(values, dtype=torch.float32, device=image.device)
        else:
            values = _constant(values, image.device)
    if values.shape != image.shape[1:2]:
        raise ValueError(
            f"{name} must have one value for each of the {image.shape[1]} channels, got {shape_of(values)}"
        )
    return values.to(image.device, torch.promote_types(values.dtype, torch.float32))


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied to the device once: a copy in every forward would wait for the GPU."""
    with torch.inference_mode(False):  # autograd cannot save a tensor of that mode, and a later call may train
        return torch.tensor(values, dtype=torch.float32, device=device)
