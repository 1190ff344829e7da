"""What every launch shares: the device guard, the interpreter's lock and mending, the matmul precision."""

import contextlib
import threading
import warnings
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

# Triton decides while it is imported whether its kernels are interpreted; its own functions tell what it decided
INTERPRETING = isinstance(triton.language.cdiv, InterpretedFunction)

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
        from vit_triton.kernels import _interpreter

        # the interpreter computes with numpy, whose warnings about inf - inf and rows of NaN are not news to a kernel
        with _interpreter_lock, np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            _interpreter.mend()
            kernel[grid](**kernel_args)
        return
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        # said outright because Triton 3.10 changes the default: a * b + c as one instruction, rounded once
        kernel[grid](**kernel_args, enable_fp_fusion=True)


def input_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 is IEEE unless PyTorch's own switch allows TF32."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def keep_scale(dropout_p: float) -> float:
    """What dropout multiplies the survivors by; with ``dropout_p`` 1 there are none."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0
