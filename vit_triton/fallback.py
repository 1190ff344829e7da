"""Counts, by module and reason, of calls that fell back from the kernels to PyTorch or another library.

Counts are stored per module, are not copied with it, and are dropped with it. Calls under ``torch.compile`` and other
tracers are not counted: a counter in a graph would be wrong or cause a recompilation on every call.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import Counter
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from vit_triton.checks import check_module

__all__ = ["clear_fallbacks", "count_fallback", "fallback_counter", "fallbacks", "is_capturing"]

_counters: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()
_lock = threading.Lock()


def count_fallback(module: nn.Module, reason: str) -> None:
    """Count one call of ``module``. ``reason`` must not contain sizes, since every reason has its own count."""
    if not torch.compiler.is_compiling() and not is_capturing():
        calls = fallback_counter(module)
        with _lock:
            calls[reason] += 1


def is_capturing() -> bool:
    """Return whether this call is exported, traced by torch.fx, or runs to check the result of ``torch.jit.trace``."""
    return (
        torch.compiler.is_exporting()
        or is_fx_symbolic_tracing()
        or (not torch.compiler.is_compiling() and _in_trace_check())
    )


def _in_trace_check() -> bool:
    check = inspect.unwrap(torch.jit._trace._check_trace).__code__  # it sets no flag, so search the stack for it
    frame = sys._getframe()
    while frame is not None and frame.f_code is not check:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def fallback_counter(module: nn.Module) -> Counter[str]:
    """Return the counter of ``module``, the same object until :func:`clear_fallbacks`."""
    with _lock:
        return _counters.setdefault(module, Counter())


def clear_fallbacks(module: nn.Module) -> None:
    """Drop the counter of one module."""
    _counters.pop(module, None)


def fallbacks(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return the number of calls that fell back from the kernels, by module and reason.

    Counts calls of accelerated modules that ran the original ``forward``, calls of ``attn_implementation="vit_triton"``
    that ran transformers' "sdpa", and LayerNorms of this package that exceed the maximum width of the kernels.

    Returns:
        A dict from module name ("" for ``model`` itself) to a dict from reason to number of calls. Modules without
        fallbacks are absent.

    Raises:
        TypeError: ``model`` is not a Module.
    """
    check_module("model", model)
    named = ((name, _counters.get(module)) for name, module in model.named_modules())
    return {name: dict(calls) for name, calls in named if calls}
