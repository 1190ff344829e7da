"""Times of calls on a GPU or a CPU, and errors of their results."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Calls = Mapping[str, Callable[[], Any]]
Rounds = dict[str, list[float]]

MIN_ROUNDS = 3
SETTLE = 0.01  # seconds; after a call, idle threads of OpenMP and TBB spin on their cores for some milliseconds


def on_gpu(run: Callable[[], Any], seconds: float) -> float:
    """Return the median milliseconds of a call, measured for about ``seconds``, with the L2 cache flushed each time."""
    from triton.testing import do_bench

    return do_bench(run, warmup=250 * seconds, rep=1000 * seconds, return_mode="median")


def interleaved(calls: Calls, seconds: float, min_rounds: int = MIN_ROUNDS) -> Rounds:
    """Return {name: seconds per call in each round} on a CPU, measured for about ``seconds``.

    Each round runs each call once, or often enough to fill 2 ms, so that other load and clock changes affect all of
    them. There are at least ``min_rounds`` rounds. A pause precedes calls that are longer than it, so that no idle
    thread of the previous call's library takes one of their cores.
    """
    repeats, pauses = {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        if time.perf_counter() - start < 0.1:  # the first call after another one is slow
            start = time.perf_counter()
            call()
        once = time.perf_counter() - start
        repeats[name], pauses[name] = max(1, round(2e-3 / max(once, 1e-6))), SETTLE if once > SETTLE else 0.0
    rounds: Rounds = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    count = 0
    while time.perf_counter() < end or count < min_rounds:
        count += 1
        for name, call in calls.items():
            time.sleep(pauses[name])
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            rounds[name].append((time.perf_counter() - start) / repeats[name])
    return rounds


def ratios(rounds: Rounds, ours: str) -> dict[str, float]:
    """Median over the rounds of the time of each other call / that of ``ours``; empty if ``ours`` was not timed."""
    return {
        name: statistics.median(a / b for a, b in zip(times, rounds[ours], strict=True))
        for name, times in rounds.items()
        if name != ours and rounds.get(ours)
    }


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results.detach()]
    return [tensor for result in results for tensor in flat(result)]


def errors(results: Any, exact: Any) -> list[float]:
    """Return the relative L2 error of every result."""
    pairs = zip(flat(results), flat(exact), strict=True)
    return [float((a.double() - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs]
