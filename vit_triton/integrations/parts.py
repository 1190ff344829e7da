"""Attention, MLPs and residual branches in a form common to all libraries, and the functions that compute them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as torch_F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from vit_triton import functional as F
from vit_triton import reference
from vit_triton.autocast import is_autocast_enabled
from vit_triton.backend import MAX_NORM_WIDTH, resolve_backend
from vit_triton.checks import KERNEL_DTYPES, MAX_HEAD_DIM, MAX_ROWS, check_rope, check_score_mask
from vit_triton.integrations.recipes import (
    UnsupportedModule,
    check_members,
    has_hooks,
    is_sharded,
    submodule,
    why_modified,
)
from vit_triton.modules import active_dropout_p, may_fuse_branches
from vit_triton.packing import concatenated

__all__ = [
    "AttentionInput",
    "AttentionParts",
    "BlockParts",
    "Branch",
    "ForeignLinear",
    "MlpParts",
    "activation_of",
    "apply_module",
    "attend",
    "attend_input",
    "check_head_size",
    "check_input",
    "check_map",
    "check_mask",
    "check_rows",
    "check_tokens",
    "check_weight",
    "compute_block",
    "dropout_of",
    "encoder_block",
    "feed_forward",
    "is_plain",
    "joined_linears",
    "layer_norm",
    "layer_norm_of",
    "linear",
    "linear_of",
    "norm_of",
]


ACTIVATIONS: dict[type[nn.Module], str] = {nn.SiLU: "silu", nn.ReLU: "relu"}


class Branch(NamedTuple):
    """Arguments that add a branch to the residual. The default has no residual."""

    residual: Tensor | None = None
    layer_scale: Tensor | None = None
    drop_path_p: float = 0.0


class ForeignLinear:
    """Linears of another library, such as those of peft with adapters: they run as modules, and their results are
    concatenated. It takes the place of a weight in the parts, and has its shape."""

    def __init__(self, *modules: Any) -> None:
        self.modules = modules
        self.shape = torch.Size((sum(each.out_features for each in modules), modules[0].in_features))

    def __call__(self, x: Tensor) -> Tensor:
        outs = [each(x) for each in self.modules]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)


Weight = Tensor | ForeignLinear

# weight, bias and eps of a LayerNorm, or another norm, which runs as a module
AnyNorm = F.Norm | nn.Module | None


class AttentionParts(NamedTuple):
    """Self-attention: [norm], QKV projection, [q_norm, k_norm], [rotation], softmax attention, [out_norm], output
    projection."""

    heads: int
    scale: float
    qkv_weight: Weight  # (3 * heads * head_dim, dim)
    qkv_bias: Tensor | None
    out_weight: Weight | None  # None: no output projection
    out_bias: Tensor | None
    norm: AnyNorm = None
    q_norm: F.Norm | None = None
    k_norm: F.Norm | None = None
    norm_type: str = "layer_norm"  # for q_norm and k_norm
    dropout_p: float = 0.0  # for the attention probabilities
    out_norm: AnyNorm = None
    out_dropout_p: float = 0.0
    rope_layout: str = "half"
    rope_prefix: int | None = None  # None: any


class MlpParts(NamedTuple):
    """[norm], projection, activation, [inner_norm], projection."""

    w1: Weight
    b1: Tensor | None
    w2: Weight
    b2: Tensor | None
    activation: str
    norm: AnyNorm = None
    hidden_dropout_p: float = 0.0
    dropout_p: float = 0.0
    inner_norm: AnyNorm = None


class BlockParts(NamedTuple):
    """A pre-norm block; the branches have no residual."""

    attention: AttentionParts
    mlp: MlpParts
    branch1: Branch = Branch()
    branch2: Branch = Branch()


class AttentionInput(NamedTuple):
    """Tokens, tables of rotary positions whose rows belong to the last tokens, and a mask or bias of the scores."""

    x: Tensor
    rope: F.Rope | None = None
    mask: Tensor | None = None


def attend(
    x: Tensor,
    parts: AttentionParts,
    backend: str | None,
    branch: Branch = Branch(),  # noqa: B008 - a tuple
    rope: F.Rope | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute attention and its branch: (B, N, dim) -> (B, N, dim_out).

    Args:
        bias: added to the scores, or a bool mask; broadcasts to (B, heads, N, N).
    """
    check_input(x, parts.qkv_weight, parts.out_weight, branch.layer_scale)
    check_tokens(x)
    check_rows(x.shape[0] * x.shape[1] * parts.heads)
    positions = {} if rope is None else rotary_options(x, parts, rope)
    check_mask(x, parts.heads, x.shape[1], bias)
    normed, norm = apply_module(x, parts.norm)
    rotation: dict[str, Any] = {}
    if positions and rotates_in_projection(x, parts):
        rotation, positions = dict(positions, rope_heads=parts.heads), {}
    weight, bias_ = parts.qkv_weight, parts.qkv_bias
    if branch.residual is normed and not rotation and not isinstance(weight, ForeignLinear):
        qkv, residual = F.linear_and_input(normed, weight, bias_, norm=norm, backend=backend)
        branch = branch._replace(residual=residual)
    else:
        qkv = linear(normed, weight, bias_, norm=norm, **rotation, backend=backend)
    out = F.attention_packed(
        qkv.unflatten(-1, (3, parts.heads, -1)),
        q_norm=parts.q_norm,
        k_norm=parts.k_norm,
        norm_type=parts.norm_type,
        **positions,
        bias=bias,
        scale=parts.scale,
        dropout_p=parts.dropout_p,
        backend=backend,
    )
    return project_out(cast(Tensor, out).flatten(2), parts, backend, branch)


