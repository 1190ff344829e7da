"""The library as a GPU's user runs it, on CPU tensors: kernels are compiled for sm_90 if at all, and none is started.

What only a CPU's user pays for is out of the way: the question what runs a kernel on a CPU.
What only a GPU's user pays for is missing: the guard of the current device.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from benchmarks.codegen import driver as gpu
from vit_triton import backend, ops
from vit_triton.kernels import launch

ARCH = "sm_90"


@contextlib.contextmanager
def taken(
    launched: Callable[..., None] | None = None,
    inside: contextlib.AbstractContextManager[Any] | None = None,
) -> Iterator[None]:
    """``launched(kernel, grid, device, arguments)`` in place of each launch, and before anything is compiled; without
    it a launch goes all the way, but for the last call. ``inside``: entered within every operator of the library, where
    a mode that is active around the operator is not."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(gpu.compiling_for(ARCH))
        # a module that is not None: else Triton loads the kernel in every launch
        stack.enter_context(mock.patch.object(gpu._Compiler, "launcher_cls", _Launcher))
        stack.enter_context(mock.patch.object(gpu._Utils, "load_binary", lambda *args: (0, 0, 0, 0, 1024)))
        target = gpu._Compiler(ARCH).get_current_target()
        # the architecture of a GPU is remembered, and what a CPU's user asks first is not asked
        stack.enter_context(mock.patch.object(gpu._Compiler, "get_current_target", lambda self: target))
        on_gpu = ops._on_gpu if launched is None else _launching(inside or contextlib.nullcontext())
        stack.enter_context(mock.patch.object(ops, "_on_cpu", on_gpu))
        stack.enter_context(mock.patch.object(backend, "cpu_vehicle", lambda: "driver"))
        if launched is not None:
            stack.enter_context(mock.patch.object(launch, "_run", launched))
        yield


class _Launcher:
    """Keeps nothing of what is launched, which would be part of what a launch costs."""

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


def _launching(inside: contextlib.AbstractContextManager[Any]) -> Callable[..., Any]:
    """An operator as it runs the first time, when its launches are not replayed."""

    def run(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with inside:
            return function(*args)

    return run
