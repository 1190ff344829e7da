"""Loads, stores, asynchronous copies and atomics."""

from ptxemu.instructions.registry import emits
from ptxemu.syntax import TYPE_BYTES, Reg, Sym, Vec


def _space(ins):
    for p in ins.parts[1:]:
        s = p.split("::")[0]
        if s in ("global", "shared", "local", "param", "const"):
            return {"global": "g", "const": "g", "shared": "s", "local": "l", "param": "p"}[s]
    return "x"


def _elements(operand):
    return operand.elems if isinstance(operand, Vec) else (operand,)


def _values(code, call, n):
    """Variables of the n values in the tuple that `call` returns."""
    return code.emit(call, n) if n > 1 else [code.emit(call + "[0]")]


@emits("ld", "ldu")
def emit_ld(code, ins):
    sp, ty = _space(ins), ins.type
    esz = TYPE_BYTES[ty]
    d, m = ins.ops[0], ins.ops[1]
    if esz == 16:
        code.err(ins)
    elems = _elements(d)
    vec = len(elems)
    if sp == "p":
        if not isinstance(m.base, Sym):
            code.err(ins)
        known = {p[0] for p in code.c.params}
        for i, e in enumerate(elems):
            if m.base.name in known:
                x = f"X.prm({m.base.name!r}, {m.offset + i * esz}, {esz})"
            else:  # return value of a call
                x = code.gen.const(0, f"U{esz}" if esz > 1 else "U1")
            code.put(e, "u", _extend(x, ty, esz, e.width), ins)
        return
    if esz * vec > 16:
        code.err(ins)
    a, off = code.mem(m)
    g = code.guard(ins)
    olds = "None"
    if ins.guard is not None:
        os_ = []
        for e in elems:
            if e is None:
                os_.append(f"POISON[2].astype(U{esz})")
                continue
            v = code.var(e)
            os_.append(v if e.width == esz else f"{v}.astype(U{esz})")
        olds = "(" + ", ".join(os_) + ", )"
    call = f"X.ld_{sp}(F, {a}, {off}, {esz}, {vec}, {g}, {olds}, {ins.index})"
    for e, v in zip(elems, _values(code, call, vec), strict=True):
        if e is None:
            continue
        if e.width == esz:
            code.alias(e, {"u": v})
        else:
            code.alias(e, {"u": code.emit(_extend(v, ty, esz, e.width))})


def _extend(x, ty, esz, width):
    if esz == width:
        return x
    if ty[0] == "s":
        return f"{x}.view(I{esz}).astype(I{width}).view(U{width})"
    return f"{x}.astype(U{width})"


@emits("st")
def emit_st(code, ins):
    sp, ty = _space(ins), ins.type
    esz = TYPE_BYTES[ty]
    m, s = ins.ops[0], ins.ops[1]
    elems = _elements(s)
    if sp == "p":
        value = code.bits(elems[0], esz) if esz > 1 else code.narrow_int(elems[0], "u8")
        code.do(f"F.callparams[{m.base.name!r}] = {value}")
        return
    if esz * len(elems) > 16 or esz == 16:
        code.err(ins)
    a, off = code.mem(m)
    g = code.guard(ins)
    vals = ", ".join(code.bits(e, esz) if esz > 1 else code.narrow_int(e, "u8") for e in elems)
    code.do(f"X.st_{sp}(F, {a}, {off}, {esz}, {len(elems)}, ({vals}, ), {g}, {ins.index})")


@emits("ldmatrix", "stmatrix")
def emit_matrix_access(code, ins):
    if ins.guard is not None or ins.type != "b16" or "m8n8" not in ins.parts:
        code.err(ins)
    load = ins.parts[0] == "ldmatrix"
    registers, address = ins.ops if load else reversed(ins.ops)
    elems = _elements(registers)
    a, off = code.mem(address)
    trans = "trans" in ins.parts
    if load:
        values = _values(code, f"X.ldmatrix(F, {a}, {off}, {len(elems)}, {trans}, {ins.index})", len(elems))
        for e, v in zip(elems, values, strict=True):
            code.alias(e, {"u": v})
    else:
        vals = ", ".join(code.bits(e, 4) for e in elems)
        code.do(f"X.stmatrix(F, {a}, {off}, ({vals}, ), {trans}, {ins.index})")


@emits("cp")
def emit_cp(code, ins):
    p = ins.parts
    if p[1] != "async" or "bulk" in p or "mbarrier" in p:
        code.err(ins)
    if "commit_group" in p:
        code.do(f"X.cp_commit(F, {code.guard(ins)})")
        return
    if "wait_group" in p:
        if ins.guard is not None:
            code.err(ins)
        code.do(f"X.cp_wait(F, {ins.ops[0].bits})")
        return
    if "wait_all" in p:
        code.do("X.cp_wait(F, -1)")
        return
    dst, src, size = ins.ops[:3]
    sa, so = code.mem(dst)
    ga, go = code.mem(src)
    srcsz = "None"
    pol = any("cache_hint" in q for q in p)
    rest = ins.ops[3:-1] if pol else ins.ops[3:]
    if rest:
        if isinstance(rest[0], Reg) and rest[0].width == 0:
            code.err(ins, "ignore-src predicate")
        srcsz = code.bits(rest[0], 4)
    code.do(
        f"X.cp_async(F, {sa}, {so}, {ga}, {go}, {size.bits}, {srcsz}, {code.guard(ins)}, {ins.index}, "
        f"{code.gen.no_other(ins)})"
    )


@emits("atom", "red")
def emit_atomic(code, ins):
    want, ty = ins.parts[0] == "atom", ins.type
    ops = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    op = next((q for q in ins.parts[1:] if q in ops), None)
    if op is None:
        code.err(ins)
    w = TYPE_BYTES[ty]
    d = ins.ops[0] if want else None
    m, *vals = ins.ops[1:] if want else ins.ops
    if isinstance(vals[0], Vec) or isinstance(d, Vec):
        vals = [v.elems[0] if isinstance(v, Vec) and len(v.elems) == 1 else v for v in vals]
        if isinstance(d, Vec) and len(d.elems) == 1:
            d = d.elems[0]
        if any(isinstance(v, Vec) for v in vals) or isinstance(d, Vec):
            code.err(ins, "vector atomic")
    a, off = code.mem(m)
    g = code.guard(ins)
    old = "None"
    if d is not None and ins.guard is not None:
        old = code.var(d) if d.width == w else f"{code.var(d)}.astype(U{w})"
    vs = ", ".join(code.bits(v, w) for v in vals)
    sp = _space(ins)
    call = f"X.atom(F, {sp!r}, {a}, {off}, {op!r}, {ty!r}, ({vs}, ), {g}, {old}, {ins.index})"
    if d is None:
        code.do(call)
    else:
        v = code.emit(call)
        code.alias(d, {"u": v if d.width == w else code.emit(f"{v}.astype(U{d.width})")})
