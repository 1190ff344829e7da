"""Triton's driver for the CPU: load compiled kernels and run their grids on PyTorch's threads."""

import contextlib
import ctypes
import functools
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction

from vit_triton.cpu import features
from vit_triton.cpu.cache import CheckedCache
from vit_triton.cpu.compiler import CPUBackend
from vit_triton.cpu.elf import Code
from vit_triton.cpu.entry import LaunchBlock

_CPU = torch.device("cpu")
_PAGE = 4096
_DEVICE = 9000  # Triton caches kernels by device number; larger than any GPU's


def _libgomp() -> Any:
    """The OpenMP runtime loaded by PyTorch, which shares PyTorch's threads; None if there is none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split()[-1]
        if "libgomp" in os.path.basename(path) or "libiomp5" in os.path.basename(path):
            return ctypes.CDLL(path)
    return None


class _Scratch:
    """A pool of memory for the threads of a launch; concurrent launches use different pieces."""

    def __init__(self) -> None:
        self.free: list[tuple[int, int, Any]] = []  # size, address, owner

    def take(self, size: int) -> tuple[int, int, Any]:
        # list.pop is atomic; a lock could be held by another thread at a fork
        try:
            piece = self.free.pop()
        except IndexError:
            pass
        else:
            if piece[0] >= size:
                return piece
        memory = mmap.mmap(-1, max(size, 1 << 22), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return len(memory), ctypes.addressof(ctypes.c_char.from_buffer(memory)), memory


_scratch = _Scratch()


_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Function(int):
    """The address of a kernel's entry, which owns the code; Triton may load a kernel twice, from two threads."""

    code: Code
    start: Callable[[int], None]

    def __new__(cls, code: Code) -> "_Function":
        function = super().__new__(cls, code.symbol("entry"))
        function.code, function.start = code, _Entry(int(function))
        return function


class _Utils:
    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, _Function, int, int, int]:
        code = Code(kernel)
        return code, _Function(code), 0, 0, 2**31

    @staticmethod
    def unload_module(module: Code) -> None:
        pass

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**31, "multiprocessor_count": os.cpu_count() or 1, "warpSize": 1}


