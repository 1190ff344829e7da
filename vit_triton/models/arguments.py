"""Checks of what models are constructed with; each raises an error that names the argument and the value."""

from __future__ import annotations

from numbers import Integral, Real

__all__ = ["check_count", "check_probability", "check_patches", "pair"]


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """An integer as (height, width), or two of them as they are."""
    if isinstance(value, (tuple, list)) and len(value) != 2:
        raise ValueError(f"{name} must be an integer or two of them, got {value!r}")
    height, width = value if isinstance(value, (tuple, list)) else (value, value)
    check_count(name, height, at_least=1)
    check_count(name, width, at_least=1)
    return height, width


def check_count(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):  # NumPy's integers are welcome
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if int(value) < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def check_probability(name: str, value: object) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")


def check_patches(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """How many rows and columns of patches an image has."""
    (image_h, image_w), (patch_h, patch_w) = image_size, patch_size
    if image_h % patch_h or image_w % patch_w:
        raise ValueError(f"image_size {image_h} x {image_w} does not divide by patch_size {patch_h} x {patch_w}")
    return image_h // patch_h, image_w // patch_w
