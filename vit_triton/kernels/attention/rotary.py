"""Rotary position embedding of queries and keys (Su et al. 2021, arXiv:2104.09864; in images: Heo et al. 2024,
arXiv:2403.13298).

The first D' channels of a head form D' / 2 pairs (a, b), which are neighbours, or channel i and channel i + D' / 2:

    a' = cos_a * a - sin_a * b        b' = cos_b * b + sin_b * a

The tables have one angle per pair, or one per channel. In the latter case the two angles of a pair may differ, and the
map is no rotation. Its gradient is the transposed map

    da = cos_a * da' + sin_b * db'    db = cos_b * db' - sin_a * da'

which is the same kernel with TRANSPOSED. Prefix tokens and the other channels are copied. One program handles the same
rows of q and k, so that it reads the tables once. For a packed projection it also copies v, so that the result is
packed; in place, v stays where it is. :func:`rotate_tile` is the rotation in the epilogue of a projection. Only the
tables are saved for backward, and with norms of q and k the tensors before the norms.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vit_triton.arguments import Norm, Rotation
from vit_triton.kernels.attention.config import pick_rotary
from vit_triton.kernels.attention.qk_norm import qk_norm_bwd_into, qk_norm_fwd
from vit_triton.kernels.device import target_of
from vit_triton.kernels.launch import launch, maybe_contiguous
from vit_triton.kernels.picker import cdiv, next_power_of_2


@triton.jit
def _row_offsets(batch, token, head, stride_b, stride_n, stride_h):
    """64-bit offsets of rows, [BLOCK_M, 1]."""
    return (batch.to(tl.int64) * stride_b + token.to(tl.int64) * stride_n + head.to(tl.int64) * stride_h)[:, None]


@triton.jit
def _load_pairs(rows, mask_m, other, HALF: tl.constexpr, BLOCK_I: tl.constexpr, PAIRS: tl.constexpr):
    """The first and second elements of all pairs, each [BLOCK_M, BLOCK_I], float32. With PAIRS "swapped", which needs
    no tl.split: all elements, and those of the other element of their pair, each [BLOCK_M, 2 * BLOCK_I]."""
    if PAIRS == "half":
        offs_i = tl.arange(0, BLOCK_I)
        mask = mask_m & (offs_i < HALF)[None, :]
        a = tl.load(rows + offs_i[None, :], mask=mask, other=other)
        b = tl.load(rows + HALF + offs_i[None, :], mask=mask, other=other)
        return a.to(tl.float32), b.to(tl.float32)
    else:
        offs_d = tl.arange(0, 2 * BLOCK_I)
        mask = mask_m & (offs_d < 2 * HALF)[None, :]
        x = tl.load(rows + offs_d[None, :], mask=mask, other=other).to(tl.float32)
        if PAIRS == "split":
            return tl.split(tl.reshape(x, (x.shape[0], BLOCK_I, 2)))
        else:
            offs_swapped = offs_d + 1 - 2 * (offs_d % 2)
            swapped = tl.load(rows + offs_swapped[None, :], mask=mask, other=other)
            return x, swapped.to(tl.float32)


@triton.jit
def _load_angles(
    rows, mask_m, other, HALF: tl.constexpr, BLOCK_I: tl.constexpr, PAIRS: tl.constexpr, FULL: tl.constexpr
):
    """A row of a table for each row of x, in the form of :func:`_load_pairs`. FULL: the table has 2 * HALF columns."""
    if FULL:
        return _load_pairs(rows, mask_m, other, HALF, BLOCK_I, PAIRS)
    else:
        if PAIRS == "swapped":
            columns = tl.arange(0, 2 * BLOCK_I) // 2
        else:
            columns = tl.arange(0, BLOCK_I)
        table = tl.load(rows + columns[None, :], mask=mask_m & (columns < HALF)[None, :], other=other).to(tl.float32)
        return table, table


@triton.jit
def _copy_columns(x_rows, y_rows, mask_m, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    offs_d = FIRST + tl.arange(0, BLOCK)
    mask = mask_m & (offs_d < LAST)[None, :]
    tl.store(y_rows + offs_d[None, :], tl.load(x_rows + offs_d[None, :], mask=mask, other=0.0), mask=mask)


@triton.jit
def _rotate_rows(
    x_rows, y_rows, mask_m, turned, cos, sin, HALF: tl.constexpr, BLOCK_I: tl.constexpr, PAIRS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """``turned``: [BLOCK_M, 1], false for prefix tokens, which are copied: inf * 0 is NaN."""
    a, b = _load_pairs(x_rows, mask_m, 0.0, HALF, BLOCK_I, PAIRS)
    dtype: tl.constexpr = y_rows.dtype.element_ty
    if PAIRS == "swapped":
        offs_d = tl.arange(0, 2 * BLOCK_I)
        mask = mask_m & (offs_d < 2 * HALF)[None, :]
        sign = (2 * (offs_d % 2) - 1).to(tl.float32)[None, :]
        y = a * cos[0] - b * (sin[1] * sign) if TRANSPOSED else a * cos[0] + b * (sin[0] * sign)
        tl.store(y_rows + offs_d[None, :], tl.where(turned, y, a).to(dtype), mask=mask)
    else:
        if TRANSPOSED:
            u = a * cos[0] + b * sin[1]
            w = b * cos[1] - a * sin[0]
        else:
            u = a * cos[0] - b * sin[0]
            w = b * cos[1] + a * sin[1]
        u = tl.where(turned, u, a).to(dtype)
        w = tl.where(turned, w, b).to(dtype)
        if PAIRS == "half":
            offs_i = tl.arange(0, BLOCK_I)
            mask = mask_m & (offs_i < HALF)[None, :]
            tl.store(y_rows + offs_i[None, :], u, mask=mask)
            tl.store(y_rows + HALF + offs_i[None, :], w, mask=mask)
        else:
            offs_d = tl.arange(0, 2 * BLOCK_I)
            mask = mask_m & (offs_d < 2 * HALF)[None, :]
            tl.store(y_rows + offs_d[None, :], tl.reshape(tl.join(u, w), (u.shape[0], 2 * BLOCK_I)), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def rotary_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, v_out_ptr, cos_ptr, sin_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_outb, stride_outn, stride_outh, stride_cosb, stride_cosn, stride_cosh,
    n_rows, n_tokens, n_heads, n_prefix,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, FULL: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows are numbered in the order batch, token, head. The outputs share their strides, and so do both tables."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = (rows < n_rows)[:, None]
    token = rows // n_heads
    head = rows - token * n_heads
    batch = token // n_tokens
    token -= batch * n_tokens
    turned = (token >= n_prefix)[:, None]
    table_rows = _row_offsets(batch, token - n_prefix, head, stride_cosb, stride_cosn, stride_cosh)
    cos = _load_angles(cos_ptr + table_rows, mask_m & turned, 1.0, HALF, BLOCK_I, PAIRS, FULL)
    sin = _load_angles(sin_ptr + table_rows, mask_m & turned, 0.0, HALF, BLOCK_I, PAIRS, FULL)

    out_rows = _row_offsets(batch, token, head, stride_outb, stride_outn, stride_outh)
    q_rows = q_ptr + _row_offsets(batch, token, head, stride_qb, stride_qn, stride_qh)
    k_rows = k_ptr + _row_offsets(batch, token, head, stride_kb, stride_kn, stride_kh)
    _rotate_rows(q_rows, q_out_ptr + out_rows, mask_m, turned, cos, sin, HALF, BLOCK_I, PAIRS, TRANSPOSED)
    _rotate_rows(k_rows, k_out_ptr + out_rows, mask_m, turned, cos, sin, HALF, BLOCK_I, PAIRS, TRANSPOSED)
    if BLOCK_REST > 0:
        _copy_columns(q_rows, q_out_ptr + out_rows, mask_m, 2 * HALF, HEAD_DIM, BLOCK_REST)
        _copy_columns(k_rows, k_out_ptr + out_rows, mask_m, 2 * HALF, HEAD_DIM, BLOCK_REST)
    if v_ptr is not None:
        v_rows = v_ptr + _row_offsets(batch, token, head, stride_vb, stride_vn, stride_vh)
        _copy_columns(v_rows, v_out_ptr + out_rows, mask_m, 0, HEAD_DIM, BLOCK_D)


@triton.jit
def rotate_tile(
    z, rows, mask_m, cos_ptr, sin_ptr, stride_cosb, stride_cosn, n_tokens, n_prefix,
    HALF: tl.constexpr, PAIRS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Rotate a tile of whole heads, [BLOCK_M, heads * 2 * HALF], whose rows are in the order batch, token. The tables
    are the same for all heads. ``mask_m``: [BLOCK_M, 1]."""
    batch = rows // n_tokens
    token = rows - batch * n_tokens - n_prefix
    turned = (token >= 0)[:, None]
    table_rows = (batch.to(tl.int64) * stride_cosb + token.to(tl.int64) * stride_cosn)[:, None]
    cos = _load_angles(cos_ptr + table_rows, mask_m & turned, 1.0, HALF, HALF, PAIRS, FULL)
    sin = _load_angles(sin_ptr + table_rows, mask_m & turned, 0.0, HALF, HALF, PAIRS, FULL)
    HEADS: tl.constexpr = z.shape[1] // (2 * HALF)
    if PAIRS == "half":
        a, b = tl.split(tl.permute(tl.reshape(z, (z.shape[0], HEADS, 2, HALF)), (0, 1, 3, 2)))
    else:
        a, b = tl.split(tl.reshape(z, (z.shape[0], HEADS, HALF, 2)))
    u = a * cos[0][:, None, :] - b * sin[0][:, None, :]
    w = b * cos[1][:, None, :] + a * sin[1][:, None, :]
    pairs = tl.join(tl.where(turned[:, None, :], u, a), tl.where(turned[:, None, :], w, b))
    return tl.reshape(tl.permute(pairs, (0, 1, 3, 2)) if PAIRS == "half" else pairs, z.shape)


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # q, k and v, (B, N, H, D), or without v


