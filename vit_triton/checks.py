"""Checks of arguments. Every error names the argument, what is expected and what was given."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn, strided

from vit_triton.arguments import Block, DecomposedBias, Norm, Rope, ScoreMask
from vit_triton.autocast import FLOATS as KERNEL_DTYPES
from vit_triton.autocast import is_autocast_enabled
from vit_triton.portable import is_portable

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "swiglu")
NORM_TYPES = ("layer_norm", "rms_norm")
ROPE_LAYOUTS = ("half", "interleaved")
PATCH_ORDERS = ("p1 p2 c", "c p1 p2")
MAX_HEAD_DIM = 256  # of the kernels
MAX_ROWS = 2**31 - 1  # kernels index rows with 32 bits, and the launch grid has the same limit

_FLOATS = (*KERNEL_DTYPES, torch.float64)
_PLAIN = (str, bytes, bool, int, float, complex, type(None))


def format_value(value: object) -> str:
    """Format ``value`` for an error message: its repr if it is plain and short, else its type."""
    if isinstance(value, (tuple, list)) and len(value) <= 4 and all(isinstance(x, _PLAIN) for x in value):
        text = repr(value)
    elif isinstance(value, _PLAIN) and not (isinstance(value, int) and value.bit_length() > 64):
        text = repr(value)
    else:
        text = ""
    if text and len(text) <= 80:
        return text
    return type_name(value)


def type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def check_module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type_name(value)}")


def check_dense(name: str, x: Tensor) -> None:
    if x.is_nested or x.layout is not strided:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested tensor' if x.is_nested else x.layout}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    # arrays compare elementwise
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {format_value(value)}")


def check_flag(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {format_value(value)}")


def is_integer(value: Any) -> bool:
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def check_count(name: str, value: Any, *, at_least: int) -> None:
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {format_value(value)}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {format_value(value)}")


def check_number(name: str, value: Any) -> None:
    if isinstance(value, (float, torch.SymFloat, torch.SymInt)):
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {format_value(value)}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} must be within the range of a float, got a larger number") from None


def check_probability(name: str, value: Any) -> None:
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {format_value(value)}")


# --- tensors -----------------------------------------------------------------------------------------------


def shape_of(x: Tensor) -> str:
    return str(tuple(x.shape))


def check_tensor(
    name: str, x: Any, ndim: int | None = None, layout: str = "(..., D)", *, also: tuple[torch.dtype, ...] = ()
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type_name(x)}")
    if x.layout is not strided or x.is_nested:
        check_dense(name, x)
    if x.dtype not in _FLOATS and x.dtype not in also:
        supported = " or ".join(str(dtype).removeprefix("torch.") for dtype in (torch.float64, *also))
        raise TypeError(f"{name} must be float32, float16, bfloat16 or {supported}, got {x.dtype}")
    if x.ndim != ndim if ndim is not None else x.ndim < 1:
        raise ValueError(f"{name} must be {layout}, got shape {shape_of(x)}")


def check_alike(first: str, x: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is None:
            continue
        if other.device != x.device:
            raise ValueError(f"{first} and {name} must be on one device, got {x.device} and {other.device}")
        if other.dtype != x.dtype and (
            torch.float64 in (x.dtype, other.dtype) or not is_autocast_enabled(x.device.type)
        ):
            raise TypeError(f"{first} and {name} must have one dtype, got {x.dtype} and {other.dtype}")


def check_kernel_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f'{name} is {x.dtype}: backend "triton" supports float32, float16 and bfloat16; use backend="torch"'
        )


def check_attention(
    name: str, q_shape: Sequence[int], n_k: int, scale: float | None, dropout_p: float, return_lse: bool
) -> None:
    batch, n_q, heads, head_dim = q_shape
    if head_dim < 1:
        raise ValueError(f"{name} must have a head size of at least 1, got {head_dim}")
    if n_k < 1:
        raise ValueError("k and v must have at least one row, got 0")
    if exceeds_max_rows(batch * heads * max(n_q, n_k)):
        raise ValueError(f"batch * heads * rows must be at most {MAX_ROWS}, got {batch * heads * max(n_q, n_k)}")
    if scale is not None:
        check_number("scale", scale)
    check_probability("dropout_p", dropout_p)
    check_flag("return_lse", return_lse)


def check_score_mask(
    q: Tensor, shape: tuple[int, int, int, int], bias: Any, key_lengths: Any, causal: Any
) -> ScoreMask:
    """Check bias, key_lengths and causal for scores of ``shape`` (B, H, N_q, N_k) on the device of ``q``."""
    if causal is not True and causal is not False and not (isinstance(causal, str) and causal == "bottom_right"):
        raise ValueError(f"causal must be True, False or 'bottom_right', got {format_value(causal)}")
    if key_lengths is not None:
        _check_lengths("key_lengths", key_lengths, q, shape[0], shape[3])
    rel = None
    if isinstance(bias, DecomposedBias):
        rel, bias = bias, None
        _check_decomposed_bias(rel, q, shape)
    elif bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias must be a torch.Tensor or vit_triton.DecomposedBias, got {type_name(bias)}")
        bias = _check_bias("bias", bias, q, also=(torch.bool,))
        if bias.ndim > 4 or any(n not in (1, m) for n, m in zip(bias.shape[::-1], shape[::-1], strict=False)):
            raise ValueError(f"bias must broadcast to (batch, heads, N_q, N_k) = {shape}, got {shape_of(bias)}")
        bias = bias[(None,) * (4 - bias.ndim)]
    return ScoreMask(bias, rel, key_lengths, "" if causal is False else "top_left" if causal is True else causal)


def _check_bias(name: str, x: Any, q: Tensor, also: tuple[torch.dtype, ...] = ()) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type_name(x)}")
    check_dense(name, x)
    cast = is_autocast_enabled(q.device.type) and x.dtype in KERNEL_DTYPES
    if x.dtype not in (q.dtype, torch.float32, *also) and not cast:
        dtypes = dict.fromkeys((q.dtype, torch.float32, *also))  # without duplicates
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on {q.device}, got {x.device}")
    return x


def _check_decomposed_bias(rel: DecomposedBias, q: Tensor, shape: tuple[int, int, int, int]) -> None:
    *rows, n_k = shape
    for name, x in zip(DecomposedBias._fields, rel, strict=True):
        _check_bias(name, x, q)
        if x.ndim != 4 or list(x.shape[:3]) != rows:
            side = name[-1].upper() + "k"
            raise ValueError(
                f"{name} must be (batch, heads, N_q, {side}) = ({str(rows)[1:-1]}, {side}), got {shape_of(x)}"
            )
    height, width = rel.rel_h.shape[-1], rel.rel_w.shape[-1]
    if height * width != n_k:
        raise ValueError(f"rel_h and rel_w must have sides Hk * Wk = {n_k} keys, got {height} * {width}")


def _check_lengths(name: str, lengths: Any, q: Tensor, batch: int, longest: int) -> None:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type_name(lengths)}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {lengths.dtype}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"{name} must be (batch,) = ({batch},), got {shape_of(lengths)}")
    if lengths.device != q.device:
        raise ValueError(f"{name} must be on {q.device}, got {lengths.device}")
    if _has_values(lengths) and batch and not 0 <= lengths.min() <= lengths.max() <= longest:
        raise ValueError(f"{name} must be from 0 to N_k = {longest}, got {lengths.min()} to {lengths.max()}")


def _has_values(x: Tensor) -> bool:
    """Return whether the values of a tensor can be checked: in memory, without a synchronization or a guard."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_portable() and not _is_fake(x)


