"""The library as a GPU's user runs it, on CPU tensors: kernels are compiled for sm_90 if at all, and none is started.

What only a CPU's user pays for is out of the way: the question what runs a kernel on a CPU.
What only a GPU's user pays for is missing: the guard of the current device.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.codegen import driver
from vit_triton import backend, ops
from vit_triton.kernels import launch

ARCH = "sm_90"


class _Launcher:
    """Keeps nothing of what is launched, which would be part of what a launch costs."""

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class _Utils(driver.Utils):
    @staticmethod
    def load_binary(*args: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # a module that is not None: else Triton loads the kernel in every launch


class _GPU(driver.Compiler):
    launcher_cls = _Launcher
    utils = _Utils()
    first_device = 8100


@contextlib.contextmanager
def taken(
    launched: Callable[..., None] | None = None,
    inside: contextlib.AbstractContextManager[Any] | None = None,
) -> Iterator[None]:
    """``launched(kernel, grid, device, arguments)`` in place of each launch, and before anything is compiled; without
    it a launch goes all the way, but for the last call. ``inside``: entered within every operator of the library, where
    a mode that is active around the operator is not."""
    run = ops.run_on_gpu if launched is None else _launching(inside or contextlib.nullcontext())
    with driver.compiling_for(ARCH, by=_GPU), ops.running(run), backend.assume_cpu_vehicle("driver"):
        with contextlib.nullcontext() if launched is None else launch.starting(launched):
            yield


def _launching(inside: contextlib.AbstractContextManager[Any]) -> Callable[..., Any]:
    """An operator as it runs the first time, when its launches are not replayed."""

    def run(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with inside:
            return function(*args)

    return run
