"""Parser for the PTX subset that Triton emits."""

import re
import struct

from ptxemu.errors import PtxSyntaxError
from ptxemu.syntax import SPECIAL, TYPE_BYTES, Imm, Instr, Kernel, Mem, Pair, PtxModule, Reg, SReg, Sym, Symbol, Vec

_NUM = re.compile(r"^[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")


def parse_int(s: str) -> int:
    s = s.strip().rstrip("U")
    neg = s.startswith("-")
    t = s.lstrip("+-")
    if t[:2].lower() == "0x":
        v = int(t, 16)
    elif t[:2].lower() == "0b":
        v = int(t, 2)
    elif len(t) > 1 and t[0] == "0":
        v = int(t, 8)
    else:
        v = int(t)
    return -v if neg else v


def split_top(s: str) -> list:
    out, depth, cur = [], 0, []
    for ch in s:
        if ch in "{[(":
            depth += 1
        elif ch in "}])":
            depth -= 1
        if ch == "," and depth == 0:
            out.append("".join(cur).strip())
            cur = []
        else:
            cur.append(ch)
    tail = "".join(cur).strip()
    if tail:
        out.append(tail)
    return out


class _Scope:
    def __init__(self, parent=None, suffix=""):
        self.parent, self.suffix = parent, suffix
        self.names = {}  # exact name -> width
        self.prefix = {}  # prefix -> width

    def lookup(self, name):
        s = self
        while s is not None:
            if name in s.names:
                return name + s.suffix, s.names[name]
            m = re.match(r"^(.*?)(\d+)$", name)
            if m and m.group(1) in s.prefix:
                return name + s.suffix, s.prefix[m.group(1)]
            s = s.parent
        return None


def _reg_width(ty):
    if ty == "pred":
        return 0
    b = TYPE_BYTES.get(ty)
    if b is None:
        raise PtxSyntaxError(f"unknown register type .{ty}")
    return max(b, 2)


