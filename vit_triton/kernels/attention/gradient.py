"""``@triton.jit`` helpers of the backward kernels of attention: the gradient dS of a tile of scores."""

import triton
import triton.language as tl

from vit_triton.kernels.attention.masking import mask_scores, softmax_of, without_empty
from vit_triton.kernels.attention.rows import load_main, load_tail
from vit_triton.kernels.tiles import LOG2E, dropout_keep


@triton.jit
def scores_and_dp(
    a, b, c_rows, d_rows, offs_n, n_rows, DIMS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """(a @ c.T, b @ d.T, c, d) with tiles c and d of ``c_rows`` and ``d_rows``. Tails come after the products of the
    main tiles: other orders take more registers on some architectures (benchmarks codegen)."""
    c = load_main(c_rows, offs_n, n_rows, DIMS, MASKED)  # [BLOCK_N, D_MAIN]
    d = load_main(d_rows, offs_n, n_rows, DIMS, MASKED)  # [BLOCK_N, D_MAIN]
    scores = tl.dot(a[0], tl.trans(c), input_precision=PRECISION)
    dp = tl.dot(b[0], tl.trans(d), input_precision=PRECISION)
    if DIMS[2] > 0:
        c_tail = load_tail(c_rows, offs_n, n_rows, DIMS, MASKED)
        d_tail = load_tail(d_rows, offs_n, n_rows, DIMS, MASKED)
        scores = tl.dot(a[1], tl.trans(c_tail), scores, input_precision=PRECISION)
        dp = tl.dot(b[1], tl.trans(d_tail), dp, input_precision=PRECISION)
        return scores, dp, (c, c_tail), (d, d_tail)
    else:
        return scores, dp, (c,), (d,)


@triton.jit
def score_gradient(
    q, do, lse, log2_sum, delta, k_rows, v_rows, offs_n, n_q, n_k, score_scale, offs_m, dropout, mask,
    DIMS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr = True,
):  # fmt: skip
    """(dS, float32 [BLOCK_M, BLOCK_N], the keys ``offs_n``); ``lse`` and ``log2_sum`` as in :func:`softmax_of`,
    ALIGNED as in :func:`dropout_keep`."""
    scores, dp, k, v = scores_and_dp(q, do, k_rows, v_rows, offs_n, n_k, DIMS, MASKED, PRECISION)
    if mask is None:
        p = tl.exp2(scores * score_scale - lse[:, None])
        if MASKED:
            p = tl.where((offs_n < n_k)[None, :], p, 0.0)  # exp(0 - L) of a masked column may be inf
    else:
        scores = mask_scores(scores, score_scale, mask, offs_m[:, None], offs_n[None, :], n_q, n_k, True, MASKED)
        p = softmax_of(scores, lse[:, None], None if log2_sum is None else log2_sum[:, None])
    if dropout is not None:
        seed, off_bh, dropout_p, keep_scale = dropout
        keep = dropout_keep(seed, offs_m, offs_n, off_bh, dropout_p, ALIGNED=ALIGNED)
        dp = tl.where(keep, dp * keep_scale, 0.0)  # NaN in dp is NaN in delta too
    return p * (dp - delta[:, None]), k


@triton.jit
def load_statistics(lse_ptr, log2_sum_ptr, delta_ptr, at, mask_m, EMPTY_ROWS: tl.constexpr):
    """(lse, log2_sum, delta) of rows for :func:`score_gradient`."""
    lse = tl.load(lse_ptr + at, mask=mask_m, other=0.0)
    if log2_sum_ptr is None:
        lse *= LOG2E
    delta = tl.load(delta_ptr + at, mask=mask_m, other=0.0)
    if EMPTY_ROWS:
        lse = without_empty(lse)
    if log2_sum_ptr is None:
        return lse, lse, delta
    else:
        return lse, tl.load(log2_sum_ptr + at, mask=mask_m, other=0.0), delta
