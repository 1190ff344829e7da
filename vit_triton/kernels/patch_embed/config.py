"""Tiles of the patch embedding: tiles of :mod:`..linear.config` with an elementwise epilogue, since the addresses of
the gathered tile need registers too."""

import torch

from vit_triton.kernels.linear.config import (
    NARROW,
    Epilogue,
    GemmConfig,
    candidates_bwd_weight,
    candidates_gemm,
    clipped,
    pick_bwd_weight,
    pick_gemm,
    split_k,
    tokens,
)
from vit_triton.kernels.picker import clip, tunable
from vit_triton.kernels.target import Target


def _narrow_patches(patch_dim: int, dtype: torch.dtype, target: Target) -> bool:
    """Whether the narrow tile is used: on sm_100 it spills for patch sizes such as 14."""
    fits = target.family == "sm_90" or target.family == "sm_100" and patch_dim % NARROW.block_k == 0
    return fits and dtype != torch.float32


def _candidates_patch_embed_fwd(m, dim, patch_dim, dtype, target, precision):
    return candidates_gemm(tokens(m, target), dim, patch_dim, dtype)


@tunable(GemmConfig, candidates=_candidates_patch_embed_fwd)
def pick_patch_embed_fwd(
    m: int, dim: int, patch_dim: int, dtype: torch.dtype, target: Target, precision: str
) -> GemmConfig:
    """Tiles of ``patch_embed_fwd_kernel`` ((m, patch_dim) -> (m, dim))."""
    if target.family == "cpu":  # wide, because every tile of columns gathers and normalises the patches again
        return GemmConfig(256, clip(256, dim), clip(256, patch_dim), 1, 1)
    if _narrow_patches(patch_dim, dtype, target):
        return clipped(NARROW, 2**30, dim, patch_dim)
    if target.family == "sm_80" and dtype != torch.float32:
        # 128 x 64 spills for patch size 14 and for uint8 images without a norm
        return clipped(GemmConfig(64, 64, 32, 4, 4), 2**30, dim, patch_dim)
    return pick_gemm(tokens(m, target), dim, patch_dim, dtype, target, precision, Epilogue.ELEMENTWISE)


def _candidates_patch_embed_bwd_image(m, dim, patch_dim, dtype, target, precision):
    return candidates_gemm(tokens(m, target), patch_dim, dim, dtype)


@tunable(GemmConfig, candidates=_candidates_patch_embed_bwd_image)
def pick_patch_embed_bwd_image(
    m: int, dim: int, patch_dim: int, dtype: torch.dtype, target: Target, precision: str
) -> GemmConfig:
    """Tiles of ``patch_embed_bwd_image_kernel`` ((m, dim) -> (m, patch_dim), depth dim)."""
    return pick_gemm(tokens(m, target), patch_dim, dim, dtype, target, precision, Epilogue.ELEMENTWISE)


@tunable(GemmConfig, candidates=candidates_bwd_weight)
def pick_patch_embed_bwd_weight(
    m: int, dim: int, patch_dim: int, dtype: torch.dtype, target: Target, precision: str
) -> GemmConfig:
    """Tiles of ``patch_embed_bwd_weight_kernel`` ((dim, patch_dim), depth m) and the split-K factor."""
    if _narrow_patches(patch_dim, dtype, target):
        # two resident blocks; a limit of 168 registers spills for patch size 14
        return split_k(clipped(NARROW, dim, patch_dim, 2**30), m, dim, patch_dim, target)
    if target.family == "sm_80" and dtype != torch.float32:
        # without a limit the compiler spills to allow a third resident block
        tile = GemmConfig(128, 64, 32, 4, 4, max_registers=248)
        return split_k(clipped(tile, dim, patch_dim, 2**30), m, dim, patch_dim, target)
    return pick_bwd_weight(m, dim, patch_dim, dtype, target, precision, Epilogue.ELEMENTWISE)
