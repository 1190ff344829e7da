"""The MLP and the linear layer of a transformer block, with the norm before and the residual branch after them.

    h = x W1^T + b1        y = s * gamma * D_y * (D_h * act(h) W2^T + b2) + residual          x may be LayerNorm(x0)

D is a dropout mask divided by (1 - p), gamma is LayerScale, and s is the stochastic depth factor per sample. The GEMMs
are those of :mod:`.forward` and :mod:`.backward`, with activation, dropout and residual as epilogues. The backward pass
saves x0, the statistics of its norm, and the pre-activation h; the norm is recomputed, and act(h) together with
act'(h), so act(h) is materialized only between two GEMMs. Gradients, with dz = s * gamma * D_y * dy:

    dW2 = dz^T (D_h * act(h))     dh = (dz W2) * D_h * act'(h)     dW1 = dh^T x     dx = dh W1

With the activation "swiglu", h is twice as wide and D_h * act(h) is a separate pass (:mod:`.swiglu`).
"""

import torch
from torch import Tensor

from vit_triton.arguments import NO_BRANCH, NO_DROPOUT, Branch, Dropout, Norm, Rotation, SavedNorm
from vit_triton.kernels.launch import maybe_contiguous
from vit_triton.kernels.linear.backward import dropout_bwd, linear_bwd_input, linear_bwd_weight
from vit_triton.kernels.linear.forward import linear_fwd
from vit_triton.kernels.linear.swiglu import swiglu_bwd, swiglu_fwd
from vit_triton.kernels.norm.layer_norm import layer_norm_apply, layer_norm_bwd, layer_norm_fwd


def norm_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    *,
    branch: Branch = NO_BRANCH,
    dropout: Dropout = NO_DROPOUT,
    rotation: Rotation | None = None,
    panels: Tensor | None = None,
    save: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """s * gamma * dropout(norm(x) @ weight.T + bias) + residual -> y (M, N), and with ``save`` mean and rstd (M,) of
    the norm. ``rotation``: see :func:`.linear_fwd`. ``panels``: the weight packed by `pack_weight`."""
    x, mean, rstd = _norm(x, norm, weight.dtype, save)
    y, _ = linear_fwd(
        x, weight, bias, residual, branch=branch, dropout=dropout, rotation=rotation, panels=panels
    )  # fmt: skip
    return y, mean, rstd


def norm_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: SavedNorm | None,
    *,
    dsum: Tensor | None,
    branch: Branch,
    dropout: Dropout,
    with_bias: bool,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dbias, dnorm_weight, dnorm_bias, dlayer_scale; None for gradients that are not needed. ``dsum``: the
    gradient of another use of x, as a residual, which is added to dx. ``bias`` is read only with LayerScale, whose
    gradient is computed together with dweight."""
    dy = maybe_contiguous(dy)
    dropped = dropout_bwd(dy, weight.dtype, dropout)
    dweight = dbias = dlayer_scale = None
    if needs_weight:
        normed = _recompute_norm(x, norm, weight.dtype)
        dweight, dbias, dlayer_scale = linear_bwd_weight(
            dropped, normed, weight, bias, branch=branch, with_bias=with_bias
        )
        del normed
    if not needs_x:
        return None, dweight, dbias, None, None, dlayer_scale
    dx, _ = linear_bwd_input(dropped, weight, branch=branch)
    del dropped
    dx, dnorm_weight, dnorm_bias = _norm_bwd(dx, x, norm, dsum)
    return dx, dweight, dbias, dnorm_weight, dnorm_bias, dlayer_scale


def mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    *,
    activation: str,
    hidden_dropout: Dropout = NO_DROPOUT,
    branch: Branch = NO_BRANCH,
    dropout: Dropout = NO_DROPOUT,
    panels: tuple[Tensor | None, Tensor | None] = (None, None),
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y (M, K), and with ``save`` the pre-activation h (M, N), mean and rstd (M,) of the norm. ``panels``: both weights
    packed by `pack_weight`."""
    x, mean, rstd = _norm(x, norm, w1.dtype, save)
    pre: Tensor | None
    if activation == "swiglu":
        pre, _ = linear_fwd(x, w1, b1, panels=panels[0])
        hidden = swiglu_fwd(pre, hidden_dropout)
        pre = pre if save else None
    else:
        hidden, pre = linear_fwd(
            x, w1, b1, dropout=hidden_dropout, activation=activation, save_pre=save, panels=panels[0]
        )
    del x  # frees the normalised input before y is allocated
    y, _ = linear_fwd(hidden, w2, b2, residual, branch=branch, dropout=dropout, panels=panels[1])
    return y, pre, mean, rstd


def mlp_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    norm: SavedNorm | None,
    pre: Tensor,
    *,
    activation: str,
    hidden_dropout: Dropout,
    branch: Branch,
    dropout: Dropout,
    residual_is_x: bool,
    with_b1: bool,
    with_b2: bool,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, ...]:
    """dx, dw1, db1, dw2, db2, dnorm_weight, dnorm_bias, dlayer_scale; None for gradients that are not needed. ``b2`` is
    used as ``bias`` in :func:`norm_linear_bwd`."""
    dy = maybe_contiguous(dy)
    dw1 = db1 = dw2 = db2 = dlayer_scale = None
    dropped = dropout_bwd(dy, w2.dtype, dropout)
    if activation == "swiglu":
        dh, _ = linear_bwd_input(dropped, w2, branch=branch)
        dh, hidden = swiglu_bwd(dh, pre, hidden_dropout, with_hidden=needs_weights)
    else:
        dh, hidden = linear_bwd_input(
            *(dropped, w2, pre), branch=branch, dropout=hidden_dropout, activation=activation, with_hidden=needs_weights
        )
    if hidden is not None:
        dw2, db2, dlayer_scale = linear_bwd_weight(dropped, hidden, w2, b2, branch=branch, with_bias=with_b2)
        del hidden, dropped
        normed = _recompute_norm(x, norm, w1.dtype)
        dw1, db1, _ = linear_bwd_weight(dh, normed, w1, with_bias=with_b1)
        del normed
    if not needs_x:
        return None, dw1, db1, dw2, db2, None, None, dlayer_scale
    dx, _ = linear_bwd_input(dh, w1)
    dx, dnorm_weight, dnorm_bias = _norm_bwd(dx, x, norm, dy if residual_is_x else None)
    return dx, dw1, db1, dw2, db2, dnorm_weight, dnorm_bias, dlayer_scale


def _norm(x: Tensor, norm: Norm | None, dtype: torch.dtype, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if norm is None:
        return x, None, None
    weight, bias, eps = norm
    return layer_norm_fwd(x, weight, bias, eps=eps, out_dtype=dtype, save=save)


def _recompute_norm(x: Tensor, norm: SavedNorm | None, dtype: torch.dtype) -> Tensor:
    if norm is None:
        return x
    return layer_norm_apply(x, norm.mean, norm.rstd, norm.weight, norm.bias, out_dtype=dtype)


def _norm_bwd(
    dx: Tensor, x: Tensor, norm: SavedNorm | None, dresidual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if norm is not None:
        return layer_norm_bwd(dx, x, norm.weight, norm.mean, norm.rstd, dsum=dresidual)
    return (dx if dresidual is None else dx + dresidual).to(x.dtype), None, None
