"""Triton driver that runs compiled kernels in the emulator.

Triton's own code runs, including ptxas; only ``load_binary`` and the launcher are replaced.
"""

import collections
import contextlib
import ctypes
import struct
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.compiler.compiler import CompiledKernel

from ptxemu.arguments import encode, extent, flatten
from ptxemu.codegen import compile_kernel
from ptxemu.errors import PtxEmuError
from ptxemu.launch import Launch
from ptxemu.memory import GlobalMemory
from ptxemu.options import Options
from ptxemu.ttir import loads_without_other

SHARED_BYTES = {80: 166912, 86: 101376, 87: 166912, 89: 101376}  # maximum per CTA, by architecture
HISTORY = 10000  # launches whose statistics are kept


class _Function:
    """Module and function returned by ``load_binary``."""

    def __init__(self, kernel):
        self.kernel, self.ptx = kernel, kernel.asm["ptx"]
        self.no_other = loads_without_other(kernel.asm["ttir"])
        self.shared = kernel.metadata.shared
        self.nthreads = kernel.metadata.num_warps * 32


class _Utils:
    def __init__(self, driver):
        self.driver = driver

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_BYTES[self.driver.arch], "multiprocessor_count": 108, "warpSize": 32}

    def load_binary(self, name, cubin, shared, device):
        function = _Function(self.driver.loading)
        return function, function, *cubin_resources(cubin), 1024

    def unload_module(self, module):
        pass


def cubin_resources(cubin):
    """(registers, bytes of local memory) per thread, from the .nv.info sections of a cubin."""
    (shoff,) = struct.unpack_from("<Q", cubin, 0x28)
    shentsize, shnum, shstr = struct.unpack_from("<HHH", cubin, 0x3A)
    secs = [struct.unpack_from("<IIQQQQIIQQ", cubin, shoff + i * shentsize) for i in range(shnum)]
    stro = secs[shstr][4]
    regs = frame = 0
    for s in secs:
        end = cubin.index(b"\0", stro + s[0])
        nm = cubin[stro + s[0] : end].decode()
        if nm.startswith(".text."):
            regs = max(regs, s[7] >> 24)  # sh_info holds the register count
        if nm.startswith(".nv.info"):
            p, e = s[4], s[4] + s[5]
            while p + 4 <= e:
                fmt, attr, val = struct.unpack_from("<BBH", cubin, p)
                p += 4
                if fmt == 4:
                    if attr == 0x2F and val >= 8:  # EIATTR_REGCOUNT
                        regs = max(regs, struct.unpack_from("<II", cubin, p)[1])
                    if attr == 0x11 and val >= 8:  # EIATTR_FRAME_SIZE
                        frame = max(frame, struct.unpack_from("<II", cubin, p)[1])
                    p += val
    return regs, frame


class _Launcher:
    def __init__(self, src, metadata):
        self.signature, self.metadata = src.signature, metadata

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        driver = triton.runtime.driver.active
        if not isinstance(driver, EmulatorDriver):
            raise PtxEmuError("a kernel compiled inside ptxemu.emulate() was launched outside of it")
        if enter is not None:
            enter(launch_metadata)
        if x * y * z > 0:
            driver.launch(self, function, (x, y, z), args)
        if leave is not None:
            leave(launch_metadata)


class EmulatorDriver:
    """Replaces ``triton.backends.nvidia.driver.CudaDriver``. ``history``: ``LaunchStats`` of recent launches, in
    order."""

    launcher_cls = _Launcher

    def __init__(self, arch=80, **options):
        if arch not in SHARED_BYTES:
            raise ValueError(f"arch must be one of {list(SHARED_BYTES)}, not {arch!r}")
        self.arch = arch
        self.device = 1000 + arch  # Triton caches compiled kernels by device number
        self.options = Options(**options)
        self.utils = _Utils(self)
        self.loading = None  # the kernel whose binary is being loaded
        self.history = collections.deque(maxlen=HISTORY)
        self.registered = []  # (start, bytes, name, object)
        self.uninit = {}  # start -> (start, end, array of bools)
        self.cost = 0.0

    @staticmethod
    def is_active():
        return True

    def get_current_device(self):
        return self.device

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, type_):
        return ty_to_cpp(type_)

    def allocate_default_profile_scratch(self, size, alignment, stream):
        return torch.zeros(size, dtype=torch.int8)

    def get_benchmarker(self):
        """For the autotuner: runs once; the "time" is ``LaunchStats.cost``, a deterministic count."""

        def benchmark(run, *args, quantiles=None, **options):
            before = self.cost
            run()
            cost = self.cost - before
            return cost if quantiles is None else [cost] * len(quantiles)

        return benchmark

    def launch(self, launcher, function, grid, args):
        """Run a kernel. Raises according to the ``Options``."""
        memory = GlobalMemory()
        for start, size, name, owner in self.registered:
            memory.add(start, size, name, True, owner)
        flat = list(flatten(launcher.signature.values(), args))
        names = [name for name, type_ in launcher.signature.items() if type_ != "constexpr"]
        if len(names) != len(flat):  # tuples and descriptors expand to several arguments
            names = [f"arg{i}" for i in range(len(flat))]
        values = [
            self._pointer(memory, value, name) if type_[0] == "*" else encode(type_, value)
            for name, (type_, value) in zip(names, flat, strict=True)
        ]
        programs = grid[0] * grid[1] * grid[2]
        values += [
            _scratch(memory, kind, getattr(launcher.metadata, f"{kind}_size", 0) * programs)
            for kind in ("global_scratch", "profile_scratch")
        ]
        kernel = compile_kernel(function.ptx, function.no_other if self.options.poison_masked else False)
        if len(values) < len(kernel.params):
            raise PtxEmuError(f"{kernel.name}: {len(kernel.params)} PTX parameters, {len(values)} arguments")
        parameters = _parameters(kernel, values)
        running = Launch(
            kernel, grid, function.nthreads, parameters, function.shared, memory, self.options, self.uninit.values()
        )
        stats = running.run()
        stats.n_regs, stats.n_spills = function.kernel.n_regs, function.kernel.n_spills
        self.cost += stats.cost
        self.history.append(stats)

    def _pointer(self, memory, value, name):
        if value is None:
            return struct.pack("<Q", 0)
        if isinstance(value, int):
            return struct.pack("<Q", value)
        if getattr(getattr(value, "device", None), "type", "cpu") != "cpu":
            raise PtxEmuError(f"argument {name} is on {value.device}; the emulator takes CPU tensors")
        tensor = value if hasattr(value, "untyped_storage") else getattr(value, "base", value)
        memory.add(*extent(tensor, self.options.bounds), name, True, value)
        return struct.pack("<Q", value.data_ptr())


