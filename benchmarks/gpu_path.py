"""The library's GPU code path on CPU tensors: kernels are compiled for sm_90, and launches do nothing.

The choice of the CPU mode (compiler, interpreter) is skipped, because it costs time on a CPU only. The guard of the
current device is missing, because it requires a GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.codegen import driver
from vit_triton import backend, ops
from vit_triton.kernels import launch

ARCH = "sm_90"


class _Launcher:
    """A launcher that does nothing: recording the arguments would add to the measured time."""

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class _Utils(driver.Utils):
    @staticmethod
    def load_binary(*args: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # the module must not be None: otherwise Triton loads the kernel on every launch


class _GPU(driver.Compiler):
    launcher_cls = _Launcher
    utils = _Utils()
    first_device = 8100


@contextlib.contextmanager
def use_gpu_path(
    on_launch: Callable[..., None] | None = None,
    operator_context: contextlib.AbstractContextManager[Any] | None = None,
) -> Iterator[None]:
    """Run the library on the GPU path.

    Args:
        on_launch: called as ``on_launch(kernel, grid, device, arguments)`` in place of each launch; the kernel is not
            compiled. By default every launch runs up to the driver call, which does nothing.
        operator_context: context manager entered within each of the library's operators. A dispatch mode that is active
            around an operator is inactive within it.
    """
    run = ops.run_on_gpu if on_launch is None else _run_within(operator_context or contextlib.nullcontext())
    with driver.compile_for(ARCH, driver_class=_GPU), ops.override_run(run), backend.assume_cpu_mode("driver"):
        with contextlib.nullcontext() if on_launch is None else launch.override_start(on_launch):
            yield


def _run_within(operator_context: contextlib.AbstractContextManager[Any]) -> Callable[..., Any]:
    """Runs an operator directly, as on its first call: its launches are not replayed."""

    def run(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with operator_context:
            return function(*args)

    return run
