"""What attention, MLPs and the branches of a block are made of in every library, and how they are computed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from vit_triton import functional as F
from vit_triton.autocast import autocasting
from vit_triton.backend import MAX_NORM_WIDTH
from vit_triton.checks import KERNEL_DTYPES, MAX_HEAD_DIM, MAX_ROWS
from vit_triton.integrations.recipes import Unknown, only, part, sharded
from vit_triton.modules import dropout_now

__all__ = [
    "AttentionParts",
    "Branch",
    "MlpParts",
    "activation_of",
    "attend",
    "check_head_size",
    "check_input",
    "check_rows",
    "check_tokens",
    "check_weight",
    "dropout_of",
    "feed_forward",
    "layer_norm_of",
    "linear_of",
    "norm_of",
]


ACTIVATIONS: dict[type[nn.Module], str] = {nn.SiLU: "silu", nn.ReLU: "relu"}


class Branch(NamedTuple):
    """How a branch is added to the residual; the default is one without a residual."""

    residual: Tensor | None = None
    layer_scale: Tensor | None = None
    drop_path_p: float = 0.0


class AttentionParts(NamedTuple):
    """Self-attention: [norm], one projection to q, k and v, [norms of q and k], softmax, [norm], projection."""

    heads: int
    scale: float
    qkv_weight: Tensor  # (3 * heads * head size, dim)
    qkv_bias: Tensor | None
    out_weight: Tensor | None  # None: no output projection
    out_bias: Tensor | None
    norm: F.Norm | None = None
    q_norm: F.Norm | None = None
    k_norm: F.Norm | None = None
    norm_type: str = "layer_norm"  # of q_norm and k_norm
    dropout_p: float = 0.0  # of the probabilities
    out_norm: F.Norm | None = None
    out_dropout_p: float = 0.0


class MlpParts(NamedTuple):
    """[norm], projection, activation, projection."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: str
    norm: F.Norm | None = None
    hidden_dropout_p: float = 0.0
    dropout_p: float = 0.0


def attend(x: Tensor, parts: AttentionParts, backend: str | None, branch: Branch = Branch()) -> Tensor:  # noqa: B008 - a tuple
    """(B, N, dim) -> (B, N, dim out)."""
    check_input(x, parts.qkv_weight, parts.out_weight, branch.layer_scale)
    check_tokens(x)
    check_rows(x.shape[0] * x.shape[1] * parts.heads)
    qkv = F.linear(x, parts.qkv_weight, parts.qkv_bias, norm=parts.norm, backend=backend)
    out = F.attention_packed(
        qkv.unflatten(-1, (3, parts.heads, -1)),
        q_norm=parts.q_norm,
        k_norm=parts.k_norm,
        norm_type=parts.norm_type,
        scale=parts.scale,
        dropout_p=parts.dropout_p,
        backend=backend,
    )
    out = cast(Tensor, out).flatten(2)
    if parts.out_weight is None:
        return out if branch.residual is None else out + branch.residual
    return F.linear(
        out,
        parts.out_weight,
        parts.out_bias,
        norm=parts.out_norm,
        dropout_p=parts.out_dropout_p,
        **branch._asdict(),
        backend=backend,
    )


def feed_forward(x: Tensor, parts: MlpParts, backend: str | None, branch: Branch = Branch()) -> Tensor:  # noqa: B008
    """(..., dim) -> (..., dim out)."""
    check_input(x, parts.w1, parts.w2, branch.layer_scale)
    return F.mlp(x, **parts._asdict(), **branch._asdict(), backend=backend)


def check_input(x: Tensor, *weights: Tensor | None) -> None:
    """Raise Unknown where there are more rows than the kernels count, where a weight is sharded or of a dtype that they
    do not take, or where dtypes are mixed by hand: PyTorch's promotion decides then."""
    for weight in weights:
        if weight is None:
            continue
        if sharded(weight):
            raise Unknown("a sharded weight")
        if weight.dtype != x.dtype:
            if not autocasting(x.device.type):
                raise Unknown("several dtypes")
            if weight.dtype not in KERNEL_DTYPES:
                raise Unknown(f"a weight of {weight.dtype}")
    check_rows(math.prod(x.shape[:-1]))


def check_rows(rows: int) -> None:
    """Raise Unknown if the kernels cannot count so many rows."""
    if rows > MAX_ROWS:
        raise Unknown("more rows than the kernels count")


def check_tokens(x: Tensor) -> None:
    """Raise Unknown if `x` is not (B, N, dim), N at least 1."""
    if x.ndim != 3 or x.shape[1] == 0:
        raise Unknown("no batch of tokens")


def check_weight(name: str, weight: Any) -> None:
    """Raise Unknown if `weight` is a tensor of a kind of its own, a quantized one for example, or has no elements.
    FSDP's are whole again when the module is called, see :func:`check_input`."""
    if type(weight) not in (nn.Parameter, Tensor) and not isinstance(weight, FakeTensor) and not sharded(weight):
        raise Unknown(f"{name}: its weight is a {type(weight).__name__}")
    if 0 in weight.shape:
        raise Unknown(f"{name}: its weight is empty")


def check_head_size(size: int) -> None:
    """Raise Unknown if heads are wider than the kernels take."""
    if size > MAX_HEAD_DIM:
        raise Unknown(f"heads are {size} wide, the kernels' at most {MAX_HEAD_DIM}")


def layer_norm_of(norm: Any) -> F.Norm:
    """(weight, bias, eps) of any kind of ``nn.LayerNorm``; Unknown if it is over more than the last dimension."""
    only(norm, "weight", "bias")
    if len(norm.normalized_shape) != 1:
        raise Unknown(f"normalises over {len(norm.normalized_shape)} dimensions")
    (width,) = norm.normalized_shape
    if not 0 < width <= MAX_NORM_WIDTH:
        raise Unknown(f"normalises {width} numbers, the kernels at most {MAX_NORM_WIDTH}")
    if getattr(norm, "_fast_norm", False):  # timm's
        raise Unknown("fast_norm is on, which autocast does not raise to float32")
    return norm.weight, norm.bias, norm.eps


def norm_of(module: nn.Module, name: str, *classes: type[nn.Module] | None) -> F.Norm:
    """That of the submodule of that name, one of `classes`."""
    return layer_norm_of(part(module, name, *classes))


def linear_of(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the Linear of that name; Unknown as of :func:`check_weight`."""
    linear = part(module, name, nn.Linear)
    weight = linear.weight
    check_weight(name, weight)
    return weight, linear.bias


def dropout_of(module: nn.Module, name: str) -> float:
    """What the Dropout of that name drops now; 0 where there is none."""
    if module._modules.get(name) is None:
        return 0.0
    dropout = part(module, name, nn.Dropout, nn.Identity)
    return 0.0 if isinstance(dropout, nn.Identity) else dropout_now(dropout)


def activation_of(module: nn.Module, name: str, others: dict[type[nn.Module], str] | None = None) -> str:
    """The name that :func:`vit_triton.functional.mlp` has for an activation of PyTorch or one of `others`."""
    activation = module._modules.get(name)
    if activation is None:
        raise Unknown(f"{name}: is missing")
    if isinstance(activation, nn.GELU):
        part(module, name, nn.GELU)
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    names = {**ACTIVATIONS, **(others or {})}
    for kind in type(activation).__mro__:
        if kind in names:
            part(module, name, kind)
            return names[kind]
    raise Unknown(f"{name}: no kernel has the activation {type(activation).__name__}")
