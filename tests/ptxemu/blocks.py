"""Control flow of a PTX kernel: basic blocks, live registers, and addresses of symbols."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ptxemu.errors import UnsupportedInstruction
from ptxemu.syntax import Imm, Instr, Kernel, Mem, Pair, PtxModule, Reg, Vec

# opcodes without a destination operand
NO_DST = set(
    "st stmatrix red bra bar barrier ret exit trap membar fence prefetch prefetchu call discard brkpt applypriority"
    " griddepcontrol nanosleep cp".split()
)
CC = "%CC"  # the carry flag, kept as a 32-bit register


def _regs(o, out):
    if isinstance(o, Reg):
        out.append(o)
    elif isinstance(o, Vec):
        for e in o.elems:
            _regs(e, out)
    elif isinstance(o, Mem):
        _regs(o.base, out)
    elif isinstance(o, Pair):
        _regs(o.first, out)
        _regs(o.second, out)


def uses_defs(ins):
    """(registers read, registers written) by an instruction."""
    uses, defs = [], []
    if ins.parts[0] == "call":
        return uses, defs
    ops = ins.ops
    if ins.parts[0] not in NO_DST and ops:
        _regs(ops[0], defs)
        ops = ops[1:]
    for o in ops:
        _regs(o, uses)
    if ins.guard is not None:
        uses.append(ins.guard)
        uses += defs  # a false guard keeps the old value
    if "cc" in ins.parts[1:]:
        defs.append(Reg(CC, 4))
    if ins.parts[0] in ("addc", "subc", "madc"):
        uses.append(Reg(CC, 4))
    return uses, defs


@dataclass
class Block:
    """A basic block. ``kind`` is its end: "br" (to ``target``), "cbr" (to ``target`` or ``next``), "bar" (a barrier:
    ``bar`` is its number and its thread count) or "exit".

    ``live_in`` and ``live_out``: live registers at the start and the end. ``fn``: generated function. ``collective``:
    whether it has an instruction that a whole warp executes together.
    """

    index: int
    instrs: list = field(default_factory=list)
    term: Instr | None = None
    kind: str = "br"
    target: int | None = None
    target_label: str | None = None
    next: int | None = None
    bar: tuple | None = None
    live_in: list = field(default_factory=list)
    live_out: set = field(default_factory=set)
    collective: bool = False
    opcount: Counter = field(default_factory=Counter)
    fn: Callable | None = None


class KernelBlocks:
    """Basic blocks and symbols of a kernel; ``codegen`` adds the functions of the blocks."""

    def __init__(self, module: PtxModule, kernel: Kernel):
        self.name, self.files = kernel.name, kernel.files
        self.params = kernel.params
        self.instrs = [i for i in kernel.body if isinstance(i, Instr)]
        for n, i in enumerate(self.instrs):
            i.index = n
        self._symbols(module, kernel)
        self._build_blocks(kernel)
        self._liveness()

    def _symbols(self, module, kernel):
        self.symbols = {**module.symbols, **kernel.symbols}
        self.symbol_data, self.symbol_off = {}, {}
        self.static_smem = self.local_size = 0
        for s in self.symbols.values():
            if s.space in ("global", "const"):
                a = np.zeros(s.size + 32, np.uint8)
                skip = -a.ctypes.data % 16
                a = a[skip : skip + s.size]
                a[:] = np.frombuffer(s.data, np.uint8)
                self.symbol_data[s.name] = a
            elif s.space == "shared" and not s.extern:
                self.static_smem = -(-self.static_smem // s.align) * s.align
                self.symbol_off[s.name] = self.static_smem
                self.static_smem += s.size
            elif s.space == "local":
                self.local_size = -(-self.local_size // s.align) * s.align
                self.symbol_off[s.name] = self.local_size
                self.local_size += s.size
        self.static_smem = -(-self.static_smem // 16) * 16
        for s in self.symbols.values():
            if s.space == "shared" and s.extern:
                self.symbol_off[s.name] = self.static_smem

    def symbol_address(self, name):
        if name in self.symbol_data:
            return self.symbol_data[name].ctypes.data
        if name in self.symbol_off:
            return self.symbol_off[name]
        raise UnsupportedInstruction(f"unknown symbol {name}")

    def _build_blocks(self, kernel):
        blocks, labels = [], {}

        def new():
            b = Block(len(blocks))
            blocks.append(b)
            return b

        cur = new()
        wanted = {i.ops[0].name for i in kernel.body if isinstance(i, Instr) and i.parts[0] == "bra"}
        for it in kernel.body:
            if not isinstance(it, Instr):
                if it[1] not in wanted:  # debug labels
                    continue
                if cur.instrs or cur.term is not None:
                    cur = new()
                labels[it[1]] = cur.index
                continue
            if cur.term is not None:
                cur = new()
            p = it.parts
            if p[0] == "bra":
                cur.term = it
                cur.kind = "br" if it.guard is None else "cbr"
                cur.target_label = it.ops[0].name
            elif p[0] in ("ret", "exit"):
                cur.term = it
                cur.kind = "exit" if it.guard is None else "cbr"
                cur.target_label = None
            elif (
                p[0] == "bar" and p[1] == "sync" or p[0] == "barrier" and "sync" in p or p[0] == "bar" and p[1] == "cta"
            ):
                if it.guard is not None:
                    raise UnsupportedInstruction("guarded barrier: " + it.text)
                if not all(isinstance(o, Imm) for o in it.ops):
                    raise UnsupportedInstruction("barrier with register operands: " + it.text)
                cur.term, cur.kind = it, "bar"
                cur.bar = (it.ops[0].bits, it.ops[1].bits if len(it.ops) > 1 else None)
            elif p[0] in ("bar", "barrier") and p[1] != "warp":
                raise UnsupportedInstruction(it.text)
            elif p[0] in ("brx",):
                raise UnsupportedInstruction(it.text)
            else:
                cur.instrs.append(it)
        end = new()  # virtual exit
        end.kind = "exit"
        for b in blocks[:-1]:
            b.next = b.index + 1
            if b.term is None:
                b.kind, b.target = "br", b.next
            elif b.term.parts[0] == "bra":
                if b.target_label not in labels:
                    raise UnsupportedInstruction(f"unknown label in {b.term.text}")
                b.target = labels[b.target_label]
            elif b.kind == "cbr":
                b.target = end.index
        self.blocks = blocks

    def _succ(self, b):
        return {"br": [b.target], "cbr": [b.target, b.next], "bar": [b.next], "exit": []}[b.kind]

    def _liveness(self):
        n = len(self.blocks)
        self.reg_width = {}
        use, dfn = [], []
        for b in self.blocks:
            u, d = set(), set()
            seq = list(b.instrs)
            if b.term is not None and b.term.guard is not None:
                seq.append(b.term)
            for ins in seq:
                us, ds = uses_defs(ins) if ins is not b.term else ([ins.guard], [])
                for r in us:
                    self.reg_width[r.name] = r.width
                    if r.name not in d:
                        u.add(r.name)
                for r in ds:
                    self.reg_width[r.name] = r.width
                    d.add(r.name)
            use.append(u)
            dfn.append(d)
        self.regs = sorted(self.reg_width)
        self.nregs = len(self.regs)
        self.reg_index = {r: i for i, r in enumerate(self.regs)}
        li = [set() for _ in range(n)]
        lo = [set() for _ in range(n)]
        changed = True
        while changed:
            changed = False
            for b in reversed(self.blocks):
                o = set().union(*(li[s] for s in self._succ(b))) if b.kind != "exit" else set()
                i = use[b.index] | (o - dfn[b.index])
                if o != lo[b.index] or i != li[b.index]:
                    lo[b.index], li[b.index] = o, i
                    changed = True
        for b in self.blocks:
            b.live_in = sorted(self.reg_index[r] for r in li[b.index])
            b.live_out = lo[b.index]
        self.entry_undef = [(r, self.reg_width[self.regs[r]]) for r in self.blocks[0].live_in]
