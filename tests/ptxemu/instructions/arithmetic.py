"""Arithmetic on integers, floats and packed halves."""

import functools

from ptxemu.blocks import CC
from ptxemu.instructions.registry import emits
from ptxemu.syntax import TYPE_BYTES, Reg

ROUND = ("rz", "rm", "rp")


@emits("add", "addc", "sub", "subc")
def emit_sum(code, ins):
    _arith(code, ins, "+" if ins.parts[0].startswith("add") else "-")


def _arith(code, ins, sym):
    ty, d = ins.type, ins.ops[0]
    a, b = ins.ops[1], ins.ops[2]
    mode = next((p for p in ins.parts if p in ROUND), None)
    if ty in ("f16x2", "bf16x2"):
        _packed(code, ins, lambda x, y: f"{x} {sym} {y}", 2)
        return
    if ty == "bf16":
        code.put(d, "u", f"f2bf(bf2f({code.bits(a, 2)}) {sym} bf2f({code.bits(b, 2)}))", ins)
        return
    if ty[0] == "f":
        x, y = code.rd(a, ty), code.rd(b, ty)
        if "ftz" in ins.parts and ty == "f32":
            x, y = f"ftz({x})", f"ftz({y})"
        if mode and ty == "f32":
            e = f"round_dir({x}.astype(F8) {sym} {y}.astype(F8), {mode!r})"
        else:
            e = f"{x} {sym} {y}"
        if "ftz" in ins.parts and ty == "f32":
            e = f"ftz({e})"
        if "sat" in ins.parts:
            e = f"sat01({e})"
        code.put(d, "f", e, ins)
        return
    w = TYPE_BYTES[ty]
    if "cc" in ins.parts or ins.parts[0] in ("addc", "subc"):
        _carry(code, ins, sym)
        return
    if "sat" in ins.parts:
        x, y = code.rd(a, "s32"), code.rd(b, "s32")
        code.put(d, "i", f"np.clip({x}.astype(I8) {sym} {y}, -2**31, 2**31-1).astype(I4)", ins)
        return
    code.put(d, "u", f"{code.bits(a, w)} {sym} {code.bits(b, w)}", ins)


def _carry(code, ins, sym):
    d, a, b = ins.ops
    w = TYPE_BYTES[ins.type]
    if w != 4:
        code.err(ins)
    x, y = f"{code.bits(a, 4)}.astype(U8)", f"{code.bits(b, 4)}.astype(U8)"
    cin = f" {sym} {code.var(Reg(CC, 4))}" if ins.parts[0] in ("addc", "subc") else ""
    t = code.emit(f"{x} {sym} {y}{cin}")
    code.put(d, "u", f"{t}.astype(U4)", ins)
    if "cc" in ins.parts:
        code.put(Reg(CC, 4), "u", f"(({t} >> {code.gen.const(32, 'U8')}) & {code.gen.const(1, 'U8')}).astype(U4)", ins)


def _packed(code, ins, fn, n):
    """f16x2 / bf16x2 element-wise."""
    d = ins.ops[0]
    srcs = [code.bits(o, 4) for o in ins.ops[1 : 1 + n]]
    h = ins.type == "f16x2"
    pl = [code.emit(f"{'h2' if h else 'b2'}({s})", 2) for s in srcs]
    outs = []
    for k in range(2):
        e = fn(*[p[k] for p in pl])
        if "sat" in ins.parts:
            e = f"sat01({e})"
        if "relu" in ins.parts:
            e = f"relu({e})"
        outs.append(f"({e}).astype(F2).view(U2)" if h else f"f2bf(({e}).astype(F4))")
    code.put(d, "u", f"pack2({outs[0]}, {outs[1]})", ins)


@emits("mul")
def emit_mul(code, ins):
    ty, d, a, b = ins.type, *ins.ops[:3]
    if ty[0] in "fb" and ty not in ("b32", "b64", "b16"):
        _arith(code, ins, "*")
        return
    code.put(d, *_imul(code, ins, ty, a, b), ins)


def _imul(code, ins, ty, a, b):
    w = TYPE_BYTES[ty]
    if "wide" in ins.parts:
        big = f"{'I' if ty[0] == 's' else 'U'}{2 * w}"
        x, y = code.rd(a, ty), code.rd(b, ty)
        return ("i" if ty[0] == "s" else "u"), f"{x}.astype({big}) * {y}.astype({big})"
    if "hi" in ins.parts:
        x, y = code.rd(a, ty), code.rd(b, ty)
        if w == 8:
            return "u", (f"mulhi_s64({x}, {y})" if ty[0] == "s" else f"mulhi_u64({x}, {y})")
        big = f"{'I' if ty[0] == 's' else 'U'}{2 * w}"
        sh = code.gen.const(8 * w, big)
        return ("i" if ty[0] == "s" else "u"), (
            f"(({x}.astype({big}) * {y}.astype({big})) >> {sh}).astype({big[0]}{w})"
        )
    return "u", f"{code.bits(a, w)} * {code.bits(b, w)}"


