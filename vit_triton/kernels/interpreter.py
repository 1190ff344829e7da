"""Repairs Triton's interpreter, bfloat16 above all. Compiled kernels have no need of it and never meet it.

NumPy has no bfloat16, so the interpreter holds one as the uint16 of its bits, and most of its operations hand those
integers to NumPy as they are: ``1 + 1`` is ``0x3F80 + 0x3F80 = 0x7F00``, which reads as 1.7e38. A cast from float32
cuts the lower half off where hardware and PyTorch round to nearest even, so even a kernel that computes in float32
stores results with twice the error.

The repair is one idea: whatever computes gets its bfloat16 operands as float32, which holds every one of them exactly,
and its result is rounded back. That is PyTorch's own arithmetic on a CPU, and the GPU's for ``+ - *``. Two things
stay a little kinder than a GPU: a reduction or scan rounds its results and not every step, and ``tl.fma`` rounds
twice. Atomics on bfloat16 are left broken; no kernel here uses any.

Triton 3.6 needs two repairs more: ``range`` of a number that a kernel was given converts an array of one element to an
int, which NumPy warns about since 1.25 and refuses since 2.4; and the maximum or minimum of a number and NaN is NaN,
where hardware gives the number.

``tests/test_interpreter.py`` pins each defect, and asks for the removal of this file when Triton has repaired them.
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

__all__ = ["mend"]

# All arithmetic, comparisons and negation pass through binary_op and unary_op. Absent because they are right on raw
# bits: loads, stores, select, abs, and whatever only moves elements. Absent because Triton refuses bfloat16 there,
# interpreted or compiled: exp2, sqrt, erf and their like.
_COMPUTING = ("binary_op", "unary_op", "create_clampf", "create_fma", "create_dot")


def mend() -> None:
    """Make interpreted kernels compute like compiled ones, and bfloat16 like PyTorch's.

    Call it before a launch. It does nothing where kernels are compiled, and nothing the second time.
    """
    if triton.knobs.runtime.interpret:
        _mend_once()


@functools.cache
def _mend_once() -> None:
    builder = interpreter.InterpreterBuilder
    for name in _COMPUTING:
        setattr(builder, name, _in_float32(getattr(builder, name)))
    builder.cast_impl = _rounding_cast(builder.cast_impl)
    # Triton 3.8 has no such method, so that any bfloat16 constant but zero raises.
    builder.get_bf16 = lambda self, value: _rounded(self.get_fp32(value))
    builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    interpreter._patch_lang_tensor = _index_of_one_element(interpreter._patch_lang_tensor)
    operations = interpreter.ReduceScanOpInterface
    operations.apply = _reduction_in_float32(operations.apply)


def _index_of_one_element(patch: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(patch)
    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return mended


def _widened(operand: Any) -> Any:
    """A bfloat16 handle as the float32 handle of the same values; anything else as it is."""
    if not isinstance(operand, TensorHandle) or operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(handle: TensorHandle) -> TensorHandle:
    """The values of a handle as bfloat16, to nearest, ties to even."""
    values = handle.data.astype(np.float32)
    # One NaN for all: a payload in the lower half would round to infinity or carry over into the sign.
    bits = np.where(np.isnan(values), np.float32(np.nan), values).view(np.uint32)
    # Just under half a unit, and the missing bit when the unit is odd: the sum carries exactly when rounding goes up,
    # through the exponent too, so that what exceeds the largest finite number becomes infinity.
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(nearest.astype(np.uint16), tl.bfloat16)


def _in_float32(operation: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @functools.wraps(operation)
    def mended(self: Any, *operands: Any) -> TensorHandle:
        handles = [operand for operand in operands if isinstance(operand, TensorHandle)]
        narrow = [handle.dtype.scalar == tl.bfloat16 for handle in handles]
        if not any(narrow):
            return operation(self, *operands)
        result = operation(self, *map(_widened, operands))
        # Not all: the float32 one is the accumulator of a dot product, and so is the result. A comparison's is boolean.
        return _rounded(result) if all(narrow) and result.data.dtype != np.bool_ else result

    return mended


def _rounding_cast(cast: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @functools.wraps(cast)
    def mended(self: Any, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        source = _widened(source)
        # Integers and float64 take the way over float32 too, as they do in PyTorch.
        return _rounded(source) if target.scalar == tl.bfloat16 else cast(self, source, target)

    return mended


def _reduction_in_float32(apply: Callable[..., Any]) -> Callable[..., Any]:
    cast = interpreter.interpreter_semantic.cast

    @functools.wraps(apply)
    def mended(self: Any, tensors: Any) -> Any:
        if not isinstance(tensors, tuple):
            return self.apply((tensors,))[0]
        results = apply(self, tuple(cast(t, tl.float32) if t.dtype == tl.bfloat16 else t for t in tensors))
        return tuple(cast(r, t.dtype) if t.dtype == tl.bfloat16 else r for r, t in zip(results, tensors, strict=True))

    return mended