def _rotate_into(
    outs: Heads,
    heads: Heads,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    prefix: int,
    interleaved: bool,
    transposed: bool = False,
) -> None:
    """Write the rotated q and k, and v, into ``outs``, which share their strides and whose last stride is 1."""
    q, k, v = (x if x is None else maybe_contiguous(x) for x in heads)
    assert q is not None and k is not None
    batch, n_tokens, n_heads, head_dim = q.shape
    tables = table_arguments(cos, sin, head_dim)
    half = tables["HALF"]
    target = target_of(q.device)
    config = pick_rotary(half, target)
    rest = head_dim - 2 * half
    launch(
        rotary_kernel,
        (cdiv(batch * n_tokens * n_heads, config.block_m),),
        q,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        q_out_ptr=outs[0],
        k_out_ptr=outs[1],
        v_out_ptr=outs[2],
        **tables,
        **_strides("q", q),
        **_strides("k", k),
        **_strides("v", v),
        **_strides("out", outs[0]),
        n_rows=batch * n_tokens * n_heads,
        n_tokens=n_tokens,
        n_heads=n_heads,
        n_prefix=prefix,
        HEAD_DIM=head_dim,
        PAIRS=("swapped" if target.family == "cpu" else "split") if interleaved else "half",
        TRANSPOSED=transposed,
        BLOCK_M=config.block_m,
        BLOCK_I=config.block_i,
        BLOCK_REST=next_power_of_2(rest) if rest else 0,
        BLOCK_D=next_power_of_2(head_dim),
        num_warps=config.num_warps,
    )


