"""Autocast, as the public functions follow it."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_KNOWN = ("cuda", "cpu", "xpu")  # devices that have it: torch.amp.is_autocast_available takes as long as all checks


def autocasting(device_type: str) -> bool:
    """Whether autocast is on, on a device that need not have it."""
    available = device_type in _KNOWN or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def autocast(
    *tensors: Tensor | None, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[Any, ...]:
    """The tensors in autocast's dtype (or ``dtype``) where autocast is on, else as they are."""
    device_type = (tensors[0].device if device is None else device).type  # type: ignore[union-attr]
    if not autocasting(device_type):
        return tensors
    dtype = dtype or torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x is not None and x.dtype in FLOATS else x for x in tensors)
