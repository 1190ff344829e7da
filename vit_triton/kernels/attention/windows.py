"""Attention inside the windows of a feature map (Liu et al. 2021, arXiv:2103.14030; Swin V2: arXiv:2111.09883).

The map (B, H, W, 3, heads, D) is neither rolled nor partitioned: token t of window (wy, wx) lies at

    y = (wy * WY + t // WX + shift_y) mod H        x = (wx * WX + t % WX + shift_x) mod W

and its result is written to the same place. With a shift, the last windows of an axis contain tokens of opposite sides
of the map; ``mask_value`` is added to the scores of tokens from different regions.

A program computes the rows ``pid_m`` of one head in a group of windows; all keys of a window are in its tile, so the
softmax takes one step. The backward pass recomputes it from q, k and v, and neither the result nor row statistics are
saved. With ``P = softmax(S)``, ``S = scale * Q K^T + bias + mask``:

    dV = P^T dO        dP = dO V^T        dS = P * (dP - rowsum(P * dP))        dQ = scale * dS K

    dK = scale * dS^T Q        dbias = sum of dS over windows        dscale = sum of dS * Q K^T over windows

One backward kernel computes everything if its tile holds a window. Of larger windows, it stores the log-sum-exp and
rowsum(P * dP), from which a second kernel computes dK and dV. dbias is summed over a group in registers; the sums of
the groups are added in a fixed order. Cosine attention normalises q and k when they are loaded: with ``q = x / |x|``,
the gradient is ``dx = (dq - q (q . dq)) / |x|``.
"""

import torch
import triton
import triton.language as tl

from vit_triton.arguments import NO_DROPOUT, Dropout
from vit_triton.kernels.attention.config import WindowConfig, pick_window_fwd
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import contiguous, input_precision, launch, maybe_contiguous
from vit_triton.kernels.picker import cdiv, next_power_of_2
from vit_triton.kernels.tiles import LOG2E, dropout_keep

# one compiled form for all maps
SIZES = ["n_heads", "n_windows", "n_wy", "n_wx", "height", "width", "shift_y", "shift_x", "group"]


