"""Plots of the loss and accuracy of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vit_triton.training.extras import extra
from vit_triton.weights.atomic import write_atomically

STEP = {"step", "epoch", "learning_rate", "loss"}
VAL, TEST = {"step", "epoch", "val_loss", "val_accuracy"}, {"step", "epoch", "test_loss", "test_accuracy"}
SMOOTHED = 0.05  # fraction of the steps over which the training loss is averaged


def read(metrics: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file; an incomplete last line is ignored.

    Raises:
        ValueError: A line is damaged; the message names the file and the line.
    """
    if not os.path.lexists(metrics):
        return []
    if not metrics.is_file():
        raise ValueError(f"{metrics}: not a regular file")
    *whole, _ = metrics.read_bytes().split(b"\n")
    lines = []
    for i, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
            if not _is_line(line):
                raise ValueError
        except (ValueError, RecursionError):
            start = text[:40].decode(errors="replace")
            raise ValueError(
                f"{metrics}, line {i}: expected the JSON of a step, validation or test, got {start!r}; correct or "
                "remove the line, or move the file"
            ) from None
        lines.append(line)
    return lines


def _is_line(line: Any) -> bool:
    """Return whether `line` has the keys of a step, a validation or a test and only numbers as values."""
    if not isinstance(line, dict) or not all(type(value) in (int, float) for value in line.values()):
        return False
    return line.keys() in (STEP, VAL, TEST) and type(line["step"]) is int


def draw(metrics: Path, picture: Path, title: str) -> None:
    """Plot ``metrics`` and write ``picture`` (a PNG)."""
    extra("matplotlib").use("Agg")
    plt = extra("matplotlib.pyplot")
    lines = read(metrics)
    steps = [line for line in lines if "loss" in line]
    vals, tests = ([line for line in lines if f"{name}_loss" in line] for name in ("val", "test"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    at, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
    span = max(1, round(len(losses) * SMOOTHED))
    around = [losses[max(0, i - span // 2) : i + span // 2 + 1] for i in range(len(losses))]
    mean = [sum(part) / len(part) for part in around]
    left.plot(at, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each step")
    left.plot(at, mean, color="tab:blue", label=f"training, mean of {span} steps" if span > 1 else None)
    after, dots = [val["step"] for val in vals], dict(marker="o", markersize=4, color="tab:orange")
    left.plot(after, [val["val_loss"] for val in vals], label="validation", **dots)
    left.set(xlabel="step", ylabel="cross-entropy", title="loss (training: augmented images)")
    right.plot(after, [100 * val["val_accuracy"] for val in vals], label="validation", **dots)
    right.set(xlabel="step", ylabel="accuracy (%)", title="accuracy", ylim=(0, 104))
    for test in tests:
        star = dict(marker="*", markersize=9, linestyle="none", color="tab:green", label="test")
        left.plot(test["step"], test["test_loss"], **star)
        right.plot(test["step"], 100 * test["test_accuracy"], **star)
        right.annotate(f"{100 * test['test_accuracy']:.1f} %", (test["step"], 100 * test["test_accuracy"]),
                       xytext=(0, -16), textcoords="offset points", ha="right")  # fmt: skip
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="small")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    write_atomically(picture, lambda file: figure.savefig(file, dpi=120, format="png"))
    plt.close(figure)
