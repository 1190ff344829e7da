"""Device functions for norms over whole rows, in float32; the maths is in :mod:`.layer_norm`."""

import triton
import triton.language as tl


@triton.jit
def row_statistics(x, mask, width, eps, RMS: tl.constexpr = False):
    """(mean [M], x - mean [M, D], 1 / std [M]) of the rows of x [M, D]. x and x - mean are 0 outside ``mask``. RMS: the
    mean is not subtracted and is returned as 0."""
    if RMS:
        mean = tl.zeros([x.shape[0]], tl.float32)
        centred = x
    else:
        mean = tl.sum(x, axis=1) / width
        centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    return mean, centred, rstd


@triton.jit
def row_gradient(grad, xhat, rstd, width, RMS: tl.constexpr = False):
    """The gradient of x [M, D] from the gradient of xhat = (x - mean) * rstd; past ``width``, grad is 0 and xhat is
    finite."""
    along_ones = 0.0 if RMS else (tl.sum(grad, axis=1) / width)[:, None]
    along_xhat = (tl.sum(grad * xhat, axis=1) / width)[:, None]
    return (grad - along_ones - xhat * along_xhat) * rstd[:, None]
