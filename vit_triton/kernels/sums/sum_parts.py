"""Sums of partial results: kernels leave one part per program, and these are added in a fixed order, without
atomics."""

import torch
import triton
import triton.language as tl

from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import launch
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.sums.config import pick_sum_parts


@triton.jit(do_not_specialize=["n_parts"])
def sum_parts_kernel(parts_ptr, total_ptr, n_parts, stride_p, size, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    offs_p = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    mask = offs < size
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_parts, BLOCK_P):
        rows = start + offs_p
        ptrs = parts_ptr + rows.to(tl.int64)[:, None] * stride_p + offs[None, :]  # [BLOCK_P, BLOCK]
        total += tl.sum(tl.load(ptrs, mask=(rows < n_parts)[:, None] & mask[None, :], other=0.0), axis=0)
    tl.store(total_ptr + offs, total.to(total_ptr.dtype.element_ty), mask=mask)


def sum_parts(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of float32 parts (P, ...), each of them contiguous, over P -> (...) in ``dtype``; of one part in that
    dtype a view of it, so that nothing else may lie in its storage."""
    if len(parts) == 1 and parts.dtype == dtype:
        return parts[0]
    total = parts.new_empty(parts.shape[1:], dtype=dtype)
    config = pick_sum_parts(len(parts), target_of(parts.device))
    launch(
        sum_parts_kernel,
        (cdiv(total.numel(), config.block),),
        parts,
        parts_ptr=parts,
        total_ptr=total,
        n_parts=len(parts),
        stride_p=parts.stride(0),
        size=total.numel(),
        BLOCK_P=config.block_p,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return total
