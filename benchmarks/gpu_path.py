"""The library as a GPU's user runs it, on CPU tensors: kernels are compiled for sm_90 if at all, and none is started.

What only a CPU's user pays for is out of the way: launches that are recorded and replayed, weights laid out in panels,
the question what runs a kernel on a CPU. What only a GPU's user pays for is missing: the guard of the current device.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from benchmarks.codegen import driver as gpu
from vit_triton import backend, packing
from vit_triton.cpu import driver
from vit_triton.kernels import _launch

ARCH = "sm_90"


@contextlib.contextmanager
def taken(
    launched: Callable[..., None] | None = None,
    inside: contextlib.AbstractContextManager[Any] | None = None,
) -> Iterator[None]:
    """``launched(kernel, grid, device, arguments)`` in place of each launch, and before anything is compiled; without
    it a launch goes all the way, but for the last call. ``inside``: entered within every operator of the library, where
    a mode that is active around the operator is not."""
    within = contextlib.nullcontext() if inside is None else _Quiet(inside)
    with contextlib.ExitStack() as stack:
        stack.enter_context(gpu.compiling_for(ARCH))
        # a module that is not None: else Triton loads the kernel in every launch
        stack.enter_context(mock.patch.object(gpu._Compiler, "launcher_cls", _Launcher))
        stack.enter_context(mock.patch.object(gpu._Utils, "load_binary", lambda *args: (0, 0, 0, 0, 1024)))
        target = gpu._Compiler(ARCH).get_current_target()
        # the architecture of a GPU is remembered, and what a CPU's user asks first is not asked
        stack.enter_context(mock.patch.object(gpu._Compiler, "get_current_target", lambda self: target))
        stack.enter_context(mock.patch.object(driver, "active", lambda: within))
        stack.enter_context(mock.patch.object(backend, "cpu_vehicle", lambda: "driver"))
        stack.enter_context(mock.patch.object(packing, "_keeps", lambda weight: False))
        if launched is not None:
            stack.enter_context(mock.patch.object(_launch, "_run", launched))
        yield


class _Launcher:
    """Keeps nothing of what is launched, which would be part of what a launch costs."""

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class _Quiet:
    """``context``, whose ``with`` gives None: what says to an operator that a driver other than ours is active."""

    def __init__(self, context: contextlib.AbstractContextManager[Any]) -> None:
        self.context = context

    def __enter__(self) -> None:
        self.context.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.context.__exit__(*error)