def _is_fake(x: Tensor) -> bool:
    return torch._guards.detect_fake_mode(x) is not None


def check_sequences(name: str, cu: Any, longest_name: str, longest: Any, q: Tensor, total: int) -> None:
    """Check the first rows of packed sequences, the end of the last one, and the longest length."""
    if not isinstance(cu, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type_name(cu)}")
    if cu.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu.dtype}")
    if cu.ndim != 1 or cu.shape[0] < 1:
        raise ValueError(f"{name} must be (sequences + 1,), got {shape_of(cu)}")
    if cu.device != q.device:
        raise ValueError(f"{name} must be on {q.device}, got {cu.device}")
    check_count(longest_name, longest, at_least=0)
    if not _has_values(cu):
        return
    lengths = cu.diff()
    if cu[0] != 0 or cu[-1] != total or (lengths < 0).any():
        raise ValueError(f"{name} must ascend from 0 to the number of rows, {total}, got {format_values(cu)}")
    if lengths.numel() and lengths.max() > longest:
        raise ValueError(f"{longest_name} must be at least the longest length, {lengths.max()}, got {longest}")


def check_packed(x: Any, indices: Any, batch: Any, length: Any) -> None:
    """Check packed tokens and their positions in padded sequences."""
    check_tensor("x", x)
    check_count("batch", batch, at_least=0)
    check_count("length", length, at_least=0)
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        came = indices.dtype if isinstance(indices, Tensor) else type_name(indices)
        raise TypeError(f"indices must be an int32 or int64 tensor, got {came}")
    if x.ndim < 1 or indices.shape != x.shape[:1] or indices.device != x.device:
        where = f"{shape_of(indices)} on {indices.device}"
        raise ValueError(f"indices must have one number per row of x, {shape_of(x)} on {x.device}, got {where}")
    if _has_values(indices) and indices.numel() and not (0 <= indices.min() and indices.max() < batch * length):
        raise ValueError(
            f"indices must be at least 0 and less than batch * length = {batch} * {length}, got {indices.min()} to "
            f"{indices.max()}"
        )