def project_out(out: Tensor, parts: AttentionParts, backend: str | None, branch: Branch) -> Tensor:
    """Compute the output projection and the branch of concatenated heads (..., heads * head_dim)."""
    if parts.out_weight is None:
        return out if branch.residual is None else out + branch.residual
    out, out_norm = apply_module(out, parts.out_norm)
    return linear(
        out,
        parts.out_weight,
        parts.out_bias,
        norm=out_norm,
        dropout_p=parts.out_dropout_p,
        **branch._asdict(),
        backend=backend,
    )


def rotates_in_projection(x: Tensor, parts: AttentionParts) -> bool:
    """Whether the projection rotates q and k, with less memory traffic on a GPU. Norms of q and k precede the
    rotation."""
    plain = parts.q_norm is None and parts.k_norm is None and not isinstance(parts.qkv_weight, ForeignLinear)
    return x.device.type != "cpu" and plain


def rotary_options(x: Tensor, parts: AttentionParts, rope: F.Rope) -> dict[str, Any]:
    """Return the arguments of attention for tables of rotary positions.

    Raises:
        UnsupportedModule: The tables require a gradient or do not fit.
    """
    if torch.is_grad_enabled() and any(table.requires_grad for table in rope):
        raise UnsupportedModule("rotary tables require a gradient")
    head_dim = parts.qkv_weight.shape[0] // 3 // parts.heads
    prefix = x.shape[1] - rope[0].shape[-2]
    if rope[0].shape[-1] != head_dim or parts.rope_prefix not in (None, prefix):
        raise UnsupportedModule("rotary tables do not fit the tokens")
    try:
        check_rope((*x.shape[:2], parts.heads, head_dim), x.shape[1], x, rope, prefix, parts.rope_layout)
    except (TypeError, ValueError) as error:
        raise UnsupportedModule(str(error)) from error
    return dict(rope=rope, rope_prefix=prefix, rope_layout=parts.rope_layout)


def check_mask(x: Tensor, heads: int, queries: int, mask: Tensor | None) -> None:
    """Raise UnsupportedModule unless a mask fits the scores of `queries` and the keys x (B, N, dim)."""
    try:
        check_score_mask(x, (x.shape[0], heads, queries, x.shape[1]), mask, None, False)
    except (TypeError, ValueError) as error:
        raise UnsupportedModule(str(error).replace("bias", "attention mask", 1)) from error


