"""Global memory: the process's address space as numpy arrays; access is limited to registered buffers."""

import bisect
from dataclasses import dataclass

import numpy as np

from ptxemu.errors import Misaligned, OutOfBounds, RaceDetected, UninitializedRead
from ptxemu.ops import I8, UW

_BASE = 16  # the view starts at address 16, because numpy does not accept a null pointer


class _AddressSpace:
    __array_interface__ = {"shape": ((1 << 47) - _BASE,), "typestr": "|u1", "data": (_BASE, False), "version": 3}


_bytes = np.asarray(_AddressSpace())
#: element size -> array over the whole address space; index = (address - 16) / size
VIEW = {n: _bytes[: (_bytes.shape[0] // n) * n].view(UW[n]) for n in (1, 2, 4, 8, 16)}
_SHIFT = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}


@dataclass
class Buffer:
    start: int
    end: int
    name: str
    writable: bool = True
    keep: object = None  # keeps the owner alive

    @property
    def nbytes(self):
        return self.end - self.start


class GlobalMemory:
    """The buffers of a launch, and the last reader and writer of each byte."""

    def __init__(self):
        self.buffers: list[Buffer] = []
        self._starts: list[int] = []
        self.track = False  # distinct bytes / sectors
        self.race = None  # None | 'record' | 'error'
        self.uninit_mode = None  # None | 'record' | 'error'
        self.last = None  # buffer hit by the previous access

    def add(self, start, nbytes, name, writable=True, keep=None):
        """Register ``nbytes`` bytes from ``start``. Overlapping buffers (views of one storage) are merged."""
        if nbytes <= 0:
            return
        b = Buffer(int(start), int(start) + int(nbytes), name, writable, keep)
        i = bisect.bisect_left(self._starts, b.start)
        # merge overlapping registrations (several views of one storage)
        lo, hi = i, i
        while lo > 0 and self.buffers[lo - 1].end > b.start:
            lo -= 1
        while hi < len(self.buffers) and self.buffers[hi].start < b.end:
            hi += 1
        if lo != hi:
            olds = self.buffers[lo:hi]
            names = []
            for o in olds:
                for nm in o.name.split("+"):
                    if nm not in names:
                        names.append(nm)
            if name not in names:
                names.append(name)
            b = Buffer(
                min(b.start, olds[0].start),
                max(b.end, max(o.end for o in olds)),
                "+".join(names),
                writable and all(o.writable for o in olds),
                [keep] + [o.keep for o in olds],
            )
        self.buffers[lo:hi] = [b]
        self._starts[lo:hi] = [b.start]

    def begin_launch(self, uninit):
        """Allocate the shadow arrays required by the options of this launch."""
        self._S = np.array([b.start for b in self.buffers], I8)
        self._E = np.array([b.end for b in self.buffers], I8)
        self.last = None
        off, self._delta = 0, []
        for b in self.buffers:
            self._delta.append(b.start - off)
            off += b.nbytes
        self._D = np.array(self._delta, I8)
        self.sh_touch = np.zeros(off, np.uint8) if self.track else None
        if self.race:
            self.sh_writer = np.full(off, -1, np.int32)
            self.sh_reader = np.full(off, -1, np.int32)
        self.races = []
        self.n_races = 0
        self.n_same_value = 0
        self.n_uninit = 0
        self.uninit = uninit  # list of (start, end, bool array)

    def _name(self, addr):
        i = bisect.bisect_right(self._starts, addr) - 1
        best = None
        for j in (i, i + 1):
            if 0 <= j < len(self.buffers):
                b = self.buffers[j]
                d = 0 if b.start <= addr < b.end else (addr - b.end + 1 if addr >= b.end else addr - b.start)
                if best is None or abs(d) < abs(best[1]):
                    best = (b, d)
        if best is None:
            return "no buffer is registered"
        b, d = best
        where = f"{addr - b.start} of" if d == 0 else (f"{d} bytes past the end of" if d > 0 else f"{-d} bytes before")
        return f"{'byte ' if d == 0 else ''}{where} '{b.name}' ({b.nbytes} bytes at {b.start:#x})"

    def locate(self, X, F, a, nb, insn, write, sel):
        """Check the addresses (int64) and return their shadow delta: one int, or one per element."""
        lo, hi = int(a.min()), int(a.max())
        if nb > 1 and int(np.bitwise_or.reduce(a)) & (nb - 1):
            bad = int(np.flatnonzero(a & (nb - 1))[0])
            X.fault(Misaligned, F, insn, sel, bad, int(a[bad]), f"address {int(a[bad]):#x} is not {nb}-byte aligned")
        b = self.last
        if b is not None and b.start <= lo and hi + nb <= b.end:
            if write and not b.writable:
                X.fault(OutOfBounds, F, insn, sel, 0, lo, f"store to read-only buffer '{b.name}'")
            return self._last_delta
        i = bisect.bisect_right(self._starts, lo) - 1
        if i >= 0:
            b = self.buffers[i]
            if hi + nb <= b.end and lo >= b.start:
                self.last, self._last_delta = b, self._delta[i]
                if write and not b.writable:
                    X.fault(OutOfBounds, F, insn, sel, 0, lo, f"store to read-only buffer '{b.name}'")
                return self._last_delta
        if not self.buffers:
            X.fault(OutOfBounds, F, insn, sel, 0, lo, f"address {lo:#x}: no buffer is registered")
        k = np.searchsorted(self._S, a, "right") - 1
        ok = (k >= 0) & (a + nb <= self._E[np.maximum(k, 0)])
        if not ok.all():
            bad = int(np.flatnonzero(~ok)[0])
            ad = int(a[bad])
            X.fault(
                OutOfBounds,
                F,
                insn,
                sel,
                bad,
                ad,
                f"{nb}-byte {'store' if write else 'load'} at {ad:#x}: {self._name(ad)}; "
                f"{int((~ok).sum())} of {a.shape[0]} accesses are out of bounds",
            )
        return self._D[k]

    def after(self, X, F, a, nb, delta, insn, kind, sel, differs=None):
        """Shadow updates; kind: 'r', 'w' or 'a' (atomic). sel: frame positions of the elements or None."""
        idx = ((a - delta)[:, None] + np.arange(nb, dtype=I8)).reshape(-1)
        if self.track:
            self.sh_touch[idx] |= 1 if kind == "r" else (2 if kind == "w" else 3)
            X.stats.note_sectors(F, a, nb, sel, kind)
        if not self.race:
            return
        cta = F.cta_lin if sel is None else F.cta_lin[sel]
        if cta.shape[0] != a.shape[0]:
            cta = np.broadcast_to(cta[:1], a.shape)
        c = np.repeat(cta, nb)
        w = self.sh_writer[idx]
        if kind == "r":
            bad = (w != -1) & (w != c)
            r = self.sh_reader[idx]
            self.sh_reader[idx] = np.where((r == -1) | (r == c), c, -2)
            again = self.sh_reader[idx]
            self.sh_reader[idx[(again != c) & (again != -2)]] = -2
            if bad.any():
                self._race(X, F, insn, sel, bad, idx, nb, a, w, c, "read after write by another CTA")
            return
        r = self.sh_reader[idx]
        if kind == "a":
            bad = (w != -1) & (w != c) & (w != -3)
            self.sh_writer[idx] = -3
        else:
            bad = (w != -1) & (w != c)
            self.sh_writer[idx] = c
            same = self.sh_writer[idx] != c  # overwritten by another CTA in the same instruction
            bad |= same
            w = np.where(same, self.sh_writer[idx], w)
            if differs is not None:
                d = np.repeat(differs, nb)
                self.n_same_value += int((bad & ~d).sum())
                bad &= d
        war = (r != -1) & (r != c)
        if bad.any():
            self._race(
                X,
                F,
                insn,
                sel,
                bad,
                idx,
                nb,
                a,
                w,
                c,
                "write after write by another CTA" if kind == "w" else "atomic on bytes another CTA wrote plainly",
            )
        elif war.any():
            self._race(X, F, insn, sel, war, idx, nb, a, r, c, "write after read by another CTA")

    def _race(self, X, F, insn, sel, bad, idx, nb, a, other, mine, what):
        k = int(np.flatnonzero(bad)[0])
        el = k // nb
        ad = int(a[el])
        o = int(other[k])
        oth = {-2: "several CTAs", -3: "an atomic"}.get(o, f"CTA {o}")
        msg = f"{what}: address {ad:#x} ({self._name(ad)}), CTA {int(mine[k])} against {oth}; {int(bad.sum())} bytes"
        self.n_races += int(bad.sum())
        if len(self.races) < 100:
            self.races.append(f"{X.describe(insn)}: {msg}")
        if self.race == "error":
            X.fault(RaceDetected, F, insn, sel, el, ad, msg)

    def _check_uninit(self, X, F, a, nb, insn, sel):
        for s, e, sh in self.uninit:
            inb = (a >= s) & (a + nb <= e)
            if not inb.any():
                continue
            rel = a[inb] - s
            bad = sh[(rel[:, None] + np.arange(nb, dtype=I8))].any(1)
            if bad.any():
                self.n_uninit += int(bad.sum())
                if self.uninit_mode == "error":
                    el = int(np.flatnonzero(inb)[np.flatnonzero(bad)[0]])
                    X.fault(
                        UninitializedRead,
                        F,
                        insn,
                        sel,
                        el,
                        int(a[el]),
                        f"read of never-written bytes at {int(a[el]):#x} ({self._name(int(a[el]))})",
                    )

    def _mark_init(self, a, nb):
        for s, e, sh in self.uninit:
            inb = (a >= s) & (a + nb <= e)
            if inb.any():
                rel = a[inb] - s
                sh[(rel[:, None] + np.arange(nb, dtype=I8)).reshape(-1)] = False

    def load(self, X, F, a, nb, insn, sel=None):
        """a: int64 addresses of nb-byte words. Returns the words."""
        if self.race and a.shape[0] == 1 and sel is None:
            a = np.full(F.T, a[0])  # every CTA is a reader
        delta = self.locate(X, F, a, nb, insn, False, sel)
        if self.track or self.race:
            self.after(X, F, a, nb, delta, insn, "r", sel)
        if self.uninit:
            self._check_uninit(X, F, a, nb, insn, sel)
        return VIEW[nb].take((a - _BASE) >> _SHIFT[nb])

    def store(self, X, F, a, nb, v, insn, sel=None):
        delta = self.locate(X, F, a, nb, insn, True, sel)
        i = (a - _BASE) >> _SHIFT[nb]
        if self.race:
            w = v.view(np.uint64).reshape(-1, 2) if nb == 16 else v
            old = VIEW[nb].take(i)
            old = old.view(np.uint64).reshape(-1, 2) if nb == 16 else old
            d0 = old != w
            VIEW[nb][i] = v
            new = VIEW[nb].take(i)
            new = new.view(np.uint64).reshape(-1, 2) if nb == 16 else new
            d = d0 | (new != w)
            self.after(X, F, a, nb, delta, insn, "w", sel, d.any(1) if nb == 16 else d)
        else:
            VIEW[nb][i] = v
            if self.track:
                self.after(X, F, a, nb, delta, insn, "w", sel)
        if self.uninit:
            self._mark_init(a, nb)

    def atomic_begin(self, X, F, a, nb, insn, sel):
        delta = self.locate(X, F, a, nb, insn, True, sel)
        if self.track or self.race:
            self.after(X, F, a, nb, delta, insn, "a", sel)
        if self.uninit:
            self._check_uninit(X, F, a, nb, insn, sel)
            self._mark_init(a, nb)
        return VIEW[nb], (a - _BASE) >> _SHIFT[nb]

    def distinct(self):
        """(name, bytes, distinct bytes read, distinct bytes written) per buffer."""
        out, off = [], 0
        for b in self.buffers:
            t = self.sh_touch[off : off + b.nbytes]
            out.append((b.name, b.nbytes, int((t & 1).astype(bool).sum()), int((t & 2).astype(bool).sum())))
            off += b.nbytes
        return out
