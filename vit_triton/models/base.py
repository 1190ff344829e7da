"""Base class of the models: backend, checks of the image, Hugging Face Hub."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit_triton.models.hub import HubModel
from vit_triton.modules import check_backend, patch_grid

__all__ = ["VisionModel"]


class VisionModel(HubModel, nn.Module):
    """Base class for models with images (B, channels, H, W) as input.

    Args:
        image_size: height and width of an image, in pixels; None if every size is supported.
        patch_size: height and width of a patch.
        channels: channels of the image.
        backend: None, "triton", "torch" or "auto".
    """

    def __init__(
        self, image_size: tuple[int, int] | None, patch_size: tuple[int, int], channels: int, backend: str | None
    ) -> None:
        super().__init__()
        self._backend = check_backend(backend)
        self.image_size = image_size
        self.patch_size = patch_size
        self.channels = channels

    @property
    def backend(self) -> str | None:
        """The backend of the model. Assignment sets the backend of all modules."""
        return self._backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        self._backend = check_backend(backend)
        for module in self.modules():
            if module is not self and hasattr(module, "backend"):
                module.backend = backend  # type: ignore[assignment]

    def count_patches(self, img: Tensor) -> int:
        """Return the number of patches per image.

        Raises:
            TypeError: `img` is not a floating-point tensor.
            ValueError: `img` has the wrong rank or channels, or its sides are not divisible by the patch size.
        """
        grid_h, grid_w = patch_grid(img, self.patch_size)
        if not img.is_floating_point():
            hint = "; normalize it with mean and std: (img / 255 - mean) / std" if img.dtype == torch.uint8 else ""
            raise TypeError(f"image must have a floating-point dtype, got {img.dtype}{hint}")
        if img.shape[1] != self.channels:
            raise ValueError(f"image must have {self.channels} channels, got shape {tuple(img.shape)}")
        return grid_h * grid_w

    def position_error(self, img: Tensor, patches: int, positions: str) -> ValueError:
        """Create the error for an image with a number of patches that the model has no positions for."""
        patch_h, patch_w = self.patch_size
        return ValueError(
            f"image of {img.shape[2]} x {img.shape[3]} pixels has {patches} patches of {patch_h} x {patch_w}, but the "
            f"model has positions for {positions}"
        )
