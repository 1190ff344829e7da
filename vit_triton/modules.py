"""The nn.Modules that models are built from.

Every module remembers ``backend`` (None means: what :func:`vit_triton.use_backend` or the environment says
at the call) and hands it to :mod:`vit_triton.functional`.

One rule decides what is fused. A part is computed inside its neighbour's kernel only while nobody could
tell the difference: its ``forward`` is the one written here (or PyTorch's own, for Dropout, GELU and the
like) and it carries no hook. A part that was replaced, wrapped or hooked is called as a module of its own,
with the inputs and outputs it would have in an unfused model, so feature extractors, adapters and profilers
see what they expect and pay for it only where they look. :class:`Linear` and :class:`LayerNorm` run their
kernels either way. The one part with no kernel of its own is the softmax of :class:`Attention`: a hook there
asks for the N x N matrix, and it is then built (:func:`vit_triton.attention_maps` gives the same matrix
without giving up the kernel).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.backend import MAX_NORM_WIDTH, check_backend_name, resolve_backend
from vit_triton.checks import check_count, check_dense, check_probability, given, kind
from vit_triton.fallback import count_fallback

__all__ = ["Attention", "FeedForward", "LayerNorm", "Linear", "PatchEmbedding", "PatchRows", "Transformer"]


def checked_backend(backend: str | None) -> str | None:
    """`backend` if it is None or a backend's name; ValueError if not."""
    return None if backend is None else check_backend_name(backend)


