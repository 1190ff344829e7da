"""``@triton.jit`` helpers of the attention kernels: biases and masks of scores, lengths of sequences.

``mask``: None, or (bias, rel, (diagonal,)), each of which may be empty. ``bias``: the rows of one head as (pointer,
stride_m, stride_n), or a loaded tile as (tile,); uint8 elements are a mask, others are added. ``rel``: a decomposed
bias as (pointer, stride_m, stride_k) of both parts, and the width of the grid of keys. ``diagonal``: query i attends to
keys up to i + diagonal.

Scores with a floating bias are not multiplied by log2(e): finfo.min, a common bias of masked keys, would overflow. For
such scores the backward pass needs the maximum and the sum of each row, since a maximum of that size absorbs the
logarithm of the sum.

Rows without keys give zeros, lse = -inf and zero gradients, as in PyTorch.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vit_triton.arguments import ScoreMask
from vit_triton.kernels.device import target_of
from vit_triton.kernels.tiles import LOG2E


@triton.jit
def head_bias(ptr, strides, batch, head):
    """The rows of one head of a (B, H, N_q, N_k) bias, or () without one."""
    if ptr is None:
        return ()
    else:
        stride_b, stride_h, stride_m, stride_n = strides
        return ptr + batch * stride_b + head * stride_h, stride_m, stride_n


@triton.jit
def load_bias(bias, rows, cols, n_q, n_k, MASK_M: tl.constexpr, MASK_N: tl.constexpr):
    """A tile of the bias; 0 past ``n_q`` rows with MASK_M, and past ``n_k`` columns with MASK_N."""
    ptr, stride_m, stride_n = bias
    ptrs = ptr + rows.to(tl.int64) * stride_m + cols.to(tl.int64) * stride_n
    if MASK_M and MASK_N:
        return tl.load(ptrs, mask=(rows < n_q) & (cols < n_k), other=0.0)
    elif MASK_M:
        return tl.load(ptrs, mask=rows < n_q, other=0.0)
    elif MASK_N:
        return tl.load(ptrs, mask=cols < n_k, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def mask_scores(scores, score_scale, mask, rows, cols, n_q, n_k, MASK_M: tl.constexpr, MASK_N: tl.constexpr):
    """Scale ``scores``, add the bias and set those of excluded keys to -inf. ``rows`` and ``cols`` broadcast to a tile.
    MASK_M: some rows are past ``n_q``; MASK_N: some columns are past ``n_k``, or past the diagonal."""
    bias, rel, diagonal = mask
    # an explicit sum with 0: the compiler would fuse the product with a later operation in some forms only, and packed
    # sequences would not equal padded ones
    if len(bias) > 0:
        value = bias[0] if len(bias) == 1 else load_bias(bias, rows, cols, n_q, n_k, MASK_M, MASK_N)
        if value.dtype == tl.uint8:
            scores = tl.where(value != 0, tl.fma(scores, score_scale, 0.0), float("-inf"))
        else:
            scores = tl.fma(scores, score_scale, value.to(tl.float32))
    elif len(rel) > 0:
        h_ptr, stride_hm, stride_hk, w_ptr, stride_wm, stride_wk, width = rel
        at_h, at_w = (cols // width).to(tl.int64), (cols % width).to(tl.int64)
        h_ptrs = h_ptr + rows.to(tl.int64) * stride_hm + at_h * stride_hk
        w_ptrs = w_ptr + rows.to(tl.int64) * stride_wm + at_w * stride_wk
        inside = (rows < n_q) & (cols < n_k)
        value = tl.load(h_ptrs, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32)
        scores = tl.fma(scores, score_scale, value)
    else:
        scores = tl.fma(scores, score_scale, 0.0)
    if MASK_N:
        scores = tl.where(cols < n_k, scores, float("-inf"))
        if len(diagonal) > 0:
            scores = tl.where(cols <= rows + diagonal[0], scores, float("-inf"))
    return scores


@triton.jit
def power(x, FLOAT_BIAS: tl.constexpr):
    """exp(x), where x is multiplied by log2(e) already unless FLOAT_BIAS."""
    return tl.exp2(x * LOG2E) if FLOAT_BIAS else tl.exp2(x)


@triton.jit
def softmax_of(scores, lse, log2_sum):
    """The softmax of scores of masked forms from the saved ``lse``; with a floating bias, ``lse`` is the maximum and
    ``log2_sum`` the logarithm of the sum."""
    if log2_sum is not None:
        return tl.exp2((scores - lse) * LOG2E - log2_sum)
    else:
        return tl.exp2(scores - lse)


@triton.jit
def without_empty(lse):
    """+inf instead of -inf, so that exp(-inf - lse) is 0 in rows without keys."""
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def sequence_of(cu_ptr, batch):
    """(first row, number of rows) of a packed sequence."""
    first = tl.load(cu_ptr + batch)
    return first.to(tl.int64), tl.load(cu_ptr + batch + 1) - first


@triton.jit
def limit_keys(n_k, key_lengths_ptr, batch):
    """``n_k`` or the number of keys of this sample, if that is smaller."""
    return tl.minimum(tl.maximum(tl.load(key_lengths_ptr + batch), 0).to(tl.int32), n_k)


@triton.jit
def keys_of_rows(first_row, n_q, n_k, n_keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """(diagonal, keys that the first of BLOCK_M rows attends to, keys that any of them attends to). ``n_k``: the keys
    with which the diagonal is aligned; ``n_keys``: those that take part."""
    diagonal = n_k - n_q if CAUSAL == "bottom_right" else 0
    first = tl.minimum(tl.maximum(first_row + diagonal + 1, 0), n_keys)
    return diagonal, first, tl.minimum(tl.maximum(first_row + BLOCK_M + diagonal, 0), n_keys)


class Sequences(NamedTuple):
    """Packed sequences. ``cu_q``, ``cu_k``: first row of each sequence, and the end, int32; ``max_q``, ``max_k``: the
    longest lengths."""

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int

    def views(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """(total, H, D) tensors as (sequences, total, H, D) with a batch stride of 0."""
        return [x.expand(len(self.cu_q) - 1, *x.shape) for x in tensors]


def sequence_arguments(sequences: Sequences | None, q: torch.Tensor) -> dict[str, Any]:
    """Kernel arguments for packed sequences."""
    if sequences is None:
        return dict(cu_q_ptr=None, cu_k_ptr=None, n_tokens=None)
    return dict(cu_q_ptr=sequences.cu_q, cu_k_ptr=sequences.cu_k, n_tokens=q.shape[1])


def wide_rows(bias: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Return ``bias`` with strides that are multiples of 16. GPUs load many elements of such rows at a time, so a bias
    that is broadcast to ``shape`` is copied to them."""
    aligned = bias.stride(-1) == 1 and all(stride % 16 == 0 for stride in bias.stride()[:-1])
    broadcast = 2 * bias.numel() <= math.prod(shape)
    if bias.shape[-1] == 1 or aligned or not broadcast or not target_of(bias.device).is_gpu:
        return bias
    return torch.nn.functional.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]]


def mask_arguments(mask: ScoreMask, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Kernel arguments for a mask of scores of ``shape`` (B, H, N_q, N_k)."""
    arguments: dict[str, Any] = dict(
        bias_ptr=None, rel_h_ptr=None, rel_w_ptr=None, rel_width=None, key_lengths_ptr=mask.key_lengths,
        CAUSAL=mask.causal,
    )  # fmt: skip
    bias, rel = mask.bias, mask.rel
    if bias is not None:
        bias = wide_rows(bias.view(torch.uint8) if bias.dtype == torch.bool else bias, shape).expand(shape)
        arguments["bias_ptr"] = bias
    if rel is not None:
        arguments |= dict(rel_h_ptr=rel.rel_h, rel_w_ptr=rel.rel_w, rel_width=rel.rel_w.shape[-1])
    # absent strides are None: they are no arguments of the compiled kernel
    parts = ("bias", bias), ("rel_h", None if rel is None else rel.rel_h), ("rel_w", None if rel is None else rel.rel_w)
    for name, x in parts:
        strides = (None,) * 4 if x is None else x.stride()
        for axis, stride in zip("bhmn", strides, strict=True):
            arguments[f"stride_{name}{axis}"] = stride
    return arguments
