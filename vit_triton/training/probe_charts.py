"""Charts of :func:`vit_triton.training.probe`: accuracy on each data set, and against the number of training images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vit_triton.training.extras import extra
from vit_triton.weights.atomic import write_atomically

CLASSIFIERS = ("kNN", "linear")
PALE = {"kNN": 0.55, "linear": 0.0}  # fraction of white in the color of the features
LINES = {"kNN": (0, (4, 1.5)), "linear": "-"}
COLUMNS = 3  # panels per row
BAR = 0.3  # inches per bar


def draw_data_sets(scores: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the accuracy with all training images: a group of bars per data set, with intervals."""
    plt = _pyplot()
    datas, colours = _unique(scores, "data"), _colours(scores)
    kinds = [(features, classifier) for features in colours for classifier in CLASSIFIERS]
    group = max(len(kinds) + 1.5, 6)  # in bars
    width = BAR * group * max(len(datas), 3) + 1
    rows = math.ceil((len(kinds) + 2) / (columns := max(1, int(width // 3))))
    figure, axes = plt.subplots(figsize=(width, 3.8 + 0.22 * rows), layout="constrained")
    lines = []  # (position, ends of the interval)
    for k, (features, classifier) in enumerate(kinds):
        bars = [(datas.index(x["data"]) * group + k, x) for x in _of(scores, features=features, classifier=classifier)]
        style = dict(width=1, edgecolor="white", linewidth=0.5, color=_mixed(colours[features], PALE[classifier]))
        heights = [100 * x["accuracy"] for _, x in bars]
        axes.bar([at for at, _ in bars], heights, label=f"{features}, {classifier}", **style)
        for at, x in bars:
            low, high = x["interval"] or (x["accuracy"], x["accuracy"])
            lines.append((at, 100 * low, 100 * high))
            axes.annotate(f"{100 * x['accuracy']:.1f}", (at, 100 * high), xytext=(0, 3), textcoords="offset points",
                          ha="center", va="bottom", rotation=90, fontsize=8)  # fmt: skip
    label = "95 % interval" if any(x["interval"] for x in scores) else None
    axes.vlines(*zip(*lines, strict=True), color="0.25", linewidth=1, label=label)
    for i, data in enumerate(datas):
        majority = 100 * _of(scores, data=data)[0]["majority"]
        ends = i * group - 0.75, i * group + len(kinds) - 0.25
        axes.hlines(majority, *ends, color="black", linestyle=":", linewidth=1.4, label=None if i else "majority class")
    middles = [i * group + (len(kinds) - 1) / 2 for i in range(len(datas))]
    axes.set_xticks(middles, [_label(scores, data, int(group * BAR * 14)) for data in datas], fontsize=9)
    # bars of the same width also for one or two data sets
    room = (max(len(datas), 3) - len(datas)) * group / 2
    axes.set_xlim(-1.25 - room, (len(datas) - 1) * group + len(kinds) + 0.25 + room)
    axes.set(ylabel="test accuracy (%)", ylim=(0, 118), yticks=range(0, 101, 20))
    axes.tick_params(axis="x", length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    _write(figure, path)


def draw_shots(scores: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the accuracy against the number of training images: a panel per data set, mean and range of the seeds."""
    plt = _pyplot()
    datas, colours = _unique(scores, "data"), _colours(scores)
    columns = min(COLUMNS, len(datas))
    rows = math.ceil(len(datas) / columns)
    entries = 2 * len(colours) + 2
    legend_columns = max(1, int(4.4 * columns // 3.2))
    size = max(5.2, 4.4 * columns), 3.5 * rows + 0.22 * math.ceil(entries / legend_columns)
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in panels.flat[len(datas) :]:
        axes.set_axis_off()
    for axes, data in zip(panels.flat, datas, strict=False):
        of_data = _of(scores, data=data)
        numbers = sorted({x["train"] for x in of_data})
        for features in _unique(of_data, "features"):
            for classifier in CLASSIFIERS:
                line = _of(of_data, features=features, classifier=classifier)
                at = {n: [100 * x["accuracy"] for x in line if x["train"] == n] for n in numbers}
                colour = _mixed(colours[features], PALE[classifier] / 2)
                axes.plot(numbers, [sum(at[n]) / len(at[n]) for n in numbers], marker="o", markersize=3.5,
                          linestyle=LINES[classifier], color=colour, label=f"{features}, {classifier}")  # fmt: skip
                axes.fill_between(numbers, [min(at[n]) for n in numbers], [max(at[n]) for n in numbers],
                                  color=colours[features], alpha=0.15, linewidth=0)  # fmt: skip
        axes.axhline(100 * of_data[0]["majority"], color="black", linestyle=":", linewidth=1.2, label="majority class")
        axes.set_xscale("log")
        axes.set_xticks(_apart(numbers), [f"{n:,}" for n in _apart(numbers)])
        axes.xaxis.set_minor_locator(extra("matplotlib.ticker").NullLocator())
        axes.set_title(_label(scores, data, 40), fontsize=10)
        axes.set(xlabel="training images", ylabel="test accuracy (%)")
        low = min(100 * min(x["accuracy"], x["majority"]) for x in of_data)
        axes.set_ylim(max(0, 10 * ((low - 3) // 10)), 102)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].fill_between([], [], color="0.85", linewidth=0, label="range of the subsets")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns, frameon=False, fontsize="small")
    _write(figure, path)


def _apart(numbers: list[int]) -> list[int]:
    """Drop tick labels that would overlap on a logarithmic axis; the last remains."""
    kept: list[int] = []
    span = math.log(numbers[-1] / numbers[0]) or 1
    for n in reversed(numbers):
        if not kept or math.log(kept[-1] / n) > 0.1 * span:
            kept.append(n)
    return kept[::-1]


def _label(scores: Sequence[dict[str, Any]], data: str, width: int) -> str:
    """Return the last part of a data set's path, at most ``width`` characters, and the number of test images."""
    name = data.rstrip("/").rpartition("/")[2]
    name = name if len(name) <= width else "…" + name[-width + 1 :]
    return f"{name}\n{_of(scores, data=data)[0]['test']:,} test images"


def _colours(scores: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the color of each kind of features."""
    return {features: f"C{i}" for i, features in enumerate(_unique(scores, "features"))}


def _mixed(colour: str, white: float) -> tuple[float, ...]:
    return tuple(x + (1 - x) * white for x in extra("matplotlib.colors").to_rgb(colour))


def _of(scores: Iterable[dict[str, Any]], **values: str) -> list[dict[str, Any]]:
    return [x for x in scores if all(x[name] == value for name, value in values.items())]


def _unique(scores: Iterable[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(x[name] for x in scores))


def _pyplot() -> Any:
    extra("matplotlib").use("Agg")
    return extra("matplotlib.pyplot")


def _write(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    extra("matplotlib.pyplot").close(figure)
