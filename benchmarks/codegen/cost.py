"""What a launch has to do at least, from its arguments alone: products and sums, bytes, steps of its loop."""

import math
from collections.abc import Callable
from typing import Any

import torch

from vit_triton.kernels.picker import cdiv

Arguments = dict[str, Any]
Count = Callable[[Arguments], int]


def _attention(products: int) -> Count:
    """``products`` of a (queries x keys) matrix of each head with one of head_dim columns."""

    def flops(a: Arguments) -> int:
        with_dq = a.get("dq_ptr") is not None and "dk_ptr" in a  # one product more
        rows = a["q_ptr"].shape[0] * a["n_heads"] * a["n_q"]
        return 2 * (products + with_dq) * rows * a["n_k"] * a["HEAD_DIM"]

    return flops


def _linear(a: Arguments) -> int:
    """MULTIPLIED: the product is there, and what stands behind it is one multiplication."""
    return a["M"] * a["N"] if a.get("MULTIPLIED") else 2 * a["M"] * a["N"] * a["K"]


def _patches(a: Arguments) -> int:
    return 2 * a["n_rows"] * a["dim"] * _patch_dim(a)


def _patch_dim(a: Arguments) -> int:
    return a["C"] * a["PATCH_H"] * a["PATCH_W"]


def _present(a: Arguments, *names: str) -> int:
    return sum(a[name] is not None for name in names)


def _layer_norm_fwd(a: Arguments) -> int:
    # centring 1 and scaling 1; the sums of mean and variance 3
    each = 2 + (0 if a["SAVED_STATISTICS"] else 3) + _present(a, "weight_ptr", "bias_ptr", "residual_ptr")
    return each * a["n_rows"] * a["width"]


def _layer_norm_bwd(a: Arguments) -> int:
    # xhat 2, the two sums along a row 3, dx 4; with a weight its product and the sums for both parameters 4
    each = 9 + (4 if a["weight_ptr"] is not None else 0) + _present(a, "dsum_ptr")
    return each * a["n_rows"] * a["width"]


def _qk_norm(each: int, mean: int) -> Count:
    """``each`` for every number, ``mean`` more where the norm subtracts it, and those of weight and bias."""

    def flops(a: Arguments) -> int:
        parameters = _present(a, *(name for name in ("weight_ptr", "bias_ptr") if name in a))
        return (each + (0 if a["RMS"] else mean) + parameters) * a["n_rows"] * a["head_dim"]

    return flops


def _steps(size: str, tile: str) -> Count:
    return lambda a: 0 if a.get("MULTIPLIED") else cdiv(a[size], a[tile])


def _part(size: str) -> Count:
    """Of one of SPLIT parts."""
    return lambda a: cdiv(cdiv(a[size], a["BLOCK_M"]), a["SPLIT"])


def _once(a: Arguments) -> int:
    return 0


# (multiplications and additions of the formula, trips of the loop: 0 where there is none)
COSTS: dict[str, tuple[Count, Count]] = {
    "attention_fwd_kernel": (_attention(2), lambda a: a["n_k"] // a["BLOCK_N"]),
    "attention_bwd_delta_kernel": (lambda a: 2 * a["do_ptr"].numel(), _once),
    "attention_bwd_dq_kernel": (_attention(3), lambda a: a["n_k"] // a["BLOCK_N"]),
    "attention_bwd_dkdv_kernel": (_attention(4), lambda a: a["n_q"] // a["BLOCK_M"]),
    "linear_fwd_kernel": (_linear, _steps("K", "BLOCK_K")),
    "linear_bwd_input_kernel": (_linear, _steps("N", "BLOCK_N")),
    "linear_bwd_weight_kernel": (_linear, _part("M")),
    "layer_norm_fwd_kernel": (_layer_norm_fwd, _once),
    "layer_norm_bwd_kernel": (_layer_norm_bwd, lambda a: a["n_steps"]),
    "layer_scale_bwd_kernel": (lambda a: (a["SPLIT"] + 3) * a["N"] * a["K"], _steps("K", "BLOCK_K")),
    "swiglu_fwd_kernel": (lambda a: 2 * a["M"] * a["H"], _once),
    "swiglu_bwd_kernel": (lambda a: 8 * a["M"] * a["H"], _once),
    "qk_norm_fwd_kernel": (_qk_norm(3, 2), _once),
    "qk_norm_bwd_kernel": (_qk_norm(10, 4), lambda a: a["n_steps"]),
    "sum_parts_kernel": (lambda a: a["n_partials"] * a["size"], _steps("n_partials", "BLOCK_P")),
    "patch_embed_statistics_kernel": (lambda a: 4 * a["n_rows"] * _patch_dim(a), _once),
    "patch_embed_fwd_kernel": (_patches, lambda a: cdiv(_patch_dim(a), a["BLOCK_K"])),
    "patch_embed_norm_kernel": (
        lambda a: (5 + _present(a, "weight_ptr", "bias_ptr", "pos_ptr")) * a["n_rows"] * a["dim"],
        _once,
    ),
    "patch_embed_bwd_weight_kernel": (_patches, _part("n_rows")),
    "patch_embed_bwd_image_kernel": (_patches, _steps("dim", "BLOCK_N")),
    "patch_embed_bwd_norm_kernel": (lambda a: 10 * a["n_rows"] * _patch_dim(a), _once),
}
# read and written
IN_PLACE = {("patch_embed_bwd_norm_kernel", "dimage_ptr"), ("qk_norm_bwd_kernel", "dx_ptr")}


def least_bytes(kernel: str, arguments: Arguments) -> int:
    """Every tensor read or written once; what an expanded one repeats counts once."""

    def distinct(x: torch.Tensor) -> int:
        sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride != 0 or size == 0]
        return math.prod(sizes) * x.element_size()

    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    return sum(distinct(x) * (2 if (kernel, name) in IN_PLACE else 1) for name, x in tensors.items())
