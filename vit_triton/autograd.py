"""One ``torch.autograd.Function`` per operator.

Second derivatives and forward mode (jvp) are not supported and raise an error. Tensors are saved with
``save_for_backward``, so that saved-tensor hooks and checkpointing apply to them; scalars are stored on ``ctx``.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from vit_triton import ops

OPS = {name: getattr(torch.ops.vit_triton, name).default for name in ops.NAMES}


def _select(grads: tuple[Tensor | None, ...], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    # a list comprehension takes half the time of a generator
    return tuple([grad if want else None for grad, want in zip(grads, wanted, strict=True)])


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a second derivative raise an error.

    PyTorch's ``once_differentiable`` raises only if an incoming gradient requires a gradient; otherwise a gradient
    penalty would silently have no effect. Here saved tensors that require a gradient also raise.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        name = type(ctx).__name__.removesuffix("FunctionBackward")
        return _NotTwiceDifferentiable.apply(name, len(results), *results, *grads, *ctx.saved_tensors)

    return once


class _NotTwiceDifferentiable(Function):
    """Return the first ``n`` of ``tensors``; raise an error if a gradient flows back through them."""

    @staticmethod
    def forward(ctx: Any, name: str, n: int, *tensors):
        ctx.name = name
        return tensors[:n]

    @staticmethod
    def backward(ctx: Any, *grads):
        raise RuntimeError(
            f"the kernels have no second derivative, but the gradient of {ctx.name} was differentiated again; the "
            'kernels run with backend "triton" and where "auto" selects it: use backend="torch"'
        )


class AttentionFunction(Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, seed, scale: float, dropout_p: float):
        out, lse = OPS["attention_fwd"](q, k, v, seed, scale, dropout_p)
        ctx.save_for_backward(q, k, v, out, lse, seed)
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(lse)  # lse does not depend on v
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return out, lse

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, do, dlse):
        q, k, v, out, lse, seed = ctx.saved_tensors
        do = out.new_zeros(()).expand_as(out) if do is None else do
        grads = OPS["attention_bwd"](do, q, k, v, out, lse, dlse, seed, ctx.scale, ctx.dropout_p)
        return *_select(grads, ctx.needs_input_grad[:3]), None, None, None


class AttentionPackedFunction(Function):
    @staticmethod
    def forward(ctx: Any, qkv, seed, scale: float, dropout_p: float):
        out, lse = OPS["attention_packed_fwd"](qkv, seed, scale, dropout_p)
        ctx.save_for_backward(qkv, out, lse, seed)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return out, lse

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, do, dlse):
        qkv, out, lse, seed = ctx.saved_tensors
        do = out.new_zeros(()).expand_as(out) if do is None else do
        return OPS["attention_packed_bwd"](do, qkv, out, lse, dlse, seed, ctx.scale, ctx.dropout_p), None, None, None


class NormedAttentionFunction(Function):
    """Attention with optional norms of q and k, bias and masks; q and k are saved before the norm.

    If k and v are None, q is the packed projection, and its gradient is packed.
    """

    @staticmethod
    def forward(
        ctx: Any, q, k, v, q_weight, q_bias, k_weight, k_bias, bias, rel_h, rel_w, seed, key_lengths, *scalars: Any
    ):
        others = q_weight, q_bias, k_weight, k_bias, bias, rel_h, rel_w, seed, key_lengths
        out, lse, statistics = OPS["normed_attention_fwd"](q, k, v, *others, *scalars)
        floating = rel_h is not None or bias is not None and bias.is_floating_point()
        ctx.save_for_backward(q, k, v, out, statistics if floating else lse, *others)
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2] + ctx.needs_input_grad[3:10]):
            ctx.mark_non_differentiable(lse)
        ctx.scalars = scalars
        return out, lse

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, do, dlse):
        q, k, v, out, *rest = ctx.saved_tensors
        do = out.new_zeros(()).expand_as(out) if do is None else do
        needs_bias = any(ctx.needs_input_grad[7:10])
        grads = OPS["normed_attention_bwd"](do, dlse, q, k, v, out, *rest, *ctx.scalars, needs_bias)
        return *_select(grads, ctx.needs_input_grad[:10]), *(None,) * (2 + len(ctx.scalars))


class AttentionVarlenFunction(Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, cu_q, cu_k, seed, *scalars: Any):
        out, lse = OPS["attention_varlen_fwd"](q, k, v, cu_q, cu_k, seed, *scalars)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, seed)
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(lse)
        ctx.scalars = scalars
        return out, lse

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, do, dlse):
        q, k, v, out, lse, *rest = ctx.saved_tensors
        do = out.new_zeros(()).expand_as(out) if do is None else do
        grads = OPS["attention_varlen_bwd"](do, q, k, v, out, lse, dlse, *rest, *ctx.scalars)
        return *_select(grads, ctx.needs_input_grad[:3]), *(None,) * (3 + len(ctx.scalars))


class RotaryFunction(Function):
    """Norms and rotation of q and k. If k is None, q is the packed projection, and so are the result and its gradient.

    Saves the tables, and with norms q and k.
    """

    @staticmethod
    def forward(ctx: Any, q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, *scalars: Any):
        norms = q_weight, q_bias, k_weight, k_bias
        q_out, k_out = OPS["rotary_fwd"](q, k, cos, sin, *norms, *scalars)
        normed = scalars[0] is not None or scalars[1] is not None
        ctx.save_for_backward(*((q, k) if normed else (None, None)), cos, sin, *norms)
        ctx.scalars, ctx.packed = scalars, k is None
        return q_out if k is None else (q_out, k_out)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dq_out, dk_out=None):
        dq, dk, *norms = OPS["rotary_bwd"](dq_out, dk_out, *ctx.saved_tensors, *ctx.scalars)
        grads = _select((dq, None if ctx.packed else dk, *norms), ctx.needs_input_grad[:6])
        return *grads, *(None,) * (2 + len(ctx.scalars))


class LinearFunction(Function):
    """x (..., K), residual (..., N).

    ``residual_is_x`` replaces passing x twice, which Dynamo cannot trace; the norm's backward kernel then adds both
    gradients of x. With ``returns_x``, the result is (y, x), and the kernel adds the gradient of this x. The bias is
    saved for the gradient of layer_scale.
    """

    @staticmethod
    def forward(
        ctx: Any, x, weight, bias, norm_weight, norm_bias, residual, layer_scale, samples, seed,
        eps, dropout_p: float, residual_is_x: bool, returns_x: bool, fastest: bool,
    ):  # fmt: skip
        y, mean, rstd = OPS["linear_fwd"](
            x, weight, bias, norm_weight, norm_bias, x if residual_is_x else residual, layer_scale, samples, seed,
            eps, dropout_p, True, fastest,
        )  # fmt: skip
        if eps is None:
            mean = rstd = None
        bias = None if layer_scale is None else bias
        ctx.save_for_backward(x, weight, norm_weight, norm_bias, mean, rstd, seed, layer_scale, samples, bias)
        ctx.dropout_p, ctx.residual_is_x, ctx.fastest = dropout_p, residual_is_x, fastest
        return (y, x) if returns_x else y

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy, dsum=None):
        (
            needs_x, needs_weight, needs_bias, needs_norm_weight, needs_norm_bias, needs_residual, needs_layer_scale, *_
        ) = ctx.needs_input_grad  # fmt: skip
        saved = ctx.saved_tensors  # once: checkpointing unpacks them
        *_, bias = saved
        *grads, dlayer_scale = OPS["linear_bwd"](
            dy,
            *saved,
            dy if ctx.residual_is_x else dsum,
            ctx.dropout_p,
            needs_bias or bias is not None,
            needs_x or needs_norm_weight or needs_norm_bias,
            needs_weight or needs_bias or needs_layer_scale,
            ctx.fastest,
        )
        wanted = (needs_x, needs_weight, needs_bias, needs_norm_weight, needs_norm_bias)
        residual = dy if needs_residual else None, dlayer_scale if needs_layer_scale else None
        return *_select(tuple(grads), wanted), *residual, *(None,) * 7


class LinearRopeFunction(Function):
    """A packed projection of x, (B, N, K), with rotated q and k. Saves x, the statistics of the norm and the tables."""

    @staticmethod
    def forward(
        ctx: Any, x, weight, bias, norm_weight, norm_bias, cos, sin,
        eps, heads: int, prefix: int, interleaved: bool, fastest: bool,
    ):  # fmt: skip
        y, mean, rstd = OPS["linear_rope_fwd"](
            x, weight, bias, norm_weight, norm_bias, cos, sin, eps, heads, prefix, interleaved, True, fastest
        )
        if eps is None:
            mean = rstd = None
        ctx.save_for_backward(cos, sin, x, weight, norm_weight, norm_bias, mean, rstd)
        ctx.heads, ctx.scalars, ctx.fastest = heads, (None, None, False, prefix, interleaved), fastest
        return y

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy):
        needs_x, needs_weight, needs_bias, *needs_norm = ctx.needs_input_grad[:5]
        cos, sin, *saved = ctx.saved_tensors
        dqkv = dy.unflatten(-1, (3, ctx.heads, -1))
        dqkv, *_ = OPS["rotary_bwd"](dqkv, None, None, None, cos, sin, *(None,) * 4, *ctx.scalars)
        wanted = needs_x or any(needs_norm), needs_weight or needs_bias
        scalars = 0.0, needs_bias, *wanted, ctx.fastest
        *grads, _ = OPS["linear_bwd"](dqkv.flatten(2), *saved, *(None,) * 5, *scalars)
        return *_select(tuple(grads), ctx.needs_input_grad[:5]), *(None,) * 7


class MlpFunction(Function):
    """x (..., K), residual (..., L); ``residual_is_x`` and the bias as in :class:`LinearFunction`.

    Saves x, the pre-activation and the statistics of the norm.
    """

    @staticmethod
    def forward(
        ctx: Any, x, w1, b1, w2, b2, norm_weight, norm_bias, residual, layer_scale, samples, hidden_seed, seed,
        eps, activation: str, hidden_dropout_p: float, dropout_p: float, residual_is_x: bool, fastest: bool,
    ):  # fmt: skip
        y, pre, mean, rstd = OPS["mlp_fwd"](
            x, w1, b1, w2, b2, norm_weight, norm_bias, x if residual_is_x else residual, layer_scale, samples,
            hidden_seed, seed, eps, activation, hidden_dropout_p, dropout_p, True, fastest,
        )  # fmt: skip
        if eps is None:
            mean = rstd = None
        b2 = None if layer_scale is None else b2
        ctx.save_for_backward(
            x, w1, w2, norm_weight, norm_bias, pre, mean, rstd, hidden_seed, seed, layer_scale, samples, b2
        )
        ctx.scalars = activation, hidden_dropout_p, dropout_p, residual_is_x
        ctx.fastest = fastest
        return y

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy):
        (
            needs_x, needs_w1, needs_b1, needs_w2, needs_b2, needs_norm_weight, needs_norm_bias, needs_residual,
            needs_layer_scale, *_,
        ) = ctx.needs_input_grad  # fmt: skip
        saved = ctx.saved_tensors  # once: checkpointing unpacks them
        *_, b2 = saved
        *grads, dlayer_scale = OPS["mlp_bwd"](
            dy,
            *saved,
            *ctx.scalars,
            needs_b1,
            needs_b2 or b2 is not None,
            needs_x or needs_norm_weight or needs_norm_bias,
            needs_w1 or needs_b1 or needs_w2 or needs_b2 or needs_layer_scale,
            ctx.fastest,
        )
        wanted = (needs_x, needs_w1, needs_b1, needs_w2, needs_b2, needs_norm_weight, needs_norm_bias)
        residual = dy if needs_residual else None, dlayer_scale if needs_layer_scale else None
        return *_select(tuple(grads), wanted), *residual, *(None,) * 9


class BlockFunction(Function):
    """A block of :func:`.functional.encoder` as one node of the graph. Saves what the Functions of its parts save."""

    @staticmethod
    def forward(
        ctx: Any, x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, out_weight, out_bias, norm2_weight, norm2_bias,
        w1, b1, w2, b2, layer_scale1, layer_scale2,
        eps1: float, eps2: float, heads: int, scale: float, activation: str, fastest: bool,
    ):  # fmt: skip
        linear_fwd, norm1, norm2 = OPS["linear_fwd"], (norm1_weight, norm1_bias), (norm2_weight, norm2_bias)
        qkv, *statistics1 = linear_fwd(x, qkv_weight, qkv_bias, *norm1, *(None,) * 4, eps1, 0.0, True, fastest)
        qkv = qkv.unflatten(-1, (3, heads, -1))
        out, lse = OPS["attention_packed_fwd"](qkv, None, scale, 0.0)
        others: Any = None, None, x, layer_scale1, None, None, None, 0.0, True, fastest
        middle, *_ = linear_fwd(out.flatten(2), out_weight, out_bias, *others)
        others = middle, layer_scale2, None, None, None, eps2, activation, 0.0, 0.0, True, fastest
        y, pre, *statistics2 = OPS["mlp_fwd"](middle, w1, b1, w2, b2, *norm2, *others)
        out_bias, b2 = (None if layer_scale1 is None else out_bias), (None if layer_scale2 is None else b2)
        ctx.save_for_backward(
            x, qkv_weight, *norm1, *statistics1, qkv, out, lse, out_weight, layer_scale1, out_bias,
            middle, w1, w2, *norm2, pre, *statistics2, layer_scale2, b2,
        )  # fmt: skip
        ctx.scale, ctx.activation, ctx.fastest = scale, activation, fastest
        return y

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy):
        (
            x, qkv_weight, norm1_weight, norm1_bias, mean1, rstd1, qkv, out, lse, out_weight, layer_scale1, out_bias,
            middle, w1, w2, norm2_weight, norm2_bias, pre, mean2, rstd2, layer_scale2, b2,
        ) = ctx.saved_tensors  # fmt: skip
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        wanted, fastest = ctx.needs_input_grad[:15], ctx.fastest
        needs_qkv, needs_x = any(wanted[3:5]), any(wanted[:3])
        needs_out = any(wanted[5:7]) or wanted[13]
        needs_middle = needs_x or needs_qkv or needs_out
        dqkv_weight = dqkv_bias = dx = dnorm1_weight = dnorm1_bias = dout_weight = dout_bias = dlayer_scale1 = None
        dmiddle, dw1, db1, dw2, db2, dnorm2_weight, dnorm2_bias, dlayer_scale2 = OPS["mlp_bwd"](
            dy, middle, w1, w2, norm2_weight, norm2_bias, pre, mean2, rstd2, None, None, layer_scale2, None, b2,
            ctx.activation, 0.0, 0.0, True, wanted[10], wanted[12] or b2 is not None,
            needs_middle or any(wanted[7:9]), any(wanted[9:13]) or wanted[14], fastest,
        )  # fmt: skip
        del middle, pre  # frees memory for the attention
        if needs_middle:
            dout, dout_weight, dout_bias, *_, dlayer_scale1 = OPS["linear_bwd"](
                dmiddle, out.flatten(2), out_weight, *(None,) * 5, layer_scale1, None, out_bias, None, 0.0,
                wanted[6] or out_bias is not None, needs_x or needs_qkv, needs_out, fastest,
            )  # fmt: skip
        if needs_x or needs_qkv:
            dqkv = OPS["attention_packed_bwd"](dout.view(out.shape), qkv, out, lse, None, None, ctx.scale, 0.0)
            del dout, out, qkv
            dx, dqkv_weight, dqkv_bias, dnorm1_weight, dnorm1_bias, _ = OPS["linear_bwd"](
                dqkv.flatten(2), x, qkv_weight, norm1_weight, norm1_bias, mean1, rstd1, *(None,) * 4, dmiddle, 0.0,
                wanted[4], needs_x, needs_qkv, fastest,
            )  # fmt: skip
        grads = (
            dx, dnorm1_weight, dnorm1_bias, dqkv_weight, dqkv_bias, dout_weight, dout_bias, dnorm2_weight, dnorm2_bias,
            dw1, db1, dw2, db2, dlayer_scale1, dlayer_scale2,
        )  # fmt: skip
        return *_select(grads, wanted), *(None,) * 6


class LayerNormFunction(Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, eps: float):
        y, mean, rstd = OPS["layer_norm_fwd"](x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy):
        grads = OPS["layer_norm_bwd"](dy, *ctx.saved_tensors, None)
        return *_select(grads, ctx.needs_input_grad[:3]), None


class AddLayerNormFunction(Function):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, eps: float):
        y, total, mean, rstd = OPS["add_layer_norm_fwd"](x, residual, weight, bias, eps)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(total)  # total does not depend on the norm's parameters
        return y, total

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy, dtotal):
        needs_x, needs_residual, *needs_norm, _ = ctx.needs_input_grad
        if dy is None:
            return *_select((dtotal, dtotal), (needs_x, needs_residual)), None, None, None
        dx, *dnorm = OPS["layer_norm_bwd"](dy, *ctx.saved_tensors, dtotal)
        return *_select((dx, dx, *dnorm), (needs_x, needs_residual, *needs_norm)), None


class PatchEmbedFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, image, weight, bias, pos, prefix, pre_weight, pre_bias, post_weight, post_bias, mean, std,
        pre_eps, post_eps, patch_size: tuple[int, int], patch_order: str, fastest: bool,
    ):  # fmt: skip
        tokens, z, *stats = OPS["patch_embed_fwd"](
            image, weight, bias, pos, prefix, pre_weight, pre_bias, pre_eps, post_weight, post_bias, post_eps,
            mean, std, patch_size, patch_order, True, fastest,
        )  # fmt: skip
        pre_stats = stats[:2] if pre_eps is not None else (None, None)
        z, *post_stats = (z, *stats[2:]) if post_eps is not None else (None, None, None)
        ctx.save_for_backward(
            image, weight, z, *pre_stats, *post_stats, pre_weight, pre_bias, post_weight, post_bias, mean, std
        )
        ctx.scalars = pre_eps, post_eps, patch_size, patch_order, 0 if prefix is None else prefix.shape[0]
        ctx.fastest = fastest
        return tokens

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dtokens):
        image, weight, z, *stats, pre_weight, pre_bias, post_weight, post_bias, mean, std = ctx.saved_tensors
        pre_eps, post_eps, patch_size, patch_order, n_prefix = ctx.scalars
        needs = ctx.needs_input_grad
        dimage, dweight, dbias, *dnorms, dpos, dprefix = OPS["patch_embed_bwd"](
            dtokens, image, weight, z, *stats, pre_weight, pre_bias, pre_eps,
            post_weight, post_bias, post_eps, mean, std, patch_size, patch_order, n_prefix, needs[0], ctx.fastest,
        )  # fmt: skip
        grads = (dimage, dweight, dbias, dpos, dprefix, *dnorms)
        return *_select(grads, needs[:9]), *(None,) * 7


class WindowAttentionFunction(Function):
    @staticmethod
    def forward(ctx: Any, qkv, bias, logit_scale, seed, *options: Any):
        out = OPS["window_attention_fwd"](qkv, bias, logit_scale, seed, *options)
        ctx.save_for_backward(qkv, bias, logit_scale, seed)
        ctx.options = options
        return out

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, do):
        needs = ctx.needs_input_grad
        grads = OPS["window_attention_bwd"](do, *ctx.saved_tensors, *ctx.options, needs[1])
        return *_select(grads, needs[:3]), *(None,) * (1 + len(ctx.options))


class RelativePositionBiasFunction(Function):
    @staticmethod
    def forward(ctx: Any, table, window: tuple[int, int], prefix_tokens: int):
        ctx.options = window, prefix_tokens
        return OPS["relative_position_bias_fwd"](table, *ctx.options)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dbias):
        return OPS["relative_position_bias_bwd"](dbias, *ctx.options), None, None
