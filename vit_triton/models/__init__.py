"""Vision Transformer models."""

from vit_triton.models.distill import DistillableViT, DistillWrapper
from vit_triton.models.na_vit import NaViT
from vit_triton.models.simple_vit import SimpleViT
from vit_triton.models.swin import SwinTransformer
from vit_triton.models.vit import ViT

__all__ = ["DistillWrapper", "DistillableViT", "NaViT", "SimpleViT", "SwinTransformer", "ViT"]
