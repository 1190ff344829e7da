"""Attention inside the windows of a feature map (Liu et al. 2021, arXiv:2103.14030; Swin V2: arXiv:2111.09883).

The map (B, H, W, 3, heads, D) is neither rolled nor partitioned: token t of window (wy, wx) lies at

    y = (wy * WY + t // WX + shift_y) mod H        x = (wx * WX + t % WX + shift_x) mod W

and its result is written to the same place. With a shift, the last windows of an axis contain tokens of opposite sides
of the map; ``mask_value`` is added to the scores of tokens from different regions.

A program computes the rows ``pid_m`` of one head in a group of windows; all keys of a window are in its tile, so the
softmax takes one step. The backward pass recomputes it from q, k and v, and neither the result nor row statistics are
saved. With ``P = softmax(S)``, ``S = scale * Q K^T + bias + mask``:

    dV = P^T dO        dP = dO V^T        dS = P * (dP - rowsum(P * dP))        dQ = scale * dS K

    dK = scale * dS^T Q        dbias = sum of dS over windows        dscale = sum of dS * Q K^T = sum of Q * (dS K)

One backward kernel computes everything if its tile holds a window. Of larger windows, it stores the log-sum-exp and
rowsum(P * dP), from which a second kernel computes dK and dV. dbias is summed over a group in registers; the sums of
the groups are added in a fixed order. Cosine attention normalises q and k when they are loaded: with ``q = x / |x|``,
the gradient is ``dx = (dq - q (q . dq)) / |x|``.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vit_triton.arguments import NO_DROPOUT, Dropout
from vit_triton.kernels.attention.config import WindowConfig, pick_window_fwd
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import contiguous, input_precision, launch
from vit_triton.kernels.picker import cdiv, next_power_of_2
from vit_triton.kernels.target import Target
from vit_triton.kernels.tiles import LOG2E, dropout_keep

# one compiled form for all maps
SIZES = ["n_heads", "n_windows", "height", "width", "shift_y", "shift_x", "group"]


@triton.jit
def window_tokens(window, sizes, offs, WINDOW: tl.constexpr, WIDE: tl.constexpr):
    """The positions y * W + x of the tokens ``offs`` of a window in their image."""
    height, width, shift_y, shift_x = sizes
    n_wx = width // WINDOW[1]
    y = window // n_wx % (height // WINDOW[0]) * WINDOW[0] + offs // WINDOW[1] + shift_y
    x = window % n_wx * WINDOW[1] + offs % WINDOW[1] + shift_x
    y = tl.where(y >= height, y - height, y)
    x = tl.where(x >= width, x - width, x)
    tokens = y * width + x
    if WIDE:
        return tokens.to(tl.int64)
    else:
        return tokens


@triton.jit
def token_rows(ptr, window, head, sizes, tokens, stride, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers to the rows of one head in a contiguous (B, H, W, ..., heads, D) tensor, ``stride`` elements a token."""
    height, width, _, _ = sizes
    image = (window // (height // WINDOW[0] * (width // WINDOW[1]))).to(tl.int64)
    return ptr + (image * height * width * stride + head * HEAD_DIM) + tokens * stride


@triton.jit
def load_rows(rows, offs, N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load [BLOCK, BLOCK_D]; zero past N rows and HEAD_DIM columns."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs < N)[:, None] & (offs_d < HEAD_DIM)[None, :]
    return tl.load(rows[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(rows, x, offs, N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs < N)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(rows[:, None] + offs_d[None, :], x.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def normalise(x, COSINE: tl.constexpr):
    """(x / |x|, 1 / |x|) per row, or (x,). As in PyTorch, norms below 1e-12 count as 1e-12."""
    if COSINE:
        wide = x.to(tl.float32)
        inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)
        return (wide * inverse[:, None]).to(x.dtype), inverse
    else:
        return (x,)


@triton.jit
def normalise_grad(grad, normalised):
    """(the gradient of x before :func:`normalise`, whose result is ``normalised``; rowsum(grad * x / |x|), or 0)"""
    if len(normalised) > 1:
        x = normalised[0].to(tl.float32)
        along = tl.sum(grad * x, 1)
        return (grad - x * along[:, None]) * normalised[1][:, None], along
    else:
        return grad, 0.0


@triton.jit
def region(window, sizes, offs, WINDOW: tl.constexpr):
    """The region of the map that a token of a shifted window comes from, as a code."""
    height, width, shift_y, shift_x = sizes
    n_wy, n_wx = height // WINDOW[0], width // WINDOW[1]
    below = (offs // WINDOW[1] >= WINDOW[0] - shift_y) & (window // n_wx % n_wy == n_wy - 1)
    right = (offs % WINDOW[1] >= WINDOW[1] - shift_x) & (window % n_wx == n_wx - 1)
    return 2 * below.to(tl.int32) + right.to(tl.int32)


@triton.jit
def load_bias(bias_ptr, head, offs_m, offs_n, N: tl.constexpr):
    """The bias times log2(e) [BLOCK_M, BLOCK_N]; -inf in columns past N."""
    mask_n = (offs_n < N)[None, :]
    if bias_ptr is None:
        bias = tl.zeros([offs_m.shape[0], offs_n.shape[0]], tl.float32)
    else:
        bias_ptrs = bias_ptr + head.to(tl.int64) * (N * N) + (offs_m * N)[:, None] + offs_n[None, :]
        bias = tl.load(bias_ptrs, mask=(offs_m < N)[:, None] & mask_n, other=0.0).to(tl.float32) * LOG2E
    return tl.where(mask_n, bias, float("-inf"))


@triton.jit
def window_scores(
    q, k, bias, window, sizes, offs_m, offs_n, scale_log2e, mask_log2e,
    WINDOW: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(scale * q @ k.T + bias + mask) * log2(e) [BLOCK_M, BLOCK_N]"""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2e + bias
    if SHIFTED:
        other = region(window, sizes, offs_m, WINDOW)[:, None] != region(window, sizes, offs_n, WINDOW)[None, :]
        scores = tl.where(other, scores + mask_log2e, scores)
    return scores


@triton.jit
def exponential(x, FLUSH: tl.constexpr):
    """2 ** x; with FLUSH, 0 instead of a subnormal number, which a mask value of -100 gives and with which CPUs compute
    slowly."""
    if FLUSH:
        return tl.where(x < -126.0, 0.0, tl.exp2(x))
    else:
        return tl.exp2(x)


@triton.jit
def head_and_windows(n_heads, n_windows, group, N_BLOCKS: tl.constexpr):
    """(block, head, group, first window, end) of this program. The heads of a group are neighbours: their rows share
    cache lines and pages."""
    pid = tl.program_id(0)
    block = pid % N_BLOCKS
    head = pid // N_BLOCKS % n_heads
    which = pid // N_BLOCKS // n_heads
    return block, head, which, which * group, tl.minimum(which * group + group, n_windows)


@triton.jit(do_not_specialize=SIZES)
def window_attention_fwd_kernel(
    qkv_ptr, bias_ptr, logit_scale_ptr, seed_ptr, out_ptr,
    n_heads, n_windows, height, width, shift_y, shift_x, group, scale, mask_log2e, dropout_p, keep_scale,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHIFTED: tl.constexpr, COSINE: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FLUSH: tl.constexpr,
):  # fmt: skip
    WINDOW: tl.constexpr = (WINDOW_Y, WINDOW_X)
    N: tl.constexpr = WINDOW_Y * WINDOW_X
    pid_m, head, which, first, end = head_and_windows(n_heads, n_windows, group, (N + BLOCK_M - 1) // BLOCK_M)
    sizes = height, width, shift_y, shift_x
    part = n_heads * HEAD_DIM  # from q to k, from k to v
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    bias = load_bias(bias_ptr, head, offs_m, offs_n, N)
    if COSINE:
        scale = tl.load(logit_scale_ptr + head).to(tl.float32)
    for window in range(first, end):
        tokens_m = window_tokens(window, sizes, offs_m, WINDOW, WIDE)
        tokens_n = window_tokens(window, sizes, offs_n, WINDOW, WIDE)
        q_rows = token_rows(qkv_ptr, window, head, sizes, tokens_m, 3 * part, WINDOW, HEAD_DIM)
        k_rows = token_rows(qkv_ptr + part, window, head, sizes, tokens_n, 3 * part, WINDOW, HEAD_DIM)
        q = load_rows(q_rows, offs_m, N, HEAD_DIM, BLOCK_D)
        k = load_rows(k_rows, offs_n, N, HEAD_DIM, BLOCK_D)
        v = load_rows(k_rows + part, offs_n, N, HEAD_DIM, BLOCK_D)
        q, k = normalise(q, COSINE)[0], normalise(k, COSINE)[0]
        scores = window_scores(
            q, k, bias, window, sizes, offs_m, offs_n, scale * LOG2E, mask_log2e, WINDOW, SHIFTED, PRECISION
        )
        p = exponential(scores - tl.max(scores, 1)[:, None], FLUSH)
        norm = 1.0 / tl.sum(p, 1)
        if DROPOUT:
            plane = window * n_heads + head
            keep = dropout_keep(tl.load(seed_ptr), offs_m, offs_n, plane, dropout_p)
            p = tl.where(keep, p, 0.0)
            norm *= keep_scale
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * norm[:, None]
        out_rows = token_rows(out_ptr, window, head, sizes, tokens_m, part, WINDOW, HEAD_DIM)
        store_rows(out_rows, out, offs_m, N, HEAD_DIM, BLOCK_D)


def count_windows(qkv: torch.Tensor, window: tuple[int, int]) -> int:
    """Number of windows of a (B, H, W, ...) tensor."""
    return qkv.shape[0] * (qkv.shape[1] // window[0]) * (qkv.shape[2] // window[1])


def count_programs(qkv: torch.Tensor, window: tuple[int, int], group: int, block: int) -> int:
    """Programs of a kernel that computes ``block`` rows of ``group`` windows."""
    return cdiv(window[0] * window[1], block) * qkv.shape[4] * cdiv(count_windows(qkv, window), group)


def picker_arguments(
    qkv: torch.Tensor, window: tuple[int, int], cosine: bool
) -> tuple[int, int, int, torch.dtype, Target, bool]:
    rows = count_windows(qkv, window) * qkv.shape[4]
    return rows, window[0] * window[1], qkv.shape[5], qkv.dtype, target_of(qkv.device), cosine


def is_wide(qkv: torch.Tensor) -> bool:
    """Whether offsets inside an image need 64 bits."""
    return qkv[:1].numel() >= 2**31


def shared_arguments(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: torch.Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    mask_value: float,
    scale: float,
    dropout: Dropout,
    config: WindowConfig,
) -> dict[str, Any]:
    """The arguments that all kernels share."""
    head_dim, target = qkv.shape[5], target_of(qkv.device)
    return dict(
        qkv_ptr=qkv,
        bias_ptr=contiguous(bias),
        logit_scale_ptr=contiguous(logit_scale),
        seed_ptr=dropout.seed,
        n_heads=qkv.shape[4],
        n_windows=count_windows(qkv, window),
        height=qkv.shape[1],
        width=qkv.shape[2],
        shift_y=shift[0],
        shift_x=shift[1],
        group=config.group,
        scale=scale,
        mask_log2e=mask_value * LOG2E.value,
        dropout_p=dropout.p,
        keep_scale=dropout.scale,
        WINDOW_Y=window[0],
        WINDOW_X=window[1],
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SHIFTED=any(shift),
        COSINE=logit_scale is not None,
        DROPOUT=dropout.p > 0,
        WIDE=is_wide(qkv),
        PRECISION=input_precision(qkv.dtype, target),
        FLUSH=target.family == "cpu",
        **config.options,
    )


def window_attention_fwd(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: torch.Tensor | None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int],
    mask_value: float,
    scale: float,
    dropout: Dropout = NO_DROPOUT,
) -> torch.Tensor:
    """qkv (B, H, W, 3, heads, D), copied unless contiguous; bias (heads, N, N) -> (B, H, W, heads, D). ``logit_scale``
    (heads,) selects cosine attention and replaces ``scale``."""
    qkv = qkv.contiguous()
    out = torch.empty_like(qkv[:, :, :, 0], memory_format=torch.contiguous_format)
    config = pick_window_fwd(*picker_arguments(qkv, window, logit_scale is not None), dropout.p > 0)
    launch(
        window_attention_fwd_kernel,
        (count_programs(qkv, window, config.group, config.block_m),),
        qkv,
        out_ptr=out,
        **shared_arguments(qkv, bias, logit_scale, window, shift, mask_value, scale, dropout, config),
    )
    return out