def check_valid(x: Any, valid: Any) -> None:
    """Check padded sequences and the mask of their valid tokens."""
    check_tensor("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must be (B, N, ...), got {shape_of(x)}")
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        raise TypeError(
            f"valid must be a bool tensor, got {valid.dtype if isinstance(valid, Tensor) else type_name(valid)}"
        )
    if valid.shape != x.shape[:2] or valid.device != x.device:
        where = f"{shape_of(valid)} on {valid.device}"
        raise ValueError(f"valid must be (B, N) = {tuple(x.shape[:2])} on {x.device}, got {where}")


def format_values(x: Tensor) -> str:
    """Format a vector, abbreviated after 16 elements."""
    values = ", ".join(map(str, x[:16].tolist()))
    return f"[{values}{', ...' if len(x) > 16 else ''}]"


def check_head_norms(q: Tensor, q_norm: Norm | None, k_norm: Norm | None, norm_type: str) -> None:
    check_choice("norm_type", norm_type, NORM_TYPES)
    check_norm("q_norm", q_norm, q.shape[-1], q)
    check_norm("k_norm", k_norm, q.shape[-1], q)


def check_rope(
    q_shape: Sequence[int],
    n_k: int,
    q: Tensor,
    rope: Rope | None,
    prefix: int,
    layout: str,
    prefix_rows: bool = False,
) -> None:
    """Check the tables of rotary positions for queries of ``q_shape``, (B, N, H, D), with device and dtype of ``q``.
    ``prefix_rows``: the tables have rows for the prefix too."""
    check_choice("rope_layout", layout, ROPE_LAYOUTS)
    check_count("rope_prefix", prefix, at_least=0)
    batch, n, heads, head_dim = q_shape
    if prefix > n and not prefix_rows:
        raise ValueError(f"rope_prefix must be at most the number of tokens, {n}, got {format_value(prefix)}")
    if rope is None:
        if prefix:
            raise ValueError(f"rope_prefix requires rope, got rope_prefix={format_value(prefix)}")
        return
    if n != n_k:
        raise ValueError(f"rope requires q and k of one length, got {n} and {n_k}")
    if not isinstance(rope, tuple) or len(rope) != 2:
        came = f"a tuple of {len(rope)}" if isinstance(rope, tuple) else type_name(rope)
        raise TypeError(f"rope must be a tuple (cos, sin), got {came}")
    cos, sin = rope
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(f"{name} of rope", table)
        if table.dtype not in (torch.float32, q.dtype) and not (
            q.dtype != torch.float64 and table.dtype in KERNEL_DTYPES and is_autocast_enabled(q.device.type)
        ):
            raise TypeError(f"{name} of rope must be float32 or {q.dtype}, got {table.dtype}")
        if table.device != q.device:
            raise ValueError(f"{name} of rope must be on {q.device}, got {table.device}")
    if cos.dtype != sin.dtype or cos.shape != sin.shape:
        raise ValueError(
            f"cos and sin of rope must agree in shape and dtype, got {shape_of(cos)}, {cos.dtype} and "
            f"{shape_of(sin)}, {sin.dtype}"
        )
    rows = n if prefix_rows else n - prefix
    shape = f"({batch} or 1, {heads} or 1, {rows}, columns) or ({rows}, columns)"
    fits = cos.ndim in (2, 4) and cos.shape[-2] == rows
    if not fits or cos.ndim == 4 and (cos.shape[0] not in (1, batch) or cos.shape[1] not in (1, heads)):
        of = "with rows for the prefix too" if prefix_rows else f"for rope_prefix={format_value(prefix)}"
        raise ValueError(f"cos of rope must be {shape} {of}, got {shape_of(cos)}")
    columns = cos.shape[-1]
    if not 1 <= columns <= head_dim or 2 * columns > head_dim and columns % 2:
        raise ValueError(
            f"cos of rope must have an even number of columns up to the head size {head_dim}, one per channel, or 1 to "
            f"{head_dim // 2}, one per pair, got {shape_of(cos)}"
        )


