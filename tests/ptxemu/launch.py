"""One kernel launch."""

import numpy as np

from ptxemu.batch import Batch
from ptxemu.scheduler import Scheduler
from ptxemu.stats import LaunchStats


class Launch:
    """A compiled kernel, its grid, parameters and memory; ``run`` returns the ``LaunchStats``."""

    def __init__(self, kernel, grid, nthreads, params, smem_size, mem, opt, uninit=()):
        self.kernel, self.grid, self.nthreads = kernel, tuple(int(g) for g in grid), nthreads
        self.params, self.mem, self.opt = params, mem, opt
        self.smem_size = max(smem_size, kernel.static_smem)
        self.stats = LaunchStats(kernel.name, self.grid, nthreads)
        self.block_counts = [0] * len(kernel.blocks)
        self.uninit = list(uninit)
        self.printed = 0

    def cta_order(self, rng):
        n = self.grid[0] * self.grid[1] * self.grid[2]
        o = np.arange(n)
        if self.opt.order == "reverse":
            o = o[::-1]
        elif self.opt.order == "shuffle":
            o = rng.permutation(n)
        return o

    def run(self):
        opt, mem = self.opt, self.mem
        mem.track, mem.race = opt.mem_stats, opt.race
        mem.uninit_mode = opt.global_uninit
        for name, arr in self.kernel.symbol_data.items():
            mem.add(arr.ctypes.data, arr.nbytes, name, True, arr)
        mem.begin_launch(self.uninit if opt.global_uninit else [])
        rng = np.random.default_rng(opt.seed)
        order = self.cta_order(rng)
        per = opt.batch_ctas or max(1, opt.batch_threads // self.nthreads)
        with np.errstate(all="ignore"):
            for i in range(0, len(order), per):
                Scheduler(Batch(self, order[i : i + per], rng)).run()
        st = self.stats
        for b, c in zip(self.kernel.blocks, self.block_counts, strict=True):
            if c:
                for op, k in b.opcount.items():
                    st.opcodes[op] += k * c
        st.warp_instructions = sum(st.opcodes.values())
        st.races, st.n_races, st.n_same_value, st.uninit_global = mem.races, mem.n_races, mem.n_same_value, mem.n_uninit
        if opt.mem_stats:
            st.distinct = mem.distinct()
        return st