def apply_module(x: Tensor, norm: AnyNorm) -> tuple[Tensor, F.Norm | None]:
    """Apply a norm that runs as a module; return other norms, which the next operator computes."""
    return (norm(x), None) if isinstance(norm, nn.Module) else (x, norm)


def layer_norm(x: Tensor, norm: F.Norm, backend: str | None) -> Tensor:
    weight, bias, eps = norm
    return cast(Tensor, F.layer_norm(x, weight, bias, eps=eps, backend=backend))


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    *,
    norm: F.Norm | None = None,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_path_p: float = 0.0,
    backend: str | None,
    **rotation: Any,
) -> Tensor:
    """Compute :func:`vit_triton.functional.linear`; a foreign Linear runs as a module between norm and branch."""
    branch = dict(residual=residual, layer_scale=layer_scale, drop_path_p=drop_path_p)
    if not isinstance(weight, ForeignLinear):
        options: dict[str, Any] = dict(norm=norm, dropout_p=dropout_p, **branch, **rotation)
        return F.linear(x, weight, bias, **options, backend=backend)
    out = weight(x if norm is None else layer_norm(x, norm, backend))
    out = out if bias is None else out + bias
    out = torch_F.dropout(out, dropout_p) if dropout_p > 0 else out
    out = out if layer_scale is None else out * layer_scale
    if drop_path_p > 0:
        out = out * reference.drop_path_factors(x, drop_path_p).to(out.dtype).view(-1, *(1,) * (out.ndim - 1))
    return out if residual is None else out + residual


def attend_input(given: AttentionInput, parts: AttentionParts, backend: str | None) -> Tensor:
    return attend(given.x, parts, backend, rope=given.rope, bias=given.mask)


def feed_forward(x: Tensor, parts: MlpParts, backend: str | None, branch: Branch = Branch()) -> Tensor:  # noqa: B008
    """Compute an MLP and its branch: (..., dim) -> (..., dim_out)."""
    check_input(x, parts.w1, parts.w2, branch.layer_scale)
    x, norm = apply_module(x, parts.norm)
    options = parts._replace(norm=norm)._asdict()
    foreign = isinstance(parts.w1, ForeignLinear) or isinstance(parts.w2, ForeignLinear)
    if options.pop("inner_norm") is None and not foreign:
        return F.mlp(x, **options, **branch._asdict(), backend=backend)
    hidden = reference.activate(linear(x, parts.w1, parts.b1, norm=norm, backend=backend), parts.activation)
    hidden = torch_F.dropout(hidden, parts.hidden_dropout_p) if parts.hidden_dropout_p > 0 else hidden
    hidden, inner_norm = apply_module(hidden, parts.inner_norm)
    options = dict(norm=inner_norm, dropout_p=parts.dropout_p, **branch._asdict())
    return linear(hidden, parts.w2, parts.b2, **options, backend=backend)


def compute_block(given: Tensor | AttentionInput, parts: BlockParts, backend: str | None) -> Tensor:
    """Compute a block: (B, N, dim) -> (B, N, dim)."""
    x, rope, mask = given if isinstance(given, AttentionInput) else AttentionInput(given)
    if rope is None and mask is None and may_fuse_branches() and resolve_backend(backend, "encoder", x) == "triton":
        check_tokens(x)
        block = encoder_block(x, parts)
        if block is not None:
            heads, scale, activation = parts.attention.heads, parts.attention.scale, parts.mlp.activation
            return F.encoder(x, [block], heads=heads, scale=scale, activation=activation, backend=backend)
    x = attend(x, parts.attention, backend, parts.branch1._replace(residual=x), rope, mask)
    return feed_forward(x, parts.mlp, backend, parts.branch2._replace(residual=x))


