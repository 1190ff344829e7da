"""Models of other libraries on the kernels: timm, torchvision, transformers, vit_pytorch.

Each library has a file that says which of its classes are known and how they are computed; a library is looked at only
when it has been imported already.
"""

from vit_triton.integrations.replacement import accelerate, restore
from vit_triton.integrations.report import Report

__all__ = ["Report", "accelerate", "restore"]
