"""Calls that were to run on the kernels and that PyTorch or another library computed, counted by module and reason.

The counts belong to the modules: a copy begins with none, and they go when the module does. Nothing is counted while
``torch.compile`` or anything else traces: a counter in a graph would be wrong, or compile it anew in every call.
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

__all__ = ["count", "counter", "fallbacks", "for_a_graph", "forget"]

_counters: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()
_lock = threading.Lock()


def count(module: nn.Module, reason: str) -> None:
    """Count one call of ``module``. A reason holds no sizes: there is one number for each."""
    if not torch.compiler.is_compiling() and not for_a_graph():
        calls = counter(module)
        with _lock:
            calls[reason] += 1


def for_a_graph() -> bool:
    """Whether this call is exported, traced by torch.fx, or the one by which ``torch.jit.trace`` checks its result."""
    return (
        torch.compiler.is_exporting()
        or is_fx_symbolic_tracing()
        or (not torch.compiler.is_compiling() and _checks_a_trace())
    )


def _checks_a_trace() -> bool:
    check = inspect.unwrap(torch.jit._trace._check_trace).__code__  # it sets nothing that could be read
    frame = sys._getframe()
    while frame is not None and frame.f_code is not check:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def counter(module: nn.Module) -> Counter[str]:
    """The calls of ``module`` by reason; the object stays the same until :func:`forget`."""
    with _lock:
        return _counters.setdefault(module, Counter())


def forget(module: nn.Module) -> None:
    """Drop the counts of one module."""
    _counters.pop(module, None)


def fallbacks(model: nn.Module) -> dict[str, dict[str, int]]:
    """The calls that were to run on the kernels and did not, of every module of ``model``.

    These are calls of modules that :func:`vit_triton.accelerate` has changed, which their library computed, calls of
    ``attn_implementation="vit_triton"`` that transformers' "sdpa" computed, and LayerNorms of this package that are too
    wide for a kernel.

    Returns:
        For each name of a module, "" for ``model`` itself, how many calls each reason had; modules without are absent.

    Raises:
        TypeError: ``model`` is not a Module.
    """
    check_module("model", model)
    named = ((name, _counters.get(module)) for name, module in model.named_modules())
    return {name: dict(calls) for name, calls in named if calls}
