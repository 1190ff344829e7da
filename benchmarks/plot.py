"""Charts of a report: PNG files, 1200 pixels wide, with a white background for light and dark pages."""

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib.figure
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from benchmarks.runner import COMPILE, EAGER, OURS, PREPACKED, RUNTIME, Report, Result
from benchmarks.slopes import AXES, Slope, curves

HIGHLIGHT, SLOWER, LINE, GREY, GRID = "#d9480f", "#f4a582", "#343a40", "#868e96", "#e9ecef"
OTHERS = (
    "#495057",
    "#1c7ed6",
    "#2f9e44",
    "#9c36b5",
    "#868e96",
    "#74c0fc",
)  # ours is highlighted
GROUPS = {
    EAGER: ("PyTorch eager", "#adb5bd"),
    COMPILE: ("torch.compile", "#74c0fc"),
    RUNTIME: ("other runtimes", "#69db7c"),
}
T = TypeVar("T")
MARKERS = "osDv^Pp<>Xdh*"


def compare(report: Report, folder: Path) -> list[Path]:
    """Charts of `ops` (ratios, roofline) and `models` (ratios, times): one file per dtype and thread count, and for
    `ops` per shape."""
    paths = []
    command = report.metadata["command"]
    for group, results in _groups(report.results, by_shape=command == "ops").items():
        if any(r.ratio for r in results):
            paths.append(_ratios(report, results, folder / f"{command}_ratios_{group}.png"))
        if command == "models":
            paths.append(_times(report, results, folder / f"{command}_times_{group}.png"))
        elif report.roof(results[0]) is not None and any(r.flops for r in results):
            paths.append(_roofline(report, results, folder / f"{command}_roofline_{group}.png"))
    return paths


def _groups(results: Iterable[Result], by_shape: bool) -> dict[str, list[Result]]:
    """Timed results grouped by dtype, thread count and, if ``by_shape`` and there are several shapes, the shape."""
    timed = [r for r in results if r.milliseconds]
    shapes = {r.shape for r in timed}
    groups: dict[str, list[Result]] = {}
    for r in timed:
        parts = [r.dtype, *([f"{r.threads}_threads"] if r.device == "cpu" else [])]
        parts += [re.sub(r"\W+", "_", r.shape)] if by_shape and len(shapes) > 1 else []
        groups.setdefault("_".join(parts), []).append(r)
    return groups


def _figure(
    report: Report, results: Sequence[Result], height: float, title: str, rows: int = 1, columns: int = 1
) -> tuple[Any, Any]:
    """A figure and its axes; the subtitle names the machine and the dtype."""
    figure = matplotlib.figure.Figure(figsize=(8, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.62 / height))
    figure.text(0.012, 1 - 0.08 / height, title, va="top", fontsize=13, fontweight="bold", color=LINE)
    text = f"Measured on {_machine(report, results[0])}, {results[0].dtype}"
    figure.text(0.012, 1 - 0.36 / height, text, va="top", fontsize=9.5, color=LINE)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9, colors=LINE)
        ax.set_axisbelow(True)
        ax.grid(color=GRID, lw=0.7)
    return figure, axes


def _machine(report: Report, result: Result) -> str:
    if result.device != "cpu":
        return report.machine["gpu"]
    return f"{report.machine['cpu']}, {result.threads} of {report.machine['cores']} cores"


def _log(ax: Any, axis: str, ticks: Sequence[float] = ()) -> None:
    """Make the axis logarithmic, with plain numbers, within its current limits."""
    getattr(ax, f"set_{axis}scale")("log")
    side = getattr(ax, f"{axis}axis")
    low, high = side.get_view_interval()
    steps = (1, 2, 5) if high > 8 * low else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    side.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(subs=steps))
    side.set_major_formatter("{x:g}")
    side.set_minor_locator(NullLocator())


def _legend(ax: Any, columns: int, handles: Sequence[Any]) -> None:
    """Place the legend half an inch below the axes, under the axis label."""
    below = ax.transAxes + ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans)
    place = dict(loc="upper center", bbox_to_anchor=(0.4, 0), bbox_transform=below)
    ax.legend(handles=handles, ncols=columns, fontsize=8.5, frameon=False, handletextpad=0.4, **place)


def _mark(marker: str, colour: str, label: str, **style: Any) -> Line2D:
    return Line2D([], [], marker=marker, color=colour, ls="", ms=6, label=label, **style)


def _save(figure: Any, report: Report, results: Sequence[Result], path: Path, meaning: str) -> Path:
    """Write the file, with a caption of ``meaning`` and the measuring method."""
    m, first = report.machine, results[0]
    how = f"Medians, {first.method}; vit_triton {m['vit_triton']}, torch {m['torch']}, triton {m['triton']}"
    figure.supxlabel(f"{meaning}\n{how}", x=0.012, ha="left", fontsize=8.5, color="#495057")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Title": f"Measured on {_machine(report, first)}, {first.dtype}. {how}"})
    return path


