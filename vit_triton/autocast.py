"""Autocast for the public functions."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SUPPORTED = ("cuda", "cpu", "xpu")  # skips torch.amp.is_autocast_available, which takes as long as all checks


def is_autocast_enabled(device_type: str) -> bool:
    """Return whether autocast is enabled; False on devices that do not support it."""
    available = device_type in _SUPPORTED or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def autocast(
    *tensors: Tensor | None, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[Any, ...]:
    """Cast the tensors to ``dtype`` (default: the dtype of autocast) if autocast is enabled, else return them as is."""
    device_type = (tensors[0].device if device is None else device).type  # type: ignore[union-attr]
    if not is_autocast_enabled(device_type):
        return tensors
    dtype = dtype or torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x is not None and x.dtype in FLOATS else x for x in tensors)
