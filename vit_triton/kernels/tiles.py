"""``@triton.jit`` helpers shared by the kernels: the order of tiles, activations, their derivatives, the dropout mask.

Activations take and return float32 tiles of any shape.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def grouped_tile(pid, num_rows, num_cols, GROUP: tl.constexpr):
    """(row, column) of the tile of program ``pid``: down ``GROUP`` rows, then right, so that the programs running
    together share operands in the L2 cache."""
    group = pid // (GROUP * num_cols)
    first = group * GROUP
    height = min(num_rows - first, GROUP)
    rest = pid - group * GROUP * num_cols
    return first + rest % height, rest // height


@triton.jit
def columns_of(x, SUBTILE: tl.constexpr, SUBTILES: tl.constexpr):
    """Columns ``SUBTILE / SUBTILES ... (SUBTILE + 1) / SUBTILES`` of a tile; SUBTILES is a power of two."""
    if SUBTILES == 1:
        return x
    else:
        HALF: tl.constexpr = SUBTILES // 2
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
        return columns_of(left if SUBTILE < HALF else right, SUBTILE % HALF, HALF)


@triton.jit
def sigmoid(x, FACTOR: tl.constexpr = 1.0):
    """1 / (1 + exp(-FACTOR x))"""
    # exp2 is one instruction; for x -> -inf it reaches inf and the quotient 0, as it should
    return 1.0 / (1.0 + tl.exp2(x * (-LOG2E * FACTOR)))


@triton.jit
def normal_tail(x):
    """The standard normal's probability beyond ``x`` >= 0, for 16-bit results: within 2.1e-4 of it for x < 4.

    Its log2 is fitted by a polynomial of degree 5, -1 at 0, that falls for ever.
    """
    log2_tail = -0.00026248980429954827 * x + 0.005242144223302603
    log2_tail = log2_tail * x - 0.046258751302957535
    log2_tail = log2_tail * x - 0.4666063189506531
    log2_tail = log2_tail * x - 1.1484092473983765
    return tl.exp2(log2_tail * x - 1.0)


@triton.jit
def gelu(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Gaussian error linear unit (Hendrycks & Gimpel 2016, arXiv:1606.08415); ``KIND`` is the one of the normal
    distribution ("gelu"), the tanh ("gelu_tanh") or the sigmoid form of CLIP ("quick_gelu"); "none" is the identity.
    Without ``EXACT`` the first is as exact as 16 bits can tell, in far fewer instructions."""
    if KIND == "gelu" and not EXACT:
        size = tl.minimum(tl.abs(x), 16.0)  # inf * 0 is no number
        return tl.where(x > 0, x, 0.0 * x) - size * normal_tail(size)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return x * sigmoid(x * (1.0 + 0.044715 * x * x), TWICE_SQRT_2_OVER_PI)  # (1 + tanh(u)) / 2 = sigmoid(2 u)
    elif KIND == "quick_gelu":
        return x * sigmoid(x, 1.702)
    else:
        tl.static_assert(KIND == "none", "unknown activation")
        return x


@triton.jit
def gelu_grad(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Derivative of :func:`gelu` at ``x``."""
    if KIND == "gelu":
        if EXACT:
            cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        else:
            tail = normal_tail(tl.minimum(tl.abs(x), 16.0))
            cdf = tl.where(x > 0, 1.0 - tail, tail)
        pdf = 0.3989422804014327 * tl.exp2(x * x * (-0.5 * LOG2E))
        return cdf + x * pdf
    elif KIND == "gelu_tanh":
        s = sigmoid(x * (1.0 + 0.044715 * x * x), TWICE_SQRT_2_OVER_PI)
        return s * (1.0 + (1.0 - s) * x * (1.0 + 0.134145 * x * x) * TWICE_SQRT_2_OVER_PI)
    elif KIND == "quick_gelu":
        s = sigmoid(x, 1.702)
        return s * (1.0 + 1.702 * x * (1.0 - s))
    else:
        tl.static_assert(KIND == "none", "unknown activation")
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def activate(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """SiLU (Elfwing et al. 2017, arXiv:1702.03118), "relu", or a ``KIND`` of :func:`gelu`."""
    if KIND == "silu":
        return x * sigmoid(x)
    elif KIND == "relu":
        return tl.where(x < 0, 0.0, x)  # NaN is not less
    else:
        return gelu(x, KIND, EXACT)


@triton.jit
def activate_grad(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Derivative of :func:`activate` at ``x``."""
    if KIND == "silu":
        s = sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif KIND == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    else:
        return gelu_grad(x, KIND, EXACT)


@triton.jit
def dropout_keep(seed, row, col, plane, p):
    """True where the element (plane, row, col) survives dropout with probability ``p`` of being zeroed.

    Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the element's
    coordinates as the counter: the mask does not depend on the tiling, so the backward kernels rebuild it.
    """
    c0 = (col + 0 * row).to(tl.uint32)
    c1 = (row + 0 * col).to(tl.uint32)
    c2 = (plane + 0 * c0).to(tl.uint32)
    # 7 rounds are the fewest that pass BigCrush (same paper, table 2); the default 10 cost half as much again
    bits, _, _, _ = tl.philox(seed, c0, c1, c2, 0 * c0, 7)
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 >= p  # 24 bits fill float32's significand
