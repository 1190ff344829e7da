"""The commands, their parser, and what becomes of their errors."""

from __future__ import annotations

import argparse
import sys

import torch

import vit_triton
from vit_triton.cli import attention, bench, features, info, predict, training
from vit_triton.weights import WeightsError

COMMANDS = {
    "info": info,
    "predict": predict,
    "features": features,
    "attention": attention,
    "train": training,
    "eval": training,
    "bench": bench,
}
INTERRUPTED = 130  # what a shell gives a command that Ctrl-C ended


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    whole = argparse.ArgumentParser(prog="vit-triton", description=vit_triton.__doc__)
    whole.add_argument("--version", action="version", version=f"vit_triton {vit_triton.__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, module in COMMANDS.items():
        summary = module.SUMMARY[name]
        module.add_arguments(name, commands.add_parser(name, help=summary, description=summary))
    return whole


def run(argv: list[str]) -> int:
    """Parse and run; errors of the user become one line on stderr."""
    try:
        if argv[:1] == ["bench"]:  # all that follows is for another parser
            return bench.hand_over(argv[1:])
        options = parser().parse_args(argv)
        return COMMANDS[options.command].run(options)
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
