"""NaViT: Patch n' Pack, a Vision Transformer for any aspect ratio and resolution (Dehghani et al. 2023,
arXiv:2307.06304).

Compatible with ``vit_pytorch.na_vit.NaViT``: same arguments, order of children, parameter names and shapes
(``load_state_dict`` works in both directions), and same initial weights for the same seed. The images of a call are
packed sequences of :func:`vit_triton.functional.attention_varlen`: nothing is padded, and there is no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, cast

import torch
import torch.nn.functional as torch_F
from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.checks import check_count, check_dense, check_flag, check_number, check_probability, type_name
from vit_triton.models.arguments import check_patches, pair
from vit_triton.models.base import VisionModel
from vit_triton.modules import (
    Linear,
    active_dropout_p,
    add_residual,
    check_backend,
    consists_of_fusable,
    is_fusable,
)
from vit_triton.packing import concatenated

__all__ = ["NaViT"]


class NaViT(VisionModel):
    """Vision Transformer for classification of images of different sizes.

    Args:
        image_size: side or (height, width) of the largest image, in pixels.
        patch_size: side of a patch. Must divide `image_size` and the sides of every image.
        num_classes: width of the output.
        dim: width of the tokens.
        depth: number of transformer blocks.
        heads: attention heads per block.
        mlp_dim: hidden width of the MLP.
        channels: channels of the images.
        dim_head: head size, independent of ``dim / heads``.
        dropout: probability for the attention weights, the output projection and both layers of the MLP.
        emb_dropout: probability for the tokens, after the positions are added.
        token_dropout_prob: fraction of the patches of an image that training drops, a number or a function of the
            height and width of the image in pixels.
        backend: "triton", "torch", "auto" or None, the default of :func:`vit_triton.use_backend`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has an invalid value.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        token_dropout_prob: float | Callable[[int, int], float] | None = None,
        backend: str | None = None,
    ) -> None:
        check_backend(backend)
        check_count("patch_size", patch_size, at_least=1)
        image_size = pair("image_size", image_size)
        grid_h, grid_w = check_patches(image_size, (patch_size, patch_size))
        for name, value in (("dim", dim), ("heads", heads), ("mlp_dim", mlp_dim), ("channels", channels)):
            check_count(name, value, at_least=1)
        check_count("dim_head", dim_head, at_least=1)
        check_count("num_classes", num_classes, at_least=1)
        check_count("depth", depth, at_least=0)
        check_probability("dropout", dropout)
        check_probability("emb_dropout", emb_dropout)
        if token_dropout_prob is not None and not callable(token_dropout_prob):
            check_token_dropout("token_dropout_prob", token_dropout_prob)

        super().__init__(image_size, (patch_size, patch_size), channels, backend)
        self.token_dropout_prob = token_dropout_prob
        patch_dim = channels * patch_size**2

        # vit_pytorch has the same order, which determines children() and the initial weights for a seed
        self.to_patch_embedding = nn.Sequential(
            GammaNorm(patch_dim, backend=backend),
            Linear(patch_dim, dim, backend=backend),
            GammaNorm(dim, backend=backend),
        )
        self.pos_embed_height = nn.Parameter(torch.randn(grid_h, dim))
        self.pos_embed_width = nn.Parameter(torch.randn(grid_w, dim))
        self.dropout = nn.Dropout(emb_dropout)
        self.transformer = PackedTransformer(dim, depth, heads, dim_head, mlp_dim, dropout, backend=backend)
        self.attn_pool_queries = nn.Parameter(torch.randn(dim))
        self.attn_pool = PackedAttention(dim, heads, dim_head, backend=backend)
        self.to_latent = nn.Identity()
        self.mlp_head = nn.Sequential(
            GammaNorm(dim, backend=backend), Linear(dim, num_classes, bias=False, backend=backend)
        )

    def forward(
        self,
        batched_images: Sequence[Tensor] | Sequence[Sequence[Tensor]],
        group_images: bool = False,
        group_max_seq_len: int = 2048,
    ) -> Tensor:
        """Compute images (channels, H, W) -> (images, num_classes), in the order of the images.

        Args:
            batched_images: images of any sizes, or groups of them. Attention is within an image, and packed sequences
                need no groups, so groups do not affect the result.
            group_images: whether no image may have more than `group_max_seq_len` patches, as in vit_pytorch, which
                forms groups of at most so many. ``batched_images`` must then not have groups.
            group_max_seq_len: see `group_images`.

        Raises:
            TypeError: An image is not a floating-point tensor.
            ValueError: There are no images, or an image has the wrong rank, channels or device, sides not divisible by
                the patch size, more rows or columns of patches than the model has positions for, or too many patches
                for ``group_images``.
        """
        check_flag("group_images", group_images)
        check_count("group_max_seq_len", group_max_seq_len, at_least=1)
        images = flat_images(batched_images, group_images)
        grids = [self.patch_grid(image) for image in images]
        if group_images:
            for image, (rows, columns) in zip(images, grids, strict=True):
                kept = int(rows * columns * (1 - self.token_dropout(image)))
                if kept > group_max_seq_len:
                    raise ValueError(
                        f"group_max_seq_len is {group_max_seq_len}, but an image of {image.shape[1]} x "
                        f"{image.shape[2]} pixels has {kept} patches"
                    )
        x, lengths = self.embed(images, grids)
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=x.device)
        x = self.transformer(x, Sequences(starts, max(lengths)))
        each = torch.arange(len(images) + 1, dtype=torch.int32, device=x.device)
        queries = self.attn_pool_queries.expand(len(images), -1)
        pooled = Sequences(each, 1, starts, max(lengths))
        x = attend(self.attn_pool, self.attn_pool_queries[None], pooled, x, queries)
        return run_sequence(self.mlp_head, self.to_latent(x))

    def embed(self, images: list[Tensor], grids: list[tuple[int, int]]) -> tuple[Tensor, list[int]]:
        """Embed images as packed tokens (total, dim) with positions.

        Returns:
            The tokens, and the number of tokens of each image.
        """
        (side, _), rows, positions = self.patch_size, [], []
        for image, (grid_h, grid_w) in zip(images, grids, strict=True):
            patches = image.unflatten(2, (grid_w, side)).unflatten(1, (grid_h, side))  # (C, gh, p, gw, p)
            patches = patches.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
            pos = (self.pos_embed_height[:grid_h, None] + self.pos_embed_width[:grid_w]).flatten(0, 1)
            if self.training and self.token_dropout_prob is not None:
                # the random numbers are those of vit_pytorch
                number = max(1, int(len(patches) * (1 - self.token_dropout(image))))
                kept = torch.randn((len(patches),), device=image.device).topk(number, dim=-1).indices
                patches, pos = patches[kept], pos[kept]
            rows.append(patches)
            positions.append(pos)
        x = run_sequence(self.to_patch_embedding, torch.cat(rows)) + torch.cat(positions)
        return self.dropout(x), [len(patches) for patches in rows]

    def token_dropout(self, image: Tensor) -> float:
        """Return the fraction of the patches of an image that are dropped."""
        dropout = self.token_dropout_prob
        if not self.training or dropout is None:
            return 0.0
        if callable(dropout):
            dropout = dropout(image.shape[1], image.shape[2])
            check_token_dropout("result of token_dropout_prob", dropout)
        return dropout

    def patch_grid(self, image: Tensor) -> tuple[int, int]:
        """Return the number of rows and columns of patches in an image (channels, H, W)."""
        if not isinstance(image, Tensor):
            raise TypeError(f"batched_images must be tensors or groups of tensors, got {type_name(image)}")
        check_dense("an image of batched_images", image)
        if image.dim() != 3:
            raise ValueError(f"an image of batched_images must be 3-D, (C, H, W), got shape {tuple(image.shape)}")
        self.count_patches(image[None])
        device = self.pos_embed_height.device
        if image.device != device:
            raise ValueError(f"batched_images must be on the device of the model, {device}, got {image.device}")
        (side, _), (height, width) = self.patch_size, image.shape[1:]
        if height // side > len(self.pos_embed_height) or width // side > len(self.pos_embed_width):
            limit = f"{len(self.pos_embed_height)} x {len(self.pos_embed_width)} patches"
            raise self.position_error(image[None], height // side * (width // side), limit)
        return height // side, width // side

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


def check_token_dropout(name: str, value: float) -> None:
    check_number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be at least 0 and less than 1, got {value!r}")


def flat_images(batched_images: Sequence[Tensor] | Sequence[Sequence[Tensor]], group_images: bool) -> list[Tensor]:
    """Return the images of all groups."""
    if not isinstance(batched_images, (Sequence, Tensor)) or isinstance(batched_images, str):
        raise TypeError(f"batched_images must be a list of images or of lists, got {type_name(batched_images)}")
    groups: list[list[Tensor]]
    if len(batched_images) == 0:
        raise ValueError("batched_images must have at least one image, got none")
    if isinstance(batched_images[0], Tensor):
        groups = [cast(list[Tensor], list(batched_images))]
    elif group_images:
        raise ValueError("batched_images must be a list of images with group_images=True, got groups of them")
    else:
        for group in batched_images:
            if not isinstance(group, (Sequence, Tensor)) or isinstance(group, str):
                raise TypeError(f"batched_images must be tensors or groups of tensors, got {type_name(group)}")
            if len(group) == 0:
                raise ValueError("a group of batched_images must have at least one image, got none")
        groups = [list(group) for group in batched_images]
    return [image for group in groups for image in group]


class Sequences(NamedTuple):
    """Packed sequences, as arguments of :func:`vit_triton.functional.attention_varlen`."""

    cu_seqlens_q: Tensor
    max_seqlen_q: int
    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None


class GammaNorm(nn.Module):
    """LayerNorm with a weight called ``gamma``; the bias is a buffer of zeros."""

    def __init__(self, dim: int, *, backend: str | None = None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., dim) -> (..., dim)."""
        weight, bias, eps = self.arguments()
        return cast(Tensor, F.layer_norm(x, weight, bias, eps=eps, backend=self.backend))

    def arguments(self) -> F.Norm:
        """Return (weight, bias, eps), the argument ``norm`` of the functions."""
        return self.gamma, cast(Tensor, self.beta), 1e-5


class HeadNorm(nn.Module):
    """RMSNorm of queries or keys, with a weight for each head (Dehghani et al. 2023, arXiv:2302.05442)."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Compute (total, heads, dim) -> (total, heads, dim)."""
        return torch_F.normalize(x, dim=-1) * (self.scale * self.gamma.squeeze(1))


class PackedAttention(nn.Module):
    """Pre-norm attention of packed sequences, with norms of queries and keys.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        dim_head: head size.
        dropout: probability for the attention weights and after the output projection.
        backend: None, "triton", "torch" or "auto".
    """

    def __init__(
        self, dim: int, heads: int, dim_head: int, dropout: float = 0.0, *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout_p = dropout
        self.backend = backend
        self.norm = GammaNorm(dim, backend=backend)
        self.q_norm = HeadNorm(heads, dim_head)
        self.k_norm = HeadNorm(heads, dim_head)
        self.to_q = Linear(dim, heads * dim_head, bias=False, backend=backend)
        self.to_kv = Linear(dim, heads * dim_head * 2, bias=False, backend=backend)
        self.to_out = nn.Sequential(Linear(heads * dim_head, dim, bias=False, backend=backend), nn.Dropout(dropout))

    def forward(
        self, x: Tensor, sequences: Sequences, context: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Compute attention of norm(x) to itself or to `context`: (total, dim) -> (total, dim), plus `residual`.

        With `context`, `x` is one query (1, dim) for all sequences, and the result is (sequences, dim).
        """
        if context is not None:
            q = self.to_q(self.norm(x)).expand(len(sequences.cu_seqlens_q) - 1, -1)
            kv = self.to_kv(context)
        elif is_fusable(self.norm, GammaNorm) and is_fusable(self.to_q, Linear) and is_fusable(self.to_kv, Linear):
            weight = concatenated((self.to_q.weight, self.to_kv.weight))
            qkv = F.linear(x, weight, norm=self.norm.arguments(), backend=self.backend)
            q, kv = qkv.tensor_split([len(self.to_q.weight)], -1)
        else:
            x = self.norm(x)
            q, kv = self.to_q(x), self.to_kv(x)
        out = self.attend(q, kv, sequences)
        if not (is_fusable(self.to_out, nn.Sequential) and consists_of_fusable(self.to_out, Linear, nn.Dropout)):
            return add_residual(self.to_out(out), residual)
        linear, dropout = cast(tuple[Linear, nn.Dropout], tuple(self.to_out))
        return F.linear(
            out,
            linear.weight,
            linear.bias,
            residual=residual,
            dropout_p=active_dropout_p(dropout),
            backend=linear.backend,
        )

    def attend(self, q: Tensor, kv: Tensor, sequences: Sequences) -> Tensor:
        """Compute attention of projected queries (total_q, heads * dim_head), with the heads concatenated."""
        k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(1)
        q, k = self.q_norm(q.unflatten(-1, (self.heads, -1))), self.k_norm(k)
        dropout_p = self.dropout_p if self.training else 0.0
        # the norms include the scale
        out = F.attention_varlen(q, k, v, *sequences, scale=1.0, dropout_p=dropout_p, backend=self.backend)
        return cast(Tensor, out).flatten(1)


class PackedMlp(nn.Sequential):
    """GammaNorm, Linear, GELU, Dropout, Linear, Dropout, fused by :func:`vit_triton.functional.mlp`."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute (..., dim) -> (..., dim), plus `residual` of the same shape."""
        if not consists_of_fusable(self, GammaNorm, Linear, nn.GELU, nn.Dropout, Linear, nn.Dropout):
            return add_residual(super().forward(input), residual)
        norm, fc1, _, hidden_dropout, fc2, dropout = cast(
            tuple[GammaNorm, Linear, nn.GELU, nn.Dropout, Linear, nn.Dropout], tuple(self)
        )
        return F.mlp(
            *(input, fc1.weight, fc1.bias, fc2.weight, fc2.bias),
            norm=norm.arguments(),
            residual=residual,
            hidden_dropout_p=active_dropout_p(hidden_dropout),
            dropout_p=active_dropout_p(dropout),
            backend=fc1.backend,
        )


class PackedTransformer(nn.Module):
    """A stack of pre-norm blocks and a final norm, on packed sequences."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        mlp_dim: int,
        dropout: float,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = PackedAttention(dim, heads, dim_head, dropout, backend=backend)
            mlp = PackedMlp(
                GammaNorm(dim, backend=backend),
                Linear(dim, mlp_dim, backend=backend),
                nn.GELU(),
                nn.Dropout(dropout),
                Linear(mlp_dim, dim, backend=backend),
                nn.Dropout(dropout),
            )
            self.layers.append(nn.ModuleList([attention, mlp]))
        self.norm = GammaNorm(dim, backend=backend)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """Compute (total, dim) -> (total, dim)."""
        for layer in self.layers:
            attention, mlp = layer.children()
            x = attend(attention, x, sequences, None, x)
            x = mlp(x, residual=x) if is_fusable(mlp, PackedMlp) else mlp(x) + x
        return self.norm(x)


def attend(attention: nn.Module, x: Tensor, sequences: Sequences, context: Tensor | None, residual: Tensor) -> Tensor:
    """Compute attention plus `residual`; a hook expects the output without it."""
    if is_fusable(attention, PackedAttention):
        return attention(x, sequences, context, residual)
    return attention(x, sequences, context) + residual


def run_sequence(sequence: nn.Sequential, x: Tensor) -> Tensor:
    """Run a Sequential that starts with GammaNorm and Linear, which are fused unless replaced or hooked."""
    norm, linear, *others = sequence
    fusable = is_fusable(sequence, nn.Sequential) and is_fusable(norm, GammaNorm) and is_fusable(linear, Linear)
    if not fusable:
        return sequence(x)
    norm, linear = cast(GammaNorm, norm), cast(Linear, linear)
    x = F.linear(x, linear.weight, linear.bias, norm=norm.arguments(), backend=linear.backend)
    for module in others:
        x = module(x)
    return x
