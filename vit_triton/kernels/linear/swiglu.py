"""SwiGLU (Shazeer 2020, arXiv:2002.05202), the gated activation of an MLP.

    h = silu(g) * u * D        g and u are the two halves of the columns of the first GEMM, D is the dropout scale

It is a separate kernel between the two GEMMs: an epilogue would need two accumulators, one for g and one for u, in the
registers of one program. The cost is one additional read of g and u. The backward pass saves g and u and recomputes h,
with s = sigmoid(g):

    du = dh * D * g * s              dg = dh * D * u * s * (1 + g * (1 - s))
"""

import torch
import triton
import triton.language as tl

from vit_triton.arguments import Dropout
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import launch
from vit_triton.kernels.linear.config import pick_swiglu
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.tiles import activate, activate_grad, dropout_keep


@triton.jit(do_not_specialize=["M"])
def swiglu_fwd_kernel(
    pre_ptr, hidden_ptr, seed_ptr, M, H, dropout_p, keep_scale,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    num_h = tl.cdiv(H, BLOCK_H)
    offs_m = tl.program_id(0) // num_h * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tl.program_id(0) % num_h * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (offs_m < M)[:, None] & (offs_h < H)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    gate_ptrs = pre_ptr + rows * (2 * H) + offs_h[None, :]  # [BLOCK_M, BLOCK_H]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(gate_ptrs + H, mask=mask, other=0.0).to(tl.float32)
    hidden = activate(gate, "silu", True) * value
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), offs_m, offs_h, 0, dropout_p)
        hidden *= tl.where(keep, keep_scale, 0.0)
    tl.store(hidden_ptr + rows * H + offs_h[None, :], hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


def swiglu_fwd(pre: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """Contiguous [g, u] (M, 2 H) -> h (M, H) in the same dtype."""
    m, h = pre.shape[0], pre.shape[1] // 2
    hidden = pre.new_empty(m, h)
    _launch(swiglu_fwd_kernel, pre, h, dropout, pre_ptr=pre, hidden_ptr=hidden)
    return hidden


@triton.jit(do_not_specialize=["M"])
def swiglu_bwd_kernel(
    dhidden_ptr, pre_ptr, dpre_ptr, hidden_ptr, seed_ptr, M, H, dropout_p, keep_scale,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    num_h = tl.cdiv(H, BLOCK_H)
    offs_m = tl.program_id(0) // num_h * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tl.program_id(0) % num_h * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (offs_m < M)[:, None] & (offs_h < H)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    offs = rows * H + offs_h[None, :]  # [BLOCK_M, BLOCK_H]
    offs_gate = rows * (2 * H) + offs_h[None, :]
    dhidden = tl.load(dhidden_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(pre_ptr + offs_gate, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(pre_ptr + offs_gate + H, mask=mask, other=0.0).to(tl.float32)
    silu = activate(gate, "silu", True)
    hidden = silu * value
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), offs_m, offs_h, 0, dropout_p)
        scale = tl.where(keep, keep_scale, 0.0)
        hidden *= scale
        dhidden *= scale
    dgate = dhidden * value * activate_grad(gate, "silu", True)
    tl.store(dpre_ptr + offs_gate, dgate.to(dpre_ptr.dtype.element_ty), mask=mask)
    tl.store(dpre_ptr + offs_gate + H, (dhidden * silu).to(dpre_ptr.dtype.element_ty), mask=mask)
    if hidden_ptr is not None:
        tl.store(hidden_ptr + offs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


def swiglu_bwd(
    dhidden: torch.Tensor, pre: torch.Tensor, dropout: Dropout, *, with_hidden: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Contiguous dh (M, H) and [g, u] (M, 2 H) -> [dg, du] (M, 2 H), and with ``with_hidden`` h (M, H)."""
    h = dhidden.shape[1]
    dpre = torch.empty_like(pre)
    hidden = torch.empty_like(dhidden) if with_hidden else None
    tensors = dict(dhidden_ptr=dhidden, pre_ptr=pre, dpre_ptr=dpre, hidden_ptr=hidden)
    _launch(swiglu_bwd_kernel, pre, h, dropout, **tensors)
    return dpre, hidden


def _launch(kernel, pre: torch.Tensor, h: int, dropout: Dropout, **tensors: torch.Tensor | None) -> None:
    config = pick_swiglu(h, target_of(pre.device))
    launch(
        kernel,
        (cdiv(len(pre), config.block_m) * cdiv(h, config.block_n),),
        pre,
        **tensors,
        M=len(pre),
        H=h,
        seed_ptr=dropout.seed,
        dropout_p=dropout.p,
        keep_scale=dropout.scale,
        DROPOUT=dropout.p > 0,
        BLOCK_M=config.block_m,
        BLOCK_H=config.block_n,
        num_warps=config.num_warps,
    )