def untouched(module: object, cls: type[nn.Module]) -> bool:
    """Whether `module` still computes what `cls` computes and nobody watches it: then it may be fused."""
    return (
        isinstance(module, cls)
        and (cls is not LayerNorm or cast(LayerNorm, module).normalized_shape[0] <= MAX_NORM_WIDTH)
        and type(module).forward is cls.forward
        and "forward" not in vars(module)  # wrappers such as accelerate's replace it on the instance
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def untouched_parts(sequence: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether `sequence` still consists of exactly these parts, each of them untouched."""
    parts = sequence._modules.values()
    return len(parts) == len(classes) and all(map(untouched, parts, classes))


def dropout_now(dropout: nn.Dropout | None) -> float:
    """The probability this Dropout applies at this moment: 0 outside training mode, and where there is none."""
    return float(dropout.p) if dropout is not None and dropout.training else 0.0


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` on the fused GEMM.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether to add a learned bias.
        backend: None, "triton", "torch" or "auto".
        device: where the parameters are made.
        dtype: the parameters' dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.backend = checked_backend(backend)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(input, self.weight, self.bias, backend=self.backend)


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    One that is wider than the kernels take, 65,536, is computed by the reference whatever the backend; on backend
    "triton" :func:`vit_triton.fallbacks` counts it.

    Args:
        dim: size of the last dimension.
        eps: added to the variance.
        backend: None, "triton", "torch" or "auto".
        device: where the parameters are made.
        dtype: the parameters' dtype.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.backend = checked_backend(backend)

    def forward(self, input: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        backend = self.backend
        if self.normalized_shape[0] > MAX_NORM_WIDTH and isinstance(input, Tensor):
            if resolve_backend(backend, "layer_norm", input, self.normalized_shape[0]) == "triton":
                count_fallback(self, f"a LayerNorm wider than {MAX_NORM_WIDTH}")
            backend = "torch"
        return cast(Tensor, F.layer_norm(input, self.weight, self.bias, eps=self.eps, backend=backend))

    def arguments(self) -> F.Norm:
        """(weight, bias, eps), the form in which the fused functions take a norm."""
        return self.weight, self.bias, self.eps


class PatchRows(nn.Module):
    """Cuts images into patches and flattens each one as (row in patch, column in patch, channel).

    The fused patch embedding gathers the same numbers in its load; this module is that first step as a part
    of its own, for callers who want the pixels of the patches (a masked autoencoder, for example).

    Args:
        patch_size: height and width of a patch.
    """

    def __init__(self, patch_size: tuple[int, int]) -> None:
        super().__init__()
        if not isinstance(patch_size, (tuple, list)) or len(patch_size) != 2:
            raise TypeError(f"patch_size must be (height, width), got {given(patch_size)}")
        for side in patch_size:
            check_count("patch_size", side, at_least=1)
        self.patch_size = patch_size

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H/ph * W/pw, ph * pw * C).

        Raises:
            TypeError: `image` is not a tensor.
            ValueError: `image` is not 4-D or does not divide into patches.
        """
        grid_h, grid_w = patch_grid(image, self.patch_size)
        patch_h, patch_w = self.patch_size
        cut = image.unflatten(3, (grid_w, patch_w)).unflatten(2, (grid_h, patch_h))  # (B, C, gh, ph, gw, pw)
        return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}"


def patch_grid(image: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """How many rows and columns of patches `image` has; TypeError or ValueError where that has no answer."""
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a torch.Tensor of shape (B, C, H, W), got {kind(image)}")
    check_dense("image", image)
    if image.dim() != 4:
        hint = "; a single image needs a batch dimension: image[None]" if image.dim() == 3 else ""
        raise ValueError(f"image must be 4-D, (B, C, H, W), got shape {tuple(image.shape)}{hint}")
    height, width = image.shape[-2:]
    patch_h, patch_w = patch_size
    if height % patch_h or width % patch_w or not height or not width:
        raise ValueError(f"image of {height} x {width} pixels does not divide into patches of {patch_h} x {patch_w}")
    return height // patch_h, width // patch_w


class PatchEmbedding(nn.Sequential):
    """PatchRows, LayerNorm, Linear, LayerNorm, run as the one fused operation `patch_embed`.

    It stays a plain Sequential: no ``__init__`` of its own, so it can be indexed and sliced, and every part
    works when called alone. A slice, or a copy with a part replaced or hooked, runs its parts one by one.
    """

    def forward(self, input: Tensor, *, pos: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, prefix + patches, dim).

        Args:
            input: the images, any strides.
            pos: (patches, dim), added to the patch tokens.
            prefix: (n, dim), tokens put in front of the patches as they are.
        """
        if untouched_parts(self, PatchRows, LayerNorm, Linear, LayerNorm):
            rows, pre_norm, projection, post_norm = cast(tuple[PatchRows, LayerNorm, Linear, LayerNorm], tuple(self))
            return F.patch_embed(
                input,
                projection.weight,
                projection.bias,
                patch_size=rows.patch_size,
                patch_order="p1 p2 c",
                pre_norm=pre_norm.arguments(),
                post_norm=post_norm.arguments(),
                pos=pos,
                prefix=prefix,
                backend=projection.backend,
            )
        return place_tokens(super().forward(input), pos, prefix)


def place_tokens(tokens: Tensor, pos: Tensor | None, prefix: Tensor | None) -> Tensor:
    """Add positions to patch tokens (B, P, dim) and put the prefix tokens (n, dim) in front of them."""
    if pos is not None:
        tokens = tokens + pos
    if prefix is not None:
        tokens = torch.cat((prefix.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens), dim=1)
    return tokens


class Attention(nn.Module):
    """Pre-norm multi-head self-attention (Dosovitskiy et al. 2021, arXiv:2010.11929).

    The norm runs inside the qkv projection, q, k and v are read where the projection wrote them, and the
    output projection adds bias, dropout and residual in its epilogue.

    Args:
        dim: width of the tokens.
        heads: number of heads; ``heads * dim_head`` need not equal `dim`.
        dim_head: width of a head. With one head as wide as the tokens there is no output projection.
        dropout: on the attention probabilities, and after the output projection. None is the form of SimpleViT: no
            Dropout modules, and always an output projection, without bias.
        backend: None, "triton", "torch" or "auto".
    """

    def __init__(
        self, dim: int, heads: int = 8, dim_head: int = 64, dropout: float | None = 0.0, *, backend: str | None = None
    ) -> None:
        super().__init__()
        for name, value in dict(dim=dim, heads=heads, dim_head=dim_head).items():
            check_count(name, value, at_least=1)
        if dropout is not None:
            check_probability("dropout", dropout)
        inner_dim = heads * dim_head
        self.heads = heads
        self.dim_head = dim_head
        self.scale = dim_head**-0.5
        self.backend = checked_backend(backend)
        self.norm = LayerNorm(dim, backend=backend)
        self.attend = nn.Softmax(dim=-1)
        self.dropout = None if dropout is None else nn.Dropout(dropout)
        self.to_qkv = Linear(dim, inner_dim * 3, bias=False, backend=backend)
        self.to_out: nn.Module = nn.Identity()
        if dropout is None:
            self.to_out = Linear(inner_dim, dim, bias=False, backend=backend)
        elif heads != 1 or dim_head != dim:
            self.to_out = nn.Sequential(Linear(inner_dim, dim, backend=backend), nn.Dropout(dropout))

    def project_qkv(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) -> packed queries, keys and values (B, N, 3, heads, dim_head)."""
        if untouched(self.norm, LayerNorm) and untouched(self.to_qkv, Linear):
            qkv = F.linear(
                x, self.to_qkv.weight, self.to_qkv.bias, norm=self.norm.arguments(), backend=self.to_qkv.backend
            )
        else:
            qkv = self.to_qkv(self.norm(x))
        return qkv.unflatten(-1, (3, self.heads, self.dim_head))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, N, dim) -> (B, N, dim), plus `residual` of the same shape if there is one.

        Raises:
            ValueError: `x` is not 3-D.
        """
        check_tokens(x)
        qkv = self.project_qkv(x)
        if self.softmax_is_whole:
            dropout_p = dropout_now(self.dropout)
            attended = F.attention_packed(qkv, scale=self.scale, dropout_p=dropout_p, backend=self.backend)
            out = cast(Tensor, attended)
        else:
            q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, heads, N, dim_head) each
            probabilities = self.attend(q @ k.transpose(-1, -2) * self.scale)
            if self.dropout is not None:
                probabilities = self.dropout(probabilities)
            out = (probabilities @ v).transpose(1, 2)
        return self.project_out(out.flatten(2), residual)

    def first_token(self, x: Tensor) -> Tensor:
        """``(self(x) + x)[:, :1]``: keys and values of all tokens, all else for the first one alone."""
        weight, bias, norm = self.to_qkv.weight, self.to_qkv.bias, self.norm.arguments()
        inner_dim, first = self.heads * self.dim_head, x[:, :1]
        q_bias, kv_bias = (None, None) if bias is None else (bias[:inner_dim], bias[inner_dim:])
        q = F.linear(first, weight[:inner_dim], q_bias, norm=norm, backend=self.to_qkv.backend)
        kv = F.linear(x, weight[inner_dim:], kv_bias, norm=norm, backend=self.to_qkv.backend)
        q, kv = q.unflatten(-1, (self.heads, self.dim_head)), kv.unflatten(-1, (2, self.heads, self.dim_head))
        dropout_p = dropout_now(self.dropout)
        out = F.attention(q, *kv.unbind(2), scale=self.scale, dropout_p=dropout_p, backend=self.backend)
        return self.project_out(cast(Tensor, out).flatten(2), first)

    @property
    def softmax_is_whole(self) -> bool:
        """Whether softmax and dropout are the ones made here, and nobody watches them."""
        return untouched(self.attend, nn.Softmax) and (self.dropout is None or untouched(self.dropout, nn.Dropout))

    @property
    def whole_before_projection(self) -> bool:
        """Whether every part but ``to_out`` is the one made here, and nobody watches any."""
        return (
            untouched(self, Attention)
            and untouched(self.norm, LayerNorm)
            and untouched(self.to_qkv, Linear)
            and self.softmax_is_whole
        )

    def projection(self) -> tuple[Linear, nn.Dropout | None] | None:
        """The output projection and the dropout behind it, if there is one that may be fused."""
        if untouched(self.to_out, Linear):
            return cast(Linear, self.to_out), None
        if untouched(self.to_out, nn.Sequential) and untouched_parts(self.to_out, Linear, nn.Dropout):
            return cast(tuple[Linear, nn.Dropout | None], tuple(self.to_out._modules.values()))
        return None

    def project_out(self, out: Tensor, residual: Tensor | None) -> Tensor:
        """Heads side by side (B, N, heads * dim_head) -> tokens (B, N, dim), plus `residual`."""
        projection = self.projection()
        if projection is None:
            return add(self.to_out(out), residual)
        linear, dropout = projection
        return F.linear(
            out,
            linear.weight,
            linear.bias,
            residual=residual,
            dropout_p=dropout_now(dropout),
            backend=linear.backend,
        )


class FeedForward(nn.Module):
    """Pre-norm MLP: LayerNorm, Linear, GELU, Dropout, Linear, Dropout, run as the one fused operation `mlp`.

    Args:
        dim: width of the tokens.
        hidden_dim: width between the two projections.
        dropout: after the activation and after the second projection. With None there are no Dropout modules.
        backend: None, "triton", "torch" or "auto".
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float | None = 0.0, *, backend: str | None = None) -> None:
        super().__init__()
        check_count("dim", dim, at_least=1)
        check_count("hidden_dim", hidden_dim, at_least=1)
        if dropout is not None:
            check_probability("dropout", dropout)
        self.backend = checked_backend(backend)
        norm, widen = LayerNorm(dim, backend=backend), Linear(dim, hidden_dim, backend=backend)
        narrow = Linear(hidden_dim, dim, backend=backend)
        if dropout is None:
            self.net = nn.Sequential(norm, widen, nn.GELU(), narrow)
        else:
            self.net = nn.Sequential(norm, widen, nn.GELU(), nn.Dropout(dropout), narrow, nn.Dropout(dropout))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., dim) -> (..., dim), plus `residual` of the same shape if there is one."""
        parts = self.parts()
        if parts is None:
            return add(self.net(x), residual)
        return F.mlp(
            x,
            parts.widen.weight,
            parts.widen.bias,
            parts.narrow.weight,
            parts.narrow.bias,
            norm=parts.norm.arguments(),
            activation=parts.activation,
            residual=residual,
            hidden_dropout_p=dropout_now(parts.hidden_dropout),
            dropout_p=dropout_now(parts.dropout),
            backend=self.backend,
        )

    def parts(self) -> MlpParts | None:
        """What the net is made of, if every part is the one made here and nobody watches any."""
        if not untouched(self.net, nn.Sequential):
            return None
        parts: tuple[Any, ...] = tuple(self.net._modules.values())
        if len(parts) == 4:
            parts = *parts[:3], None, parts[3], None
        classes = (LayerNorm, Linear, nn.GELU, nn.Dropout, Linear, nn.Dropout)
        whole = len(parts) == 6 and all(
            part is None or untouched(part, cls) for part, cls in zip(parts, classes, strict=True)
        )
        return MlpParts(*parts) if whole else None


class MlpParts(NamedTuple):
    """The parts of a :class:`FeedForward`."""

    norm: LayerNorm
    widen: Linear
    gelu: nn.GELU
    hidden_dropout: nn.Dropout | None
    narrow: Linear
    dropout: nn.Dropout | None

    @property
    def activation(self) -> str:
        return "gelu" if self.gelu.approximate == "none" else "gelu_tanh"


class Transformer(nn.Module):
    """A stack of pre-norm blocks and a final LayerNorm.

    Args:
        dim: width of the tokens.
        depth: number of blocks.
        heads: attention heads per block.
        dim_head: width of a head.
        mlp_dim: hidden width of the MLP.
        dropout: see :class:`Attention` and :class:`FeedForward`.
        backend: None, "triton", "torch" or "auto".
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        mlp_dim: int,
        dropout: float | None = 0.0,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim, at_least=1)
        check_count("depth", depth, at_least=0)
        check_count("mlp_dim", mlp_dim, at_least=1)
        self.norm = LayerNorm(dim, backend=backend)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Attention(dim, heads=heads, dim_head=dim_head, dropout=dropout, backend=backend),
                    FeedForward(dim, mlp_dim, dropout=dropout, backend=backend),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) -> tokens (B, N, dim)."""
        check_tokens(x)
        return self.norm(self._run(x))

    def _run(self, x: Tensor, first_token: bool = False) -> Tensor:
        """The blocks, without the norm behind them; ``first_token`` needs a last block that is whole."""
        found = as_operator(self.layers)
        if found is not None:
            blocks, options = found
            if resolve_backend(options["backend"], "encoder", x) == "triton":
                return F.encoder(x, blocks, **{**options, "backend": "triton"}, first_token=first_token)
        *before, last = self.layers if first_token else (*self.layers, None)
        for block in before:
            x = run_block(cast(nn.Module, block), x)
        if last is None:
            return x
        attention, feed_forward = last.children()
        x = cast(Attention, attention).first_token(x)
        return feed_forward(x, residual=x)

    def first_token(self, x: Tensor) -> Tensor:
        """``self(x)[:, :1]``, without what the last block would compute for the other tokens, if nobody could tell."""
        if not (len(self.layers) and untouched(self, Transformer) and untouched(self.norm, LayerNorm)):
            return self(x)[:, :1]
        if block_parts(self.layers[-1]) is None:
            return self(x)[:, :1]
        check_tokens(x)
        return self.norm(self._run(x, first_token=True))


class BlockParts(NamedTuple):
    """The parts of a block that are computed inside its kernels; ``projection`` is None where there is none."""

    attention: Attention
    projection: tuple[Linear, nn.Dropout | None] | None
    feed_forward: FeedForward
    mlp: MlpParts


def block_parts(block: nn.Module) -> BlockParts | None:
    """What the block is made of, if every part of both branches is the one made here and nobody watches any."""
    attention, feed_forward = block._modules.values()
    if not (isinstance(attention, Attention) and isinstance(feed_forward, FeedForward)):
        return None
    if not (attention.whole_before_projection and untouched(feed_forward, FeedForward)):
        return None
    projection, mlp = attention.projection(), feed_forward.parts()
    if mlp is None or (projection is None and not untouched(attention.to_out, nn.Identity)):
        return None
    return BlockParts(attention, projection, feed_forward, mlp)


def as_operator(blocks: Iterable[nn.Module]) -> tuple[list[F.Block], dict[str, Any]] | None:
    """The blocks and options that :func:`vit_triton.functional.encoder` takes, if nobody could tell that it was called:
    no gradients, no dropout, every part of every block the one made here, unwatched, and with the same options."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    arguments, options = [], []
    for block in blocks:
        parts = block_parts(block)
        if parts is None or parts.projection is None:
            return None
        attention, feed_forward, mlp = parts.attention, parts.feed_forward, parts.mlp
        project, out_dropout = parts.projection
        if any(map(dropout_now, (attention.dropout, out_dropout, mlp.hidden_dropout, mlp.dropout))):
            return None
        qkv, widen, narrow = attention.to_qkv, mlp.widen, mlp.narrow
        arguments.append(
            F.Block(
                *(attention.norm.arguments(), qkv.weight, qkv.bias, project.weight, project.bias),
                *(mlp.norm.arguments(), widen.weight, widen.bias, narrow.weight, narrow.bias),
            )
        )
        for backend in (attention.backend, qkv.backend, project.backend, feed_forward.backend):
            options.append((attention.heads, attention.scale, mlp.activation, backend))
    if len(set(options)) != 1:  # none without blocks
        return None
    return arguments, dict(zip(("heads", "scale", "activation", "backend"), options[0], strict=True))


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    """Attention and MLP, each added to its input."""
    attention, feed_forward = block.children()
    # A watched branch is called without the residual: that is the output its watcher expects.
    x = attention(x, residual=x) if untouched(attention, Attention) else attention(x) + x
    return feed_forward(x, residual=x) if untouched(feed_forward, FeedForward) else feed_forward(x) + x


def add(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual


def check_tokens(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor of shape (B, N, dim), got {kind(x)}")
    check_dense("x", x)
    if x.dim() != 3:
        raise ValueError(f"x must be 3-D, (B, N, dim), got shape {tuple(x.shape)}")
