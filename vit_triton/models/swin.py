"""Swin Transformer: hierarchical vision transformer using shifted windows (Liu et al. 2021, arXiv:2103.14030), and
version 2 (Liu et al. 2022, arXiv:2111.09883).

Compatible with ``torchvision.models.SwinTransformer``: same arguments, parameter names and shapes, so that its
published weights load. Feature maps are (B, H, W, C) throughout; the attention reads its windows where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as torch_F
from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.checks import check_count, check_number, check_probability
from vit_triton.models.arguments import pair
from vit_triton.models.base import VisionModel
from vit_triton.modules import (
    LayerNorm,
    Linear,
    active_dropout_p,
    check_backend,
    consists_of_fusable,
    is_fusable,
)
from vit_triton.windows import attend_windows, fit_windows, pad_map

__all__ = ["SwinTransformer"]


class SwinTransformer(VisionModel):
    """Swin Transformer for classification.

    Images may have any size. A feature map that the window does not divide is padded with zeros, as in torchvision.

    Args:
        patch_size: side or (height, width) of a patch, in pixels.
        embed_dim: width of the tokens in the first stage; it doubles from stage to stage.
        depths: number of blocks in each stage.
        num_heads: attention heads in each stage.
        window_size: side or (height, width) of a window, in tokens; at most 256 tokens with backend "triton".
        mlp_ratio: hidden width of the MLP divided by the width of the tokens.
        dropout: probability after the output projection and after both layers of the MLP.
        attention_dropout: probability for the attention weights.
        stochastic_depth_prob: probability of dropping a branch of the last block; it grows linearly from 0.
        num_classes: width of the output.
        version: 1, or 2 with cosine attention, norms behind the branches and biases from an MLP.
        backend: "triton", "torch", "auto" or None, the default of :func:`vit_triton.use_backend`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has an invalid value.
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int],
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int | tuple[int, int],
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth_prob: float = 0.1,
        num_classes: int = 1000,
        *,
        version: int = 1,
        backend: str | None = None,
    ) -> None:
        check_backend(backend)
        patch_h, patch_w = patch_size = pair("patch_size", patch_size)
        window = pair("window_size", window_size)
        check_count("embed_dim", embed_dim, at_least=1)
        check_count("num_classes", num_classes, at_least=1)
        check_number("mlp_ratio", mlp_ratio)
        if version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {version!r}")
        for name, value in (("depths", depths), ("num_heads", num_heads)):
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise TypeError(f"{name} must be a sequence of integers, one per stage, got {value!r}")
        if len(depths) != len(num_heads) or not depths:
            raise ValueError(f"depths and num_heads must have one number per stage, got {depths} and {num_heads}")
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            check_count(f"depths[{stage}]", depth, at_least=0)
            check_count(f"num_heads[{stage}]", heads, at_least=1)
            if embed_dim * 2**stage % heads:
                raise ValueError(f"num_heads[{stage}] must divide the width {embed_dim * 2**stage}, got {heads}")
        rates = dict(dropout=dropout, attention_dropout=attention_dropout, stochastic_depth_prob=stochastic_depth_prob)
        for name, rate in rates.items():
            check_probability(name, rate)

        super().__init__(None, patch_size, 3, backend)
        embedding = SwinPatchEmbedding(
            nn.Conv2d(3, embed_dim, (patch_h, patch_w), (patch_h, patch_w)),
            ChannelsLast(),
            LayerNorm(embed_dim, backend=backend),
        )
        embedding.backend = backend
        layers: list[nn.Module] = [embedding]
        last, done = max(1, sum(depths) - 1), 0
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim = embed_dim * 2**stage
            if stage:
                layers.append(PatchMerging(dim // 2, version, backend=backend))
            blocks = []
            for i in range(depth):
                shift = (window[0] // 2, window[1] // 2) if i % 2 else (0, 0)
                drop = stochastic_depth_prob * (done + i) / last
                blocks.append(
                    SwinBlock(
                        *(dim, heads, window, shift, int(dim * mlp_ratio)),
                        *(dropout, attention_dropout, drop, version),
                        backend=backend,
                    )
                )
            done += depth
            layers.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*layers)
        self.norm = LayerNorm(dim, backend=backend)
        self.head = Linear(dim, num_classes, backend=backend)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, img: Tensor) -> Tensor:
        """Compute (B, 3, H, W) -> (B, num_classes).

        Pixels at the right and at the bottom that do not fill a patch are ignored, as in a convolution.

        Raises:
            TypeError: `img` is not a floating-point tensor.
            ValueError: `img` has the wrong rank or channels, or is smaller than a patch.
        """
        if isinstance(img, Tensor) and img.dim() == 4:
            sides = (n // p * p for n, p in zip(img.shape[2:], self.patch_size, strict=True))
            height, width = sides
            if not (height and width):
                least = f"{self.patch_size[0]} x {self.patch_size[1]}"
                raise ValueError(f"img must have at least {least} pixels, got {img.shape[2]} x {img.shape[3]}")
            img = img[:, :, :height, :width]
        self.count_patches(img)
        return self.head(self.norm(self.features(img)).mean((1, 2)))

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


class ChannelsLast(nn.Module):
    """(B, C, H, W) -> (B, H, W, C)"""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class SwinPatchEmbedding(nn.Sequential):
    """Conv2d, ChannelsLast and LayerNorm, fused by :func:`vit_triton.functional.patch_embed`."""

    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not consists_of_fusable(self, nn.Conv2d, ChannelsLast, LayerNorm):
            return super().forward(input)
        projection, _, norm = cast(tuple[nn.Conv2d, ChannelsLast, LayerNorm], tuple(self))
        patch_h, patch_w = projection.kernel_size
        tokens = F.patch_embed(
            input,
            projection.weight.flatten(1),
            projection.bias,
            patch_size=(patch_h, patch_w),
            patch_order="c p1 p2",
            post_norm=norm.arguments(),
            backend=self.backend,
        )
        return tokens.unflatten(1, (input.shape[2] // patch_h, input.shape[3] // patch_w))


class PatchMerging(nn.Module):
    """Merge 2 x 2 tokens into one of twice their width: norm and projection, in version 2 projection and norm."""

    def __init__(self, dim: int, version: int, *, backend: str | None = None) -> None:
        super().__init__()
        self.version = version
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, backend=backend)
        self.norm = LayerNorm(4 * dim if version == 1 else 2 * dim, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, H, W, dim) -> (B, H / 2, W / 2, 2 * dim); odd sides are padded."""
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = torch_F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return project(x, self.norm, self.reduction) if self.version == 1 else self.norm(self.reduction(x))


class SwinAttention(nn.Module):
    """Attention in windows, shifted by ``shift``."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: tuple[int, int],
        shift: tuple[int, int],
        dropout: float,
        attention_dropout: float,
        version: int,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.window, self.shift, self.version = heads, window, shift, version
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.backend = backend
        self.qkv = Linear(dim, 3 * dim, backend=backend)
        self.proj = Linear(dim, dim, backend=backend)
        self.register_buffer("relative_position_index", position_index(window))  # for torchvision's state dicts
        if version == 1:
            self.relative_position_bias_table = nn.Parameter(
                torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), heads)
            )
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        else:
            self.register_buffer("relative_coords_table", log_offsets(window))
            self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
            self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, heads, bias=False))

    def forward(
        self, x: Tensor, *, norm: nn.Module | None = None, residual: Tensor | None = None, drop_path_p: float = 0.0
    ) -> Tensor:
        """Compute (B, H, W, dim) -> (B, H, W, dim) of norm(x), plus `residual`."""
        height, width = x.shape[1:3]
        pads, shift = fit_windows((height, width), self.window, self.shift)
        if any(pads):
            x, norm = pad_map(x if norm is None else norm(x), pads), None
        table, logit_scale = self.bias_table()
        out = attend_windows(
            self.project_qkv(x, norm),
            table,
            (height, width),
            heads=self.heads,
            window=self.window,
            shift=shift,
            logit_scale=logit_scale,
            dropout_p=self.attention_dropout if self.training else 0.0,
            backend=self.backend,
        )
        dropout_p = self.dropout if self.training else 0.0
        if is_fusable(self.proj, Linear):
            return F.linear(
                out,
                self.proj.weight,
                self.proj.bias,
                residual=residual,
                drop_path_p=drop_path_p,
                dropout_p=dropout_p,
                backend=self.proj.backend,
            )
        return add_branch(torch_F.dropout(self.proj(out), dropout_p), residual, drop_path_p)

    def project_qkv(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        if self.version == 1:
            return project(x, norm, self.qkv)
        q_bias, _, v_bias = self.qkv.bias.chunk(3)
        bias = torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))  # version 2 has no bias of the keys
        return F.linear(x, self.qkv.weight, bias, backend=self.qkv.backend)

    def bias_table(self) -> tuple[Tensor, Tensor | None]:
        """Return the table of the relative position bias, and the factors of cosine attention."""
        if self.version == 1:
            return self.relative_position_bias_table, None
        table = 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table).view(-1, self.heads))
        return table, self.logit_scale.clamp(max=math.log(100.0)).exp().flatten()


