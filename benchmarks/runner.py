"""The runner of all benchmarks: check each provider's numbers, time the providers in interleaved rounds, report.

A provider that fails or gives wrong results is not timed. A ratio is the median over rounds of (peer's time / ours).

The file of ``--json`` holds one object: "machine" (hardware and versions), "command", "options" (given or default),
entries specific to the command, and the list "results".
"""

import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

import vit_triton
from benchmarks.cost import Cost
from benchmarks.peaks import Peak, peak
from benchmarks.timing import METHODS, Times
from vit_triton.kernels.device import target_of
from vit_triton.tuning.measure import errors, ratios
from vit_triton.tuning.progress import progress

OURS = "vit_triton"
PREPACKED = " prepacked"  # suffix of our variants whose weights are packed in advance
# other libraries' names on PyPI
PACKAGES = ("vit-pytorch", "timm", "torchvision", "transformers")
PACKAGES += ("onnxruntime", "openvino")
PACKAGES += ("flash-attn", "xformers", "liger-kernel", "flash-linear-attention")
# Groups of other libraries. Eager models pack no weights in advance.
EAGER, COMPILE, RUNTIME = "eager", "compile", "runtime"
SEED = 0  # for the inputs of every case: a check gives the same verdict in every run
TOLERANCE = 16.0  # allowed relative L2 error, in eps; twice the error of PyTorch's own operators is always allowed


@dataclass(frozen=True)
class Provider:
    """One implementation of a case.

    ``run`` is timed. Before that, the results of ``numbers`` (default: ``run``) are compared with those of ``exact``,
    the same computation in float64. ``plain`` returns the errors of PyTorch's own operators in the same dtype.
    ``group``: ratios are reported for each group of others.
    """

    run: Callable[[], Any]
    exact: Callable[[], Any]
    plain: Callable[[], list[float]]
    numbers: Callable[[], Any] | None = None
    group: str = ""


@dataclass(frozen=True)
class Case:
    """A computation to measure. ``prepare`` creates the providers; no memory is allocated before.

    ``replay``: whether the calls may be captured in a CUDA graph. ``at``: the case's position on the benchmark's axes.
    ``left_out``: the providers that cannot run here, with the reasons.
    """

    name: str
    shape: str
    dtype: torch.dtype
    device: str
    cost: Callable[[], Cost]
    prepare: Callable[[], dict[str, Provider]]
    replay: bool = True
    at: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}, {self.shape}, {_name(self.dtype)}"


@dataclass
class Result:
    """The measurement of a case; ``flops`` and ``bytes`` are computed."""

    case: str
    shape: str
    dtype: str
    device: str
    threads: int
    method: str
    milliseconds: dict[str, float]
    ratio: dict[str, float]  # time of the peer / ours
    wrong: dict[str, str]
    flops: int
    bytes: int
    at: dict[str, Any] = field(default_factory=dict)
    ratio_prepacked: dict[str, float] = field(default_factory=dict)  # time of the peer / ours prepacked
    groups: dict[str, str] = field(default_factory=dict)  # of the providers that are in a group
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def ratio_to_fastest(self) -> float | None:
        """Ratio to the fastest other library; our own variants (backend "torch") are excluded."""
        return min((ratio for name, ratio in self.ratio.items() if not name.startswith(OURS)), default=None)

    def against_groups(self) -> dict[str, dict[str, float]]:
        """{group: ratios of ours to its fastest provider}; "vit_triton prepacked" is not compared with eager models."""
        found: dict[str, dict[str, float]] = {group: {} for group in self.groups.values()}
        for base, ratio in ((OURS, self.ratio), (f"{OURS}{PREPACKED}", self.ratio_prepacked)):
            for name in ratio.keys() & self.groups.keys():
                best = found[self.groups[name]]
                best[base] = min(ratio[name], best.get(base, ratio[name]))
        found.get(EAGER, {}).pop(f"{OURS}{PREPACKED}", None)
        return found


