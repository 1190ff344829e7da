"""The backward pass of a linear layer; the maths is in :mod:`.forward`."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from vit_triton.arguments import NO_BRANCH, NO_DROPOUT, Branch, Dropout
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import TRITON_DTYPE, contiguous, descriptors, input_precision, launch
from vit_triton.kernels.linear.config import (
    Epilogue,
    VendorGemm,
    pick_layer_scale_bwd,
    pick_linear_bwd_input,
    pick_linear_bwd_weight,
)
from vit_triton.kernels.linear.elements import dropout_scale, offsets, rows_per_sample_of, sample_scale, within
from vit_triton.kernels.linear.forward import linear_fwd
from vit_triton.kernels.linear.pack import pack_once
from vit_triton.kernels.picker import cdiv, next_power_of_2
from vit_triton.kernels.sums.sum_parts import add_partials, new_partials, sum_pair, sum_parts
from vit_triton.kernels.tiles import activate, activate_grad, columns_of, grouped_tile

# --- backward: the input -----------------------------------------------------------------------------------


def _scaled(
    x: torch.Tensor, dtype: torch.dtype, *, branch: Branch = NO_BRANCH, dropout: Dropout = NO_DROPOUT
) -> torch.Tensor:
    """s * gamma * dropout(x) for x (M, N), in ``dtype``; without scales and dropout, x in ``dtype``."""
    if not branch.scales and dropout.p == 0:
        return x.to(dtype)
    weight = x.new_empty(x.shape[1], 0, dtype=dtype)
    y, _ = linear_fwd(x, weight, None, branch=branch, dropout=dropout, multiplied=True)
    return y.to(dtype)


def dropout_bwd(dy: torch.Tensor, dtype: torch.dtype, dropout: Dropout) -> torch.Tensor:
    """D * dy (M, N) in ``dtype`` for the dropout after a layer; dy itself if p is 0. A separate pass, because the GEMMs
    of the backward pass read dy several times and would recompute D each time."""
    return dy if dropout.p == 0 else _scaled(dy, dtype, dropout=dropout)


@triton.jit(do_not_specialize=["M"])
def linear_bwd_input_kernel(
    dy_ptr, weight_ptr, layer_scale_ptr, samples_ptr, pre_ptr, dx_ptr, hidden_ptr, seed_ptr,
    stride_dym, stride_dyn, stride_wn, stride_wk, stride_pm, stride_pk,
    M, N, K, rows_per_sample, dropout_p, keep_scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SUBTILES: tl.constexpr,
    MULTIPLIED: tl.constexpr = False, PACKED: tl.constexpr = False, dy_desc=None, w_desc=None,
):  # fmt: skip
    """dy_desc, w_desc: descriptors of dy_ptr and weight_ptr, both or none, read instead of the pointers.

    PACKED: weight_ptr holds the panels of `pack_weight` of the transposed weight, BLOCK_K columns each. MULTIPLIED:
    dy_ptr holds the result of the GEMM, and only the dtype of the weight is used."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    pid_m, pid_k = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    dy_ptrs = dy_ptr + offsets(offs_m, stride_dym, offs_n, stride_dyn)  # [BLOCK_M, BLOCK_N]
    step_dy = tl.full([], BLOCK_N, tl.int64) * stride_dyn
    if PACKED:
        panel_ptr = weight_ptr + pid_k.to(tl.int64) * stride_wk
        w_ptrs = panel_ptr + offs_n[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # [BLOCK_N, BLOCK_K]
        step_w = tl.full([], BLOCK_N * BLOCK_K, tl.int64)
    else:
        w_ptrs = weight_ptr + offsets(offs_n, stride_wn, offs_k, stride_wk)  # [BLOCK_N, BLOCK_K]
        step_w = tl.full([], BLOCK_N, tl.int64) * stride_wn

    product = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for n in range(0, 0 if MULTIPLIED else N, BLOCK_N):
        if dy_desc is not None:
            dy = dy_desc.load([pid_m * BLOCK_M, n])  # zeros out of bounds
        else:
            dy = tl.load(dy_ptrs, mask=within(offs_m, M, offs_n, N - n, EVEN_N), other=0.0)  # [BLOCK_M, BLOCK_N]
        if w_desc is not None:
            w = w_desc.load([n, pid_k * BLOCK_K])
        elif PACKED:
            w = tl.load(w_ptrs, mask=(offs_n < N - n)[:, None], other=0.0)  # [BLOCK_N, BLOCK_K]
        elif EVEN_N:
            w = tl.load(w_ptrs, mask=(offs_k < K)[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        else:
            w = tl.load(w_ptrs, mask=within(offs_n, N - n, offs_k, K, False), other=0.0)  # [BLOCK_N, BLOCK_K]
        if layer_scale_ptr is not None:
            gamma = tl.load(layer_scale_ptr + n + offs_n, mask=offs_n < N - n, other=0.0)  # [BLOCK_N]
            dy = dy.to(tl.float32) * gamma.to(tl.float32)[None, :]
        product = tl.dot(dy.to(dtype), w, product, input_precision=PRECISION)
        dy_ptrs += step_dy
        w_ptrs += step_w

    WIDTH: tl.constexpr = BLOCK_K // SUBTILES
    for subtile in tl.static_range(SUBTILES):
        offs_k = pid_k * BLOCK_K + subtile * WIDTH + tl.arange(0, WIDTH)
        dx = columns_of(product, subtile, SUBTILES)  # [BLOCK_M, WIDTH]
        mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        if MULTIPLIED:
            dx = tl.load(dy_ptr + offsets(offs_m, stride_dym, offs_k, stride_dyn), mask=mask, other=0.0).to(tl.float32)
        if samples_ptr is not None:
            dx *= sample_scale(samples_ptr, offs_m, M, rows_per_sample)[:, None]
        dx_offs = offsets(offs_m, K, offs_k, 1)  # outputs are contiguous
        if pre_ptr is not None:
            pre_ptrs = pre_ptr + offsets(offs_m, stride_pm, offs_k, stride_pk)
            pre = tl.load(pre_ptrs, mask=mask, other=0.0).to(tl.float32)
            dx *= activate_grad(pre, ACTIVATION, dtype == tl.float32)
            hidden = activate(pre, ACTIVATION, dtype == tl.float32)
            if DROPOUT:
                scale = dropout_scale(seed_ptr, offs_m, offs_k, dropout_p, keep_scale)
                dx *= scale
                hidden *= scale
            if hidden_ptr is not None:
                tl.store(hidden_ptr + dx_offs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + dx_offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def linear_bwd_input(
    dy: torch.Tensor,
    weight: torch.Tensor,
    pre: torch.Tensor | None = None,
    *,
    branch: Branch = NO_BRANCH,
    dropout: Dropout = NO_DROPOUT,
    activation: str = "none",
    with_hidden: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx = (s * gamma * dy) @ weight, multiplied by D * act'(pre) if the pre-activation ``pre`` of the input is given.

    dy (M, N) with any strides, weight (N, K), pre (M, K) -> dx (M, K) in the weight's dtype, and ``with_hidden`` D *
    act(pre) (M, K), the input of the weight's gradient, else None. ``dropout`` is the dropout D before this layer;
    `dropout_bwd` handles the dropout after it.
    """
    (m, n), k = dy.shape, weight.shape[1]
    target = target_of(dy.device)
    precision = input_precision(weight.dtype, target)
    epilogue = Epilogue.of(elementwise=pre is not None, branch=branch.scales, dropout=dropout.p > 0)
    config = pick_linear_bwd_input(m, n, k, weight.dtype, target, precision, epilogue)
    multiplied = isinstance(config, VendorGemm)
    if multiplied:
        dy = torch.mm(_scaled(dy, weight.dtype, branch=branch._replace(samples=None)), weight)
        if pre is None and branch.samples is None:
            return dy, None
        dx = dy  # the epilogue overwrites the product
    else:
        dx = dy.new_empty(m, k, dtype=weight.dtype)
    hidden = torch.empty_like(dx) if with_hidden else None
    panels = None if multiplied else pack_once(weight.T, m, config.block_m, target)
    if panels is not None:
        config = replace(config, block_n=panels.shape[2])
    optional = {}
    if config.descriptors and not multiplied and panels is None:
        block_m, block_k, block_n = config.block_m, config.block_n, config.block_k
        dy_desc, w_desc = descriptors(dy, weight, [block_m, block_n], [block_n, block_k])
        optional = dict(dy_desc=dy_desc, w_desc=w_desc)
    launch(
        linear_bwd_input_kernel,
        (cdiv(m, config.block_m) * cdiv(k, config.block_n),),
        dy,
        dy_ptr=dy,
        weight_ptr=weight if panels is None else panels,
        layer_scale_ptr=contiguous(branch.layer_scale),
        samples_ptr=branch.samples,
        pre_ptr=pre,
        dx_ptr=dx,
        hidden_ptr=hidden,
        seed_ptr=dropout.seed if dropout.p > 0 else None,
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1) if panels is None else panels.stride(0),
        stride_pm=0 if pre is None else pre.stride(0),
        stride_pk=0 if pre is None else pre.stride(1),
        M=m,
        N=n,
        K=k,
        rows_per_sample=rows_per_sample_of(m, branch),
        dropout_p=dropout.p,
        keep_scale=dropout.scale,
        ACTIVATION=activation,
        DROPOUT=dropout.p > 0,
        EVEN_N=n % config.block_k == 0,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_n,
        BLOCK_N=config.block_k,
        GROUP=config.group,
        SUBTILES=config.subtiles,
        MULTIPLIED=multiplied,
        PACKED=panels is not None,
        **optional,
        **config.options,
    )
    return dx, hidden


# --- backward: the weight and the bias ---------------------------------------------------------------------


@triton.jit
def _sum_rows(
    dy_ptr, samples_ptr, first, stop, offs_n, stride_dym, stride_dyn, M, N, rows_per_sample,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sum of the rows first ... stop of s * dy, rounded as for the product -> [BLOCK_N]."""
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for m in range(first, stop, ROWS):
        offs_m = m + tl.arange(0, ROWS)
        dy_ptrs = dy_ptr + offsets(offs_m, stride_dym, offs_n, stride_dyn)  # [ROWS, BLOCK_N]
        mask = (offs_m < stop)[:, None] & (offs_n < N)[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0)
        if samples_ptr is not None:
            dy = dy.to(tl.float32) * sample_scale(samples_ptr, offs_m, M, rows_per_sample)[:, None]
        total += dy.to(DTYPE).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["M", "n_splits"])
def linear_bwd_weight_kernel(
    dy_ptr, samples_ptr, x_ptr, dweight_partials_ptr, dbias_partials_ptr,
    stride_dym, stride_dyn, stride_xm, stride_xk,
    M, N, K, n_splits, rows_per_sample,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, SUMMED_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
    dy_desc=None, x_desc=None,
):  # fmt: skip
    """dy_desc, x_desc: descriptors of dy_ptr and x_ptr, both or none, read instead of the pointers."""
    num_n = tl.cdiv(N, BLOCK_N)
    num_k = tl.cdiv(K, BLOCK_K)
    split = tl.program_id(0) // (num_n * num_k)
    pid_n, pid_k = grouped_tile(tl.program_id(0) % (num_n * num_k), num_n, num_k, GROUP)
    rows = tl.cdiv(tl.cdiv(M, BLOCK_M), n_splits) * BLOCK_M  # tokens of each partial sum
    start = split * rows
    stop = min(start + rows, M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if dbias_partials_ptr is not None:
        # Each of the num_k programs that read the same rows of dy sums a part of them first. The registers of a sum in
        # the loop would limit the tile
        part = tl.cdiv(rows // BLOCK_M, num_k) * BLOCK_M
        first = start + pid_k * part
        dbias = _sum_rows(
            dy_ptr, samples_ptr, first, min(first + part, stop), offs_n, stride_dym, stride_dyn, M, N, rows_per_sample,
            DTYPE, BLOCK_N, SUMMED_ROWS,
        )  # fmt: skip
        dbias = dbias.to(dbias_partials_ptr.dtype.element_ty)
        row = (split * num_k + pid_k).to(tl.int64)
        tl.store(dbias_partials_ptr + row * N + offs_n, dbias, mask=offs_n < N)

    offs_m = start + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    dy_ptrs = dy_ptr + offsets(offs_n, stride_dyn, offs_m, stride_dym)  # [BLOCK_N, BLOCK_M]: dy transposed
    x_ptrs = x_ptr + offsets(offs_m, stride_xm, offs_k, stride_xk)  # [BLOCK_M, BLOCK_K]
    step_dy = tl.full([], BLOCK_M, tl.int64) * stride_dym
    step_x = tl.full([], BLOCK_M, tl.int64) * stride_xm

    dw = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for m in range(start, stop, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        if dy_desc is not None:
            dy = tl.trans(dy_desc.load([m, pid_n * BLOCK_N]))  # zeros out of bounds
        else:
            dy = tl.load(dy_ptrs, mask=within(offs_n, N, offs_m, M, False), other=0.0)  # [BLOCK_N, BLOCK_M]
        if x_desc is not None:
            x = x_desc.load([m, pid_k * BLOCK_K])
        else:
            x = tl.load(x_ptrs, mask=within(offs_m, M, offs_k, K, False), other=0.0)  # [BLOCK_M, BLOCK_K]
        if samples_ptr is not None:
            dy = dy.to(tl.float32) * sample_scale(samples_ptr, offs_m, M, rows_per_sample)[None, :]
        dw = tl.dot(dy.to(DTYPE), x.to(DTYPE), dw, input_precision=PRECISION)
        dy_ptrs += step_dy
        x_ptrs += step_x

    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    dw_ptrs = dweight_partials_ptr + split.to(tl.int64) * N * K + offsets(offs_n, K, offs_k, 1)  # stacked along N
    tl.store(dw_ptrs, dw.to(dweight_partials_ptr.dtype.element_ty), mask=mask)


def linear_bwd_weight(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    branch: Branch = NO_BRANCH,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dweight = (s * dy).T @ x, dbias = (s * dy).sum(0) with ``with_bias``, else None, and dgamma = None. With
    LayerScale after the layer, dweight and dbias are multiplied by gamma, and dgamma is the gradient of gamma.

    dy (M, N) with any strides, x (M, K), weight (N, K), bias (N,) -> dweight (N, K), dbias (N,) in the weight's dtype,
    dgamma (N,) in gamma's dtype. Without LayerScale only the dtype of the weight is used and the bias is not read; with
    LayerScale, a bias requires ``with_bias``. `dropout_bwd` handles the dropout.
    """
    layer_scale, samples = branch
    dtype = weight.dtype
    (m, n), k = dy.shape, x.shape[1]
    target = target_of(dy.device)
    precision = input_precision(dtype, target)
    epilogue = Epilogue.NONE if samples is None else Epilogue.BRANCH
    config = pick_linear_bwd_weight(m, n, k, dtype, target, precision, epilogue)
    if isinstance(config, VendorGemm):
        dy = _scaled(dy, dtype, branch=Branch(samples=samples))
        dweight = torch.mm(dy.T, x.to(dtype))
        dbias = torch.sum(dy, 0, dtype=torch.float32) if with_bias else None
        if layer_scale is not None:
            bias_partials = None if dbias is None else dbias[None]
            return layer_scale_bwd(dweight.float()[None], bias_partials, layer_scale, weight, bias)
        return dweight, None if dbias is None else dbias.to(dtype), None
    sum_dtype = dtype if layer_scale is None else torch.float32  # scaling by gamma is in float32
    dweight_partials = new_partials(dy, config.split, n, k, dtype=sum_dtype)
    dbias_partials = None
    if with_bias:
        dbias_partials = new_partials(dy, config.split * cdiv(k, config.block_n), n, dtype=sum_dtype)
    optional = {}
    if config.descriptors:
        block_n, block_k, block_m = config.block_m, config.block_n, config.block_k
        dy_desc, x_desc = descriptors(dy, x, [block_m, block_n], [block_m, block_k])
        optional = dict(dy_desc=dy_desc, x_desc=x_desc)
    launch(
        linear_bwd_weight_kernel,
        (cdiv(n, config.block_m) * cdiv(k, config.block_n) * config.split,),
        dy,
        dy_ptr=dy,
        samples_ptr=samples,
        x_ptr=x,
        dweight_partials_ptr=dweight_partials,
        dbias_partials_ptr=dbias_partials,
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        M=m,
        N=n,
        K=k,
        n_splits=config.split,
        rows_per_sample=rows_per_sample_of(m, branch),
        DTYPE=TRITON_DTYPE[dtype],
        PRECISION=precision,
        # 16 rows stay in a CPU's L1 cache; NumPy, in the interpreter, adds the rows of a tile one after the other
        SUMMED_ROWS=config.block_k if target.is_gpu else 16,
        BLOCK_N=config.block_m,
        BLOCK_K=config.block_n,
        BLOCK_M=config.block_k,
        GROUP=config.group,
        **optional,
        **config.options,
    )
    if layer_scale is not None:
        return layer_scale_bwd(dweight_partials, dbias_partials, layer_scale, weight, bias)
    if dbias_partials is None:
        return sum_parts(dweight_partials, dtype), None, None
    return *sum_pair(dweight_partials, dbias_partials, dtype), None


# --- backward: LayerScale ----------------------------------------------------------------------------------


@triton.jit
def layer_scale_bwd_kernel(
    dweight_partials_ptr, dbias_partials_ptr, layer_scale_ptr, weight_ptr, bias_ptr,
    dweight_ptr, dbias_ptr, dlayer_scale_ptr,
    stride_p, stride_wn, stride_wk, N, K,
    PARTIALS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    BIAS_PARTIALS: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One row of dweight, dbias and dgamma; sums the split-K partials itself, which saves a pass."""
    row = tl.program_id(0).to(tl.int64)
    gamma = tl.load(layer_scale_ptr + row).to(tl.float32)
    dgamma = tl.full([], 0.0, tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask = offs_k < K
        grad = add_partials(dweight_partials_ptr + row * K, 0, PARTIALS, stride_p, offs_k, mask, BLOCK_P)  # [BLOCK_K]
        weight = tl.load(weight_ptr + row * stride_wn + offs_k.to(tl.int64) * stride_wk, mask=mask, other=0.0)
        dgamma += tl.sum(grad * weight.to(tl.float32), 0)
        tl.store(dweight_ptr + row * K + offs_k, (grad * gamma).to(dweight_ptr.dtype.element_ty), mask=mask)
    if bias_ptr is not None:
        offs_b = tl.arange(0, BLOCK_B)
        grad_bias = tl.sum(tl.load(dbias_partials_ptr + offs_b * N + row, mask=offs_b < BIAS_PARTIALS, other=0.0), 0)
        dgamma += grad_bias * tl.load(bias_ptr + row).to(tl.float32)
        tl.store(dbias_ptr + row, (grad_bias * gamma).to(dbias_ptr.dtype.element_ty))
    tl.store(dlayer_scale_ptr + row, dgamma.to(dlayer_scale_ptr.dtype.element_ty))


def layer_scale_bwd(
    dweight_partials: torch.Tensor,
    dbias_partials: torch.Tensor | None,
    layer_scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """dweight (N, K), dbias (N,) and dgamma (N,) from float32 partials (P, N, K) of G and (Q, N) of g."""
    n_partials, n, k = dweight_partials.shape
    n_bias_partials = 0 if dbias_partials is None else len(dbias_partials)
    dweight = weight.new_empty(n, k)
    dbias = None if bias is None else bias.new_empty(n)
    dlayer_scale = layer_scale.new_empty(n)
    config = pick_layer_scale_bwd(k, target_of(dweight_partials.device))
    launch(
        layer_scale_bwd_kernel,
        (n,),
        dweight_partials,
        dweight_partials_ptr=dweight_partials,
        dbias_partials_ptr=dbias_partials,
        layer_scale_ptr=layer_scale.contiguous(),
        weight_ptr=weight,
        bias_ptr=contiguous(bias),
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        dlayer_scale_ptr=dlayer_scale,
        stride_p=dweight_partials.stride(0),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        N=n,
        K=k,
        PARTIALS=n_partials,
        BLOCK_P=next_power_of_2(n_partials),
        BLOCK_K=config.block_n,
        BIAS_PARTIALS=n_bias_partials,
        BLOCK_B=next_power_of_2(n_bias_partials),
        num_warps=config.num_warps,
    )
    return dweight, dbias, dlayer_scale
