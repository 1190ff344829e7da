"""Data exchange between the lanes of a warp."""

import numpy as np

from ptxemu.ops import I4, I8, POISON, U4, U8, full


def shuffle_fixed(F, x, perm):
    """``x`` of lane ``perm[lane]``."""
    if x.shape[0] == 1:
        return x
    if F.whole:
        return x.reshape(-1, 32).take(perm, axis=1).reshape(-1)
    return _shuffle_partial(F, x, perm[F.lane])


def _shuffle_partial(F, x, src):
    big = np.full(F.X.total, POISON[x.dtype.itemsize][0], x.dtype)
    big[F.tids] = x
    return big[(F.tids & ~31) + src]


def shuffle(F, mode, x, b, c):
    """(shuffled x, whether the source lane is in range), with source lanes computed at run time."""
    src, ok = _lanes(mode, F.lane, b, c)
    x = full(x, F.T)
    if F.whole:
        r = x[(np.arange(F.T) & ~31) + src]
    else:
        r = _shuffle_partial(F, x, src)
    return r, ok


def vote(F, mode, p):
    p = full(p, F.T)
    if F.whole:
        w = p.reshape(-1, 32)
    else:  # inactive lanes do not take part
        fill = mode == "all"
        big = np.full(F.X.total, fill, bool)
        big[F.tids] = p
        w = big.reshape(-1, 32)[np.unique(F.tids >> 5)]
        inv = np.unique(F.tids >> 5, return_inverse=True)[1]
    if mode == "ballot":
        r = (w.astype(U4) << np.arange(32, dtype=U4)).sum(1, dtype=U8).astype(U4)
    elif mode == "all":
        r = w.all(1)
    elif mode == "any":
        r = w.any(1)
    else:
        r = w.all(1) | ~w.any(1)
    return np.repeat(r, 32) if F.whole else r[inv]


def activemask(F):
    return vote(F, "ballot", np.ones(1, bool))


def elect(F):
    if F.whole:
        return np.zeros(1, U4), F.lane == 0
    w, first, inv = np.unique(F.tids >> 5, return_index=True, return_inverse=True)
    lead = F.lane[first][inv]
    return lead.astype(U4), F.lane == lead


def redux(F, op, ty, x):
    w = full(x, F.T).reshape(F.W, 32)
    if ty[0] == "s":
        w = w.view(I4)
    if op == "add":
        r = w.sum(1, dtype=w.dtype)
    else:
        r = {
            "min": np.min,
            "max": np.max,
            "and": np.bitwise_and.reduce,
            "or": np.bitwise_or.reduce,
            "xor": np.bitwise_xor.reduce,
        }[op](w, axis=1)
    return np.repeat(r.view(U4), 32)


def _lanes(mode, lane, b, c):
    """Source lane and in-range flag of every lane."""
    b = b.astype(I8) & 31
    c = c.astype(I8)
    clamp, seg = c & 31, (c >> 8) & 31
    mn = lane & seg
    mx = mn | (clamp & ~seg & 31)
    if mode == "up":
        j = lane - b
        p = j >= mx
    elif mode == "down":
        j = lane + b
        p = j <= mx
    elif mode == "bfly":
        j = lane ^ b
        p = j <= mx
    else:  # idx
        j = mn | (b & ~seg & 31)
        p = j <= mx
    return np.where(p, j, lane), p


def fixed_lanes(mode, b, c):
    """Source lanes and in-range flags of a warp, for immediate operands."""
    return _lanes(mode, np.arange(32), np.int64(b), np.int64(c))