def _scratch(memory, name, size):
    """Address of ``size`` bytes of scratch memory."""
    if not size:
        return struct.pack("<Q", 0)
    buffer = np.zeros(size + 256, np.uint8)
    start = -(-buffer.ctypes.data // 256) * 256
    memory.add(start, size, name, True, buffer)
    return struct.pack("<Q", start)


def _parameters(kernel, values):
    """{name: bytes} of the parameters; parameters without a value are zero."""
    values = [*values, *(b"" for _ in kernel.params)]
    return {
        name: value.ljust(size * count, b"\0")
        for (name, _, size, count), value in zip(kernel.params, values, strict=False)
    }


_current = None


@contextlib.contextmanager
def emulate(arch=80, **options):
    """Run Triton launches on CPU tensors in the emulator, compiled for sm_``arch``. Yields the ``EmulatorDriver``.

    Options: see ``Options``. A nested ``emulate`` inherits registered and tracked tensors.

    Raises TypeError for an unknown option.
    """
    global _current
    for name in options:
        if name not in Options.names():
            raise TypeError(f"unknown option {name!r}; known: {', '.join(Options.names())}")
    runtime, before, outer = triton.runtime.driver, triton.runtime.driver._active, _current
    driver = EmulatorDriver(arch, **options)
    if outer is not None:
        driver.registered, driver.uninit = list(outer.registered), outer.uninit
    init_handles = CompiledKernel._init_handles

    def init_noted_handles(kernel):
        active = runtime.active
        if isinstance(active, EmulatorDriver):
            active.loading = kernel
        return init_handles(kernel)

    with mock.patch.object(CompiledKernel, "_init_handles", init_noted_handles):
        runtime.set_active(driver)
        _current = driver
        try:
            yield driver
        finally:
            _current, runtime._active = outer, before


def _inside(function):
    if _current is None:
        raise PtxEmuError(f"{function}() works inside emulate() only")
    return _current


def last_stats():
    """``LaunchStats`` of the latest launch in the innermost ``emulate``."""
    history = _inside("last_stats").history
    if not history:
        raise PtxEmuError("no kernel was launched yet")
    return history[-1]


def register(t, name="registered"):
    """Allow access to a tensor that is not an argument but is reached through an address in memory or an int."""
    driver = _inside("register")
    driver.registered.append((*extent(t, driver.options.bounds), name, t))


def poison_(t):
    """Fill a tensor's storage with the poison pattern (NaN, huge integers); see ``unwritten``. Returns the tensor."""
    storage = t.untyped_storage()
    if storage.nbytes():
        raw = np.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)
        raw[: storage.nbytes() // 2 * 2].view(np.uint16)[:] = 0x7FFF
    return t


def unwritten(t):
    """Number of elements of a tensor passed to ``poison_`` that still hold the pattern."""
    flat = t.contiguous().reshape(-1)
    if flat.element_size() == 1:
        image = flat.view(torch.uint8).numpy()
        return int(((image == 0xFF) | (image == 0x7F)).sum())
    image = flat.view(torch.int16).numpy().reshape(-1, flat.element_size() // 2)
    return int((image == 0x7FFF).all(1).sum())


def track_uninit(t):
    """Poison a tensor and detect reads of unwritten bytes (option ``global_uninit``). Returns the tensor."""
    driver = _inside("track_uninit")
    poison_(t)
    start, size = extent(t, "storage")
    driver.uninit[start] = (start, start + size, np.ones(size, bool))
    return t


def run_ptx(ptx, grid, nthreads, args, shared=0, **options):
    """Run PTX text without Triton. ``args``: torch or numpy arrays, or pairs such as ("i32", 5).

    Returns ``LaunchStats``.
    """
    options = Options(**options)
    kernel = compile_kernel(ptx, options.poison_masked)
    memory = GlobalMemory()
    values = []
    for i, arg in enumerate(args):
        if isinstance(arg, tuple):
            values.append(encode(*arg))
            continue
        start, size = (arg.ctypes.data, arg.nbytes) if isinstance(arg, np.ndarray) else extent(arg, options.bounds)
        memory.add(start, size, f"arg{i}", True, arg)
        values.append(struct.pack("<Q", arg.ctypes.data if isinstance(arg, np.ndarray) else arg.data_ptr()))
    grid = (*grid, *(1 for _ in range(3 - len(grid))))
    return Launch(kernel, grid, nthreads, _parameters(kernel, values), shared, memory, options).run()
