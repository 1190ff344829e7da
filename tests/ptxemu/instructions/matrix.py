"""Matrix instructions on fragments in registers."""

import re

from ptxemu.instructions.registry import emits
from ptxemu.syntax import Reg, Vec


def _key(code, elems):
    return tuple(code.bits(e, e.width if isinstance(e, Reg) else 4) for e in elems)


def _fragment(code, fn, kind, elems):
    key = (fn, kind) + _key(code, elems)
    if key not in code.frag:
        k = f"{kind!r}, " if kind is not None else ""
        code.frag[key] = code.emit(f"{fn}({k}F.W, {', '.join(key[2:])})")
    return code.frag[key]


@emits("mma")
def emit_mma(code, ins):
    if ins.guard is not None:
        code.err(ins)
    p = ins.parts
    shape = next(q for q in p if re.match(r"^m\d+n\d+k\d+$", q))
    dt, at, bt, ct = p[-4:]
    d, a, b, c = (o.elems if isinstance(o, Vec) else (o,) for o in ins.ops[:4])
    if p[p.index(shape) + 1 : p.index(shape) + 3] != ("row", "col"):
        code.err(ins)
    if at == "f64":
        if shape != "m8n8k4":
            code.err(ins)
        vs = code.emit(f"mma_f64(F.W, {', '.join(_key(code, a + b + c))})", 2)
        for e, v in zip(d, vs, strict=True):
            code.alias(e, {"u": v})
        return
    if not shape.startswith("m16n8"):
        code.err(ins)
    if at in ("f16", "bf16"):
        A, B = _fragment(code, "mma_a16", at, a), _fragment(code, "mma_b16", at, b)
    elif at == "tf32":
        A, B = _fragment(code, "mma_a32", None, a), _fragment(code, "mma_b32", None, b)
    elif at in ("s8", "u8"):
        A, B = _fragment(code, "mma_a8", at == "s8", a), _fragment(code, "mma_b8", bt == "s8", b)
    else:
        code.err(ins)
    # the accumulator: directly from the previous mma if it is the same register quadruple
    names = tuple(e.name if isinstance(e, Reg) else None for e in c)
    kind = "d16" if ct == "f16" else "d32"
    hit = {code.lazy[n][0] for n in names if n in code.lazy}
    C = None
    if len(hit) == 1 and all(n in code.lazy for n in names):
        var, k, regs = code.mats[hit.pop()]
        if regs == names and k == kind:
            C = var
    if C is None:
        cv = _key(code, c)
        if kind == "d16":
            C = code.emit(f"mma_c16(F.W, {', '.join(cv)})")
        else:
            C = code.emit(f"mma_c32({'I4' if dt == 's32' else 'F4'}, F.W, {', '.join(cv)})")
    if dt == "s32":
        D = code.emit(f"mma_imma({A}, {B}, {C}, {'satfinite' in p})")
    elif kind == "d16":
        D = code.emit(f"mma_fma({A}, {B}, {C}).astype(F2).astype(F4)")
    else:
        D = code.emit(f"mma_fma({A}, {B}, {C})")
    mid = len(code.mats)
    dn = tuple(e.name for e in d)
    # registers of D that belong to other matrices are overwritten
    code.mats[mid] = (D, kind, dn)
    for i, n in enumerate(dn):
        code.lazy[n] = (mid, i)
        code.cur.pop(n, None)
        code.defined.add(n)
