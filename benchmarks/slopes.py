"""Growth of time with size: curves of the results of `growth`, and fitted slopes.

A slope is the exponent of a power law, time ~ size ** slope, fitted by least squares to the logarithms. The fit uses
the larger half of the sizes that every provider was timed at; at small sizes the constant cost of a call dominates.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.runner import Result

AXES = ("tokens", "batch", "depth")


@dataclass(frozen=True)
class Slope:
    case: str
    dtype: str
    threads: int
    axis: str
    provider: str
    slope: float
    sizes: tuple[int, ...]  # used in the fit


def curves(results: Sequence[Result]) -> dict[tuple[str, str, int, str], dict[str, list[tuple[int, float]]]]:
    """{(case, dtype, threads, axis): {provider: [(size, milliseconds), ...]}}, sizes ascending."""
    found: dict[tuple[str, str, int, str], dict[str, list[tuple[int, float]]]] = {}
    for r in sorted(results, key=lambda r: r.at["size"]):
        curve = found.setdefault((r.case, r.dtype, r.threads, r.at["axis"]), {})
        for provider, milliseconds in r.milliseconds.items():
            curve.setdefault(provider, []).append((r.at["size"], milliseconds))
    return found


def slopes(results: Sequence[Result]) -> list[Slope]:
    """Slopes of all providers of each curve; curves with fewer than two sizes to fit are skipped."""
    found = []
    for key, curve in curves(results).items():
        shared = sorted(set.intersection(*({size for size, _ in points} for points in curve.values())))
        upper = shared[len(shared) // 2 :]
        if len(upper) < 2:
            continue
        for provider, points in curve.items():
            x, y = zip(*((math.log(size), math.log(time)) for size, time in points if size in upper), strict=True)
            slope = statistics.linear_regression(x, y).slope
            found.append(Slope(*key, provider, slope, tuple(upper)))
    return found
