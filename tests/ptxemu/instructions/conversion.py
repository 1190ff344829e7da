"""Conversions between types."""

from ptxemu import ops
from ptxemu.instructions.registry import emits
from ptxemu.syntax import TYPE_BYTES


@emits("cvt")
def emit_cvt(code, ins):
    mods = [m for m in ins.parts[1:] if m not in TYPE_BYTES]
    types = [m for m in ins.parts[1:] if m in TYPE_BYTES]
    if len(types) != 2:
        code.err(ins)
    dt, st = types
    d, srcs = ins.ops[0], ins.ops[1:]
    fz, sat, rl = "ftz" in mods, "sat" in mods, "relu" in mods
    mode = next((m for m in mods if m in ("rn", "rz", "rm", "rp", "rna")), None)
    imode = next((m for m in mods if m in ("rni", "rzi", "rmi", "rpi")), None)

    def post(e):
        if rl:
            e = f"relu({e})"
        if sat:
            e = f"sat01({e})"
        return e

    if dt in ("f16x2", "bf16x2") and st == "f32":
        hi, lo = (post(code.rd(o, "f32")) for o in srcs)
        if dt == "f16x2":
            c = "f2h_rz({}).view(U2)" if mode == "rz" else "({}).astype(F2).view(U2)"
        else:
            c = f"f2bf({{}}, {mode!r})"
        code.put(d, "u", f"pack2({c.format(lo)}, {c.format(hi)})", ins)
        return
    src = srcs[0]
    if dt == "tf32":
        code.put(d, "u", f"f2tf32({code.rd(src, 'f32')}, {mode!r})", ins)
        return
    if st in ("e4m3x2", "e5m2x2") or dt in ("e4m3x2", "e5m2x2"):
        code.err(ins, "fp8 conversion")
    dw = d.width
    sint, dint = st[0] in "us", dt[0] in "us"
    if sint and dint:
        x = code.narrow_int(src, st)
        if sat:
            lo, hi = ops.INT_RANGE[dt]
            x = f"np.clip({x}.astype(I8), {max(lo, -(2**63))}, {min(hi, 2**63 - 1)})"
        tw = TYPE_BYTES[dt]
        x = f"{x}.astype({'I' if dt[0] == 's' else 'U'}{tw})"
        if tw != dw:
            x = f"{x}.astype({'I' if dt[0] == 's' else 'U'}{dw})"
        code.put(d, "i" if dt[0] == "s" else "u", x, ins)
        return
    if sint:  # to float
        x = code.narrow_int(src, st)
        if dt == "f64":
            code.put(d, "f", f"{x}.astype(F8)", ins)
        elif dt == "f32":
            if mode in ("rz", "rm", "rp"):
                code.put(d, "f", f"round_dir({x}.astype(F8), {mode!r})", ins)
            else:
                code.put(d, "f", f"{x}.astype(F4)", ins)
        elif dt == "f16":
            code.put(d, "f", f"{x}.astype(F8).astype(F2)", ins)
        else:
            code.put(d, "u", f"f2bf({x}.astype(F4))", ins)
        return
    # float source
    if st == "bf16":
        x, xt = f"bf2f({code.bits(src, 2)})", "f32"
    else:
        x, xt = code.rd(src, st), st
    if dint:
        if fz and st == "f32":
            x = f"ftz({x})"
        tw = TYPE_BYTES[dt]
        e = f"f2i({x}, {dt!r}, {imode!r})"
        if tw == 8:
            code.put(d, "i" if dt[0] == "s" else "u", e, ins)
        else:
            code.put(d, "u", f"{e}.astype({'I' if dt[0] == 's' else 'U'}{dw}).view(U{dw})", ins)
        return
    if fz and st == "f32":
        x = f"ftz({x})"
    if imode:
        x = {"rzi": "np.trunc({})", "rni": "np.rint({})", "rmi": "np.floor({})", "rpi": "np.ceil({})"}[imode].format(x)
    if dt == st or (dt == "f32" and st == "bf16"):
        e = x
        if dt == "bf16":
            code.put(d, "u", f"f2bf({post(x)})", ins)
            return
    elif dt == "bf16":
        x = x if xt == "f32" else f"{x}.astype(F4)"
        code.put(d, "u", f"f2bf({post(x)}, {mode!r})", ins)
        return
    elif dt == "f16":
        if mode == "rz":
            e = f"f2h_rz({x})"
        else:
            e = f"({x}).astype(F2)"
    elif dt == "f32":
        if st == "f64" and mode in ("rz", "rm", "rp"):
            e = f"round_dir({x}, {mode!r})"
        else:
            e = f"({x}).astype(F4)"
        if fz:
            e = f"ftz({e})"
    else:
        e = f"({x}).astype(F8)"
    code.put(d, "f", post(e), ins)
