"""ViT: an image is worth 16x16 words (Dosovitskiy et al. 2021, arXiv:2010.11929).

A drop-in for ``vit_pytorch.ViT``: the same arguments, the same children in the same order, the same parameter
names and shapes (``load_state_dict`` works both ways, strict), and from the same seed the same initial weights.
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
    checked_backend,
    place_tokens,
    untouched,
)

__all__ = ["ViT"]


class ViT(VisionModel):
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

        # The order of these lines is part of the interface: others index children() and share seeds with us.
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
        patches = self.count_patches(img)
        # an empty token is no part of what fully_shard can shard, and keeps its dtype under mixed precision
        prefix = self.cls_token.to(self.pos_embedding.dtype) + self.pos_embedding[: len(self.cls_token)]
        pos = self.pos_embedding[len(self.cls_token) :]
        if patches > len(pos):
            raise self.refuse(img, patches, f"{len(pos)}")
        pos = pos[:patches]
        if untouched(self.to_patch_embedding, PatchEmbedding):
            return self.to_patch_embedding(img, pos=pos, prefix=prefix)
        return place_tokens(self.to_patch_embedding(img), pos, prefix)

    def extra_repr(self) -> str:
        return f"pool={self.pool!r}, backend={self.backend!r}"
