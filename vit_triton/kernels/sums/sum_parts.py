"""Split sums: each program writes a partial sum; partials are added in a fixed order, without atomics.

``partials`` (P, ...) are float32. A single partial is the result itself, in its dtype; no pass follows.
"""

import torch
import triton
import triton.language as tl

from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import launch
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.sums.config import pick_sum_parts


@triton.jit
def add_partials(partials_ptr, start, n_partials, stride_p, offs, mask, BLOCK_P: tl.constexpr):
    """Sum the elements ``offs`` [BLOCK] of partials ``start ... start + BLOCK_P`` -> [BLOCK]."""
    offs_p = start + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    ptrs = partials_ptr + offs_p.to(tl.int64)[:, None] * stride_p + offs[None, :]  # [BLOCK_P, BLOCK]
    return tl.sum(tl.load(ptrs, mask=(offs_p < n_partials)[:, None] & mask[None, :], other=0.0), axis=0)


@triton.jit
def store_sum(partials_ptr, total_ptr, n_partials, stride_p, offs, size, BLOCK_P: tl.constexpr):
    """Store the elements ``offs`` [BLOCK] of the sum of all partials."""
    total = tl.zeros(offs.shape, tl.float32)
    for start in range(0, n_partials, BLOCK_P):
        total += add_partials(partials_ptr, start, n_partials, stride_p, offs, offs < size, BLOCK_P)
    tl.store(total_ptr + offs, total.to(total_ptr.dtype.element_ty), mask=offs < size)


@triton.jit(do_not_specialize=["n_partials", "second_n_partials"])
def sum_parts_kernel(
    partials_ptr, total_ptr, second_partials_ptr, second_total_ptr,
    n_partials, second_n_partials, stride_p, second_stride_p, size, second_size,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the total, and with ``second_partials_ptr`` of the second total."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    store_sum(partials_ptr, total_ptr, n_partials, stride_p, offs, size, BLOCK_P)
    if second_partials_ptr is not None:
        if tl.program_id(0) * BLOCK < second_size:
            store_sum(
                second_partials_ptr, second_total_ptr, second_n_partials, second_stride_p, offs, second_size, BLOCK_P
            )


def new_partials(like: torch.Tensor, n_partials: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocate ``n_partials`` partial sums of ``shape`` for a result in ``dtype``."""
    return like.new_empty((n_partials, *shape), dtype=dtype if n_partials == 1 else torch.float32)


def sum_parts(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum contiguous ``partials`` (P, ...) over P -> (...) in ``dtype``. For P = 1 in that dtype the result is a view,
    so the storage must not be shared with other tensors."""
    if len(partials) == 1 and partials.dtype == dtype:
        return partials[0]
    return _sum(partials, None, dtype)[0]


def sum_pair(first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`sum_parts` of the partials of two tensors, in one launch unless one of them is a view."""
    if any(len(partials) == 1 and partials.dtype == dtype for partials in (first, second)):
        return sum_parts(first, dtype), sum_parts(second, dtype)
    total, second_total = _sum(first, second, dtype)
    assert second_total is not None
    return total, second_total


def _sum(
    partials: torch.Tensor, second: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    total = partials.new_empty(partials.shape[1:], dtype=dtype)
    second_total = None if second is None else second.new_empty(second.shape[1:], dtype=dtype)
    config = pick_sum_parts(len(partials), target_of(partials.device))
    second_size = 0 if second_total is None else second_total.numel()
    launch(
        sum_parts_kernel,
        (cdiv(max(total.numel(), second_size), config.block),),
        partials,
        partials_ptr=partials,
        total_ptr=total,
        second_partials_ptr=second,
        second_total_ptr=second_total,
        n_partials=len(partials),
        second_n_partials=0 if second is None else len(second),
        stride_p=partials.stride(0),
        second_stride_p=0 if second is None else second.stride(0),
        size=total.numel(),
        second_size=second_size,
        BLOCK_P=config.block_p,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return total, second_total
