"""The relative position bias of windows (Liu et al. 2021, arXiv:2103.14030, section 3.2), or of a class token and
patches (BEiT: Bao et al. 2021, arXiv:2106.08254).

The table has a row for each offset between two tokens of a window, (2 * WY - 1) * (2 * WX - 1), and with a prefix token
three more: from the prefix token to a patch, from a patch to the prefix token, and from the prefix token to itself.

    bias[h, i, j] = table[(y_i - y_j + WY - 1) * (2 * WX - 1) + x_i - x_j + WX - 1, h]

The gradient of an entry is the sum over the pairs with its offset, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from vit_triton.kernels.attention.config import pick_position_bias
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import launch
from vit_triton.kernels.picker import cdiv


@triton.jit(do_not_specialize=["n_heads"])
def position_bias_fwd_kernel(
    table_ptr, bias_ptr, n_heads, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = WINDOW_Y * WINDOW_X + PREFIX
    N_BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    OFFSETS: tl.constexpr = (2 * WINDOW_Y - 1) * (2 * WINDOW_X - 1)
    pid = tl.program_id(0)
    head = pid // N_BLOCKS
    offs_m = (pid % N_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    i, j = offs_m[:, None] - PREFIX, offs_n[None, :] - PREFIX
    entry = (i // WINDOW_X - j // WINDOW_X + WINDOW_Y - 1) * (2 * WINDOW_X - 1)
    entry += i % WINDOW_X - j % WINDOW_X + WINDOW_X - 1
    if PREFIX > 0:
        entry = tl.where(i < 0, tl.where(j < 0, OFFSETS + 2, OFFSETS), tl.where(j < 0, OFFSETS + 1, entry))
    mask = (offs_m < N)[:, None] & (offs_n < N)[None, :]
    bias = tl.load(table_ptr + entry * n_heads + head, mask=mask, other=0.0)
    tl.store(bias_ptr + head.to(tl.int64) * (N * N) + (offs_m * N)[:, None] + offs_n[None, :], bias, mask=mask)


def position_bias_fwd(table: torch.Tensor, *, window: tuple[int, int], prefix_tokens: int) -> torch.Tensor:
    """table (entries, heads) -> (heads, N, N), N = tokens of a window and ``prefix_tokens``, 0 or 1."""
    n_heads, n_tokens = table.shape[1], window[0] * window[1] + prefix_tokens
    bias = table.new_empty(n_heads, n_tokens, n_tokens)
    config = pick_position_bias(n_tokens, target_of(table.device))
    launch(
        position_bias_fwd_kernel,
        (cdiv(n_tokens, config.block_m) * n_heads,),
        table,
        table_ptr=table.contiguous(),
        bias_ptr=bias,
        n_heads=n_heads,
        WINDOW_Y=window[0],
        WINDOW_X=window[1],
        PREFIX=prefix_tokens,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )
    return bias


@triton.jit(do_not_specialize=["n_heads"])
def position_bias_bwd_kernel(
    dbias_ptr, dtable_ptr, n_heads, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The sum over query rows, of which each has at most one key per offset, BLOCK_M rows a step."""
    PATCHES: tl.constexpr = WINDOW_Y * WINDOW_X
    N: tl.constexpr = PATCHES + PREFIX
    OFFSETS: tl.constexpr = (2 * WINDOW_Y - 1) * (2 * WINDOW_X - 1)
    ENTRIES: tl.constexpr = OFFSETS + 3 * PREFIX
    N_BLOCKS: tl.constexpr = (ENTRIES + BLOCK_E - 1) // BLOCK_E
    pid = tl.program_id(0)
    head = pid // N_BLOCKS
    entry = (pid % N_BLOCKS) * BLOCK_E + tl.arange(0, BLOCK_E)
    dy = (entry // (2 * WINDOW_X - 1) - (WINDOW_Y - 1))[None, :]
    dx = (entry % (2 * WINDOW_X - 1) - (WINDOW_X - 1))[None, :]
    base = dbias_ptr + head.to(tl.int64) * (N * N)
    total = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, PATCHES, BLOCK_M):
        token = (start + tl.arange(0, BLOCK_M))[:, None]
        y, x = token // WINDOW_X - dy, token % WINDOW_X - dx  # [BLOCK_M, BLOCK_E]
        inside = (entry < OFFSETS)[None, :] & (y >= 0) & (y < WINDOW_Y) & (x >= 0) & (x < WINDOW_X)
        at = (token + PREFIX) * N + y * WINDOW_X + x + PREFIX
        if PREFIX > 0:
            last = entry[None, :] - OFFSETS
            at = tl.where(last == 0, token + 1, at)
            at = tl.where(last == 1, (token + 1) * N, at)
            at = tl.where(last == 2, 0, at)
            inside = inside | (last == 0) | (last == 1) | ((last == 2) & (token == 0))
        inside = inside & (token < PATCHES)
        total += tl.sum(tl.load(base + at, mask=inside, other=0.0).to(tl.float32), 0)
    dtable = total.to(dtable_ptr.dtype.element_ty)
    tl.store(dtable_ptr + entry * n_heads + head, dtable, mask=entry < ENTRIES)


def position_bias_bwd(dbias: torch.Tensor, *, window: tuple[int, int], prefix_tokens: int) -> torch.Tensor:
    """dbias (heads, N, N) -> gradient of the table, in dbias's dtype."""
    n_heads = dbias.shape[0]
    entries = (2 * window[0] - 1) * (2 * window[1] - 1) + 3 * prefix_tokens
    dtable = dbias.new_empty(entries, n_heads)
    config = pick_position_bias(dbias.shape[1], target_of(dbias.device))
    launch(
        position_bias_bwd_kernel,
        (cdiv(entries, config.block_e) * n_heads,),
        dbias,
        dbias_ptr=dbias.contiguous(),
        dtable_ptr=dtable,
        n_heads=n_heads,
        WINDOW_Y=window[0],
        WINDOW_X=window[1],
        PREFIX=prefix_tokens,
        BLOCK_M=128,
        BLOCK_E=config.block_e,
        num_warps=config.num_warps,
    )
    return dtable
