"""Minimum cost of a launch, computed from its arguments: FLOPs, bytes, loop trips."""

import math
from collections.abc import Callable
from typing import Any

import torch

from vit_triton.kernels.picker import cdiv

Arguments = dict[str, Any]
Count = Callable[[Arguments], int]


def _attention(products: int) -> Count:
    """FLOPs of ``products`` GEMMs per head, each of size queries x keys x head_dim."""

    def flops(a: Arguments) -> int:
        with_dq = a.get("dq_ptr") is not None and "dk_ptr" in a  # one more GEMM
        rows = a["q_ptr"].shape[0] * a["n_heads"] * a["n_q"]
        return 2 * (products + with_dq) * rows * a["n_k"] * a["HEAD_DIM"]

    return flops


def _windows(products: int) -> Count:
    """FLOPs of ``products`` GEMMs per window and head; two more if one tile holds a window in the backward pass."""

    def flops(a: Arguments) -> int:
        tokens = a["WINDOW_Y"] * a["WINDOW_X"]
        whole = 2 * ("dbias_partials_ptr" in a and a["BLOCK_M"] >= tokens)
        return 2 * (products + whole) * a["n_windows"] * a["n_heads"] * tokens**2 * a["HEAD_DIM"]

    return flops


def _linear(a: Arguments) -> int:
    """FLOPs of a GEMM. With MULTIPLIED, the GEMM is already computed and only the epilogue's multiplication is left."""
    return a["M"] * a["N"] if a.get("MULTIPLIED") else 2 * a["M"] * a["N"] * a["K"]


def _patches(a: Arguments) -> int:
    return 2 * a["n_rows"] * a["dim"] * _patch_dim(a)


def _patch_dim(a: Arguments) -> int:
    return a["C"] * a["PATCH_H"] * a["PATCH_W"]


def _count_present(a: Arguments, *names: str) -> int:
    return sum(a[name] is not None for name in names)


def _layer_norm_fwd(a: Arguments) -> int:
    # per element: centering 1, scaling 1, sums for mean and variance 3
    each = 2 + (0 if a["SAVED_STATISTICS"] else 3) + _count_present(a, "weight_ptr", "bias_ptr", "residual_ptr")
    return each * a["n_rows"] * a["width"]


def _layer_norm_bwd(a: Arguments) -> int:
    # per element: xhat 2, two row sums 3, dx 4; with a weight: multiplication and parameter sums 4
    each = 9 + (4 if a["weight_ptr"] is not None else 0) + _count_present(a, "dsum_ptr")
    return each * a["n_rows"] * a["width"]


def _qk_norm(each: int, mean: int) -> Count:
    """FLOPs: ``each`` per element, plus ``mean`` for a LayerNorm, plus one for each of weight and bias."""

    def flops(a: Arguments) -> int:
        parameters = _count_present(a, *(name for name in ("weight_ptr", "bias_ptr") if name in a))
        return (each + (0 if a["RMS"] else mean) + parameters) * a["n_rows"] * a["head_dim"]

    return flops


def _trips(size: str, tile: str) -> Count:
    return lambda a: 0 if a.get("MULTIPLIED") else cdiv(a[size], a[tile])


def _split_trips(size: str) -> Count:
    """Loop trips in one part of a split-K sum."""
    return lambda a: cdiv(cdiv(a[size], a["BLOCK_M"]), a["n_splits"])


def _no_loop(a: Arguments) -> int:
    return 0


