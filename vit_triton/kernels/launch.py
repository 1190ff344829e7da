"""Launching kernels: device guard, cache of compiled kernels, recording, the interpreter's lock, GEMM precision."""

import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from vit_triton.kernels.target import INTERPRETING, Target

TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

_interpreter_lock = threading.Lock()  # the interpreter patches triton.language while a kernel runs


def launch(kernel: Any, grid: tuple[int], like: torch.Tensor, **kernel_args: Any) -> None:
    """Run ``kernel`` over a one-dimensional ``grid`` on the device of ``like``; an empty grid is ignored.

    CUDA limits the second and third dimension of a grid to 65,535 programs, therefore grids are one-dimensional.

    Raises:
        ValueError: if the grid has more than 2**31 - 1 programs.
    """
    if grid[0] == 0:
        return
    if grid[0] >= 2**31:
        raise ValueError(f"the input needs {grid[0]} programs of {kernel.__name__}, a GPU supports {2**31 - 1}")
    if INTERPRETING:
        from vit_triton.kernels import interpreter

        # kernels compute inf - inf and rows of NaN on purpose; numpy warns about both
        with _interpreter_lock, np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            interpreter.patch()
            kernel[grid](**kernel_args)
        return
    with guard(like):
        start(kernel, grid, like.device, kernel_args)


_NOTHING = contextlib.nullcontext()


def guard(like: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context manager: Triton launches on the device of ``like``."""
    if like.is_cuda:
        return torch.cuda.device(like.device)
    return torch.xpu.device(like.device) if like.is_xpu else _NOTHING


class _Address(NamedTuple):
    """The base of a descriptor, of which Triton's launcher reads the address only."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class _Descriptor:
    """A `TensorDescriptor` of memory at an address, without its checks."""

    __slots__ = ("base", "block_shape", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, like: Any, address: int) -> None:
        self.base = _Address(address)
        self.shape, self.strides, self.block_shape = like.shape, like.strides, like.block_shape
        self.padding, self.round_f32_to_tf32 = "zero", False


class Launch(NamedTuple):
    """A compiled kernel with its argument values; tensors are replaced by None. ``start(values, stream)`` launches it
    with a list of other values, where an address stands for a tensor, and for the tensor of a descriptor."""

    start: Callable[[list[Any], int], None]
    values: Sequence[Any]


def _starter(
    compiled: Any, grid: int, descriptors: Sequence[tuple[int, _Descriptor]]
) -> Callable[[list[Any], int], None]:
    """``compiled[grid, 1, 1]`` without the hooks, and with the stream as an argument: Triton looks up both in every
    launch. ``descriptors``: pairs of position and descriptor."""
    run = compiled.run  # loads the kernel
    function, metadata = compiled.function, compiled.packed_metadata

    def start(values: list[Any], stream: int, compiled: Any = compiled) -> None:  # the kernel must stay loaded
        for i, like in descriptors:
            values[i] = _Descriptor(like, values[i])
        run(grid, 1, 1, stream, function, metadata, None, None, None, *values)

    return start


def current_stream() -> int:
    """The stream of the current device, on which recorded launches start."""
    active = driver.active
    return active.get_current_stream(active.get_current_device())


_recorder = threading.local()


@contextlib.contextmanager
def record_launches(callback: Callable[[Launch, list[tuple[int, torch.Tensor]]], None]) -> Iterator[None]:
    """Context manager: launches of this thread call ``callback(launch, tensors)`` instead, where tensors are pairs of
    position and tensor. Kernels are compiled but not started."""
    _recorder.callback = callback
    try:
        yield
    finally:
        _recorder.callback = None


def add_to_cache(cache: dict[Any, Any], key: Any, value: Any, max_size: int) -> None:
    """Set ``cache[key] = value`` and evict the oldest entries, so that at most ``max_size`` remain. Thread-safe: the
    keys are copied before they are iterated over."""
    for old in list(cache)[: max(0, len(cache) - max_size + 1)]:
        cache.pop(old, None)
    cache[key] = value


_compiled: dict[tuple[Any, ...], Any] = {}
_MAX_COMPILED = 4096  # a bound, because the number of shapes is unlimited


def _run(kernel: Any, grid: tuple[int], device: torch.device, kernel_args: dict[str, Any]) -> None:
    """``kernel[grid](**kernel_args)`` with a cache of compiled kernels whose lookup is faster than Triton's. Its key
    contains all arguments except the addresses of tensors.

    Tensors are the arguments whose names end in _ptr, and descriptors of tensors those that end in _desc; every other
    argument has the same type in all calls.
    """
    if (callback := getattr(_recorder, "callback", None)) is not None:
        compiled = _compile(kernel, grid, device, kernel_args)
        values = [kernel_args.get(name) for name in kernel.arg_names]
        # without their bases: a recording holds no tensor
        descriptors = [(i, _Descriptor(x, 0)) for i, x in enumerate(values) if isinstance(x, TensorDescriptor)]
        values = [x.base if isinstance(x, TensorDescriptor) else x for x in values]
        tensors = [(i, x) for i, x in enumerate(values) if isinstance(x, torch.Tensor)]
        values = [None if isinstance(x, torch.Tensor) else x for x in values]
        callback(Launch(_starter(compiled, grid[0], descriptors), values), tensors)
        return
    names = id(kernel), *kernel_args
    form = _forms.get(names) or _new_form(kernel, names)
    parts = [form.number, driver.active, device, *map(kernel_args.get, form.others)]
    for x in map(kernel_args.get, form.tensors):
        # Triton specialises on 16-byte alignment
        parts += (None,) if x is None else (x.dtype, x.data_ptr() % 16 == 0)
    for x in map(kernel_args.get, form.descriptors):
        # shape and strides are arguments of the compiled kernel
        parts += (None,) if x is None else (x.base.dtype, *x.block_shape)
    key = tuple(parts)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _compile(kernel, grid, device, kernel_args)
        add_to_cache(_compiled, key, compiled, _MAX_COMPILED)
    compiled[grid[0], 1, 1](*map(kernel_args.get, kernel.arg_names))


def _compile(kernel: Any, grid: tuple[int], device: torch.device, kernel_args: dict[str, Any]) -> Any:
    """Compile the kernel; it is loaded onto the device when it is first indexed with a grid."""
    # explicit because Triton 3.10 changes the default: a * b + c is one instruction with one rounding
    compiled = kernel.warmup(grid=grid, **kernel_args, enable_fp_fusion=True)
    if compiled.module is None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel.__name__} cannot be loaded during CUDA graph capture; call the function once with inputs of the "
            "same shapes, strides and dtypes before the capture (warm up)"
        )
    return compiled


