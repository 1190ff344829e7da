"""Generates numpy source for a PTX kernel: one function per basic block, over all threads of a batch of CTAs."""

import functools
import re
from collections import Counter

import numpy as np

from ptxemu import fragments, lanes, ops
from ptxemu.blocks import Block, KernelBlocks
from ptxemu.errors import UnsupportedInstruction
from ptxemu.instructions import EMITTERS
from ptxemu.parser import parse_ptx
from ptxemu.syntax import TYPE_BYTES, Imm, Reg, SReg, Sym

WIDTH_DT = {2: "U2", 4: "U4", 8: "U8"}
SIGNED_DT = {2: "I2", 4: "I4", 8: "I8"}
FLOAT_DT = {2: "F2", 4: "F4", 8: "F8"}
_VAR = re.compile(r"\bv(\d+)\b")


class KernelGenerator:
    """Generates the functions of a kernel's blocks, and holds their shared constants.

    ``poison``: a bool, or the positions of the masked loads without ``other`` (``ttir.loads_without_other``).
    """

    def __init__(self, kernel: KernelBlocks, poison):
        self.c, self.poison = kernel, poison
        self.env = {"np": np, **vars(ops), **vars(fragments), **vars(lanes)}
        self.consts = {}

    def compile(self):
        for b in self.c.blocks:
            b.collective = any(i.parts[0] in ("mma", "ldmatrix", "stmatrix") for i in b.instrs)
            b.opcount = Counter(i.op for i in b.instrs + ([b.term] if b.term is not None else []))
            source = BlockGenerator(self, b).generate()
            namespace = {}
            exec(compile(source, f"<ptxemu {self.c.name} block {b.index}>", "exec"), self.env, namespace)
            b.fn = namespace["block"]

    def poisoned(self, ins):
        """Whether this `mov %r, 0x0` stands for the undefined value of a masked-off load."""
        if isinstance(self.poison, bool):
            return self.poison
        return ins.poison == "atom" or self.no_other(ins)

    def no_other(self, ins):
        """Whether the instruction belongs to a masked tt.load without `other`."""
        if isinstance(self.poison, bool):
            return False
        f, line, col = ins.asm_loc
        return (self.c.files.get(f, "?").rsplit("/", 1)[-1], line, col) in self.poison

    def const(self, bits, dt):
        """Name of a one-element array of dtype ``dt`` (a name of ``ops``)."""
        key = (bits, dt)
        if key not in self.consts:
            name = f"K{len(self.consts)}"
            d = getattr(ops, dt)
            if d.kind == "f":
                arr = np.array([bits], d)
            else:
                w = d.itemsize
                arr = np.array([bits & ((1 << (8 * w)) - 1)], f"u{w}").view(d)
            self.consts[key] = name
            self.env[name] = arr
        return self.consts[key]

    def obj(self, value):
        """Name of any other value in the generated code."""
        name = f"K{len(self.consts)}"
        self.consts[("obj", name)] = name
        self.env[name] = value
        return name


