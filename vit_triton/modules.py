"""The nn.Modules that models are built from.

Every module passes its ``backend`` to :mod:`vit_triton.functional`. None selects the default at the time of the call,
see :func:`vit_triton.use_backend`.

A submodule is fused into the kernel of its neighbor if it has its original ``forward`` and no hooks. A submodule that
was replaced, wrapped or hooked is called as a module, with the inputs and outputs of an unfused model, so that feature
extractors, adapters and profilers work; only this submodule is slower. :class:`Linear` and :class:`LayerNorm` use their
kernels in both cases. A hook on the softmax of :class:`Attention` materializes the N x N matrix;
:func:`vit_triton.attention_maps` returns the same matrix without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.backend import MAX_NORM_WIDTH, check_backend_name, resolve_backend
from vit_triton.checks import check_count, check_dense, check_probability, format_value, type_name
from vit_triton.fallback import count_fallback
from vit_triton.recording import active_recorder

__all__ = ["Attention", "FeedForward", "LayerNorm", "Linear", "PatchEmbedding", "PatchRows", "Transformer"]


def check_backend(backend: str | None) -> str | None:
    """Return `backend` if it is a backend or None, else raise ValueError."""
    return None if backend is None else check_backend_name(backend)


def is_fusable(module: object, cls: type[nn.Module]) -> bool:
    """Return whether `module` has the ``forward`` of `cls` and no hooks, so that it may be fused."""
    if not isinstance(module, cls) or type(module).forward is not cls.forward:
        return False
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state  # wrappers such as those of accelerate replace it on the instance
        or (cls is LayerNorm and state["normalized_shape"][0] > MAX_NORM_WIDTH)
    )


def parameters_of(module: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor | None]:
    """Return ``(module.weight, module.bias)``; ``nn.Module.__getattr__`` takes ten times as long."""
    parameters = module._parameters
    if "weight" in parameters and "bias" in parameters:
        return cast(Tensor, parameters["weight"]), parameters["bias"]
    return module.weight, module.bias  # parametrized


def consists_of_fusable(sequence: nn.Module, *classes: type[nn.Module]) -> bool:
    """Return whether the children of `sequence` are fusable modules of exactly these classes."""
    children = sequence._modules.values()
    return len(children) == len(classes) and all(map(is_fusable, children, classes))


def active_dropout_p(dropout: nn.Dropout | None) -> float:
    """Return the probability that `dropout` applies in its current mode, or 0 for None."""
    return float(dropout.p) if dropout is not None and dropout.training else 0.0


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` with the fused GEMM.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether to add a learned bias.
        backend: None, "triton", "torch" or "auto".
        device: device of the parameters.
        dtype: dtype of the parameters.
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
        self.backend = check_backend(backend)

    def forward(self, input: Tensor) -> Tensor:
        """Compute (..., in_features) -> (..., out_features)."""
        return F.linear(input, *parameters_of(self), backend=self.backend)


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    A LayerNorm wider than 65,536 falls back to PyTorch; with backend "triton", :func:`vit_triton.fallbacks` counts it.

    Args:
        dim: size of the last dimension.
        eps: added to the variance.
        backend: None, "triton", "torch" or "auto".
        device: device of the parameters.
        dtype: dtype of the parameters.
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
        self.backend = check_backend(backend)

    def forward(self, input: Tensor) -> Tensor:
        """Compute (..., dim) -> (..., dim)."""
        backend = self.backend
        if self.normalized_shape[0] > MAX_NORM_WIDTH and isinstance(input, Tensor):
            if resolve_backend(backend, "layer_norm", input, self.normalized_shape[0]) == "triton":
                count_fallback(self, f"LayerNorm is wider than {MAX_NORM_WIDTH}")
            backend = "torch"
        return cast(Tensor, F.layer_norm(input, self.weight, self.bias, eps=self.eps, backend=backend))

    def arguments(self) -> F.Norm:
        """Return (weight, bias, eps), the argument ``norm`` of the functions."""
        return *parameters_of(self), self.eps


class PatchRows(nn.Module):
    """Split images into patches, flattened as (row, column, channel).

    The fused patch embedding includes this step. As a separate module it returns the pixels of the patches, for example
    for a masked autoencoder.

    Args:
        patch_size: height and width of a patch.
    """

    def __init__(self, patch_size: tuple[int, int]) -> None:
        super().__init__()
        if not isinstance(patch_size, (tuple, list)) or len(patch_size) != 2:
            raise TypeError(f"patch_size must be (height, width), got {format_value(patch_size)}")
        for side in patch_size:
            check_count("patch_size", side, at_least=1)
        self.patch_size = patch_size

    def forward(self, image: Tensor) -> Tensor:
        """Rearrange (B, C, H, W) to (B, H/ph * W/pw, ph * pw * C).

        Raises:
            TypeError: `image` is not a tensor.
            ValueError: `image` is not 4-D, or its sides are not divisible by the patch size.
        """
        grid_h, grid_w = patch_grid(image, self.patch_size)
        patch_h, patch_w = self.patch_size
        cut = image.unflatten(3, (grid_w, patch_w)).unflatten(2, (grid_h, patch_h))  # (B, C, gh, ph, gw, pw)
        return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}"


def patch_grid(image: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """Return the number of rows and columns of patches in `image`; raise TypeError or ValueError if it is invalid."""
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a torch.Tensor of shape (B, C, H, W), got {type_name(image)}")
    check_dense("image", image)
    if image.dim() != 4:
        hint = "; add a batch dimension to a single image: image[None]" if image.dim() == 3 else ""
        raise ValueError(f"image must be 4-D, (B, C, H, W), got shape {tuple(image.shape)}{hint}")
    height, width = image.shape[-2:]
    patch_h, patch_w = patch_size
    if height % patch_h or width % patch_w or not height or not width:
        raise ValueError(
            f"image of {height} x {width} pixels is not divisible into patches of {patch_h} x {patch_w} pixels"
        )
    return height // patch_h, width // patch_w


class PatchEmbedding(nn.Sequential):
    """PatchRows, LayerNorm, Linear and LayerNorm, fused by :func:`vit_triton.functional.patch_embed`.

    Like any Sequential, it can be indexed and sliced. Slices, and instances with a replaced or hooked child, run their
    children one by one.
    """

    def forward(self, input: Tensor, *, pos: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        """Compute (B, C, H, W) -> (B, n + patches, dim).

        Args:
            input: the images, any strides.
            pos: (patches, dim), added to the patch tokens.
            prefix: (n, dim), prefix tokens.
        """
        if consists_of_fusable(self, PatchRows, LayerNorm, Linear, LayerNorm):
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
    """Add positions (P, dim) to patch tokens (B, P, dim) and prepend the prefix tokens (n, dim)."""
    if pos is not None:
        tokens = tokens + pos
    if prefix is not None:
        tokens = torch.cat((prefix.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens), dim=1)
    return tokens


class Attention(nn.Module):
    """Pre-norm multi-head self-attention (Dosovitskiy et al. 2021, arXiv:2010.11929).

    The norm is fused into the QKV projection, attention reads q, k and v in place, and bias, dropout and residual are
    part of the epilogue of the output projection.

    Args:
        dim: width of the tokens.
        heads: number of heads. ``heads * dim_head`` may differ from `dim`.
        dim_head: head size. There is no output projection if ``heads == 1`` and ``dim_head == dim``.
        dropout: probability for the attention weights and after the output projection. None, used by SimpleViT, creates
            no Dropout modules and always an output projection, without bias.
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
        self.backend = check_backend(backend)
        self.norm = LayerNorm(dim, backend=backend)
        self.attend = nn.Softmax(dim=-1)
        self.dropout = None if dropout is None else nn.Dropout(dropout)
        self.to_qkv = Linear(dim, inner_dim * 3, bias=False, backend=backend)
        self.to_out: nn.Module = nn.Identity()
        if dropout is None:
            self.to_out = Linear(inner_dim, dim, bias=False, backend=backend)
        elif heads != 1 or dim_head != dim:
            self.to_out = nn.Sequential(Linear(inner_dim, dim, backend=backend), nn.Dropout(dropout))

    def project_qkv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project tokens (B, N, dim) to packed q, k and v (B, N, 3, heads, dim_head); also return x, as
        :func:`.linear_and_input`."""
        norm, to_qkv = self.norm, self.to_qkv
        if is_fusable(norm, LayerNorm) and is_fusable(to_qkv, Linear):
            options: dict[str, Any] = dict(norm=norm.arguments(), backend=to_qkv.backend)
            qkv, x = F.linear_and_input(x, *parameters_of(to_qkv), **options)
        else:
            qkv = to_qkv(norm(x))
        return qkv.unflatten(-1, (3, self.heads, self.dim_head)), x

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute (B, N, dim) -> (B, N, dim), plus `residual` of the same shape.

        Raises:
            ValueError: `x` is not 3-D.
        """
        check_tokens(x)
        qkv, passed = self.project_qkv(x)
        residual = passed if residual is x else residual
        if self.softmax_is_fusable:
            dropout_p = active_dropout_p(self.dropout)
            attended = F.attention_packed(qkv, scale=self.scale, dropout_p=dropout_p, backend=self.backend)
            out = cast(Tensor, attended)
        else:
            q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, heads, N, dim_head) each
            recorder = active_recorder()
            if recorder is not None:
                recorder.attention(q.transpose(1, 2), k.transpose(1, 2), scale=self.scale)
            probabilities = self.attend(q @ k.transpose(-1, -2) * self.scale)
            if self.dropout is not None:
                probabilities = self.dropout(probabilities)
            out = (probabilities @ v).transpose(1, 2)
        return self.project_out(out.flatten(2), residual)

    def first_token(self, x: Tensor) -> Tensor:
        """Compute ``(self(x) + x)[:, :1]``, without queries and outputs for the other tokens."""
        bias, inner_dim = self.to_qkv.bias, self.heads * self.dim_head
        sizes = inner_dim, 2 * inner_dim
        q_weight, kv_weight = self.to_qkv.weight.split(sizes)
        q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
        options: dict[str, Any] = dict(norm=self.norm.arguments(), backend=self.to_qkv.backend)
        kv, x = F.linear_and_input(x, kv_weight, kv_bias, **options)
        q, first = F.linear_and_input(x[:, :1], q_weight, q_bias, **options)
        q, kv = q.unflatten(-1, (self.heads, self.dim_head)), kv.unflatten(-1, (2, self.heads, self.dim_head))
        dropout_p = active_dropout_p(self.dropout)
        out = F.attention(q, *kv.unbind(2), scale=self.scale, dropout_p=dropout_p, backend=self.backend)
        return self.project_out(cast(Tensor, out).flatten(2), first)

    @property
    def softmax_is_fusable(self) -> bool:
        """Whether softmax and dropout may be fused."""
        modules = self._modules
        dropout = modules["dropout"] if "dropout" in modules else self.dropout
        return is_fusable(modules["attend"], nn.Softmax) and (dropout is None or is_fusable(dropout, nn.Dropout))

    @property
    def fusable_before_projection(self) -> bool:
        """Whether every child except ``to_out`` may be fused."""
        return (
            is_fusable(self, Attention)
            and is_fusable(self._modules["norm"], LayerNorm)
            and is_fusable(self._modules["to_qkv"], Linear)
            and self.softmax_is_fusable
        )

    def projection(self) -> tuple[Linear, nn.Dropout | None] | None:
        """Return the output projection and its dropout, or None if they cannot be fused or do not exist."""
        to_out = self.to_out
        if is_fusable(to_out, Linear):
            return cast(Linear, to_out), None
        if is_fusable(to_out, nn.Sequential) and consists_of_fusable(to_out, Linear, nn.Dropout):
            return cast(tuple[Linear, nn.Dropout | None], tuple(to_out._modules.values()))
        return None

    def project_out(self, out: Tensor, residual: Tensor | None) -> Tensor:
        """Project concatenated heads (B, N, heads * dim_head) to tokens (B, N, dim) and add `residual`."""
        projection = self.projection()
        if projection is None:
            return add_residual(self.to_out(out), residual)
        linear, dropout = projection
        return F.linear(
            out,
            *parameters_of(linear),
            residual=residual,
            dropout_p=active_dropout_p(dropout),
            backend=linear.backend,
        )


