"""``vit-triton train``, ``distill``, ``eval`` and ``compare``."""

from __future__ import annotations

import argparse
import json

from vit_triton import training
from vit_triton.extras import install


def run(options: argparse.Namespace) -> int:
    try:
        return _run(options)
    except ImportError as error:
        # the command requires a larger extra than the package training
        raise ImportError(str(error).replace(install("train"), install("cli"))) from error


def _run(options: argparse.Namespace) -> int:
    if options.command in ("train", "distill"):
        getattr(training, options.command)(training.config_from(options))
        return 0
    if options.command == "compare":
        return _compare(options)
    result = training.evaluate(
        options.run,
        options.data,
        data_folder=options.data_folder,
        download=options.download,
        label=options.label,
        skip_damaged=options.skip_damaged or None,
        backend=options.backend,
        device=options.device,
    )
    if options.json:
        print(json.dumps(result))
    else:
        loss, accuracy, images = (result[name] for name in ("test_loss", "test_accuracy", "images"))
        print(f"test loss {loss:.3f}, test accuracy {accuracy:.1%}, {images:,} images")
    return 0


def _compare(options: argparse.Namespace) -> int:
    outcomes = training.compare(
        options.runs, options.out, force=options.force, backend=options.backend, device=options.device
    )
    if options.json:
        print(json.dumps([outcome.summary() for outcome in outcomes]))
        return 0
    width = max(len(outcome.run) for outcome in outcomes)
    for outcome in outcomes:
        low, high = outcome.interval
        print(
            f"{outcome.run:{width}}  {outcome.accuracy:6.1%} of {len(outcome.labels):,} test images "
            f"(95 % interval {low:.1%} to {high:.1%})  {outcome.model}"
        )
    print(f"wrote {options.out}")
    return 0
