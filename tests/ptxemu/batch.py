"""Memory and warp operations of the CTAs that run together, called by generated code."""

import numpy as np

from ptxemu import calls
from ptxemu.atomics import atomic
from ptxemu.errors import DeviceAssert, Misaligned, OutOfBounds, UninitializedRead, UnsupportedInstruction
from ptxemu.ops import C16, I8, POISON, U1, U2, U4, U8, UW, full


class Batch:
    """CTAs that run together. Generated code calls its methods, as X."""

    def __init__(self, launch, ctas, rng):
        self.L, self.opt, self.mem, self.K, self.stats = launch, launch.opt, launch.mem, launch.kernel, launch.stats
        self.ctas = np.asarray(ctas, I8)
        self.nthreads, self.grid, self.params = launch.nthreads, launch.grid, launch.params
        self.n = len(ctas)
        self.total = self.n * self.nthreads
        self.rng = rng
        self.smem_size = launch.smem_size
        self.smem_stride = (launch.smem_size + 127) // 128 * 128
        raw = np.empty(self.n * self.smem_stride // 16 + 1, C16)  # 16-byte aligned
        if self.opt.shared_fill == "zero":
            raw.view(U2)[:] = 0
        else:
            raw.view(U2)[:] = 0x7FFF
        self.S = {1: raw.view(U1), 2: raw.view(U2), 4: raw.view(U4), 8: raw.view(U8), 16: raw}
        self.s_init = np.zeros(raw.shape[0] * 16, bool) if self.opt.shared_uninit else None
        self.local_stride = (self.K.local_size + 15) // 16 * 16
        if self.local_stride:
            lraw = np.empty(self.total * self.local_stride // 16 + 1, C16)
            lraw.view(U2)[:] = 0x7FFF
            self.Lm = {1: lraw.view(U1), 2: lraw.view(U2), 4: lraw.view(U4), 8: lraw.view(U8), 16: lraw}
        self.clock = 0
        self.alive_total = self.total  # threads that have not exited
        self.cp_pending = []
        self.cp_groups = np.zeros(self.total, np.int32)
        self.immediate = self.opt.async_copy == "immediate"

    def describe(self, insn):
        ins = self.K.instrs[insn]
        f = self.K.files.get(ins.loc[0], "?")
        return f"kernel {self.K.name}, {f}:{ins.loc[1]}:{ins.loc[2]}, `{ins.text}`"

    def fault(self, cls, F, insn, sel, el, addr, msg):
        t = F.tids if sel is None else F.tids[sel]
        tid = int(t[min(el, t.shape[0] - 1)])
        lin = int(self.ctas[tid // self.nthreads])
        gx, gy, _ = self.grid
        cta = (lin % gx, lin // gx % gy, lin // (gx * gy))
        raise cls(
            f"{msg}\n  at {self.describe(insn)}\n  CTA {cta}, thread {tid % self.nthreads}",
            cta,
            tid % self.nthreads,
            addr,
        )

    def prm(self, name, off, nb):
        raw = self.params[name]
        return np.frombuffer(raw[off : off + nb], UW[nb])

    def sym(self, name):
        return np.array([self.K.symbol_address(name)], U8)

    def _vec_out(self, w, esz, vec, T, sel, olds):
        """words -> tuple of element arrays; threads outside sel keep the old values"""
        if vec == 1:
            cols = (w,)
        else:
            cols = w.view(UW[esz]).reshape(-1, vec).T
            cols = tuple(np.ascontiguousarray(cols)) if w.shape[0] > 1 else tuple(c.copy() for c in cols)
        if sel is None:
            return cols
        out = []
        for c, o in zip(cols, olds, strict=True):
            r = np.empty(T, c.dtype)
            r[:] = o
            r[sel] = c
            out.append(r)
        return tuple(out)

    def _addr(self, a, off):
        if a.dtype == U4:
            a = a.astype(I8)
        else:
            a = a.view(I8)
        return a + off if off else a

    @staticmethod
    def _active(g):
        """guard -> 'all', None (no thread), or the active positions"""
        if g is None or g.all():
            return "all"
        sel = np.flatnonzero(g)
        return sel if sel.shape[0] else None

    def ld_g(self, F, a, off, esz, vec, g, olds, insn):
        sel = self._active(g)
        if sel is None:
            return olds
        a = self._addr(a, off)
        nb = esz * vec
        if isinstance(sel, str):
            self.stats.global_load_bytes += nb * F.T
            return self._vec_out(self.mem.load(self, F, a, nb, insn), esz, vec, F.T, None, None)
        if a.shape[0] != F.T:
            a = full(a, F.T)
        self.stats.global_load_bytes += nb * sel.shape[0]
        return self._vec_out(self.mem.load(self, F, a[sel], nb, insn, sel), esz, vec, F.T, sel, olds)

    def _pack(self, vals, esz, vec, T, sel):
        if vec == 1:
            v = vals[0]
            return v if sel is None or v.shape[0] == 1 else v[sel]
        n = T if sel is None else sel.shape[0]
        w = np.empty((n, vec), UW[esz])
        for i, v in enumerate(vals):
            w[:, i] = v if sel is None or v.shape[0] == 1 else v[sel]
        return w.view(UW[esz * vec]).reshape(n)

    def st_g(self, F, a, off, esz, vec, vals, g, insn):
        sel = self._active(g)
        if sel is None:
            return
        a = self._addr(a, off)
        if a.shape[0] != F.T:
            a = full(a, F.T)
        if isinstance(sel, str):
            sel = None
        else:
            a = a[sel]
        self.stats.global_store_bytes += esz * vec * a.shape[0]
        self.mem.store(self, F, a, esz * vec, self._pack(vals, esz, vec, F.T, sel), insn, sel)

    def _s_index(self, F, a, off, nb, sel, insn, write):
        a = self._addr(a, off)
        base = F.sbase
        if sel is not None:
            base = base[sel]
            if a.shape[0] == F.T:
                a = a[sel]
        lo, hi = int(a.min()), int(a.max())
        if lo < 0 or hi + nb > self.smem_size:
            bad = int(np.flatnonzero((a < 0) | (a + nb > self.smem_size))[0])
            self.fault(
                OutOfBounds,
                F,
                insn,
                sel,
                bad,
                int(a[bad]),
                f"shared memory address {int(a[bad])} outside [0, {self.smem_size})",
            )
        if nb > 1 and int(np.bitwise_or.reduce(a)) & (nb - 1):
            bad = int(np.flatnonzero(a & (nb - 1))[0])
            self.fault(
                Misaligned, F, insn, sel, bad, int(a[bad]), f"shared address {int(a[bad])} not {nb}-byte aligned"
            )
        if self.opt.mem_stats:
            self.stats.note_banks(F, a, nb, sel, self.K.instrs[insn].text)
        idx = base + a
        if self.s_init is not None:
            by = idx[:, None] + np.arange(nb)
            if write:
                self.s_init[by.reshape(-1)] = True
            elif write is False:
                self._s_check(F, by, sel, insn)
        return idx >> {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}[nb]

    def _s_check(self, F, by, sel, insn):
        bad = ~self.s_init[by].all(1)
        if bad.any():
            self.stats.uninit_shared += int(bad.sum())
            if self.opt.shared_uninit == "error":
                k = int(np.flatnonzero(bad)[0])
                self.fault(UninitializedRead, F, insn, sel, k, 0, "read of never-written shared memory")

    def ld_s(self, F, a, off, esz, vec, g, olds, insn):
        sel = self._active(g)
        if sel is None:
            return olds
        sel = None if isinstance(sel, str) else sel
        nb = esz * vec
        i = self._s_index(F, a, off, nb, sel, insn, False)
        self.stats.shared_load_bytes += nb * i.shape[0]
        return self._vec_out(self.S[nb].take(i), esz, vec, F.T, sel, olds)

    def st_s(self, F, a, off, esz, vec, vals, g, insn):
        sel = self._active(g)
        if sel is None:
            return
        sel = None if isinstance(sel, str) else sel
        nb = esz * vec
        i = self._s_index(F, a, off, nb, sel, insn, True)
        self.stats.shared_store_bytes += nb * i.shape[0]
        self.S[nb][i] = self._pack(vals, esz, vec, F.T, sel)

    def ldmatrix(self, F, a, off, n, trans, insn):
        W = F.W
        a = self._addr(a, off)
        a = full(a, F.T).reshape(W, 32)[:, : 8 * n]
        lo, hi = int(a.min()), int(a.max())
        if lo < 0 or hi + 16 > self.smem_size:
            self.fault(OutOfBounds, F, insn, None, 0, hi, f"ldmatrix row address outside shared memory: [{lo}, {hi}]")
        if int(np.bitwise_or.reduce(a, axis=None)) & 15:
            self.fault(Misaligned, F, insn, None, 0, lo, "ldmatrix row address not 16-byte aligned")
        if self.opt.mem_stats:
            self.stats.note_ldmatrix(a.reshape(W, n, 8), n, self.K.instrs[insn].text)
        self.stats.shared_load_bytes += a.size * 16
        idx = F.sbase.reshape(W, 32)[:, :1] + a
        if self.s_init is not None:
            self._s_check(F, (idx.reshape(-1)[:, None] + np.arange(16)), None, insn)
        rows = self.S[16].take(idx >> 4)  # (W, 8n)
        if trans:
            m = rows.view(U2).reshape(W, n, 8, 8).transpose(1, 0, 3, 2)
            return tuple(np.ascontiguousarray(m).view(U4).reshape(n, W * 32))
        return tuple(np.ascontiguousarray(rows.view(U4).reshape(W, n, 32).transpose(1, 0, 2)).reshape(n, W * 32))

    def stmatrix(self, F, a, off, vals, trans, insn):
        W, n = F.W, len(vals)
        a = full(self._addr(a, off), F.T).reshape(W, 32)[:, : 8 * n]
        lo, hi = int(a.min()), int(a.max())
        if lo < 0 or hi + 16 > self.smem_size:
            self.fault(OutOfBounds, F, insn, None, 0, hi, f"stmatrix row address outside shared memory: [{lo}, {hi}]")
        if self.opt.mem_stats:
            self.stats.note_ldmatrix(a.reshape(W, n, 8), n, self.K.instrs[insn].text)
        self.stats.shared_store_bytes += a.size * 16
        idx = F.sbase.reshape(W, 32)[:, :1] + a
        if self.s_init is not None:
            self.s_init[(idx.reshape(-1)[:, None] + np.arange(16)).reshape(-1)] = True
        m = np.stack([full(v, F.T).reshape(W, 32) for v in vals], 1)  # (W, n, 32)
        if trans:
            m = np.ascontiguousarray(m.view(U2).reshape(W, n, 8, 8).transpose(0, 1, 3, 2)).view(U4)
        self.S[16][idx >> 4] = np.ascontiguousarray(m).reshape(W, 8 * n, 4).view(C16).reshape(W, 8 * n)

    def cp_async(self, F, sa, soff, ga, goff, size, src, g, insn, poison=False):
        sel = self._active(g)
        if sel is None:
            return
        T = F.T
        if isinstance(sel, str):
            sel = None
        si = self._s_index(F, sa, soff, size, sel, insn, self.immediate or None)
        ga = self._addr(ga, goff)
        if ga.shape[0] != T:
            ga = full(ga, T)
        if sel is not None:
            ga = ga[sel]
        n = si.shape[0]
        data = np.zeros(n, UW[size])
        if poison:  # src-size 0 means a masked-off element without `other`
            data.view(U2)[:] = POISON[2]
        if src is None:
            rd = None
        else:
            s = full(src, T) if sel is None else full(src, T)[sel]
            if (s > size).any():
                self.fault(OutOfBounds, F, insn, sel, int(np.argmax(s > size)), 0, "cp.async src-size above cp-size")
            part = (s != 0) & (s != size)
            if part.any():
                raise UnsupportedInstruction("cp.async with a partial src-size: " + self.describe(insn))
            rd = np.flatnonzero(s)
            if rd.shape[0] == n:
                rd = None
        pos = sel
        if rd is None:
            data = self.mem.load(self, F, ga, size, insn, sel)
            if data.shape[0] != n:
                data = np.broadcast_to(data, n)
            self.stats.global_load_bytes += size * n
        elif rd.shape[0]:
            pos = rd if sel is None else sel[rd]
            data[rd] = self.mem.load(self, F, ga[rd], size, insn, pos)
            self.stats.global_load_bytes += size * rd.shape[0]
        self.stats.shared_store_bytes += size * n
        if self.immediate:
            self.S[size][si] = data
            return
        t = F.tids if sel is None else F.tids[sel]
        self.cp_pending.append((t, self.cp_groups[t], si, data, size))

    def cp_commit(self, F, g=None):
        self.cp_groups[F.tids if g is None else F.tids[np.broadcast_to(g, F.T)]] += 1

    def cp_wait(self, F, n):
        """Complete all groups except the n latest (n < 0: all copies, including uncommitted ones)."""
        if not self.cp_pending:
            return
        everyone = F.T == self.alive_total and self.alive_total == self.total
        if not everyone:
            inside = np.zeros(self.total, bool)
            inside[F.tids] = True
        left = []
        for e in self.cp_pending:
            t, grp, si, data, size = e
            if n < 0:
                m = np.ones(t.shape[0], bool)
            else:
                m = grp < self.cp_groups[t] - n
            if not everyone:
                m &= inside[t]
            if m.all():
                self.S[size][si] = data
                self._cp_init(si, size)
            elif m.any():
                self.S[size][si[m]] = data[m]
                self._cp_init(si[m], size)
                k = ~m
                left.append((t[k], grp[k], si[k], data[k], size))
            else:
                left.append(e)
        self.cp_pending = left

    def _cp_init(self, si, size):
        if self.s_init is not None:
            self.s_init[(si[:, None] * size + np.arange(size)).reshape(-1)] = True

    def _l_index(self, F, a, off, nb, sel, insn):
        a = self._addr(a, off)
        base = F.lbase
        if sel is not None:
            base = base[sel]
            if a.shape[0] == F.T:
                a = a[sel]
        if int(a.min()) < 0 or int(a.max()) + nb > self.K.local_size:
            self.fault(OutOfBounds, F, insn, sel, 0, int(a.max()), f"local address outside [0, {self.K.local_size})")
        return (base + a) >> {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}[nb]

    def ld_l(self, F, a, off, esz, vec, g, olds, insn):
        sel = self._active(g)
        if sel is None:
            return olds
        sel = None if isinstance(sel, str) else sel
        i = self._l_index(F, a, off, esz * vec, sel, insn)
        return self._vec_out(self.Lm[esz * vec].take(i), esz, vec, F.T, sel, olds)

    def st_l(self, F, a, off, esz, vec, vals, g, insn):
        sel = self._active(g)
        if sel is None:
            return
        sel = None if isinstance(sel, str) else sel
        i = self._l_index(F, a, off, esz * vec, sel, insn)
        self.Lm[esz * vec][i] = self._pack(vals, esz, vec, F.T, sel)

    def _space(self, a, off):
        hi = (a.view(I8) + off) >> 56
        if (hi != hi[0]).any():
            raise UnsupportedInstruction("generic access that mixes address spaces in one instruction")
        return {0: "g", 1: "l", 2: "s"}[int(hi[0])], (a & np.uint64((1 << 56) - 1))

    def ld_x(self, F, a, off, esz, vec, g, olds, insn):
        if g is not None and not g.any():
            return olds
        sp, a = self._space(a, off)
        return getattr(self, "ld_" + sp)(F, a, off, esz, vec, g, olds, insn)

    def st_x(self, F, a, off, esz, vec, vals, g, insn):
        if g is not None and not g.any():
            return
        sp, a = self._space(a, off)
        getattr(self, "st_" + sp)(F, a, off, esz, vec, vals, g, insn)

    def atom(self, F, space, a, off, op, ty, vals, g, old, insn):
        """Returns the previous values (container words), merged with `old` for inactive threads."""
        T = F.T
        sel = self._active(g)
        if sel is None:
            return old
        sel = None if isinstance(sel, str) else sel
        nb = {"f16x2": 4, "bf16x2": 4}.get(ty) or int("".join(ch for ch in ty if ch.isdigit())) // 8
        if space == "s":
            i = self._s_index(F, a, off, nb, sel, insn, True)
            view = self.S[nb]
        else:
            if space == "x":
                sp, a = self._space(a, off)
                if sp != "g":
                    raise UnsupportedInstruction("generic atomic on " + sp)
            ad = self._addr(a, off)
            if ad.shape[0] != T:
                ad = full(ad, T)
            if sel is not None:
                ad = ad[sel]
            view, i = self.mem.atomic_begin(self, F, ad, nb, insn, sel)
            self.stats.global_atomics += i.shape[0]
        n = T if sel is None else sel.shape[0]
        if i.shape[0] != n:
            i = np.broadcast_to(i[:1], n)
        vs = [full(v, T) if sel is None else full(v, T)[sel] for v in vals]
        res = np.empty(n, UW[nb])
        order = np.arange(n)
        if self.opt.order == "shuffle":
            order = self.rng.permutation(n)
        # rank of each element among those with the same address; one vectorised round per rank
        srt = order[np.argsort(i[order], kind="stable")]
        si = i[srt]
        new = np.r_[True, si[1:] != si[:-1]]
        if new.all():
            rounds = [np.arange(n)]
        else:
            start = np.maximum.accumulate(np.where(new, np.arange(n), 0))
            rank = np.arange(n) - start
            by_rank = np.argsort(rank, kind="stable")
            rounds = [srt[p] for p in np.split(by_rank, np.flatnonzero(np.diff(rank[by_rank])) + 1)]
        for p in rounds:
            ip = i[p]
            cur = view[ip]
            res[p] = cur
            view[ip] = atomic(op, ty, cur, [v[p] for v in vs])
        if sel is None:
            return res
        out = np.empty(T, UW[nb])
        out[:] = old if old is not None else POISON[nb]
        out[sel] = res
        return out

    def call(self, F, name, args):
        calls.call(self, F, name, args)

    def trap(self, F, insn):
        raise DeviceAssert("trap executed: " + self.describe(insn))