class _BodyParser:
    def __init__(self, kernel: Kernel, funcs=None):
        self.k = kernel
        self.funcs = funcs or {}  # name -> (return names, parameter names, body text)
        self.inst, self.ninst = 0, 0  # number of the inlined call being parsed; 0 is the kernel
        self.pmap = {}  # formal parameter or return value -> name in the caller
        self.inlined_returns = set()
        self.scope = _Scope()
        self.nscope = 0
        self.loc = (0, 0, 0)
        self.asm = 0
        self.nasm = 0

    def operand(self, s: str):
        s = s.strip()
        if s.startswith("{"):
            return Vec(tuple(self.operand(x) for x in split_top(s[1:-1])))
        if s.startswith("("):
            return Vec(tuple(self.operand(x) for x in split_top(s[1:-1])))
        if s.startswith("["):
            inner = s[1:-1].strip()
            m = re.match(r"^([%$\w.]+)\s*(?:([+-])\s*(-?\s*\w+))?$", inner)
            if not m:
                raise PtxSyntaxError(f"bad address {s!r}")
            off = 0
            if m.group(3) is not None:
                off = parse_int(m.group(3).replace(" ", ""))
                if m.group(2) == "-":
                    off = -off
            return Mem(self.operand(m.group(1)), off)
        if s == "_":
            return None
        if "|" in s:
            a, b = s.split("|")
            return Pair(self.operand(a), self.operand(b))
        if s.startswith("!"):
            r = self.operand(s[1:])
            return Reg(r.name, r.width, True)
        if _NUM.match(s):
            return Imm(parse_int(s), "i")
        m = re.match(r"^0[fF]([0-9a-fA-F]{8})$", s)
        if m:
            return Imm(int(m.group(1), 16), "f")
        m = re.match(r"^0[dD]([0-9a-fA-F]{16})$", s)
        if m:
            return Imm(int(m.group(1), 16), "d")
        if re.match(r"^[-+]?\d*\.\d+([eE][-+]?\d+)?$", s):
            return Imm(struct.unpack("<Q", struct.pack("<d", float(s)))[0], "d")
        if SPECIAL.match(s):
            return SReg(s)
        hit = self.scope.lookup(s)
        if hit:
            return Reg(*hit)
        if re.match(r"^[\w$.]+$", s):
            return Sym(s)
        raise PtxSyntaxError(f"cannot parse operand {s!r}")

    def directive(self, st: str):
        m = re.match(r"^\.reg\s+\.(\w+)\s+(.*)$", st, re.S)
        if m:
            w = _reg_width(m.group(1))
            for name in m.group(2).split(","):
                name = name.strip()
                mm = re.match(r"^(.*)<(\d+)>$", name)
                if mm:
                    self.scope.prefix[mm.group(1)] = w
                else:
                    self.scope.names[name] = w
            return
        if re.match(r"^\.(local|shared)\b", st):
            sym = parse_symbol(st)
            self.k.symbols[sym.name] = sym
            return
        if re.match(r"^\.(param|pragma|branchtargets|noreturn)\b", st):
            return
        raise PtxSyntaxError(f"unknown directive: {st}")

    def statement(self, st: str):
        if st.startswith("@@"):
            w = st[2:].split()
            if w[0] == "LOC":
                self.loc = (int(w[1]), int(w[2]), int(w[3]))
            elif w[0] == "ASM_BEGIN":
                self.nasm += 1
                self.asm = self.nasm
            else:
                self.asm = 0
            return
        if st.startswith("."):
            self.directive(st)
            return
        text = " ".join(st.split())
        guard, gneg = None, False
        m = re.match(r"^@(!?)([%\w]+)\s+(.*)$", text)
        if m:
            guard = self.operand(m.group(2))
            gneg = bool(m.group(1))
            body = m.group(3)
        else:
            body = text
        m = re.match(r"^([a-z][\w.:]*)\s*(.*)$", body)
        if not m:
            raise PtxSyntaxError(f"cannot parse statement {text!r}")
        op = m.group(1)
        parts = tuple(op.split("."))
        if parts[0] == "call":
            c = re.match(r"^(?:\(([^)]*)\)\s*,\s*)?([\w$]+)\s*(?:,\s*\(([^)]*)\))?", m.group(2))
            if c and c.group(2) in self.funcs:
                names = [[x.strip() for x in (c.group(i) or "").split(",") if x.strip()] for i in (1, 3)]
                self._inline(c.group(2), *names)
                return
            ops = [m.group(2)]
        else:
            ops = [self.operand(o) for o in split_top(m.group(2))]
        if self.inst:
            if parts[0] == "bra":
                ops = [Sym(f"{ops[0].name}~{self.inst}")]
            elif parts[0] in ("ret", "exit"):
                op, parts, ops = "bra", ("bra",), [Sym(f"$ret~{self.inst}")]
        if (
            len(parts) > 1
            and parts[1] == "param"
            and parts[0] in ("ld", "st")
            and self._param_access(parts, ops, guard, text)
        ):
            return
        self.k.body.append(Instr(op, parts, ops, guard, gneg, self.loc, self.asm, text))

    # ---------------------------------------------------------------- calls of .func bodies are inlined
    def _pseudo(self, name, off, nb):
        """Register for a call parameter or return value."""
        base = self.pmap.get(name) or f"%{name}~{self.inst}"
        return Reg(f"{base}+{off}", max(nb, 2))

    def _param_access(self, parts, ops, guard, text):
        """Convert st.param / ld.param of call arguments to moves. Returns True if the access is complete."""
        if not self.funcs:
            return False
        nb = TYPE_BYTES[parts[-1]]
        mem, val = (ops[0], ops[1]) if parts[0] == "st" else (ops[1], ops[0])
        name = mem.base.name if isinstance(mem.base, Sym) else None
        if name is None or any(p[0] == name for p in self.k.params):
            return False
        if parts[0] == "ld" and name not in self.pmap and (name, self.inst) not in self.inlined_returns:
            return False
        elems = val.elems if isinstance(val, Vec) else (val,)
        for i, e in enumerate(elems):
            r = self._pseudo(name, mem.offset + i * nb, nb)
            pair = [r, e] if parts[0] == "st" else [e, r]
            ty = f"b{8 * max(nb, 2)}"
            if isinstance(pair[0], Reg) and isinstance(pair[1], Reg) and pair[0].width != pair[1].width:
                ins = Instr("cvt", ("cvt", f"u{8 * pair[0].width}", f"u{8 * pair[1].width}"), pair)
            else:
                ins = Instr("mov." + ty, ("mov", ty), pair)
            ins.loc, ins.text = self.loc, text
            self.k.body.append(ins)
        return parts[0] == "ld" or self.inst > 0

    def _inline(self, name, rets, args):
        frets, fparams, body = self.funcs[name]
        self.ninst += 1
        if self.ninst > 500:
            raise PtxSyntaxError(f"recursive or too many calls of {name}")
        inst = self.ninst
        pm = {}
        for formal, actual in zip((*fparams, *frets), (*args, *rets), strict=True):
            pm[formal] = self.pmap.get(actual) or f"%{actual}~{self.inst}"
        for r in rets:
            self.inlined_returns.add((r, self.inst))
        saved = self.scope, self.inst, self.pmap
        self.scope, self.inst, self.pmap = _Scope(None, f"~{inst}"), inst, pm
        self._scan(body)
        self.k.body.append(("label", f"$ret~{inst}"))
        self.scope, self.inst, self.pmap = saved

    def run(self, text: str):
        self._scan(text)
        self._mark_poison()

    def _scan(self, text: str):
        pos, n = 0, len(text)
        label = re.compile(r"([$\w%]+)\s*:(?!:)")
        while True:
            while pos < n and text[pos].isspace():
                pos += 1
            if pos >= n:
                break
            ch = text[pos]
            if ch == "{":
                self.nscope += 1
                self.scope = _Scope(self.scope, f"@{self.nscope}")
                pos += 1
            elif ch == "}":
                self.scope = self.scope.parent
                pos += 1
            elif ch == ";":
                pos += 1
            else:
                m = label.match(text, pos)
                if m:
                    self.k.body.append(("label", m.group(1) + (f"~{self.inst}" if self.inst else "")))
                    pos = m.end()
                    continue
                end = text.find(";", pos)
                if end < 0:
                    raise PtxSyntaxError(f"missing ';' after {text[pos : pos + 60]!r}")
                self.statement(text[pos:end].strip())
                pos = end + 1

    def _mark_poison(self):
        """Triton lowers a masked load without `other` to `mov %r, 0x0; @p ld %r` in one asm block."""
        blocks = {}
        for ins in self.k.body:
            if isinstance(ins, Instr) and ins.asm:
                blocks.setdefault(ins.asm, []).append(ins)
        for seq in blocks.values():
            dst = {}
            for ins in seq:
                ins.asm_loc = seq[0].loc  # LLVM advances the line within a multi-line asm
                if ins.parts[0] in ("ld", "atom") and ins.guard is not None:
                    d = ins.ops[0]
                    for e in d.elems if isinstance(d, Vec) else (d,):
                        if isinstance(e, Reg):
                            dst[e.name] = ins.parts[0]
            for ins in seq:
                if (
                    ins.parts[0] == "mov"
                    and ins.guard is None
                    and isinstance(ins.ops[0], Reg)
                    and ins.ops[0].name in dst
                    and isinstance(ins.ops[1], Imm)
                    and ins.ops[1].bits == 0
                    and ins.text.endswith("0x0")
                ):
                    ins.poison = dst[ins.ops[0].name]