class SwinMlp(nn.Sequential):
    """Linear, GELU, Dropout, Linear, Dropout, fused by :func:`vit_triton.functional.mlp`."""

    def forward(
        self,
        input: Tensor,
        *,
        norm: nn.Module | None = None,
        residual: Tensor | None = None,
        drop_path_p: float = 0.0,
    ) -> Tensor:
        fusable = consists_of_fusable(self, Linear, nn.GELU, nn.Dropout, Linear, nn.Dropout)
        if not fusable or not (norm is None or is_fusable(norm, LayerNorm)):
            return add_branch(super().forward(input if norm is None else norm(input)), residual, drop_path_p)
        fc1, _, hidden_dropout, fc2, dropout = cast(tuple[Linear, nn.GELU, nn.Dropout, Linear, nn.Dropout], tuple(self))
        return F.mlp(
            *(input, fc1.weight, fc1.bias, fc2.weight, fc2.bias),
            norm=None if norm is None else cast(LayerNorm, norm).arguments(),
            residual=residual,
            drop_path_p=drop_path_p,
            hidden_dropout_p=active_dropout_p(hidden_dropout),
            dropout_p=active_dropout_p(dropout),
            backend=fc1.backend,
        )


class SwinBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); in version 2 x + norm1(attention(x)), then x + norm2(mlp(x))."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: tuple[int, int],
        shift: tuple[int, int],
        hidden: int,
        dropout: float,
        attention_dropout: float,
        drop_path_p: float,
        version: int,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.drop_path_p, self.version = drop_path_p, version
        self.norm1 = LayerNorm(dim, backend=backend)
        self.attn = SwinAttention(dim, heads, window, shift, dropout, attention_dropout, version, backend=backend)
        self.norm2 = LayerNorm(dim, backend=backend)
        layers = Linear(dim, hidden, backend=backend), Linear(hidden, dim, backend=backend)
        self.mlp = SwinMlp(layers[0], nn.GELU(), nn.Dropout(dropout), layers[1], nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, H, W, dim) -> (B, H, W, dim)."""
        drop_path_p = self.drop_path_p if self.training else 0.0
        branches: tuple[tuple[nn.Module, nn.Module, type[nn.Module]], ...]
        branches = (self.norm1, self.attn, SwinAttention), (self.norm2, self.mlp, SwinMlp)
        for norm, branch, cls in branches:
            if self.version == 2:
                x = add_branch(norm(branch(x)), x, drop_path_p)
            elif is_fusable(branch, cls):
                x = branch(x, norm=norm, residual=x, drop_path_p=drop_path_p)
            else:  # a hook expects the branch alone
                x = add_branch(branch(norm(x)), x, drop_path_p)
        return x


def project(x: Tensor, norm: nn.Module | None, linear: Linear) -> Tensor:
    """Compute linear(norm(x)), fused unless a module was replaced or hooked."""
    if norm is not None and is_fusable(norm, LayerNorm) and is_fusable(linear, Linear):
        return F.linear(x, linear.weight, linear.bias, norm=cast(LayerNorm, norm).arguments(), backend=linear.backend)
    return linear(x if norm is None else norm(x))


def add_branch(branch: Tensor, residual: Tensor | None, drop_path_p: float) -> Tensor:
    """Add `residual` after stochastic depth, the same for all tokens of a sample."""
    if drop_path_p > 0:
        keep = branch.new_empty(branch.shape[0], 1, 1, 1).bernoulli_(1.0 - drop_path_p)
        branch = branch * (keep / (1.0 - drop_path_p) if drop_path_p < 1 else keep)
    return branch if residual is None else branch + residual


def position_index(window: tuple[int, int]) -> Tensor:
    """Return the row of the bias table for each pair of tokens, flat."""
    y, x = (side.flatten() for side in torch.meshgrid(*map(torch.arange, window), indexing="ij"))
    dy, dx = y[:, None] - y + window[0] - 1, x[:, None] - x + window[1] - 1
    return (dy * (2 * window[1] - 1) + dx).flatten()


def log_offsets(window: tuple[int, int]) -> Tensor:
    """Return the offsets between tokens on a logarithmic scale, (1, 2 * wh - 1, 2 * ww - 1, 2)."""
    sides = [torch.arange(-(n - 1), n, dtype=torch.float32) / (n - 1) * 8 for n in window]
    offsets = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)[None]
    return offsets.sign() * torch.log2(offsets.abs() + 1.0) / 3.0
