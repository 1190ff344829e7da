"""``@triton.jit`` helpers of the attention kernels: the head of a program, loads and stores of its rows, products.

``rows``: the rows of one head as (pointer, stride_n, stride_d).
``tile``: a block of rows as (main, tail) with D_MAIN and D_TAIL columns; (main,) if D_TAIL is 0.
``DIMS``: (HEAD_DIM, D_MAIN, D_TAIL).
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def head_of_program(n_heads, n_blocks):
    """(block, batch, head, off_bh) of this program, off_bh = batch * n_heads + head; the blocks of one head are
    consecutive and share its keys in L2."""
    pid = tl.program_id(0)
    off_bh = pid // n_blocks
    return pid % n_blocks, (off_bh // n_heads).to(tl.int64), (off_bh % n_heads).to(tl.int64), off_bh


@triton.jit
def head_rows(ptr, strides, batch, head, HEAD_ALIGN: tl.constexpr):
    """The rows of one head of a (B, N, H, D) tensor. Triton specialises only strides divisible by 16; HEAD_ALIGN adds
    divisibility by 8 (head sizes 72 and 88), which allows 16-byte accesses."""
    stride_b, stride_n, stride_h, stride_d = strides
    return ptr + batch * stride_b + tl.multiple_of(head * stride_h, HEAD_ALIGN), stride_n, stride_d


@triton.jit
def load_columns(
    rows, offs_n, n_rows, FIRST_D: tl.constexpr, N_D: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr
):
    """Load columns ``FIRST_D ... FIRST_D + N_D``; zero past ``HEAD_DIM`` and, if MASKED, past ``n_rows``."""
    ptr, stride_n, stride_d = rows
    offs_d = FIRST_D + tl.arange(0, N_D)
    ptrs = ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_d.to(tl.int64)[None, :] * stride_d
    if FIRST_D + N_D > HEAD_DIM:
        mask_d = (offs_d < HEAD_DIM)[None, :]
        return tl.load(ptrs, mask=(offs_n < n_rows)[:, None] & mask_d if MASKED else mask_d, other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=(offs_n < n_rows)[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_columns(rows, x, offs_n, n_rows, FIRST_D: tl.constexpr, N_D: tl.constexpr, HEAD_DIM: tl.constexpr):
    ptr, stride_n, stride_d = rows
    offs_d = FIRST_D + tl.arange(0, N_D)
    ptrs = ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_d.to(tl.int64)[None, :] * stride_d
    mask = (offs_n < n_rows)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_main(rows, offs_n, n_rows, DIMS: tl.constexpr, MASKED: tl.constexpr):
    return load_columns(rows, offs_n, n_rows, 0, DIMS[1], DIMS[0], MASKED)


@triton.jit
def load_tail(rows, offs_n, n_rows, DIMS: tl.constexpr, MASKED: tl.constexpr):
    return load_columns(rows, offs_n, n_rows, DIMS[1], DIMS[2], DIMS[0], MASKED)


@triton.jit
def load_tile(rows, offs_n, n_rows, DIMS: tl.constexpr, MASKED: tl.constexpr):
    if DIMS[2] > 0:
        return load_main(rows, offs_n, n_rows, DIMS, MASKED), load_tail(rows, offs_n, n_rows, DIMS, MASKED)
    else:
        return (load_main(rows, offs_n, n_rows, DIMS, MASKED),)


@triton.jit
def store_tile(rows, tile, offs_n, n_rows, DIMS: tl.constexpr):
    store_columns(rows, tile[0], offs_n, n_rows, 0, DIMS[1], DIMS[0])
    if DIMS[2] > 0:
        store_columns(rows, tile[1], offs_n, n_rows, DIMS[1], DIMS[2], DIMS[0])


@triton.jit
def zero_tile(N_ROWS: tl.constexpr, DIMS: tl.constexpr):
    if DIMS[2] > 0:
        return tl.zeros([N_ROWS, DIMS[1]], tl.float32), tl.zeros([N_ROWS, DIMS[2]], tl.float32)
    else:
        return (tl.zeros([N_ROWS, DIMS[1]], tl.float32),)


@triton.jit
def scale_tile(tile, factor):
    if len(tile) > 1:
        return tile[0] * factor, tile[1] * factor
    else:
        return (tile[0] * factor,)


@triton.jit
def add_dot(acc, a, b, PRECISION: tl.constexpr):
    """acc + a @ b for tiles ``acc`` and ``b``."""
    main = tl.dot(a, b[0], acc[0], input_precision=PRECISION)
    if len(b) > 1:
        return main, tl.dot(a, b[1], acc[1], input_precision=PRECISION)
    else:
        return (main,)


def strides(name: str, x: torch.Tensor) -> dict[str, int]:
    """The strides of a (B, N, H, D) tensor as kernel arguments: stride_qb, stride_qn, stride_qh, stride_qd."""
    return {f"stride_{name}{axis}": stride for axis, stride in zip("bnhd", x.stride(), strict=True)}


def head_align(*tensors: torch.Tensor) -> int:
    """The largest power of two up to 16 that divides the head stride of every (B, N, H, D) tensor."""
    return math.gcd(16, *(x.stride(2) for x in tensors))