start: Callable[[Any, tuple[int], torch.device, dict[str, Any]], None] = _run


@contextlib.contextmanager
def override_start(function: Callable[[Any, tuple[int], torch.device, dict[str, Any]], None]) -> Iterator[None]:
    """Context manager for measurements: ``function(kernel, grid, device, arguments)`` replaces :data:`start` in all
    threads and may call it. Has no effect in the interpreter."""
    global start
    before, start = start, function
    try:
        yield
    finally:
        start = before


class _Form(NamedTuple):
    """The argument names of a call: tensors, descriptors and others. Options such as maxnreg are present in some
    calls only."""

    number: int
    kernel: Any  # a reference, so that its id is not reused
    tensors: list[str]
    descriptors: list[str]
    others: list[str]


_forms: dict[tuple[Any, ...], _Form] = {}
_numbers = itertools.count()


def _new_form(kernel: Any, names: tuple[Any, ...]) -> _Form:
    tensors = [name for name in names[1:] if name.endswith("_ptr")]
    descriptors = [name for name in names[1:] if name.endswith("_desc")]
    others = [name for name in names[1:] if name not in tensors and name not in descriptors]
    _forms[names] = form = _Form(next(_numbers), kernel, tensors, descriptors, others)
    return form


def descriptors(x: torch.Tensor, w: torch.Tensor, *blocks: list[int]) -> tuple[Any, Any]:
    """Descriptors of two matrices for loads of ``blocks`` by NVIDIA's tensor memory accelerator; None for both unless
    they have one dtype, a last stride of 1, and bases and rows aligned to 16 bytes."""
    if x.dtype != w.dtype or not (_describable(x) and _describable(w)):
        return None, None
    each = [TensorDescriptor(t, t.shape, t.stride(), block) for t, block in zip((x, w), blocks, strict=True)]
    return each[0], each[1]


def _describable(x: torch.Tensor) -> bool:
    rows, columns = x.stride()
    return columns == 1 and rows > 0 and x.data_ptr() % 16 == rows * x.element_size() % 16 == 0 and x.numel() > 0


class _LastGemm(threading.local):
    precision = ""  # of this thread's last float32 GEMM on an architecture that supports TF32


last_gemm = _LastGemm()


def input_precision(dtype: torch.dtype, target: Target) -> str:
    """``input_precision`` of ``tl.dot``: float32 is IEEE unless PyTorch allows TF32 and ``target`` supports it."""
    if dtype != torch.float32 or not target.has_tf32:
        return "ieee"
    last_gemm.precision = float32_precision()
    return last_gemm.precision


def float32_precision() -> str:
    """PyTorch's precision setting for float32 GEMMs on GPUs. Reads the newer setting: the older ones update it, and
    reading them raises if both were used."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def maybe_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x`` if its last stride is 1, else a contiguous copy.

    ``.sum().backward()`` gives a gradient with stride 0. Kernels would load it element by element, with more
    instructions and, on an A100, register spills; the copy is one pass.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """``x.contiguous()`` for an optional vector; kernels read vectors without a stride."""
    return None if x is None else x.contiguous()
