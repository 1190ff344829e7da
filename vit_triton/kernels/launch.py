"""What every launch shares: the device guard, the interpreter's lock and mending, the matmul precision."""

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

from vit_triton.kernels.target import INTERPRETING, Target

TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

_interpreter_lock = threading.Lock()  # the interpreter patches triton.language while a kernel runs


def launch(kernel: Any, grid: tuple[int], like: torch.Tensor, **kernel_args: Any) -> None:
    """Run ``kernel`` over a one-dimensional ``grid`` on the device of ``like``; an empty grid runs nothing.

    The grid has one dimension because CUDA stops the second and third at 65,535 programs; the first ends at 2**31 - 1,
    past which this raises ValueError.
    """
    if grid[0] == 0:
        return
    if grid[0] >= 2**31:
        raise ValueError(f"the input needs {grid[0]} programs of {kernel.__name__}, a GPU starts at most {2**31 - 1}")
    if INTERPRETING:
        from vit_triton.kernels import interpreter

        # the interpreter computes with numpy, whose warnings about inf - inf and rows of NaN are not news to a kernel
        with _interpreter_lock, np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            interpreter.mend()
            kernel[grid](**kernel_args)
        return
    with guard(like):
        start(kernel, grid, like.device, kernel_args)


_NOTHING = contextlib.nullcontext()


def guard(like: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside it the device of ``like`` is the one that Triton launches on."""
    if like.is_cuda:
        return torch.cuda.device(like.device)
    return torch.xpu.device(like.device) if like.is_xpu else _NOTHING


class Launch(NamedTuple):
    """A compiled kernel over its grid, and the values it was given, with None in place of each tensor."""

    run: Callable[..., None]
    values: Sequence[Any]

    def start(self, values: Sequence[Any]) -> None:
        """With other values; Triton takes a tensor or its address."""
        self.run(*values)


_recorder = threading.local()


@contextlib.contextmanager
def recording(note: Callable[[Launch, list[tuple[int, torch.Tensor]]], None]) -> Iterator[None]:
    """``note`` gets each launch of this thread, and the tensors by their place among the values. The kernel is compiled
    if it is new, and not started."""
    _recorder.note = note
    try:
        yield
    finally:
        _recorder.note = None


def remember(cache: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Put ``value`` into ``cache``, which then has at most ``most`` entries: the oldest make room. Threads may share
    the cache: no step iterates over it while another thread can change it."""
    for old in list(cache)[: max(0, len(cache) - most + 1)]:
        cache.pop(old, None)
    cache[key] = value


_compiled: dict[tuple[Any, ...], Any] = {}
_MOST_COMPILED = 4096  # sizes vary without end


def _run(kernel: Any, grid: tuple[int], device: torch.device, kernel_args: dict[str, Any]) -> None:
    """``kernel[grid](**kernel_args)``. With arguments that differ from earlier ones in nothing but where tensors lie,
    the compiled kernel is found again without Triton's own search, which takes half of the launch.

    Tensors are the arguments whose names end in _ptr; of the others, each has the same type in every call.
    """
    if (note := getattr(_recorder, "note", None)) is not None:
        compiled = _compile(kernel, grid, device, kernel_args)
        values = [kernel_args.get(name) for name in kernel.arg_names]
        tensors = [(i, x) for i, x in enumerate(values) if isinstance(x, torch.Tensor)]
        values = [None if isinstance(x, torch.Tensor) else x for x in values]
        note(Launch(compiled[grid[0], 1, 1], values), tensors)
        return
    names = id(kernel), *kernel_args
    form = _forms.get(names) or _new_form(kernel, names)
    parts = [form.number, driver.active, device, *map(kernel_args.get, form.others)]
    for x in map(kernel_args.get, form.tensors):
        # Triton compiles other code for a tensor that is not aligned
        parts += (None,) if x is None else (x.dtype, x.data_ptr() % 16 == 0)
    key = tuple(parts)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _compile(kernel, grid, device, kernel_args)
        remember(_compiled, key, compiled, _MOST_COMPILED)
    compiled[grid[0], 1, 1](*map(kernel_args.get, kernel.arg_names))


def _compile(kernel: Any, grid: tuple[int], device: torch.device, kernel_args: dict[str, Any]) -> Any:
    """The compiled kernel, which is loaded onto the device when it is first indexed by a grid."""
    # said outright because Triton 3.10 changes the default: a * b + c as one instruction, rounded once
    compiled = kernel.warmup(grid=grid, **kernel_args, enable_fp_fusion=True)
    if compiled.module is None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel.__name__} cannot be loaded while a CUDA graph is captured: call the function once with inputs of "
            "the same shapes, strides and dtypes before the capture (warm up)"
        )
    return compiled


start: Callable[[Any, tuple[int], torch.device, dict[str, Any]], None] = _run


@contextlib.contextmanager
def starting(by: Callable[[Any, tuple[int], torch.device, dict[str, Any]], None]) -> Iterator[None]:
    """A hook for measurements: inside it ``by(kernel, grid, device, arguments)`` takes the place of :data:`start`, and
    may call it, in all threads. It has no effect in the interpreter."""
    global start
    before, start = start, by
    try:
        yield
    finally:
        start = before


class _Form(NamedTuple):
    """The names of the arguments of a call: tensors and all others. An option such as maxnreg is in some calls only."""

    number: int
    kernel: Any  # held so that no other gets its id
    tensors: list[str]
    others: list[str]


_forms: dict[tuple[Any, ...], _Form] = {}
_numbers = itertools.count()


def _new_form(kernel: Any, names: tuple[Any, ...]) -> _Form:
    tensors = [name for name in names[1:] if name.endswith("_ptr")]
    others = [name for name in names[1:] if name not in tensors]
    _forms[names] = form = _Form(next(_numbers), kernel, tensors, others)
    return form


class _Seen(threading.local):
    precision = ""  # of the last float32 product that this thread launched on an architecture with a choice


seen = _Seen()


def input_precision(dtype: torch.dtype, target: Target) -> str:
    """``input_precision`` of ``tl.dot``: float32 is IEEE unless PyTorch's own switch allows TF32 and ``target`` has
    it."""
    if dtype != torch.float32 or not target.has_tf32:
        return "ieee"
    seen.precision = float32_precision()
    return seen.precision


def float32_precision() -> str:
    """What PyTorch allows a GPU's float32 products. Its older switches set the newer one, and reading those raises
    where both were used."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied where the elements of a row do not lie side by side in memory.

    That is the gradient which .sum().backward() gives, of stride 0. Read in place it makes a kernel load number by
    number, with twice the instructions and, on an A100, spilled registers (computed); the copy is one pass.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """``x``, copied where it has gaps: kernels read a vector without a stride."""
    return None if x is None else x.contiguous()
