"""The commands, their parser, and what becomes of their errors."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import vit_triton
from vit_triton.cli import bench, errors, options


class Command(NamedTuple):
    module: str  # imported once the command line is parsed: PyTorch takes seconds, and `tune` needs no other package
    add_options: Callable[[argparse.ArgumentParser], None]
    summary: str


COMMANDS = {
    "info": Command("info", options.info, "versions, devices, and which backend runs what, and why"),
    "predict": Command("predict", options.predict, "the five most likely classes of each image"),
    "features": Command(
        "features",
        options.features,
        "the principal components of the patch features as a picture, and the features as .npz",
    ),
    "attention": Command(
        "attention", options.attention, "the attention of the class token over each image, head by head"
    ),
    "train": Command(
        "training",
        options.train,
        "train a model on a folder of images, digits or cifar10; under torchrun on many GPUs",
    ),
    "eval": Command("training", options.evaluate, "loss and accuracy of a trained model on test images"),
    "tune": Command(
        "tune", options.tune, "time the candidate tiles on this GPU, and write those that vit_triton then uses on it"
    ),
    "bench": Command(
        "bench", options.bench, "speed, memory and generated code, against PyTorch and others: python -m benchmarks"
    ),
}
INTERRUPTED = 130  # what a shell gives a command that Ctrl-C ended


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    whole = errors.Parser(prog="vit-triton", description=vit_triton.__doc__)
    whole.add_argument("--version", action="version", version=f"vit_triton {vit_triton.__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        command.add_options(commands.add_parser(name, help=command.summary, description=command.summary))
    return whole


def _module(command: str) -> Any:
    try:
        return importlib.import_module(f"vit_triton.cli.{COMMANDS[command].module}")
    except ImportError as error:
        raise ImportError(f"{error}: it needs the extra [cli], pip install 'vit_triton[cli]'") from error


def run(argv: list[str]) -> int:
    """Parse and run; errors of the user become one line on stderr."""
    try:
        if argv[:1] == ["bench"]:  # all that follows is for another parser
            return bench.hand_over(argv[1:])
        given = parser().parse_args(argv)
        return _module(given.command).run(given)
    except KeyboardInterrupt:
        if not errors.is_first():
            return INTERRUPTED
        hint = "; --resume goes on from the last checkpoint" if argv[:1] == ["train"] else ""
        return errors.report(f"interrupted{hint}", INTERRUPTED)
    except (ImportError, OSError, ValueError) as error:
        return errors.report(" ".join(str(error).split()), 2)
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        return errors.report(
            f"out of memory; a smaller model, image or batch needs less: {' '.join(str(error).split())}", 2
        )


def _is_of_memory(error: MemoryError | RuntimeError) -> bool:
    """PyTorch has a class of its own for a GPU's memory, and for that of the CPU a text only."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
