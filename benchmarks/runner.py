"""One runner for every benchmark: check the numbers, time the providers in turn, print ratios.

Providers of a case run interleaved, one call each per round, so that whatever else the machine does hits all of them;
a ratio is the median over rounds of (peer's time / ours). A provider whose result is wrong is not timed.
"""

import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OURS = "vit_triton"


@dataclass(frozen=True)
class Case:
    """``providers`` compute the same results, given to be compared with ``exact``, a float64 computation, but for those
    that are ``unchecked``.

    ``tolerance``: the largest relative L2 error of a result that counts as right, in eps of ``dtype``.
    """

    name: str
    dtype: torch.dtype
    providers: dict[str, Callable[[], Any]]
    exact: Callable[[], Any] | None
    tolerance: float = 16.0
    unchecked: tuple[str, ...] = ()


@dataclass
class Result:
    case: str
    dtype: str
    threads: int
    milliseconds: dict[str, float]
    ratio: dict[str, float]  # time of the peer / ours
    wrong: dict[str, str] = field(default_factory=dict)

    @property
    def against_the_fastest(self) -> float | None:
        return min(self.ratio.values(), default=None)


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results.detach()]
    return [tensor for result in results for tensor in flat(result)]


def errors(results: Any, exact: Any) -> list[float]:
    """Relative L2 error of every result."""
    pairs = zip(flat(results), flat(exact), strict=True)
    return [float((a.double() - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs]


def check(case: Case) -> dict[str, str]:
    """The providers whose numbers are wrong, and how."""
    if case.exact is None:
        return {}
    exact = case.exact()
    allowed = case.tolerance * torch.finfo(case.dtype).eps
    wrong = {}
    for name, run in case.providers.items():
        if name in case.unchecked:
            continue
        worst = max(errors(run(), exact))
        if not worst <= allowed:
            wrong[name] = f"error {worst:.1e}, allowed {allowed:.1e}"
    return wrong


def measure(case: Case, threads: int, seconds: float) -> Result:
    torch.set_num_threads(threads)
    wrong = check(case)
    running = {name: run for name, run in case.providers.items() if name not in wrong}
    repeats = {}
    for name, run in running.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, round(2e-3 / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in running}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, run in running.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name])
    ours = times.get(OURS, [])
    ratio = {
        name: statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
        for name, theirs in times.items()
        if name != OURS and ours
    }
    medians = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    return Result(case.name, str(case.dtype).removeprefix("torch."), threads, medians, ratio, wrong)


def keep_freed_memory() -> None:
    """Tell glibc not to give memory back to the system: else every call pays, or by chance does not, for the pages of
    its results being mapped and zeroed again, which takes longer than many of the ops that are timed here."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_threshold, 2**25)  # the largest there is


def run(cases: Iterable[Case], threads: Iterable[int], seconds: float) -> Iterator[Result]:
    for case in cases:
        for count in threads:
            yield measure(case, count, seconds)


def line(result: Result) -> str:
    times = "  ".join(f"{name} {ms:.3f}" for name, ms in result.milliseconds.items())
    fastest = result.against_the_fastest
    ratio = "-" if fastest is None else f"{fastest:.2f}"
    wrong = "".join(f"  WRONG {name}: {why}" for name, why in result.wrong.items())
    return f"{ratio:>6}  {result.case:<44} {result.dtype:<9} {result.threads} thr  ms: {times}{wrong}"


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    import triton

    names = [text.split(":")[1].strip() for text in _cpuinfo() if text.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": str(len(names) or ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write(path: str, results: list[Result]) -> None:
    Path(path).write_text(json.dumps({"machine": machine(), "results": [asdict(r) for r in results]}, indent=1))