class FeedForward(nn.Module):
    """Pre-norm MLP: LayerNorm, Linear, GELU, Dropout, Linear, Dropout, fused by :func:`vit_triton.functional.mlp`.

    Args:
        dim: width of the tokens.
        hidden_dim: width between the two projections.
        dropout: probability after the activation and after the second projection. None creates no Dropout modules.
        backend: None, "triton", "torch" or "auto".
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float | None = 0.0, *, backend: str | None = None) -> None:
        super().__init__()
        check_count("dim", dim, at_least=1)
        check_count("hidden_dim", hidden_dim, at_least=1)
        if dropout is not None:
            check_probability("dropout", dropout)
        self.backend = check_backend(backend)
        norm, fc1 = LayerNorm(dim, backend=backend), Linear(dim, hidden_dim, backend=backend)
        fc2 = Linear(hidden_dim, dim, backend=backend)
        if dropout is None:
            self.net = nn.Sequential(norm, fc1, nn.GELU(), fc2)
        else:
            self.net = nn.Sequential(norm, fc1, nn.GELU(), nn.Dropout(dropout), fc2, nn.Dropout(dropout))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute (..., dim) -> (..., dim), plus `residual` of the same shape."""
        parts = self.parts()
        if parts is None:
            return add_residual(self.net(x), residual)
        return F.mlp(
            x,
            *parameters_of(parts.fc1),
            *parameters_of(parts.fc2),
            norm=parts.norm.arguments(),
            activation=parts.activation,
            residual=residual,
            hidden_dropout_p=active_dropout_p(parts.hidden_dropout),
            dropout_p=active_dropout_p(parts.dropout),
            backend=self.backend,
        )

    def parts(self) -> MlpParts | None:
        """Return the children of ``net``, or None if one of them cannot be fused."""
        net = self.net
        if not is_fusable(net, nn.Sequential):
            return None
        parts: tuple[Any, ...] = tuple(net._modules.values())
        if len(parts) == 4:
            parts = *parts[:3], None, parts[3], None
        classes = (LayerNorm, Linear, nn.GELU, nn.Dropout, Linear, nn.Dropout)
        whole = len(parts) == 6 and all(
            part is None or is_fusable(part, cls) for part, cls in zip(parts, classes, strict=True)
        )
        return MlpParts(*parts) if whole else None