@triton.jit
def window_rows(ptr, strides, window, head, sizes, offs, WINDOW: tl.constexpr):
    """Pointers to the tokens ``offs`` of a window in a (B, H, W, heads, D) tensor."""
    stride_b, stride_y, stride_x, stride_h = strides
    n_wy, n_wx, height, width, shift_y, shift_x = sizes
    row = window // n_wx
    y = row % n_wy * WINDOW[0] + offs // WINDOW[1] + shift_y
    x = window % n_wx * WINDOW[1] + offs % WINDOW[1] + shift_x
    y = tl.where(y >= height, y - height, y)
    x = tl.where(x >= width, x - width, x)
    ptr += (row // n_wy).to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return ptr + (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)


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
def normalise_grad(grad, normalised, along):
    """The gradient of x before :func:`normalise`; ``normalised``: its result, ``along``: rowsum(grad * x / |x|)."""
    if len(normalised) > 1:
        return (grad - normalised[0].to(tl.float32) * along[:, None]) * normalised[1][:, None]
    else:
        return grad


@triton.jit
def region(window, sizes, offs, WINDOW: tl.constexpr):
    """The region of the map that a token of a shifted window comes from, as a code."""
    n_wy, n_wx, _, _, shift_y, shift_x = sizes
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
    """(scale * q @ k.T + bias + mask) * log2(e), and q @ k.T [BLOCK_M, BLOCK_N]"""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = products * scale_log2e + bias
    if SHIFTED:
        other = region(window, sizes, offs_m, WINDOW)[:, None] != region(window, sizes, offs_n, WINDOW)[None, :]
        scores = tl.where(other, scores + mask_log2e, scores)
    return scores, products


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
    q_ptr, k_ptr, v_ptr, bias_ptr, logit_scale_ptr, seed_ptr, out_ptr,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_ob, stride_oy, stride_ox, stride_oh,
    n_heads, n_windows, n_wy, n_wx, height, width, shift_y, shift_x, group, scale, mask_log2e, dropout_p, keep_scale,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOLD: tl.constexpr, SHIFTED: tl.constexpr, COSINE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    WINDOW: tl.constexpr = (WINDOW_Y, WINDOW_X)
    N: tl.constexpr = WINDOW_Y * WINDOW_X
    pid_m, head, which, first, end = head_and_windows(n_heads, n_windows, group, (N + BLOCK_M - 1) // BLOCK_M)
    sizes = n_wy, n_wx, height, width, shift_y, shift_x
    in_strides = stride_qb, stride_qy, stride_qx, stride_qh
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    if HOLD:
        bias = load_bias(bias_ptr, head, offs_m, offs_n, N)
    if COSINE:
        scale = tl.load(logit_scale_ptr + head).to(tl.float32)
    for window in range(first, end):
        q = load_rows(window_rows(q_ptr, in_strides, window, head, sizes, offs_m, WINDOW), offs_m, N, HEAD_DIM, BLOCK_D)
        k = load_rows(window_rows(k_ptr, in_strides, window, head, sizes, offs_n, WINDOW), offs_n, N, HEAD_DIM, BLOCK_D)
        v = load_rows(window_rows(v_ptr, in_strides, window, head, sizes, offs_n, WINDOW), offs_n, N, HEAD_DIM, BLOCK_D)
        q, k = normalise(q, COSINE)[0], normalise(k, COSINE)[0]
        if not HOLD:
            bias = load_bias(bias_ptr, head, offs_m, offs_n, N)
        scores = window_scores(
            q, k, bias, window, sizes, offs_m, offs_n, scale * LOG2E, mask_log2e, WINDOW, SHIFTED, PRECISION
        )[0]
        p = tl.exp2(scores - tl.max(scores, 1)[:, None])
        norm = 1.0 / tl.sum(p, 1)
        if DROPOUT:
            plane = window * n_heads + head
            keep = dropout_keep(tl.load(seed_ptr), offs_m[:, None], offs_n[None, :], plane, dropout_p)
            p = tl.where(keep, p, 0.0)
            norm *= keep_scale
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * norm[:, None]
        out_rows = window_rows(
            out_ptr, (stride_ob, stride_oy, stride_ox, stride_oh), window, head, sizes, offs_m, WINDOW
        )
        store_rows(out_rows, out, offs_m, N, HEAD_DIM, BLOCK_D)


def strides(name: str, x: torch.Tensor) -> dict[str, int]:
    """The strides of a (B, H, W, heads, D) tensor as kernel arguments: stride_qb, stride_qy, stride_qx, stride_qh."""
    return {f"stride_{name}{axis}": stride for axis, stride in zip("byxh", x.stride(), strict=False)}


def shared_arguments(
    q: torch.Tensor,
    logit_scale: torch.Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    mask_value: float,
    scale: float,
    dropout: Dropout,
    config: WindowConfig,
) -> dict[str, object]:
    """The arguments that all kernels share."""
    _, height, width, n_heads, head_dim = q.shape
    n_windows = count_windows(q, window)
    return dict(
        logit_scale_ptr=contiguous(logit_scale),
        seed_ptr=dropout.seed,
        n_heads=n_heads,
        n_windows=n_windows,
        n_wy=height // window[0],
        n_wx=width // window[1],
        height=height,
        width=width,
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
        PRECISION=input_precision(q.dtype, target_of(q.device)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def count_windows(q: torch.Tensor, window: tuple[int, int]) -> int:
    """Number of windows of a (B, H, W, ...) tensor."""
    return q.shape[0] * (q.shape[1] // window[0]) * (q.shape[2] // window[1])


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
    """qkv (B, H, W, 3, heads, D), any strides; bias (heads, N, N) -> (B, H, W, heads, D), contiguous. ``logit_scale``
    (heads,) selects cosine attention and replaces ``scale``."""
    q, k, v = maybe_contiguous(qkv).unbind(3)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    config = pick_window_fwd(
        count_windows(q, window) * q.shape[3], window[0] * window[1], q.shape[4], q.dtype, target_of(q.device)
    )
    launch(
        window_attention_fwd_kernel,
        (programs(q, window, config.group, config.block_m),),
        q,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        bias_ptr=contiguous(bias),
        out_ptr=out,
        **strides("q", q),
        **strides("o", out),
        HOLD=config.hold_bias,
        **shared_arguments(q, logit_scale, window, shift, mask_value, scale, dropout, config),
    )
    return out


def programs(q: torch.Tensor, window: tuple[int, int], group: int, block: int) -> int:
    """Programs of a kernel that computes ``block`` rows of ``group`` windows."""
    return cdiv(window[0] * window[1], block) * q.shape[3] * cdiv(count_windows(q, window), group)
