"""Schema, fake implementation and registration of every operator ``torch.ops.vit_triton.*``.

The operators are private: :mod:`vit_triton.functional` checks the arguments and adds autocast and gradients. Operators
do not support optional outputs, so an absent output is an empty tensor. The kernels are imported on the first call.

``Library.define`` and ``impl`` are used since ``triton_op`` fails under the interpreter and ``custom_op`` has more
overhead per call.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vit_triton import packing
from vit_triton.arguments import Block, Branch, DecomposedBias, Dropout, Norm, Rotation, SavedNorm, ScoreMask

_library = torch.library.Library("vit_triton", "DEF")
NAMES: list[str] = []  # of all operators
_PRODUCTS: dict[str, int] = {}  # operators with products -> number of arguments without the last, ``fastest``


def _register(schema: str, copies: Callable[..., list[Tensor | None]] | None = None, *, products: bool = False) -> Any:
    """Define an operator and register the decorated function for every device.

    The function may return None for a Tensor. An operator with ``products`` has a last argument ``fastest``: whether
    its products may be the vendor's, see :func:`.device.fastest_products`. The function does not receive it.

    ``copies`` gets the operator's arguments and returns their prepacked weights, see :func:`vit_triton.prepack`. On a
    CPU the function receives them as its argument ``copies``.
    """
    name = schema.split("(")[0]
    NAMES.append(name)
    if products:
        arguments, results = schema.split(") ->")
        _PRODUCTS[name] = arguments.count(",") + 1
        schema = f"{arguments}, bool fastest=False) ->{results}"
    _library.define(schema)

    def decorate(function: Any) -> Any:
        function = _with_fastest_products(function, _PRODUCTS[name]) if products else function

        def implementation(x: Tensor, *args: Any) -> Any:
            return _none_to_empty(function(x, *args), x)

        def with_copies(copies: list[Tensor | None], x: Tensor, *args: Any) -> Any:
            return _none_to_empty(function(x, *args, copies=copies), x)

        def on_cpu(*args: Any) -> Any:
            if packing.frozen:
                packing.check(args)
                if copies is not None:
                    return _on_cpu(with_copies, (copies(*args), *args))
            return _on_cpu(implementation, args)

        _library.impl(name, on_cpu, "CPU")
        _library.impl(name, lambda *args: _on_gpu(implementation, args), "CUDA")
        _library.impl(name, lambda *args: _on_gpu(implementation, args), "XPU")
        return function

    return decorate


def _with_fastest_products(function: Any, n_args: int) -> Any:
    @functools.wraps(function)
    def choose(*args: Any, **kwargs: Any) -> Any:
        if not any(args[n_args:]):
            return function(*args[:n_args], **kwargs)
        from vit_triton.kernels.device import fastest_products

        with fastest_products():
            return function(*args[:n_args], **kwargs)

    return choose


def run_on_cpu(function: Any, args: tuple[Any, ...]) -> Any:
    """Call ``function`` with an active Triton driver for CPU tensors; record its launches if it is our driver."""
    replay, use_cpu_driver, record_launches = _import_cpu()
    with use_cpu_driver() as device:
        # one block: the system clears every page of newly allocated memory
        return function(*args) if device is None else replay(function, args, device, record_launches, one_block=True)


def run_on_gpu(function: Any, args: tuple[Any, ...]) -> Any:
    """Call ``function`` under a guard of the first argument's device, and record its launches."""
    interpreting, guard, replay, record_launches, current_stream = _import_launch()
    x = args[0]
    with guard(x):
        if interpreting:
            return function(*args)
        return replay(function, args, x.device, record_launches, stream=current_stream())


def run_directly(function: Any, args: tuple[Any, ...]) -> Any:
    """Call ``function`` without recording its launches."""
    return function(*args)


_on_cpu: Callable[[Any, tuple[Any, ...]], Any] = run_on_cpu
_on_gpu: Callable[[Any, tuple[Any, ...]], Any] = run_on_gpu


