"""Packing of a weight into panels, the order in which the GEMMs of the CPU target read it."""

import torch
import triton
import triton.language as tl

from vit_triton.kernels.launch import launch
from vit_triton.kernels.linear.elements import offsets
from vit_triton.kernels.picker import cdiv
from vit_triton.kernels.target import Target

BLOCK_W = 256


@triton.jit
def pack_weight_kernel(
    weight_ptr, panels_ptr, stride_wn, stride_ww, N, WORDS, PANEL: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Words (N, WORDS) -> (cdiv(N, PANEL), WORDS, PANEL)."""
    blocks = tl.cdiv(WORDS, BLOCK_W)
    pid_n, pid_w = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    offs_p = tl.arange(0, PANEL)
    offs_n = pid_n * PANEL + offs_p
    offs_w = pid_w * BLOCK_W + tl.arange(0, BLOCK_W)
    weight_ptrs = weight_ptr + offsets(offs_w, stride_ww, offs_n, stride_wn)  # [BLOCK_W, PANEL]
    words = tl.load(weight_ptrs, mask=(offs_w < WORDS)[:, None] & (offs_n < N)[None, :], other=0)
    panels_ptrs = panels_ptr + (pid_n.to(tl.int64) * WORDS + offs_w)[:, None] * PANEL + offs_p[None, :]
    tl.store(panels_ptrs, words, mask=(offs_w < WORDS)[:, None])


def pack_weight(weight: torch.Tensor, panel: int, word: int) -> torch.Tensor:
    """Reorder a weight (N, K) into panels of ``panel`` rows, (cdiv(N, panel), cdiv(K, word), panel, word): for every
    word of ``word`` values along K, that word of all rows. N and K are padded with zeros."""
    n, k = weight.shape
    if not can_pack(weight, word):
        weight = torch.nn.functional.pad(weight, (0, -k % word)).contiguous()
    words = weight.view(torch.int32) if word > 1 else weight
    panels = weight.new_empty(cdiv(n, panel), cdiv(k, word), panel, word)
    launch(
        pack_weight_kernel,
        (panels.shape[0] * cdiv(panels.shape[1], BLOCK_W),),
        weight,
        weight_ptr=words,
        panels_ptr=panels.view(words.dtype),
        stride_wn=words.stride(0),
        stride_ww=words.stride(1),
        N=n,
        WORDS=panels.shape[1],
        PANEL=panel,
        BLOCK_W=BLOCK_W,
    )
    return panels


def can_pack(weight: torch.Tensor, word: int) -> bool:
    """Whether `pack_weight` reads the weight in place."""
    multiples = weight.shape[1], weight.stride(0), weight.storage_offset()
    return word == 1 or weight.stride(1) == 1 and not any(x % word for x in multiples)


def pack_once(weight: torch.Tensor, m: int, block_m: int, target: Target) -> torch.Tensor | None:
    """The panels of a weight (N, K) for a GEMM of m rows; None if every tile of ``block_m`` rows should pack the weight
    itself, which is faster for few tiles."""
    layout = target.panel(weight.dtype) if cdiv(m, block_m) > 4 and target.packs_once else None
    return pack_weight(weight, *layout) if layout and can_pack(weight, layout[1]) else None
