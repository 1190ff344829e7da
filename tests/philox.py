"""Philox in NumPy (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""

import numpy as np


def philox(key: int, *counter: np.ndarray, rounds: int) -> list[np.ndarray]:
    """The four words of Philox4x32 for a key of 64 bits and a counter of four arrays, which broadcast."""
    c = [x.astype(np.uint64) for x in np.broadcast_arrays(*counter)]
    keys, low = [key & 0xFFFFFFFF, key >> 32], np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        shift = np.uint64(32)
        c = [b >> shift ^ c[1] ^ np.uint64(keys[0]), b & low, a >> shift ^ c[3] ^ np.uint64(keys[1]), a & low]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c