class BlockGenerator:
    """Generates the function of one block. Each variable is assigned once; ``_slots`` reuses names afterwards.

    A register's value may exist in several views (unsigned, signed, float). The result of a matrix instruction stays
    one array until one of its registers is read separately.
    """

    def __init__(self, gen: KernelGenerator, block: Block):
        self.gen, self.b, self.c = gen, block, gen.c
        self.lines = []  # (defs, text)
        self.n = 0
        self.cur = {}  # register -> {view: variable}
        self.lazy = {}  # register -> (matrix id, position)
        self.mats = {}  # matrix id -> (variable, kind, regs)
        self.frag = {}  # (kind, regs vars) -> fragment variable
        self.defined = set()

    def err(self, ins, why=""):
        f = self.c.files.get(ins.loc[0], "?")
        raise UnsupportedInstruction(
            f"unsupported PTX instruction `{ins.text}`{' (' + why + ')' if why else ''} "
            f"in {self.c.name}, from {f}:{ins.loc[1]}"
        )

    def new(self):
        self.n += 1
        return f"v{self.n}"

    def emit(self, expr, n=1):
        """Assign expr to n fresh variables."""
        vs = [self.new() for _ in range(n)]
        self.lines.append((vs, ", ".join(vs) + " = " + expr))
        return vs[0] if n == 1 else vs

    def do(self, stmt):
        self.lines.append(([], stmt))

    def var(self, reg: Reg, view="u"):
        """Variable with the value of reg as unsigned ('u'), signed ('i') or float ('f')."""
        name, w = reg.name, reg.width
        if name in self.lazy:
            self.unlazy(name)
        d = self.cur.get(name)
        if d is None:
            v = self.new()
            self.lines.append(([v], f"{v} = R[{self.c.reg_index[name]}]"))
            d = self.cur[name] = {"u": v}
        if view not in d:
            src = d.get("u") or next(iter(d.values()))
            if view == "u":
                d["u"] = self.emit(f"{src}.view({WIDTH_DT[w]})")
            else:
                d[view] = self.emit(f"{src}.view({(SIGNED_DT if view == 'i' else FLOAT_DT)[w]})")
        return d[view]

    def unlazy(self, name):
        mid, _ = self.lazy[name]
        var, kind, regs = self.mats[mid]
        live = [r for r in regs if self.lazy.get(r, (None,))[0] == mid]
        if kind == "d32":
            vs = self.emit(f"mma_d32({var})", 4)
        else:
            vs = self.emit(f"mma_d16({var})", 2)
        for r, v in zip(regs, vs, strict=True):
            if r in live:
                del self.lazy[r]
                self.cur[r] = {"u": v}

    def put(self, reg, view, expr, ins):
        """reg := expr (an array of the given view), under the instruction's guard."""
        if reg is None:
            self.do(expr)
            return
        if ins is not None and ins.guard is not None:
            g = self.guard(ins)
            old = self.var(reg, view)
            v = self.emit(expr)
            v = self.emit(f"np.where({g}, {v}, {old})")
        else:
            v = self.emit(expr)
        self.lazy.pop(reg.name, None)
        self.cur[reg.name] = {view: v}
        self.defined.add(reg.name)

    def alias(self, reg, src_views):
        self.lazy.pop(reg.name, None)
        self.cur[reg.name] = dict(src_views)
        self.defined.add(reg.name)

    def guard(self, ins):
        if ins.guard is None:
            return "None"
        p = self.var(ins.guard)
        return self.emit(f"~{p}") if ins.guard_neg else p

    def rd(self, o, ty):
        """Expression for operand o as PTX type ty (u/s/b/f of 16, 32, 64 bits or pred)."""
        if ty == "pred":
            if isinstance(o, Imm):
                return self.gen.obj(np.array([bool(o.bits)]))
            v = self.var(o)
            return f"(~{v})" if o.neg else v
        kind = {"u": "u", "b": "u", "s": "i", "f": "f"}[ty[0]]
        w = TYPE_BYTES[ty]
        if isinstance(o, Imm):
            dt = {"u": WIDTH_DT, "i": SIGNED_DT, "f": FLOAT_DT}[kind][w]
            if kind == "f" and o.kind != "i":
                return self._fimm(o, w)
            if kind == "f":  # an integer literal as a float operand is a bit image
                return f"{self.gen.const(o.bits, WIDTH_DT[w])}.view({dt})"
            return self.gen.const(o.bits, dt)
        if isinstance(o, SReg):
            v = f"F.sreg({o.name!r})"
            return v if kind == "u" else f"{v}.view({SIGNED_DT[w]})"
        if isinstance(o, Sym):
            return f"X.sym({o.name!r})" + ("" if w == 8 else ".astype(U4)")
        if o.width == w:
            return self.var(o, kind)
        if o.width > w:  # low part of a wider register
            v = self.emit(f"{self.var(o)}.astype(U{w})")
            dt = {"u": f"U{w}", "i": f"I{w}", "f": f"F{w}"}[kind]
            return v if kind == "u" else f"{v}.view({dt})"
        raise UnsupportedInstruction(f"register {o.name} is narrower than .{ty}")

    def _fimm(self, o, w):
        key = ("fimm", o.bits, o.kind, w)
        if key not in self.gen.consts:
            self.gen.consts[key] = self.gen.obj(_float_of(o).astype(f"f{w}"))
        return self.gen.consts[key]

    def bits(self, o, w):
        """Raw w-byte unsigned image of an operand."""
        if not isinstance(o, Imm) or o.kind == "i":
            return self.rd(o, f"b{8 * w}")
        image = o.bits if (o.kind, w) in (("f", 4), ("d", 8)) else int(_float_of(o).astype(f"f{w}").view(f"u{w}")[0])
        return self.gen.const(image, WIDTH_DT[w])

    def mem(self, o):
        """(variable of the address, constant offset)."""
        if isinstance(o.base, Reg):
            return self.var(o.base), o.offset
        if isinstance(o.base, Sym):
            return f"X.sym({o.base.name!r})", o.offset
        if isinstance(o.base, Imm):
            return self.gen.const(o.base.bits, "U8"), o.offset
        raise UnsupportedInstruction(f"address {o}")

    def generate(self):
        for ins in self.b.instrs:
            if ins.parts[0] not in EMITTERS:
                self.err(ins)
            try:
                EMITTERS[ins.parts[0]](self, ins)
            except UnsupportedInstruction as e:
                if "unsupported PTX" in str(e):
                    raise
                self.err(ins, str(e))
        ret = "None"
        if self.b.kind == "cbr":
            t = self.b.term
            p = self.var(t.guard)
            ret = f"~{p}" if t.guard_neg else p
        tail = []
        for r in sorted(self.b.live_out):
            if r in self.defined:
                w = self.c.reg_width[r]
                tail.append((self.c.reg_index[r], self.var(Reg(r, w))))
        lines = list(self.lines)
        for i, v in tail:
            lines.append(([], f"R[{i}] = {v}"))
        live_out = {self.c.reg_index[r] for r in self.b.live_out}
        dead = [i for i in self.b.live_in if i not in live_out]
        if dead:
            lines.append(([], " = ".join(f"R[{i}]" for i in dead) + " = None"))
        lines.append(([], f"return {ret}"))
        return "def block(X, F, R):\n" + "\n".join("    " + s for s in self._slots(lines)) + "\n"

    @staticmethod
    def _slots(lines):
        """Rename variables to reused slots, so that dead arrays are freed early."""
        last = {}
        for i, (_, s) in enumerate(lines):
            for m in _VAR.finditer(s):
                last[m.group(0)] = i
        slot, free, nslot, out = {}, [], 0, []
        for i, (defs, s) in enumerate(lines):
            names = {m.group(0) for m in _VAR.finditer(s)}
            ending = [v for v in names if last[v] == i and v not in defs]
            for v in ending:
                free.append(slot[v])
            ren = {v: f"t{slot[v]}" for v in names if v not in defs}
            for v in defs:
                if free:
                    slot[v] = free.pop()
                else:
                    slot[v] = nslot
                    nslot += 1
                ren[v] = f"t{slot[v]}"
            for v in defs:
                if last[v] == i:
                    free.append(slot[v])
            out.append(_VAR.sub(lambda m, ren=ren: ren[m.group(0)], s))
        return out

    def narrow_int(self, o, ty):
        """Integer operand of a type that may be 8 bits wide."""
        w = TYPE_BYTES[ty]
        if w > 1:
            return self.rd(o, ty)
        if isinstance(o, Imm):
            return self.gen.const(o.bits, "I1" if ty[0] == "s" else "U1")
        return f"{self.var(o)}.astype({'I1' if ty[0] == 's' else 'U1'})"


def _float_of(o: Imm):
    """The value of a float literal, as a one-element array."""
    if o.kind == "f":
        return np.array([o.bits], np.uint32).view(np.float32)
    return np.array([o.bits], np.uint64).view(np.float64)


@functools.cache
def compile_kernel(ptx: str, poison_masked=True) -> KernelBlocks:
    """Compile the single entry of a PTX text.

    poison_masked: whether masked-off loads without ``other`` return NaN, or the positions of the loads that do
        (``ttir.loads_without_other``).
    """
    module = parse_ptx(ptx)
    kernel = KernelBlocks(module, next(iter(module.kernels.values())))
    KernelGenerator(kernel, poison_masked).compile()
    return kernel
