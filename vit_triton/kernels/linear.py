"""The matrix products of a Vision Transformer: linear layers with everything around them fused in.

Forward, of tokens x (M, K) and nn.Linear's weight (N, K):

    z = x @ weight.T + bias                    y = s * gamma * dropout(act(z)) + residual

with LayerScale's gamma of each column (Touvron et al. 2021, arXiv:2103.17239) and stochastic depth's s of each sample
(Huang et al. 2016, arXiv:1603.09382), which stand beside a residual and not beside an activation. Backward, with D the
dropout scale (0 or 1 / (1 - p)) of each element and `*` elementwise:

    dz = s * gamma * D * dy * act'(z)     dx = dz @ weight     dweight = dz.T @ x     dbias = dz.sum(0)

gamma's own gradient sums s * D * dy * z over the tokens, and z is not kept. As z is linear in x, the same sum is had from
the weight's gradient before gamma, whatever gamma is, 0 too: with G = (s * D * dy).T @ x and g = (s * D * dy).sum(0),

    dweight = gamma * G     dbias = gamma * g     dgamma = (weight * G).sum(1) + bias * g

An MLP is y = dropout(f(z)) + residual with z = x @ w1.T + b1, f(z) = dropout(act(z)) @ w2.T + b2. Only z is
saved, in the weight's dtype: `linear_bwd_input` of the second layer applies act'(z) and the hidden dropout to the
gradient it has just computed, and writes dropout(act(z)) once more on the way, for the weight's gradient. (Computed
where that gradient loads z, once for every tile of it, the activation would hold up the matrix units: 909 against 381 us
on an H100, computed.) The activation is of z *rounded* to that dtype in the forward pass too, so that it is the same
again, bit for bit. The GELU is Hendrycks & Gimpel's (2016,
arXiv:1606.08415).

No kernel uses atomics: the sum over tokens in `dweight` is cut into parts that are added in a fixed order.

Where a tuned table says so (`VendorGemm`), the vendor's library takes the product and the same kernels do the rest, in
one pass over it. The product is then rounded to the weight's dtype before the bias or act'(z) reach it, once more than
without. What stands in front of a product (s and gamma of dy) is a pass and memory of its own, with
the rounding that it has in the kernels; the dropout masks are the same.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vit_triton.kernels._config import (
    VendorGemm,
    architecture,
    cdiv,
    pick_layer_scale_bwd,
    pick_linear_bwd_input,
    pick_linear_bwd_weight,
    pick_linear_fwd,
)
from vit_triton.kernels._launch import TRITON_DTYPE, input_precision, keep_scale, launch
from vit_triton.kernels._sums import sum_parts
from vit_triton.kernels._tiles import activate, activate_grad, columns_of, dropout_keep, grouped_tile


@triton.jit
def _offsets(rows, stride_row, cols, stride_col):
    """64-bit offsets of the elements (rows x cols)."""
    return rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col


@triton.jit
def _within(rows, num_rows, cols, num_cols, EVEN_COLS: tl.constexpr):
    """Which of (rows x cols) exist; ``EVEN_COLS``: all columns do."""
    if EVEN_COLS:
        return (rows < num_rows)[:, None]
    else:
        return (rows < num_rows)[:, None] & (cols < num_cols)[None, :]


@triton.jit
def _dropout_scale(seed_ptr, rows, cols, p, keep_scale):
    """D: 0 where the element (row, col) is dropped, else ``keep_scale`` = 1 / (1 - p)."""
    return tl.where(dropout_keep(tl.load(seed_ptr), rows[:, None], cols[None, :], 0, p), keep_scale, 0.0)


@triton.jit
def _sample_scale(samples_ptr, rows, num_rows, rows_per_sample):
    """s of the sample that each row belongs to."""
    return tl.load(samples_ptr + rows // rows_per_sample, mask=rows < num_rows, other=0.0)


def _rows_per_sample(rows: int, samples: torch.Tensor | None) -> int:
    return 1 if samples is None else max(1, rows // max(1, len(samples)))


# --- forward -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M"])
def linear_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, layer_scale_ptr, samples_ptr, residual_ptr, y_ptr, pre_ptr, seed_ptr,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_rm, stride_rn,
    M, N, K, rows_per_sample, dropout_p, keep_scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WORD: tl.constexpr,
    PARTS: tl.constexpr, MULTIPLIED: tl.constexpr = False,
):  # fmt: skip
    """WORD: 0, or weight_ptr holds the panels of `pack_weight`, BLOCK_N columns of WORD values along K each.
    MULTIPLIED: x_ptr holds the product, and of the weight only the dtype counts."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + _offsets(offs_m, stride_xm, offs_k, stride_xk)  # [BLOCK_M, BLOCK_K]
    step_x = tl.full([], BLOCK_K, tl.int64) * stride_xk
    if WORD:
        along_k = offs_k // WORD * (BLOCK_N * WORD) + offs_k % WORD
        panel_ptr = weight_ptr + pid_n.to(tl.int64) * stride_wn
        w_ptrs = panel_ptr + tl.arange(0, BLOCK_N)[:, None] * WORD + along_k[None, :]  # [BLOCK_N, BLOCK_K]
        step_w = tl.full([], BLOCK_K * BLOCK_N, tl.int64)
    else:
        w_ptrs = weight_ptr + _offsets(offs_n, stride_wn, offs_k, stride_wk)  # [BLOCK_N, BLOCK_K]
        step_w = tl.full([], BLOCK_K, tl.int64) * stride_wk

    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, 0 if MULTIPLIED else K, BLOCK_K):
        x = tl.load(x_ptrs, mask=_within(offs_m, M, offs_k, K - k, EVEN_K), other=0.0)  # [BLOCK_M, BLOCK_K]
        if not WORD:
            w = tl.load(w_ptrs, mask=_within(offs_n, N, offs_k, K - k, EVEN_K), other=0.0)  # [BLOCK_N, BLOCK_K]
        elif EVEN_K:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(offs_k < K - k)[None, :], other=0.0)
        product = tl.dot(x.to(dtype), tl.trans(w), product, input_precision=PRECISION)
        x_ptrs += step_x
        w_ptrs += step_w

    WIDTH: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):  # what the epilogue loads then takes the registers of a part only
        offs_n = pid_n * BLOCK_N + part * WIDTH + tl.arange(0, WIDTH)
        z = columns_of(product, part, PARTS)  # [BLOCK_M, WIDTH]
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        if MULTIPLIED:
            z = tl.load(x_ptr + _offsets(offs_m, stride_xm, offs_n, stride_xk), mask=mask, other=0.0).to(tl.float32)
        y_offs = _offsets(offs_m, N, offs_n, 1)  # outputs are contiguous
        if bias_ptr is not None:
            z += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        if pre_ptr is not None:
            tl.store(pre_ptr + y_offs, z.to(dtype), mask=mask)
        if ACTIVATION != "none":
            z = activate(z.to(dtype).to(tl.float32), ACTIVATION, dtype == tl.float32)
        if DROPOUT:
            z *= _dropout_scale(seed_ptr, offs_m, offs_n, dropout_p, keep_scale)
        if layer_scale_ptr is not None:
            z *= tl.load(layer_scale_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        if samples_ptr is not None:
            z *= _sample_scale(samples_ptr, offs_m, M, rows_per_sample)[:, None]
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + _offsets(offs_m, stride_rm, offs_n, stride_rn)
            z += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + y_offs, z.to(y_ptr.dtype.element_ty), mask=mask)


def linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    layer_scale: torch.Tensor | None = None,
    samples: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    activation: str = "none",
    save_pre: bool = False,
    panels: torch.Tensor | None = None,
    multiplied: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y = s * gamma * dropout(act(x @ weight.T + bias)) + residual, and z = x @ weight.T + bias if ``save_pre``, else
    None.

    x (M, K), weight (N, K), bias (N,), residual (M, N), ``layer_scale`` gamma (N,), ``samples`` s (B,) float32, each for
    M / B rows -> y (M, N) in :func:`output_dtype`; z (M, N) in the weight's. ``seed``: one int64, needed with dropout.
    ``panels``: the weight once more, as `pack_weight` gives it, and then that is read. ``multiplied``: x (M, N) is the
    product, and of the weight only shape and dtype count.
    """
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n, dtype=output_dtype(weight, residual, layer_scale))
    pre = x.new_empty(m, n, dtype=weight.dtype) if save_pre else None
    arch = architecture(x.device)
    precision = input_precision(weight.dtype, arch)
    branch = layer_scale is not None or samples is not None
    epilogue = _epilogue(activation != "none" or residual is not None, branch, dropout_p > 0)
    config = pick_linear_fwd(m, n, k, weight.dtype, arch, precision, epilogue)
    if isinstance(config, VendorGemm) and not multiplied:
        x, multiplied = torch.mm(x.to(weight.dtype), weight.T), True
        if bias is None and pre is None and epilogue == "none" and x.dtype == y.dtype:
            return x, None
    if multiplied:
        config, panels = VendorGemm(), None
    elif panels is not None:
        config = replace(config, cols=panels.shape[2])
    launch(
        linear_fwd_kernel,
        (cdiv(m, config.rows) * cdiv(n, config.cols),),
        x,
        x_ptr=x,
        weight_ptr=weight if panels is None else panels,
        bias_ptr=None if bias is None else bias.contiguous(),
        layer_scale_ptr=None if layer_scale is None else layer_scale.contiguous(),
        samples_ptr=samples,
        residual_ptr=residual,
        y_ptr=y,
        pre_ptr=pre,
        seed_ptr=seed if dropout_p > 0 else None,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_wn=weight.stride(0) if panels is None else panels.stride(0),
        stride_wk=weight.stride(1),
        stride_rm=0 if residual is None else residual.stride(0),
        stride_rn=0 if residual is None else residual.stride(1),
        M=m,
        N=n,
        K=k,
        rows_per_sample=_rows_per_sample(m, samples),
        dropout_p=float(dropout_p),
        keep_scale=keep_scale(dropout_p),
        ACTIVATION=activation,
        DROPOUT=dropout_p > 0,
        EVEN_K=k % config.depth == 0,
        PRECISION=precision,
        BLOCK_M=config.rows,
        BLOCK_N=config.cols,
        BLOCK_K=config.depth,
        GROUP=config.group,
        WORD=0 if panels is None else panels.shape[3],
        PARTS=config.parts,
        MULTIPLIED=multiplied,
        **config.options,
    )
    return y, pre


def output_dtype(weight: torch.Tensor, residual: torch.Tensor | None, layer_scale: torch.Tensor | None) -> torch.dtype:
    """The residual's or else the weight's; float32 where that of LayerScale, which autocast leaves as it is, differs."""
    dtype = (weight if residual is None else residual).dtype
    return dtype if layer_scale is None or layer_scale.dtype == dtype else torch.float32


def _alone(
    x: torch.Tensor,
    dtype: torch.dtype,
    *,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    layer_scale: torch.Tensor | None = None,
    samples: torch.Tensor | None = None,
) -> torch.Tensor:
    """s * gamma * dropout(x) of x (M, N) in ``dtype``; x itself where there is nothing to do."""
    if layer_scale is None and samples is None and dropout_p == 0:
        return x.to(dtype)
    weight = x.new_empty(x.shape[1], 0, dtype=dtype)
    y, _ = linear_fwd(x, weight, None, None, seed, layer_scale, samples, dropout_p=dropout_p, multiplied=True)
    return y.to(dtype)


def dropout_bwd(dy: torch.Tensor, seed: torch.Tensor | None, dtype: torch.dtype, *, dropout_p: float) -> torch.Tensor:
    """D * dy (M, N) in ``dtype`` for the dropout behind a layer, dy itself without one. It is a pass of its own: the
    products of the backward pass read dy once for every tile of the other side, and would draw D as often (768 -> 3072
    on an H100, computed: 1206 us for the input's gradient where the product takes 137)."""
    return dy if dropout_p == 0 else _alone(dy, dtype, seed=seed, dropout_p=dropout_p)


def pack_weight(weight: torch.Tensor, panel: int, word: int) -> torch.Tensor:
    """A weight (N, K) as panels of ``panel`` of its rows, (N / panel, K / word, panel, word): what a CPU multiplies
    with lies in the order in which it is read. Zeros where N or K does not divide."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % word, 0, -n % panel))
    return padded.unflatten(1, (-1, word)).unflatten(0, (-1, panel)).transpose(1, 2).contiguous()


def _epilogue(elementwise: bool, branch: bool, dropout: bool) -> str:
    """What the tiles must leave registers for beside the product; ``branch``: LayerScale or stochastic depth."""
    return "dropout" if dropout else "branch" if branch else "elementwise" if elementwise else "none"


# --- backward: the input -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M"])
def linear_bwd_input_kernel(
    dy_ptr, weight_ptr, layer_scale_ptr, samples_ptr, pre_ptr, dx_ptr, hidden_ptr, seed_ptr,
    stride_dym, stride_dyn, stride_wn, stride_wk, stride_pm, stride_pk,
    M, N, K, rows_per_sample, dropout_p, keep_scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    MULTIPLIED: tl.constexpr = False,
):  # fmt: skip
    """MULTIPLIED: dy_ptr holds the product, and of the weight only the dtype counts."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    pid_m, pid_k = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    dy_ptrs = dy_ptr + _offsets(offs_m, stride_dym, offs_n, stride_dyn)  # [BLOCK_M, BLOCK_N]
    w_ptrs = weight_ptr + _offsets(offs_n, stride_wn, offs_k, stride_wk)  # [BLOCK_N, BLOCK_K]
    step_dy = tl.full([], BLOCK_N, tl.int64) * stride_dyn
    step_w = tl.full([], BLOCK_N, tl.int64) * stride_wn

    product = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for n in range(0, 0 if MULTIPLIED else N, BLOCK_N):
        dy = tl.load(dy_ptrs, mask=_within(offs_m, M, offs_n, N - n, EVEN_N), other=0.0)  # [BLOCK_M, BLOCK_N]
        if EVEN_N:
            w = tl.load(w_ptrs, mask=(offs_k < K)[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        else:
            w = tl.load(w_ptrs, mask=_within(offs_n, N - n, offs_k, K, False), other=0.0)  # [BLOCK_N, BLOCK_K]
        if layer_scale_ptr is not None:
            gamma = tl.load(layer_scale_ptr + n + offs_n, mask=offs_n < N - n, other=0.0)  # [BLOCK_N]
            dy = dy.to(tl.float32) * gamma.to(tl.float32)[None, :]
        product = tl.dot(dy.to(dtype), w, product, input_precision=PRECISION)
        dy_ptrs += step_dy
        w_ptrs += step_w

    WIDTH: tl.constexpr = BLOCK_K // PARTS
    for part in tl.static_range(PARTS):
        offs_k = pid_k * BLOCK_K + part * WIDTH + tl.arange(0, WIDTH)
        dx = columns_of(product, part, PARTS)  # [BLOCK_M, WIDTH]
        mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        if MULTIPLIED:
            dx = tl.load(dy_ptr + _offsets(offs_m, stride_dym, offs_k, stride_dyn), mask=mask, other=0.0).to(tl.float32)
        if samples_ptr is not None:
            dx *= _sample_scale(samples_ptr, offs_m, M, rows_per_sample)[:, None]
        dx_offs = _offsets(offs_m, K, offs_k, 1)  # outputs are contiguous
        if pre_ptr is not None:
            pre_ptrs = pre_ptr + _offsets(offs_m, stride_pm, offs_k, stride_pk)
            pre = tl.load(pre_ptrs, mask=mask, other=0.0).to(tl.float32)
            dx *= activate_grad(pre, ACTIVATION, dtype == tl.float32)
            hidden = activate(pre, ACTIVATION, dtype == tl.float32)
            if DROPOUT:
                scale = _dropout_scale(seed_ptr, offs_m, offs_k, dropout_p, keep_scale)
                dx *= scale
                hidden *= scale
            if hidden_ptr is not None:
                tl.store(hidden_ptr + dx_offs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + dx_offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def linear_bwd_input(
    dy: torch.Tensor,
    weight: torch.Tensor,
    pre: torch.Tensor | None,
    seed: torch.Tensor | None,
    layer_scale: torch.Tensor | None = None,
    samples: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    activation: str = "none",
    with_hidden: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx = (s * gamma * dy) @ weight, times D * act'(pre) where ``pre``, the input before act and dropout, is given.

    dy (M, N) with any strides, weight (N, K), pre (M, K), ``layer_scale`` and ``samples`` as in `linear_fwd` -> dx (M, K)
    in the weight's dtype, and ``with_hidden`` D * act(pre) (M, K), which the weight's gradient wants, else None.
    ``dropout_p`` and ``seed`` rebuild D, the dropout in front of this layer; of the one behind it see `dropout_bwd`.
    """
    (m, n), k = dy.shape, weight.shape[1]
    dx = dy.new_empty(m, k, dtype=weight.dtype)
    hidden = torch.empty_like(dx) if with_hidden else None
    arch = architecture(dy.device)
    precision = input_precision(weight.dtype, arch)
    epilogue = _epilogue(pre is not None, layer_scale is not None or samples is not None, dropout_p > 0)
    config = pick_linear_bwd_input(m, n, k, weight.dtype, arch, precision, epilogue)
    multiplied = isinstance(config, VendorGemm)
    if multiplied:
        dy = torch.mm(_alone(dy, weight.dtype, layer_scale=layer_scale), weight)
        if pre is None and samples is None:
            return dy, None
    launch(
        linear_bwd_input_kernel,
        (cdiv(m, config.rows) * cdiv(k, config.cols),),
        dy,
        dy_ptr=dy,
        weight_ptr=weight,
        layer_scale_ptr=None if layer_scale is None else layer_scale.contiguous(),
        samples_ptr=samples,
        pre_ptr=pre,
        dx_ptr=dx,
        hidden_ptr=hidden,
        seed_ptr=seed if dropout_p > 0 else None,
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_pm=0 if pre is None else pre.stride(0),
        stride_pk=0 if pre is None else pre.stride(1),
        M=m,
        N=n,
        K=k,
        rows_per_sample=_rows_per_sample(m, samples),
        dropout_p=float(dropout_p),
        keep_scale=keep_scale(dropout_p),
        ACTIVATION=activation,
        DROPOUT=dropout_p > 0,
        EVEN_N=n % config.depth == 0,
        PRECISION=precision,
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        BLOCK_N=config.depth,
        GROUP=config.group,
        PARTS=config.parts,
        MULTIPLIED=multiplied,
        **config.options,
    )
    return dx, hidden


# --- backward: the weight and the bias ---------------------------------------------------------------------


class Scaled(NamedTuple):
    """A layer with a LayerScale behind it: gamma (N,), weight (N, K), bias (N,)."""

    layer_scale: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


@triton.jit(do_not_specialize=["M"])
def linear_bwd_weight_kernel(
    dy_ptr, samples_ptr, x_ptr, dweight_ptr, dbias_ptr,
    stride_dym, stride_dyn, stride_xm, stride_xk,
    M, N, K, rows_per_sample,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, SUM_BY_PRODUCT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """SUM_BY_PRODUCT: the matrix units add up the bias's gradient too; summing the tile from registers, on its way to
    them, holds them up (computed: 579 against 381 us for 25,216 x 3072 x 768 on an H100)."""
    num_n = tl.cdiv(N, BLOCK_N)
    num_k = tl.cdiv(K, BLOCK_K)
    split = tl.program_id(0) // (num_n * num_k)
    pid_n, pid_k = grouped_tile(tl.program_id(0) % (num_n * num_k), num_n, num_k, GROUP)
    rows = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLIT) * BLOCK_M  # tokens of each part
    start = split * rows
    stop = min(start + rows, M)
    offs_m = start + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    dy_ptrs = dy_ptr + _offsets(offs_n, stride_dyn, offs_m, stride_dym)  # [BLOCK_N, BLOCK_M]: dy transposed
    x_ptrs = x_ptr + _offsets(offs_m, stride_xm, offs_k, stride_xk)  # [BLOCK_M, BLOCK_K]
    step_dy = tl.full([], BLOCK_M, tl.int64) * stride_dym
    step_x = tl.full([], BLOCK_M, tl.int64) * stride_xm

    dw = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    db = tl.zeros([BLOCK_N, 16] if SUM_BY_PRODUCT else [BLOCK_N], tl.float32)
    sixteenth = tl.full([BLOCK_M, 16], 0.0625, DTYPE)  # exact, as the 16 columns' sum then is
    for m in range(start, stop, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        dy = tl.load(dy_ptrs, mask=_within(offs_n, N, offs_m, M, False), other=0.0)  # [BLOCK_N, BLOCK_M]
        x = tl.load(x_ptrs, mask=_within(offs_m, M, offs_k, K, False), other=0.0)  # [BLOCK_M, BLOCK_K]
        if samples_ptr is not None:
            dy = dy.to(tl.float32) * _sample_scale(samples_ptr, offs_m, M, rows_per_sample)[None, :]
        dw = tl.dot(dy.to(DTYPE), x.to(DTYPE), dw, input_precision=PRECISION)
        if dbias_ptr is not None:
            if SUM_BY_PRODUCT:
                db = tl.dot(dy.to(DTYPE), sixteenth, db)
            elif pid_k == 0:
                db += tl.sum(dy.to(tl.float32), 1)
        dy_ptrs += step_dy
        x_ptrs += step_x

    part = split.to(tl.int64) * N  # row 0 of this part; parts are stacked along N
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    dw_ptrs = dweight_ptr + part * K + _offsets(offs_n, K, offs_k, 1)
    tl.store(dw_ptrs, dw.to(dweight_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:
        if SUM_BY_PRODUCT:
            db = tl.sum(db, 1)
        if pid_k == 0:
            tl.store(dbias_ptr + part + offs_n, db.to(dbias_ptr.dtype.element_ty), mask=offs_n < N)


def linear_bwd_weight(
    dy: torch.Tensor,
    x: torch.Tensor,
    samples: torch.Tensor | None = None,
    scaled: Scaled | None = None,
    *,
    with_bias: bool,
    weight_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dweight = (s * dy).T @ x and, ``with_bias``, dbias = (s * dy).sum(0), else None. With a
    LayerScale behind the layer both times gamma, and gamma's gradient; else None. It needs ``with_bias`` where there is a
    bias.

    dy (M, N) with any strides, x (M, K), ``samples`` s (B,) -> dweight (N, K), dbias (N,) in ``weight_dtype``, dgamma (N,)
    in its own. Of dropout see `dropout_bwd`.
    """
    (m, n), k = dy.shape, x.shape[1]
    arch = architecture(dy.device)
    precision = input_precision(weight_dtype, arch)
    epilogue = _epilogue(with_bias, samples is not None, False)
    config = pick_linear_bwd_weight(m, n, k, weight_dtype, arch, precision, epilogue)
    if isinstance(config, VendorGemm):
        dy = _alone(dy, weight_dtype, samples=samples)
        dweight, dbias = torch.mm(dy.T, x.to(weight_dtype)), dy.sum(0, dtype=torch.float32) if with_bias else None
        if scaled is not None:
            return layer_scale_bwd(dweight.float()[None], None if dbias is None else dbias[None], scaled)
        return dweight, None if dbias is None else dbias.to(weight_dtype), None
    # one part is the result; what is summed or scaled is so in float32
    parts_dtype = weight_dtype if config.split == 1 and scaled is None else torch.float32
    dweight = dy.new_empty(config.split, n, k, dtype=parts_dtype)
    dbias = dy.new_empty(config.split, n, dtype=parts_dtype) if with_bias else None
    launch(
        linear_bwd_weight_kernel,
        (cdiv(n, config.rows) * cdiv(k, config.cols) * config.split,),
        dy,
        dy_ptr=dy,
        samples_ptr=samples,
        x_ptr=x,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        M=m,
        N=n,
        K=k,
        rows_per_sample=_rows_per_sample(m, samples),
        DTYPE=TRITON_DTYPE[weight_dtype],
        PRECISION=precision,
        SPLIT=config.split,
        SUM_BY_PRODUCT=weight_dtype != torch.float32 and arch not in ("cpu", "interpreter"),
        BLOCK_N=config.rows,
        BLOCK_K=config.cols,
        BLOCK_M=config.depth,
        GROUP=config.group,
        **config.options,
    )
    if scaled is not None:
        return layer_scale_bwd(dweight, dbias, scaled)
    return sum_parts(dweight, weight_dtype), None if dbias is None else sum_parts(dbias, weight_dtype), None


# --- backward: LayerScale ----------------------------------------------------------------------------------


@triton.jit
def layer_scale_bwd_kernel(
    parts_ptr, bias_parts_ptr, layer_scale_ptr, weight_ptr, bias_ptr, dweight_ptr, dbias_ptr, dlayer_scale_ptr,
    stride_wn, stride_wk, N, K,
    PARTS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of the weight."""
    row = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, PARTS).to(tl.int64)
    gamma = tl.load(layer_scale_ptr + row).to(tl.float32)
    dgamma = tl.full([], 0.0, tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask = offs_k < K
        part_ptrs = parts_ptr + row * K + (offs_p * N * K)[:, None] + offs_k[None, :]  # [PARTS, BLOCK_K]
        grad = tl.sum(tl.load(part_ptrs, mask=mask[None, :], other=0.0), 0)  # [BLOCK_K]
        weight = tl.load(weight_ptr + row * stride_wn + offs_k.to(tl.int64) * stride_wk, mask=mask, other=0.0)
        dgamma += tl.sum(grad * weight.to(tl.float32), 0)
        tl.store(dweight_ptr + row * K + offs_k, (grad * gamma).to(dweight_ptr.dtype.element_ty), mask=mask)
    if bias_ptr is not None:
        grad_bias = tl.sum(tl.load(bias_parts_ptr + row + offs_p * N), 0)
        dgamma += grad_bias * tl.load(bias_ptr + row).to(tl.float32)
        tl.store(dbias_ptr + row, (grad_bias * gamma).to(dbias_ptr.dtype.element_ty))
    tl.store(dlayer_scale_ptr + row, dgamma.to(dlayer_scale_ptr.dtype.element_ty))


def layer_scale_bwd(
    parts: torch.Tensor, bias_parts: torch.Tensor | None, scaled: Scaled
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """dweight (N, K), dbias (N,) and dgamma (N,) of float32 parts (P, N, K) and (P, N) that add up to G and g, P a
    power of two."""
    layer_scale, weight, bias = scaled
    n_parts, n, k = parts.shape
    dweight = weight.new_empty(n, k)
    dbias = None if bias is None else bias.new_empty(n)
    dlayer_scale = layer_scale.new_empty(n)
    config = pick_layer_scale_bwd(k, architecture(parts.device))
    launch(
        layer_scale_bwd_kernel,
        (n,),
        parts,
        parts_ptr=parts,
        bias_parts_ptr=bias_parts,
        layer_scale_ptr=layer_scale.contiguous(),
        weight_ptr=weight,
        bias_ptr=None if bias is None else bias.contiguous(),
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        dlayer_scale_ptr=dlayer_scale,
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        N=n,
        K=k,
        PARTS=n_parts,
        BLOCK_K=config.cols,
        num_warps=config.num_warps,
    )
    return dweight, dbias, dlayer_scale
