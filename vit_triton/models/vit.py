"""ViT: an image is worth 16x16 words (Dosovitskiy et al. 2021, arXiv:2010.11929).

A drop-in for ``vit_pytorch.ViT``: the same arguments, the same children in the same order, the same parameter
names and shapes (``load_state_dict`` works both ways, strict), and from the same seed the same initial weights.
"""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor, nn

from vit_triton.modules import (
    LayerNorm,
    Linear,
    PatchEmbedding,
    PatchRows,
    Transformer,
    checked_backend,
    patch_grid,
    place_tokens,
    untouched,
)

__all__ = ["ViT"]


class ViT(nn.Module):
    """Vision transformer for classification.

    Args:
        image_size: the largest image, side or (height, width), in pixels. Smaller ones are accepted.
        patch_size: side or (height, width) of a patch; divides `image_size`.
        num_classes: width of the output. With 0 there is no head, and all tokens are returned.
        dim: width of the tokens.
        depth: number of transformer blocks.
        heads: attention heads per block.
        mlp_dim: hidden width of the MLP.
        pool: "cls" classifies from a class token, "mean" from the average of the patch tokens.
        channels: channels of the image.
        dim_head: width of a head, independent of ``dim / heads``.
        dropout: on the attention probabilities, after the output projection, and twice in the MLP.
        emb_dropout: on the tokens, after the positions are added.
        backend: None (the default in force at the call), "triton", "torch" or "auto".

    Raises:
        TypeError: an argument is not of the kind named above.
        ValueError: an argument has a value the model cannot have; the message names both.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        checked_backend(backend)
        image_h, image_w = _pair("image_size", image_size)
        patch_h, patch_w = _pair("patch_size", patch_size)
        if image_h % patch_h or image_w % patch_w:
            raise ValueError(f"image_size {image_h} x {image_w} does not divide by patch_size {patch_h} x {patch_w}")
        for name, value in (("dim", dim), ("heads", heads), ("mlp_dim", mlp_dim), ("channels", channels)):
            _check_count(name, value, at_least=1)
        _check_count("dim_head", dim_head, at_least=1)
        _check_count("num_classes", num_classes, at_least=0)
        _check_count("depth", depth, at_least=0)
        for name, p in (("dropout", dropout), ("emb_dropout", emb_dropout)):
            if not isinstance(p, Real):
                raise TypeError(f"{name} must be a number, got {type(p).__name__} {p!r}")
            if not 0.0 <= p <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {p!r}")
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool must be 'cls' or 'mean', got {pool!r}")

        super().__init__()
        self._backend = backend
        self.patch_size = (patch_h, patch_w)
        self.channels = channels
        num_patches = (image_h // patch_h) * (image_w // patch_w)
        num_cls_tokens = 1 if pool == "cls" else 0
        patch_dim = channels * patch_h * patch_w

        # The order of these lines is part of the interface: others index children() and share seeds with us.
        self.to_patch_embedding = PatchEmbedding(
            PatchRows((patch_h, patch_w)),
            LayerNorm(patch_dim, backend=backend),
            Linear(patch_dim, dim, backend=backend),
            LayerNorm(dim, backend=backend),
        )
        self.cls_token = nn.Parameter(torch.randn(num_cls_tokens, dim))
        self.pos_embedding = nn.Parameter(torch.randn(num_patches + num_cls_tokens, dim))
        self.dropout = nn.Dropout(emb_dropout)
        self.transformer = Transformer(dim, depth, heads, dim_head, mlp_dim, dropout, backend=backend)
        self.pool = pool
        self.to_latent = nn.Identity()
        self.mlp_head = Linear(dim, num_classes, backend=backend) if num_classes else None

    def forward(self, img: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, num_classes), or (B, tokens, dim) with ``num_classes=0``.

        Raises:
            TypeError: `img` is not a floating-point tensor.
            ValueError: `img` has the wrong rank or channels, does not divide into patches, or has more of them
                than there are positions.
        """
        x = self.dropout(self.embed(img))
        if self.mlp_head is None:
            return self.transformer(x)
        x = self.transformer(x).mean(dim=1) if self.pool == "mean" else self.transformer.first_token(x)[:, 0]
        return self.mlp_head(self.to_latent(x))

    def embed(self, img: Tensor) -> Tensor:
        """Images (B, channels, H, W) -> tokens (B, class token + patches, dim), positions added."""
        num_patches = self._count_patches(img)
        # an empty token is no part of what fully_shard can shard, and keeps its dtype under mixed precision
        prefix = self.cls_token.to(self.pos_embedding.dtype) + self.pos_embedding[: len(self.cls_token)]
        pos = self.pos_embedding[len(self.cls_token) :][:num_patches]
        if untouched(self.to_patch_embedding, PatchEmbedding):
            return self.to_patch_embedding(img, pos=pos, prefix=prefix)
        return place_tokens(self.to_patch_embedding(img), pos, prefix)

    @property
    def backend(self) -> str | None:
        """The backend of every part of this model; assigning to it changes them all."""
        return self._backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        self._backend = checked_backend(backend)
        for module in self.modules():
            if module is not self and hasattr(module, "backend"):
                module.backend = backend  # type: ignore[assignment]

    def extra_repr(self) -> str:
        return f"pool={self.pool!r}, backend={self.backend!r}"

    def _count_patches(self, img: Tensor) -> int:
        grid_h, grid_w = patch_grid(img, self.patch_size)
        if not img.is_floating_point():
            hint = "; normalise it with mean and std: (img / 255 - mean) / std" if img.dtype == torch.uint8 else ""
            raise TypeError(f"image must have a floating-point dtype, got {img.dtype}{hint}")
        if img.shape[1] != self.channels:
            raise ValueError(f"image must have {self.channels} channels, got shape {tuple(img.shape)}")
        positions = self.pos_embedding.shape[0] - self.cls_token.shape[0]
        if grid_h * grid_w > positions:
            raise ValueError(
                f"image of {img.shape[2]} x {img.shape[3]} pixels has {grid_h * grid_w} patches of "
                f"{self.patch_size[0]} x {self.patch_size[1]}, but the model has positions for {positions}"
            )
        return grid_h * grid_w


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, (tuple, list)) and len(value) != 2:
        raise ValueError(f"{name} must be an integer or two of them, got {value!r}")
    height, width = value if isinstance(value, (tuple, list)) else (value, value)
    _check_count(name, height, at_least=1)
    _check_count(name, width, at_least=1)
    return height, width


def _check_count(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):  # NumPy's integers are welcome
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if int(value) < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
