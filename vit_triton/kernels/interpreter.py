"""Patches for Triton's interpreter, mostly for bfloat16. Compiled kernels do not use them.

NumPy has no bfloat16, so the interpreter stores its bits as uint16, and most operations pass these integers to NumPy:
``1 + 1`` is ``0x3F80 + 0x3F80 = 0x7F00``, which is 1.7e38 in bfloat16. A cast from float32 truncates, while hardware
and PyTorch round to nearest even, so even a kernel that computes in float32 stores results with twice the error.

The patched operations convert bfloat16 operands to float32, which is exact, and round the result to bfloat16. This is
the arithmetic of PyTorch on a CPU, and of GPUs for ``+ - *``. Two operations differ from GPUs: a reduction or
scan rounds only its results, and ``tl.fma`` rounds twice. Atomics on bfloat16 are not patched; no kernel
of this library uses them.

Triton 3.6 requires two more patches: ``range`` of a kernel argument converts an array of one element to an int, which
is deprecated in NumPy 1.25 and an error since 2.4; and the maximum or minimum of a number and NaN is NaN instead of the
number.

``tests/test_interpreter.py`` tests for each defect, and fails when Triton has fixed it and the patch can be removed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

__all__ = ["patch"]

# binary_op and unary_op implement all arithmetic, comparisons and negation. Not listed: operations that are correct on
# raw bits (loads, stores, select, abs, moves of elements) and operations for which Triton does not support bfloat16
# (exp2, sqrt, erf, ...).
_COMPUTING = ("binary_op", "unary_op", "create_clampf", "create_fma", "create_dot")


def patch() -> None:
    """Patch the interpreter so that results match compiled kernels, and PyTorch in bfloat16.

    Call it before a launch. Has no effect on compiled kernels, nor when called again.
    """
    if triton.knobs.runtime.interpret:
        _patch_once()


@functools.cache
def _patch_once() -> None:
    builder = interpreter.InterpreterBuilder
    for name in _COMPUTING:
        setattr(builder, name, _in_float32(getattr(builder, name)))
    builder.cast_impl = _rounding_cast(builder.cast_impl)
    # Triton 3.8 lacks this method: nonzero bfloat16 constants raise.
    builder.get_bf16 = lambda self, value: _rounded(self.get_fp32(value))
    builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    interpreter._patch_lang_tensor = _index_of_one_element(interpreter._patch_lang_tensor)
    operations = interpreter.ReduceScanOpInterface
    operations.apply = _reduction_in_float32(operations.apply)


def _index_of_one_element(patch_tensor: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(patch_tensor)
    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched


def _widened(operand: Any) -> Any:
    """Convert a bfloat16 handle to float32; return other operands unchanged."""
    if not isinstance(operand, TensorHandle) or operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(handle: TensorHandle) -> TensorHandle:
    """Round the values of a handle to bfloat16, to nearest, ties to even."""
    values = handle.data.astype(np.float32)
    # a canonical NaN: rounding a NaN payload could give infinity or change the sign
    bits = np.where(np.isnan(values), np.float32(np.nan), values).view(np.uint32)
    # Adding 0x7FFF plus the lowest kept bit carries exactly when the value rounds up; a carry into the exponent turns
    # overflow into infinity.
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(nearest.astype(np.uint16), tl.bfloat16)


def _in_float32(operation: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @functools.wraps(operation)
    def patched(self: Any, *operands: Any) -> TensorHandle:
        handles = [operand for operand in operands if isinstance(operand, TensorHandle)]
        narrow = [handle.dtype.scalar == tl.bfloat16 for handle in handles]
        if not any(narrow):
            return operation(self, *operands)
        result = operation(self, *map(_widened, operands))
        # With a float32 accumulator (dot) the result stays float32; results of comparisons are boolean.
        return _rounded(result) if all(narrow) and result.data.dtype != np.bool_ else result

    return patched


def _rounding_cast(cast: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @functools.wraps(cast)
    def patched(self: Any, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        source = _widened(source)
        # Integers and float64 are converted through float32, as in PyTorch.
        return _rounded(source) if target.scalar == tl.bfloat16 else cast(self, source, target)

    return patched


def _reduction_in_float32(apply: Callable[..., Any]) -> Callable[..., Any]:
    cast = interpreter.interpreter_semantic.cast

    @functools.wraps(apply)
    def patched(self: Any, tensors: Any) -> Any:
        if not isinstance(tensors, tuple):
            return self.apply((tensors,))[0]
        results = apply(self, tuple(cast(t, tl.float32) if t.dtype == tl.bfloat16 else t for t in tensors))
        return tuple(cast(r, t.dtype) if t.dtype == tl.bfloat16 else r for r, t in zip(results, tensors, strict=True))

    return patched
