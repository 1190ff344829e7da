"""SimpleViT: better plain ViT baselines for ImageNet-1k (Beyer et al. 2022, arXiv:2205.01580).

Unlike ViT, it has fixed sine and cosine positions, mean pooling instead of a class token, and no dropout.

Compatible with ``vit_pytorch.SimpleViT``: same arguments, order of children, parameter names and shapes
(``load_state_dict`` works in both directions), and same initial weights for the same seed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit_triton.checks import check_count
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

__all__ = ["SimpleViT"]


class SimpleViT(VisionModel):
    """Vision Transformer for classification, without class token, learned positions and dropout.

    Args:
        image_size: side or (height, width) of the image, in pixels.
        patch_size: side or (height, width) of a patch. Must divide `image_size`.
        num_classes: width of the output.
        dim: width of the tokens, a multiple of 4, at least 8.
        depth: number of transformer blocks.
        heads: attention heads per block.
        mlp_dim: hidden width of the MLP.
        channels: channels of the image.
        dim_head: head size, independent of ``dim / heads``.
        backend: "triton", "torch", "auto" or None, the default of :func:`vit_triton.use_backend`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has an invalid value.
    """

    pos_embedding: Tensor

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
        channels: int = 3,
        dim_head: int = 64,
        backend: str | None = None,
    ) -> None:
        check_backend(backend)
        patch_h, patch_w = patch_size = pair("patch_size", patch_size)
        image_size = pair("image_size", image_size)
        grid_h, grid_w = check_patches(image_size, patch_size)
        for name, value in (("heads", heads), ("mlp_dim", mlp_dim), ("channels", channels), ("dim_head", dim_head)):
            check_count(name, value, at_least=1)
        check_count("num_classes", num_classes, at_least=1)
        check_count("depth", depth, at_least=0)
        check_count("dim", dim, at_least=8)
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4 (sine and cosine of two coordinates), got {dim}")

        super().__init__(image_size, patch_size, channels, backend)
        patch_dim = channels * patch_h * patch_w

        # vit_pytorch has the same order, which determines children() and the initial weights for a seed
        self.to_patch_embedding = PatchEmbedding(
            PatchRows(patch_size),
            LayerNorm(patch_dim, backend=backend),
            Linear(patch_dim, dim, backend=backend),
            LayerNorm(dim, backend=backend),
        )
        # not persistent, since vit_pytorch does not have it in the state dict
        self.register_buffer("pos_embedding", sine_positions(grid_h, grid_w, dim), persistent=False)
        self.transformer = Transformer(dim, depth, heads, dim_head, mlp_dim, dropout=None, backend=backend)
        self.pool = "mean"
        self.to_latent = nn.Identity()
        self.linear_head = Linear(dim, num_classes, backend=backend)

    def forward(self, img: Tensor) -> Tensor:
        """Compute (B, channels, H, W) -> (B, num_classes).

        Raises:
            TypeError: `img` is not a floating-point tensor.
            ValueError: `img` has the wrong rank, channels or number of patches.
        """
        x = self.transformer(self.embed(img)).mean(dim=1)
        return self.linear_head(self.to_latent(x))

    def embed(self, img: Tensor) -> Tensor:
        """Embed images (B, channels, H, W) as tokens (B, patches, dim) with positions."""
        patches = self.count_patches(img)
        if patches != len(self.pos_embedding):
            raise self.position_error(img, patches, f"exactly {len(self.pos_embedding)}")
        if is_fusable(self.to_patch_embedding, PatchEmbedding):
            return self.to_patch_embedding(img, pos=self.pos_embedding)
        x = self.to_patch_embedding(img)
        return place_tokens(x, self.pos_embedding.to(x.dtype), None)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


def sine_positions(height: int, width: int, dim: int, temperature: float = 10000.0) -> Tensor:
    """Return sine and cosine of column and row at dim / 4 frequencies each, (height * width, dim)."""
    # from 1 down to 1 / temperature
    frequencies = 1.0 / temperature ** (torch.arange(dim // 4) / (dim // 4 - 1))
    angles = [torch.arange(size)[:, None] * frequencies for size in (height, width)]
    rows = angles[0][:, None].expand(height, width, -1)
    columns = angles[1][None].expand(height, width, -1)
    return torch.cat((columns.sin(), columns.cos(), rows.sin(), rows.cos()), dim=-1).flatten(0, 1)
