"""Matrix fragments in registers, and their products."""

import numpy as np

from ptxemu.ops import F2, F4, F8, I1, I4, I8, U1, U4, U8, full


def _r4(x, W):
    return x.reshape(W, 8, 4) if x.shape[0] != 1 else x


def _pair16(kind, x, W):
    """u4 regs -> (W, 8, 8) f32: [g, 2*tg + e]"""
    if x.shape[0] == 1:
        x = np.full(W * 32, x[0], U4)
    if kind == "f16":
        return x.view(F2).reshape(W, 8, 8)
    o = np.empty((W, 8, 4, 2), U4)
    x = x.reshape(W, 8, 4)
    np.left_shift(x, np.uint32(16), out=o[..., 0])
    np.bitwise_and(x, np.uint32(0xFFFF0000), out=o[..., 1])
    return o.view(F4).reshape(W, 8, 8)


def _tf32(x, W):
    if x.shape[0] == 1:
        x = np.full(W * 32, x[0], U4)
    return (x & np.uint32(0xFFFFE000)).view(F4).reshape(W, 8, 4)


def _bytes(x, W, signed):
    if x.shape[0] == 1:
        x = np.full(W * 32, x[0], U4)
    return x.view(I1 if signed else U1).reshape(W, 8, 16)


def _a(W, tiles):
    """A fragment of registers (W, 8, n) -> (W, 16, k) f32"""
    kk, n = len(tiles) // 2, tiles[0].shape[2]
    A = np.empty((W, 2, 8, kk, n), F4)
    for i, tile in enumerate(tiles):
        A[:, i & 1, :, i >> 1, :] = tile
    return A.reshape(W, 16, kk * n)


def _b(W, tiles):
    """B fragment of registers (W, 8, n) -> (W, k, 8) f32"""
    kk, n = len(tiles), tiles[0].shape[2]
    B = np.empty((W, kk, n, 8), F4)
    for i, tile in enumerate(tiles):
        B[:, i] = tile.transpose(0, 2, 1)
    return B.reshape(W, kk * n, 8)


def mma_a16(kind, W, *regs):
    """m16n8k{8,16} f16/bf16"""
    return _a(W, [_pair16(kind, r, W) for r in regs])


def mma_b16(kind, W, *regs):
    return _b(W, [_pair16(kind, r, W) for r in regs])


def mma_a32(W, *regs):
    """m16n8k{4,8} tf32"""
    return _a(W, [_tf32(r, W) for r in regs])


def mma_b32(W, *regs):
    return _b(W, [_tf32(r, W) for r in regs])


def mma_a8(signed, W, *regs):
    return _a(W, [_bytes(r, W, signed) for r in regs])


def mma_b8(signed, W, *regs):
    return _b(W, [_bytes(r, W, signed) for r in regs])


def mma_c32(dt, W, c0, c1, c2, c3):
    """C/D fragment, four 32-bit registers -> (W, 16, 8)"""
    C = np.empty((W, 2, 8, 4, 2), U4)
    C[:, 0, :, :, 0] = _r4(c0, W)
    C[:, 0, :, :, 1] = _r4(c1, W)
    C[:, 1, :, :, 0] = _r4(c2, W)
    C[:, 1, :, :, 1] = _r4(c3, W)
    return C.view(dt).reshape(W, 16, 8)


def mma_d32(D):
    """(W, 16, 8) -> four u4 registers"""
    W = D.shape[0]
    D = D.view(U4).reshape(W, 2, 8, 4, 2)
    return (
        D[:, 0, :, :, 0].reshape(-1),
        D[:, 0, :, :, 1].reshape(-1),
        D[:, 1, :, :, 0].reshape(-1),
        D[:, 1, :, :, 1].reshape(-1),
    )


def mma_c16(W, c0, c1):
    """C fragment in f16x2 registers -> (W, 16, 8) f32"""
    C = np.empty((W, 2, 8, 8), F4)
    C[:, 0] = _pair16("f16", c0, W)
    C[:, 1] = _pair16("f16", c1, W)
    return C.reshape(W, 16, 8)


def mma_d16(D):
    W = D.shape[0]
    h = D.astype(F2).reshape(W, 2, 32, 2)
    return (np.ascontiguousarray(h[:, 0]).view(U4).reshape(-1), np.ascontiguousarray(h[:, 1]).view(U4).reshape(-1))


def mma_fma(A, B, C):
    D = np.matmul(A, B)
    D += C
    return D


def mma_imma(A, B, C, satfinite):
    # |a*b| sums stay far below 2^24 for k = 32 bytes, so the f32 product is exact
    D = np.matmul(A, B).astype(I8) + C.view(I4)
    if satfinite:
        D = np.clip(D, -(2**31), 2**31 - 1)
    return D.astype(I4)


def mma_f64(W, a, b, c0, c1):
    """m8n8k4 f64"""
    A = full(a, W * 32).view(F8).reshape(W, 8, 4)
    B = full(b, W * 32).view(F8).reshape(W, 8, 4).transpose(0, 2, 1)
    C = np.empty((W, 8, 4, 2), F8)
    C[..., 0] = full(c0, W * 32).view(F8).reshape(W, 8, 4)
    C[..., 1] = full(c1, W * 32).view(F8).reshape(W, 8, 4)
    D = (A @ B + C.reshape(W, 8, 8)).reshape(W, 8, 4, 2)
    return D[..., 0].reshape(-1).view(U8), D[..., 1].reshape(-1).view(U8)