@contextlib.contextmanager
def override_run(run: Callable[[Any, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Make every operator call ``run(function, args)`` inside the context, on all devices and threads; for benchmarks.

    The defaults are :func:`run_on_cpu` and :func:`run_on_gpu`.
    """
    global _on_cpu, _on_gpu
    before = _on_cpu, _on_gpu
    _on_cpu = _on_gpu = run
    try:
        yield
    finally:
        _on_cpu, _on_gpu = before


@functools.cache
def _import_launch() -> tuple[Any, ...]:
    """Import once, since an import statement in every call takes longer."""
    from vit_triton.kernels.launch import INTERPRETING, current_stream, guard, record_launches
    from vit_triton.kernels.replay import replay

    return INTERPRETING, guard, replay, record_launches, current_stream


@functools.cache
def _import_cpu() -> tuple[Any, ...]:
    from vit_triton.cpu.driver import record_launches, use_cpu_driver
    from vit_triton.kernels.replay import replay

    return replay, use_cpu_driver, record_launches


def _none_to_empty(result: Any, like: Tensor) -> Any:
    if not isinstance(result, tuple):
        return result
    return tuple(like.new_empty(0) if x is None else x for x in result)


def _fake(name: str) -> Any:
    def decorate(function: Any) -> Any:
        def fake(x: Tensor, *args: Any) -> Any:
            # reached only by a program that was captured before the export
            if torch.onnx.is_in_onnx_export():
                raise RuntimeError(
                    f"the program contains the operator vit_triton::{name}, which is not supported by ONNX: capture it "
                    "inside `with vit_triton.portable_operators():`, or export the module itself"
                )
            return _none_to_empty(function(*(x, *args)[: _PRODUCTS.get(name)]), x)

        torch.library.register_fake(f"vit_triton::{name}", fake, lib=_library)
        return function

    return decorate


def _like(x: Tensor, wanted: bool = True) -> Tensor | None:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None


def _n_rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _rows(x: Tensor) -> Tensor:
    """Reshape (..., D) to (rows, D)."""
    return x if x.ndim == 2 else x.reshape(_n_rows(x), x.shape[-1])


def _statistics(x: Tensor, wanted: bool = True) -> Tensor | None:
    return x.new_empty(_n_rows(x), dtype=torch.float32) if wanted else None


def _norm(weight: Tensor | None, bias: Tensor | None, eps: float | None) -> Norm | None:
    return None if eps is None else (weight, bias, eps)


def _saved_norm(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor | None
) -> SavedNorm | None:
    return None if mean is None or rstd is None else SavedNorm(weight, bias, mean, rstd)


# --- attention ---------------------------------------------------------------------------------------------


@_register(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? seed, float scale, float dropout_p, bool save=True) "
    "-> (Tensor, Tensor)"
)
def _attention_fwd(q, k, v, seed, scale, dropout_p, save=True):
    from vit_triton.kernels.attention.forward import attention_fwd

    return attention_fwd(q, k, v, scale=scale, dropout=Dropout(dropout_p, seed), save=save)[:2]


@_fake("attention_fwd")
def _attention_fwd_fake(q, k, v, seed, scale, dropout_p, save=True):
    batch, n_q, heads, _ = q.shape
    return _like(q), q.new_empty(batch, heads, n_q, dtype=torch.float32) if save else None


@_register(
    "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, Tensor? seed, "
    "float scale, float dropout_p) -> (Tensor, Tensor, Tensor)"
)
def _attention_bwd(do, q, k, v, out, lse, dlse, seed, scale, dropout_p):
    from vit_triton.kernels.attention.backward import attention_bwd

    return attention_bwd(do, q, k, v, out, lse, dlse, scale=scale, dropout=Dropout(dropout_p, seed))


@_fake("attention_bwd")
def _attention_bwd_fake(do, q, k, v, out, lse, dlse, seed, scale, dropout_p):
    return _like(q), _like(k), _like(v)


@_register(
    "attention_packed_fwd(Tensor qkv, Tensor? seed, float scale, float dropout_p, bool save=True) -> (Tensor, Tensor)"
)
def _attention_packed_fwd(qkv, seed, scale, dropout_p, save=True):
    from vit_triton.kernels.attention.forward import attention_fwd

    q, k, v = qkv.unbind(2)
    return attention_fwd(q, k, v, scale=scale, dropout=Dropout(dropout_p, seed), save=save)[:2]


@_fake("attention_packed_fwd")
def _attention_packed_fwd_fake(qkv, seed, scale, dropout_p, save=True):
    batch, n, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty(batch, heads, n, dtype=torch.float32) if save else None
    return qkv.new_empty(batch, n, heads, head_dim), lse


@_register(
    "attention_packed_bwd(Tensor do, Tensor qkv, Tensor out, Tensor lse, Tensor? dlse, Tensor? seed, float scale, "
    "float dropout_p) -> Tensor"
)
def _attention_packed_bwd(do, qkv, out, lse, dlse, seed, scale, dropout_p):
    from vit_triton.kernels.attention.backward import attention_packed_bwd

    return attention_packed_bwd(do, qkv, out, lse, dlse, scale=scale, dropout=Dropout(dropout_p, seed))


@_fake("attention_packed_bwd")
def _attention_packed_bwd_fake(do, qkv, out, lse, dlse, seed, scale, dropout_p):
    return _like(qkv)


# --- attention with norms of q and k, biases and masks -------------------------------------------------------


_GENERAL = (
    "Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, Tensor? bias, Tensor? rel_h, Tensor? rel_w, "
    "Tensor? seed, Tensor? key_lengths, float? q_eps, float? k_eps, bool rms, float scale, float dropout_p, str causal"
)


def _score_mask(
    bias: Tensor | None, rel_h: Tensor | None, rel_w: Tensor | None, key_lengths: Tensor | None, causal: str
) -> ScoreMask:
    rel = None if rel_h is None or rel_w is None else DecomposedBias(rel_h, rel_w)
    return ScoreMask(bias, rel, key_lengths, causal)


@_register(
    f"normed_attention_fwd(Tensor q, Tensor? k, Tensor? v, {_GENERAL}, bool save=True) -> (Tensor, Tensor, Tensor)"
)
def _normed_attention_fwd(
    q, k, v, q_weight, q_bias, k_weight, k_bias, bias, rel_h, rel_w, seed, key_lengths,
    q_eps, k_eps, rms, scale, dropout_p, causal, save=True,
):  # fmt: skip
    """If k and v are None, q is the packed projection."""
    from vit_triton.kernels.attention.qk_norm import normed_attention_fwd

    q, k, v = q.unbind(2) if k is None else (q, k, v)
    return normed_attention_fwd(
        *(q, k, v, _norm(q_weight, q_bias, q_eps), _norm(k_weight, k_bias, k_eps)),
        rms=rms,
        scale=scale,
        dropout=Dropout(dropout_p, seed),
        mask=_score_mask(bias, rel_h, rel_w, key_lengths, causal),
        save=save,
    )


@_fake("normed_attention_fwd")
def _normed_attention_fwd_fake(
    q, k, v, q_weight, q_bias, k_weight, k_bias, bias, rel_h, rel_w, seed, key_lengths,
    q_eps, k_eps, rms, scale, dropout_p, causal, save=True,
):  # fmt: skip
    if k is None:
        out, lse = _attention_packed_fwd_fake(q, seed, scale, dropout_p, save)
    else:
        out, lse = _attention_fwd_fake(q, k, v, seed, scale, dropout_p, save)
    floating = _score_mask(bias, rel_h, rel_w, key_lengths, causal).floating
    return out, lse, lse.new_empty(2, *lse.shape) if save and floating else None


@_register(
    "normed_attention_bwd(Tensor do, Tensor? dlse, Tensor q, Tensor? k, Tensor? v, Tensor out, Tensor lse, "
    f"{_GENERAL}, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _normed_attention_bwd(
    do, dlse, q, k, v, out, lse, q_weight, q_bias, k_weight, k_bias, bias, rel_h, rel_w, seed, key_lengths,
    q_eps, k_eps, rms, scale, dropout_p, causal, needs_bias,
):  # fmt: skip
    from vit_triton.kernels.attention.qk_norm import normed_attention_bwd

    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = None if k is None else _like(k), None if v is None else _like(v)
    grads: Any = (dq, dk, dv)
    if k is None:
        (q, k, v), grads = q.unbind(2), dq.unbind(2)
    others = normed_attention_bwd(
        *(do, q, k, v, _norm(q_weight, q_bias, q_eps), _norm(k_weight, k_bias, k_eps), out, lse, dlse, grads),
        rms=rms,
        scale=scale,
        dropout=Dropout(dropout_p, seed),
        mask=_score_mask(bias, rel_h, rel_w, key_lengths, causal),
        needs_bias=needs_bias,
    )
    return dq, dk, dv, *others


@_fake("normed_attention_bwd")
def _normed_attention_bwd_fake(
    do, dlse, q, k, v, out, lse, q_weight, q_bias, k_weight, k_bias, bias, rel_h, rel_w, seed, key_lengths,
    q_eps, k_eps, rms, scale, dropout_p, causal, needs_bias,
):  # fmt: skip
    grads = (None if x is None else _like(x) for x in (q, k, v))
    norms = *_norm_grads(q_weight, q_bias, q_eps is not None), *_norm_grads(k_weight, k_bias, k_eps is not None)
    floating = (x if x is not None and x.is_floating_point() and needs_bias else None for x in (bias, rel_h, rel_w))
    return *grads, *norms, *(None if x is None else _like(x) for x in floating)


# --- attention of packed sequences -------------------------------------------------------------------------


_VARLEN = "Tensor cu_q, Tensor cu_k, Tensor? seed, SymInt max_q, SymInt max_k, float scale, float dropout_p, str causal"


@_register(f"attention_varlen_fwd(Tensor q, Tensor k, Tensor v, {_VARLEN}, bool save=True) -> (Tensor, Tensor)")
def _attention_varlen_fwd(q, k, v, cu_q, cu_k, seed, max_q, max_k, scale, dropout_p, causal, save=True):
    from vit_triton.kernels.attention.forward import attention_varlen_fwd

    sizes = dict(max_q=max_q, max_k=max_k)
    return attention_varlen_fwd(
        q, k, v, cu_q, cu_k, **sizes, scale=scale, causal=causal, dropout=Dropout(dropout_p, seed), save=save
    )


@_fake("attention_varlen_fwd")
def _attention_varlen_fwd_fake(q, k, v, cu_q, cu_k, seed, max_q, max_k, scale, dropout_p, causal, save=True):
    return _like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32) if save else None


@_register(
    "attention_varlen_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    f"{_VARLEN}) -> (Tensor, Tensor, Tensor)"
)
def _attention_varlen_bwd(
    do, q, k, v, out, lse, dlse, cu_q, cu_k, seed, max_q, max_k, scale, dropout_p, causal
):  # fmt: skip
    from vit_triton.kernels.attention.backward import attention_varlen_bwd

    return attention_varlen_bwd(
        *(do, q, k, v, out, lse, dlse, cu_q, cu_k),
        max_q=max_q,
        max_k=max_k,
        scale=scale,
        causal=causal,
        dropout=Dropout(dropout_p, seed),
    )


@_fake("attention_varlen_bwd")
def _attention_varlen_bwd_fake(
    do, q, k, v, out, lse, dlse, cu_q, cu_k, seed, max_q, max_k, scale, dropout_p, causal
):  # fmt: skip
    return _like(q), _like(k), _like(v)


# --- rotary position embedding -----------------------------------------------------------------------------


_ROTARY = (
    "Tensor cos, Tensor sin, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, float? q_eps, "
    "float? k_eps, bool rms, SymInt prefix, bool interleaved"
)


@_register(f"rotary_fwd(Tensor q, Tensor? k, {_ROTARY}) -> (Tensor, Tensor)")
def _rotary_fwd(q, k, cos, sin, q_weight, q_bias, k_weight, k_bias, q_eps, k_eps, rms, prefix, interleaved):
    """If k is None, q is the packed projection, and the result is packed."""
    from vit_triton.kernels.attention.rotary import rotary_fwd_into

    q_out, k_out = _like(q), None if k is None else _like(k)
    rotary_fwd_into(
        _unpacked(q_out, k_out),
        _unpacked(q, k),
        _norm(q_weight, q_bias, q_eps),
        _norm(k_weight, k_bias, k_eps),
        cos,
        sin,
        rms=rms,
        prefix=prefix,
        interleaved=interleaved,
    )
    return q_out, k_out


def _unpacked(q: Any, k: Any) -> Any:
    """Return q, k and v of a packed projection if k is None, else q, k and None."""
    return q.unbind(2) if k is None else (q, k, None)


@_fake("rotary_fwd")
def _rotary_fwd_fake(q, k, *_):
    return _like(q), None if k is None else _like(k)


@_register(
    f"rotary_bwd(Tensor dq_out, Tensor? dk_out, Tensor? q, Tensor? k, {_ROTARY}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _rotary_bwd(
    dq_out, dk_out, q, k, cos, sin, q_weight, q_bias, k_weight, k_bias, q_eps, k_eps, rms, prefix, interleaved
):
    from vit_triton.kernels.attention.rotary import rotary_bwd_into

    dq, dk = _like(dq_out), None if dk_out is None else _like(dk_out)
    norm_grads = rotary_bwd_into(
        _unpacked(dq, dk),
        _unpacked(dq_out, dk_out),
        None if q is None else _unpacked(q, k),
        _norm(q_weight, q_bias, q_eps),
        _norm(k_weight, k_bias, k_eps),
        cos,
        sin,
        rms=rms,
        prefix=prefix,
        interleaved=interleaved,
    )
    return dq, dk, *norm_grads


@_fake("rotary_bwd")
def _rotary_bwd_fake(
    dq_out, dk_out, q, k, cos, sin, q_weight, q_bias, k_weight, k_bias, q_eps, k_eps, rms, prefix, interleaved
):
    norms = *_norm_grads(q_weight, q_bias, q_eps is not None), *_norm_grads(k_weight, k_bias, k_eps is not None)
    return _like(dq_out), None if dk_out is None else _like(dk_out), *norms


# --- linear and mlp ----------------------------------------------------------------------------------------


@_register(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? residual, "
    "Tensor? layer_scale, Tensor? samples, Tensor? seed, float? eps, float dropout_p, bool save=True) "
    "-> (Tensor, Tensor, Tensor)",
    copies=lambda x, weight, *_: [packing.panels(weight)],
    products=True,
)
def _linear_fwd(
    x, weight, bias, norm_weight, norm_bias, residual, layer_scale, samples, seed, eps, dropout_p, save=True,
    copies=(None,),
):  # fmt: skip
    from vit_triton.kernels.linear.mlp import norm_linear_fwd

    residual = None if residual is None else _rows(residual)
    y, *statistics = norm_linear_fwd(
        *(_rows(x), weight, bias, _norm(norm_weight, norm_bias, eps), residual),
        branch=Branch(layer_scale, samples),
        dropout=Dropout(dropout_p, seed),
        panels=copies[0],
        save=save,
    )
    return y.view(*x.shape[:-1], weight.shape[0]), *statistics


@_fake("linear_fwd")
def _linear_fwd_fake(
    x, weight, bias, norm_weight, norm_bias, residual, layer_scale, samples, seed, eps, dropout_p, save=True
):
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=_output_dtype(weight, residual, layer_scale))
    saved = save and eps is not None
    return y, _statistics(x, saved), _statistics(x, saved)


@_register(
    "linear_rope_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor cos, "
    "Tensor sin, float? eps, int heads, SymInt prefix, bool interleaved, bool save=True) -> (Tensor, Tensor, Tensor)",
    copies=lambda x, weight, *_: [packing.panels(weight)],
    products=True,
)
def _linear_rope_fwd(
    x, weight, bias, norm_weight, norm_bias, cos, sin, eps, heads, prefix, interleaved, save=True, copies=(None,)
):
    """A packed projection of x, (B, N, K), with rotated q and k; the backward pass is rotary_bwd, then linear_bwd."""
    from vit_triton.kernels.linear.mlp import norm_linear_fwd

    y, *statistics = norm_linear_fwd(
        *(_rows(x), weight, bias, _norm(norm_weight, norm_bias, eps)),
        rotation=Rotation(cos, sin, x.shape[1], heads, prefix, interleaved),
        panels=copies[0],
        save=save,
    )
    return y.view(*x.shape[:-1], weight.shape[0]), *statistics


@_fake("linear_rope_fwd")
def _linear_rope_fwd_fake(
    x, weight, bias, norm_weight, norm_bias, cos, sin, eps, heads, prefix, interleaved, save=True
):
    saved = save and eps is not None
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=weight.dtype)
    return y, _statistics(x, saved), _statistics(x, saved)


def _output_dtype(weight: Tensor, residual: Tensor | None, layer_scale: Tensor | None) -> torch.dtype:
    dtype = (weight if residual is None else residual).dtype
    return dtype if layer_scale is None or layer_scale.dtype == dtype else torch.float32


@_register(
    "linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, "
    "Tensor? rstd, Tensor? seed, Tensor? layer_scale, Tensor? samples, Tensor? bias, Tensor? dsum, float dropout_p, "
    "bool with_bias, bool needs_x, bool needs_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    products=True,
)
def _linear_bwd(
    dy, x, weight, norm_weight, norm_bias, mean, rstd, seed, layer_scale, samples, bias, dsum,
    dropout_p, with_bias, needs_x, needs_weight,
):  # fmt: skip
    from vit_triton.kernels.linear.mlp import norm_linear_bwd

    dx, *grads = norm_linear_bwd(
        *(_rows(dy), _rows(x), weight, bias, _saved_norm(norm_weight, norm_bias, mean, rstd)),
        dsum=None if dsum is None else _rows(dsum),
        branch=Branch(layer_scale, samples),
        dropout=Dropout(dropout_p, seed),
        with_bias=with_bias,
        needs_x=needs_x,
        needs_weight=needs_weight,
    )
    return None if dx is None else dx.view(x.shape), *grads


@_fake("linear_bwd")
def _linear_bwd_fake(
    dy, x, weight, norm_weight, norm_bias, mean, rstd, seed, layer_scale, samples, bias, dsum,
    dropout_p, with_bias, needs_x, needs_weight,
):  # fmt: skip
    dnorm_weight, dnorm_bias = _norm_grads(norm_weight, norm_bias, needs_x and mean is not None)
    return (
        _like(x, needs_x),
        _like(weight, needs_weight),
        weight.new_empty(weight.shape[0]) if needs_weight and with_bias else None,
        dnorm_weight,
        dnorm_bias,
        _like(layer_scale, needs_weight) if layer_scale is not None else None,
    )


def _norm_grads(weight: Tensor | None, bias: Tensor | None, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias; the kernel computes both or neither."""
    if weight is None or not wanted:
        return None, None
    return _like(weight), _like(weight)


@_register(
    "mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? residual, Tensor? layer_scale, Tensor? samples, Tensor? hidden_seed, Tensor? seed, float? eps, "
    "str activation, float hidden_dropout_p, float dropout_p, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    copies=lambda x, w1, b1, w2, *_: [packing.panels(w1), packing.panels(w2)],
    products=True,
)
def _mlp_fwd(
    x, w1, b1, w2, b2, norm_weight, norm_bias, residual, layer_scale, samples, hidden_seed, seed,
    eps, activation, hidden_dropout_p, dropout_p, save, copies=(None, None),
):  # fmt: skip
    from vit_triton.kernels.linear.mlp import mlp_fwd

    y, *saved = mlp_fwd(
        *(_rows(x), w1, b1, w2, b2, _norm(norm_weight, norm_bias, eps), None if residual is None else _rows(residual)),
        activation=activation,
        hidden_dropout=Dropout(hidden_dropout_p, hidden_seed),
        branch=Branch(layer_scale, samples),
        dropout=Dropout(dropout_p, seed),
        panels=copies,
        save=save,
    )
    return y.view(*x.shape[:-1], w2.shape[0]), *saved


@_fake("mlp_fwd")
def _mlp_fwd_fake(
    x, w1, b1, w2, b2, norm_weight, norm_bias, residual, layer_scale, samples, hidden_seed, seed,
    eps, activation, hidden_dropout_p, dropout_p, save,
):  # fmt: skip
    y = x.new_empty(*x.shape[:-1], w2.shape[0], dtype=_output_dtype(w2, residual, layer_scale))
    pre = w1.new_empty(_n_rows(x), w1.shape[0]) if save else None
    saved = save and eps is not None
    return y, pre, _statistics(x, saved), _statistics(x, saved)


@_register(
    "mlp_bwd(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor? norm_weight, Tensor? norm_bias, Tensor pre, "
    "Tensor? mean, Tensor? rstd, Tensor? hidden_seed, Tensor? seed, Tensor? layer_scale, Tensor? samples, Tensor? b2, "
    "str activation, float hidden_dropout_p, float dropout_p, bool residual_is_x, bool with_b1, bool with_b2, "
    "bool needs_x, bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    products=True,
)
def _mlp_bwd(
    dy, x, w1, w2, norm_weight, norm_bias, pre, mean, rstd, hidden_seed, seed, layer_scale, samples, b2,
    activation, hidden_dropout_p, dropout_p, residual_is_x, with_b1, with_b2, needs_x, needs_weights,
):  # fmt: skip
    from vit_triton.kernels.linear.mlp import mlp_bwd

    dx, *grads = mlp_bwd(
        *(_rows(dy), _rows(x), w1, w2, b2, _saved_norm(norm_weight, norm_bias, mean, rstd), pre),
        activation=activation,
        hidden_dropout=Dropout(hidden_dropout_p, hidden_seed),
        branch=Branch(layer_scale, samples),
        dropout=Dropout(dropout_p, seed),
        residual_is_x=residual_is_x,
        with_b1=with_b1,
        with_b2=with_b2,
        needs_x=needs_x,
        needs_weights=needs_weights,
    )
    return None if dx is None else dx.view(x.shape), *grads


@_fake("mlp_bwd")
def _mlp_bwd_fake(
    dy, x, w1, w2, norm_weight, norm_bias, pre, mean, rstd, hidden_seed, seed, layer_scale, samples, b2,
    activation, hidden_dropout_p, dropout_p, residual_is_x, with_b1, with_b2, needs_x, needs_weights,
):  # fmt: skip
    dnorm_weight, dnorm_bias = _norm_grads(norm_weight, norm_bias, needs_x and mean is not None)
    return (
        _like(x, needs_x),
        _like(w1, needs_weights),
        w1.new_empty(w1.shape[0]) if needs_weights and with_b1 else None,
        _like(w2, needs_weights),
        w2.new_empty(w2.shape[0]) if needs_weights and with_b2 else None,
        dnorm_weight,
        dnorm_bias,
        _like(layer_scale, needs_weights) if layer_scale is not None else None,
    )


# --- encoder -----------------------------------------------------------------------------------------------

_BLOCK = 14  # tensors of a Block, including those of its norms


def _block(tensors: list[Any], eps: list[float]) -> Block:
    weight1, bias1, qkv, qkv_bias, out, out_bias, weight2, bias2, *rest = tensors
    return Block((weight1, bias1, eps[0]), qkv, qkv_bias, out, out_bias, (weight2, bias2, eps[1]), *rest)


def _block_weights(n_tensors: int) -> list[int]:
    """Return the indices of qkv_weight, out_weight, w1 and w2 of each block."""
    return [block + place for block in range(0, n_tensors, _BLOCK) for place in (2, 4, 8, 10)]


@_register(
    "encoder_fwd(Tensor x, Tensor?[] blocks, float[] eps, Tensor? cos, Tensor? sin, int heads, float scale, "
    "str activation, int rope_prefix, bool interleaved, bool first_token) -> Tensor",
    copies=lambda x, blocks, *_: [packing.panels(blocks[i]) for i in _block_weights(len(blocks))],
    products=True,
)
def _encoder_fwd(
    x, blocks, eps, cos, sin, heads, scale, activation, rope_prefix, interleaved, first_token, copies=None
):
    from vit_triton.kernels.encoder import BlockPanels, encoder_fwd

    blocks = [_block(blocks[_BLOCK * i : _BLOCK * (i + 1)], eps[2 * i :]) for i in range(len(blocks) // _BLOCK)]
    panels = [BlockPanels()] * len(blocks)
    if copies is not None:
        panels = [BlockPanels(*copies[i : i + 4]) for i in range(0, len(copies), 4)]
    return encoder_fwd(
        x,
        blocks,
        panels,
        rope=None if cos is None else (cos, sin),
        heads=heads,
        scale=scale,
        activation=activation,
        rope_prefix=rope_prefix,
        interleaved=interleaved,
        first_token=first_token,
    )


@_fake("encoder_fwd")
def _encoder_fwd_fake(x, blocks, eps, cos, sin, heads, scale, activation, rope_prefix, interleaved, first_token):
    return x.new_empty(x.shape[0], 1 if first_token else x.shape[1], x.shape[2])


# --- layer_norm --------------------------------------------------------------------------------------------


@_register(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, bool save=True) -> (Tensor, Tensor, Tensor)"
)
def _layer_norm_fwd(x, weight, bias, eps, save=True):
    from vit_triton.kernels.norm.layer_norm import layer_norm_fwd

    y, *statistics = layer_norm_fwd(_rows(x), weight, bias, eps=eps, save=save)
    return y.view(x.shape), *statistics


@_fake("layer_norm_fwd")
def _layer_norm_fwd_fake(x, weight, bias, eps, save=True):
    return _like(x), _statistics(x, save), _statistics(x, save)


@_register(
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, bool save=True) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def _add_layer_norm_fwd(x, residual, weight, bias, eps, save=True):
    from vit_triton.kernels.norm.layer_norm import add_layer_norm_fwd

    y, total, *statistics = add_layer_norm_fwd(_rows(x), _rows(residual), weight, bias, eps=eps, save=save)
    return y.view(x.shape), total.view(x.shape), *statistics


@_fake("add_layer_norm_fwd")
def _add_layer_norm_fwd_fake(x, residual, weight, bias, eps, save=True):
    return _like(x), _like(x), _statistics(x, save), _statistics(x, save)


@_register(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor? dsum) "
    "-> (Tensor, Tensor, Tensor)"
)
def _layer_norm_bwd(dy, x, weight, mean, rstd, dsum):
    from vit_triton.kernels.norm.layer_norm import layer_norm_bwd

    dsum = None if dsum is None else _rows(dsum)
    dx, *dnorm = layer_norm_bwd(_rows(dy), _rows(x), weight, mean, rstd, dsum=dsum)
    return dx.view(x.shape), *dnorm


@_fake("layer_norm_bwd")
def _layer_norm_bwd_fake(dy, x, weight, mean, rstd, dsum):
    return (_like(x), *_norm_grads(weight, None, True))


# --- patch_embed -------------------------------------------------------------------------------------------


@_register(
    "patch_embed_fwd(Tensor image, Tensor weight, Tensor? bias, Tensor? pos, Tensor? prefix, Tensor? pre_weight, "
    "Tensor? pre_bias, float? pre_eps, Tensor? post_weight, Tensor? post_bias, float? post_eps, Tensor? mean, "
    "Tensor? std, SymInt[] patch_size, str patch_order, bool save=True) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    copies=lambda image, weight, *args: [packing.in_image_order(weight, image, tuple(args[11]), args[12])],
    products=True,
)
def _patch_embed_fwd(
    image, weight, bias, pos, prefix, pre_weight, pre_bias, pre_eps, post_weight, post_bias, post_eps, mean, std,
    patch_size, patch_order, save=True, copies=(None,),
):  # fmt: skip
    from vit_triton.kernels.patch_embed.forward import patch_embed_fwd

    return patch_embed_fwd(
        image,
        weight,
        bias,
        pos,
        prefix,
        None if pre_eps is None else (pre_weight, pre_bias, pre_eps),
        None if post_eps is None else (post_weight, post_bias, post_eps),
        mean,
        std,
        patch_size=tuple(patch_size),
        patch_order=patch_order,
        arranged=copies[0],
        save=save,
    )


@_fake("patch_embed_fwd")
def _patch_embed_fwd_fake(
    image, weight, bias, pos, prefix, pre_weight, pre_bias, pre_eps, post_weight, post_bias, post_eps, mean, std,
    patch_size, patch_order, save=True,
):  # fmt: skip
    batch, _, height, width = image.shape
    patches = (height // patch_size[0]) * (width // patch_size[1])
    rows = image.new_empty(batch * patches, 1)
    n_prefix = 0 if prefix is None else prefix.shape[0]
    dtypes = (x.dtype for x in (weight, pos, prefix, post_weight) if x is not None)
    return (
        weight.new_empty(
            batch, n_prefix + patches, weight.shape[0], dtype=functools.reduce(torch.promote_types, dtypes)
        ),
        weight.new_empty(batch * patches, weight.shape[0]) if save and post_eps is not None else None,
        _statistics(rows, save and pre_eps is not None),
        _statistics(rows, save and pre_eps is not None),
        _statistics(rows, save and post_eps is not None),
        _statistics(rows, save and post_eps is not None),
    )


@_register(
    "patch_embed_bwd(Tensor dtokens, Tensor image, Tensor weight, Tensor? z, Tensor? pre_mean, Tensor? pre_rstd, "
    "Tensor? post_mean, Tensor? post_rstd, Tensor? pre_weight, Tensor? pre_bias, float? pre_eps, Tensor? post_weight, "
    "Tensor? post_bias, float? post_eps, Tensor? mean, Tensor? std, SymInt[] patch_size, str patch_order, "
    "SymInt n_prefix, bool needs_image) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    products=True,
)
def _patch_embed_bwd(
    dtokens, image, weight, z, pre_mean, pre_rstd, post_mean, post_rstd, pre_weight, pre_bias, pre_eps, post_weight,
    post_bias, post_eps, mean, std, patch_size, patch_order, n_prefix, needs_image,
):  # fmt: skip
    from vit_triton.kernels.patch_embed.backward import patch_embed_bwd

    return patch_embed_bwd(
        dtokens,
        image,
        weight,
        z,
        pre_mean,
        pre_rstd,
        post_mean,
        post_rstd,
        None if pre_eps is None else (pre_weight, pre_bias, pre_eps),
        None if post_eps is None else (post_weight, post_bias, post_eps),
        mean,
        std,
        patch_size=tuple(patch_size),
        patch_order=patch_order,
        needs_image=needs_image,
    )


@_fake("patch_embed_bwd")
def _patch_embed_bwd_fake(
    dtokens, image, weight, z, pre_mean, pre_rstd, post_mean, post_rstd, pre_weight, pre_bias, pre_eps, post_weight,
    post_bias, post_eps, mean, std, patch_size, patch_order, n_prefix, needs_image,
):  # fmt: skip
    dim = weight.shape[0]
    return (
        _like(image, needs_image),
        _like(weight),
        weight.new_empty(dim),
        *_norm_grads(pre_weight, pre_bias, pre_eps is not None),
        *_norm_grads(post_weight, post_bias, post_eps is not None),
        dtokens.new_empty(dtokens.shape[1] - n_prefix, dim),
        dtokens.new_empty(n_prefix, dim),
    )


# --- windows -----------------------------------------------------------------------------------------------


_WINDOW = (
    "Tensor qkv, Tensor? bias, Tensor? logit_scale, Tensor? seed, int[] window, int[] shift, float mask_value, "
    "float scale, float dropout_p"
)


@_register(f"window_attention_fwd({_WINDOW}) -> Tensor")
def _window_attention_fwd(qkv, bias, logit_scale, seed, window, shift, mask_value, scale, dropout_p):
    from vit_triton.kernels.attention.windows import window_attention_fwd

    return window_attention_fwd(
        qkv,
        bias,
        logit_scale,
        window=tuple(window),
        shift=tuple(shift),
        mask_value=mask_value,
        scale=scale,
        dropout=Dropout(dropout_p, seed),
    )


@_fake("window_attention_fwd")
def _window_attention_fwd_fake(qkv, bias, logit_scale, seed, window, shift, mask_value, scale, dropout_p):
    batch, height, width, _, heads, head_dim = qkv.shape
    return qkv.new_empty(batch, height, width, heads, head_dim)


@_register(f"window_attention_bwd(Tensor do, {_WINDOW}, bool needs_bias) -> (Tensor, Tensor, Tensor)")
def _window_attention_bwd(do, qkv, bias, logit_scale, seed, window, shift, mask_value, scale, dropout_p, needs_bias):
    from vit_triton.kernels.attention.windows_backward import window_attention_bwd

    return window_attention_bwd(
        do,
        qkv,
        bias,
        logit_scale,
        window=tuple(window),
        shift=tuple(shift),
        mask_value=mask_value,
        scale=scale,
        dropout=Dropout(dropout_p, seed),
        needs_bias=needs_bias,
    )


@_fake("window_attention_bwd")
def _window_attention_bwd_fake(
    do, qkv, bias, logit_scale, seed, window, shift, mask_value, scale, dropout_p, needs_bias
):
    dbias = _like(bias) if bias is not None and needs_bias else None
    return _like(qkv), dbias, None if logit_scale is None else _like(logit_scale)


@_register("relative_position_bias_fwd(Tensor table, int[] window, int prefix_tokens) -> Tensor")
def _relative_position_bias_fwd(table, window, prefix_tokens):
    from vit_triton.kernels.attention.position_bias import position_bias_fwd

    return position_bias_fwd(table, window=tuple(window), prefix_tokens=prefix_tokens)


@_fake("relative_position_bias_fwd")
def _relative_position_bias_fwd_fake(table, window, prefix_tokens):
    n_tokens = window[0] * window[1] + prefix_tokens
    return table.new_empty(table.shape[1], n_tokens, n_tokens)


@_register("relative_position_bias_bwd(Tensor dbias, int[] window, int prefix_tokens) -> Tensor")
def _relative_position_bias_bwd(dbias, window, prefix_tokens):
    from vit_triton.kernels.attention.position_bias import position_bias_bwd

    return position_bias_bwd(dbias, window=tuple(window), prefix_tokens=prefix_tokens)


@_fake("relative_position_bias_bwd")
def _relative_position_bias_bwd_fake(dbias, window, prefix_tokens):
    return dbias.new_empty((2 * window[0] - 1) * (2 * window[1] - 1) + 3 * prefix_tokens, dbias.shape[0])