def parse_symbol(st: str) -> Symbol:
    space = re.search(r"\.(shared|local|global|const)\b", st).group(1)
    align = re.search(r"\.align\s+(\d+)", st)
    m = re.search(r"\.([bsuf]f?\d+)\s+([\w$.]+)\s*(?:\[(\d*)\])?\s*(?:=\s*(.*))?$", st, re.S)
    if not m:
        raise PtxSyntaxError(f"cannot parse symbol: {st[:100]}")
    esz = TYPE_BYTES[m.group(1)]
    count = m.group(3)
    size = esz * (int(count) if count else (0 if count == "" else 1))
    data = None
    if m.group(4):
        vals = m.group(4).strip().strip("{}")
        raw = bytearray()
        for v in split_top(vals):
            if re.match(r"^0[fFdD][0-9a-fA-F]+$", v):
                iv = int(v[2:], 16)
            else:
                iv = parse_int(v)
            raw += (iv & ((1 << (8 * esz)) - 1)).to_bytes(esz, "little")
        if size == 0:
            size = len(raw)
        data = bytes(raw[:size]).ljust(size, b"\0")
    elif space in ("global", "const"):
        data = bytes(size)
    return Symbol(m.group(2), space, int(align.group(1)) if align else esz, size, data, ".extern" in st)