class MlpParts(NamedTuple):
    """The children of :attr:`FeedForward.net`."""

    norm: LayerNorm
    fc1: Linear
    gelu: nn.GELU
    hidden_dropout: nn.Dropout | None
    fc2: Linear
    dropout: nn.Dropout | None

    @property
    def activation(self) -> str:
        return "gelu" if self.gelu.approximate == "none" else "gelu_tanh"


def may_fuse_blocks() -> bool:
    """Return whether blocks may run as one operator: gradients are disabled, and nothing requires single parts."""
    return not torch.is_grad_enabled() and not _requires_parts()


def may_fuse_branches() -> bool:
    """Return whether a block may run as one autograd Function: gradients are enabled, and nothing requires single
    parts."""
    return torch.is_grad_enabled() and not _requires_parts()


def _requires_parts() -> bool:
    # attention_maps records every attention
    return torch.compiler.is_compiling() or active_recorder() is not None


class Transformer(nn.Module):
    """A stack of pre-norm blocks and a final LayerNorm.

    Args:
        dim: width of the tokens.
        depth: number of blocks.
        heads: attention heads per block.
        dim_head: head size.
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
        """Compute (B, N, dim) -> (B, N, dim)."""
        check_tokens(x)
        return self.norm(self._run(x))

    def _run(self, x: Tensor, first_token: bool = False) -> Tensor:
        """Run the blocks without the final norm; ``first_token`` requires a last block whose parts may be fused."""
        encoded = encode(x, self.layers, first_token) if may_fuse_blocks() else None
        if encoded is not None:
            return encoded
        *before, last = self.layers if first_token else (*self.layers, None)
        for block in before:
            x = run_block(cast(nn.Module, block), x)
        if last is None:
            return x
        attention, feed_forward = last.children()
        x = cast(Attention, attention).first_token(x)
        return feed_forward(x, residual=x)

    def first_token(self, x: Tensor) -> Tensor:
        """Compute ``self(x)[:, :1]``; the last block omits the other tokens if its parts may be fused."""
        if not (len(self.layers) and is_fusable(self, Transformer) and is_fusable(self.norm, LayerNorm)):
            return self(x)[:, :1]
        if block_parts(self.layers[-1]) is None or active_recorder() is not None:
            return self(x)[:, :1]
        check_tokens(x)
        return self.norm(self._run(x, first_token=True))


class BlockParts(NamedTuple):
    """The fused modules of a block; ``projection`` is None if there is no output projection."""

    attention: Attention
    projection: tuple[Linear, nn.Dropout | None] | None
    feed_forward: FeedForward
    mlp: MlpParts


def block_parts(block: nn.Module) -> BlockParts | None:
    """Return the modules of a block, or None if one of them cannot be fused."""
    attention, feed_forward = block._modules.values()
    if not (isinstance(attention, Attention) and isinstance(feed_forward, FeedForward)):
        return None
    if not (attention.fusable_before_projection and is_fusable(feed_forward, FeedForward)):
        return None
    projection, mlp = attention.projection(), feed_forward.parts()
    if mlp is None or (projection is None and not is_fusable(attention.to_out, nn.Identity)):
        return None
    return BlockParts(attention, projection, feed_forward, mlp)


def encode(x: Tensor, blocks: Iterable[nn.Module], first_token: bool = False) -> Tensor | None:
    """Compute blocks by :func:`vit_triton.functional.encoder`, or return None if it cannot be used.

    It requires that there is no active dropout, that every module may be fused, that all blocks have the same options,
    and that the backend selects the kernels.
    """
    arguments, options = [], []
    for block in blocks:
        parts = block_parts(block)
        if parts is None or parts.projection is None:
            return None
        attention, feed_forward, mlp = parts.attention, parts.feed_forward, parts.mlp
        project, out_dropout = parts.projection
        if any(map(active_dropout_p, (attention.dropout, out_dropout, mlp.hidden_dropout, mlp.dropout))):
            return None
        qkv = attention.to_qkv
        arguments.append(
            F.Block(
                *(attention.norm.arguments(), *parameters_of(qkv), *parameters_of(project)),
                *(mlp.norm.arguments(), *parameters_of(mlp.fc1), *parameters_of(mlp.fc2)),
            )
        )
        for backend in (attention.backend, qkv.backend, project.backend, feed_forward.backend):
            options.append((attention.heads, attention.scale, mlp.activation, backend))
    if len(set(options)) != 1:  # also without blocks
        return None
    heads, scale, activation, backend = options[0]
    weight, head_dim = arguments[0].qkv_weight, attention.dim_head
    if resolve_backend(backend, "encoder", x, weight=weight, head_dim=head_dim) != "triton":
        return None
    return F.encoder(
        x, arguments, heads=heads, scale=scale, activation=activation, first_token=first_token, backend=backend
    )


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    """Compute attention and MLP, each with its residual."""
    encoded = encode(x, [block]) if may_fuse_branches() else None
    if encoded is not None:
        return encoded
    attention, feed_forward = cast(tuple[nn.Module, nn.Module], block._modules.values())
    # a hook expects the output of the branch without the residual
    x = attention(x, residual=x) if is_fusable(attention, Attention) else attention(x) + x
    return feed_forward(x, residual=x) if is_fusable(feed_forward, FeedForward) else feed_forward(x) + x


def add_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual


def check_tokens(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor of shape (B, N, dim), got {type_name(x)}")
    check_dense("x", x)
    if x.dim() != 3:
        raise ValueError(f"x must be 3-D, (B, N, dim), got shape {tuple(x.shape)}")
