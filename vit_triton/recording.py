"""The recorder of :func:`vit_triton.attention_maps`, to which functions pass the attention that they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Recorder", "active_recorder", "record"]


class Recorder(Protocol):
    """Receives the arguments of every call while a model runs.

    Attributes:
        maps: one entry per recorded call.
    """

    maps: list[Tensor]

    def attention(self, q: Tensor, k: Tensor, **options: Any) -> None:
        """Record :func:`vit_triton.functional.attention`; ``options`` without those of dropout."""

    def windows(self, qkv: Tensor, bias: Tensor, size: tuple[int, int], **options: Any) -> None:
        """Record :func:`vit_triton.functional.window_attention` of a map whose first (H, W) tokens are not padding."""


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def active_recorder() -> Recorder | None:
    """Return the recorder of this thread; None under ``torch.compile``. It prevents that blocks are fused."""
    return None if torch.compiler.is_compiling() else _recorder.get()


@contextlib.contextmanager
def record(recorder: Recorder) -> Iterator[None]:
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)
