"""Run models of timm, torchvision, transformers and vit_pytorch on the kernels.

Each library has one file, which registers a recipe for each supported class. Libraries are never imported here: a file
registers its recipes once the library has been imported.
"""

from vit_triton.integrations.replacement import accelerate, restore
from vit_triton.integrations.report import Report

__all__ = ["Report", "accelerate", "restore"]
