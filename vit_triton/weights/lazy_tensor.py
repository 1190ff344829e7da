"""Tensors in a file, read on demand."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LazyTensor", "lazy_tensor"]


class LazyTensor(NamedTuple):
    """A tensor that has not been read."""

    like: Tensor  # shape and dtype, on the meta device
    read: Callable[[], Tensor]


def lazy_tensor(tensor: Tensor) -> LazyTensor:
    """Return a tensor in memory or in a memory map as a LazyTensor."""
    return LazyTensor(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), lambda: tensor)
