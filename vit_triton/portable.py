"""Export and tracing with PyTorch's operators only."""

from types import TracebackType

import torch

_portable = 0  # how many contexts of portable_operators are open


class portable_operators:  # lower case as use_backend is
    """Context manager that makes functions, models and accelerated models use PyTorch's operators only, regardless of
    their backend.

    A program captured by ``torch.export.export`` inside the context does not require this package and can be passed to
    ``torch.onnx.export``. ``torch.jit.trace`` and ``torch.onnx.export`` of a module always use PyTorch's operators and
    do not require the context. It applies to all threads and may be nested.
    """

    def __enter__(self) -> "portable_operators":
        global _portable
        _portable += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _portable
        _portable -= 1


def is_portable() -> bool:
    """Return whether this call must use PyTorch's operators only: inside :class:`portable_operators`,
    ``torch.jit.trace`` and ``torch.onnx.export``."""
    # is_in_onnx_export is slow, so it is called only while exporting; the older ONNX exporter runs torch.jit.trace
    if _portable or _tracing_state() is not None:
        return True
    return torch.compiler.is_exporting() and _in_onnx_export()


_tracing_state = torch._C._get_tracing_state  # torch.jit.is_tracing() takes three times as long


def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo would trace it as False
