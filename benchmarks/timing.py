"""How calls are timed: a function per method, from {name: call} and seconds to spend to seconds of a call, by round.

Every method goes round the calls, so that whatever else the machine does, or its clock, hits all of them, and the times
of one round are of one moment.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vit_triton.tuning.measure import on_gpu

Calls = Mapping[str, Callable[[], Any]]
Rounds = dict[str, list[float]]

MIN_ROUNDS = 3
SMALL = 1e-4  # seconds; what is shorter waits for its launches, which a CUDA graph replays without Python


@dataclass(frozen=True)
class Times:
    method: str
    rounds: Rounds


def interleaved(calls: Calls, seconds: float) -> Rounds:
    """On a CPU: one call each per round, or as many as fill 2 ms."""
    repeats = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        if time.perf_counter() - start < 0.1:  # the first call after something else is slow
            start = time.perf_counter()
            call()
        repeats[name] = max(1, round(2e-3 / max(time.perf_counter() - start, 1e-6)))
    rounds: Rounds = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    count = 0
    while time.perf_counter() < end or count < MIN_ROUNDS:
        count += 1
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            rounds[name].append((time.perf_counter() - start) / repeats[name])
    return rounds


def cuda_events(calls: Calls, seconds: float) -> Rounds:
    """Medians of calls, with the L2 cache flushed before each."""
    return _rounds(calls, lambda call: on_gpu(call, seconds / MIN_ROUNDS / len(calls)))


def cuda_graph(calls: Calls, seconds: float) -> Rounds:
    """Medians of ``triton.testing.do_bench_cudagraph``: many calls in one graph, and nothing flushes the L2 cache."""
    from triton.testing import do_bench_cudagraph

    rep = 1e3 * seconds / MIN_ROUNDS / len(calls) / 10  # it replays ten times
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
    """By graph replay where calls may be captured, are small and let themselves be captured, all of them."""
    if replay:
        quick = cuda_events(calls, seconds / 10)
        if min(map(statistics.median, quick.values())) < SMALL:
            try:
                return Times("CUDA graph, L2 warm", cuda_graph(calls, seconds))
            except RuntimeError as error:
                print(f"not captured as a CUDA graph, timed by events: {' '.join(str(error).split())[:200]}")
    return Times("do_bench, L2 flushed", cuda_events(calls, seconds))


METHODS = {"cpu": on_cpu, "cuda": on_cuda}
