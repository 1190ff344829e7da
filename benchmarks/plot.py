"""Charts of a report, as PNG files about 1200 pixels wide, on white: they are read in light and dark pages alike."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.growth import AXES, Slope, curves
from benchmarks.runner import OURS, Report, Result

HIGHLIGHT, LINE = "#d9480f", "#343a40"
OTHERS = ("#495057", "#1c7ed6", "#2f9e44", "#9c36b5", "#868e96", "#74c0fc")  # ours stands out by colour and width
MARKERS = "sDv^Pp<>"


def compare(report: Report, folder: Path) -> list[Path]:
    """Of `ops` and `models`: ratios, times of models, and the roofline; one file each per dtype and thread count."""
    paths = []
    models = report.also.get("command") == "models"
    for group, results in _groups(report.results).items():
        paths.append(_ratios(report, results, folder / f"ratios_{group}.png"))
        if models:
            paths.append(_times(report, results, folder / f"times_{group}.png"))
        elif report.roof(results[0]) is not None:
            paths.append(_roofline(report, results, folder / f"roofline_{group}.png"))
    return paths


def _groups(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Those with any time, by dtype and threads."""
    groups: dict[str, list[Result]] = {}
    for r in results:
        if r.milliseconds:
            groups.setdefault(f"{r.dtype}_{r.threads}_threads" if r.device == "cpu" else r.dtype, []).append(r)
    return groups


def _figure(height: float, title: str, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    figure = matplotlib.figure.Figure(figsize=(8, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=LINE)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9, colors=LINE)
    return figure, axes


def _log(ax: Any, axis: str) -> None:
    getattr(ax, f"set_{axis}scale")("log")
    ticks = getattr(ax, f"{axis}axis")
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if axis == "y" else (1, 4)))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())


def _save(figure: Any, report: Report, results: Sequence[Result], path: Path, meaning: str = "") -> Path:
    """With what it shows, and what was measured on, below the picture."""
    m, first = report.machine, results[0]
    threads = f", {first.threads} of {m['cores']} cores" if first.device == "cpu" else ""
    on = f"{m.get('gpu', m['cpu'])}{threads}"
    text = f"Measured on {on}; {first.dtype}; torch {m['torch']}, triton {m['triton']}; {first.method} medians"
    figure.supxlabel(f"{meaning}\n{text}".strip(), x=0.01, ha="left", fontsize=8.5, color="#495057")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Title": text})
    return path


def _label(result: Result, results: Sequence[Result]) -> str:
    """Of what all share, the shape is not repeated."""
    return result.case if len({r.shape for r in results}) == 1 else f"{result.case}\n{result.shape}"


def _title(text: str, results: Sequence[Result]) -> str:
    shapes = {r.shape for r in results}
    return f"{text}: ViT-{shapes.pop().removeprefix('ViT-')}" if len(shapes) == 1 else text


def _ratios(report: Report, results: Sequence[Result], path: Path) -> Path:
    """A bar to the fastest other, a dot for every other."""
    shown = [r for r in results if r.against_the_fastest is not None]
    figure, axes = _figure(1.6 + 0.42 * len(shown) * (1.3 if "\n" in _label(results[0], results) else 1),
                           _title("Speed against others", results))  # fmt: skip
    ax = axes[0, 0]
    edge = 1.25 * max((r.against_the_fastest or 0.0 for r in shown), default=1.0)
    for y, r in enumerate(shown):
        best = r.against_the_fastest or 0.0
        ax.barh(y, best, color=HIGHLIGHT if best >= 1 else "#f4a582", height=0.62, zorder=2)
        others = [min(ratio, edge) for name, ratio in r.ratio.items() if not name.startswith(OURS)]
        for marker, ratios in (("o", [x for x in others if x < edge]), (">", [x for x in others if x == edge])):
            ax.plot(ratios, [y] * len(ratios), marker, ms=4.5, color="#495057", mec="white", mew=0.6, zorder=4)
        ax.annotate(f"{best:.2f}", (0, y), (5, 0), textcoords="offset points", va="center", fontsize=9,
                    fontweight="bold", color="white" if best >= 1 else LINE, zorder=5)  # fmt: skip
    ax.axvline(1, color=LINE, lw=1.3, zorder=3)
    ax.set_yticks(range(len(shown)), [_label(r, results) for r in shown])
    ax.invert_yaxis()
    ax.set_xlim(0, max(1.02 * edge, 1.1))
    meaning = f"Time of others / time of {OURS}; right of the line, {OURS} is faster. Bar: the fastest; dots: each"
    ax.grid(axis="x", color="#dee2e6", lw=0.7, zorder=0)
    return _save(figure, report, results, path, meaning)


def _colours(names: Iterable[str]) -> dict[str, str]:
    others = [name for name in dict.fromkeys(names) if name != OURS]
    return {OURS: HIGHLIGHT, **{name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}}


