"""Where the package must compute with PyTorch's operators only: export and tracing."""

from types import TracebackType

import torch

_portable = 0  # how many contexts of portable_operators are open


class portable_operators:  # lower case as use_backend is
    """A context manager in which every function and model of this package, and every model that
    :func:`vit_triton.accelerate` has changed, computes with PyTorch's operators only, whatever its backend.

    A program that ``torch.export.export`` captures inside it runs where this package is not installed, and
    ``torch.onnx.export`` converts it. ``torch.jit.trace`` and ``torch.onnx.export`` of a module need no such context:
    they use PyTorch's operators always. The setting is one for all threads; contexts may be nested.
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
    """Whether this call must use PyTorch's operators only: inside :class:`portable_operators`, ``torch.jit.trace`` and
    ``torch.onnx.export``."""
    # ONNX's former exporter runs torch.jit.trace; its other one runs torch.export: is_in_onnx_export takes 20 times as
    # long as the rest, so it is read only there
    if _portable or _tracing_state() is not None:
        return True
    return torch.compiler.is_exporting() and _in_onnx_export()


_tracing_state = torch._C._get_tracing_state  # torch.jit.is_tracing() takes three times as long


def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo takes it for False