def is_plain(parts: BlockParts) -> bool:
    """Return whether :func:`vit_triton.functional.encoder` supports blocks of this kind."""
    attention = parts.attention
    unsupported = attention.q_norm, attention.k_norm, attention.out_norm, parts.mlp.inner_norm
    weights = attention.qkv_weight, attention.out_weight, parts.mlp.w1, parts.mlp.w2
    if any(isinstance(weight, ForeignLinear) for weight in weights):
        return False
    normed = isinstance(attention.norm, tuple) and isinstance(parts.mlp.norm, tuple)
    return normed and attention.out_weight is not None and all(part is None for part in unsupported)


def encoder_block(x: Tensor, parts: BlockParts) -> F.Block | None:
    """Return a block as an argument of :func:`vit_triton.functional.encoder`, or None if that does not support it."""
    attention, mlp, branch1, branch2 = parts
    if not is_plain(parts) or x.shape[0] * x.shape[1] * attention.heads > MAX_ROWS:
        return None
    dropouts = attention.dropout_p, attention.out_dropout_p, mlp.hidden_dropout_p, mlp.dropout_p
    if any((*dropouts, branch1.drop_path_p, branch2.drop_path_p)):
        return None
    block = F.Block(
        norm1=cast(F.Norm, attention.norm),
        qkv_weight=cast(Tensor, attention.qkv_weight),
        qkv_bias=attention.qkv_bias,
        out_weight=cast(Tensor, attention.out_weight),
        out_bias=attention.out_bias,
        norm2=cast(F.Norm, mlp.norm),
        w1=cast(Tensor, mlp.w1),
        b1=mlp.b1,
        w2=cast(Tensor, mlp.w2),
        b2=mlp.b2,
        layer_scale1=branch1.layer_scale,
        layer_scale2=branch2.layer_scale,
    )
    casts = is_autocast_enabled(x.device.type)
    for tensor in block:
        if isinstance(tensor, Tensor):
            fits = tensor.dtype == x.dtype or casts and tensor.dtype in KERNEL_DTYPES
            if not fits or tensor.device != x.device or is_sharded(tensor):
                return None
    return block


def check_input(x: Tensor, *weights: Weight | None) -> None:
    """Check the dtypes and the number of rows of an input and its weights.

    Raises:
        UnsupportedModule: A weight is sharded or has an unsupported dtype, dtypes differ outside autocast, where
            PyTorch's type promotion applies, or there are more rows than the kernels support.
    """
    for weight in weights:
        if weight is None or isinstance(weight, ForeignLinear):
            continue
        if is_sharded(weight):
            raise UnsupportedModule("sharded weight")
        if weight.dtype != x.dtype:
            if not is_autocast_enabled(x.device.type):
                raise UnsupportedModule("input and weights have different dtypes")
            if weight.dtype not in KERNEL_DTYPES:
                raise UnsupportedModule(f"{weight.dtype} weight")
    check_rows(math.prod(x.shape[:-1]))


def check_rows(rows: int) -> None:
    """Raise UnsupportedModule if there are more rows than the kernels support."""
    if rows > MAX_ROWS:
        raise UnsupportedModule("more rows than the kernels support")


def check_tokens(x: Tensor) -> None:
    """Raise UnsupportedModule unless `x` is (B, N, dim) with N >= 1."""
    if x.ndim != 3 or x.shape[1] == 0:
        raise UnsupportedModule("input is not (B, N, dim) with at least one token")


def check_map(x: Tensor) -> None:
    """Raise UnsupportedModule unless `x` is (B, H, W, dim) with at least one token."""
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise UnsupportedModule("input is not (B, H, W, dim) with at least one token")


def check_weight(name: str, weight: Any) -> None:
    """Raise UnsupportedModule if `weight` is empty or a tensor subclass, such as a quantized weight.

    Sharded weights pass: FSDP gathers them before the call, and :func:`check_input` rejects those that remain sharded.
    """
    if type(weight) not in (nn.Parameter, Tensor) and not isinstance(weight, FakeTensor) and not is_sharded(weight):
        raise UnsupportedModule(f"{name}: weight is a {type(weight).__name__}")
    if 0 in weight.shape:
        raise UnsupportedModule(f"{name}: weight is empty")


