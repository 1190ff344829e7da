"""Encodes kernel arguments as PTX parameters."""

import re
import struct

import numpy as np
from triton.backends.driver import _parse_descriptor

from ptxemu.errors import PtxEmuError
from ptxemu.ops import f2bf


def flatten(signature, args):
    """(type, value) pairs of the arguments; a tensor descriptor expands to several."""
    for type_, value in zip(signature, args, strict=True):
        if isinstance(type_, tuple):
            yield from flatten(type_, tuple(value))
        elif type_.startswith("tensordesc"):
            # the base in a replayed launch is no tensor
            base = value.base if hasattr(value.base, "stride") else value.base.data_ptr()
            yield "*" + _parse_descriptor(type_)[0], base
            yield from (("i64", v) for v in (*value.shape, *value.strides))
            yield "i1", value.padding == "nan"
            yield "i1", bool(getattr(value, "round_f32_to_tf32", False))
            yield from (("i32", v) for v in value.shape)
            yield from (("i64", v) for v in value.strides)
        elif type_ != "constexpr":
            yield type_, value


def encode(type_, value) -> bytes:
    """Bytes of a scalar argument or an address."""
    if type_ in ("fp32", "f32"):
        return struct.pack("<f", float(value))
    if type_ == "fp64":
        return struct.pack("<d", float(value))
    if type_ == "fp16":
        return np.float16(value).tobytes()
    if type_ == "bf16":
        return f2bf(np.array([value], np.float32)).tobytes()
    if match := re.fullmatch(r"[iu](1|8|16|32|64)", type_):
        size = max(1, int(match[1]) // 8)
        return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    raise PtxEmuError(f"a kernel argument of type {type_} is not supported")


def extent(t, bounds):
    """(address, bytes) that a tensor argument gives access to: its "storage", or its own extent ("view")."""
    if bounds == "storage" and hasattr(t, "untyped_storage"):
        st = t.untyped_storage()
        return st.data_ptr(), st.nbytes()
    if hasattr(t, "stride"):
        if t.numel() == 0:
            return t.data_ptr(), 0
        n = sum((s - 1) * d for s, d in zip(t.shape, t.stride(), strict=True)) + 1
        return t.data_ptr(), n * t.element_size()
    if hasattr(t, "nbytes"):
        return t.data_ptr(), t.nbytes
    raise PtxEmuError(f"cannot tell the extent of argument {t!r}; use ptxemu.register()")