@emits("mad", "madc")
def emit_mad(code, ins):
    ty = ins.type
    d, a, b, c = ins.ops
    if ty[0] == "f":
        emit_fma(code, ins)
        return
    w = TYPE_BYTES[ty]
    view, e = _imul(code, ins, ty, a, b)
    cw = 2 * w if "wide" in ins.parts else w
    prod = code.emit(e)
    if view == "i":
        prod = code.emit(f"{prod}.view(U{cw})")
    if "cc" in ins.parts or ins.parts[0] == "madc":
        if cw != 4:
            code.err(ins)
        cin = f" + {code.var(Reg(CC, 4))}" if ins.parts[0] == "madc" else ""
        t = code.emit(f"{prod}.astype(U8) + {code.bits(c, 4)}.astype(U8){cin}")
        code.put(d, "u", f"{t}.astype(U4)", ins)
        if "cc" in ins.parts:
            code.put(Reg(CC, 4), "u", f"({t} >> {code.gen.const(32, 'U8')}).astype(U4)", ins)
        return
    code.put(d, "u", f"{prod} + {code.bits(c, cw)}", ins)


@emits("fma")
def emit_fma(code, ins):
    ty = ins.type
    d, a, b, c = ins.ops
    if ty in ("f16x2", "bf16x2"):
        if ty == "f16x2":
            _packed(code, ins, lambda x, y, z: f"fma16({x}, {y}, {z})", 3)
        else:
            _packed(code, ins, lambda x, y, z: f"fma32({x}, {y}, {z})", 3)
        return
    if ty == "bf16":
        e = ", ".join(f"bf2f({code.bits(o, 2)})" for o in (a, b, c))
        e = f"fma32({e})"
        if "relu" in ins.parts:
            e = f"relu({e})"
        code.put(d, "u", f"f2bf({e})", ins)
        return
    x, y, z = (code.rd(o, ty) for o in (a, b, c))
    if ty == "f32":
        fz = "ftz" in ins.parts
        if fz:
            x, y, z = f"ftz({x})", f"ftz({y})", f"ftz({z})"
        mode = next((p for p in ins.parts if p in ROUND), None)
        e = f"round_dir({x}.astype(F8) * {y} + {z}, {mode!r})" if mode else f"fma32({x}, {y}, {z})"
        if fz:
            e = f"ftz({e})"
    elif ty == "f16":
        e = f"fma16({x}, {y}, {z})"
    else:
        e = f"{x} * {y} + {z}"
    if "sat" in ins.parts:
        e = f"sat01({e})"
    if "relu" in ins.parts:
        e = f"relu({e})"
    code.put(d, "f", e, ins)


@emits("div")
def emit_div(code, ins):
    ty = ins.type
    d, a, b = ins.ops
    if ty[0] == "f":
        x, y = code.rd(a, ty), code.rd(b, ty)
        if "ftz" in ins.parts:
            code.put(d, "f", f"ftz(ftz({x}) / ftz({y}))", ins)
        else:
            code.put(d, "f", f"{x} / {y}", ins)
        return
    x, y = code.rd(a, ty), code.rd(b, ty)
    code.put(d, "i" if ty[0] == "s" else "u", f"idiv({x}, {y})", ins)


@emits("rem")
def emit_rem(code, ins):
    ty = ins.type
    x, y = code.rd(ins.ops[1], ty), code.rd(ins.ops[2], ty)
    code.put(ins.ops[0], "i" if ty[0] == "s" else "u", f"irem({x}, {y})", ins)


