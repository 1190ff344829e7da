"""Linear layers of a Vision Transformer: GEMMs with fused epilogues.

Forward, for tokens x (M, K) and nn.Linear's weight (N, K):

    z = x @ weight.T + bias                    y = s * gamma * dropout(act(z)) + residual

gamma is LayerScale's factor per column (Touvron et al. 2021, arXiv:2103.17239) and s the stochastic depth factor per
sample (Huang et al. 2016, arXiv:1603.09382); both require that act is the identity. Backward, with D the dropout scale
(0 or 1 / (1 - p)) of each element and `*` elementwise:

    dz = s * gamma * D * dy * act'(z)     dx = dz @ weight     dweight = dz.T @ x     dbias = dz.sum(0)

The gradient of gamma sums s * D * dy * z over the tokens, but z is not saved. Because z is linear in x, that sum
follows from the weight's gradient without gamma, for every gamma including 0: with G = (s * D * dy).T @ x and g = (s *
D * dy).sum(0),

    dweight = gamma * G     dbias = gamma * g     dgamma = (weight * G).sum(1) + bias * g

An MLP is y = dropout(f(z)) + residual with z = x @ w1.T + b1, f(z) = dropout(act(z)) @ w2.T + b2. Only the
pre-activation z is saved, in the weight's dtype. `linear_bwd_input` of the second layer multiplies its result by
act'(z) and the hidden dropout in the epilogue, and stores dropout(act(z)) again for the weight's gradient.
(`linear_bwd_weight` loads z once per tile; recomputing the activation there would stall the matrix units.) The forward
pass applies the activation to z *rounded* to that dtype, so the recomputed activation is identical bit for bit. GELU:
Hendrycks & Gimpel (2016, arXiv:1606.08415).

No kernel uses atomics: the sum over tokens in `dweight` uses split-K, and the partial sums are added in a fixed order.

With `VendorGemm`, the vendor's library computes the GEMM (and on GPUs adds the bias), and the same kernels apply the
epilogue in one pass over its result, which is rounded to the weight's dtype: one rounding more than in the fused
kernel. Factors in front of a GEMM (s and gamma of dy) take a separate pass with its own memory, rounded as in the fused
kernel; the dropout masks are the same.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from vit_triton.arguments import NO_BRANCH, NO_DROPOUT, Branch, Dropout, Rotation
from vit_triton.kernels.attention.rotary import rotate_packed, rotate_tile, table_arguments
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import contiguous, descriptors, input_precision, launch
from vit_triton.kernels.linear.config import Epilogue, GemmConfig, VendorGemm, pick_linear_fwd
from vit_triton.kernels.linear.elements import dropout_scale, offsets, rows_per_sample_of, sample_scale, within
from vit_triton.kernels.linear.pack import pack_once
from vit_triton.kernels.picker import cdiv, next_power_of_2
from vit_triton.kernels.target import Target
from vit_triton.kernels.tiles import activate, columns_of, grouped_tile


@triton.jit
def fma(x, factor, y):
    """x * factor + y with one rounding; ``factor`` broadcasts. Of an expression, the tile would decide."""
    return tl.fma(x, tl.broadcast_to(factor, x.shape), y)


@triton.jit(do_not_specialize=["M"])
def linear_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, layer_scale_ptr, samples_ptr, residual_ptr, y_ptr, pre_ptr, seed_ptr,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_rm, stride_rn,
    M, N, K, rows_per_sample, dropout_p, keep_scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WORD: tl.constexpr,
    SUBTILES: tl.constexpr, MULTIPLIED: tl.constexpr = False,
    cos_ptr=None, sin_ptr=None, stride_cosb=None, stride_cosn=None, n_tokens=None, n_prefix=None,
    HALF: tl.constexpr = 0, PAIRS: tl.constexpr = "", FULL: tl.constexpr = False,
    x_desc=None, w_desc=None, y_desc=None, pre_desc=None,
):  # fmt: skip
    """x_desc, w_desc: descriptors of x_ptr and weight_ptr, both or none, read instead of the pointers. y_desc,
    pre_desc: likewise written, in one epilogue subtile.

    WORD: 0, or weight_ptr holds the panels of `pack_weight`, BLOCK_N columns of WORD values along K each.
    MULTIPLIED: x_ptr holds the result of the GEMM, and only the dtype of the weight is used. HALF: not 0 if q and k of
    a packed projection, the first two thirds of the columns, are rotated, see :mod:`.attention.rotary`."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offsets(offs_m, stride_xm, offs_k, stride_xk)  # [BLOCK_M, BLOCK_K]
    step_x = tl.full([], BLOCK_K, tl.int64) * stride_xk
    if WORD:
        along_k = offs_k // WORD * (BLOCK_N * WORD) + offs_k % WORD
        panel_ptr = weight_ptr + pid_n.to(tl.int64) * stride_wn
        w_ptrs = panel_ptr + tl.arange(0, BLOCK_N)[:, None] * WORD + along_k[None, :]  # [BLOCK_N, BLOCK_K]
        step_w = tl.full([], BLOCK_K * BLOCK_N, tl.int64)
    else:
        w_ptrs = weight_ptr + offsets(offs_n, stride_wn, offs_k, stride_wk)  # [BLOCK_N, BLOCK_K]
        step_w = tl.full([], BLOCK_K, tl.int64) * stride_wk

    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, 0 if MULTIPLIED else K, BLOCK_K):
        if x_desc is not None:
            x = x_desc.load([pid_m * BLOCK_M, k])  # zeros out of bounds
        else:
            x = tl.load(x_ptrs, mask=within(offs_m, M, offs_k, K - k, EVEN_K), other=0.0)  # [BLOCK_M, BLOCK_K]
        if w_desc is not None:
            w = w_desc.load([pid_n * BLOCK_N, k])
        elif not WORD:
            w = tl.load(w_ptrs, mask=within(offs_n, N, offs_k, K - k, EVEN_K), other=0.0)  # [BLOCK_N, BLOCK_K]
        elif EVEN_K:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(offs_k < K - k)[None, :], other=0.0)
        product = tl.dot(x.to(dtype), tl.trans(w), product, input_precision=PRECISION)
        x_ptrs += step_x
        w_ptrs += step_w

    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    for subtile in tl.static_range(SUBTILES):  # the epilogue's loads take the registers of one subtile
        offs_n = pid_n * BLOCK_N + subtile * WIDTH + tl.arange(0, WIDTH)
        z = columns_of(product, subtile, SUBTILES)  # [BLOCK_M, WIDTH]
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        if MULTIPLIED:
            z = tl.load(x_ptr + offsets(offs_m, stride_xm, offs_n, stride_xk), mask=mask, other=0.0).to(tl.float32)
        y_offs = offsets(offs_m, N, offs_n, 1)  # outputs are contiguous
        if bias_ptr is not None:
            z += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        if HALF > 0:
            if 3 * (pid_n * BLOCK_N + subtile * WIDTH) < 2 * N:
                z = rotate_tile(
                    z, offs_m, (offs_m < M)[:, None], cos_ptr, sin_ptr, stride_cosb, stride_cosn, n_tokens, n_prefix,
                    HALF, PAIRS, FULL,
                )  # fmt: skip
        if pre_ptr is not None:
            if pre_desc is not None:
                pre_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], z.to(dtype))
            else:
                tl.store(pre_ptr + y_offs, z.to(dtype), mask=mask)
        if ACTIVATION != "none":
            z = activate(z.to(dtype).to(tl.float32), ACTIVATION, dtype == tl.float32)
        if DROPOUT:
            z *= dropout_scale(seed_ptr, offs_m, offs_n, dropout_p, keep_scale)
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + offsets(offs_m, stride_rm, offs_n, stride_rn)
            residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        else:
            residual = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        if samples_ptr is not None and layer_scale_ptr is not None:
            z *= tl.load(layer_scale_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        if samples_ptr is not None:
            z = fma(z, sample_scale(samples_ptr, offs_m, M, rows_per_sample)[:, None], residual)
        elif layer_scale_ptr is not None:
            z = fma(z, tl.load(layer_scale_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :], residual)
        elif residual_ptr is not None:
            z += residual
        if y_desc is not None:
            y_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], z.to(y_ptr.dtype.element_ty))
        else:
            tl.store(y_ptr + y_offs, z.to(y_ptr.dtype.element_ty), mask=mask)


def linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    *,
    branch: Branch = NO_BRANCH,
    dropout: Dropout = NO_DROPOUT,
    activation: str = "none",
    save_pre: bool = False,
    panels: torch.Tensor | None = None,
    multiplied: bool = False,
    rotation: Rotation | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y = s * gamma * dropout(act(x @ weight.T + bias)) + residual, and z = x @ weight.T + bias with ``save_pre``, else
    None.

    x (M, K), weight (N, K), bias (N,), residual (M, N), ``branch`` (gamma, s) -> y (M, N) in :func:`output_dtype`, z
    (M, N) in the weight's dtype. ``panels``: the weight packed by `pack_weight`, read instead of ``weight``.
    ``multiplied``: x (M, N) is the result of the GEMM, and only shape and dtype of the weight are used. ``rotation``:
    y is a packed projection, and q and k of it are rotated, in the epilogue if the tile allows it; excludes every
    other epilogue.
    """
    (m, k), n = x.shape, weight.shape[0]
    dtype = output_dtype(weight, residual, branch.layer_scale)
    target = target_of(x.device)
    precision = input_precision(weight.dtype, target)
    epilogue = Epilogue.of(
        elementwise=activation != "none" or residual is not None,
        branch=branch.scales,
        dropout=dropout.p > 0,
    )
    if rotation is not None:
        epilogue = Epilogue.ROTATION
    config = pick_linear_fwd(m, n, k, weight.dtype, target, precision, epilogue)
    optional: dict[str, Any] = {}
    if rotation is not None:
        if not _rotates_in_epilogue(rotation, n, config, target):
            qkv, _ = linear_fwd(x, weight, bias, panels=panels)
            rotate_packed(qkv, rotation)
            return qkv, None
        optional = table_arguments(rotation.cos, rotation.sin, n // (3 * rotation.heads))
        del optional["stride_cosh"]
        pairs = "split" if rotation.interleaved else "half"
        optional |= dict(PAIRS=pairs, n_tokens=rotation.tokens, n_prefix=rotation.prefix)
    y = pre = None
    if isinstance(config, VendorGemm) and not multiplied:
        x, vector = x.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
        plain = epilogue is Epilogue.NONE and not save_pre and dtype == weight.dtype
        tanh = activation == "gelu_tanh" and epilogue is Epilogue.ELEMENTWISE and residual is None and not save_pre
        if vector is not None and tanh and x.is_cuda and target.is_nvidia:
            return torch._addmm_activation(vector, x, weight.T, use_gelu=True), None  # the tanh form on CUDA only
        if vector is not None and (plain or target.is_gpu):  # GPU libraries add the bias in the epilogue of the GEMM
            x, bias = torch.addmm(vector, x, weight.T), None
        else:
            x = torch.mm(x, weight.T)
        if plain:
            return x, None
        multiplied = True
        # the epilogue overwrites the product, except the pre-activation, which is the product and its bias
        pre, y = (x, None) if save_pre else (None, x if dtype == x.dtype else None)
    if y is None:
        y = x.new_empty(m, n, dtype=dtype)
    if pre is None and save_pre:
        pre = x.new_empty(m, n, dtype=weight.dtype)
    if multiplied:
        config, panels = VendorGemm(), None
    elif panels is None:
        panels = pack_once(weight, m, config.block_m, target)
    if panels is not None:
        config = replace(config, block_n=panels.shape[2])
    if config.descriptors and not multiplied and panels is None:
        block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
        optional["x_desc"], optional["w_desc"] = descriptors(x, weight, [block_m, block_k], [block_n, block_k])
        if config.subtiles == 1:  # with more subtiles the store takes as long or longer (benchmarks codegen)
            block = [block_m, block_n]
            y_desc, pre_desc = descriptors(y, y if pre is None else pre, block, block)
            optional |= dict(y_desc=y_desc, pre_desc=None if pre is None else pre_desc)
    launch(
        linear_fwd_kernel,
        (cdiv(m, config.block_m) * cdiv(n, config.block_n),),
        x,
        x_ptr=x,
        weight_ptr=weight if panels is None else panels,
        bias_ptr=contiguous(bias),
        layer_scale_ptr=contiguous(branch.layer_scale),
        samples_ptr=branch.samples,
        residual_ptr=residual,
        y_ptr=y,
        pre_ptr=None if pre is x and bias is None else pre,
        seed_ptr=dropout.seed if dropout.p > 0 else None,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_wn=weight.stride(0) if panels is None else panels.stride(0),
        stride_wk=weight.stride(1),
        stride_rm=0 if residual is None else residual.stride(0),
        stride_rn=0 if residual is None else residual.stride(1),
        M=m,
        N=n,
        K=k,
        rows_per_sample=rows_per_sample_of(m, branch),
        dropout_p=dropout.p,
        keep_scale=dropout.scale,
        ACTIVATION=activation,
        DROPOUT=dropout.p > 0,
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        WORD=0 if panels is None else panels.shape[3],
        SUBTILES=config.subtiles,
        MULTIPLIED=multiplied,
        **optional,
        **config.options,
    )
    return y, pre


def _rotates_in_epilogue(rotation: Rotation, n: int, config: GemmConfig, target: Target) -> bool:
    """Whether an epilogue subtile holds whole heads, of q and k or of v, that share tables which fit in registers."""
    if not target.is_gpu or isinstance(config, VendorGemm):
        return False
    cos, columns = rotation.cos, rotation.cos.shape[-1]
    head_dim, width = n // (3 * rotation.heads), config.block_n // config.subtiles
    # an angle per channel spills in float32, and with interleaved pairs (benchmarks codegen)
    light = 2 * columns == head_dim or columns == head_dim and cos.element_size() == 2 and not rotation.interleaved
    shared = cos.ndim == 2 or cos.shape[1] == 1
    whole = head_dim == next_power_of_2(head_dim) and width % head_dim == 0 and 2 * n // 3 % width == 0
    return light and shared and whole


def output_dtype(weight: torch.Tensor, residual: torch.Tensor | None, layer_scale: torch.Tensor | None) -> torch.dtype:
    """The dtype of the residual, else of the weight; float32 if LayerScale has another dtype, which happens under
    autocast."""
    dtype = (weight if residual is None else residual).dtype
    return dtype if layer_scale is None or layer_scale.dtype == dtype else torch.float32