def _label(result: Result, results: Sequence[Result]) -> str:
    """Case and shape; the shape is omitted if all results share it."""
    return result.case if len({r.shape for r in results}) == 1 else f"{result.case}\n{result.shape}"


def _title(text: str, results: Sequence[Result]) -> str:
    shapes = {r.shape for r in results}
    return f"{text}: ViT-{shapes.pop().removeprefix('ViT-')}" if len(shapes) == 1 else text


def _others(by_name: dict[str, T]) -> dict[str, T]:
    return {name: x for name, x in by_name.items() if not name.startswith(OURS)}


def _ratios(report: Report, results: Sequence[Result], path: Path) -> Path:
    """A bar from 1 to the ratio to the fastest other, a mark for each other, on a logarithmic axis."""
    shown = [r for r in results if r.ratio_to_fastest is not None]
    colours = _others(_colours(name for r in shown for name in _others(r.ratio)))
    marks = dict(zip(colours, itertools.cycle(MARKERS), strict=False))
    height = 2.0 + 0.36 * len(shown) * (1.3 if "\n" in _label(shown[0], results) else 1) + 0.2 * (len(colours) // 4 + 1)
    figure, axes = _figure(report, results, height, _title(f"{OURS} against others", results))
    ax = axes[0, 0]
    for y, r in enumerate(shown):
        best = r.ratio_to_fastest or 1.0
        ax.barh(y, best - 1, left=1, color=HIGHLIGHT if best >= 1 else SLOWER, height=0.62, zorder=2)
        for name, ratio in _others(r.ratio).items():
            ax.plot(ratio, y, marks[name], ms=6, color=colours[name], mec="white", mew=0.7, zorder=4)
        place = dict(xycoords=("axes fraction", "data"), textcoords="offset points", va="center")
        colour = HIGHLIGHT if best >= 1 else GREY
        ax.annotate(f"{best:.2f} x", (1, y), (6, 0), fontsize=9, fontweight="bold", color=colour, **place)
    ends = [0.9, 1.1, *(x for r in shown for x in _others(r.ratio).values())]
    ax.set_xlim(min(ends) / 1.1, max(ends) * 1.1)
    _log(ax, "x")
    ax.axvline(1, color=LINE, lw=1.3, zorder=3)
    ax.set_yticks(range(len(shown)), [_label(r, results) for r in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(f"time of the other / time of {OURS}; right of 1, {OURS} is faster", fontsize=9, color=LINE)
    bars = [Patch(color=HIGHLIGHT, label=f"{OURS} is fastest"), Patch(color=SLOWER, label="another is faster")]
    _legend(ax, 4, [*(_mark(marks[name], colour, name) for name, colour in colours.items()), *bars])
    return _save(figure, report, results, path, "Bar and number: ratio to the fastest other; marks: ratio to each")


def _colours(names: Iterable[str]) -> dict[str, str]:
    others = [name for name in dict.fromkeys(names) if name != OURS]
    return {OURS: HIGHLIGHT, **{name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}}


def _times(report: Report, results: Sequence[Result], path: Path) -> Path:
    """A panel of bars per case, each with its own axis: small and large models differ too much for one."""
    columns = 2 if len(results) > 1 else 1
    rows = -(-len(results) // columns)
    bars = max(len(r.milliseconds) for r in results)
    groups = [group for group in GROUPS if any(group in r.groups.values() for r in results)]
    height = 1.2 + rows * (0.75 + 0.27 * bars) + (0.3 if groups else 0)
    figure, axes = _figure(report, results, height, "Time of whole models: shorter is faster", rows, columns)
    for ax, r in zip(axes.flat, results, strict=False):
        names = list(r.milliseconds)
        ax.set_title(f"{r.shape}: {r.case}", fontsize=9.5, loc="right", color=LINE)
        ax.barh(names, r.milliseconds.values(), color=[_of_group(name, r) for name in names], height=0.7)
        ax.bar_label(ax.containers[0], fmt="%.4g", fontsize=8.5, padding=3, color=LINE)
        ax.set_xlim(0, 1.2 * max(r.milliseconds.values()))
        ax.set_xlabel("ms", fontsize=9, color=LINE)
        ax.grid(visible=False, axis="y")
        ax.invert_yaxis()
    for ax in list(axes.flat)[len(results) :]:
        ax.set_visible(False)
    if groups:
        ours = [Patch(color=HIGHLIGHT, label=OURS), Patch(color=SLOWER, label=f"{OURS}, other forms")]
        handles = [*ours, *(Patch(color=GROUPS[group][1], label=GROUPS[group][0]) for group in groups)]
        place = dict(loc="upper left", bbox_to_anchor=(0, 1 - 0.55 / height), ncols=5)
        figure.legend(handles=handles, fontsize=8.5, frameon=False, handletextpad=0.4, **place)
        figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.92 / height))
    return _save(figure, report, results, path, _names(results))


def _of_group(name: str, result: Result) -> str:
    if name.startswith(OURS):
        return HIGHLIGHT if name == OURS else SLOWER
    return GROUPS[result.groups[name]][1] if name in result.groups else "#adb5bd"


def _names(results: Sequence[Result]) -> str:
    """The meaning of the providers' names in the chart."""
    names = {name for r in results for name in r.milliseconds}
    texts = {f"{OURS} timm": "timm's model, accelerated", f"{OURS} torch": "on PyTorch operations"}
    found = [f"{name}: {text}" for name, text in texts.items() if name in names]
    if any(name.endswith(PREPACKED) for name in names):
        found.append("prepacked: packed weights")
    return "; ".join(found) or "Bars: milliseconds"


def _roofline(report: Report, results: Sequence[Result], path: Path) -> Path:
    """TFLOP/s over FLOPs per byte, for results with FLOPs: ours and the fastest other, joined by a line."""
    roof = report.roof(results[0])
    assert roof is not None
    shown = [r for r in results if r.flops]
    figure, axes = _figure(report, results, 5.6, _title("Roofline", results))
    ax = axes[0, 0]
    xs, corner, top = [r.flops / r.bytes for r in shown], roof.flops / roof.bytes, roof.flops / 1e12
    low, high = min(*xs, corner) / 3, 3 * max(*xs, corner)
    ax.plot([low, corner, high], [top * low / corner, top, top], color=LINE, lw=1.6)
    small = dict(textcoords="offset points", fontsize=9, color=LINE)
    ax.annotate(f"{top:.3g} TFLOP/s", (high, top), (-2, 4), ha="right", **small)
    ax.annotate(f"{roof.bytes / 1e9:.4g} GB/s", (low * 1.2, 1.2 * top * low / corner), (10, -12), **small)
    ops = list(dict.fromkeys(_op(r) for r in shown))
    for r in shown:
        x, marker = r.flops / r.bytes, MARKERS[ops.index(_op(r)) % len(MARKERS)]
        others = _others(r.milliseconds)
        speeds = [(min(others.values()), GREY)] if others else []
        speeds += [(r.milliseconds[OURS], HIGHLIGHT)] if OURS in r.milliseconds else []
        ax.plot([x] * len(speeds), [r.flops / ms / 1e9 for ms, _ in speeds], color="#ced4da", lw=1.2, zorder=2)
        for milliseconds, colour in speeds:
            filled = colour if "backward" not in r.case else "white"
            ax.plot(x, r.flops / milliseconds / 1e9, marker, color=colour, mfc=filled, ms=8, mew=1.6, zorder=3)
    ax.set_xlim(low, high)
    _log(ax, "x")
    _log(ax, "y")
    ax.set_xlabel("FLOPs per byte, computed: arguments read once, results written once", fontsize=9, color=LINE)
    ax.set_ylabel("TFLOP/s (computed FLOPs / measured time)", fontsize=9, color=LINE)
    passes = [_mark("o", LINE, "filled: forward"), _mark("o", LINE, "hollow: with backward", mfc="white")]
    whose = [_mark("o", HIGHLIGHT, OURS), _mark("o", GREY, "the fastest other")]
    _legend(ax, 3, [*(_mark(MARKERS[i % len(MARKERS)], LINE, op) for i, op in enumerate(ops)), *passes, *whose])
    return _save(figure, report, results, path, f"Roof: {roof.source}")


def _op(result: Result) -> str:
    return result.case.split(" forward")[0].split(" backward")[0]


def growth(report: Report, slopes: Sequence[Slope], folder: Path) -> list[Path]:
    """Time over size, both logarithmic: a row per case, a column per axis, slopes in the legends."""
    fitted = {(s.case, s.dtype, s.threads, s.axis, s.provider): s.slope for s in slopes}
    model, width, heads = report.metadata["options"]["model"], report.metadata["width"], report.metadata["heads"]
    paths = []
    for group, results in _groups(report.results, by_shape=False).items():
        found = curves(results)
        cases = list(dict.fromkeys(key[0] for key in found))
        sides = sorted({key[3] for key in found}, key=AXES.index)
        title = f"Time as work grows: ViT-{model}, width {width}, {heads} heads"
        figure, axes = _figure(report, results, 1.5 + 2.5 * len(cases), title, len(cases), len(sides))
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
                thickness = 2.2 if name == OURS else 1.4
                ax.plot(*zip(*curve[name], strict=True), "o-", color=colour, lw=thickness, ms=4, label=label)
            _log(ax, "x", sorted({size for points in curve.values() for size, _ in points}))
            _log(ax, "y")
            ax.tick_params(axis="x", labelsize=8, labelrotation=45 if key[3] == "tokens" else 0)
            ax.set_title(key[0], fontsize=9.5, loc="left", color=LINE)
            ax.set_xlabel(key[3], fontsize=9, color=LINE)
            ax.set_ylabel("ms", fontsize=9, color=LINE)
            ax.legend(fontsize=8, frameon=False)
        meaning = "Slope s: time ~ size^s, fitted to the larger half of the sizes that both providers were timed at"
        paths.append(_save(figure, report, results, folder / f"growth_{group}.png", meaning))
    return paths
