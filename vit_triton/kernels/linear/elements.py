"""``@triton.jit`` helpers of the GEMM kernels: offsets, masks and scales of elements."""

import triton
import triton.language as tl

from vit_triton.arguments import Branch
from vit_triton.kernels.tiles import dropout_keep


@triton.jit
def offsets(rows, stride_row, cols, stride_col):
    """64-bit offsets of the elements (rows x cols)."""
    return rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col


@triton.jit
def within(rows, num_rows, cols, num_cols, EVEN_COLS: tl.constexpr):
    """Mask of the elements (rows x cols); ``EVEN_COLS``: all columns are in bounds."""
    if EVEN_COLS:
        return (rows < num_rows)[:, None]
    else:
        return (rows < num_rows)[:, None] & (cols < num_cols)[None, :]


@triton.jit
def dropout_scale(seed_ptr, rows, cols, p, keep_scale):
    """D: 0 for a dropped element (row, col), else ``keep_scale`` = 1 / (1 - p)."""
    return tl.where(dropout_keep(tl.load(seed_ptr), rows, cols, 0, p), keep_scale, 0.0)


@triton.jit
def sample_scale(samples_ptr, rows, num_rows, rows_per_sample):
    """The stochastic depth scale s of each row's sample."""
    return tl.load(samples_ptr + rows // rows_per_sample, mask=rows < num_rows, other=0.0)


def rows_per_sample_of(rows: int, branch: Branch) -> int:
    return 1 if branch.samples is None else max(1, rows // max(1, len(branch.samples)))
