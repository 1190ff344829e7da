"""Frames: threads that execute together, and their special registers."""

import functools

import numpy as np

from ptxemu.errors import UnsupportedInstruction
from ptxemu.ops import U4, U8


class Frame:
    """``T`` threads (``tids``: ascending positions in the batch) at block ``pc``, with live registers ``R``.

    ``grp``: frames of different groups are not merged. Properties are arrays with one number per thread.
    """

    def __init__(self, X, pc, tids, R, grp=0):
        self.X, self.pc, self.tids, self.T, self.R, self.grp = X, pc, tids, tids.shape[0], R, grp
        self.bar = None  # the barrier that the frame waits at
        self.callparams = {}
        self._special = {}

    @functools.cached_property
    def slot(self):
        """CTA of each thread, as an index into the batch."""
        return self.tids // self.X.nthreads

    @functools.cached_property
    def thread(self):
        """Index of each thread in its CTA."""
        return self.tids % self.X.nthreads

    @functools.cached_property
    def sbase(self):
        """Byte offset of each thread's shared memory."""
        return self.slot * self.X.smem_stride

    @functools.cached_property
    def lbase(self):
        """Byte offset of each thread's local memory."""
        return self.tids * self.X.local_stride

    @functools.cached_property
    def cta_lin(self):
        """CTA of each thread, as an index into the grid."""
        return self.X.ctas[self.slot].astype(np.int32)

    @functools.cached_property
    def nwarps(self):
        """Number of warps with threads in the frame."""
        return int(np.unique(self.tids >> 5).shape[0]) if self.T != self.X.total else self.X.total // 32

    @functools.cached_property
    def whole(self):
        """Whether all warps are complete."""
        if self.T % 32:
            return False
        w = self.tids.reshape(-1, 32)
        return bool(((w[:, 0] & 31) == 0).all() and (w[:, 31] - w[:, 0] == 31).all())

    @functools.cached_property
    def W(self):
        """Number of warps. Raises UnsupportedInstruction if one is incomplete."""
        if not self.whole:
            raise UnsupportedInstruction("warp-collective instruction executed by a partial warp")
        return self.T // 32

    @functools.cached_property
    def lane(self):
        return self.tids & 31

    def sreg(self, name):
        """Value of a special register: one number per thread, or one for all threads."""
        c = self._special
        if name in c:
            return c[name]
        X = self.X
        if name == "%tid.x":
            v = self.thread.astype(U4)
        elif name in ("%tid.y", "%tid.z"):
            v = np.zeros(1, U4)
        elif name == "%ntid.x":
            v = np.array([X.nthreads], U4)
        elif name in ("%ntid.y", "%ntid.z"):
            v = np.ones(1, U4)
        elif name.startswith("%nctaid."):
            v = np.array([X.grid["xyz".index(name[-1])]], U4)
        elif name.startswith("%ctaid."):
            gx, gy, _ = X.grid
            lin = X.ctas[self.slot]
            v = {"x": lin % gx, "y": lin // gx % gy, "z": lin // (gx * gy)}[name[-1]]
            if (v == v[0]).all():
                v = v[:1]
            v = v.astype(U4)
        elif name == "%laneid":
            v = self.lane.astype(U4)
        elif name == "%warpid":
            v = (self.thread >> 5).astype(U4)
        elif name == "%nwarpid":
            v = np.array([X.nthreads // 32], U4)
        elif name == "%smid":
            v = (X.ctas[self.slot] % 108).astype(U4)
        elif name == "%nsmid":
            v = np.array([108], U4)
        elif name.startswith("%lanemask_"):
            ln = self.lane.astype(U8)
            one = np.uint64(1)
            bit = one << ln
            v = {"eq": bit, "lt": bit - one, "le": (bit << one) - one, "ge": ~(bit - one), "gt": ~((bit << one) - one)}[
                name[10:]
            ].astype(U4)
        elif name in ("%clock", "%globaltimer_lo", "%clock_hi", "%globaltimer_hi"):
            X.clock += 1
            return np.array([X.clock & 0xFFFFFFFF if "hi" not in name else 0], U4)
        elif name in ("%clock64", "%globaltimer"):
            X.clock += 1
            return np.array([X.clock], U8)
        elif name == "%dynamic_smem_size" or name == "%total_smem_size":
            v = np.array([X.smem_size], U4)
        elif name == "%gridid":
            v = np.zeros(1, U8)
        else:
            raise UnsupportedInstruction(f"special register {name}")
        c[name] = v
        return v
