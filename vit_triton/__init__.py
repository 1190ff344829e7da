"""Vision Transformers on hand-written Triton kernels."""

import sys
from typing import TYPE_CHECKING

from vit_triton import lazy

if TYPE_CHECKING:
    from vit_triton import functional, reference
    from vit_triton.arguments import DecomposedBias
    from vit_triton.backend import use_backend
    from vit_triton.fallback import fallbacks
    from vit_triton.inspection import attention_maps
    from vit_triton.integrations import accelerate, restore
    from vit_triton.models import DistillableViT, DistillWrapper, NaViT, SimpleViT, SwinTransformer, ViT
    from vit_triton.packing import prepack, unpack
    from vit_triton.portable import portable_operators
    from vit_triton.weights import load_weights, save_weights
else:
    # imported on first use: importing PyTorch takes seconds, and `vit-triton --help` does not require it
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {
            "DecomposedBias": "arguments",
            "DistillWrapper": "models",
            "DistillableViT": "models",
            "NaViT": "models",
            "SimpleViT": "models",
            "SwinTransformer": "models",
            "ViT": "models",
            "accelerate": "integrations",
            "attention_maps": "inspection",
            "backend": "backend",
            "fallbacks": "fallback",
            "functional": "functional",
            "integrations": "integrations",
            "load_weights": "weights",
            "models": "models",
            "modules": "modules",
            "ops": "ops",
            "portable_operators": "portable",
            "prepack": "packing",
            "reference": "reference",
            "restore": "integrations",
            "save_weights": "weights",
            "unpack": "packing",
            "use_backend": "backend",
            "weights": "weights",
        },
    )

    if "torch" in sys.modules:
        # a program saved by torch.export can contain the operators, and loads only after they are registered
        import vit_triton.ops  # noqa: F401

__version__ = "0.1.0"

__all__ = [
    "DecomposedBias",
    "DistillWrapper",
    "DistillableViT",
    "NaViT",
    "SimpleViT",
    "SwinTransformer",
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
