"""A tensor in a file: its shape and dtype, and how to read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Stored", "stored"]


class Stored(NamedTuple):
    """A tensor that is not in memory yet."""

    like: Tensor  # on the meta device
    read: Callable[[], Tensor]


def stored(tensor: Tensor) -> Stored:
    """Of a tensor in memory, or mapped into it."""
    return Stored(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), lambda: tensor)