def table_arguments(cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> dict[str, Any]:
    """The kernel arguments that describe tables (B or 1, H or 1, N - prefix, columns) or (N - prefix, columns)."""
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    full = 2 * cos.shape[-1] > head_dim
    steps = [stride if size > 1 else 0 for size, stride in zip(cos.shape[:-1], cos.stride()[:-1], strict=True)]
    stride_cosb, stride_cosh, stride_cosn = steps if cos.ndim == 4 else (0, 0, *steps)
    return dict(
        cos_ptr=cos,
        sin_ptr=sin,
        stride_cosb=stride_cosb,
        stride_cosn=stride_cosn,
        stride_cosh=stride_cosh,
        HALF=cos.shape[-1] // 2 if full else cos.shape[-1],
        FULL=full,
    )


def rotate_packed(y: torch.Tensor, rotation: Rotation) -> None:
    """Rotate q and k of a packed projection y, (B * N, 3 * H * D), in place: a program loads the pairs of its rows
    before it stores them, and no other program reads these rows."""
    cos, sin, n_tokens, n_heads, prefix, interleaved = rotation
    samples, head_dim = y.shape[0] // max(n_tokens, 1), y.shape[1] // (3 * n_heads)
    q, k, _ = y.view(samples, n_tokens, 3, n_heads, head_dim).unbind(2)
    _rotate_into((q, k, None), (q, k, None), cos, sin, prefix=prefix, interleaved=interleaved)


def _strides(name: str, x: torch.Tensor | None) -> dict[str, int]:
    return {f"stride_{name}{axis}": 0 if x is None else x.stride(i) for i, axis in enumerate("bnh")}


def rotary_fwd_into(
    outs: Heads,
    heads: Heads,
    q_norm: Norm | None,
    k_norm: Norm | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    rms: bool,
    prefix: int,
    interleaved: bool,
) -> None:
    """Normalise q and k, rotate them, and write them and v into ``outs``, see :func:`_rotate_into`. cos and sin:
    (B or 1, H or 1, N - prefix, columns) or (N - prefix, columns); more than D / 2 columns are one per channel."""
    q, k, v = heads
    q, k = qk_norm_fwd(q, q_norm, rms=rms), qk_norm_fwd(k, k_norm, rms=rms)
    _rotate_into(outs, (q, k, v), cos, sin, prefix=prefix, interleaved=interleaved)


def rotary_bwd_into(
    grads: Heads,
    outs: Heads,
    heads: Heads | None,
    q_norm: Norm | None,
    k_norm: Norm | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    rms: bool,
    prefix: int,
    interleaved: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Write the gradients of q, k and v into ``grads``, given those of the results in ``outs`` -> gradients of
    q_norm's weight and bias and of k_norm's weight and bias. ``heads``: q, k and v, required with norms."""
    _rotate_into(grads, outs, cos, sin, prefix=prefix, interleaved=interleaved, transposed=True)
    if heads is None:
        return None, None, None, None
    return *qk_norm_bwd_into(grads[0], heads[0], q_norm, rms=rms), *qk_norm_bwd_into(
        grads[1], heads[1], k_norm, rms=rms
    )