@emits("min", "max")
def emit_minmax(code, ins):
    which, ty = ins.parts[0], ins.type
    d, a, b = ins.ops[:3]
    extra = ins.ops[3:]
    nan = "NaN" in ins.parts
    fn = f"np.{which}imum" if nan else f"np.f{which}"
    if "xorsign" in ins.parts:
        if ty != "f32" or "abs" not in ins.parts:
            code.err(ins)
        x, y = code.rd(a, ty), code.rd(b, ty)
        sign = f"((({code.bits(a, 4)}) ^ ({code.bits(b, 4)})) & SIGN32)"
        code.put(d, "u", f"{fn}(np.abs({x}), np.abs({y})).view(U4) | {sign}", ins)
        return
    if ty in ("f16x2", "bf16x2"):
        _packed(code, ins, lambda x, y: f"{fn}({x}, {y})", 2)
    elif ty == "bf16":
        code.put(d, "u", f"f2bf({fn}(bf2f({code.bits(a, 2)}), bf2f({code.bits(b, 2)})))", ins)
    elif ty[0] == "f":
        x, y = code.rd(a, ty), code.rd(b, ty)
        if "ftz" in ins.parts:
            x, y = f"ftz({x})", f"ftz({y})"
        e = f"{fn}({x}, {y})"
        for o in extra:
            e = f"{fn}({e}, {code.rd(o, ty)})"
        code.put(d, "f", e, ins)
    else:
        e = f"np.{which}imum({code.rd(a, ty)}, {code.rd(b, ty)})"
        code.put(d, "i" if ty[0] == "s" else "u", e, ins)


SIGN_BITS = {  # (bytes, mask)
    **{"f64": (8, 1 << 63), "f32": (4, 0x80000000)},
    **dict.fromkeys(("f16x2", "bf16x2"), (4, 0x80008000)),
    **dict.fromkeys(("f16", "bf16"), (2, 0x8000)),
}


def _sign_bits(code, ins, operator, inverted):
    """Combine a float with the mask of its sign bits; ``inverted``: with the mask of all other bits."""
    w, mask = SIGN_BITS[ins.type]
    d, a = ins.ops
    ftz = ins.type == "f32" and "ftz" in ins.parts
    x = f"ftz({code.rd(a, 'f32')}).view(U4)" if ftz else code.bits(a, w)
    mask ^= (1 << 8 * w) - 1 if inverted else 0
    code.put(d, "u", f"{x} {operator} {code.gen.const(mask, f'U{w}')}", ins)


@emits("neg")
def emit_neg(code, ins):
    ty, d, a = ins.type, *ins.ops
    if ty in SIGN_BITS:
        _sign_bits(code, ins, "^", False)
    else:
        w = TYPE_BYTES[ty]
        code.put(d, "u", f"{code.gen.const(0, f'U{w}')} - {code.bits(a, w)}", ins)


@emits("abs")
def emit_abs(code, ins):
    ty, d, a = ins.type, *ins.ops
    if ty in SIGN_BITS:
        _sign_bits(code, ins, "&", True)
    else:
        code.put(d, "i", f"np.abs({code.rd(a, ty)})", ins)


@emits("copysign")
def emit_copysign(code, ins):
    d, a, b = ins.ops
    if ins.type == "f32":
        code.put(d, "u", f"copysign_bits({code.bits(a, 4)}, {code.bits(b, 4)})", ins)
    else:
        code.put(d, "f", f"np.copysign({code.rd(b, 'f64')}, {code.rd(a, 'f64')})", ins)


def _unary(code, ins, fmt, wide=False):
    """Apply ``fmt`` to a float operand; ``wide``: compute in float64."""
    ty, d, a = ins.type, *ins.ops
    if ty in ("f16x2", "bf16x2"):
        _packed(code, ins, lambda x: fmt.format(f"{x}.astype(F4)"), 1)
        return
    if ty == "bf16":
        code.put(d, "u", f"f2bf({fmt.format('bf2f(' + code.bits(a, 2) + ')')})", ins)
        return
    if ty == "f16":
        code.put(d, "f", f"({fmt.format(code.rd(a, 'f16') + '.astype(F4)')}).astype(F2)", ins)
        return
    x = code.rd(a, ty)
    fz = "ftz" in ins.parts and ty == "f32"
    if fz:
        x = f"ftz({x})"
    if wide and ty == "f32":
        e = f"({fmt.format(x + '.astype(F8)')}).astype(F4)"
    else:
        e = fmt.format(x)
    if fz:
        e = f"ftz({e})"
    code.put(d, "f", e, ins)


UNARY = {
    "ex2": "np.exp2({})",
    "lg2": "np.log2({})",
    "rcp": "np.reciprocal({})",
    "sqrt": "np.sqrt({})",
    "tanh": "np.tanh({})",
}
UNARY_IN_FLOAT64 = {"rsqrt": "1.0 / np.sqrt({})", "sin": "np.sin({})", "cos": "np.cos({})"}
for opcode, template in UNARY.items():
    emits(opcode)(functools.partial(_unary, fmt=template))
for opcode, template in UNARY_IN_FLOAT64.items():
    emits(opcode)(functools.partial(_unary, fmt=template, wide=True))
