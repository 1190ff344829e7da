"""The commands, their parser, and their error handling."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import vit_triton
from vit_triton.cli import bench, errors, options
from vit_triton.extras import install


class Command(NamedTuple):
    module: str  # imported after parsing: importing PyTorch takes seconds, and `tune` does not require the extra cli
    add_options: Callable[[argparse.ArgumentParser], None]
    summary: str


COMMANDS = {
    "info": Command("info", options.info, "show versions, devices, and the backend of each operation with the reason"),
    "predict": Command("predict", options.predict, "print the five most likely classes of each image"),
    "features": Command(
        "features",
        options.features,
        "write the principal components of the patch features as a picture, and the features as .npz",
    ),
    "attention": Command(
        "attention",
        options.attention,
        "draw the attention of the class token in a block, one picture per head; without a class token, as in Swin, "
        "draw the attention that each token receives, averaged over all queries",
    ),
    "train": Command(
        "training",
        options.train,
        "train a model on labelled images; on several GPUs under torchrun",
    ),
    "distill": Command("training", options.distill, "train a student on the labels and the predictions of a teacher"),
    "compare": Command(
        "training",
        options.compare,
        "test runs on the same test images and draw their curves, their accuracies and where they disagree",
    ),
    "eval": Command("training", options.evaluate, "print the loss and accuracy of a trained model on test images"),
    "probe": Command(
        "probe",
        options.probe,
        "compare models without training them: kNN and logistic regression on their features of labelled images",
    ),
    "tune": Command(
        "tune",
        options.tune,
        "time candidate tiles on this GPU, or the kernels against PyTorch on this CPU, and write a table that "
        "vit_triton reads",
    ),
    "bench": Command(
        "bench", options.bench, "compare speed, memory and generated code with other libraries: python -m benchmarks"
    ),
}
INTERRUPTED = 130  # the exit code of a shell for a command that Ctrl-C ended


def parser() -> argparse.ArgumentParser:
    """Create the parser of the whole command line."""
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
        raise ImportError(f"{error}; {install('cli')}") from error


def _as_typed(message: str, argv: list[str]) -> str:
    """Replace the names of arguments in an error message, as Python writes them, with the options of the command."""
    one = argparse.ArgumentParser(add_help=False)
    COMMANDS[next(word for word in argv if word in COMMANDS)].add_options(one)
    options = [(action.dest, action.option_strings[-1]) for action in one._actions if action.option_strings]
    names = {option[2:].replace("-", "_"): option for _, option in options} | dict(options)
    if not names:
        return message
    name = f"({'|'.join(names)})"
    subject = rf"(^|, |: ){name}(?=: | must | requires | matches )"
    advice = rf"(; |or set |with ){name}(?=, |$)"
    return re.sub(f"{subject}|{advice}", lambda m: f"{m[1] or m[3] or ''}{names[m[2] or m[4]]}", message)


def run(argv: list[str]) -> int:
    """Parse and run a command line. User errors are reported as one line on stderr."""
    try:
        if argv[:1] == ["bench"]:  # the parser of the benchmarks handles the remaining arguments
            return bench.run_checkout(argv[1:])
        given = parser().parse_args(argv)
        return _module(given.command).run(given)
    except KeyboardInterrupt:
        if not errors.is_first():
            return INTERRUPTED
        hint = "; --resume continues from the last checkpoint" if argv[:1] == ["train"] else ""
        return errors.report(f"interrupted{hint}", INTERRUPTED)
    except (ImportError, OSError, ValueError) as error:
        return errors.report(_as_typed(" ".join(str(error).split()), argv), 2)
    except (MemoryError, RuntimeError) as error:
        if not errors.is_out_of_memory(error):
            raise
        return errors.report(
            f"out of memory; reduce the size of the model, image or batch: {' '.join(str(error).split())}", 2
        )
