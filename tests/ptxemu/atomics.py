"""Read-modify-write operations on arrays of words."""

import numpy as np

from ptxemu.ops import F2, F4, F8, I4, I8, U2, bf2f, f2bf


def atomic(op, ty, cur, vals):
    v = vals[0]
    if op == "exch":
        return v
    if op == "cas":
        return np.where(cur == v, vals[1], cur)
    if op in ("and", "or", "xor"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op](cur, v)
    if op == "inc":
        return np.where(cur >= v, v.dtype.type(0), cur + v.dtype.type(1))
    if op == "dec":
        return np.where((cur == 0) | (cur > v), v, cur - v.dtype.type(1))
    if ty in ("f16x2", "f16"):
        a, b = np.ascontiguousarray(cur).view(F2), np.ascontiguousarray(v).view(F2)
        r = {"add": np.add, "min": np.fmin, "max": np.fmax}[op](a, b)
        return r.view(cur.dtype)
    if ty in ("bf16x2", "bf16"):
        a, b = bf2f(np.ascontiguousarray(cur).view(U2)), bf2f(np.ascontiguousarray(v).view(U2))
        return f2bf({"add": np.add, "min": np.fmin, "max": np.fmax}[op](a, b)).view(cur.dtype)
    dt = {"f32": F4, "f64": F8, "s32": I4, "s64": I8}.get(ty, cur.dtype)
    a, b = cur.view(dt), v.view(dt)
    fl = dt.kind == "f"
    r = {"add": np.add, "min": np.fmin if fl else np.minimum, "max": np.fmax if fl else np.maximum}[op](a, b)
    return r.astype(dt).view(cur.dtype)
