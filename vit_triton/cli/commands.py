"""The commands, their parser, and what becomes of their errors."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import torch

import vit_triton
from vit_triton.cli import bench
from vit_triton.weights import WeightsError

# the module of each command, imported when the command is given: `tune` needs none of the packages of the others
COMMANDS = {
    "info": ("info", "versions, devices, and which backend runs what, and why"),
    "predict": ("predict", "the five most likely classes of each image"),
    "features": (
        "features",
        "the principal components of the patch features as a picture, and the features as .npz",
    ),
    "attention": ("attention", "the attention of the class token over each image, head by head"),
    "train": (
        "training",
        "train a model on a folder of images, digits or cifar10; under torchrun on many GPUs",
    ),
    "eval": ("training", "loss and accuracy of a trained model on test images"),
    "tune": ("tune", "time the candidate tiles on this GPU, and write those that vit_triton then uses on it"),
    "bench": ("bench", "speed, memory and generated code, against PyTorch and others: python -m benchmarks"),
}
INTERRUPTED = 130  # what a shell gives a command that Ctrl-C ended


def parser(command: str) -> argparse.ArgumentParser:
    """Of the whole command line; of the commands, ``command`` alone has its options."""
    whole = argparse.ArgumentParser(prog="vit-triton", description=vit_triton.__doc__)
    whole.add_argument("--version", action="version", version=f"vit_triton {vit_triton.__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (_, summary) in COMMANDS.items():
        one = commands.add_parser(name, help=summary, description=summary)
        if name == command:
            _module(name).add_arguments(name, one)
    return whole


def _module(command: str) -> Any:
    try:
        return importlib.import_module(f"vit_triton.cli.{COMMANDS[command][0]}")
    except ImportError as error:
        raise ImportError(f"{error}: it needs the extra [cli], pip install 'vit_triton[cli]'") from error


def run(argv: list[str]) -> int:
    """Parse and run; errors of the user become one line on stderr."""
    try:
        if argv[:1] == ["bench"]:  # all that follows is for another parser
            return bench.hand_over(argv[1:])
        options = parser(argv[0] if argv else "").parse_args(argv)
        return _module(options.command).run(options)
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last checkpoint" if argv[:1] == ["train"] else ""
        return _say(f"interrupted{hint}", INTERRUPTED)
    except WeightsError as error:
        return _say(_misfit(error), 2)
    except (ImportError, OSError, ValueError) as error:
        return _say(" ".join(str(error).split()), 2)
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        return _say(f"out of memory; a smaller model, image or batch needs less: {' '.join(str(error).split())}", 2)


def _is_of_memory(error: MemoryError | RuntimeError) -> bool:
    """PyTorch has a class of its own for a GPU's memory, and for that of the CPU a text only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _say(line: str, code: int) -> int:
    print(f"vit-triton: {line}", file=sys.stderr)
    return code


def _misfit(error: WeightsError) -> str:
    """What does not fit, in one line: there may be hundreds of names."""
    parts = []
    for what, names in (
        ("not in the file", error.missing),
        ("not in the model", error.surplus),
        ("different", error.unlike),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"{what}: {names[0]}{more}")
    first = str(error).splitlines()[0]
    return f"{first} {'; '.join(parts)}. --ignore PATTERN names what need not fit" if parts else first
