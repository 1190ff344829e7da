"""``@triton.jit`` helpers of the products: where elements lie, which exist, and what each is multiplied by."""

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
    """Which of (rows x cols) exist; ``EVEN_COLS``: all columns do."""
    if EVEN_COLS:
        return (rows < num_rows)[:, None]
    else:
        return (rows < num_rows)[:, None] & (cols < num_cols)[None, :]


@triton.jit
def dropout_scale(seed_ptr, rows, cols, p, keep_scale):
    """D: 0 where the element (row, col) is dropped, else ``keep_scale`` = 1 / (1 - p)."""
    return tl.where(dropout_keep(tl.load(seed_ptr), rows[:, None], cols[None, :], 0, p), keep_scale, 0.0)


@triton.jit
def sample_scale(samples_ptr, rows, num_rows, rows_per_sample):
    """s of the sample that each row belongs to."""
    return tl.load(samples_ptr + rows // rows_per_sample, mask=rows < num_rows, other=0.0)


def rows_per_sample_of(rows: int, branch: Branch) -> int:
    return 1 if branch.samples is None else max(1, rows // max(1, len(branch.samples)))
