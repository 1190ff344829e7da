"""Bit operations: logic, shifts, permutations and counts."""

import functools

from ptxemu import ops
from ptxemu.instructions.registry import emits
from ptxemu.syntax import TYPE_BYTES, Imm


def _bitop(code, ins, fmt):
    ty = ins.type
    if ty == "pred":
        a = [code.rd(o, "pred") for o in ins.ops[1:]]
    else:
        a = [code.bits(o, TYPE_BYTES[ty]) for o in ins.ops[1:]]
    code.put(ins.ops[0], "u", fmt.format(*a), ins)


for opcode, template in {"and": "{} & {}", "or": "{} | {}", "xor": "{} ^ {}", "not": "~{}"}.items():
    emits(opcode)(functools.partial(_bitop, fmt=template))


@emits("cnot")
def emit_cnot(code, ins):
    _bitop(code, ins, f"({{}} == 0).astype(U{TYPE_BYTES[ins.type]})")


@emits("lop3")
def emit_lop3(code, ins):
    d, a, b, c, lut = ins.ops[:5]
    va, vb, vc = (code.emit(code.bits(x, 4)) for x in (a, b, c))
    code.put(d, "u", ops.lop3_expr(lut.bits & 255, va, vb, vc), ins)


def _shift_amount(code, o, w):
    if isinstance(o, Imm):
        return code.gen.const(min(o.bits & 0xFFFFFFFF, 8 * w), f"U{w}")
    v = code.bits(o, 4)
    if w == 4:
        return v
    if w == 2:
        return f"np.minimum({v}, {code.gen.const(16, 'U4')}).astype(U2)"
    return f"{v}.astype(U8)"


@emits("shl")
def emit_shl(code, ins):
    w = TYPE_BYTES[ins.type]
    d, a, b = ins.ops
    code.put(d, "u", f"{code.bits(a, w)} << {_shift_amount(code, b, w)}", ins)


@emits("shr")
def emit_shr(code, ins):
    w = TYPE_BYTES[ins.type]
    d, a, b = ins.ops
    if ins.type[0] == "s":
        n = _shift_amount(code, b, w)
        # clamp so that the amount stays positive as a signed number
        n = f"np.minimum({n}, {code.gen.const(8 * w - 1, f'U{w}')}).view(I{w})"
        code.put(d, "i", f"{code.rd(a, ins.type)} >> {n}", ins)
    else:
        code.put(d, "u", f"{code.bits(a, w)} >> {_shift_amount(code, b, w)}", ins)


@emits("shf")
def emit_shf(code, ins):
    d, a, b, c = ins.ops
    words = ", ".join(code.bits(o, 4) for o in (a, b, c))
    code.put(d, "u", f"shf({words}, {ins.parts[1] == 'l'}, {'clamp' in ins.parts})", ins)


@emits("prmt")
def emit_prmt(code, ins):
    if len(ins.parts) > 2:
        code.err(ins)
    d, a, b, c = ins.ops
    sel = str(c.bits & 0xFFFF) if isinstance(c, Imm) else code.bits(c, 4)
    code.put(d, "u", f"prmt({code.bits(a, 4)}, {code.bits(b, 4)}, {sel})", ins)


def _position(code, o):
    return str(o.bits) if isinstance(o, Imm) else code.bits(o, 4)


@emits("bfe")
def emit_bfe(code, ins):
    d, a, b, c = ins.ops
    w = TYPE_BYTES[ins.type]
    code.put(d, "u", f"bfe({code.bits(a, w)}, {_position(code, b)}, {_position(code, c)}, {ins.type[0] == 's'})", ins)


@emits("bfi")
def emit_bfi(code, ins):
    d, a, b, c, e = ins.ops
    w = TYPE_BYTES[ins.type]
    code.put(d, "u", f"bfi({code.bits(a, w)}, {code.bits(b, w)}, {code.bits(c, 4)}, {code.bits(e, 4)})", ins)


@emits("popc", "clz", "brev")
def emit_count(code, ins):
    code.put(ins.ops[0], "u", f"{ins.parts[0]}({code.bits(ins.ops[1], TYPE_BYTES[ins.type])})", ins)
