"""What a model expects of its images."""

from __future__ import annotations

from typing import NamedTuple


class Preprocessing(NamedTuple):
    """Size in pixels, normalization, channels and interpolation of the images of a model."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    interpolation: str = "bicubic"
