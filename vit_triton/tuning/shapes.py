"""Sizes of published Vision Transformers, and shapes of benchmark inputs."""

from dataclasses import dataclass, replace
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES = 1000


@dataclass(frozen=True)
class Size:
    """Size of a model: ``width`` of the tokens, ``hidden`` width of the MLP, ``patch`` side in pixels."""

    width: int
    depth: int
    heads: int
    hidden: int
    patch: int = 16


# Ti, S: Touvron et al. 2021 (arXiv:2012.12877), table 1; B, L, H: Dosovitskiy et al. 2021 (arXiv:2010.11929), table 1;
# g: Zhai et al. 2022 (arXiv:2106.04560), table 2; SO400M: Alabdulmohsin et al. 2023 (arXiv:2305.13035).
SIZES = {
    "Ti": Size(192, 12, 3, 768),
    "S": Size(384, 12, 6, 1536),
    "B": Size(768, 12, 12, 3072),
    "L": Size(1024, 24, 16, 4096),
    "H": Size(1280, 32, 16, 5120, patch=14),
    "g": Size(1408, 40, 16, 6144, patch=14),
    "SO400M": Size(1152, 27, 16, 4304, patch=14),
}


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
