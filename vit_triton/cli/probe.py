"""``vit-triton probe``: data sets classified by the features of models that are not trained."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vit_triton import training
from vit_triton.training.probing import DATA_SETS, OPTIONS, SCORES, SHOTS, whole


def run(options: argparse.Namespace) -> int:
    shared = {name: getattr(options, name) for name in OPTIONS} | {"ignore": tuple(options.ignore or ())}
    result = training.probe(
        options.data, options.models, out=options.out, weights=weights_of(options.weights, options.models),
        raw=options.raw, pool=options.pool, shots=options.shots, seeds=options.seeds, **shared,
    )  # fmt: skip
    for table in tables(whole(result["scores"])):
        Console().print(table)
    files = (SCORES, DATA_SETS, *([SHOTS] if options.shots else []))
    print(f"wrote {', '.join(str(options.out / name) for name in files)}")
    return 0


def weights_of(texts: list[str], models: list[str]) -> dict[str, str] | str | None:
    """Return the file of each model, from texts MODEL=FILE; of a single model also from a text FILE.

    Raises:
        ValueError: A text names none of several models, or a model has two files.
    """
    files: dict[str, str] = {}
    for text in texts:
        # names of models and files may contain "="
        model = next((model for model in models if text.startswith(f"{model}=")), None)
        if model is None and len(models) != 1:
            raise ValueError(f"weights must be MODEL=FILE with {len(models)} models, got {text!r}")
        file = text if model is None else text[len(model) + 1 :]
        model = model or models[0]
        if model in files:
            raise ValueError(f"weights must be one file for {model}, got {files[model]!r} and {file!r}")
        files[model] = file
    return files or None


def tables(scores: list[dict[str, Any]]) -> Iterator[Table]:
    """Yield a table per data set, of the scores of classifiers fitted to all training images."""
    for data, group in itertools.groupby(scores, key=lambda x: x["data"]):
        rows = list(group)
        title = f"{data}: {rows[0]['train']:,} training and {rows[0]['test']:,} test images"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("features", "classifier"):
            table.add_column(name, overflow="fold")
        for name in ("accuracy", "95 % interval", "balanced", "seconds"):
            table.add_column(name, justify="right")
        for x in rows:
            interval = "" if x["interval"] is None else "{:.1%} - {:.1%}".format(*x["interval"])
            table.add_row(x["features"], x["classifier"], f"{x['accuracy']:.1%}", interval,
                          f"{x['balanced_accuracy']:.1%}", f"{x['feature_seconds'] + x['seconds']:.1f}")  # fmt: skip
        table.add_row("", "majority class", f"{rows[0]['majority']:.1%}")
        yield table