def limits(plain: Iterable[float], dtype: torch.dtype) -> list[float]:
    """The largest errors that count as right: twice those of PyTorch's operators, but at least TOLERANCE."""
    least = TOLERANCE * torch.finfo(dtype).eps
    return [max(least, 2 * error) for error in plain]  # max ignores a NaN in second place


def insufficient_memory(case: Case) -> str:
    """The reason why a case does not fit into the free memory; "" if it fits."""
    need, free = case.cost().memory, free_memory(case.device)
    return f"needs {need / 2**30:.1f} GiB (computed), {free / 2**30:.1f} GiB are free" if need > free else ""


def check(providers: dict[str, Provider], dtype: torch.dtype) -> dict[str, str]:
    """{provider: reason} of the providers that fail or give wrong numbers."""
    allowed = TOLERANCE * torch.finfo(dtype).eps
    wrong = {}
    for name, provider in providers.items():
        try:
            found = errors((provider.numbers or provider.run)(), provider.exact())
            if all(error <= allowed for error in found):
                continue
            for error, limit in zip(found, limits(provider.plain(), dtype), strict=True):
                if not error <= limit:
                    wrong[name] = f"error {error:.1e}, allowed {limit:.1e}"
        except Exception as error:  # from any package; the other providers still run
            wrong[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return wrong


def measure(case: Case, threads: Sequence[int], seconds: float) -> Iterator[Result]:
    """Results of the case, one per thread count; ``threads`` is ignored on a GPU."""
    cost = case.cost()
    torch.manual_seed(SEED)
    providers = case.prepare()
    for count in threads if case.device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(count)
        wrong = check(providers, case.dtype)
        calls = {name: provider.run for name, provider in providers.items() if name not in wrong}
        times = METHODS[case.device](calls, seconds, case.replay) if calls else Times("none", {})
        medians = {name: 1e3 * statistics.median(rounds) for name, rounds in times.rounds.items()}
        at = (case.name, case.shape, _name(case.dtype), case.device, count, times.method)
        yield Result(
            *at,
            medians,
            ratios(times.rounds, OURS),
            wrong,
            cost.flops,
            cost.bytes,
            case.at,
            ratios(times.rounds, f"{OURS}{PREPACKED}"),
            {name: provider.group for name, provider in providers.items() if provider.group},
            case.left_out,
        )


def rates(result: Result, roof: Peak | None) -> dict[str, dict[str, float]]:
    """TFLOP/s, GB/s and per cent of the roofline of every provider, for the computed FLOPs and bytes. A provider's
    additional work is not counted."""
    seconds = {name: milliseconds / 1e3 for name, milliseconds in result.milliseconds.items()}
    found = {
        "tflops": {name: result.flops / t / 1e12 for name, t in seconds.items()},
        "gigabytes": {name: result.bytes / t / 1e9 for name, t in seconds.items()},
    }
    if roof is not None:
        least = roof.seconds(result.flops, result.bytes)
        found["roofline"] = {name: 100 * least / t for name, t in seconds.items()}
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _roof_of(result: Result) -> str:
    return f"{result.dtype}, {result.threads} thr" if result.device == "cpu" else result.dtype


class Report:
    """The results of a run, written to the file after every case."""

    def __init__(self, path: Path | None, device: str, **metadata: Any) -> None:
        self.path = path
        self.machine = machine(device)
        self.results: list[Result] = []
        self.skipped: dict[str, str] = {}
        self.roofs: dict[str, Peak] = {}
        self.metadata = metadata
        self.write()

    def add(self, result: Result) -> None:
        roof = peak(result.device, getattr(torch, result.dtype), result.threads)
        if roof is not None:
            self.roofs[_roof_of(result)] = roof
        self.results.append(result)
        self.write()

    def roof(self, result: Result) -> Peak | None:
        return self.roofs.get(_roof_of(result))

    def write(self) -> None:
        if self.path is None:
            return
        content = {
            "machine": self.machine,
            **self.metadata,
            "peaks": {name: asdict(roof) for name, roof in self.roofs.items()},
            "results": [asdict(r) | rates(r, self.roof(r)) | {"fastest": r.against_groups()} for r in self.results],
            "skipped": self.skipped,
        }
        write_json(self.path, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def run(cases: Sequence[Case], threads: Sequence[int], seconds: float, report: Report) -> bool:
    """Measure the cases, add them to the report and print them. Returns False if interrupted."""
    disable_memory_trim()
    with progress(len(cases)) as bar:
        for case in cases:
            if reason := insufficient_memory(case):
                report.skipped[str(case)] = reason
                print(f"skipped {case}: {reason}", flush=True)
            else:
                for result in measure(case, threads, seconds):
                    report.add(result)
                    print(line(result, report.roof(result)), flush=True)
            bar.advance(str(case))
    report.write()
    return bar.complete


def exit_on_failure(complete: bool, report: Report) -> None:
    """Exit with 130 after Ctrl-C, or with 1 if any of our results is wrong."""
    if not complete:
        raise SystemExit(130)
    if any(OURS in result.wrong for result in report.results):
        raise SystemExit(1)


def disable_memory_trim() -> None:
    """Make glibc keep freed memory. Otherwise the pages of a result may be mapped and zeroed again on any call, which
    takes longer than many of the timed ops."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_threshold, 2**25)  # the maximum


def free_memory(device: str) -> int:
    """Free bytes on the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    available = [text.split()[1] for text in _lines("/proc/meminfo") if text.startswith("MemAvailable")]
    return 1024 * int(available[0]) if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def line(result: Result, roof: Peak | None = None) -> str:
    """One printed line: the ratio, the case, and each time with its per cent of the roofline."""
    rate = rates(result, roof)
    times = "  ".join(
        f"{name} {ms:.3f}" + (f" ({rate['roofline'][name]:.0f}%)" if roof else "")
        for name, ms in result.milliseconds.items()
    )
    ours = ""
    if OURS in result.milliseconds:
        ours = f"  {OURS}: {rate['tflops'][OURS]:.3g} TFLOP/s, {rate['gigabytes'][OURS]:.3g} GB/s"
    wrong = "".join(f"  WRONG {name}: {why}" for name, why in result.wrong.items())
    threads = f"{result.threads} thr" if result.device == "cpu" else result.method
    case = f"{result.case:<40} {result.shape:<24} {result.dtype:<9} {threads}"
    return f"{_ratios(result):>6}  {case}  ms: {times}{ours}{wrong}"


def _ratios(result: Result) -> str:
    """The ratio to the fastest other, or to the fastest of each group: ours, and after the slash ours prepacked."""
    if not result.groups:
        return "-" if result.ratio_to_fastest is None else f"{result.ratio_to_fastest:.2f}"
    groups = result.against_groups().items()
    return "  ".join(f"{group} {'/'.join(f'{x:.2f}' for x in found.values()) or '-'}" for group, found in groups)


def machine(device: str = "cpu") -> dict[str, str]:
    """The machine, and the versions of the libraries."""
    cpuinfo = _lines("/proc/cpuinfo")
    names = [text.split(":")[1].strip() for text in cpuinfo if text.startswith("model name")]
    clocks = [text.split(":")[1].strip() for text in cpuinfo if text.startswith("cpu MHz")]
    found = {
        "cpu": names[0] if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "clock": f"{float(clocks[0]):.0f} MHz" if clocks else "not reported",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vit_triton": vit_triton.__version__,
        **versions(PACKAGES),
    }
    return {**_gpu(), **found} if device == "cuda" else found


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the installed ``packages``."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def describe(found: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items())


def _gpu() -> dict[str, str]:
    try:
        clock = f"{torch.cuda.clock_rate()} MHz"
    except Exception:  # requires NVML or AMD SMI and an optional package
        clock = "not reported"
    runtime = {"hip": torch.version.hip} if torch.version.hip else {"cuda": str(torch.version.cuda)}
    device = torch.device("cuda", torch.cuda.current_device())
    return {"gpu": torch.cuda.get_device_name(), "architecture": target_of(device).name, "gpu clock": clock, **runtime}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
