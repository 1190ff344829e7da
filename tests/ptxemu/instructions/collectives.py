"""Data exchange within a warp, calls, and instructions without an effect on values."""

import re

from ptxemu import lanes
from ptxemu.instructions.registry import emits
from ptxemu.syntax import Imm, Pair


@emits("shfl")
def emit_shfl(code, ins):
    mode = ins.parts[2]
    d, a, b, c = ins.ops[:4]
    d1, d2 = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    x = code.bits(a, 4)
    if isinstance(b, Imm) and isinstance(c, Imm):
        src, ok = lanes.fixed_lanes(mode, b.bits, c.bits)
        e = f"shuffle_fixed(F, {x}, {code.gen.obj(src)})"
        code.put(d1, "u", e, ins)
        if d2 is not None:
            code.put(d2, "u", f"{code.gen.obj(ok)}[F.lane]", ins)
        return
    r, ok = code.emit(f"shuffle(F, {mode!r}, {x}, {code.bits(b, 4)}, {code.bits(c, 4)})", 2)
    code.put(d1, "u", r, ins)
    if d2 is not None:
        code.put(d2, "u", ok, ins)


@emits("vote")
def emit_vote(code, ins):
    mode = ins.parts[2] if ins.parts[1] == "sync" else ins.parts[1]
    code.put(ins.ops[0], "u", f"vote(F, {mode!r}, {code.rd(ins.ops[1], 'pred')})", ins)


@emits("activemask")
def emit_activemask(code, ins):
    code.put(ins.ops[0], "u", "activemask(F)", ins)


@emits("elect")
def emit_elect(code, ins):
    d = ins.ops[0]
    a, b = code.emit("elect(F)", 2)
    if d.first is not None:
        code.put(d.first, "u", a, ins)
    code.put(d.second, "u", b, ins)


@emits("redux")
def emit_redux(code, ins):
    code.put(ins.ops[0], "u", f"redux(F, {ins.parts[2]!r}, {ins.type!r}, {code.bits(ins.ops[1], 4)})", ins)


@emits(*"membar fence prefetch prefetchu discard applypriority griddepcontrol nanosleep bar barrier".split())
def emit_nothing(code, ins):
    """An instruction without an effect on values."""


@emits("trap", "brkpt")
def emit_trap(code, ins):
    code.do(f"X.trap(F, {ins.index})")


@emits("call")
def emit_call(code, ins):
    m = re.match(r"^(?:\(([^)]*)\)\s*,\s*)?([\w$]+)\s*(?:,\s*\(([^)]*)\))?", ins.ops[0])
    name = m.group(2)
    args = [s.strip() for s in (m.group(3) or "").split(",") if s.strip()]
    code.do(f"X.call(F, {name!r}, {args!r})")
