"""The ops as functions: check the arguments, follow autocast, choose the backend.

Every function takes float32, float16 or bfloat16 tensors (backend "torch" takes float64 too) of one dtype on one
device, with any strides, and raises TypeError or ValueError, naming the argument, before anything runs. With autocast
on, matrix products run in its dtype, layer_norm in float32, as PyTorch's own do. ``backend`` is None (the default of
:func:`vit_triton.use_backend`), "triton", "torch" or "auto". Gradients are first order and reverse mode with "triton";
anything else raises there and works with "torch".

A ``norm`` is (weight, bias, eps), weight and bias of the last dimension or None.
"""

import functools
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from vit_triton import autograd, reference
from vit_triton.arguments import Block, Norm
from vit_triton.backend import is_portable, resolve_backend
from vit_triton.checks import check_choice, check_dense, check_flag, given, kind

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "swiglu")
NORM_TYPES = ("layer_norm", "rms_norm")
PATCH_ORDERS = ("p1 p2 c", "c p1 p2")
MAX_HEAD_DIM = 256
KERNEL_DTYPES = _FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_REFERENCE_FLOATS = (*_FLOATS, torch.float64)
_STRIDED = torch.strided
_AUTOCAST = ("cuda", "cpu", "xpu")  # known to have it: asking takes as long as a check of all tensors
MAX_ROWS = 2**31 - 1  # rows are counted in 32 bits by the kernels, and so are the programs of a launch


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
        _check_tensor(name, x, 4, "(B, N, H, D)")
    _check_alike("q", q, k=k, v=v)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {_shape(k)} and {_shape(v)}")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q and k must agree in batch, heads and head size, got {_shape(q)} and {_shape(k)}")
    _check_attention(q.shape, k.shape[1], scale, dropout_p, return_lse)
    _check_head_norms(q, q_norm, k_norm, norm_type)
    q, k, v = _autocast(q, k, v)
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
    _check_kernel_dtype("q", q)
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
    _check_tensor("qkv", qkv, 5, "(B, N, 3, H, D)")
    if qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, H, D), got {_shape(qkv)}")
    _check_attention((*qkv.shape[:2], *qkv.shape[3:]), qkv.shape[1], scale, dropout_p, return_lse)
    _check_head_norms(qkv, q_norm, k_norm, norm_type)
    (qkv,) = _autocast(qkv)
    if resolve_backend(backend, "attention", qkv) == "torch":
        norms = dict(q_norm=q_norm, k_norm=k_norm, norm_type=norm_type)
        return reference.attention_packed(qkv, **norms, scale=scale, dropout_p=dropout_p, return_lse=return_lse)
    _check_kernel_dtype("qkv", qkv)
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
    _check_tensor("x", x)
    _check_linear("x", x.shape[-1:], "weight", weight, "bias", bias)
    _check_norm("norm", norm, x.shape[-1], x)
    _check_residual(residual, (*x.shape[:-1], weight.shape[0]))
    _check_branch(x, "weight", weight, residual, layer_scale, drop_path_p)
    _check_dropout("dropout_p", dropout_p)
    _check_alike("x", x, weight=weight, bias=bias, residual=residual, layer_scale=layer_scale)
    _check_rows(x)
    weight, bias = _autocast(weight, bias, device=x.device)
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
    _check_kernel_dtype("x", x)
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
    _check_tensor("x", x)
    _check_linear("x", x.shape[-1:], "w1", w1, "b1", b1)
    check_choice("activation", activation, ACTIVATIONS)
    _check_linear("w1", _hidden("w1", w1, activation), "w2", w2, "b2", b2)
    _check_norm("norm", norm, x.shape[-1], x)
    _check_residual(residual, (*x.shape[:-1], w2.shape[0]))
    _check_branch(x, "w2", w2, residual, layer_scale, drop_path_p)
    _check_dropout("hidden_dropout_p", hidden_dropout_p)
    _check_dropout("dropout_p", dropout_p)
    _check_alike("x", x, w1=w1, b1=b1, w2=w2, b2=b2, residual=residual, layer_scale=layer_scale)
    _check_rows(x)
    w1, b1, w2, b2 = _autocast(w1, b1, w2, b2, device=x.device)
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
    _check_kernel_dtype("x", x)
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
    check_flag("first_token", first_token)
    if not isinstance(blocks, Sequence) or isinstance(blocks, (str, bytes, Block)):
        raise TypeError(f"blocks must be a sequence of Block, got {kind(blocks)}")
    if first_token and not blocks:
        raise ValueError("first_token needs a block, got none")
    for i, block in enumerate(blocks):
        if not isinstance(block, Block):
            raise TypeError(f"blocks[{i}] must be a Block, got {kind(block)}")
    parts = [part for block in blocks for field in block for part in (field if isinstance(field, tuple) else (field,))]
    form = _form(x, *parts, heads, scale, activation)
    if form is None or form not in _encoders:
        _check_encoder(x, blocks, heads, scale, activation)
        _remember_encoder(form)
    tensors = [x, *(part for part in parts if isinstance(part, Tensor))]
    apart = any(block.norm1 is None or block.norm2 is None for block in blocks) or _differentiating(*tensors)
    apart = apart or torch.compiler.is_compiling() or autocasting(x.device.type)
    # PyTorch resolves a lazy negation in a tensor, but not in a list of optional ones, which the operator takes
    if apart or any(map(Tensor.is_neg, tensors)):
        functions = tuple(functools.partial(op, backend=backend) for op in (linear, attention, mlp))
        return reference.encoder_of(functions, x, blocks, heads, scale, activation, first_token)
    if resolve_backend(backend, "encoder", x, x.shape[-1]) == "torch":
        return reference.encoder(x, blocks, heads=heads, scale=scale, activation=activation, first_token=first_token)
    _check_kernel_dtype("x", x)
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
    _check_tensor("x", x)
    _check_norm("the norm", (weight, bias, eps), x.shape[-1], x)
    _check_residual(residual, tuple(x.shape))
    _check_alike("x", x, residual=residual)
    _check_rows(x)
    x, weight, bias, residual = _autocast(x, weight, bias, residual, dtype=torch.float32)
    if resolve_backend(backend, "layer_norm", x, x.shape[-1]) == "torch":
        return reference.layer_norm(x, weight, bias, eps=eps, residual=residual)
    _check_kernel_dtype("x", x)
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
    _check_tensor("image", image, 4, "(B, C, H, W)", also=(torch.uint8,))
    check_choice("patch_order", patch_order, PATCH_ORDERS)
    p1, p2 = _patch_sides(patch_size)
    batch, channels, height, width = image.shape
    if height % p1 or width % p2 or height == 0 or width == 0:
        sides = f"{given(p1)} x {given(p2)}"
        raise ValueError(f"image of {height} x {width} does not divide into patches of {sides}")
    _check_tensor("weight", weight, 2, "(dim, C * p1 * p2)")
    if weight.shape[1] != channels * p1 * p2:
        raise ValueError(
            f"image with {channels} channels and patches of {p1} x {p2} needs a weight of {channels * p1 * p2} columns"
            f", got {_shape(weight)}"
        )
    _check_linear("image", weight.shape[1:], "weight", weight, "bias", bias)
    dim = weight.shape[0]
    patches = (height // p1) * (width // p2)
    _check_norm("pre_norm", pre_norm, weight.shape[1], weight)
    _check_norm("post_norm", post_norm, dim, weight)
    for name, rows in (("pos", pos), ("prefix", prefix)):
        if rows is not None:
            _check_tensor(name, rows, 2, "(rows, dim)")
            if rows.shape[1] != dim:
                raise ValueError(f"{name} must have {dim} columns as weight has rows, got {_shape(rows)}")
    if pos is not None and pos.shape[0] < patches:
        raise ValueError(f"image has {patches} patches, more than the {pos.shape[0]} positions in pos")
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together: got only one of them")
    if image.dtype == torch.uint8 and mean is None:
        raise TypeError("image is uint8: give mean and std (on the 0..1 scale), or convert it to floating point")
    if image.dtype != torch.uint8 and mean is not None:
        raise TypeError(f"mean and std normalise a uint8 image, got {image.dtype}: normalise it before")
    image_mean = image_std = None
    if image.dtype == torch.uint8:
        image_mean, image_std = _channel_values("mean", mean, image), _channel_values("std", std, image)
        _check_alike("weight", weight, bias=bias, pos=pos, prefix=prefix)
        if weight.device != image.device:
            raise ValueError(f"image and weight must be on one device, got {image.device} and {weight.device}")
    else:
        _check_alike("image", image, weight=weight, bias=bias, pos=pos, prefix=prefix)
    if _too_many(batch * patches):
        raise ValueError(f"image has {batch * patches} patches in all, more than {MAX_ROWS}")
    weight, bias = _autocast(weight, bias, device=image.device)
    if pos is not None:
        pos = pos[:patches]
    widest = max(_width(pre_norm, weight), 0 if post_norm is None else dim)
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
    _check_kernel_dtype("weight", weight)
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


def autocasting(device_type: str) -> bool:
    """Whether autocast is on, on a device that need not have it."""
    available = device_type in _AUTOCAST or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def _autocast(
    *tensors: Tensor | None, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[Any, ...]:
    """The tensors in autocast's dtype (or ``dtype``) where autocast is on, else as they are."""
    device_type = (tensors[0].device if device is None else device).type  # type: ignore[union-attr]
    if not autocasting(device_type):
        return tensors
    dtype = dtype or torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x is not None and x.dtype in _FLOATS else x for x in tensors)


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


def _patch_sides(patch_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = patch_size if isinstance(patch_size, (tuple, list)) else (patch_size, patch_size)
    if not all(_is_integer(side) for side in sides):
        raise TypeError(f"patch_size must be an int or two of them, got {given(patch_size)}")
    if len(sides) != 2:
        raise ValueError(f"patch_size must be an int or two of them, got {given(patch_size)}")
    if sides[0] < 1 or sides[1] < 1:
        raise ValueError(f"patch_size must be positive, got {given(patch_size)}")
    return sides[0], sides[1]


def _is_integer(value: Any) -> bool:
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def _channel_values(name: str, values: Tensor | Sequence[float] | None, image: Tensor) -> Tensor:
    if isinstance(values, Tensor):
        _check_tensor(name, values, 1, "(C,)", also=(torch.uint8, torch.int32, torch.int64))
        if values.is_meta and not image.is_meta:
            raise ValueError(f"image and {name} must be on one device, got {image.device} and {values.device}")
    else:
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            raise TypeError(f"{name} must be a tensor or a sequence of numbers, one a channel, got {given(values)}")
        values = tuple(values)
        for i, value in enumerate(values):
            _check_number(f"{name}[{i}]", value)
        if name == "std" and not all(values):
            raise ValueError(f"std divides and must not be 0, got {values}")
        traced = torch.compiler.is_compiling() or torch._guards.detect_fake_mode(image) is not None
        # a fake tensor is of no use to a later call
        values = (_constant.__wrapped__ if traced else _constant)(values, image.device)
    if values.shape != image.shape[1:2]:
        raise ValueError(f"{name} must have one value for each of the {image.shape[1]} channels, got {_shape(values)}")
    return values.to(image.device, torch.promote_types(values.dtype, torch.float32))


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied to the device once: a copy in every forward would wait for the GPU."""
    return torch.tensor(values, dtype=torch.float32, device=device)


# --- checking ----------------------------------------------------------------------------------------------

_encoders: dict[tuple, None] = {}  # forms that have passed: of a small encoder it takes as long as to compute it


def _form(*arguments: Any) -> tuple | None:
    """All that the checks of ``arguments`` look at; None where there is no remembering it."""
    if torch.compiler.is_compiling() or is_portable():  # sizes may be symbols or tensors
        return None
    try:
        # the types too: 2, 2.0 and np.int64(2) are equal
        form = tuple(
            (x.shape, x.dtype, x.device, x.layout)
            if isinstance(x, Tensor)
            else x
            if x is None or type(x) is float
            else (type(x), x)
            for x in arguments
        )
        hash(form)
    except (TypeError, RuntimeError):  # a wrong argument, sizes that are symbols, or a nested tensor
        return None
    return form


def _remember_encoder(form: tuple | None) -> None:
    if form is None:
        return
    if len(_encoders) >= 1024:  # sizes vary without end: the oldest goes
        _encoders.pop(next(iter(_encoders)), None)
    _encoders[form] = None


def _check_encoder(x: Any, blocks: Sequence[Block], heads: int, scale: float | None, activation: str) -> None:
    _check_tensor("x", x, 3, "(B, N, D)")
    _check_rows(x)
    if not _is_integer(heads):
        raise TypeError(f"heads must be a positive integer, got {given(heads)}")
    if heads < 1:
        raise ValueError(f"heads must be a positive integer, got {given(heads)}")
    check_choice("activation", activation, ACTIVATIONS)
    dim = x.shape[2:]
    for i, block in enumerate(blocks):
        at = f"blocks[{i}]."
        _check_norm(at + "norm1", block.norm1, dim[0], x)
        _check_norm(at + "norm2", block.norm2, dim[0], x)
        _check_linear("x", dim, at + "qkv_weight", block.qkv_weight, at + "qkv_bias", block.qkv_bias)
        inner = block.qkv_weight.shape[0] // 3  # no divmod: in torch.jit.trace sizes are tensors
        if block.qkv_weight.shape[0] % 3 or inner % heads:
            raise ValueError(
                f"{at}qkv_weight must have 3 * heads * head size rows for {given(heads)} heads, "
                f"got {_shape(block.qkv_weight)}"
            )
        if block.qkv_weight.shape[0] != blocks[0].qkv_weight.shape[0]:
            raise ValueError(f"{at}qkv_weight must have the shape of the first block's, got {_shape(block.qkv_weight)}")
        features = torch.Size([inner])
        _check_linear("the heads", features, at + "out_weight", block.out_weight, at + "out_bias", block.out_bias)
        _check_linear("x", dim, at + "w1", block.w1, at + "b1", block.b1)
        hidden = _hidden(at + "w1", block.w1, activation)
        _check_linear(at + "w1", hidden, at + "w2", block.w2, at + "b2", block.b2)
        for name, weight in (("out_weight", block.out_weight), ("w2", block.w2)):
            if weight.shape[:1] != dim:
                raise ValueError(f"{at}{name} must have {dim[0]} rows as x has columns, got {_shape(weight)}")
        for name, vector in (("layer_scale1", block.layer_scale1), ("layer_scale2", block.layer_scale2)):
            if vector is not None:
                _check_vector(at + name, vector, at + "w2", block.w2)
        names = [name for name in Block._fields if not name.startswith("norm")]
        _check_alike("x", x, **{at + name: getattr(block, name) for name in names})
        _check_attention((*x.shape[:2], heads, inner // heads), x.shape[1], scale, 0.0, False)


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _check_tensor(
    name: str, x: Any, ndim: int | None = None, layout: str = "(..., D)", *, also: tuple[torch.dtype, ...] = ()
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {kind(x)}")
    if x.layout is not _STRIDED or x.is_nested:
        check_dense(name, x)
    if x.dtype not in _REFERENCE_FLOATS and x.dtype not in also:
        supported = " or ".join(str(dtype).removeprefix("torch.") for dtype in (torch.float64, *also))
        raise TypeError(f"{name} must be float32, float16, bfloat16 or {supported}, got {x.dtype}")
    if x.ndim != ndim if ndim is not None else x.ndim < 1:
        raise ValueError(f"{name} must be {layout}, got shape {_shape(x)}")


def _check_alike(first: str, x: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is None:
            continue
        if other.device != x.device:
            raise ValueError(f"{first} and {name} must be on one device, got {x.device} and {other.device}")
        if other.dtype != x.dtype and (torch.float64 in (x.dtype, other.dtype) or not autocasting(x.device.type)):
            raise TypeError(f"{first} and {name} must have one dtype, got {x.dtype} and {other.dtype}")


def _check_kernel_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(
            f'{name} is {x.dtype}: backend "triton" takes float32, float16 and bfloat16; use backend="torch"'
        )


def _check_attention(q_shape: Sequence[int], n_k: int, scale: float | None, dropout_p: float, return_lse: bool) -> None:
    batch, n_q, heads, head_dim = q_shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"the head size must be 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if n_k < 1:
        raise ValueError("k and v must have at least one row, got 0")
    if _too_many(batch * heads * max(n_q, n_k)):
        raise ValueError(f"batch * heads * rows must be at most {MAX_ROWS}, got {batch * heads * max(n_q, n_k)}")
    if scale is not None:
        _check_number("scale", scale)
    _check_dropout("dropout_p", dropout_p)
    check_flag("return_lse", return_lse)


def _check_head_norms(q: Tensor, q_norm: Norm | None, k_norm: Norm | None, norm_type: str) -> None:
    check_choice("norm_type", norm_type, NORM_TYPES)
    _check_norm("q_norm", q_norm, q.shape[-1], q)
    _check_norm("k_norm", k_norm, q.shape[-1], q)


def _hidden(name: str, w1: Tensor, activation: str) -> torch.Size:
    """How wide the activation's result is."""
    if activation != "swiglu":
        return w1.shape[:1]
    if w1.shape[0] % 2:
        raise ValueError(f"{name} must have 2 * hidden rows, gate and value, for 'swiglu', got {_shape(w1)}")
    return torch.Size([w1.shape[0] // 2])


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, (float, torch.SymFloat, torch.SymInt)):
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {given(value)}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} must be within the range of a float, got a larger number") from None


def _check_dropout(name: str, p: float) -> None:
    _check_number(name, p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {p}")


def _check_linear(
    x_name: str, features: torch.Size, weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None
) -> None:
    _check_tensor(weight_name, weight, 2, "(out features, in features)")
    if weight.shape[1:] != features:
        raise ValueError(f"{weight_name} must have {features[0]} columns to follow {x_name}, got {_shape(weight)}")
    if 0 in weight.shape:
        raise ValueError(f"{weight_name} must have at least one row and column, got {_shape(weight)}")
    if bias is not None:
        _check_vector(bias_name, bias, weight_name, weight)


def _check_norm(name: str, norm: Norm | None, size: int, beside: Tensor) -> None:
    """``beside``: the tensor whose device the norm shares."""
    if norm is None:
        return
    if not isinstance(norm, tuple) or len(norm) != 3:
        came = f"a tuple of {len(norm)}" if isinstance(norm, tuple) else type(norm).__name__
        raise TypeError(f"{name} must be a tuple (weight, bias, eps), got {came}")
    weight, bias, eps = norm
    for part, x in (("weight", weight), ("bias", bias)):
        if x is not None:
            if not isinstance(x, Tensor) or x.dtype not in _FLOATS or x.layout is not _STRIDED or x.is_nested:
                _check_tensor(f"{part} of {name}", x)
                if x.dtype != beside.dtype:
                    raise TypeError(f"{part} of {name} must not be float64 beside {beside.dtype}")
            if x.shape != (size,):
                raise ValueError(f"{part} of {name} must be ({size},), got {_shape(x)}")
            if x.device != beside.device:
                raise ValueError(f"{part} of {name} must be on {beside.device}, got {x.device}")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"weight and bias of {name} must have one dtype, got {weight.dtype} and {bias.dtype}")
    if size < 1:
        raise ValueError(f"{name} normalises over the last dimension, which must not be empty")
    _check_number(f"eps of {name}", eps)
    if not eps >= 0:
        raise ValueError(f"eps of {name} must not be negative, got {eps}")


def _check_residual(residual: Tensor | None, shape: tuple[int, ...]) -> None:
    if residual is not None:
        _check_tensor("residual", residual)
        if tuple(residual.shape) != shape:
            raise ValueError(f"residual must be {shape} as the result, got {_shape(residual)}")


def _check_branch(
    x: Tensor, name: str, weight: Tensor, residual: Tensor | None, layer_scale: Tensor | None, drop_path_p: float
) -> None:
    if layer_scale is not None:
        _check_vector("layer_scale", layer_scale, name, weight)
    _check_dropout("drop_path_p", drop_path_p)
    if residual is None and (layer_scale is not None or drop_path_p > 0):
        given = "drop_path_p" if layer_scale is None else "layer_scale"
        raise ValueError(f"{given} is of a branch beside a residual: give residual, or leave it out")
    if drop_path_p > 0 and x.ndim < 2:
        raise ValueError(f"drop_path_p needs an x of samples, (B, ..., D), got {_shape(x)}")


def _check_vector(name: str, x: Tensor, weight_name: str, weight: Tensor) -> None:
    _check_tensor(name, x)
    if x.shape != weight.shape[:1]:
        raise ValueError(f"{name} must be ({weight.shape[0]},) as {weight_name} has rows, got {_shape(x)}")


def _too_many(rows: int) -> bool:
    """Whether the kernels cannot count so many; of a symbol that is not compared where PyTorch's operators run."""
    return not (torch.compiler.is_compiling() and is_portable()) and rows > MAX_ROWS


def _check_rows(x: Tensor) -> None:
    if _too_many(math.prod(x.shape[:-1])):
        raise ValueError(f"x must have at most {MAX_ROWS} rows, got {math.prod(x.shape[:-1])}")
