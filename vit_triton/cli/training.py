"""``vit-triton train`` and ``vit-triton eval``."""

from __future__ import annotations

import argparse
import dataclasses
import json

from vit_triton import training


def run(options: argparse.Namespace) -> int:
    if options.command == "train":
        try:
            training.train(training.config_from(options))
        except ValueError as error:
            raise ValueError(with_option(str(error))) from error
        return 0
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


def with_option(message: str) -> str:
    """Replace an argument at the start of an error message with its command-line option."""
    name, _, rest = message.partition(" ")
    options = {field.name: field.name for field in dataclasses.fields(training.TrainConfig)}
    options |= {"models": "model", "pool": "pool", "shots": "shots", "seeds": "seeds"}  # of probe
    return f"--{options[name].replace('_', '-')} {rest}" if name in options.keys() - {"data"} else message