def check_head_size(size: int) -> None:
    """Raise UnsupportedModule if the head size exceeds the maximum of the kernels."""
    if size > MAX_HEAD_DIM:
        raise UnsupportedModule(f"head size {size} exceeds the maximum, {MAX_HEAD_DIM}")


def layer_norm_of(norm: Any) -> F.Norm:
    """Return (weight, bias, eps) from a LayerNorm over the last dimension.

    Raises:
        UnsupportedModule: The module normalizes several dimensions, is too wide, or is timm's fast norm.
    """
    check_members(norm, "weight", "bias")
    if len(norm.normalized_shape) != 1:
        raise UnsupportedModule(f"normalizes {len(norm.normalized_shape)} dimensions")
    (width,) = norm.normalized_shape
    if not 0 < width <= MAX_NORM_WIDTH:
        raise UnsupportedModule(f"width {width} is not in the supported range, 1 to {MAX_NORM_WIDTH}")
    if getattr(norm, "_fast_norm", False):  # timm
        raise UnsupportedModule("fast_norm is on: autocast does not run it in float32")
    return norm.weight, norm.bias, norm.eps


def norm_of(module: nn.Module, name: str, *classes: type[nn.Module] | None) -> F.Norm:
    """Return (weight, bias, eps) from the norm called `name`, an instance of one of `classes`."""
    return layer_norm_of(submodule(module, name, *classes))


def linear_of(module: nn.Module, name: str) -> tuple[Any, Tensor | None]:
    """Return weight and bias of the Linear called `name`, after :func:`check_weight`.

    A Linear that peft wraps, which adds the output of an adapter, is a :class:`ForeignLinear` with its own bias.
    """
    child: Any = module._modules.get(name)
    if isinstance(getattr(child, "base_layer", None), nn.Linear) and type(child).__module__.startswith("peft."):
        if has_hooks(child) or "forward" in vars(child):
            raise UnsupportedModule(f"{name}: {why_modified(child, ())}")
        return ForeignLinear(child), None
    linear = submodule(module, name, nn.Linear)
    weight = linear.weight
    check_weight(name, weight)
    return weight, linear.bias


def joined_linears(module: nn.Module, *names: str) -> tuple[Any, Tensor | None]:
    """Return the concatenated weights and biases of several Linears, which then run as one GEMM.

    Every call concatenates them unless the model is prepacked.
    """
    weights, biases = zip(*(linear_of(module, name) for name in names), strict=True)
    if any(isinstance(weight, ForeignLinear) for weight in weights):
        return ForeignLinear(*(module._modules[name] for name in names)), None
    weight = concatenated(weights)
    if all(bias is None for bias in biases):
        return weight, None
    if any(bias is None for bias in biases):
        zeros = weight.new_zeros(weight.shape[0] // len(biases))
        return weight, torch.cat([zeros if bias is None else bias for bias in biases])
    return weight, concatenated(biases)


def dropout_of(module: nn.Module, name: str) -> float:
    """Return the probability that the Dropout called `name` uses in its current mode, or 0 if it does not exist."""
    if module._modules.get(name) is None:
        return 0.0
    dropout = submodule(module, name, nn.Dropout, nn.Identity)
    return 0.0 if isinstance(dropout, nn.Identity) else active_dropout_p(dropout)


def activation_of(module: nn.Module, name: str, others: dict[type[nn.Module], str] | None = None) -> str:
    """Return the activation called `name` as an argument for :func:`vit_triton.functional.mlp`.

    Args:
        others: activations of a library, in addition to those of PyTorch.
    """
    activation = module._modules.get(name)
    if activation is None:
        raise UnsupportedModule(f"{name}: missing")
    if isinstance(activation, nn.GELU):
        submodule(module, name, nn.GELU)
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    names = {**ACTIVATIONS, **(others or {})}
    for kind in type(activation).__mro__:
        if kind in names:
            submodule(module, name, kind)
            return names[kind]
    raise UnsupportedModule(f"{name}: activation {type(activation).__name__} is not supported")
