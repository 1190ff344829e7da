"""``vit-triton train`` and ``vit-triton eval``."""

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
    if options.command == "train":
        training.train(training.config_from(options))
        return 0
    result = training.evaluate(options.run, options.data, backend=options.backend, device=options.device)
    if options.json:
        print(json.dumps(result))
    else:
        print(f"test loss {result['test_loss']:.3f}, test accuracy {result['test_accuracy']:.1%}")
    return 0