# kernel -> (FLOPs, loop trips; 0 without a loop). With matrix instructions, the trips of the loops that have them
COSTS: dict[str, tuple[Count, Count]] = {
    "attention_fwd_kernel": (_attention(2), lambda a: a["n_k"] // a["BLOCK_N"]),
    "attention_bwd_delta_kernel": (lambda a: 2 * a["do_ptr"].numel(), _no_loop),
    "attention_bwd_dq_kernel": (_attention(3), lambda a: a["n_k"] // a["BLOCK_N"]),
    "attention_bwd_dkdv_kernel": (_attention(4), lambda a: a["n_q"] // a["BLOCK_M"]),
    "attention_bwd_bias_kernel": (_attention(2), lambda a: a["n_steps"]),
    "attention_bwd_rel_kernel": (_attention(2), lambda a: a["n_k"] // a["rel_width"]),
    "window_attention_fwd_kernel": (_windows(2), lambda a: a["group"]),
    "window_attention_bwd_kernel": (_windows(3), lambda a: a["group"]),
    "window_attention_bwd_dkdv_kernel": (_windows(4), lambda a: a["group"]),
    "position_bias_fwd_kernel": (lambda a: a["bias_ptr"].numel(), _no_loop),
    "position_bias_bwd_kernel": (
        lambda a: a["dbias_ptr"].numel(),
        lambda a: cdiv(a["WINDOW_Y"] * a["WINDOW_X"], a["BLOCK_M"]),
    ),
    "linear_fwd_kernel": (_linear, _trips("K", "BLOCK_K")),
    "linear_bwd_input_kernel": (_linear, _trips("N", "BLOCK_N")),
    "linear_bwd_weight_kernel": (_linear, _split_trips("M")),
    "layer_norm_fwd_kernel": (_layer_norm_fwd, _no_loop),
    "layer_norm_bwd_kernel": (_layer_norm_bwd, lambda a: a["n_steps"]),
    "layer_scale_bwd_kernel": (lambda a: (a["PARTIALS"] + 3) * a["N"] * a["K"], _trips("K", "BLOCK_K")),
    "swiglu_fwd_kernel": (lambda a: 2 * a["M"] * a["H"], _no_loop),
    "swiglu_bwd_kernel": (lambda a: 8 * a["M"] * a["H"], _no_loop),
    "qk_norm_fwd_kernel": (_qk_norm(3, 2), _no_loop),
    "qk_norm_bwd_kernel": (_qk_norm(10, 4), lambda a: a["n_steps"]),
    "rotary_kernel": (lambda a: 2 * 6 * a["n_rows"] * a["HALF"], _no_loop),  # 6 per pair of q and of k
    "sum_parts_kernel": (
        lambda a: a["n_partials"] * a["size"] + a["second_n_partials"] * a["second_size"],
        _trips("n_partials", "BLOCK_P"),
    ),
    "patch_embed_statistics_kernel": (lambda a: 4 * a["n_rows"] * _patch_dim(a), _no_loop),
    "patch_embed_fwd_kernel": (_patches, lambda a: cdiv(_patch_dim(a), a["BLOCK_K"])),
    "patch_embed_norm_kernel": (
        lambda a: (5 + _count_present(a, "weight_ptr", "bias_ptr", "pos_ptr")) * a["n_rows"] * a["dim"],
        _no_loop,
    ),
    "patch_embed_bwd_weight_kernel": (_patches, _split_trips("n_rows")),
    "patch_embed_bwd_image_kernel": (_patches, _trips("dim", "BLOCK_N")),
    "patch_embed_bwd_norm_kernel": (lambda a: 10 * a["n_rows"] * _patch_dim(a), _no_loop),
}
# trips of loops without matrix instructions beside such a loop; 1 for other kernels
OTHER_TRIPS: dict[str, Count] = {
    # the sum of dy, one part in each program of a row of tiles
    "linear_bwd_weight_kernel": lambda a: cdiv(_split_trips("M")(a), cdiv(a["K"], a["BLOCK_K"])),
}
# tensors that are read and written
IN_PLACE = {("patch_embed_bwd_norm_kernel", "dimage_ptr"), ("qk_norm_bwd_kernel", "dx_ptr")}


def min_bytes(kernel: str, arguments: Arguments) -> int:
    """Bytes if every tensor is read or written once; repeated elements of an expanded tensor count once."""

    def distinct(x: torch.Tensor) -> int:
        sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride != 0 or size == 0]
        return math.prod(sizes) * x.element_size()

    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    return sum(distinct(x) * (2 if (kernel, name) in IN_PLACE else 1) for name, x in tensors.items())
