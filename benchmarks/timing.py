"""Timing methods: each takes {name: call} and a time budget, and returns {name: seconds per call in each round}.

Every method interleaves the calls, so that other load and clock changes affect all of them, and the times of a round
belong together.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vit_triton.tuning.measure import MIN_ROUNDS, Calls, Rounds, interleaved, on_gpu

SMALL = 1e-4  # seconds; shorter calls are bound by Python, which a CUDA graph replay avoids


@dataclass(frozen=True)
class Times:
    method: str
    rounds: Rounds


def cuda_events(calls: Calls, seconds: float) -> Rounds:
    """Median per call, with the L2 cache flushed before each call."""
    return _rounds(calls, lambda call: on_gpu(call, seconds / MIN_ROUNDS / len(calls)))


def cuda_graph(calls: Calls, seconds: float) -> Rounds:
    """Median of ``triton.testing.do_bench_cudagraph``: many calls in one graph, with a warm L2 cache."""
    from triton.testing import do_bench_cudagraph

    rep = 1e3 * seconds / MIN_ROUNDS / len(calls) / 10  # do_bench_cudagraph replays ten times
    return _rounds(calls, lambda call: do_bench_cudagraph(call, rep=rep, return_mode="median"))


def _rounds(calls: Calls, milliseconds: Callable[[Callable[[], Any]], float]) -> Rounds:
    import torch

    rounds: Rounds = {name: [] for name in calls}
    for _ in range(MIN_ROUNDS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            rounds[name].append(milliseconds(call) / 1e3)
    return rounds


def on_cpu(calls: Calls, seconds: float, replay: bool) -> Times:
    return Times("interleaved", interleaved(calls, seconds))


def on_cuda(calls: Calls, seconds: float, replay: bool) -> Times:
    """By CUDA graph if ``replay``, a call is short and every call can be captured; otherwise by events."""
    if replay:
        quick = cuda_events(calls, seconds / 10)
        if min(map(statistics.median, quick.values())) < SMALL:
            try:
                return Times("CUDA graph, L2 warm", cuda_graph(calls, seconds))
            except RuntimeError as error:
                print(f"CUDA graph capture failed, timed by events: {' '.join(str(error).split())[:200]}")
    return Times("do_bench, L2 flushed", cuda_events(calls, seconds))


METHODS = {"cpu": on_cpu, "cuda": on_cuda}