def hidden_features(name: str, w1: Tensor, activation: str) -> torch.Size:
    """Return the width of the activation's result, as a size."""
    if activation != "swiglu":
        return w1.shape[:1]
    if w1.shape[0] % 2:
        raise ValueError(f"{name} must have 2 * hidden rows (gate and value) for 'swiglu', got {shape_of(w1)}")
    return torch.Size([w1.shape[0] // 2])


def check_linear(
    x_name: str, features: torch.Size, weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None
) -> None:
    check_tensor(weight_name, weight, 2, "(out features, in features)")
    if weight.shape[1:] != features:
        raise ValueError(f"{weight_name} must have {features[0]} columns to match {x_name}, got {shape_of(weight)}")
    if 0 in weight.shape:
        raise ValueError(f"{weight_name} must have at least one row and column, got {shape_of(weight)}")
    if bias is not None:
        check_vector(bias_name, bias, weight_name, weight)


def check_norm(name: str, norm: Norm | None, size: int, like: Tensor) -> None:
    """Check a norm of width ``size`` on the device of ``like``."""
    if norm is None:
        return
    if not isinstance(norm, tuple) or len(norm) != 3:
        came = f"a tuple of {len(norm)}" if isinstance(norm, tuple) else type(norm).__name__
        raise TypeError(f"{name} must be a tuple (weight, bias, eps), got {came}")
    weight, bias, eps = norm
    for part, x in (("weight", weight), ("bias", bias)):
        if x is not None:
            if not isinstance(x, Tensor) or x.dtype not in KERNEL_DTYPES or x.layout is not strided or x.is_nested:
                check_tensor(f"{part} of {name}", x)
                if x.dtype != like.dtype:
                    raise TypeError(f"{part} of {name} must not be float64 if the input is {like.dtype}")
            if x.shape != (size,):
                raise ValueError(f"{part} of {name} must be ({size},), got {shape_of(x)}")
            if x.device != like.device:
                raise ValueError(f"{part} of {name} must be on {like.device}, got {x.device}")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"weight and bias of {name} must have one dtype, got {weight.dtype} and {bias.dtype}")
    if size < 1:
        raise ValueError(f"{name} requires a last dimension that is not empty")
    check_number(f"eps of {name}", eps)
    if not eps >= 0:
        raise ValueError(f"eps of {name} must not be negative, got {eps}")


def check_residual(residual: Tensor | None, shape: tuple[int, ...]) -> None:
    if residual is not None:
        check_tensor("residual", residual)
        if tuple(residual.shape) != shape:
            raise ValueError(f"residual must have the shape of the result, {shape}, got {shape_of(residual)}")


def check_branch(
    x: Tensor, name: str, weight: Tensor, residual: Tensor | None, layer_scale: Tensor | None, drop_path_p: float
) -> None:
    if layer_scale is not None:
        check_vector("layer_scale", layer_scale, name, weight)
    check_probability("drop_path_p", drop_path_p)
    if residual is None and (layer_scale is not None or drop_path_p > 0):
        raise ValueError(f"{'drop_path_p' if layer_scale is None else 'layer_scale'} requires residual, got None")
    if drop_path_p > 0 and x.ndim < 2:
        raise ValueError(f"drop_path_p requires x to be (B, ..., D), got {shape_of(x)}")


def check_rotated_projection(
    x: Tensor, weight: Tensor, rope: Rope, heads: Any, prefix: int, layout: str, **others: Any
) -> None:
    """Check a packed projection whose q and k are rotated; ``others`` are arguments that exclude ``rope``."""
    for name, value in others.items():
        if isinstance(value, Tensor) or value:
            raise ValueError(f"{name} and rope cannot be combined: rope is for a projection to q, k and v")
    if heads is None:
        raise ValueError("rope requires rope_heads, the number of heads of q, k and v, got None")
    check_count("rope_heads", heads, at_least=1)
    if x.ndim != 3:
        raise ValueError(f"x must be (B, N, K) with rope, got {shape_of(x)}")
    rows = weight.shape[0]
    if rows % (3 * heads):
        raise ValueError(f"weight must have 3 * rope_heads * D rows with rope_heads={heads}, got {shape_of(weight)}")
    if exceeds_max_rows(x.shape[0] * x.shape[1] * heads):
        raise ValueError(f"batch * rope_heads * rows must be at most {MAX_ROWS}, got {x.shape[0] * x.shape[1] * heads}")
    check_rope((*x.shape[:2], heads, rows // (3 * heads)), x.shape[1], x, rope, prefix, layout)


def check_vector(name: str, x: Tensor, weight_name: str, weight: Tensor) -> None:
    check_tensor(name, x)
    if x.shape != weight.shape[:1]:
        raise ValueError(f"{name} must be ({weight.shape[0]},) to match {weight_name}, got {shape_of(x)}")


def exceeds_max_rows(rows: int) -> bool:
    """Return whether ``rows`` exceeds MAX_ROWS; False if rows may be symbolic and no kernel runs."""
    return not (torch.compiler.is_compiling() and is_portable()) and rows > MAX_ROWS


def check_rows(x: Tensor) -> None:
    if exceeds_max_rows(math.prod(x.shape[:-1])):
        raise ValueError(f"x must have at most {MAX_ROWS} rows, got {math.prod(x.shape[:-1])}")


def patch_sides(patch_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = patch_size if isinstance(patch_size, (tuple, list)) else (patch_size, patch_size)
    if not all(is_integer(side) for side in sides):
        raise TypeError(f"patch_size must be an int or two of them, got {format_value(patch_size)}")
    if len(sides) != 2:
        raise ValueError(f"patch_size must be an int or two of them, got {format_value(patch_size)}")
    if sides[0] < 1 or sides[1] < 1:
        raise ValueError(f"patch_size must be positive, got {format_value(patch_size)}")
    return sides[0], sides[1]


def check_patch_embed(
    image: Any, weight: Any, bias: Any, patch_size: Any, patch_order: Any, pre_norm: Any, post_norm: Any, pos: Any,
    prefix: Any, mean: Any, std: Any,
) -> tuple[int, int, int]:  # fmt: skip
    """Return height and width of a patch and the number of patches per image."""
    check_tensor("image", image, 4, "(B, C, H, W)", also=(torch.uint8,))
    check_choice("patch_order", patch_order, PATCH_ORDERS)
    p1, p2 = patch_sides(patch_size)
    batch, channels, height, width = image.shape
    if height % p1 or width % p2 or height == 0 or width == 0:
        sides = f"{format_value(p1)} x {format_value(p2)}"
        raise ValueError(f"image must have sides divisible by the patch size {sides}, got {height} x {width}")
    check_tensor("weight", weight, 2, "(dim, C * p1 * p2)")
    if weight.shape[1] != channels * p1 * p2:
        raise ValueError(
            f"weight must have {channels * p1 * p2} columns for an image with {channels} channels and patches of "
            f"{p1} x {p2}, got {shape_of(weight)}"
        )
    check_linear("image", weight.shape[1:], "weight", weight, "bias", bias)
    dim = weight.shape[0]
    patches = (height // p1) * (width // p2)
    check_norm("pre_norm", pre_norm, weight.shape[1], weight)
    check_norm("post_norm", post_norm, dim, weight)
    for name, rows in (("pos", pos), ("prefix", prefix)):
        if rows is not None:
            check_tensor(name, rows, 2, "(rows, dim)")
            if rows.shape[1] != dim:
                raise ValueError(f"{name} must have {dim} columns to match weight, got {shape_of(rows)}")
    if pos is not None and pos.shape[0] < patches:
        raise ValueError(f"image has {patches} patches, but pos has only {pos.shape[0]} positions")
    if (mean is None) != (std is None):
        raise ValueError("mean and std must both be given, got only one")
    if image.dtype == torch.uint8 and mean is None:
        raise TypeError("a uint8 image requires mean and std (on the 0..1 scale); or convert it to floating point")
    if image.dtype != torch.uint8 and mean is not None:
        raise TypeError(f"mean and std require a uint8 image, got {image.dtype}: normalize it before the call")
    if image.dtype == torch.uint8:
        check_alike("weight", weight, bias=bias, pos=pos, prefix=prefix)
        if weight.device != image.device:
            raise ValueError(f"image and weight must be on one device, got {image.device} and {weight.device}")
    else:
        check_alike("image", image, weight=weight, bias=bias, pos=pos, prefix=prefix)
    if exceeds_max_rows(batch * patches):
        raise ValueError(f"image must have at most {MAX_ROWS} patches in total, got {batch * patches}")
    return p1, p2, patches


# --- windows -----------------------------------------------------------------------------------------------

MAX_WINDOW_TOKENS = 256  # a kernel's tile holds all keys of a window


def _check_sides(name: str, sides: Any) -> None:
    if not isinstance(sides, (tuple, list)) or not all(is_integer(side) for side in sides):
        raise TypeError(f"{name} must be two integers, got {format_value(sides)}")
    if len(sides) != 2:
        raise ValueError(f"{name} must be two integers, got {format_value(sides)}")


def check_window(window: Any) -> None:
    _check_sides("window", window)
    if window[0] < 1 or window[1] < 1:
        raise ValueError(f"window must be positive, got {format_value(window)}")


def check_window_attention(
    qkv: Any, bias: Any, window: Any, shift: Any, mask_value: Any, logit_scale: Any, scale: Any, dropout_p: Any
) -> None:
    check_tensor("qkv", qkv, 6, "(B, H, W, 3, heads, D)")
    if qkv.shape[3] != 3:
        raise ValueError(f"qkv must be (B, H, W, 3, heads, D), got {shape_of(qkv)}")
    check_window(window)
    _check_sides("shift", shift)
    batch, height, width, _, heads, _ = qkv.shape
    if height % window[0] or width % window[1] or height == 0 or width == 0:
        raise ValueError(
            f"qkv must have H and W divisible by the window {window[0]} x {window[1]}, got {height} x {width}; pad it"
        )
    if not (0 <= shift[0] < window[0] and 0 <= shift[1] < window[1]):
        raise ValueError(
            f"shift must be at least 0 and less than the window {window[0]} x {window[1]}, got {format_value(shift)}"
        )
    check_attention("qkv", (batch, height * width, heads, qkv.shape[5]), height * width, scale, dropout_p, False)
    check_number("mask_value", mask_value)
    tokens = window[0] * window[1]
    for name, x, shape in (("bias", bias, (heads, tokens, tokens)), ("logit_scale", logit_scale, (heads,))):
        if x is None:
            continue
        check_tensor(name, x)
        if x.shape != shape:
            wanted = "(heads, N, N)" if name == "bias" else "(heads,)"
            raise ValueError(f"{name} must be {wanted} = {shape}, got {shape_of(x)}")
        check_wide("qkv", qkv, name, x)
    if logit_scale is not None and scale is not None:
        raise ValueError(f"scale must be None with logit_scale, which replaces it, got {format_value(scale)}")


def check_wide(first: str, x: Tensor, name: str, other: Tensor) -> None:
    """Check that ``other`` has the device of ``x``, and its dtype or float32."""
    if other.device != x.device:
        raise ValueError(f"{first} and {name} must be on one device, got {x.device} and {other.device}")
    kernels = x.dtype in KERNEL_DTYPES
    if (
        other.dtype != x.dtype
        and not (kernels and other.dtype == torch.float32)
        and not (kernels and other.dtype in KERNEL_DTYPES and is_autocast_enabled(x.device.type))
    ):
        alternative = "" if x.dtype == torch.float32 else ", or float32"
        raise TypeError(f"{name} must be {x.dtype}, as {first}{alternative}, got {other.dtype}")


def check_position_table(table: Any, window: Any, prefix_tokens: Any) -> None:
    check_tensor("table", table, 2, "(offsets, heads)")
    check_window(window)
    check_count("prefix_tokens", prefix_tokens, at_least=0)
    if prefix_tokens > 1:
        raise ValueError(f"prefix_tokens must be 0 or 1, got {format_value(prefix_tokens)}")
    rows = (2 * window[0] - 1) * (2 * window[1] - 1) + 3 * prefix_tokens
    if table.shape[0] != rows:
        raise ValueError(
            f"table must have {rows} rows for a window of {window[0]} x {window[1]} and {prefix_tokens} prefix tokens, "
            f"got {shape_of(table)}"
        )


# --- the encoder -------------------------------------------------------------------------------------------

_forms: dict[tuple, None] = {}  # arguments that passed: checking a small encoder takes as long as computing it


def _form(*arguments: Any) -> tuple | None:
    """Return the properties of ``arguments`` that the checks depend on, or None if they cannot be cached."""
    if torch.compiler.is_compiling() or is_portable():  # sizes may be symbols or tensors
        return None
    try:
        # with types, since 2, 2.0 and np.int64(2) are equal
        form = tuple(
            (x.shape, x.dtype, x.device, x.layout)
            if isinstance(x, Tensor)
            else x
            if x is None or type(x) is float
            else (type(x), x)
            for x in arguments
        )
        hash(form)
    except (TypeError, RuntimeError):  # invalid argument, symbolic size or nested tensor
        return None
    return form


def _remember(form: tuple | None) -> None:
    if form is None:
        return
    if len(_forms) >= 1024:
        _forms.pop(next(iter(_forms)), None)
    _forms[form] = None


def check_encoder(
    x: Any,
    blocks: Any,
    heads: Any,
    scale: Any,
    activation: Any,
    rope: Any,
    rope_prefix: Any,
    rope_layout: Any,
    first_token: Any,
) -> list[Any]:
    """Check the arguments of an encoder, unless equal ones have passed, and return the fields of all blocks."""
    check_flag("first_token", first_token)
    if not isinstance(blocks, Sequence) or isinstance(blocks, (str, bytes, Block)):
        raise TypeError(f"blocks must be a sequence of Block, got {type_name(blocks)}")
    if first_token and not blocks:
        raise ValueError("first_token requires a block, got no blocks")
    if first_token and rope is not None:
        raise ValueError("first_token requires that rope is None")
    for i, block in enumerate(blocks):
        if not isinstance(block, Block):
            raise TypeError(f"blocks[{i}] must be a Block, got {type_name(block)}")
    parts = [part for block in blocks for field in block for part in (field if isinstance(field, tuple) else (field,))]
    tables = rope if isinstance(rope, tuple) else (rope,)
    form = _form(x, *parts, heads, scale, activation, *tables, rope_prefix, rope_layout)
    if form is None or form not in _forms:
        _check_encoder(x, blocks, heads, scale, activation)
        head_dim = blocks[0].qkv_weight.shape[0] // 3 // heads if blocks else 1
        if blocks or rope is None:
            check_rope((*x.shape[:2], heads, head_dim), x.shape[1], x, rope, rope_prefix, rope_layout)
        _remember(form)
    return parts


def _check_encoder(x: Any, blocks: Sequence[Block], heads: int, scale: float | None, activation: str) -> None:
    check_tensor("x", x, 3, "(B, N, D)")
    check_rows(x)
    check_count("heads", heads, at_least=1)
    check_choice("activation", activation, ACTIVATIONS)
    dim = x.shape[2:]
    for i, block in enumerate(blocks):
        at = f"blocks[{i}]."
        check_norm(at + "norm1", block.norm1, dim[0], x)
        check_norm(at + "norm2", block.norm2, dim[0], x)
        check_linear("x", dim, at + "qkv_weight", block.qkv_weight, at + "qkv_bias", block.qkv_bias)
        inner = block.qkv_weight.shape[0] // 3  # sizes are tensors in torch.jit.trace and do not support divmod
        if block.qkv_weight.shape[0] % 3 or inner % heads:
            raise ValueError(
                f"{at}qkv_weight must have 3 * heads * head size rows for {format_value(heads)} heads, "
                f"got {shape_of(block.qkv_weight)}"
            )
        if block.qkv_weight.shape[0] != blocks[0].qkv_weight.shape[0]:
            raise ValueError(
                f"{at}qkv_weight must have the shape of blocks[0].qkv_weight, got {shape_of(block.qkv_weight)}"
            )
        features = torch.Size([inner])
        check_linear("the heads", features, at + "out_weight", block.out_weight, at + "out_bias", block.out_bias)
        check_linear("x", dim, at + "w1", block.w1, at + "b1", block.b1)
        hidden = hidden_features(at + "w1", block.w1, activation)
        check_linear(at + "w1", hidden, at + "w2", block.w2, at + "b2", block.b2)
        for name, weight in (("out_weight", block.out_weight), ("w2", block.w2)):
            if weight.shape[:1] != dim:
                raise ValueError(f"{at}{name} must have {dim[0]} rows to match x, got {shape_of(weight)}")
        for name, vector in (("layer_scale1", block.layer_scale1), ("layer_scale2", block.layer_scale2)):
            if vector is not None:
                check_vector(at + name, vector, at + "w2", block.w2)
        names = [name for name in Block._fields if not name.startswith("norm")]
        check_alike("x", x, **{at + name: getattr(block, name) for name in names})
        check_attention(at + "qkv_weight", (*x.shape[:2], heads, inner // heads), x.shape[1], scale, 0.0, False)
