"""Scheduler of the threads in a batch.

A frame is a set of threads with one program counter. It splits at a divergent branch and merges with frames at the same
block; the lowest block runs first, so that threads reconverge. If a frame spins on a value from another frame, the next
frame is chosen at random.
"""

import numpy as np

from ptxemu.errors import DeadlockError
from ptxemu.frame import Frame
from ptxemu.ops import I8, POISON, full

SPIN_LIMIT = 3000  # consecutive blocks after which a frame counts as spinning


class Scheduler:
    """Runs a batch to completion."""

    def __init__(self, batch):
        self.X, self.blocks = batch, batch.K.blocks
        self.alive = np.full(batch.n, batch.nthreads, I8)  # threads of each CTA that have not exited
        self.arrived = {}  # barrier -> waiting threads of each CTA
        self.runnable, self.waiting = self._first_frames(), []
        self.priority = batch.rng.permutation(len(self.runnable))  # by group: one group per warp if warps run alone
        self.steps = 0
        self.streak = 0  # consecutive blocks run while other frames were runnable

    def _first_frames(self):
        X = self.X
        registers = [None] * X.K.nregs
        for r, width in X.K.entry_undef:
            registers[r] = POISON[width]
        threads = np.arange(X.total, dtype=I8)
        if X.opt.schedule != "warps" or X.nthreads <= 32:
            return [Frame(X, 0, threads, registers)]
        warp = threads % X.nthreads // 32
        return [Frame(X, 0, threads[warp == w], list(registers), w) for w in range(X.nthreads // 32)]

    def run(self):
        while self.runnable:
            frame = self._advance(self._next())
            if frame is not None:
                self.runnable.append(frame)
            if not self.runnable and self.waiting and not self._release():
                raise DeadlockError(f"kernel {self.X.K.name}: bar.sync that not all threads of a CTA reach")

    def _parted(self, frame):
        """Whether the frame is at a warp-collective block and other threads of its warps may still arrive."""
        return self.blocks[frame.pc].collective and not frame.whole

    def _next(self):
        """Remove and return the next frame, merged with all frames at the same block."""
        runnable = self.runnable
        if len(runnable) == 1:
            return runnable.pop()
        if self.streak > SPIN_LIMIT:
            self.streak = 0
            whole = [i for i, f in enumerate(runnable) if f.whole] or range(len(runnable))
            return runnable.pop(whole[int(self.X.rng.integers(len(whole)))])
        first = min(runnable, key=lambda f: (self.priority[f.grp], self._parted(f), f.pc))
        together = [f for f in runnable if f.pc == first.pc and f.grp == first.grp]
        self.runnable = [f for f in runnable if f.pc != first.pc or f.grp != first.grp]
        return first if len(together) == 1 else self._merge(together)

    def _advance(self, f):
        """Run ``f`` until it passes another frame of its group, splits, waits or ends. Returns it if it is runnable."""
        X, blocks = self.X, self.blocks
        limit = min((g.pc for g in self.runnable if g.grp == f.grp), default=1 << 60)
        budget = 64 if self.streak == 0 and self.runnable else 1 << 60
        while True:
            b = blocks[f.pc]
            if b.collective and not f.whole and any(g.grp == f.grp and not self._parted(g) for g in self.runnable):
                return f
            self.steps += 1
            X.L.block_counts[f.pc] += f.nwarps
            taken = b.fn(X, f, f.R)
            if b.kind == "br":
                f.pc = b.target
            elif b.kind == "cbr":
                if taken.all() or not taken.any():
                    f.pc = b.target if taken[0] else b.next
                else:
                    self.runnable.append(self._take(f, np.flatnonzero(taken), b.target))
                    self.runnable.append(self._take(f, np.flatnonzero(~taken), b.next))
                    return None
            elif b.kind == "bar":
                f.pc = b.next
                if f.T != X.alive_total:
                    self._wait(f, b.bar)
                    return None
            else:
                self._exit(f)
                return None
            if f.pc >= limit:
                return f
            if self.runnable:
                self.streak += 1
                budget -= 1
                if self.streak > SPIN_LIMIT or budget <= 0:
                    return f
            if self.steps > X.opt.max_blocks:
                raise DeadlockError(
                    f"kernel {X.K.name}: more than {X.opt.max_blocks} basic blocks in one batch; "
                    "a spin loop that waits for a CTA of another batch?"
                )

    def _wait(self, f, barrier):
        f.bar = barrier
        self.waiting.append(f)
        np.add.at(self.arrived.setdefault(barrier[0], np.zeros(self.X.n, I8)), f.slot, 1)
        if self._release() and self.X.opt.schedule == "warps":
            self.priority = self.X.rng.permutation(len(self.priority))

    def _exit(self, f):
        self.streak = 0
        np.subtract.at(self.alive, f.slot, 1)
        self.X.alive_total -= f.T
        if self.waiting:
            self._release()

    def _take(self, F, idx, pc):
        """The threads of ``F`` at positions ``idx``, as a frame at block ``pc``."""
        X = self.X
        R = [None] * X.K.nregs
        for r in X.K.blocks[pc].live_in:
            x = F.R[r]
            R[r] = x if x.shape[0] == 1 else x[idx]
        return Frame(X, pc, F.tids[idx], R, F.grp)

    def _merge(self, fs):
        """Merge frames at the same block into one."""
        X = self.X
        pc = fs[0].pc
        tids = np.concatenate([f.tids for f in fs])
        order = np.argsort(tids, kind="stable")
        R = [None] * X.K.nregs
        for r in X.K.blocks[pc].live_in:
            xs = [f.R[r] for f in fs]
            if all(x.shape[0] == 1 for x in xs) and all(x[0] == xs[0][0] for x in xs):
                R[r] = xs[0]
            else:
                R[r] = np.concatenate([full(x, f.T) for x, f in zip(xs, fs, strict=True)])[order]
        return Frame(X, pc, tids[order], R, fs[0].grp)

    def _release(self):
        """Release the frames at complete barriers. Returns whether there are any."""
        out, keep, done = [], [], {}
        for bid, arr in self.arrived.items():
            cnt = next((f.bar[1] for f in self.waiting if f.bar[0] == bid), None)
            need = self.alive if cnt is None else np.minimum(self.alive, cnt)
            done[bid] = (arr >= need) & (arr > 0)
            arr[done[bid]] = 0
        for f in self.waiting:
            d = done[f.bar[0]][f.slot]
            if d.all():
                f.bar = None
                out.append(f)
            elif d.any():
                out.append(self._take(f, np.flatnonzero(d), f.pc))
                g = self._take(f, np.flatnonzero(~d), f.pc)
                g.bar = f.bar
                keep.append(g)
            else:
                keep.append(f)
        self.waiting = keep
        self.runnable += out
        return bool(out)
