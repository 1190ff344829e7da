"""The page report.md: failures first, then measurements."""

import collections
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import machine, model_graphs, models, numbers, tiles
from benchmarks.gpu.process import BAD
from benchmarks.gpu.results import Results
from benchmarks.gpu.step import Section
from benchmarks.peaks import Peak
from benchmarks.runner import OURS
from vit_triton.kernels import tuned

Steps = Mapping[str, dict[str, Any]]
NAMED = 12  # steps that were not reached, in each section


def markdown(results: Results, sections: Sequence[Section]) -> str:
    parts = [
        _head(results, sections),
        _bad(results.steps),
        _table_of_machine(results),
        _numbers(results.steps),
        _models(results.steps),
        _graphs(results.steps),
        _operators(results.steps),
        _products(results.steps),
        _tuning(results.path.parent),
        _missing(results, sections),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def count(results: Results) -> str:
    every = collections.Counter(result["status"] for result in results.steps.values())
    return ", ".join(f"{n} {status}" for status, n in every.most_common())


def _head(results: Results, sections: Sequence[Section]) -> str:
    name = results.machine.get("gpu") or results.machine.get("cpu", "an unknown machine")
    total = sum(len(section.steps) for section in sections)
    lines = [f"# vit_triton on {name}", f"{len(results.steps)} of {total} steps have a result: {count(results)}."]
    if "gpu" not in results.machine:
        lines.append(
            f"**This is a trial on a CPU with tiny sizes** (kernels {results.machine.get('kernels')}): its times do "
            "not apply to a GPU."
        )
    dates = "; ".join(f"{run['date']}, {run['minutes']:g} minutes" for run in results.runs)
    lines.append(
        f"Made by `python -m benchmarks gpu` ({dates}). To report a problem, open an issue with this page and "
        "results.json. Every ratio is the other's time / vit_triton's time, the median of interleaved rounds: above 1, "
        "vit_triton is faster."
    )
    return "\n\n".join(lines)


def _bad(steps: Steps) -> str:
    bad = {key: result for key, result in steps.items() if result["status"] in BAD}
    if not bad:
        return f"## What went wrong\n\nNothing in the {len(steps)} steps that have a result."
    parts = ["## What went wrong", _rows(("step", "what", ""), ((k, r["status"], r["line"]) for k, r in bad.items()))]
    for key, result in bad.items():
        lines = [line for line in result.get("detail", "").splitlines() if not line.startswith("== ")]
        if lines:
            parts.append(f"{key}:\n\n" + "\n".join(f"    {line}" for line in lines[-25:]))
    return "\n\n".join(parts)


def _table_of_machine(results: Results) -> str:
    ceilings = [
        (key.split(": ", 1)[1], result["line"])
        for key, result in _of("machine", results.steps)
        if not key.endswith(machine.DEVICE)
    ]
    return "## The machine\n\n" + _rows(("", ""), [*results.machine.items(), *ceilings])


def _numbers(steps: Steps) -> str:
    found = dict(_of("numbers", steps))
    if not found:
        return ""
    names = [check.name for check in numbers.OPERATORS] + ["ViT of 2 blocks"]
    dtypes = ("bfloat16", "float32", "float16")
    rows = []
    for name in names:
        cells = [_error(found.pop(f"numbers: {name}, {dtype}", None)) for dtype in dtypes]
        if any(cells):
            rows.append((name, *cells))
    others = [(key.removeprefix("numbers: "), result["status"], result["line"]) for key, result in found.items()]
    parts = [
        "## Numbers",
        "Relative L2 error against float64 of the result or gradient that is closest to its limit; in brackets that of "
        "PyTorch's own operators. The limit is twice PyTorch's error, or 16 eps of the dtype if that is larger. Every "
        "call runs twice; passed includes bitwise equal results.",
        _rows(("operator", *dtypes), rows) if rows else "",
        _rows(("check", "", ""), others) if others else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _error(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    if not result.get("errors"):
        return result["status"]
    worst = result["worst"]
    return f"{result['status']} {result['errors'][worst]:.1e} ({result['pytorch'][worst]:.1e})"


def _models(steps: Steps) -> str:
    rows = []
    for model in models.MODELS:
        for what in (models.INFERENCE, models.TRAINING):
            eager = steps.get(f"models: {model.name}, {what}", {})
            compiled = steps.get(f"models: {model.name}, {what}, torch.compile", {})
            if not eager and not compiled:
                continue
            rate = {**compiled.get("images_per_second", {}), **eager.get("images_per_second", {})}
            ratio = {**compiled.get("ratio", {}), **eager.get("ratio", {})}
            memory = {**compiled.get("memory", {}), **eager.get("memory", {})}
            rows.append(
                (
                    model.name,
                    what,
                    eager.get("batch") or compiled.get("batch", ""),
                    *(_number(rate.get(name)) for name in ("accelerated", "eager", "torch.compile")),
                    *(_ratio(ratio.get(name)) for name in ("eager", "torch.compile")),
                    *(_gigabytes(memory.get(name)) for name in ("accelerated", "eager", "torch.compile")),
                    eager.get("library") or eager.get("status", ""),
                )
            )
    if not rows:
        return ""
    header = (
        "model",
        "",
        "batch",
        "accelerated, images/s",
        "eager",
        "torch.compile",
        "ratio to eager",
        "ratio to torch.compile",
    )
    header += ("GiB, accelerated", "GiB, eager", "GiB, torch.compile", "library")
    return (
        "## Whole models\n\nInference in bfloat16; training with float32 parameters and autocast to bfloat16. Memory: "
        "peak bytes that a call allocates. Images/s come from the median time of each variant; a ratio is the median "
        "of the ratios of interleaved rounds, and may differ from the ratio of both rates.\n\n" + _rows(header, rows)
    )


def _graphs(steps: Steps) -> str:
    rows = []
    for library in (model_graphs.OURS, model_graphs.OTHER):
        for what in (models.INFERENCE, models.TRAINING):
            ms = steps.get(f"models: {model_graphs.name_of(library, what)}", {}).get("milliseconds")
            if ms:
                rows.append((library, what, *(f"{ms[name]:.3f}" for name in model_graphs.VARIANTS)))
    if not rows:
        return ""
    header = ("model", "", *(f"ms, {name}" for name in model_graphs.VARIANTS))
    return f"## CUDA graphs\n\n{models.MODELS[0].name} at batch 1.\n\n" + _rows(header, rows)


def _operators(steps: Steps) -> str:
    rows = []
    for _, result in _of("speed", steps):
        ms = result.get("milliseconds")
        if not isinstance(ms, dict) or OURS not in ms:
            continue
        others = {name: value for name, value in ms.items() if not name.startswith(OURS)}
        fastest = min(others, key=lambda name: others[name], default=None)
        times = ", ".join(f"{name} {value:.3f}" for name, value in others.items())
        roof = _share(result, steps)
        ratio = result["ratio"].get(fastest)
        rows.append((result["case"], result["shape"], f"{ms[OURS]:.3f}", _ratio(ratio), fastest or "", times, roof))
    header = ("operator", "shape", "vit_triton, ms", "ratio", "to the fastest other", "others, ms", "of the ceiling")
    if not rows:
        return ""
    return (
        "## Operators\n\nOf the ceiling: minimum time by the measured copy bandwidth and GEMM rate (computed) / "
        "measured time.\n\n" + _rows(header, rows)
    )


def _share(result: dict[str, Any], steps: Steps) -> str:
    """Minimum time by the measured copy bandwidth and GEMM rate, in per cent of the measured time."""
    product = steps.get(f"machine: product of matrices, {result['dtype']}", {}).get("tflops")
    copy = steps.get("machine: copy bandwidth", {}).get("gigabytes")
    if not product or not copy:
        return ""
    least = Peak(product * 1e12, copy * 1e9, "").seconds(result["flops"], result["bytes"])
    return f"{100 * least / (result['milliseconds'][OURS] / 1e3):.0f} %"


def _products(steps: Steps) -> str:
    rows = [
        (row["case"], row["tile"], *(f"{row['milliseconds'][name]:.4f}" for name in ("ours", "vendor")),
         _ratio(row["ratio"]))
        for _, result in _of("speed", steps)
        for row in result.get("products", [])
    ]  # fmt: skip
    if not rows:
        return ""
    header = ("GEMM", "our tile", "ours, ms", "vendor's and one pass, ms", "ratio")
    return "## GEMM kernels against the vendor's GEMM\n\n" + _rows(header, rows)


def _tuning(folder: Path) -> str:
    path = folder / tiles.FILE
    if not path.exists():
        return ""
    timed = tuned.read(path).timed
    speedups = {
        f"{each.picker}({tuned.format_arguments(each.arguments)})": (tiles.speedup(each), each.config) for each in timed
    }
    rows = [(name, f"{speedup:.2f}", config) for name, (speedup, config) in speedups.items() if speedup > 1]
    return (
        f"## Tuning\n\n{len(timed)} choices were timed, and {len(rows)} differ from the default. To use "
        f"them, set the environment variable VIT_TRITON_TUNED to the path of {path.name}.\n\n"
        + _rows(("choice", "the default's time / tuned", "tuned"), sorted(rows, key=lambda row: row[1], reverse=True))
    )


def _missing(results: Results, sections: Sequence[Section]) -> str:
    left = {
        section.title: [step.name for step in section.steps if results.missing(section.key(step), again=False)]
        for section in sections
    }
    rows = [
        (title, len(names), "; ".join(names[:NAMED] + ["..."] * (len(names) > NAMED)))
        for title, names in left.items()
        if names
    ]
    if not rows:
        return ""
    return "## Steps without a result\n\nThe same command, without `--only`, runs these steps.\n\n" + _rows(
        ("section", "steps", "names"), rows
    )


def _of(section: str, steps: Steps) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((key, result) for key, result in steps.items() if key.startswith(f"{section}: "))


def _rows(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 2**30:.2f}"
