"""``@triton.jit`` helpers shared by the kernels: the order of tiles, activations, their derivatives, the dropout mask.

Activations take and return float32 tiles of any shape.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
def sigmoid(x):
    # exp2 is one instruction; for x -> -inf it reaches inf and the quotient 0, as it should
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def tanh(x):
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def gelu(x, KIND: tl.constexpr):
    """Gaussian error linear unit (Hendrycks & Gimpel 2016, arXiv:1606.08415); ``KIND`` is the exact
    ("gelu"), the tanh ("gelu_tanh") or the sigmoid form of CLIP ("quick_gelu"); "none" is the identity."""
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == "quick_gelu":
        return x * sigmoid(1.702 * x)
    else:
        tl.static_assert(KIND == "none", "unknown activation")
        return x


@triton.jit
def gelu_grad(x, KIND: tl.constexpr):
    """Derivative of :func:`gelu` at ``x``."""
    if KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        pdf = 0.3989422804014327 * tl.exp2(x * x * (-0.5 * LOG2E))
        return cdf + x * pdf
    elif KIND == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner_grad = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner_grad
    elif KIND == "quick_gelu":
        s = sigmoid(1.702 * x)
        return s * (1.0 + 1.702 * x * (1.0 - s))
    else:
        tl.static_assert(KIND == "none", "unknown activation")
        return tl.full(x.shape, 1.0, tl.float32)


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
