"""Benchmarks of speed and memory against PyTorch and other libraries, and figures of the compiled kernels."""

import importlib
import sys
from typing import Any

from vit_triton.cli.errors import Parser
from vit_triton.extras import install

# command -> (module, summary); only the given command's module is imported: `gpu` requires fewer packages
COMMANDS = {
    "gpu": ("gpu", "first run on a GPU: check every operator, time models and operators, then tune"),
    "ops": ("compare", "time every operator against PyTorch and other libraries"),
    "models": ("compare", "time whole models against other libraries"),
    "growth": ("growth", "time attention and blocks over tokens, batch and depth, and fit the slopes"),
    "memory": ("memory", "count saved bytes, peak memory and kernel launches of a block, against other libraries"),
    "overhead": ("overhead", "time the Python code from a call to its launches, against Triton's own launcher"),
    "codegen": ("codegen", "compile every kernel for GPUs and count registers and instructions; needs no GPU"),
}


def module(command: str) -> Any:
    try:
        return importlib.import_module(f"benchmarks.{COMMANDS[command][0]}")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            raise SystemExit("the kernels require the package triton (pip install triton; Linux only)") from None
        if (error.name or "").partition(".")[0] not in ("matplotlib", "rich"):
            raise
        raise SystemExit(f"{error}; {install('bench')}") from None


def main() -> None:
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="|".join(COMMANDS))
    for name, (_, summary) in COMMANDS.items():
        one = commands.add_parser(name, help=summary, description=summary)
        if name == next(iter(sys.argv[1:]), None):
            module(name).add_arguments(one)
    args = parser.parse_args()
    module(args.what).run(args)


if __name__ == "__main__":
    main()
