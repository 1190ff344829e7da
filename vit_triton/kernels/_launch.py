"""What every launch shares: the device guard, the interpreter's lock and mending, the matmul precision."""

import contextlib
import threading
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

# Triton decides while it is imported whether its kernels are interpreted; its own functions tell what it decided
INTERPRETING = isinstance(triton.language.cdiv, InterpretedFunction)

_interpreter_lock = threading.Lock()  # the interpreter patches triton.language while a kernel runs


def launch(kernel: Any, grid: tuple[int], like: torch.Tensor, **kernel_args: Any) -> None:
    """Run ``kernel`` over a one-dimensional ``grid`` on the device of ``like``; an empty grid runs nothing.

    The grid has one dimension because CUDA stops the second and third at 65,535 programs.
    """
    if grid[0] == 0:
        return
    if INTERPRETING:
        from . import _interpreter

        with _interpreter_lock:
            _interpreter.mend()
            kernel[grid](**kernel_args)
        return
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](**kernel_args)


def input_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 is IEEE unless PyTorch's own switch allows TF32."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
