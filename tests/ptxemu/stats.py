"""Statistics of a launch."""

from collections import Counter

import numpy as np


class LaunchStats:
    """Counters of a kernel launch.

    opcodes: executed warp instructions by opcode; warp_instructions: their sum.
    global_load_bytes, global_store_bytes, global_atomics, shared_load_bytes, shared_store_bytes: of active threads.
    races, n_races: descriptions of races, and number of bytes; n_same_value: bytes written by several CTAs with equal
        values.
    uninit_global, uninit_shared: reads of unwritten bytes.
    n_regs, n_spills: registers and bytes of local memory per thread of the compiled kernel.

    With ``Options.mem_stats``:
    distinct: (buffer, bytes, distinct bytes read, distinct bytes written) of each buffer.
    sectors_load, sectors_store: 32-byte sectors, summed over warp requests (requests_load, requests_store).
    shared_wavefronts, shared_ideal: wavefronts of shared memory accesses, with and without bank conflicts.
    conflicts: extra wavefronts by instruction.
    """

    def __init__(self, name, grid, threads):
        self.name, self.grid, self.threads = name, grid, threads
        self.opcodes = Counter()
        self.warp_instructions = 0
        self.global_load_bytes = self.global_store_bytes = self.global_atomics = 0
        self.shared_load_bytes = self.shared_store_bytes = 0
        self.sectors_load = self.sectors_store = 0
        self.requests_load = self.requests_store = 0
        self.shared_wavefronts = self.shared_ideal = 0
        self.conflicts = Counter()  # instruction text -> extra wavefronts
        self.distinct = []
        self.races, self.n_races, self.n_same_value = [], 0, 0
        self.uninit_global = self.uninit_shared = 0
        self.n_regs = self.n_spills = 0

    def note_sectors(self, F, a, nb, sel, kind):
        """a: byte addresses in global memory, of words of nb bytes that are read ("r") or written."""
        t = F.tids if sel is None else F.tids[sel]
        if t.shape[0] != a.shape[0]:
            t = t[:1]
        warp = t >> 5
        key = np.unique((warp.astype(np.int64) << 44) | (a >> 5))
        n = key.shape[0]
        req = np.unique(warp).shape[0]
        if kind == "r":
            self.sectors_load += n
            self.requests_load += req
        else:
            self.sectors_store += n
            self.requests_store += req

    def note_banks(self, F, a, nb, sel, text):
        """a: byte addresses inside one CTA's shared memory."""
        t = F.tids if sel is None else F.tids[sel]
        if a.shape[0] != t.shape[0]:
            a = np.broadcast_to(a[:1], t.shape)
        per = {16: 8, 8: 16}.get(nb, 32)  # lanes per phase
        phase = t // per
        words = max(nb // 4, 1)
        w = (a[:, None] >> 2) + np.arange(words)
        key = (phase.astype(np.int64)[:, None] << 32) | w
        key = np.unique(key)
        ph, bank = key >> 32, key & 31
        uph, inv = np.unique(ph, return_inverse=True)
        cnt = np.bincount(inv * 32 + bank, minlength=uph.shape[0] * 32).reshape(-1, 32).max(1)
        wf, ideal = int(cnt.sum()), uph.shape[0]
        self.shared_wavefronts += wf
        self.shared_ideal += ideal
        if wf > ideal:
            self.conflicts[text] += wf - ideal

    def note_ldmatrix(self, rows, n, text):
        """rows: byte addresses, (warps, n, 8)."""
        W = rows.shape[0]
        phase = np.arange(W * n).reshape(W, n, 1)
        w = (rows >> 2)[..., None] + np.arange(4)
        key = np.unique((phase[..., None].astype(np.int64) << 32) | w)
        ph, bank = key >> 32, key & 31
        cnt = np.bincount(ph * 32 + bank, minlength=W * n * 32).reshape(-1, 32).max(1)
        wf = int(cnt.sum())
        self.shared_wavefronts += wf
        self.shared_ideal += W * n
        if wf > W * n:
            self.conflicts[text] += wf - W * n

    @property
    def cost(self):
        """Count of instructions and bytes, used by the autotuner in place of a time."""
        mma = sum(v for k, v in self.opcodes.items() if k.startswith("mma"))
        return (self.warp_instructions + 15 * mma) * 1e-5 + (self.global_load_bytes + self.global_store_bytes) * 1e-8

    def __repr__(self, top=12):
        L = [
            f"{self.name} grid={self.grid} threads={self.threads}: {self.warp_instructions} warp instructions",
            f"  global: {self.global_load_bytes} B loaded, {self.global_store_bytes} B stored, "
            f"{self.global_atomics} atomics",
            f"  shared: {self.shared_load_bytes} B loaded, {self.shared_store_bytes} B stored",
        ]
        if self.requests_load or self.requests_store:
            L.append(
                f"  sectors: {self.sectors_load} over {self.requests_load} load requests, {self.sectors_store} over "
                f"{self.requests_store} store requests; shared wavefronts {self.shared_wavefronts} "
                f"(ideal {self.shared_ideal})"
            )
            for n, b, r, w in self.distinct:
                L.append(f"  {n}: {b} B, {r} distinct read, {w} distinct written")
        if self.n_races:
            L.append(f"  RACES: {self.n_races} bytes, first: {self.races[0]}")
        L += [f"    {v:10d} {k}" for k, v in self.opcodes.most_common(top)]
        return "\n".join(L)
