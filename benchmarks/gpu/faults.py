"""Steps that fail on purpose, enabled by VIT_TRITON_GPU_FAULTS=1, to test that other steps are not affected."""

import ctypes
import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.step import Context, Step

VARIABLE = "VIT_TRITON_GPU_FAULTS"


def enabled() -> bool:
    return os.environ.get(VARIABLE) == "1"


def _abort(context: Context) -> dict[str, Any]:
    os.abort()


def _access(context: Context) -> dict[str, Any]:
    """An illegal access. On a GPU a kernel makes it, and the process cannot use the GPU afterwards."""
    if context.device == "cuda":
        torch.zeros(8, device="cuda")[torch.tensor([2**40], device="cuda")].sum().item()
    else:
        ctypes.string_at(0)
    return {"line": "not reached"}


def _hang(context: Context) -> dict[str, Any]:
    time.sleep(3600)
    return {"line": "not reached"}


def _memory(context: Context) -> dict[str, Any]:
    torch.empty(2**50, device=context.device)
    return {"line": "not reached"}


def _raise(context: Context) -> dict[str, Any]:
    raise ValueError("on purpose")


def _pass(context: Context) -> dict[str, Any]:
    return {"line": "a step behind the faults", "device": str(torch.ones(1, device=context.device).device)}


def steps() -> Iterator[Step]:
    yield Step("abort", _abort, 1.0)
    yield Step("illegal access", _access, 1.0)
    yield Step("hang", _hang, 1.0, limit=5.0)
    yield Step("memory", _memory, 1.0)
    yield Step("raise", _raise, 1.0)
    yield Step("pass", _pass, 1.0)