def _times(report: Report, results: Sequence[Result], path: Path) -> Path:
    """Bars side by side, a panel per case: times of small and large models share no axis."""
    columns = 2 if len(results) > 1 else 1
    rows = -(-len(results) // columns)
    bars = max(len(r.milliseconds) for r in results)
    figure, axes = _figure(0.9 + rows * (0.75 + 0.27 * bars), "Time of whole models", rows, columns)
    for ax, r in zip(axes.flat, results, strict=False):
        names = list(r.milliseconds)
        ax.set_title(f"{r.shape}: {r.case}", fontsize=9.5, loc="left", color=LINE)
        ax.barh(
            names, r.milliseconds.values(), color=[HIGHLIGHT if n == OURS else "#adb5bd" for n in names], height=0.7
        )
        ax.bar_label(ax.containers[0], fmt="%.4g", fontsize=8.5, padding=3, color=LINE)
        ax.set_xlim(0, 1.16 * max(r.milliseconds.values()))
        ax.set_xlabel("ms", fontsize=9, color=LINE)
        ax.invert_yaxis()
    for ax in list(axes.flat)[len(results) :]:
        ax.set_visible(False)
    return _save(figure, report, results, path)


def _roofline(report: Report, results: Sequence[Result], path: Path) -> Path:
    """TFLOP/s over FLOPs per byte, of what has FLOPs: ours and the fastest other, joined."""
    roof = report.roof(results[0])
    assert roof is not None
    shown = [r for r in results if r.flops]
    figure, axes = _figure(5.4, _title("Roofline", results))
    ax = axes[0, 0]
    xs = [r.flops / r.bytes for r in shown] or [1.0]
    low, high = min(*xs, roof.flops / roof.bytes) / 3, 3 * max(*xs, roof.flops / roof.bytes)
    corner = roof.flops / roof.bytes
    ax.plot([low, corner, high], [low * roof.bytes / 1e12, roof.flops / 1e12, roof.flops / 1e12], color=LINE, lw=1.6)
    ax.annotate(f"{roof.flops / 1e12:.3g} TFLOP/s, {roof.bytes / 1e9:.3g} GB/s", (low, roof.flops / 1e12), (0, 5),
                textcoords="offset points", fontsize=9, color=LINE)  # fmt: skip
    for i, r in enumerate(shown):
        x, marker = r.flops / r.bytes, MARKERS[i // 2 % len(MARKERS)]
        others = [t for name, t in r.milliseconds.items() if not name.startswith(OURS)]
        speeds = [(min(others), "#868e96")] if others else []
        speeds += [(r.milliseconds[OURS], HIGHLIGHT)] if OURS in r.milliseconds else []
        for milliseconds, colour in speeds:
            filled = colour if "backward" not in r.case else "white"
            ax.plot(x, r.flops / milliseconds / 1e9, marker, color=colour, mfc=filled, ms=8, mew=1.6, zorder=3)
    for i, name in enumerate(dict.fromkeys(_label(r, results).replace("\n", ", ") for r in shown)):
        hollow = "white" if "backward" in name else LINE
        ax.plot([], [], MARKERS[i // 2 % len(MARKERS)], color=LINE, mfc=hollow, ms=7, label=name)
    ax.plot([], [], "o", color=HIGHLIGHT, ms=7, label=OURS)
    ax.plot([], [], "o", color="#868e96", ms=7, label="fastest other")
    _log(ax, "x")
    _log(ax, "y")
    ax.set_xlim(low, high)
    ax.set_xlabel("FLOPs per byte, computed: arguments read once, results written once", fontsize=9, color=LINE)
    ax.set_ylabel("TFLOP/s", fontsize=9, color=LINE)
    ax.grid(color="#e9ecef", lw=0.7, which="both")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return _save(figure, report, results, path, f"Roof: {roof.source}")


def growth(report: Report, slopes: Sequence[Slope], folder: Path) -> list[Path]:
    """Time over size, both logarithmic: a row per case, a column per axis; slopes in the legends."""
    fitted = {(s.case, s.dtype, s.threads, s.axis, s.provider): s.slope for s in slopes}
    paths = []
    for group, results in _groups(report.results).items():
        found = curves(results)
        cases = list(dict.fromkeys(key[0] for key in found))
        sides = sorted({key[3] for key in found}, key=AXES.index)
        figure, axes = _figure(1 + 2.5 * len(cases), "Time as work grows", len(cases), len(sides))
        for ax in axes.flat:
            ax.set_visible(False)
        for key, curve in found.items():
            ax = axes[cases.index(key[0]), sides.index(key[3])]
            ax.set_visible(True)
            for name, colour in reversed(_colours(curve).items()):
                if name not in curve:
                    continue
                slope = fitted.get((*key, name))
                label = name if slope is None else f"{name}, slope {slope:.2f}"
                width = 2.2 if name == OURS else 1.4
                ax.plot(*zip(*curve[name], strict=True), "o-", color=colour, lw=width, ms=4, label=label)
            _log(ax, "x")
            _log(ax, "y")
            ax.set_title(key[0], fontsize=9.5, loc="left", color=LINE)
            ax.set_xlabel(key[3], fontsize=9, color=LINE)
            ax.set_ylabel("ms", fontsize=9, color=LINE)
            ax.grid(color="#e9ecef", lw=0.7)
            ax.legend(fontsize=8, frameon=False)
        paths.append(_save(figure, report, results, folder / f"growth_{group}.png"))
    return paths
