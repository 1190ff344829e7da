"""vit_triton against PyTorch and others in speed and memory, and what GPU compilers make of its kernels."""

import argparse
import importlib
import sys
from typing import Any

# the module of each command, imported when the command is given: `gpu` needs none of the packages of the others
COMMANDS = {
    "gpu": ("gpu", "the first minutes on a GPU: check every operator, then time models and operators, then tune"),
    "ops": ("compare", "time every operator against PyTorch's and others'"),
    "models": ("compare", "time whole models against those of others"),
    "growth": ("growth", "time attention and blocks as tokens, batch and depth grow, and fit the slopes"),
    "memory": ("memory", "count the bytes a block saves for backward, its peak and its kernels, and those of others"),
    "overhead": ("overhead", "time the Python between a call and its launches, against Triton's own launcher"),
    "codegen": ("codegen", "compile every kernel for GPUs and count what comes out; needs no GPU"),
}


def module(command: str) -> Any:
    try:
        return importlib.import_module(f"benchmarks.{COMMANDS[command][0]}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise SystemExit("the kernels need the package triton (pip install triton; Linux only)") from None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="|".join(COMMANDS))
    for name, (_, summary) in COMMANDS.items():
        one = commands.add_parser(name, help=summary, description=summary)
        if name == next(iter(sys.argv[1:]), None):
            module(name).add_arguments(one)
    given = parser.parse_args()
    module(given.what).run(given)


if __name__ == "__main__":
    main()
