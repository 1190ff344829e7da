"""``@triton.jit`` helpers shared by the kernels: tile order, activations and their derivatives, dropout masks.

Activations take and return float32 tiles of any shape.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def grouped_tile(pid, num_rows, num_cols, GROUP: tl.constexpr):
    """(row, column) of the tile of program ``pid``: first down ``GROUP`` rows, then to the right, so that concurrent
    programs share operands in the L2 cache."""
    group = pid // (GROUP * num_cols)
    first = group * GROUP
    height = min(num_rows - first, GROUP)
    rest = pid - group * GROUP * num_cols
    return first + rest % height, rest // height


@triton.jit
def columns_of(x, SUBTILE: tl.constexpr, SUBTILES: tl.constexpr):
    """Subtile number SUBTILE of the SUBTILES equal column ranges of a tile; SUBTILES is a power of two."""
    if SUBTILES == 1:
        return x
    else:
        HALF: tl.constexpr = SUBTILES // 2
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
        return columns_of(left if SUBTILE < HALF else right, SUBTILE % HALF, HALF)


@triton.jit
def sigmoid(x, FACTOR: tl.constexpr = 1.0):
    """1 / (1 + exp(-FACTOR x))"""
    # exp2 is one instruction; for x -> -inf it is inf and the quotient 0
    return 1.0 / (1.0 + tl.exp2(x * (-LOG2E * FACTOR)))


@triton.jit
def normal_tail(x):
    """The upper tail probability of the standard normal distribution at ``x`` >= 0, accurate enough for 16-bit results.

    Its log2 is fitted by a decreasing polynomial of degree 5 with value -1 at 0.
    """
    log2_tail = -0.00026248980429954827 * x + 0.005242144223302603
    log2_tail = log2_tail * x - 0.046258751302957535
    log2_tail = log2_tail * x - 0.4666063189506531
    log2_tail = log2_tail * x - 1.1484092473983765
    return tl.exp2(log2_tail * x - 1.0)


@triton.jit
def gelu(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Gaussian error linear unit (Hendrycks & Gimpel 2016, arXiv:1606.08415). ``KIND``: "gelu" (normal distribution),
    "gelu_tanh" (tanh approximation), "quick_gelu" (sigmoid approximation of CLIP) or "none" (identity). Without
    ``EXACT``, "gelu" uses :func:`normal_tail`: 16-bit accuracy with fewer instructions."""
    if KIND == "gelu" and not EXACT:
        size = tl.minimum(tl.abs(x), 16.0)  # avoids inf * 0 = NaN
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
    """GELU derivative: derivative of :func:`gelu` at ``x``."""
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
        return tl.where(x < 0, 0.0, x)  # keeps NaN
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
def dropout_keep(seed, rows, cols, plane, p, TRANSPOSED: tl.constexpr = False, ALIGNED: tl.constexpr = True):
    """True if dropout with probability ``p`` keeps the elements (plane, rows x cols); with TRANSPOSED (cols x rows).

    Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") gives four words, for the elements
    (row, col), (row, col + 8), (row + 8, col) and (row + 8, col + 8). One thread holds them after a product of NVIDIA's
    matrix units, transposed or not. The counter is the first of them: the mask is independent of the tiles, so the
    backward kernels can recompute it. ALIGNED: rows and cols start at multiples of 16; else one thread may not hold
    all four, and each element calls Philox itself.
    """
    SHARED: tl.constexpr = ALIGNED and is_cuda() and rows.shape[0] % 16 == 0 and cols.shape[0] % 16 == 0
    row, col = rows, cols
    if SHARED:
        row, col = _first_eights(rows), _first_eights(cols)
    c1 = (row - row % 16 + row % 8).to(tl.uint32)[:, None] + tl.zeros([1, col.shape[0]], tl.uint32)
    c0 = (col - col % 16 + col % 8).to(tl.uint32)[None, :] + tl.zeros([row.shape[0], 1], tl.uint32)
    if TRANSPOSED:
        c0, c1 = c1, c0
    # 7 rounds are the minimum that passes BigCrush (same paper, table 2); Triton's default is 10
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, (plane + 0 * c0).to(tl.uint32), 0 * c0, 7)
    if TRANSPOSED:
        w1, w2 = w2, w1
    if SHARED:
        M: tl.constexpr = rows.shape[0]
        N: tl.constexpr = cols.shape[0]
        bits = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [M / 2, N / 2, 2 columns, 2 rows]
        bits = tl.permute(tl.reshape(bits, (M // 16, 8, N // 16, 8, 2, 2)), (0, 5, 1, 2, 4, 3))
        bits = tl.reshape(bits, (M, N))
    else:
        right = (cols % 16 >= 8)[None, :]
        bits = tl.where((rows % 16 >= 8)[:, None], tl.where(right, w3, w2), tl.where(right, w1, w0))
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 >= p  # 24 bits fill float32's significand


@triton.jit
def _first_eights(x):
    """The elements 0 to 7, 16 to 23, ... of a vector: [N] -> [N / 2]."""
    first, _ = tl.split(tl.permute(tl.reshape(x, (x.shape[0] // 16, 2, 8)), (0, 2, 1)))
    return tl.reshape(first, (x.shape[0] // 2,))
