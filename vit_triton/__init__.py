"""Vision Transformers on hand-written Triton kernels."""

from vit_triton import functional, reference
from vit_triton.backend import use_backend
from vit_triton.fallback import fallbacks
from vit_triton.inspection import attention_maps
from vit_triton.integrations import accelerate, restore
from vit_triton.models import DistillableViT, DistillWrapper, SimpleViT, ViT
from vit_triton.packing import prepack, unpack
from vit_triton.portable import portable_operators
from vit_triton.weights import load_weights, save_weights

__version__ = "0.1.0"

__all__ = [
    "DistillWrapper",
    "DistillableViT",
    "SimpleViT",
    "ViT",
    "accelerate",
    "attention_maps",
    "fallbacks",
    "functional",
    "load_weights",
    "portable_operators",
    "prepack",
    "reference",
    "restore",
    "save_weights",
    "unpack",
    "use_backend",
]
