"""A Triton driver that compiles launches on CPU tensors for a given GPU architecture, and runs nothing."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from benchmarks.codegen.architectures import ARCHITECTURES
from vit_triton.kernels import launch


@dataclass
class CompiledKernel:
    """A compiled kernel with the grids and arguments of its launches."""

    kernel: Any
    launches: list[tuple[int, dict[str, Any]]] = field(default_factory=list)


class Launcher:
    """Records launches in the active driver."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.names, self.hash = src.fn.arg_names, metadata.hash

    def __call__(self, grid: int, y: int, z: int, *args: Any) -> None:
        values = args[-len(self.names) :]  # after stream, function, metadata and hooks
        driver.active.launches.append((self.hash, grid, dict(zip(self.names, values, strict=True))))


class Utils:
    @staticmethod
    def load_binary(*args: Any) -> tuple[None, int, int, int, int]:
        return None, 0, 0, 0, 1024

    @staticmethod
    def unload_module(module: Any) -> None:
        pass

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**31, "multiprocessor_count": 1, "warpSize": 32}


class Compiler(DriverBase):
    launcher_cls: type = Launcher
    utils: Utils = Utils()
    first_device = 8000  # Triton caches compiled kernels and launchers by device number

    def __init__(self, arch: str) -> None:
        self.arch, self.target = arch, ARCHITECTURES[arch].target
        self.launches: list[tuple[str, int, dict[str, Any]]] = []

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_device(self) -> int:
        return self.first_device + list(ARCHITECTURES).index(self.arch)

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("this driver compiles only")


@contextlib.contextmanager
def compile_for(arch: str, only: str = "", driver_class: type[Compiler] = Compiler) -> Iterator[list[CompiledKernel]]:
    """Compile launches on CPU tensors for ``arch``, if the kernel's name contains ``only``. The yielded list is filled
    at the end of the block, with one entry per kernel. ``driver_class``: class of the active driver."""
    before, compiled, start = driver._active, dict(launch._compiled), launch.start

    def start_some(kernel: Any, *launch: Any) -> None:
        if only in kernel.fn.__name__:
            start(kernel, *launch)

    compiler = driver_class(arch)
    driver.set_active(compiler)
    found: list[CompiledKernel] = []
    try:
        with launch.override_start(start_some):
            yield found
        kernels = {kernel.hash: CompiledKernel(kernel) for key, kernel in launch._compiled.items() if compiler in key}
        for hash_, grid, arguments in compiler.launches:
            if hash_ in kernels:
                kernels[hash_].launches.append((grid, arguments))
        found.extend(kernels.values())
    finally:
        driver._active = before
        launch._compiled.clear()
        launch._compiled.update(compiled)