class _Launcher:
    """Called by Triton for every launch: fill the launch block (:mod:`vit_triton.cpu.entry`), start the threads."""

    gomp: Any = None
    forked = False

    def __init__(self, src: Any, metadata: Any) -> None:
        constants = {path[0] for path in src.constants if len(path) == 1}
        kinds = [
            (i, kind)
            for i, (name, kind) in enumerate(src.signature.items())
            if kind != "constexpr" and i not in constants
        ]
        self.bytes_per_thread = metadata.scratch_bytes + _PAGE
        self.positions = [(i, kind.startswith("*")) for i, kind in kinds]
        self.block = LaunchBlock([kind for _, kind in kinds])
        self.block_bytes = -(-self.block.size // _PAGE) * _PAGE  # the launch block precedes the scratch memory
        if _Launcher.gomp is None and not _Launcher.forked:
            _Launcher.gomp = _libgomp()

    def __call__(
        self, grid_x: int, grid_y: int, grid_z: int, stream: int, function: _Function, metadata: Any,
        launch_metadata: Any, enter_hook: Callable | None, exit_hook: Callable | None, *args: Any,
    ) -> None:  # fmt: skip
        total = grid_x * grid_y * grid_z
        if total == 0:
            return
        if (callback := getattr(_recorder, "callback", None)) is not None:
            tensors = [(slot, args[i]) for slot, (i, pointer) in enumerate(self.positions) if pointer]
            values = [None if pointer else args[i] for i, pointer in self.positions]
            callback(Launch(self, (grid_x, grid_y, grid_z), function, values), tensors)
            return
        values = [args[i] for i, _ in self.positions]
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in values]
        if enter_hook is not None:
            enter_hook(launch_metadata)
        self.run(grid_x, grid_y, grid_z, function, values)
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def run(self, grid_x: int, grid_y: int, grid_z: int, function: _Function, values: Sequence[Any]) -> None:
        """Run ``function`` over the grid with its argument values; tensors are passed as addresses."""
        total = grid_x * grid_y * grid_z
        threads = min(torch.get_num_threads(), total) if self.gomp is not None else 1
        chunk = max(1, total // (threads * 16)) if threads > 1 else total
        scratch = _scratch.take(self.block_bytes + self.bytes_per_thread * threads)
        _, block, memory = scratch
        own = block + self.block_bytes
        self.block.fill(memory, values, total, chunk, grid_x, grid_y, own, self.bytes_per_thread)
        if threads == 1:
            function.start(block)
        else:
            self.gomp.GOMP_parallel(ctypes.c_void_p(function), ctypes.c_void_p(block), threads, 0)
        _scratch.free.append(scratch)


class Launch(NamedTuple):
    """A recorded launch: its argument values, with None for the addresses of tensors."""

    launcher: _Launcher
    grid: tuple[int, int, int]
    function: _Function
    values: Sequence[Any]

    def start(self, values: Sequence[Any], stream: int) -> None:
        """Launch with other values."""
        self.launcher.run(*self.grid, self.function, values)


_recorder = threading.local()


@contextlib.contextmanager
def record_launches(callback: Callable[[Launch, list[tuple[int, torch.Tensor]]], None]) -> Iterator[None]:
    """Context manager: launches of this thread call ``callback(launch, tensors)`` instead, where tensors are pairs of
    position and tensor."""
    _recorder.callback = callback
    try:
        yield
    finally:
        _recorder.callback = None


class CPUDriver(DriverBase):
    launcher_cls = _Launcher

    def __init__(self, arch: str | None = None) -> None:
        """``arch``: as :func:`.features.arch`, the default."""
        backends.setdefault("cpu", Backend(CPUBackend, CPUDriver))
        if knobs.cache.manager_class is None:  # else set by TRITON_CACHE_MANAGER
            knobs.cache.manager_class = CheckedCache
        self.utils = _Utils()
        self.target = GPUTarget("cpu", arch or features.arch(), 1)
        self.device = _DEVICE + zlib.crc32(str(self.target.arch).encode()) % 1000  # code depends on the features
        self.no_switch = contextlib.nullcontext(self.device)
        names = self.target.arch.split(",")
        columns = features.register_block(names).columns
        # dtype, (columns, values per word) of the panels that tl.dot reads in place, see panels.py
        self.panels: tuple[tuple[torch.dtype, tuple[int, int]], ...] = ((torch.float32, (columns, 1)),)
        if features.multiplies_bf16(names):
            self.panels += ((torch.bfloat16, (columns, 2)),)

    @classmethod
    def is_active(cls) -> bool:
        return False  # Triton must not select it: with a GPU, two drivers would be active

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return _CPU

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("the CPU driver does not benchmark")


_lock = threading.RLock()


@functools.cache
def _default_driver() -> CPUDriver:
    return CPUDriver()


@contextlib.contextmanager
def _switch_driver(current: Any) -> Iterator[int]:
    with _lock:  # the active driver is global, so launches of two threads must not interleave
        driver.set_active(_default_driver())
        try:
            yield _default_driver().device
        finally:
            driver.set_active(current)


def _after_fork() -> None:
    """Disable OpenMP in a forked child: GNU OpenMP would wait for the parent's threads, which do not exist there."""
    _Launcher.gomp = None
    _Launcher.forked = True


os.register_at_fork(after_in_child=_after_fork)
_NOTHING = contextlib.nullcontext()
# same as kernels.target.INTERPRETING, since this package imports nothing else of vit_triton
_INTERPRETING = isinstance(triton.language.cdiv, InterpretedFunction)


def launch_driver() -> Any:
    """The driver for launches on CPU tensors, which may not be active yet; None in the interpreter."""
    if _INTERPRETING:
        return None
    try:
        current = driver.active
    except RuntimeError:  # no driver is active: ours stays active
        current = _default_driver()
        driver.set_active(current)
    return current if current.get_active_torch_device().type == "cpu" else _default_driver()


def use_cpu_driver() -> contextlib.AbstractContextManager[int | None]:
    """Context manager: Triton launches on CPU tensors. Yields the device number of the CPU driver, or None if the
    interpreter or another active driver runs the launches."""
    ours = launch_driver()
    if not isinstance(ours, CPUDriver):
        return _NOTHING
    return ours.no_switch if driver.active is ours else _switch_driver(driver.active)
