"""Models, one readable page each."""

from vit_triton.models.vit import ViT

__all__ = ["ViT"]