def _strip(text: str):
    """Remove comments, line info and debug sections; asm markers and .loc become pseudo statements."""
    files, out, skip = {}, [], 0
    for line in text.split("\n"):
        s = line.strip()
        if skip:
            skip += s.count("{") - s.count("}")
            if skip == 1 and "}" in s:
                skip = 0
            continue
        if s.startswith("//"):
            if "begin inline asm" in s:
                out.append("@@ASM_BEGIN;")
            elif "end inline asm" in s:
                out.append("@@ASM_END;")
            continue
        c = line.find("//")
        if c >= 0:
            s = line[:c].strip()
        if not s:
            continue
        if re.match(r"\.loc\s", s):
            w = s.replace(",", " ").split()
            out.append(f"@@LOC {w[1]} {w[2]} {w[3]};")
            continue
        if s.startswith(".file"):
            m = re.match(r'\.file\s+(\d+)\s+"(.*?)"', s)
            if m:
                files[int(m.group(1))] = m.group(2)
            continue
        if s.startswith(".section"):
            # up to the matching brace
            skip = 1 + s.count("{") - s.count("}")
            if skip == 1 and "}" in s:
                skip = 0
            continue
        out.append(s)
    return "\n".join(out), files


def _match_brace(text, pos):
    depth = 0
    for i in range(pos, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return i
    raise PtxSyntaxError("unbalanced braces")


def parse_ptx(text: str) -> PtxModule:
    src, files = _strip(text)
    mod = PtxModule({}, {})
    src = re.sub(r"\.(version|target|address_size)\s+[^\n]*", "", src)
    pos, n = 0, len(src)
    entries, funcs = [], {}
    head = re.compile(r"(?:\.visible\s+|\.weak\s+|\.extern\s+)*\.(entry|func)\b")
    while True:
        while pos < n and (src[pos].isspace() or src[pos] == ";"):
            pos += 1
        if pos >= n:
            break
        if src.startswith("@@", pos):
            pos = src.index(";", pos) + 1
            continue
        m = head.match(src, pos)
        if m:
            semi, brace = src.find(";", m.end()), src.find("{", m.end())
            if m.group(1) == "func":
                if brace < 0 or (0 <= semi < brace):  # declaration only
                    pos = semi + 1
                else:
                    end = _match_brace(src, brace)
                    fm = re.match(r"\s*(?:\((.*?)\))?\s*([\w$]+)\s*\((.*?)\)", src[m.end() : brace], re.S)
                    names = [[p.split()[-1].split("[")[0] for p in split_top(fm.group(i) or "")] for i in (1, 3)]
                    funcs[fm.group(2)] = (*names, src[brace + 1 : end])
                    pos = end + 1
                continue
            end = _match_brace(src, brace)
            hdr, body = src[m.end() : brace], src[brace + 1 : end]
            name = re.match(r"\s*([\w$]+)", hdr).group(1)
            params = []
            pm = re.search(r"\((.*)\)", hdr, re.S)
            if pm:
                for p in split_top(pm.group(1)):
                    q = re.search(r"\.([bsuf]\d+)\b.*?([\w$]+)(?:\[(\d+)\])?$", p.strip(), re.S)
                    params.append((q.group(2), q.group(1), TYPE_BYTES[q.group(1)], int(q.group(3) or 1)))
            k = Kernel(name, params, [], {}, files)
            entries.append((k, body))
            mod.kernels[name] = k
            pos = end + 1
            continue
        semi = src.find(";", pos)
        if semi < 0:
            raise PtxSyntaxError(f"unparsed text: {src[pos : pos + 80]!r}")
        st = src[pos:semi].strip()
        if re.match(r"^(\.visible|\.extern|\.weak|\s)*\.(shared|global|const)\b", st):
            sym = parse_symbol(st)
            mod.symbols[sym.name] = sym
        else:
            raise PtxSyntaxError(f"unknown module-level directive: {st[:80]!r}")
        pos = semi + 1
    for k, body in entries:
        _BodyParser(k, funcs).run(body)
    return mod
