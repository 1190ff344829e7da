"""Time of a call on a GPU, and errors of its results."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def on_gpu(run: Callable[[], Any], seconds: float) -> float:
    """Return the median milliseconds of a call, measured for about ``seconds``, with the L2 cache flushed each time."""
    from triton.testing import do_bench

    return do_bench(run, warmup=250 * seconds, rep=1000 * seconds, return_mode="median")


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results.detach()]
    return [tensor for result in results for tensor in flat(result)]


def errors(results: Any, exact: Any) -> list[float]:
    """Return the relative L2 error of every result."""
    pairs = zip(flat(results), flat(exact), strict=True)
    return [float((a.double() - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs]
