"""Checks of the arguments of models. Every error names the argument and the value."""

from __future__ import annotations

from vit_triton.checks import check_count

__all__ = ["check_patches", "pair"]


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Return an integer or a pair of integers as (height, width)."""
    if isinstance(value, (tuple, list)) and len(value) != 2:
        raise ValueError(f"{name} must be an integer or two of them, got {value!r}")
    height, width = value if isinstance(value, (tuple, list)) else (value, value)
    check_count(name, height, at_least=1)
    check_count(name, width, at_least=1)
    return height, width


def check_patches(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Return the number of rows and columns of patches in an image."""
    (image_h, image_w), (patch_h, patch_w) = image_size, patch_size
    if image_h % patch_h or image_w % patch_w:
        raise ValueError(f"image_size {image_h} x {image_w} must be divisible by patch_size {patch_h} x {patch_w}")
    return image_h // patch_h, image_w // patch_w
