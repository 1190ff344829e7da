"""Comparison of finished runs on the same test images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vit_triton.training import checkpoint, curves
from vit_triton.training.classifiers import wilson_interval
from vit_triton.training.data import AugmentedDataset, load_data
from vit_triton.training.extras import extra
from vit_triton.training.loop import join_processes, load_trained, predictions
from vit_triton.training.networks import preprocessing_of
from vit_triton.weights.atomic import write_atomically

COLUMNS, ROWS = 6, 2  # of the images on which the runs disagree


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run predicts for its test images.

    Attributes:
        run: its folder.
        model: the model of its configuration.
        classes: names of the classes.
        names: of the test images.
        labels, predicted: an index of ``classes`` for each test image.
    """

    run: str
    model: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    predicted: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        return float(np.mean(np.equal(self.labels, self.predicted)))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy, see :func:`.wilson_interval`."""
        return wilson_interval(int(np.sum(np.equal(self.labels, self.predicted))), len(self.labels))

    def summary(self) -> dict[str, Any]:
        """Return the run, its model, accuracy, interval and number of test images."""
        numbers = {"accuracy": self.accuracy, "interval": list(self.interval), "images": len(self.labels)}
        return {"run": self.run, "model": self.model, **numbers}


def compare(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] = "compare.png",
    *,
    force: bool = False,
    backend: str | None = None,
    device: str | None = None,
) -> list[Outcome]:
    """Test finished runs on their test images, and draw their curves, accuracies and images on which they disagree.

    Args:
        runs: folders that :func:`.train` wrote, at least two.
        out: the picture, a PNG.
        force: also compare runs with different test images; no images are drawn then.
        backend: of the models.
        device: of the models, by default a GPU if available.

    Returns:
        An outcome for each run, in the order of ``runs``.

    Raises:
        FileNotFoundError: A folder has no checkpoint, or data are missing.
        ValueError: There are fewer than two runs, or their test images differ and ``force`` is not set.
    """
    if isinstance(runs, (str, os.PathLike)) or len(runs) < 2:
        raise ValueError(f"runs must be at least two folders, got {runs!r}")
    plt = extra("matplotlib.pyplot")
    tested = [_test(Path(run), backend, device) for run in runs]
    outcomes = [outcome for outcome, _ in tested]
    differences = [difference for other in outcomes[1:] if (difference := _difference(outcomes[0], other))]
    if differences and not force:
        raise ValueError(f"runs: {differences[0]}; --force (force=True) compares them nevertheless")
    figure = _draw(outcomes, None if differences else tested[0][1])
    write_atomically(Path(out), lambda file: figure.savefig(file, dpi=120, format="png"))
    plt.close(figure)
    return outcomes


@torch.inference_mode()
def _test(run: Path, backend: str | None, device: str | None) -> tuple[Outcome, AugmentedDataset]:
    model, config, classes = load_trained(run, backend=backend, device=device)
    images = load_data(config, preprocessing_of(config)).test
    predicted: list[int] = []
    with join_processes(config) as process:
        for logits, _ in predictions(model.to(process.device), images, config, process):
            predicted += logits.argmax(1).tolist()
    return Outcome(str(run), config.model, classes, tuple(images.names), tuple(images.labels), tuple(predicted)), images


def _difference(a: Outcome, b: Outcome) -> str:
    """Describe how the test images of two runs differ, "" if they do not."""
    if a.classes != b.classes:
        return f"{a.run} has the classes {list(a.classes)}, {b.run} has {list(b.classes)}"
    if a.names != b.names:
        both = len({*a.names} & {*b.names})
        return f"{a.run} has {len(a.names)} test images, {b.run} has {len(b.names)}, {both} in common"
    return "" if a.labels == b.labels else f"{a.run} and {b.run} have different labels for the same test images"


def _disagreements(outcomes: list[Outcome]) -> list[int]:
    """Return indices of test images that the runs classify differently, spread over all of them."""
    predicted = np.array([outcome.predicted for outcome in outcomes])
    apart = np.flatnonzero((predicted != predicted[0]).any(0))
    shown = min(COLUMNS * ROWS, len(apart))
    return apart[np.linspace(0, len(apart) - 1, shown).round().astype(int)].tolist() if shown else []


def _draw(outcomes: list[Outcome], images: AugmentedDataset | None) -> Any:
    """Return a figure with curves and bars, and of ``images`` those on which the runs disagree."""
    extra("matplotlib").use("Agg")
    plt = extra("matplotlib.pyplot")
    apart = [] if images is None else _disagreements(outcomes)
    rows, caption = -(-len(apart) // COLUMNS), 0.18 * (len(outcomes) + 1)
    heights = [3.2 + 0.3 * len(outcomes), *([rows * (1.5 + caption) + 0.4] if apart else [])]
    figure = plt.figure(figsize=(10, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    colors = [f"C{i % 10}" for i in range(len(outcomes))]
    _draw_accuracies(parts[0], outcomes, colors)
    if images is not None and apart:
        predicted = np.array([outcome.predicted for outcome in outcomes])
        count = int((predicted != predicted[0]).any(0).sum())
        parts[1].suptitle(f"the runs disagree on {count:,} of {len(images):,} test images", fontsize="medium")
        _draw_images(parts[1].subplots(rows, COLUMNS, squeeze=False).flatten(), outcomes, colors, images, apart)
    return figure


def _draw_accuracies(figure: Any, outcomes: list[Outcome], colors: list[str]) -> None:
    left, right = figure.subplots(1, 2)
    for outcome, color in zip(outcomes, colors, strict=True):
        lines = [line for line in curves.read(Path(outcome.run) / checkpoint.METRICS) if "val_accuracy" in line]
        epochs, accuracies = [line["epoch"] for line in lines], [100 * line["val_accuracy"] for line in lines]
        left.plot(epochs, accuracies, marker="o", markersize=3, color=color)
    left.set(xlabel="epoch", ylabel="validation accuracy (%)", title="training")
    left.xaxis.get_major_locator().set_params(integer=True)
    values = np.array([100 * outcome.accuracy for outcome in outcomes])
    ends = 100 * np.array([outcome.interval for outcome in outcomes])
    places = np.arange(len(outcomes))
    right.barh(places, values, xerr=abs(ends - values[:, None]).T, color=colors, height=0.6, capsize=3)
    for place, value in zip(places, values, strict=True):
        right.text(1, place, f"{value:.1f}", va="center", color="white")
    right.set_yticks(places, [f"{Path(outcome.run).name}\n{outcome.model}" for outcome in outcomes])
    right.invert_yaxis()
    right.set(xlabel="test accuracy (%), 95 % interval", title="test", xlim=(0, 100))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.grid(alpha=0.3)


def _draw_images(
    grid: Any, outcomes: list[Outcome], colors: list[str], images: AugmentedDataset, shown: list[int]
) -> None:
    for axes in grid:
        axes.axis("off")
    first = outcomes[0]
    for axes, i in zip(grid, shown, strict=False):
        axes.imshow(np.asarray(images.source.image(images.indices[i])), cmap="gray")
        axes.set_title(f"true: {first.classes[first.labels[i]]}", fontsize="small")
        for line, (outcome, color) in enumerate(zip(outcomes, colors, strict=True)):
            text = outcome.classes[outcome.predicted[i]]
            place = dict(xy=(0.5, 0), xycoords="axes fraction", xytext=(0, -4 - 11 * line), textcoords="offset points")
            axes.annotate(text, **place, ha="center", va="top", color=color, fontsize="small")
