"""``vit-triton train`` and ``vit-triton eval``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vit_triton import training
from vit_triton.backend import BACKENDS


def add_arguments(command: str, parser: argparse.ArgumentParser) -> None:
    if command == "train":
        training.add_arguments(parser)
        return
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that train wrote")
    parser.add_argument("--data", help="other data than its own test images: a folder, digits or cifar10")
    parser.add_argument("--backend", choices=BACKENDS, help="of the model")
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    if options.command == "train":
        training.train(training.config_from(options))
        return 0
    result = training.evaluate(options.run, options.data, backend=options.backend, device=options.device)
    if options.json:
        print(json.dumps(result))
    else:
        print(f"loss {result['test_loss']:.3f}, {result['test_accuracy']:.1%} of the test images right")
    return 0
