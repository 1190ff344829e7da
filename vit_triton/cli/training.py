"""``vit-triton train`` and ``vit-triton eval``."""

from __future__ import annotations

import argparse
import dataclasses
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
    if options.command == "train":
        try:
            training.train(training.config_from(options))
        except ValueError as error:
            raise ValueError(_with_option(str(error))) from error
        return 0
    result = training.evaluate(options.run, options.data, backend=options.backend, device=options.device)
    if options.json:
        print(json.dumps(result))
    else:
        print(f"test loss {result['test_loss']:.3f}, test accuracy {result['test_accuracy']:.1%}")
    return 0


def _with_option(message: str) -> str:
    """Replace a field of TrainConfig at the start of an error message with its command-line option."""
    name, _, rest = message.partition(" ")
    options = {field.name for field in dataclasses.fields(training.TrainConfig)} - {"data"}
    return f"--{name.replace('_', '-')} {rest}" if name in options else message
