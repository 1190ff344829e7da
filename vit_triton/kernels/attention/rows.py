"""``@triton.jit`` helpers of the attention kernels: the rows of one head, and which head a program has."""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def load_rows(
    ptr,
    offs_row,
    n_rows,
    stride_row,
    stride_d,
    FIRST_D: tl.constexpr,
    N_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Columns ``FIRST_D ... FIRST_D + N_D`` of rows of one head, zero past ``HEAD_DIM`` and, if MASKED, past
    ``n_rows``."""
    offs_d = FIRST_D + tl.arange(0, N_D)
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * stride_row + offs_d.to(tl.int64)[None, :] * stride_d
    if FIRST_D + N_D > HEAD_DIM:
        mask_d = (offs_d < HEAD_DIM)[None, :]
        tile = tl.load(ptrs, mask=(offs_row < n_rows)[:, None] & mask_d if MASKED else mask_d, other=0.0)
    elif MASKED:
        tile = tl.load(ptrs, mask=(offs_row < n_rows)[:, None], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store_rows(
    ptr,
    tile,
    offs_row,
    n_rows,
    stride_row,
    FIRST_D: tl.constexpr,
    N_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    offs_d = FIRST_D + tl.arange(0, N_D)
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * stride_row + offs_d[None, :]
    mask = (offs_row < n_rows)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def head_of_program(n_heads, n_blocks):
    """(block, batch, head, plane) of this program; blocks of one head are neighbours and share its keys in L2."""
    pid = tl.program_id(0)
    plane = pid // n_blocks
    return pid % n_blocks, (plane // n_heads).to(tl.int64), (plane % n_heads).to(tl.int64), plane


@triton.jit
def head_ptr(ptr, batch, stride_b, head, stride_h, HEAD_ALIGN: tl.constexpr):
    """Where a head starts. Triton knows strides that 16 divides; a head of 72 or 88 is a multiple of 8, and 8 numbers
    are one access of 16 bytes."""
    return ptr + batch * stride_b + tl.multiple_of(head * stride_h, HEAD_ALIGN)


def strides(name: str, x: torch.Tensor) -> dict[str, int]:
    """The strides of a (B, N, H, D) tensor as kernel arguments: stride_qb, stride_qn, stride_qh, stride_qd."""
    return {f"stride_{name}{axis}": stride for axis, stride in zip("bnhd", x.stride(), strict=True)}


def head_align(*tensors: torch.Tensor) -> int:
    """The power of two up to 16 that divides the stride from head to head of every (B, N, H, D) tensor."""
    return math.gcd(16, *(x.stride(2) for x in tensors))
