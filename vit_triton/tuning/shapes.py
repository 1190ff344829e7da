"""Sizes of published Vision Transformers, and shapes of benchmark inputs."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from vit_triton import names
from vit_triton.tuning.sizes import SIZES, Size

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in names.DTYPES}
CLASSES = 1000


@dataclass(frozen=True)
class Shape:
    """Shape of an input. ``image`` is the side in pixels; ``tokens`` includes the class token."""

    label: str
    batch: int
    image: int
    tokens: int
    size: Size

    @classmethod
    def of(cls, model: str, image: int, batch: int) -> "Shape":
        """Create a shape. The image side is rounded down to a multiple of the patch: 384 to 378 for a patch of 14.

        Raises:
            ValueError: The image is smaller than a patch.
        """
        size = SIZES[model]
        side = image // size.patch
        if side < 1:
            raise ValueError(f"image side must be at least the patch side {size.patch} of {model}, got {image}")
        image = side * size.patch
        return cls(f"{model}/{size.patch} at {image}, batch {batch}", batch, image, side * side + 1, size)

    def with_depth(self, depth: int) -> "Shape":
        return replace(self, size=replace(self.size, depth=depth))

    @property
    def head_dim(self) -> int:
        return self.size.width // self.size.heads

    def vit(self) -> dict[str, Any]:
        """Return the arguments of :class:`vit_triton.ViT` and ``vit_pytorch.ViT`` for a model of this shape."""
        return dict(
            image_size=self.image,
            patch_size=self.size.patch,
            num_classes=CLASSES,
            dim=self.size.width,
            depth=self.size.depth,
            heads=self.size.heads,
            dim_head=self.head_dim,
            mlp_dim=self.size.hidden,
        )
