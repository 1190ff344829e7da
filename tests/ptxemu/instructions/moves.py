"""Moves, selections and comparisons."""

from ptxemu.instructions.registry import emits
from ptxemu.syntax import TYPE_BYTES, Pair, Reg, Vec

ORDERED = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}  # false if an operand is NaN


@emits("mov")
def emit_mov(code, ins):
    d, s = ins.ops
    if ins.poison and code.gen.poisoned(ins):
        code.put(d, "u", f"POISON[{d.width}]", ins)
        return
    if isinstance(d, Vec):
        w = next(e.width for e in d.elems if e is not None)
        v = code.emit(code.bits(s, w * len(d.elems)))
        for i, e in enumerate(d.elems):
            if e is None:
                continue
            sh = 8 * w * i
            x = v if sh == 0 else f"({v} >> {code.gen.const(sh, f'U{w * len(d.elems)}')})"
            code.put(e, "u", f"{x}.astype(U{w})", ins)
        return
    if isinstance(s, Vec):
        n = len(s.elems)
        w = d.width // n
        terms = []
        for i, e in enumerate(s.elems):
            x = code.bits(e, w)
            x = f"{x}.astype(U{d.width})"
            terms.append(x if i == 0 else f"({x} << {code.gen.const(8 * w * i, f'U{d.width}')})")
        code.put(d, "u", " | ".join(terms), ins)
        return
    if d.width == 0:
        code.put(d, "u", code.rd(s, "pred"), ins)
        return
    if isinstance(s, Reg) and s.width == d.width and ins.guard is None:
        if s.name in code.lazy:
            code.unlazy(s.name)
        code.var(s, next(iter(code.cur[s.name])) if s.name in code.cur else "u")
        code.alias(d, code.cur[s.name])
        return
    code.put(d, "u", code.bits(s, d.width), ins)


@emits("cvta")
def emit_cvta(code, ins):
    d, s = ins.ops
    tag = {"local": 1 << 56, "shared": 1 << 57}.get(next((p for p in ins.parts if p in ("local", "shared")), None), 0)
    a = code.bits(s, 8)
    if tag:
        k = code.gen.const(tag, "U8")
        a = f"{a} & ~{k}" if "to" in ins.parts else f"{a} | {k}"
    code.put(d, "u", a, ins)


@emits("createpolicy")
def emit_createpolicy(code, ins):
    code.put(ins.ops[0], "u", code.gen.const(0, "U8"), ins)


@emits("selp")
def emit_selp(code, ins):
    d, a, b, p = ins.ops
    ty = ins.type
    w = TYPE_BYTES[ty]
    code.put(d, "u", f"np.where({code.rd(p, 'pred')}, {code.bits(a, w)}, {code.bits(b, w)})", ins)


@emits("setp")
def emit_setp(code, ins):
    cmp_ = ins.parts[1]
    ty = ins.type
    boolop = next((p for p in ins.parts[2:-1] if p in ("and", "or", "xor")), None)
    d, a, b = ins.ops[:3]
    e = _compare(code, ins, cmp_, ty, a, b)
    p = code.emit(e)
    q = None
    d1, d2 = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    if d2 is not None:
        q = code.emit(f"~{p}")
    if boolop:
        c = code.rd(ins.ops[3], "pred")
        o = {"and": "&", "or": "|", "xor": "^"}[boolop]
        p = f"{p} {o} {c}"
        if q:
            q = f"{q} {o} {c}"
    if d1 is not None:
        code.put(d1, "u", p, ins)
    if d2 is not None:
        code.put(d2, "u", q, ins)


def _compare(code, ins, c, ty, a, b):
    """``a`` ``c`` ``b`` in type ``ty``."""
    if ty in ("bf16", "f16"):
        if ty == "bf16":
            x, y = f"bf2f({code.bits(a, 2)})", f"bf2f({code.bits(b, 2)})"
        else:
            x, y = code.rd(a, "f16"), code.rd(b, "f16")
    elif ty in ("f16x2", "bf16x2"):
        code.err(ins)
    else:
        t = {"lo": "u", "ls": "u", "hi": "u", "hs": "u"}.get(c)
        x, y = code.rd(a, ty if not t else "u" + ty[1:]), code.rd(b, ty if not t else "u" + ty[1:])
    if "ftz" in ins.parts:
        x, y = f"ftz({x})", f"ftz({y})"
    if ty[0] == "f" or ty == "bf16":
        return _float_cmp(code, ins, c, code.emit(x), code.emit(y))
    symbol = {**ORDERED, "ne": "!=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}.get(c) or code.err(ins)
    return f"{x} {symbol} {y}"


def _float_cmp(code, ins, c, x, y):
    if c in ORDERED:
        return f"{x} {ORDERED[c]} {y}"
    unordered = {
        "ne": "({x} < {y}) | ({x} > {y})",
        "neu": "{x} != {y}",
        "equ": "~(({x} < {y}) | ({x} > {y}))",
        "ltu": "~({x} >= {y})",
        "leu": "~({x} > {y})",
        "gtu": "~({x} <= {y})",
        "geu": "~({x} < {y})",
        "num": "({x} == {x}) & ({y} == {y})",
        "nan": "({x} != {x}) | ({y} != {y})",
    }
    return (unordered.get(c) or code.err(ins)).format(x=x, y=y)


@emits("set")
def emit_set(code, ins):
    dt, st = ins.parts[-2], ins.parts[-1]
    d, a, b = ins.ops
    if st in ("f16x2", "bf16x2"):  # each half: 1.0 or 0.0 (f16x2/bf16x2 result), or all ones (u32/s32 result)
        fn = "h2" if st == "f16x2" else "b2"
        xa, xb = code.emit(f"{fn}({code.bits(a, 4)})", 2), code.emit(f"{fn}({code.bits(b, 4)})", 2)
        one = {"f16x2": 0x3C00, "bf16x2": 0x3F80}.get(dt, 0xFFFF)
        k, c = code.gen.const(one, "U2"), ins.parts[1]
        h = [f"({_float_cmp(code, ins, c, x, y)}).astype(U2) * {k}" for x, y in zip(xa, xb, strict=True)]
        code.put(d, "u", f"pack2({h[0]}, {h[1]})", ins)
        return
    if st in ("f16", "bf16") or dt in ("f16", "bf16"):
        one = {"f16": 0x3C00, "bf16": 0x3F80}.get(dt)
        e = _compare(code, ins, ins.parts[1], st, a, b)
        if one is not None:
            code.put(d, "u", f"({e}).astype(U2) * {code.gen.const(one, 'U2')}", ins)
            return
    e = _compare(code, ins, ins.parts[1], st, a, b)
    if dt == "f32":
        code.put(d, "f", f"({e}).astype(F4)", ins)
    else:
        code.put(d, "u", f"np.where({e}, {code.gen.const(-1, 'U4')}, {code.gen.const(0, 'U4')})", ins)


@emits("testp")
def emit_testp(code, ins):
    d, a = ins.ops
    x = code.rd(a, ins.type)
    fn = {
        "infinite": "np.isinf({})",
        "finite": "np.isfinite({})",
        "notanumber": "np.isnan({})",
        "number": "~np.isnan({})",
    }.get(ins.parts[1])
    if fn is None:
        code.err(ins)
    code.put(d, "u", fn.format(x), ins)
