"""ViT: an image is worth 16x16 words (Dosovitskiy et al. 2021, arXiv:2010.11929).

Compatible with ``vit_pytorch.ViT``: same arguments, order of children, parameter names and shapes (``load_state_dict``
works in both directions), and same initial weights for the same seed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit_triton.checks import check_count, check_probability
from vit_triton.models.arguments import check_patches, pair
from vit_triton.models.base import VisionModel
from vit_triton.modules import (
    LayerNorm,
    Linear,
    PatchEmbedding,
    PatchRows,
    Transformer,
    check_backend,
    is_fusable,
    place_tokens,
)

__all__ = ["ViT"]


class ViT(VisionModel):
    """Vision Transformer for classification.

    Args:
        image_size: side or (height, width) of the largest image, in pixels. Smaller images are supported.
        patch_size: side or (height, width) of a patch. Must divide `image_size`.
        num_classes: width of the output. 0 omits the head; the model then returns all tokens.
        dim: width of the tokens.
        depth: number of transformer blocks.
        heads: attention heads per block.
        mlp_dim: hidden width of the MLP.
        pool: input of the head, "cls" for a class token or "mean" for the mean of the patch tokens.
        channels: channels of the image.
        dim_head: head size, independent of ``dim / heads``.
        dropout: probability for the attention weights, the output projection and both layers of the MLP.
        emb_dropout: probability for the tokens, after the positions are added.
        backend: "triton", "torch", "auto" or None, the default of :func:`vit_triton.use_backend`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has an invalid value.
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
        check_backend(backend)
        patch_h, patch_w = patch_size = pair("patch_size", patch_size)
        image_size = pair("image_size", image_size)
        grid_h, grid_w = check_patches(image_size, patch_size)
        for name, value in (("dim", dim), ("heads", heads), ("mlp_dim", mlp_dim), ("channels", channels)):
            check_count(name, value, at_least=1)
        check_count("dim_head", dim_head, at_least=1)
        check_count("num_classes", num_classes, at_least=0)
        check_count("depth", depth, at_least=0)
        check_probability("dropout", dropout)
        check_probability("emb_dropout", emb_dropout)
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool must be 'cls' or 'mean', got {pool!r}")

        super().__init__(image_size, patch_size, channels, backend)
        self.dim = dim
        self.num_classes = num_classes
        num_cls_tokens = 1 if pool == "cls" else 0
        patch_dim = channels * patch_h * patch_w

        # vit_pytorch has the same order, which determines children() and the initial weights for a seed
        self.to_patch_embedding = PatchEmbedding(
            PatchRows(patch_size),
            LayerNorm(patch_dim, backend=backend),
            Linear(patch_dim, dim, backend=backend),
            LayerNorm(dim, backend=backend),
        )
        self.cls_token = nn.Parameter(torch.randn(num_cls_tokens, dim))
        self.pos_embedding = nn.Parameter(torch.randn(grid_h * grid_w + num_cls_tokens, dim))
        self.dropout = nn.Dropout(emb_dropout)
        self.transformer = Transformer(dim, depth, heads, dim_head, mlp_dim, dropout, backend=backend)
        self.pool = pool
        self.to_latent = nn.Identity()
        self.mlp_head = Linear(dim, num_classes, backend=backend) if num_classes else None

    def forward(self, img: Tensor) -> Tensor:
        """Compute (B, channels, H, W) -> (B, num_classes), or (B, tokens, dim) with ``num_classes=0``.

        Raises:
            TypeError: `img` is not a floating-point tensor.
            ValueError: `img` has the wrong rank or channels, sides not divisible by the patch size, or more patches
                than the model has positions.
        """
        x = self.dropout(self.embed(img))
        if self.mlp_head is None:
            return self.transformer(x)
        x = self.transformer(x).mean(dim=1) if self.pool == "mean" else self.transformer.first_token(x)[:, 0]
        return self.mlp_head(self.to_latent(x))

    def embed(self, img: Tensor) -> Tensor:
        """Embed images (B, channels, H, W) as tokens (B, class token + patches, dim) with positions."""
        patches = self.count_patches(img)
        # fully_shard does not cast an empty class token under mixed precision
        n_prefix = len(self.cls_token)
        of_prefix, pos = self.pos_embedding.split((n_prefix, len(self.pos_embedding) - n_prefix))
        prefix = self.cls_token.to(self.pos_embedding.dtype) + of_prefix
        if patches > len(pos):
            raise self.position_error(img, patches, f"{len(pos)}")
        pos = pos[:patches]
        if is_fusable(self.to_patch_embedding, PatchEmbedding):
            return self.to_patch_embedding(img, pos=pos, prefix=prefix)
        return place_tokens(self.to_patch_embedding(img), pos, prefix)

    def extra_repr(self) -> str:
        return f"pool={self.pool!r}, backend={self.backend!r}"
